// The k largest log-probs of every row and the log of the mass outside them. A row streams past once and none of it is
// kept, so that two blocks work on a multiprocessor, and the selection in one row overlaps with the loads of another.
//
//   1. A sample, every fourth round of the block's threads over the row: each thread notes its largest logit. The k-th
//      largest of these is a threshold that at least k logits reach, and few more: every thread saw another part.
//   2. The sample once more, from L1 or L2, then all that lies between. What reaches the threshold becomes a candidate,
//      everything else is folded into the rest. Of n threads' samples, n log(n / (n - k)) logits reach the threshold,
//      of a long row 4 times as many: for 512 threads and k = 50 about 210; for k = 256 about 1420, or 1100 where those
//      of the sample are thinned first. 512 threads have room for 2404 or more. A row with more candidates than room
//      (its large logits escaped the sample) is read again, a round at a time: those of a round always find room, and
//      are thinned before the next.
//   3. Candidates are thinned by bisection to little more than k (it ends: keys hold the index, so no two are equal)
//      and ranked by counting the larger ones. Those past the k-th join the rest.
//
// So the rest is a log-sum-exp over the rest, and nothing is subtracted from 1. Candidates arrive in no fixed order,
// and the results may not show it: a threshold depends on the set of candidates alone, what is thinned out is summed in
// fixed point, and what is ranked is folded by rank.
#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kMostThreads = 512, kMostK = 256;
constexpr int kEvery = 4;  // of a long row's rounds, one of so many is sampled

// Vectors of a thread in flight.
constexpr int kSampled = 4, kBatch = kEvery - 1;

// Candidates that are not thinned any further: little more than k, so that bisection ends early.
__host__ __device__ constexpr int enough(int k) { return k + k / 4 + 4; }

// Room for what is left of candidates, a round of vectors, and the elements outside them.
__host__ __device__ constexpr int room_for(int threads, int lanes) { return enough(kMostK) + threads * lanes + kWarp; }

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

// The entries whose key is at least `key`: up to `index`, those of its logit too.
struct Threshold {
    float logit, next;  // next: the smallest above
    uint32_t index;

    __device__ __forceinline__ explicit Threshold(Key key)
        : logit(logit_of(key)), next(logit_of(key + (Key(1) << 32))), index(index_of(key)) {}

    // The least that reaches it at entry i; no more than at any later entry.
    __device__ __forceinline__ float at(int i) const { return uint32_t(i) <= index ? logit : next; }
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
    Softmax<float> chosen, others;
};

struct CandidateMerger {
    float inverse_temperature;
    __device__ __forceinline__ CandidateStates warp(const CandidateStates& x) const {
        return {warp_merge(x.chosen, inverse_temperature), warp_merge(x.others, inverse_temperature)};
    }
};

template <class N>
struct SumMerger {
    __device__ __forceinline__ N warp(N x) const { return sum_over<kWarp>(x); }
};

struct MaxMerger {
    __device__ __forceinline__ uint32_t warp(uint32_t x) const { return __reduce_max_sync(~0u, x); }
};

// Of logits, as `ordered`; begin and end are of their keys.
struct Range {
    uint32_t least = ~0u, most = 0;

    __device__ __forceinline__ Range with(uint32_t x) const { return {min(least, x), max(most, x)}; }
    __device__ __forceinline__ Key begin() const { return Key(least) << 32; }
    __device__ __forceinline__ Key end() const { return Key(most + 1) << 32; }
};

struct RangeMerger {
    __device__ __forceinline__ Range warp(Range x) const {
        return {~__reduce_max_sync(~0u, ~x.least), __reduce_max_sync(~0u, x.most)};
    }
};

// ---- Vectors ----

template <class T>
__device__ __forceinline__ uint4 vector_of(float x) {
    float values[kLanes<T>];
#pragma unroll
    for (float& value : values) value = x;
    return pack<T>(values);
}

// Lane by lane.
template <class T>
__device__ __forceinline__ uint4 larger_of(uint4 a, uint4 b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            out[i] = __float_as_uint(fmaxf(__uint_as_float(x[i]), __uint_as_float(y[i])));
        } else {
            using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
            const Two pair = __hmax2(reinterpret_cast<const Two&>(x[i]), reinterpret_cast<const Two&>(y[i]));
            out[i] = reinterpret_cast<const uint32_t&>(pair);
        }
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

template <class T, int N>
__device__ __forceinline__ float largest_over(const uint4 (&raw)[N]) {
    uint4 largest = raw[0];
#pragma unroll
    for (int b = 1; b < N; ++b) largest = larger_of<T>(largest, raw[b]);
    return largest_of<T>(largest);
}

template <class T, int N>
__device__ __forceinline__ void unpack_all(const uint4 (&raw)[N], float (&x)[N * kLanes<T>]) {
#pragma unroll
    for (int b = 0; b < N; ++b) {
        float part[kLanes<T>];
        unpack<T>(raw[b], part);
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) x[b * kLanes<T> + i] = part[i];
    }
}

// body(i, raw) for kBatch vectors at a time, from i on and `spacing` apart; those not below `end` are -inf throughout.
// Where they aren't read again, others are to stay in the caches.
template <class T, int kBatch, bool kAgain, class Body>
__device__ __forceinline__ void visit(const uint4* vectors, int first, int spacing, int step, int end, Body body) {
    for (int i = first; i < end; i += step) {
        uint4 raw[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const uint4* const at = vectors + (b == 0 ? i : min(i + b * spacing, end - 1));
            raw[b] = kAgain ? __ldca(at) : __ldcs(at);
        }
        if (i + (kBatch - 1) * spacing >= end) {
#pragma unroll
            for (int b = 1; b < kBatch; ++b)
                if (i + b * spacing >= end) raw[b] = vector_of<T>(-INFINITY);
        }
        body(i, raw);
    }
}

// ---- Candidates ----

struct alignas(16) Shared {
    char slots[BlockTeam::kBytes];
    Key few[enough(kMostK)];
    int found;  // also those that found no room
};
constexpr size_t kMostShared = sizeof(Shared) + sizeof(Key) * room_for(kMostThreads, kLanes<__half>);
static_assert(kMostShared == 40272);  // tests read it here

// Keeps the candidates that reach a higher threshold, at least k and no more than enough(k), and returns it. The others
// are added to `evicted`; in units of 2^-40 of the largest, so that their order doesn't matter.
__device__ __forceinline__ Key thin(Shared& shared, Key* candidates, int& found, int k, Softmax<float>& evicted,
                                    float inverse_temperature, BlockTeam& team) {
    const auto each = [&](auto body) {
        for (int i = threadIdx.x; i < found; i += blockDim.x) body(candidates[i]);
    };
    if (threadIdx.x == 0) shared.found = 0;
    Range range;
    each([&](Key key) { range = range.with(uint32_t(key >> 32)); });
    range = team.merge(range, RangeMerger{});
    const Key low = bisect(range.begin(), range.end(), k, enough(k), [&](Key bound) {
        int reached = 0;
        each([&](Key key) { reached += key >= bound; });
        return team.merge(reached, SumMerger<int>{});
    });

    uint32_t high = uint32_t(kLowest >> 32);
    each([&](Key key) {
        if (key >= low)
            shared.few[atomicAdd(&shared.found, 1)] = key;
        else
            high = max(high, uint32_t(key >> 32));
    });
    high = team.merge(high, MaxMerger{});
    const float largest = fmaxf(logit_of(Key(high) << 32), Softmax<float>{}.max);
    const Exponential exponential(largest, inverse_temperature);
    unsigned long long sum = 0;
    each([&](Key key) {
        if (key < low) sum += __float2ull_rn(0x1p40f * exponential(logit_of(key)));
    });
    sum = team.merge(sum, SumMerger<unsigned long long>{});
    found = shared.found;
    for (int i = threadIdx.x; i < found; i += blockDim.x) candidates[i] = shared.few[i];
    const float total = weigh(0x1p-40f * float(sum), exponential.correction(largest));
    evicted = merge(evicted, Softmax<float>{largest, total}, inverse_temperature);
    __syncthreads();
    return low;
}

// Grid: any number of blocks, each takes every gridDim.x-th row.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    topk_rows(const Rows logits /* [count, vocab] */, int64_t count, int vocab, int k, float inverse_temperature,
              float* logprobs /* [count, k] */, int64_t* indices /* [count, k] */, float* residual /* [count] */) {
    extern __shared__ uint4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Key* const candidates = reinterpret_cast<Key*>(memory + sizeof(Shared) / sizeof(uint4));  // [room]
    BlockTeam team{shared.slots};
    const int thread = threadIdx.x, threads = blockDim.x, room = room_for(threads, kLanes<T>);

    for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
        const T* const x = row_pointer<const T>(logits, row);  // [vocab]
        const Split split = split_row<T>(vocab, misalignment(x), true);
        const uint4* const vectors = reinterpret_cast<const uint4*>(x + split.head);  // [split.vectors]
        const int edge = split.template edge<T>(thread);
        const int every = split.vectors > 2 * kEvery * threads ? kEvery : 1;

        // 1. Each thread's largest of the sample, with its vector's last index: a bound all the same.
        float best = NAN;
        int best_index = 0;
        const auto note = [&](float largest, int last) {
            if (!(largest <= best)) best = largest, best_index = last;
        };
        visit<T, kSampled, true>(vectors, thread, every * threads, kSampled * every * threads, split.vectors,
                                 [&](int i, const uint4(&raw)[kSampled]) {
#pragma unroll
                                     for (int b = 0; b < kSampled; ++b)
                                         note(largest_of<T>(raw[b]),
                                              split.head + (i + b * every * threads + 1) * kLanes<T> - 1);
                                 });
        if (edge >= 0) note(widen(x[edge]), edge);
        const bool any = best == best;
        const Key own = any ? key_of(best, best_index) : 0;
        const Range range = team.merge(any ? Range{}.with(ordered(best)) : Range{}, RangeMerger{});
        Key sampled = kLowest;
        if (__syncthreads_count(any) >= k)
            sampled = bisect(range.begin(), range.end(), k, k + k / 16,
                             [&](Key key) { return __syncthreads_count(own >= key); });

        // 2. Candidates and the rest: the sample, then what is between. Where they find no room, a round at a time.
        Folding folding;
        Softmax<float> evicted;
        int found = 0;
        for (bool by_round = false;; by_round = true) {
            folding = {}, evicted = {};
            Key low = sampled;
            if (thread == 0) shared.found = 0;
            __syncthreads();
            const int parts = by_round ? (split.vectors + threads - 1) / threads : min(every, 2);
            for (int part = 0; part < parts; ++part) {
                const Threshold threshold(low);
                const auto take = [&](float& value, int element, float bound) {
                    if (!(value >= bound)) return;
                    const int place = atomicAdd(&shared.found, 1);
                    if (place < room) candidates[place] = key_of(value, element);
                    value = -INFINITY;
                };
                const int first = thread + part * threads, spacing = by_round || part > 0 ? threads : every * threads;
                const int end = by_round ? min((part + 1) * threads, split.vectors) : split.vectors;
                const int step = part > 0 ? every * threads : kBatch * spacing;
                visit<T, kBatch, false>(vectors, first, spacing, step, end, [&](int i, uint4(&raw)[kBatch]) {
                    float largest = largest_over<T>(raw);
                    if (largest >= threshold.at(split.head + i * kLanes<T>)) {
#pragma unroll
                        for (int b = 0; b < kBatch; ++b) {
                            const int at = i + b * spacing, element = split.head + at * kLanes<T>;
                            const float bound = threshold.at(element);
                            if (at >= end || !(largest_of<T>(raw[b]) >= bound)) continue;
                            float entries[kLanes<T>];
                            unpack<T>(raw[b], entries);
#pragma unroll
                            for (int lane = 0; lane < kLanes<T>; ++lane) take(entries[lane], element + lane, bound);
                            raw[b] = pack<T>(entries);
                        }
                        largest = largest_over<T>(raw);
                    }
                    float values[kBatch * kLanes<T>];
                    unpack_all<T>(raw, values);
                    folding.fold(values, largest, inverse_temperature);
                });
                if (part == 0 && edge >= 0) {
                    float value[1] = {widen(x[edge])};
                    take(value[0], edge, threshold.at(edge));
                    folding.fold(value, inverse_temperature);
                }
                __syncthreads();
                found = shared.found;
                __syncthreads();  // nobody adds to it before all have read it
                if (found > room) break;
                if (found > enough(k)) low = thin(shared, candidates, found, k, evicted, inverse_temperature, team);
            }
            if (found <= room) break;
        }
        Softmax<float> rest = team.merge(folding.state(inverse_temperature), RestMerger{inverse_temperature});
        rest = merge(rest, evicted, inverse_temperature);
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
            const Key key = candidates[i];
            int rank = 0;
            for (int j = 0; j < found; ++j) rank += candidates[j] > key;
            shared.few[rank] = key;
        }
        __syncthreads();
        Folding chosen, others;
        for (int i = thread; i < found; i += threads) {
            const float value[1] = {logit_of(shared.few[i])};
            if (i < k)
                chosen.fold(value, inverse_temperature);
            else
                others.fold(value, inverse_temperature);
        }
        const CandidateStates states =
            team.merge(CandidateStates{chosen.state(inverse_temperature), others.state(inverse_temperature)},
                       CandidateMerger{inverse_temperature});
        rest = merge(rest, states.others, inverse_temperature);
        const Softmax<float> all = merge(rest, states.chosen, inverse_temperature);

        // Write
        const float log_sum = log_positive(all.sum);
        for (int i = thread; i < k; i += threads) {
            const Key key = shared.few[i];
            logprobs[row * k + i] = (logit_of(key) - all.max) * inverse_temperature - log_sum;
            indices[row * k + i] = index_of(key);
        }
        if (thread == 0) residual[row] = (rest.max - all.max) * inverse_temperature + log_positive(rest.sum / all.sum);
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
        const int k = int(args.k);
        const SharedBytes shared{sizeof(Shared) + sizeof(Key) * room_for(0, kLanes<T>), sizeof(Key) * kLanes<T>};
        // No fewer threads than leave the threshold sharp.
        const RowPlan plan = plan_stream(current_device(), args.vocab, sizeof(T), {4 * k, kMostThreads},
                                         2 * kMostThreads, shared, args.count);
        check(launch({plan.blocks, plan.threads, plan.shared, stream}, topk_rows<T>, args.logits, args.count,
                     int(args.vocab), k, float(1 / args.temperature), static_cast<float*>(args.logprobs), args.indices,
                     static_cast<float*>(args.residual)),
              "topk_rows");
    });
}

}  // namespace pyalign::cuda
