// Log-probs, entropies, cross-entropies and their gradients, one block per row.
//
// A row is read from memory once: a gradient finds it in shared memory, as far as that holds it, and the rest in L2,
// which plan_rows tries to make room in. A loss alone, and a gradient from an earlier call's state, is a single pass.
#include <stdexcept>

#include "common/logprob.h"
#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kMostThreads = 1024, kStreamThreads = 256;
constexpr int kFixedBytes = BlockTeam::kBytes + BlockRows<float, 1>::kEdgeBytes;

// ---- Fold ----

// LogprobArgs with its options as the kernel wants them.
struct LogprobParams {
    LogprobArgs args;
    Softcap<float> softcap;
    float inverse_temperature, label_smoothing, z_loss;
    int vocab;
    bool distances, aboves;  // what the fold sums up beside the softmax
};

struct Folded {
    LogprobState<float> state;
    float above = 0;  // sum y - y_target
};

// One thread's state, N entries at once, as Folding in common.cuh. `distance` is sum 2^x -x over the exponents x of its
// Exponential: log2(e) / T of that in LogprobState.
struct LogprobFolding {
    static constexpr float kNothing = -150.f;  // 2^x is 0, and x is finite, so that -inf weighs nothing

    Folding softmax;
    float distance = 0;

    template <bool kDistances, int N>
    __device__ __forceinline__ void fold(const float (&y)[N], float inverse_temperature) {
        if (!kDistances) return softmax.fold(y, inverse_temperature);
        const Folding::Step step = softmax.raise(largest_of(y), inverse_temperature);
        float far[2] = {__fmaf_rn(softmax.sum, step.shift, distance) * step.scale, 0.f};
        float sums[2] = {softmax.sum * step.scale, 0.f};
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float x = step.now.exponent(y[i]), e = exp2_fast(x);
            sums[i % 2] += e;
            far[i % 2] -= e * fmaxf(x, kNothing);
        }
        softmax.sum = sums[0] + sums[1];
        distance = far[0] + far[1];
    }

    __device__ __forceinline__ LogprobState<float> state(float inverse_temperature) const {
        const Exponential exponential(softmax.max, inverse_temperature);
        const float at_max = distance - softmax.sum * exponential.lost(softmax.max);
        return {softmax.state(inverse_temperature), weigh(at_max, exponential.correction(softmax.max) / exponential.c)};
    }
};

struct FoldedMerger {
    float inverse_temperature;

    __device__ __forceinline__ Folded warp(const Folded& x) const {
        const LogprobState<float> top = raise(x.state, warp_max(x.state.softmax.max), inverse_temperature);
        return {{{top.softmax.max, warp_sum(top.softmax.sum)}, warp_sum(top.distance)}, warp_sum(x.above)};
    }
};

// y and dy/dx.
template <bool kCaps>
__device__ __forceinline__ Tanh<float> cap(const Softcap<float>& softcap, float x) {
    if (!kCaps) return {x, 1.f};
    const Tanh<float> tanh = softcap.tanh(x);
    return {softcap.cap * tanh.value, tanh.slope};
}

// ---- Rows ----

__device__ __forceinline__ float at(const void* data, int64_t index) { return static_cast<const float*>(data)[index]; }

__device__ __forceinline__ void put(void* data, int64_t index, float value) {
    if (data) static_cast<float*>(data)[index] = value;
}

__device__ __forceinline__ void put_state(void* data, int64_t row, float max, float sum, float entropy) {
    put(data, 3 * row, max);
    put(data, 3 * row + 1, sum);
    put(data, 3 * row + 2, entropy);
}

// A row that isn't read: zeros where its target is ignored, NaN where it is out of range.
template <class G>
__device__ __forceinline__ void write_unread(const LogprobArgs& a, int64_t row, bool ignored) {
    const float value = ignored ? 0.f : __int_as_float(0x7fffffff);
    if (threadIdx.x == 0) {
        put(a.logprob, row, value);
        put(a.entropy, row, value);
        put_state(a.state, row, 0.f, 1.f, value);
        put(a.row_loss, row, value);
    }
    if (a.gradient.data) fill(row_pointer<G>(a.gradient, row), a.options.vocab, value, threadIdx.x, blockDim.x);
}

__device__ __forceinline__ Slope<float> slope_of(const LogprobParams& p, int64_t row, const LogprobRow<float>& result,
                                                 float entropy) {
    const LogprobArgs& a = p.args;
    if (a.row_loss) {
        const float factor = a.factor ? at(a.factor, 0) : 1.f;
        return factor * cross_entropy_slope(result, p.label_smoothing, p.z_loss, float(p.vocab));
    }
    return logprob_slope(a.upstream_logprob ? at(a.upstream_logprob, row) : 0.f,
                         a.upstream_entropy ? at(a.upstream_entropy, row) : 0.f, entropy);
}

// Grid: any number of blocks, each takes every gridDim.x-th row. `kept` vectors of a row stay in shared memory. T is
// the logits' type, G the gradient's.
template <class T, class G, bool kCaps>
__global__ void __launch_bounds__(kMostThreads, 1) logprob_rows(const LogprobParams p, int kept) {
    constexpr int kBatch = kCaps ? 1 : 2;  // what 64 registers have room for
    extern __shared__ uint4 shared[];
    BlockTeam team{shared};
    float* const edges = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + BlockTeam::kBytes);  // [32]
    uint4* const cache = shared + kFixedBytes / sizeof(uint4);                                           // [kept]
    const LogprobArgs& a = p.args;
    const Softcap<float>& softcap = p.softcap;
    const float inverse_temperature = p.inverse_temperature;

    for (int64_t row = blockIdx.x; row < a.count; row += gridDim.x) {
        const int64_t wanted = a.targets[row];
        if (wanted == a.ignore_index || wanted < 0 || wanted >= p.vocab) {
            write_unread<G>(a, row, wanted == a.ignore_index);
            continue;
        }
        const int target = int(wanted);
        const T* const logits = row_pointer<const T>(a.logits, row);                      // [vocab]
        G* const gradient = a.gradient.data ? row_pointer<G>(a.gradient, row) : nullptr;  // [vocab]
        const int lead = gradient ? lead_of<T>(gradient) : lead_of<T>(logits);
        BlockRows<T, 1> rows({logits}, p.vocab, lead, edges, cache, kept);

        // Fold
        Folded folded;
        float entropy = __int_as_float(0x7fffffff), y_target = 0.f;
        if (a.given_state) {
            folded.state.softmax = {at(a.given_state, 3 * row), at(a.given_state, 3 * row + 1)};
            entropy = at(a.given_state, 3 * row + 2);
        } else {
            y_target = cap<kCaps>(softcap, widen(logits[target])).value;  // before anybody writes over it
            LogprobFolding folding;
            specialised(p.distances, [&](auto distances) {
                rows.template pass<true, kBatch>([&](int, const auto& x) {
                    constexpr int kCount = sizeof(x[0]) / sizeof(float);
                    float y[kCount];
#pragma unroll
                    for (int i = 0; i < kCount; ++i) y[i] = cap<kCaps>(softcap, x[0][i]).value;
                    folding.template fold<decltype(distances)::value>(y, inverse_temperature);
                    if (!p.aboves) return;
#pragma unroll
                    for (int i = 0; i < kCount; ++i) folded.above += y[i] - y_target;
                });
            });
            folded.state = folding.state(inverse_temperature);
            folded = team.merge(folded, FoldedMerger{inverse_temperature});
        }
        const LogprobRow<float> result(folded.state.softmax, inverse_temperature);
        if (p.distances && !a.given_state) entropy = result.entropy(folded.state.distance);

        // Finish
        if (threadIdx.x == 0) {
            put(a.logprob, row, result.logprob(y_target));
            put(a.entropy, row, entropy);
            put_state(a.state, row, result.max, result.sum, entropy);
            const float above = folded.above * inverse_temperature / float(p.vocab);
            if (a.row_loss) put(a.row_loss, row, cross_entropy(result, y_target, above, p.label_smoothing, p.z_loss));
        }
        if (!gradient) continue;

        // Map
        const Slope<float> slope = inverse_temperature * slope_of(p, row, result, entropy);
        const Exponential exponential(result.max, inverse_temperature);
        const float scale = exponential.correction(result.max) / result.sum;
        const auto map = [&](int element, const auto& x) {
            constexpr int kCount = sizeof(x[0]) / sizeof(float);
            float slopes[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const Tanh<float> y = cap<kCaps>(softcap, x[0][i]);
                const float of_y = slope.at(exponential(y.value) * scale, result.logprob(y.value));
                slopes[i] = y.slope * (element + i == target ? of_y + slope.target : of_y);
            }
            store(gradient + element, slopes);
        };
        if (a.given_state)
            rows.template pass<true, kBatch>(map);
        else
            rows.template pass<false, 1>(map);
    }
}

template <class T, class G>
void launch_rows(const LogprobArgs& args, cudaStream_t stream) {
    const LogprobOptions& options = args.options;
    const LogprobParams params{args,
                               Softcap<float>(options.softcap),
                               float(1 / options.temperature),
                               float(options.label_smoothing),
                               float(options.z_loss),
                               int(options.vocab),
                               args.entropy || args.upstream_entropy,
                               options.label_smoothing > 0};
    const bool twice = args.gradient.data && !args.given_state;
    const Device& device = current_device();
    const RowPlan plan =
        twice ? plan_rows(device, 1, options.vocab, sizeof(T), {1, kMostThreads}, kFixedBytes, args.count)
              : plan_stream(device, options.vocab, sizeof(T), {1, kStreamThreads}, kMostThreads, {kFixedBytes},
                            args.count);
    const auto kernel = params.softcap.caps() ? logprob_rows<T, G, true> : logprob_rows<T, G, false>;
    check(launch({plan.blocks, plan.threads, plan.shared, stream}, kernel, params, plan.kept), "logprob_rows");
}

}  // namespace

void logprob(const LogprobArgs& args, cudaStream_t stream) {
    if (args.options.vocab < 1 || args.options.vocab > 0x7fff0000)
        throw std::invalid_argument("vocab: got " + std::to_string(args.options.vocab) + "; wanted 1 to 2^31 - 2^16");
    if (args.count == 0) return;
    with_types(args.logits, args.gradient, "logprob",
               [&](auto logits, auto gradient) { launch_rows<decltype(logits), decltype(gradient)>(args, stream); });
}

}  // namespace pyalign::cuda
