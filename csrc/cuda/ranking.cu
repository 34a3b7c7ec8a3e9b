// Preference losses: loss, gradient and reduction in one launch.
//
// All pairs of groups are shared out by entry: a few threads take an entry's pairs, those that it wins and those that
// it loses, whatever group it is in, so that one group of thousands keeps all multiprocessors busy as well as thousands
// of small ones do. Nothing is added up between threads but the few of an entry, and its group's sums: the block that
// completes a group does that, in the order of the entries. Plackett-Luce is in stages.cuh. The block that ends last
// adds up the groups, in their order.
#include <algorithm>

#include "common/ranking.h"
#include "cuda/common.cuh"
#include "cuda/stages.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kItemThreads = 512, kGroupThreads = 256, kElementThreads = 256;

__device__ __forceinline__ void write_result(float* loss, float* denominator, Reduction reduction,
                                             const float* num_items, double sum, double count) {
    const float counted = num_items ? *num_items : static_cast<float>(count);
    const float over = reduction == Reduction::kMean ? counted : 1.f;
    *denominator = over;
    if (reduction != Reduction::kNone) *loss = over == 0.f ? 0.f : static_cast<float>(sum / over);
}

// Whether this is the block that ends last, with all that the others wrote before they asked. It finds the ticket 0 and
// leaves it so.
__device__ bool ends_last(int32_t* ticket) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1) == int(gridDim.x) - 1;
        if (last) *ticket = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// ---- Items ----

template <class T>
__device__ __forceinline__ float score_at(const void* x, const void* reference, int64_t i) {
    const float score = widen(static_cast<const T*>(x)[i]);
    return reference ? score - widen(static_cast<const T*>(reference)[i]) : score;
}

template <class T>
__global__ void __launch_bounds__(kItemThreads, 2) pair_items(const PairArgs a) {
    __shared__ double sums[kWarp];
    const float scale = float(a.options.scale), center = float(a.options.center), margin = float(a.options.margin);
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    double loss = 0;
    int64_t counted = 0;
    with_form<float>(a.options, [&](auto form) {
        for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.count; i += stride) {
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
    double sum = block_total(loss, sums), count = block_total(double(counted), sums);
    if (gridDim.x > 1) {
        double* const losses = static_cast<double*>(a.block_sums);
        if (threadIdx.x == 0) losses[blockIdx.x] = sum, losses[kPairBlocks + blockIdx.x] = count;
        if (!ends_last(a.ticket)) return;
        loss = count = 0;
        for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x)
            loss += __ldcg(losses + i), count += __ldcg(losses + kPairBlocks + i);
        sum = block_total(loss, sums), count = block_total(count, sums);
    }
    if (threadIdx.x == 0)
        write_result(static_cast<float*>(a.loss), static_cast<float*>(a.denominator), a.reduction,
                     static_cast<const float*>(a.num_items), sum, count);
}

// ---- Groups ----

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

// The entries of a group; none of one whose offsets make no sense.
struct Span {
    int64_t begin, end;
    bool valid;
};

__device__ __forceinline__ Span span_of(const RankArgs& a, int64_t group) {
    if (!a.offsets) return {group * a.size, (group + 1) * a.size, true};
    const int64_t begin = a.offsets[group], end = a.offsets[group + 1];
    if (begin >= 0 && begin <= end && end <= a.count) return {begin, end, true};
    return {0, 0, false};
}

// A group's loss and number of pairs.
__device__ __forceinline__ void store_group(const RankArgs& a, int64_t group, bool valid, double loss, double pairs) {
    float* const losses = static_cast<float*>(a.group_loss);  // [groups]
    losses[group] = valid ? float(loss) : NAN;
    losses[a.groups + group] = valid ? float(pairs) : NAN;
    if (a.reduction == Reduction::kNone) static_cast<float*>(a.loss)[group] = losses[group];
}

// What the block that ends last does: the sum over the groups.
__device__ void sum_groups(const RankArgs& a, double* slots) {
    const float *const losses = static_cast<const float*>(a.group_loss), *const pairs = losses + a.groups;
    double loss = 0, counted = 0;
    for (int64_t i = threadIdx.x; i < a.groups; i += blockDim.x) {
        loss += __ldcg(losses + i);
        const float of = __ldcg(pairs + i);
        counted += a.options.over_groups && of > 0.f ? 1.f : of;  // 0 and NaN stay
    }
    loss = block_total(loss, slots);
    counted = block_total(counted, slots);
    if (threadIdx.x != 0) return;
    write_result(static_cast<float*>(a.loss), static_cast<float*>(a.denominator), a.reduction,
                 static_cast<const float*>(a.num_items), loss, counted);
    if (!a.offsets || (a.offsets[0] == 0 && a.offsets[a.groups] == a.count && counted == counted)) return;
    *static_cast<float*>(a.denominator) = NAN;  // and with it every gradient
    if (a.reduction != Reduction::kNone) *static_cast<float*>(a.loss) = NAN;
}

// ---- All pairs ----

// The groups that end up complete with this block's entries [first, last): their sums, and the gradient's factor. A
// warp takes a group.
__device__ void complete_groups(const RankArgs& a, int64_t first, int64_t last, int64_t first_group,
                                int64_t last_group) {
    const int lane = threadIdx.x % kWarp;
    const float* const rows = static_cast<const float*>(a.rows);
    float* const gradient = static_cast<float*>(a.gradient);
    for (int64_t g = first_group + threadIdx.x / kWarp; g <= last_group; g += blockDim.x / kWarp) {
        const Span group = span_of(a, g);
        const int64_t begin = group.begin > first ? group.begin : first, end = group.end < last ? group.end : last;
        if (begin >= end) continue;
        if (end - begin < group.end - group.begin) {  // other blocks have entries of it, too
            int done = 0;
            if (lane == 0) {
                __threadfence();
                done = atomicAdd(a.counters + 1 + g, int(end - begin)) + int(end - begin);
                __threadfence();
            }
            if (__shfl_sync(~0u, done, 0) != int(group.end - group.begin)) continue;
        }
        double loss = 0, pairs = 0;
        for (int64_t i = group.begin + lane; i < group.end; i += kWarp)
            loss += __ldcg(rows + i), pairs += __ldcg(rows + a.count + i);
        loss = sum_over<kWarp>(loss), pairs = sum_over<kWarp>(pairs);
        const float factor = a.options.over_groups && pairs > 0 ? 1.f / float(pairs) : 1.f;
        if (gradient && factor != 1.f)
            for (int64_t i = group.begin + lane; i < group.end; i += kWarp) gradient[i] = __ldcg(gradient + i) * factor;
        if (lane == 0) store_group(a, g, true, loss * factor, pairs);
    }
}

template <class T, int kThreadsPerEntry>
__global__ void __launch_bounds__(kGroupThreads, 5) rank_pairs(const RankArgs a) {
    constexpr int kEntries = kGroupThreads / kThreadsPerEntry;
    __shared__ double sums[kWarp];
    __shared__ int64_t groups[2];
    const T* const scores = static_cast<const T*>(a.scores);
    const float scale = float(a.options.scale), margin = float(a.options.margin);
    const LogisticForm<float> form{float(a.options.label_smoothing)};
    const int64_t first = int64_t{blockIdx.x} * kEntries, i = first + threadIdx.x / kThreadsPerEntry;
    const int64_t last = first + kEntries < a.count ? first + kEntries : a.count;
    const int thread = threadIdx.x % kThreadsPerEntry;

    float cost = 0.f, slope = 0.f;
    int wins = 0;
    if (i < last) {
        const int64_t index = a.offsets ? group_of(a.offsets, a.groups, i) : i / a.size;
        if (thread == 0 && i == first) groups[0] = index;
        if (thread == 0 && i == last - 1) groups[1] = index;
        const Span group = span_of(a, index);
        const float x = scale * widen(scores[i]);
        const int64_t rank = a.ranks[i];
        constexpr int kPart = 32 * kThreadsPerEntry;  // summed by itself: thousands of terms would round too often
        for (int64_t part = group.begin; rank >= 0 && part < group.end; part += kPart) {
            const int64_t end = part + kPart < group.end ? part + kPart : group.end;
            float part_cost = 0.f, part_slope = 0.f;
            for (int64_t j = part + thread; j < end; j += kThreadsPerEntry) {
                const int64_t other = a.ranks[j];
                if (other < 0 || other == rank) continue;
                float z = x - scale * widen(scores[j]);
                if (margin != 0.f) z -= margin * float(other - rank);
                const bool winner = rank < other;
                const Slope<float> at = form(winner ? z : -z);
                part_cost += winner ? at.loss : 0.f;
                part_slope += winner ? at.slope : -at.slope;
                wins += winner;
            }
            cost += part_cost, slope += part_slope;
        }
    }
    cost = sum_over<kThreadsPerEntry>(cost);
    slope = sum_over<kThreadsPerEntry>(slope);
    wins = sum_over<kThreadsPerEntry>(wins);
    if (thread == 0 && i < last) {
        static_cast<float*>(a.rows)[i] = cost;
        static_cast<float*>(a.rows)[a.count + i] = float(wins);
        if (a.gradient) static_cast<float*>(a.gradient)[i] = scale * slope;
    }
    __syncthreads();
    if (first < last) complete_groups(a, first, last, groups[0], groups[1]);

    if (!ends_last(a.counters)) return;
    for (int64_t g = threadIdx.x; g < a.groups; g += blockDim.x) {
        const Span group = span_of(a, g);
        if (group.begin == group.end) store_group(a, g, group.valid, 0, 0);  // no entry has done it
        a.counters[1 + g] = 0;
    }
    __syncthreads();
    sum_groups(a, sums);
}

// ---- Plackett-Luce ----

template <class T>
__global__ void __launch_bounds__(kStageThreads, 3) rank_stages(const RankArgs a, int capacity) {
    extern __shared__ uint4 shared[];  // Sorted, of `capacity` entries
    __shared__ double sums[kWarp];
    constexpr int kGroups = kStageThreads / kWarp;
    const bool efron = a.options.method == RankMethod::kEfron;
    const float scale = float(a.options.scale);
    const auto scores_at = [&](int64_t i) { return static_cast<const T*>(a.scores) + i; };
    const auto gradient_at = [&](int64_t i) { return a.gradient ? static_cast<float*>(a.gradient) + i : nullptr; };

    for (int64_t first = int64_t{blockIdx.x} * kGroups; first < a.groups; first += int64_t{gridDim.x} * kGroups) {
        // Small groups, a warp each
        if (const int64_t index = first + threadIdx.x / kWarp; index < a.groups) {
            const Span group = span_of(a, index);
            const int64_t begin = group.begin, size = group.end - begin;
            if (size <= kWarp) {
                const GroupResult result =
                    warp_stages(scores_at(begin), a.ranks + begin, int(size), scale, efron, gradient_at(begin));
                if (threadIdx.x % kWarp == 0) store_group(a, index, group.valid, result.loss, result.pairs);
            }
        }

        // Large groups, one after the other
        for (int64_t index = first; index < first + kGroups && index < a.groups; ++index) {
            const Span group = span_of(a, index);
            const int64_t begin = group.begin, size = group.end - begin;
            if (size <= kWarp) continue;
            __syncthreads();
            int64_t room = capacity;
            void* memory = shared;
            if (size > capacity) {  // twice its size is there in global memory, for a power of two
                room = 2 * size;
                memory = static_cast<char*>(a.sorted) + 2 * begin * kSortedBytes;
            }
            const GroupResult result =
                block_stages(scores_at(begin), a.ranks + begin, int(size), scale, efron, gradient_at(begin),
                             static_cast<float*>(a.stages) + begin, a.count, Sorted(memory, room));
            if (threadIdx.x == 0) store_group(a, index, true, result.loss, result.pairs);
        }
    }
    if (ends_last(a.counters)) sum_groups(a, sums);
}

// ---- Backward ----

template <class T>
__global__ void __launch_bounds__(kElementThreads, 8) scale_scores(const ScoreGradientArgs a) {
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
    constexpr int64_t kItemsPerThread = 8;  // more blocks save less than it costs to wait for them
    const int64_t wanted = (args.count + kItemsPerThread * kItemThreads - 1) / (kItemsPerThread * kItemThreads);
    const int64_t most = std::min(kPairBlocks, 2 * current_device().processors);
    const int64_t blocks = args.ticket ? std::clamp<int64_t>(wanted, 1, most) : 1;
    with_type(args.dtype, [&](auto type) {
        check(launch({blocks, kItemThreads, 0, stream}, pair_items<decltype(type)>, args), "pair_items");
    });
}

template <class T, int kThreadsPerEntry>
void launch_pairs(const RankArgs& args, cudaStream_t stream) {
    constexpr int64_t kEntries = kGroupThreads / kThreadsPerEntry;
    const int64_t blocks = std::max<int64_t>((args.count + kEntries - 1) / kEntries, 1);
    check(launch({blocks, kGroupThreads, 0, stream}, rank_pairs<T, kThreadsPerEntry>, args), "rank_pairs");
}

void ranked_loss(const RankArgs& args, cudaStream_t stream) {
    element_size(args.dtype, "ranked_loss");
    const int64_t mean_size = args.groups > 0 ? args.count / args.groups : 0;
    if (args.options.method == RankMethod::kPairwise) {
        constexpr int64_t kLarge = 256;  // entries of a group, from which on more threads share one
        return with_type(args.dtype, [&](auto type) {
            if (mean_size < kLarge)
                launch_pairs<decltype(type), 4>(args, stream);
            else
                launch_pairs<decltype(type), 16>(args, stream);
        });
    }
    const int64_t largest = args.offsets ? args.count : args.size;  // of a group, at most
    int capacity = largest > kWarp ? 2 * kWarp : 0;
    while (capacity > 0 && capacity < largest && capacity < kSharedEntries) capacity *= 2;
    constexpr int64_t kGroups = kStageThreads / kWarp;
    const int64_t most = int64_t{current_device().processors} * 16;
    const int64_t blocks = std::clamp<int64_t>((args.groups + kGroups - 1) / kGroups, 1, most);
    with_type(args.dtype, [&](auto type) {
        const Launch how{blocks, kStageThreads, capacity * Sorted::kBytes, stream};
        check(launch(how, rank_stages<decltype(type)>, args, capacity), "rank_stages");
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
