// x *= factor: the backward pass of a loss whose gradient the forward pass has stored. The factor is read on the
// device, and where it is 1, as it is after loss.backward(), nothing else is read or written.
#include <algorithm>

#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

// `parts` blocks share a row.
template <class T>
__global__ void __launch_bounds__(256) scale_rows(const Rows matrix /* [count, width] */, int64_t count, int64_t width,
                                                  int parts, const float* factor /* [1] */) {
    constexpr int kWidth = kLanes<T>;
    const float by = *factor;
    if (by == 1.f) return;
    const int64_t thread = int64_t{blockIdx.x % parts} * blockDim.x + threadIdx.x,
                  threads = int64_t{parts} * blockDim.x;

    for (int64_t row = blockIdx.x / parts; row < count; row += gridDim.x / parts) {
        T* const x = row_pointer<T>(matrix, row);  // [width]
        const int64_t ragged = (kWidth - misalignment(x)) % kWidth, head = ragged < width ? ragged : width;
        const int64_t vectors = (width - head) / kWidth, tail = head + vectors * kWidth;
        for (int64_t i = thread; i < vectors; i += threads) {
            T* const at = x + head + i * kWidth;
            float values[kWidth];
            unpack<T>(__ldcs(reinterpret_cast<const uint4*>(at)), values);
#pragma unroll
            for (float& value : values) value *= by;
            store(at, values);
        }
        for (int64_t i = thread; i < head; i += threads) x[i] = narrow<T>(widen(x[i]) * by);
        for (int64_t i = tail + thread; i < width; i += threads) x[i] = narrow<T>(widen(x[i]) * by);
    }
}

}  // namespace

void scale(const Rows& x, int64_t count, int64_t width, const void* factor, cudaStream_t stream) {
    constexpr int kThreads = 256, kBlocksPerProcessor = 8;
    const int size = element_size(x.dtype, "scale");
    if (count == 0 || width == 0) return;
    const int64_t most = int64_t{current_device().processors} * kBlocksPerProcessor;
    const int64_t parts = std::min(width * size / (16 * kThreads) + 1, most);
    const int64_t blocks = parts * std::min(count, most / parts);
    with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        check(launch({blocks, kThreads, 0, stream}, scale_rows<T>, x, count, width, int(parts),
                     static_cast<const float*>(factor)),
              "scale_rows");
    });
}

}  // namespace pyalign::cuda
