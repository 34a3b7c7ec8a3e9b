// x *= factor: the backward pass of a loss whose gradient the forward pass has stored. The factor is read on the
// device, and where it is 1, as it is after loss.backward(), nothing else is read or written.
#include <algorithm>

#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256)
    scale_elements(T* x /* [count] */, int64_t count, const float* factor /* [1] */) {
    constexpr int kWidth = kLanes<T>;
    const float by = *factor;
    if (by == 1.f) return;
    const int64_t ragged = (kWidth - misalignment(x)) % kWidth, head = ragged < count ? ragged : count;
    const int64_t vectors = (count - head) / kWidth, tail = head + vectors * kWidth;
    const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;

    for (int64_t i = thread; i < vectors; i += threads) {
        T* const at = x + head + i * kWidth;
        float values[kWidth];
        unpack<T>(__ldcs(reinterpret_cast<const uint4*>(at)), values);
#pragma unroll
        for (float& value : values) value *= by;
        store(at, values);
    }
    for (int64_t i = thread; i < head; i += threads) x[i] = narrow<T>(widen(x[i]) * by);
    for (int64_t i = tail + thread; i < count; i += threads) x[i] = narrow<T>(widen(x[i]) * by);
}

}  // namespace

void scale(void* x, Dtype dtype, int64_t count, const void* factor, cudaStream_t stream) {
    constexpr int kThreads = 256, kBlocksPerProcessor = 8;
    const int size = element_size(dtype, "scale");
    if (count == 0) return;
    const int64_t wanted = count * size / (16 * kThreads) + 1;
    const int64_t blocks = std::min(wanted, int64_t{current_device().processors} * kBlocksPerProcessor);
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        check(launch({blocks, kThreads, 0, stream}, scale_elements<T>, static_cast<T*>(x), count,
                     static_cast<const float*>(factor)),
              "scale_elements");
    });
}

}  // namespace pyalign::cuda
