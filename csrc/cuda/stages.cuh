// Plackett-Luce on a GPU: the groups of up to a warp's size by one warp each, an entry per lane; larger ones by a
// block, which sorts the entries by rank. Then a stage's mass is a suffix sum, and an entry's derivative a prefix sum
// over stages: scans over threads that hold some consecutive entries each.
#pragma once

#include <cstddef>

#include "common/ranking.h"
#include "cuda/common.cuh"

namespace pyalign::cuda {

constexpr int kStageThreads = 256;

struct GroupResult {
    double loss = 0, pairs = 0;
};

// What a stage of d tied entries, of which `tied` (their mass) and what is ranked after them are left, costs the l-th
// of them: log(left) - s, left = rest + (1 - l/d) tied by Efron's rule, rest + tied by Breslow's. `share` is 1 - l/d.
__device__ __forceinline__ float share_of(bool efron, int l, int d) { return efron ? 1.f - float(l) / float(d) : 1.f; }

// ---- A warp ----

// Entry i costs log(sum_j w_ij e^(s_j - s_i)), w = 1 for what is ranked after it and its share for what ties with it.
template <class T>
__device__ __forceinline__ GroupResult warp_stages(const T* scores, const int64_t* ranks, int size, float scale,
                                                   bool efron, float* gradient) {
    const int lane = threadIdx.x % kWarp;
    const int64_t rank = lane < size ? ranks[lane] : -1;
    const bool present = rank >= 0;
    const float x = present ? scale * widen(scores[lane]) : 0.f;

    int tied = 0, before = 0, after = 0;
    for (int j = 0; j < size; ++j) {
        const int64_t other = __shfl_sync(~0u, rank, j);
        tied += other == rank;
        before += other == rank && j < lane;
        after += other > rank;
    }
    const double pairs = sum_over<kWarp>(present ? double(after) : 0.0);
    if (pairs == 0) {
        if (gradient && lane < size) gradient[lane] = 0.f;
        return {};
    }

    const float share = share_of(efron, before, tied);
    Softmax<float> left;
    for (int j = 0; j < size; ++j) {
        const int64_t other = __shfl_sync(~0u, rank, j);
        const float y = __shfl_sync(~0u, x, j);
        if (other < 0 || other < rank) continue;
        left = merge(left, Softmax<float>{y, y == y ? (other == rank ? share : 1.f) : y}, 1.f);
    }
    const bool stage = present && tied + after > 1;
    const float log_left = stage ? log_positive(left.sum) : INFINITY;
    const double loss = sum_over<kWarp>(stage ? double((left.max - x) + log_left) : 0.0);

    if (gradient) {
        float slope = 0.f;
        for (int j = 0; j < size; ++j) {
            const int64_t other = __shfl_sync(~0u, rank, j);
            const float max = __shfl_sync(~0u, left.max, j), log = __shfl_sync(~0u, log_left, j);
            const float weight = __shfl_sync(~0u, share, j);
            if (other < 0 || other > rank) continue;
            slope += (other == rank ? weight : 1.f) * exp_nonpositive((x - max) - log);
        }
        if (lane < size) gradient[lane] = present ? scale * (slope - (stage ? 1.f : 0.f)) : 0.f;
    }
    return {loss, pairs};
}

// ---- Scans over a block ----

// x_k = decay_k x_(k-1) + value_k, over some consecutive k.
struct Recurrence {
    float decay = 1.f, value = 0.f;
};

struct Follow {
    __device__ __forceinline__ Recurrence operator()(Recurrence a, Recurrence b) const {
        return {a.decay * b.decay, a.value * b.decay + b.value};
    }
};

struct Merge {
    __device__ __forceinline__ Softmax<float> operator()(Softmax<float> a, Softmax<float> b) const {
        return merge(a, b, 1.f);
    }
};

template <class State>
__device__ __forceinline__ State shuffle_up(State x, int by) {
    static_assert(sizeof(State) == sizeof(long long));
    long long bits;
    memcpy(&bits, &x, sizeof(bits));
    bits = __shfl_up_sync(~0u, bits, by);
    memcpy(&x, &bits, sizeof(bits));
    return x;
}

// join over the states of all threads before this one. `slots` [kWarp] is free again afterwards.
template <class State, class Join>
__device__ __forceinline__ State scan_before(State mine, Join join, State* slots) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int by = 1; by < kWarp; by *= 2) {
        const State other = shuffle_up(mine, by);
        if (lane >= by) mine = join(other, mine);
    }
    if (lane == kWarp - 1) slots[warp] = mine;
    const State before = shuffle_up(mine, 1);
    __syncthreads();
    State carry;
    for (int w = 0; w < warp; ++w) carry = join(carry, slots[w]);
    __syncthreads();
    return lane == 0 ? carry : join(carry, before);
}

// ---- A block ----

// A group's entries, sorted by rank: arrays of `capacity`, in shared memory or in global.
struct Sorted {
    int64_t* keys;  // ranks; later `maxima` and `sums` lie there
    int32_t *places, *begins, *ends;
    float *maxima, *sums;

    static constexpr size_t kBytes = sizeof(int64_t) + 3 * sizeof(int32_t);  // per entry
    static_assert(kBytes == kSortedBytes);

    __device__ __forceinline__ Sorted(void* memory, int64_t capacity)
        : keys(static_cast<int64_t*>(memory)),
          places(reinterpret_cast<int32_t*>(keys + capacity)),
          begins(places + capacity),
          ends(begins + capacity),
          maxima(reinterpret_cast<float*>(keys)),
          sums(maxima + capacity) {}

    // By rank, then by place; `count` is a power of two.
    __device__ __forceinline__ void sort(int count) const {
        for (int run = 2; run <= count; run *= 2) {
            for (int step = run / 2; step > 0; step /= 2) {
                __syncthreads();
                for (int pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
                    const int i = 2 * pair - (pair & (step - 1)), j = i + step;
                    const int64_t a = keys[i], b = keys[j];
                    const int32_t at = places[i], bt = places[j];
                    if ((a > b || (a == b && at > bt)) != ((i & run) == 0)) continue;
                    keys[i] = b, keys[j] = a;
                    places[i] = bt, places[j] = at;
                }
            }
        }
        __syncthreads();
    }

    // The first entry whose rank is at least (kAfter: greater than) that of entry k.
    template <bool kAfter>
    __device__ __forceinline__ int bound(int k, int present) const {
        const int64_t rank = keys[k];
        int low = kAfter ? k + 1 : 0, high = kAfter ? present : k;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (kAfter ? keys[middle] <= rank : keys[middle] < rank)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
};

// body(k) for this thread's entries: the thread's place in the scans is that of its entries.
template <class Body>
__device__ __forceinline__ void each_forward(int count, Body body) {
    const int chunk = ((count + int(blockDim.x) - 1) / int(blockDim.x)) | 1;  // odd: no two threads in one bank
    const int begin = int(threadIdx.x) * chunk, end = begin + chunk < count ? begin + chunk : count;
    for (int k = begin; k < end; ++k) body(k);
}

// The same from the last entry down to the first.
template <class Body>
__device__ __forceinline__ void each_backward(int count, Body body) {
    each_forward(count, [&](int k) { body(count - 1 - k); });
}

// A group by one block. All that stages need of each other is kept in units of R, the mass that is left when entry k's
// tie comes up: of the suffix, max and sum. `work` is [3, stride] in global memory.
template <class T>
__device__ __forceinline__ GroupResult block_stages(const T* scores, const int64_t* ranks, int size, float scale,
                                                    bool efron, float* gradient, float* work, int64_t stride,
                                                    const Sorted& sorted) {
    __shared__ double sums[kWarp];
    __shared__ long long slots[kWarp];
    constexpr int32_t kAbsent = int32_t{1} << 30;
    float *const masses = work, *const weights = work + stride, *const owns = work + 2 * stride;

    // Sort
    int padded = 2;
    while (padded < size) padded *= 2;
    int mine = 0;
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        const int64_t rank = i < size ? ranks[i] : -1;
        const bool present = rank >= 0;
        sorted.keys[i] = present ? rank : INT64_MAX;
        sorted.places[i] = present ? i : i + kAbsent;
        mine += present;
        if (gradient && i < size && !present) gradient[i] = 0.f;
    }
    const int count = int(block_total(double(mine), sums));
    sorted.sort(padded);
    double wins = 0;
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
        sorted.begins[k] = sorted.template bound<false>(k, count);
        sorted.ends[k] = sorted.template bound<true>(k, count);
        wins += count - sorted.ends[k];
    }
    const double pairs = block_total(wins, sums);
    if (pairs == 0) {
        for (int i = threadIdx.x; gradient && i < size; i += blockDim.x) gradient[i] = 0.f;
        return {};
    }

    // R of every entry
    const auto score = [&](int k) { return scale * widen(scores[sorted.places[k]]); };
    Softmax<float> suffix;
    each_backward(count, [&](int k) { suffix = fold(suffix, score(k), 1.f); });
    suffix = scan_before(suffix, Merge{}, reinterpret_cast<Softmax<float>*>(slots));
    each_backward(count, [&](int k) {
        suffix = fold(suffix, score(k), 1.f);
        sorted.maxima[k] = suffix.max;
        sorted.sums[k] = suffix.sum;
    });
    __syncthreads();

    // x_k over the entries, restarted at each tie's first entry unless `across`, and stored in `to`
    const auto scan = [&](float* to, bool across, auto value) {
        const auto decay = [&](int k) {
            const int begin = sorted.begins[k];
            if (k > begin) return 1.f;
            if (!across || k == 0) return 0.f;
            const int last = sorted.begins[k - 1];  // R / R of the tie before, at most 1
            return exp_nonpositive(sorted.maxima[k] - sorted.maxima[last]) * (sorted.sums[k] / sorted.sums[last]);
        };
        Recurrence state;
        each_forward(count, [&](int k) { state = Follow{}(state, Recurrence{decay(k), value(k)}); });
        state = scan_before(state, Follow{}, reinterpret_cast<Recurrence*>(slots));
        each_forward(count, [&](int k) {
            state.value *= decay(k);
            const float before = state.value;
            state.value += value(k);
            to[k] = across && efron ? before : state.value;
        });
        __syncthreads();
    };
    const auto relative = [&](int k) { return exp_nonpositive(score(k) - sorted.maxima[sorted.begins[k]]); };
    if (efron) scan(masses, false, relative);

    // What is left at entry k's own stage, in units of e^(R's max)
    const auto left = [&](int k) {
        const int begin = sorted.begins[k], end = sorted.ends[k];
        if (!efron || end - begin == 1) return sorted.sums[begin];
        const float part = share_of(true, k - begin, end - begin) * masses[end - 1];
        if (end == count) return part;
        return part + sorted.sums[end] * exp_nonpositive(sorted.maxima[end] - sorted.maxima[begin]);
    };
    const auto is_stage = [&](int k) { return count - sorted.begins[k] > 1; };
    double loss = 0;
    for (int k = threadIdx.x; k < count; k += blockDim.x)
        if (is_stage(k)) loss += (sorted.maxima[sorted.begins[k]] - score(k)) + log_positive(left(k));
    loss = block_total(loss, sums);
    if (!gradient) return {loss, pairs};

    // dL/ds = e^s sum over the stages so far of 1 / left, its own tie's by their shares, less 1 for its own stage
    const auto weight = [&](int k) { return is_stage(k) ? sorted.sums[sorted.begins[k]] / left(k) : 0.f; };
    scan(weights, true, weight);
    if (efron)
        scan(owns, false, [&](int k) {
            const int begin = sorted.begins[k];
            return share_of(true, k - begin, sorted.ends[k] - begin) * weight(k);
        });
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
        const int begin = sorted.begins[k], last = sorted.ends[k] - 1;
        const float stages = efron ? weights[begin] + owns[last] : weights[last];
        // An impossible entry (-inf) has slope 0, also where it is all that is left; a NaN is the whole group's.
        const float slope = loss == loss ? weigh(relative(k), stages / sorted.sums[begin]) : NAN;
        gradient[sorted.places[k]] = scale * (slope - (is_stage(k) ? 1.f : 0.f));
    }
    return {loss, pairs};
}

}  // namespace pyalign::cuda
