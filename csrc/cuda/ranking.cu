// Preference losses: loss, gradient and reduction in one launch.
//
// Items are served by one block: a batch has thousands of pairs, and a second launch costs more than what more blocks
// would save. A group is served by a block of its own, each row of its pairs (both those an entry wins and those it
// loses) by one thread, so that nothing is added up between threads but the loss; the block that ends last adds up the
// groups, in their order.
#include <algorithm>

#include "common/ranking.h"
#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kItemThreads = 512, kGroupThreads = 256, kElementThreads = 256;
constexpr float kLowestFloat = std::numeric_limits<float>::lowest();

// The block's sum in every thread. `slots` [32] is free again after the next barrier.
template <class N>
__device__ N block_sum(N x, N* slots) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_down_sync(~0u, x, lane);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = x;
    __syncthreads();
    N sum = 0;
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) sum += slots[warp];
    return sum;
}

__device__ __forceinline__ void write_result(float* loss, float* denominator, Reduction reduction,
                                             const float* num_items, double sum, double count) {
    const float counted = num_items ? *num_items : static_cast<float>(count);
    const float over = reduction == Reduction::kMean ? counted : 1.f;
    *denominator = over;
    if (reduction != Reduction::kNone) *loss = over == 0.f ? 0.f : static_cast<float>(sum / over);
}

// ---- Items ----

template <class T>
__device__ __forceinline__ float score_at(const void* x, const void* reference, int64_t i) {
    const float score = widen(static_cast<const T*>(x)[i]);
    return reference ? score - widen(static_cast<const T*>(reference)[i]) : score;
}

template <class T>
__global__ void __launch_bounds__(kItemThreads) pair_items(const PairArgs a) {
    __shared__ double sums[kWarp];
    const float scale = float(a.options.scale), center = float(a.options.center), margin = float(a.options.margin);
    double loss = 0;
    int64_t counted = 0;
    with_form<float>(a.options, [&](auto form) {
        for (int64_t i = threadIdx.x; i < a.count; i += blockDim.x) {
            const float first = score_at<T>(a.first, a.first_reference, i);
            const float second = a.second ? score_at<T>(a.second, a.second_reference, i) : (a.labels[i] ? 1.f : 0.f);
            const float m = a.margin ? static_cast<const float*>(a.margin)[i * a.margin_stride] : margin;
            Item<float> item = form(first, second, m);
            const float both = first + second;
            if (center != 0.f)
                item = {item.loss + center * (both * both), item.first + 2.f * center * both,
                        item.second + 2.f * center * both};
            const float weight = a.weight ? static_cast<const float*>(a.weight)[i] : 1.f;
            const bool keep = !a.mask || a.mask[i];
            const float cost = keep ? weight * item.loss : 0.f;
            if (a.first_gradient) static_cast<float*>(a.first_gradient)[i] = keep ? weight * item.first : 0.f;
            if (a.second_gradient) static_cast<float*>(a.second_gradient)[i] = keep ? weight * item.second : 0.f;
            if (a.first_reward) static_cast<float*>(a.first_reward)[i] = scale * first;
            if (a.second_reward) static_cast<float*>(a.second_reward)[i] = scale * second;
            if (a.reduction == Reduction::kNone) static_cast<float*>(a.loss)[i] = cost;
            loss += cost;
            counted += keep;
        }
    });
    const double sum = block_sum(loss, sums), count = block_sum(double(counted), sums);
    if (threadIdx.x == 0)
        write_result(static_cast<float*>(a.loss), static_cast<float*>(a.denominator), a.reduction,
                     static_cast<const float*>(a.num_items), sum, count);
}

// ---- Groups ----

// The entries of a group, a tile at a time in shared memory.
template <class T>
struct Entries {
    const T* scores;       // [size]
    const int64_t* ranks;  // [size]
    int64_t size;
    float scale;
    float* tile_scores;   // [kGroupThreads], shared
    int64_t* tile_ranks;  // [kGroupThreads], shared

    __device__ __forceinline__ float score(int64_t i) const { return scale * widen(scores[i]); }

    // body(j, score, rank) for every present entry, in order; all threads of the block take part.
    template <class Body>
    __device__ __forceinline__ void each(Body body) const {
        for (int64_t first = 0; first < size; first += blockDim.x) {
            __syncthreads();
            if (const int64_t j = first + threadIdx.x; j < size) {
                tile_scores[threadIdx.x] = score(j);
                tile_ranks[threadIdx.x] = ranks[j];
            }
            __syncthreads();
            const int count = int(size - first < blockDim.x ? size - first : blockDim.x);
            for (int j = 0; j < count; ++j)
                if (tile_ranks[j] >= 0) body(first + j, tile_scores[j], tile_ranks[j]);
        }
    }

    // body(i, present) for this thread's rows; every thread makes as many calls.
    template <class Body>
    __device__ __forceinline__ void rows(Body body) const {
        for (int64_t first = 0; first < size; first += blockDim.x) {
            const int64_t i = first + threadIdx.x;
            body(i, i < size && ranks[i] >= 0);
        }
    }
};

template <class T>
__device__ double count_pairs(const Entries<T>& group) {
    double pairs = 0;
    group.rows([&](int64_t i, bool present) {
        const int64_t rank = present ? group.ranks[i] : 0;
        int wins = 0;
        group.each([&](int64_t, float, int64_t other) { wins += present && rank < other; });
        pairs += wins;
    });
    return pairs;
}

template <class T>
__device__ double pairwise_group(const Entries<T>& group, const RankOptions& options, float* gradient, float factor) {
    const LogisticForm<float> form{float(options.label_smoothing)};
    const float margin = float(options.margin);
    double loss = 0;
    group.rows([&](int64_t i, bool present) {
        const float x = present ? group.score(i) : 0.f;
        const int64_t rank = present ? group.ranks[i] : 0;
        float cost = 0.f, slope = 0.f;
        group.each([&](int64_t, float y, int64_t other) {
            if (!present || rank == other) return;
            const float z = (x - y) - margin * float(other - rank);
            const bool wins = rank < other;
            const Slope<float> at = form(wins ? z : -z);
            cost += wins ? at.loss : 0.f;
            slope += wins ? at.slope : -at.slope;
        });
        loss += cost;
        if (gradient && i < group.size) gradient[i] = present ? slope * (group.scale * factor) : 0.f;
    });
    return loss;
}

// Entry i costs log(sum_j w_ij e^(s_j - s_i)): w is 1 for what is ranked after it and, among d ties, 1 by Breslow's
// rule and 1 - l/d for the l-th of them by Efron's. Between the passes `stages` keeps the max, the log of the sum (+inf
// where there is no stage) and the share of ties.
template <class T>
__device__ double listwise_group(const Entries<T>& group, bool efron, float* gradient, float* stages, int64_t count) {
    double loss = 0;
    float *const maxima = stages, *const logs = stages + count, *const shares = stages + 2 * count;
    group.rows([&](int64_t i, bool present) {
        const float x = present ? group.score(i) : 0.f;
        const int64_t rank = present ? group.ranks[i] : 0;
        int tied = 0, before = 0, left = 0;
        group.each([&](int64_t j, float, int64_t other) {
            tied += other == rank;
            before += other == rank && j < i;
            left += other >= rank;
        });
        const float share = efron && tied > 0 ? 1.f - float(before) / float(tied) : 1.f;
        float max = kLowestFloat, sum = 0.f;
        group.each([&](int64_t, float y, int64_t other) {
            if (other < rank) return;
            const float top = max > y ? max : y;
            sum = sum * exp_nonpositive(max - top) + (other == rank ? share : 1.f) * exp_nonpositive(y - top);
            max = top;
        });
        if (i >= group.size) return;
        const bool stage = present && left > 1;
        maxima[i] = max;
        logs[i] = stage ? log_positive(sum) : INFINITY;
        shares[i] = share;
        if (stage) loss += (max - x) + logs[i];
    });
    if (!gradient) return loss;
    __syncthreads();
    group.rows([&](int64_t i, bool present) {
        const float x = present ? group.score(i) : 0.f;
        const int64_t rank = present ? group.ranks[i] : 0;
        float slope = 0.f;
        group.each([&](int64_t j, float, int64_t other) {
            if (rank < other) return;
            slope += (other == rank ? shares[j] : 1.f) * exp_nonpositive((x - maxima[j]) - logs[j]);
        });
        if (i >= group.size) return;
        const bool stage = logs[i] < INFINITY || x != x;
        gradient[i] = present ? group.scale * (slope - (stage ? 1.f : 0.f)) : 0.f;
    });
    return loss;
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads) rank_groups(const RankArgs a) {
    __shared__ float tile_scores[kGroupThreads];
    __shared__ int64_t tile_ranks[kGroupThreads];
    __shared__ double sums[kWarp];
    __shared__ bool last;
    float* const losses = static_cast<float*>(a.group_loss);  // [groups]
    float* const pairs = losses + a.groups;                   // [groups]
    const bool pairwise = a.options.method == RankMethod::kPairwise;

    for (int64_t index = blockIdx.x; index < a.groups; index += gridDim.x) {
        int64_t begin = index * a.size, end = begin + a.size;
        bool valid = true;
        if (a.offsets) {
            begin = a.offsets[index], end = a.offsets[index + 1];
            valid = begin >= 0 && begin <= end && end <= a.count;
            if (!valid) begin = end = 0;
        }
        const Entries<T> group{static_cast<const T*>(a.scores) + begin,
                               a.ranks + begin,
                               end - begin,
                               float(a.options.scale),
                               tile_scores,
                               tile_ranks};
        float* const gradient = a.gradient ? static_cast<float*>(a.gradient) + begin : nullptr;
        const double count = block_sum(count_pairs(group), sums);
        double loss = 0;
        if (count == 0) {
            for (int64_t i = threadIdx.x; gradient && i < group.size; i += blockDim.x) gradient[i] = 0.f;
        } else if (pairwise) {
            const float factor = a.options.over_groups ? 1.f / float(count) : 1.f;
            loss = factor * block_sum(pairwise_group(group, a.options, gradient, factor), sums);
        } else {
            float* const stages = static_cast<float*>(a.stages) + begin;
            loss = block_sum(listwise_group(group, a.options.method == RankMethod::kEfron, gradient, stages, a.count),
                             sums);
        }
        if (threadIdx.x == 0) {
            losses[index] = valid ? float(loss) : NAN;
            pairs[index] = valid ? float(count) : NAN;
            if (a.reduction == Reduction::kNone) static_cast<float*>(a.loss)[index] = losses[index];
        }
    }

    // The block that ends last adds up; it finds the ticket 0 and leaves it so.
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(a.ticket, 1) == int(gridDim.x) - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    double loss = 0, counted = 0;
    for (int64_t i = threadIdx.x; i < a.groups; i += blockDim.x) {
        loss += __ldcg(losses + i);
        const float of = __ldcg(pairs + i);
        counted += a.options.over_groups && of > 0.f ? 1.f : of;  // 0 and NaN stay
    }
    loss = block_sum(loss, sums);
    counted = block_sum(counted, sums);
    if (threadIdx.x != 0) return;
    *a.ticket = 0;
    write_result(static_cast<float*>(a.loss), static_cast<float*>(a.denominator), a.reduction,
                 static_cast<const float*>(a.num_items), loss, counted);
    if (!a.offsets || (a.offsets[0] == 0 && a.offsets[a.groups] == a.count && counted == counted)) return;
    *static_cast<float*>(a.denominator) = NAN;  // and with it every gradient
    if (a.reduction != Reduction::kNone) *static_cast<float*>(a.loss) = NAN;
}

// ---- Backward ----

__device__ __forceinline__ int64_t group_of(const int64_t* offsets, int64_t groups, int64_t entry) {
    int64_t low = 0, high = groups - 1;  // the last group that begins at or before the entry
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (offsets[middle] <= entry)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) scale_scores(const ScoreGradientArgs a) {
    const float over = a.denominator ? *static_cast<const float*>(a.denominator) : 1.f;
    const float* const upstream = static_cast<const float*>(a.upstream);
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.count; i += stride) {
        float by = 0.f;
        if (over != 0.f) {
            const int64_t group = !a.per_group ? 0 : (a.offsets ? group_of(a.offsets, a.groups, i) : i / a.size);
            by = upstream[group] / over;
        }
        const float first = static_cast<const float*>(a.gradient)[i];
        static_cast<T*>(a.result)[i] = narrow<T>(first * by);
        if (!a.second_result) continue;
        const float second = a.second_gradient ? static_cast<const float*>(a.second_gradient)[i] : -first;
        static_cast<T*>(a.second_result)[i] = narrow<T>(second * by);
    }
}

}  // namespace

void pair_loss(const PairArgs& args, cudaStream_t stream) {
    element_size(args.dtype, "pair_loss");
    with_type(args.dtype, [&](auto type) {
        check(launch({1, kItemThreads, 0, stream}, pair_items<decltype(type)>, args), "pair_items");
    });
}

void ranked_loss(const RankArgs& args, cudaStream_t stream) {
    element_size(args.dtype, "ranked_loss");
    const int64_t mean_size = args.groups > 0 ? args.count / args.groups : 0;
    int threads = kWarp;
    while (threads < kGroupThreads && threads < mean_size) threads *= 2;
    const int64_t most = int64_t{current_device().processors} * 64;
    const int64_t blocks = std::clamp<int64_t>(args.groups, 1, most);
    with_type(args.dtype, [&](auto type) {
        check(launch({blocks, threads, 0, stream}, rank_groups<decltype(type)>, args), "rank_groups");
    });
}

void score_gradient(const ScoreGradientArgs& args, cudaStream_t stream) {
    element_size(args.dtype, "score_gradient");
    if (args.count == 0) return;
    const int64_t most = int64_t{current_device().processors} * 8;
    const int64_t blocks = std::min((args.count + kElementThreads - 1) / kElementThreads, most);
    with_type(args.dtype, [&](auto type) {
        check(launch({blocks, kElementThreads, 0, stream}, scale_scores<decltype(type)>, args), "scale_scores");
    });
}

}  // namespace pyalign::cuda
