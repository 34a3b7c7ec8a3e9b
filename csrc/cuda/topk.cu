// The k largest log-probs of every row and the log of the mass outside them, for one read of the row from memory.
//
//   1. Each thread notes its largest logit. The k-th largest of these is a threshold that at least k logits reach,
//      and few more: every thread saw a different part of the row.
//   2. The row again, from shared memory and L2: what reaches the threshold becomes a candidate, everything else is
//      folded into the rest. If there are too many candidates (equal logits, k near the row's length), the threshold
//      is raised by bisection until they fit, which always ends: keys hold the index, so no two are equal.
//   3. Candidates are ranked by counting the larger ones. Those past the k-th are folded into the rest as well.
//
// So the rest is a log-sum-exp over the rest, and nothing is subtracted from 1.
#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kMostThreads = 1024, kMostK = 256, kCandidates = 1024;

// Orders entries by logit, equals by lowest index. 0 and -0 are equal.
using Key = unsigned long long;

__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(Key key) {
    const uint32_t high = uint32_t(key >> 32);
    return __uint_as_float(high & 0x80000000u ? high & 0x7fffffffu : ~high);
}

__device__ __forceinline__ uint32_t index_of(Key key) { return ~uint32_t(key); }
__device__ __forceinline__ Key key_of(float logit, int index) { return Key(ordered(logit)) << 32 | ~uint32_t(index); }

constexpr Key kLowest = Key(0x007fffffu) << 32;  // of -inf: every logit but NaN reaches it

// The entries whose key is at least `key`.
struct Threshold {
    float logit;
    uint32_t index;

    // No entry's key has the bits of -0: those at 0 are above it, whatever their index.
    __device__ __forceinline__ explicit Threshold(Key key)
        : logit(logit_of(key)), index(uint32_t(key >> 32) == 0x7fffffffu ? ~0u : index_of(key)) {}

    __device__ __forceinline__ bool reached_by(float x, int i) const {
        return x > logit || (x == logit && uint32_t(i) <= index);
    }
};

// A key that between `least` and `most` others reach, by bisection of [low, high): count(low) >= least > count(high).
// Where no such key exists, the largest that `least` reach.
template <class Count>
__device__ __forceinline__ Key bisect(Key low, Key high, int least, int most, Count count) {
    while (high - low > 1) {
        const Key middle = low + (high - low) / 2;
        const int reached = count(middle);
        if (reached < least) {
            high = middle;
        } else {
            low = middle;
            if (reached <= most) break;
        }
    }
    return low;
}

struct RestMerger {
    float inverse_temperature;
    __device__ __forceinline__ Softmax<float> warp(Softmax<float> x) const {
        return warp_merge(x, inverse_temperature);
    }
};

struct CandidateStates {
    Softmax<float> chosen, evicted;
};

struct CandidateMerger {
    float inverse_temperature;
    __device__ __forceinline__ CandidateStates warp(const CandidateStates& x) const {
        return {warp_merge(x.chosen, inverse_temperature), warp_merge(x.evicted, inverse_temperature)};
    }
};

struct CountMerger {
    __device__ __forceinline__ int warp(int x) const { return warp_sum(x); }
};

struct Range {
    uint32_t least, most;
};

struct RangeMerger {
    __device__ __forceinline__ Range warp(Range x) const {
        return {~__reduce_max_sync(~0u, ~x.least), __reduce_max_sync(~0u, x.most)};
    }
};

struct alignas(16) Shared {
    char slots[BlockTeam::kBytes];
    float edges[kWarp];
    Key candidates[kCandidates], ranked[kCandidates];
    int count;
};
static_assert(sizeof(Shared) == 18576);  // tests and bench/predictions.py read it here

// Grid: any number of blocks, each takes every gridDim.x-th row. `kept` vectors of the row stay in shared memory.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    topk_rows(const Rows logits /* [count, vocab] */, int64_t count, int vocab, int k, float inverse_temperature,
              float* logprobs /* [count, k] */, int64_t* indices /* [count, k] */, float* residual /* [count] */,
              int kept) {
    extern __shared__ uint4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    uint4* const cache = memory + sizeof(Shared) / sizeof(uint4);  // [kept]
    BlockTeam team{shared.slots};
    const int thread = threadIdx.x, threads = blockDim.x;

    for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
        const T* const x = row_pointer<const T>(logits, row);  // [vocab]
        BlockRows<T, 1> part({x}, vocab, misalignment(x), shared.edges, cache, kept);

        // 1. Each thread's largest. The last index of its vector stands for its own: a bound all the same.
        float best = -INFINITY;
        int best_index = 0;
        const auto note = [&](float largest, int last) {
            if (largest > best) best = largest, best_index = last;
        };
        part.template vectors<true, 4>(
            [&](int element, const uint4(&raw)[1]) { note(largest_of<T>(raw[0]), element + kLanes<T> - 1); });
        part.template outside<true>([&](int element, const auto& values) { note(values[0][0], element); });
        const bool any = best > -INFINITY;
        const Key own = any ? key_of(best, best_index) : 0;
        Range range{any ? ordered(best) : ~0u, any ? ordered(best) : uint32_t(kLowest >> 32)};
        range = team.merge(range, RangeMerger{});
        const Key above = Key(range.most + 1) << 32;  // nothing reaches it
        Key low = kLowest;
        if (__syncthreads_count(any) >= k)
            low = bisect(Key(range.least) << 32, above, k, k + k / 4 + 4,
                         [&](Key key) { return __syncthreads_count(own >= key); });

        // 2. Candidates and the rest
        Softmax<float> rest;
        int found = 0;
        for (;;) {
            if (thread == 0) shared.count = 0;
            __syncthreads();
            const Threshold threshold(low);
            Folding folding;
            const auto sort = [&](int element, auto& values, float largest) {
                constexpr int kCount = sizeof(values) / sizeof(float);
                if (largest >= threshold.logit) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i) {
                        if (!threshold.reached_by(values[i], element + i)) continue;
                        const int place = atomicAdd(&shared.count, 1);
                        if (place < kCandidates) shared.candidates[place] = key_of(values[i], element + i);
                        values[i] = -INFINITY;
                    }
                    largest = largest_of(values);
                }
                folding.fold(values, largest, inverse_temperature);
            };
            part.template vectors<false, 1>([&](int element, const uint4(&raw)[1]) {
                float values[kLanes<T>];
                unpack<T>(raw[0], values);
                sort(element, values, largest_of<T>(raw[0]));
            });
            part.template outside<false>([&](int element, auto& values) { sort(element, values[0], values[0][0]); });
            rest = team.merge(folding.state(inverse_temperature), RestMerger{inverse_temperature});
            found = shared.count;
            if (found <= kCandidates) break;
            low = bisect(low, above, k, kCandidates, [&](Key key) {
                const Threshold higher(key);
                int reached = 0;
                part.template pass<false, 1>([&](int element, const auto& values) {
                    constexpr int kCount = sizeof(values[0]) / sizeof(float);
#pragma unroll
                    for (int i = 0; i < kCount; ++i) reached += higher.reached_by(values[0][i], element + i);
                });
                return team.merge(reached, CountMerger{});
            });
        }
        if (found < k) {  // NaN reaches nothing
            for (int i = thread; i < k; i += threads) {
                logprobs[row * k + i] = NAN;
                indices[row * k + i] = i;
            }
            if (thread == 0) residual[row] = NAN;
            continue;
        }

        // 3. Ranks
        for (int i = thread; i < found; i += threads) {
            const Key key = shared.candidates[i];
            int rank = 0;
            for (int j = 0; j < found; ++j) rank += shared.candidates[j] > key;
            shared.ranked[rank] = key;
        }
        __syncthreads();
        Folding chosen, evicted;
        for (int i = thread; i < found; i += threads) {
            const float value[1] = {logit_of(shared.ranked[i])};
            if (i < k)
                chosen.fold(value, inverse_temperature);
            else
                evicted.fold(value, inverse_temperature);
        }
        const CandidateStates states =
            team.merge(CandidateStates{chosen.state(inverse_temperature), evicted.state(inverse_temperature)},
                       CandidateMerger{inverse_temperature});
        rest = merge(rest, states.evicted, inverse_temperature);
        const Softmax<float> all = merge(rest, states.chosen, inverse_temperature);

        // Write
        const float log_sum = log_positive(all.sum);
        for (int i = thread; i < k; i += threads) {
            const Key key = shared.ranked[i];
            logprobs[row * k + i] = (logit_of(key) - all.max) * inverse_temperature - log_sum;
            indices[row * k + i] = index_of(key);
        }
        if (thread == 0)
            residual[row] = (rest.max - all.max) * inverse_temperature + (log_positive(rest.sum) - log_sum);
    }
}

}  // namespace

void topk(const TopKArgs& args, cudaStream_t stream) {
    element_size(args.logits.dtype, "topk");
    if (args.k < 1 || args.k > kMostK || args.k > args.vocab)
        throw std::invalid_argument("k: got " + std::to_string(args.k) +
                                    "; wanted 1 <= k <= " + std::to_string(kMostK) + " and at most the vocabulary's " +
                                    std::to_string(args.vocab));
    if (args.vocab > 1 << 30)
        throw std::invalid_argument("vocab: got " + std::to_string(args.vocab) + "; wanted at most 2^30");
    if (args.count == 0) return;
    with_type(args.logits.dtype, [&](auto type) {
        using T = decltype(type);
        const int k = int(args.k), least_threads = 4 * k < kMostThreads ? 4 * k : kMostThreads;
        const RowPlan plan = plan_rows(current_device(), 1, args.vocab, sizeof(T), {least_threads, kMostThreads},
                                       sizeof(Shared), args.count);
        check(launch({plan.blocks, plan.threads, plan.shared, stream}, topk_rows<T>, args.logits, args.count,
                     int(args.vocab), k, float(1 / args.temperature), static_cast<float*>(args.logprobs), args.indices,
                     static_cast<float*>(args.residual), plan.kept),
              "topk_rows");
    });
}

}  // namespace pyalign::cuda
