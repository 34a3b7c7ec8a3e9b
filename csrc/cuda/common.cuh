// What the kernels share: 16-byte vectors of rows that start anywhere, states merged over warps and blocks in a fixed
// order, and launches that are checked.
//
// Rows have any element alignment (V is odd, strides are free), and student, teacher and gradient may each have
// another. Vectors follow the row that is written, so that its stores are whole; the other rows are read as aligned
// vectors too, and two neighbours make one that isn't aligned. No byte outside a row is read: the few elements before
// and after the vectors are one thread's each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "common/distill.h"
#include "common/distill_args.h"
#include "cuda/cuda.h"

namespace pyalign::cuda {

constexpr int kWarp = 32;

// ---- Elements and vectors of 16 bytes ----

template <class T>
constexpr int kLanes = 16 / sizeof(T);

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
    if constexpr (sizeof(T) == 4)
        return x;
    else if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(x);
    else
        return __float2bfloat16_rn(x);
}

template <class T>
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[kLanes<T>]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            x[i] = __uint_as_float(words[i]);
        } else if constexpr (std::is_same_v<T, __half>) {
            const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        } else {
            x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kLanes<T>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            words[i] = __float_as_uint(x[i]);
        } else if constexpr (std::is_same_v<T, __half>) {
            const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        } else {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The largest of some values. NaN counts only where all are.
template <int N>
__device__ __forceinline__ float largest_of(const float (&x)[N]) {
    float largest[2] = {x[0], x[N - 1]};  // two chains: half the latency
#pragma unroll
    for (int i = 1; i < N - 1; ++i) largest[i % 2] = fmaxf(largest[i % 2], x[i]);
    return fmaxf(largest[0], largest[1]);
}

// Of a vector: pairs of 16 bits at once.
template <class T>
__device__ __forceinline__ float largest_of(uint4 raw) {
    if constexpr (sizeof(T) == 4) {
        const float x[4] = {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                            __uint_as_float(raw.w)};
        return largest_of(x);
    } else {
        using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        const auto two = [](const uint32_t& word) { return reinterpret_cast<const Two&>(word); };
        const Two pair = __hmax2(__hmax2(two(raw.x), two(raw.y)), __hmax2(two(raw.z), two(raw.w)));
        return fmaxf(widen(pair.x), widen(pair.y));
    }
}

// One vector, or one element, of a gradient that nobody reads soon.
template <class T>
__device__ __forceinline__ void store(T* to, const float (&x)[kLanes<T>]) {
    __stcs(reinterpret_cast<uint4*>(to), pack<T>(x));
}

// Half a vector of 16-bit elements: as many as a vector of floats holds.
template <class T>
__device__ __forceinline__ void store(T* to, const float (&x)[kLanes<T> / 2]) {
    const float pair[kLanes<T>] = {x[0], x[1], x[2], x[3]};
    const uint4 packed = pack<T>(pair);
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(packed.x, packed.y));
}

template <class T>
__device__ __forceinline__ void store(T* to, const float (&x)[1]) {
    *to = narrow<T>(x[0]);
}

// The 16 bytes that start `lanes` elements into the 32 bytes (low, high).
template <class T>
__device__ __forceinline__ uint4 realign(uint4 low, uint4 high, int lanes) {
    const int bytes = lanes * int(sizeof(T));
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t by_one[7], by_three[5], out[4];
#pragma unroll
    for (int i = 0; i < 7; ++i) by_one[i] = bytes & 4 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) by_three[i] = bytes & 8 ? by_one[i + 2] : by_one[i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[i] = sizeof(T) == 4 ? by_three[i] : __funnelshift_r(by_three[i], by_three[i + 1], 8 * (bytes & 3));
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// body(std::true_type) or body(std::false_type): a loop of its own for what no entry of a row should ask.
template <class Body>
__device__ __forceinline__ void specialised(bool flag, Body body) {
    if (flag)
        body(std::true_type{});
    else
        body(std::false_type{});
}

// ---- Rows ----

// Row r of a matrix behind two leading strides.
template <class T>
__device__ __forceinline__ T* row_pointer(const Rows& rows, int64_t r) {
    return static_cast<T*>(rows.data) + rows.start(r);
}

// How many elements past a boundary of kLanes<T> of them. Of T itself, that is one of 16 bytes.
template <class T, class G>
__device__ __forceinline__ int lead_of(const G* x) {
    return int(reinterpret_cast<uintptr_t>(x) / sizeof(G) % kLanes<T>);
}

template <class T>
__device__ __forceinline__ int misalignment(const T* x) {
    return lead_of<T>(x);
}

// A row of `head` elements, `vectors` vectors, and the elements left over.
struct Split {
    int head, vectors, size;

    // The element outside the vectors that falls to this thread, or -1. There are never more than 31.
    template <class T>
    __device__ __forceinline__ int edge(int thread) const {
        const int element = thread < head ? thread : thread + vectors * kLanes<T>;
        return element < size ? (thread < size - vectors * kLanes<T> ? element : -1) : -1;
    }
};

// Vectors start where `lead`, the lead_of<T> of the row that is written, says. Rows of other alignments (`together`
// is false) are read one vector further on both sides.
template <class T>
__device__ __forceinline__ Split split_row(int size, int lead, bool together) {
    constexpr int kWidth = kLanes<T>;
    const int margin = together ? 0 : kWidth;
    const int wanted = (kWidth - lead) % kWidth + margin, head = wanted < size ? wanted : size;
    const int room = size - head - margin;
    return {head, room > 0 ? room / kWidth : 0, size};
}

// The vectors of a row in global memory: vector i holds the elements first[i * kLanes] and on.
template <class T>
struct Vectors {
    const uint4* aligned = nullptr;
    int lanes = 0;  // where in aligned[i] the elements of vector i start

    __device__ __forceinline__ explicit Vectors(const T* first)
        : aligned(reinterpret_cast<const uint4*>(first - misalignment(first))), lanes(misalignment(first)) {}
};

// kRows rows of one length, read by one block. The first `kept` vectors of each stay in shared memory from the first
// reading on, and so do the elements outside the vectors; those beyond come from L2 again. A thread meets the same
// elements in every pass: nobody has to wait.
template <class T, int kRows>
struct BlockRows {
    static constexpr int kEdgeBytes = kRows * kWarp * int(sizeof(float));

    const T* rows[kRows];  // [size]
    Split split;
    float* edges;  // [kRows, 32], shared
    uint4* kept;   // [kRows, capacity], shared
    int capacity;

    __device__ __forceinline__ BlockRows(const T* const (&x)[kRows], int size, int lead, float* edges, uint4* kept,
                                         int capacity)
        : edges(edges), kept(kept), capacity(capacity) {
        bool together = true;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            rows[r] = x[r];
            together = together && misalignment(x[r]) == lead;
        }
        split = split_row<T>(size, lead, together);
    }

    // body(element, raw): raw[r] is row r's vector from `element` on.
    template <bool kFirst, int kBatch, class Body>
    __device__ __forceinline__ void vectors(Body body) {
        const int threads = blockDim.x, count = split.vectors;
        for (int start = threadIdx.x; start < count; start += kBatch * threads) {
            uint4 raw[kBatch][kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const Vectors<T> vectors(rows[r] + split.head);
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    const int i = start + b * threads;
                    if (i >= count) continue;
                    if (!kFirst && i < capacity)
                        raw[b][r] = kept[r * capacity + i];
                    else
                        raw[b][r] = __ldca(vectors.aligned + i);
                }
                if (vectors.lanes == 0) continue;
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    const int i = start + b * threads;
                    if (i < count && (kFirst || i >= capacity))
                        raw[b][r] = realign<T>(raw[b][r], __ldca(vectors.aligned + i + 1), vectors.lanes);
                }
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int i = start + b * threads;
                if (i >= count) continue;
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    if (kFirst && i < capacity) kept[r * capacity + i] = raw[b][r];
                body(split.head + i * kLanes<T>, raw[b]);
            }
        }
    }

    // body(element, x): x[r][0] is row r's element outside the vectors that falls to this thread, if one does.
    template <bool kFirst, class Body>
    __device__ __forceinline__ void outside(Body body) {
        const int edge = split.template edge<T>(threadIdx.x);
        if (edge < 0) return;
        float x[kRows][1];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float& here = edges[r * kWarp + threadIdx.x];
            if (kFirst) here = widen(rows[r][edge]);
            x[r][0] = here;
        }
        body(edge, x);
    }

    // body(element, x): x[r][0 .. N) are row r's values from `element` on; N is kLanes, or 1 outside the vectors.
    template <bool kFirst, int kBatch, class Body>
    __device__ __forceinline__ void pass(Body body) {
        vectors<kFirst, kBatch>([&](int element, const uint4(&raw)[kRows]) {
            float x[kRows][kLanes<T>];
#pragma unroll
            for (int r = 0; r < kRows; ++r) unpack<T>(raw[r], x[r]);
            body(element, x);
        });
        outside<kFirst>(body);
    }

    // The same elements without reading them: body gets zeros.
    template <class Body>
    __device__ __forceinline__ void positions(Body body) const {
        const float zeros[kRows][kLanes<T>] = {}, zero[kRows][1] = {};
        for (int i = threadIdx.x; i < split.vectors; i += blockDim.x) body(split.head + i * kLanes<T>, zeros);
        const int edge = split.template edge<T>(threadIdx.x);
        if (edge >= 0) body(edge, zero);
    }
};

// Writes `value` to [0, count), with `threads` threads.
template <class T>
__device__ __forceinline__ void fill(T* to, int64_t count, float value, int thread, int threads) {
    constexpr int kWidth = kLanes<T>;
    const int64_t ragged = (kWidth - misalignment(to)) % kWidth, head = ragged < count ? ragged : count;
    const int64_t vectors = (count - head) / kWidth, tail = head + vectors * kWidth;
    float x[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = value;
    for (int64_t i = thread; i < head; i += threads) to[i] = narrow<T>(value);
    for (int64_t i = thread; i < vectors; i += threads) store(to + head + i * kWidth, x);
    for (int64_t i = tail + thread; i < count; i += threads) to[i] = narrow<T>(value);
}

// ---- Exponentials ----

// 2^x, relative error 2^-22; 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2 x, to 2^-22 absolutely between 1/2 and 2, relatively elsewhere.
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// exp((x - max) / T) in two instructions, where the formula as it stands takes eleven, and they bound the kernels:
// 2^(x c - origin) with c = log2(e) / T and origin = max c. The product x c isn't rounded; what was rounded off origin
// is a factor common to the whole row, and `correction` takes it back, once.
struct Exponential {
    static constexpr float kLog2E = 1.442695041f, kLn2 = 0.6931471806f;
    static constexpr float kLowest = -3e38f;  // an origin is finite, so that -inf gives 0

    float c, origin;

    __device__ __forceinline__ Exponential(float max, float inverse_temperature)
        : c(inverse_temperature * kLog2E), origin(fmaxf(max * c, kLowest)) {}

    __device__ __forceinline__ float exponent(float x) const { return __fmaf_rn(x, c, -origin); }
    __device__ __forceinline__ float operator()(float x) const { return exp2_fast(exponent(x)); }
    // log2 of the correction, and the correction: 1 for the max of nothing.
    __device__ __forceinline__ float lost(float max) const {
        return max * c < kLowest ? 0.f : __fmaf_rn(max, -c, origin);
    }
    __device__ __forceinline__ float correction(float max) const { return exp2_fast(lost(max)); }
};

// One thread's Softmax state while it folds, N logits at once: one rescaling for all. max drops NaN, but the sum keeps
// it.
struct Folding {
    float max = Softmax<float>{}.max, origin = Exponential::kLowest, sum = 0;  // of Exponential(max)

    // What brings sums taken so far to the new max: they are of exponents that fall by `shift`.
    struct Step {
        Exponential now;
        float shift, scale;
    };

    __device__ __forceinline__ Step raise(float largest, float inverse_temperature) {
        max = fmaxf(max, largest);
        const Exponential now(max, inverse_temperature);
        const float shift = now.origin - origin;
        origin = now.origin;
        return {now, shift, exp2_fast(-shift)};
    }

    // `largest` is that of x.
    template <int N>
    __device__ __forceinline__ void fold(const float (&x)[N], float largest, float inverse_temperature) {
        const Step step = raise(largest, inverse_temperature);
        float sums[2] = {sum * step.scale, 0.f};
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i % 2] += step.now(x[i]);
        sum = sums[0] + sums[1];
    }
    template <int N>
    __device__ __forceinline__ void fold(const float (&x)[N], float inverse_temperature) {
        fold(x, largest_of(x), inverse_temperature);
    }

    __device__ __forceinline__ Softmax<float> state(float inverse_temperature) const {
        return {max, weigh(sum, Exponential(max, inverse_temperature).correction(max))};
    }
};

// ---- States over warps and blocks ----

// Butterflies: every lane ends with the same bits (__fadd_rn, because a fused multiply-add would round two lanes'
// common sum differently).
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x = __fadd_rn(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

__device__ __forceinline__ int warp_min(int x) { return __reduce_min_sync(~0u, x); }
__device__ __forceinline__ int warp_sum(int x) { return __reduce_add_sync(~0u, x); }

// The sum over `kThreads` neighbouring threads, in each of them.
template <int kThreads, class N>
__device__ __forceinline__ N sum_over(N x) {
#pragma unroll
    for (int lane = kThreads / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

// The block's sum in every thread. `slots` [32] is free again after the next barrier.
template <class N>
__device__ N block_total(N x, N* slots) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_down_sync(~0u, x, lane);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = x;
    __syncthreads();
    N sum = 0;
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) sum += slots[warp];
    return sum;
}

__device__ __forceinline__ Softmax<float> warp_merge(Softmax<float> state, float inverse_temperature) {
    const float max = warp_max(state.max);
    return {max, warp_sum(__fmul_rn(state.sum, rescale(state.max, max, inverse_temperature)))};
}

// The threads of one block, merging a state: merger.warp(a) joins a warp's 32. Two sets of slots take turns: whoever
// writes a set has passed the barrier of the merge between, and so have all readers of what it held.
struct BlockTeam {
    static constexpr int kSlotBytes = 32, kBytes = 2 * kWarp * kSlotBytes;

    void* slots;  // kBytes of shared memory
    int turn = 0;

    template <class State, class Merger>
    __device__ __forceinline__ State merge(State state, const Merger& merger) {
        static_assert(sizeof(State) <= kSlotBytes);
        State* mine = reinterpret_cast<State*>(static_cast<char*>(slots) + turn * (kBytes / 2));
        turn ^= 1;
        state = merger.warp(state);
        const int lane = threadIdx.x % kWarp;
        if (lane == 0) mine[threadIdx.x / kWarp] = state;
        __syncthreads();
        State all{};
        if (lane < blockDim.x / kWarp) all = mine[lane];
        return merger.warp(all);
    }
};

// ---- Host: devices and launches ----

struct Device {
    int index, major, processors, l2;
    int shared_per_processor, shared_per_block, shared_reserved;  // bytes
};

// The current device, or `index`; its properties are read once.
const Device& current_device();
const Device& device_at(int index);

// Throws CudaError, naming `what` and the caller, unless the status is cudaSuccess.
void check(cudaError_t status, const std::string& what, const char* file = __builtin_FILE(),
           int line = __builtin_LINE());

struct Launch {
    int64_t blocks;
    int threads;
    size_t shared;
    cudaStream_t stream;
    int cluster = 0;
};

// More shared memory than this is opted into, per kernel. Always all there is: a smaller number, set by one thread,
// could come between another's setting and its launch.
constexpr size_t kSharedByDefault = 48 << 10;

inline cudaError_t allow_shared(const void* kernel, const Device& device) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
}

template <class... Params>
cudaError_t launch(const Launch& how, void (*kernel)(Params...), const Params&... args) {
    if (how.shared > kSharedByDefault) {
        const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), current_device());
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(how.blocks));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = how.shared;
    config.stream = how.stream;
    config.attrs = &cluster;
    config.numAttrs = how.cluster > 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// How a kernel that gives each row to one block is laid out: see plan_rows.
struct RowPlan {
    int threads, blocks_per_processor, kept;  // kept: vectors of each row that stay in shared memory
    size_t shared;
    int64_t blocks;
};

struct ThreadRange {
    int least, most;  // most: a power of two; so many fill a multiprocessor
};

// `rows` rows of `vocab` elements per block, and `fixed` bytes of shared memory besides.
RowPlan plan_rows(const Device& device, int rows, int64_t vocab, int element_size, ThreadRange threads, size_t fixed,
                  int64_t count);

struct SharedBytes {
    size_t fixed, per_thread = 0;
};

// For rows that are read once and not kept: several blocks on every multiprocessor, `per_processor` threads together,
// so that one row's beginning and end fall into the middle of others and memory is never idle.
RowPlan plan_stream(const Device& device, int64_t vocab, int element_size, ThreadRange threads, int per_processor,
                    SharedBytes shared, int64_t count);

int element_size(Dtype dtype, const char* op);

// Throws where a layout asks for a cluster: none was launched.
void refuse_cluster(const Layout& layout, const char* op, int64_t vocab);

// Asks the driver about kernels on a device that need not be the current one.
template <class Ask>
auto on_device(int index, const char* what, Ask ask) {
    int current = 0;
    check(cudaGetDevice(&current), what);
    check(cudaSetDevice(index), what);
    auto answer = ask(device_at(index));
    check(cudaSetDevice(current), what);
    return answer;
}

// Calls body(T{}) for the logits' type.
template <class Body>
void with_type(Dtype dtype, Body body) {
    if (dtype == Dtype::kFloat32)
        body(float{});
    else if (dtype == Dtype::kBFloat16)
        body(__nv_bfloat16{});
    else
        body(__half{});
}

// Calls body(T{}, G{}) for the types of logits and of the gradient that is written for them: the same, or 16 bits for
// float32 logits.
template <class Body>
void with_types(const Rows& logits, const Rows& gradient, const char* op, Body body) {
    element_size(logits.dtype, op);
    if (gradient.data) element_size(gradient.dtype, op);
    with_type(logits.dtype, [&](auto type) {
        using T = decltype(type);
        if (!gradient.data || gradient.dtype == logits.dtype) return body(T{}, T{});
        if constexpr (sizeof(T) == sizeof(float)) {
            if (gradient.dtype == Dtype::kBFloat16) return body(T{}, __nv_bfloat16{});
            return body(T{}, __half{});
        } else {
            throw std::invalid_argument(std::string(op) +
                                        ": the gradient of 16-bit logits must have their dtype on a GPU");
        }
    });
}

}  // namespace pyalign::cuda
