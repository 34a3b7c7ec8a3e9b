// Scoring: heads read at last tokens, win probabilities of groups, and the figures of pairs.
//
// A sequence's scores are one block's work, whose threads and order of summing depend on the width alone: they have the
// same bits in every batch. Sums over sequences, opponents and pairs have a fixed order too; there are no atomics but
// for the maximum of integers.
#include <algorithm>

#include "common/scoring.h"
#include "cuda/common.cuh"

namespace pyalign::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

int64_t blocks_for(int64_t items) { return std::clamp<int64_t>(items, 1, int64_t{current_device().processors} * 32); }

// ---- Reward heads ----

// The row of the sequence's last token, or -1; the whole block takes part.
__device__ int64_t last_row(const RewardArgs& a, int64_t sequence, int* slot /* shared */) {
    if (a.offsets) return a.offsets[sequence + 1] > a.offsets[sequence] ? a.offsets[sequence + 1] - 1 : -1;
    const int64_t first = sequence * a.length;
    if (!a.mask) return a.length > 0 ? first + a.length - 1 : -1;
    for (int64_t end = a.length; end > 0; end -= kThreads) {
        __syncthreads();
        if (threadIdx.x == 0) *slot = -1;
        __syncthreads();
        const int64_t place = end - kThreads + threadIdx.x;
        if (place >= 0 && a.mask[first + place]) atomicMax(slot, int(threadIdx.x));
        __syncthreads();
        if (*slot >= 0) return first + end - kThreads + *slot;
    }
    return -1;
}

// Thread t sums the products of the vectors t, t + kThreads, ... of 16 bytes, element by element, in this order also
// where the row's alignment allows no vector loads.
template <class T>
__device__ float partial_dot(const T* x /* [width] */, const float* w /* [width] */, int64_t width) {
    constexpr int kWidth = kLanes<T>;
    const bool aligned = misalignment(x) == 0;
    float sum = 0.f;
    for (int64_t i = int64_t{threadIdx.x} * kWidth; i < width; i += kThreads * kWidth) {
        if (aligned && i + kWidth <= width) {
            float values[kWidth];
            unpack<T>(__ldg(reinterpret_cast<const uint4*>(x + i)), values);
#pragma unroll
            for (int k = 0; k < kWidth; ++k) sum = __fmaf_rn(values[k], __ldg(w + i + k), sum);
        } else {
            for (int k = 0; k < kWidth && i + k < width; ++k) sum = __fmaf_rn(widen(x[i + k]), __ldg(w + i + k), sum);
        }
    }
    return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) reward_heads(const RewardArgs a) {
    __shared__ double sums[kWarp];
    __shared__ int slot;
    float* const scores = static_cast<float*>(a.scores);          // [sequences, heads]
    const float* const head = static_cast<const float*>(a.head);  // [heads, width]
    const float* const bias = static_cast<const float*>(a.bias);  // [heads]
    for (int64_t b = blockIdx.x; b < a.sequences; b += gridDim.x) {
        const int64_t last = last_row(a, b, &slot);
        if (threadIdx.x == 0) a.last[b] = last;
        for (int64_t c = 0; c < a.heads; ++c) {
            double score = NAN;
            if (last >= 0)
                score = block_total(
                    double(partial_dot(row_pointer<const T>(a.hidden, last), head + c * a.width, a.width)), sums);
            if (threadIdx.x == 0) scores[b * a.heads + c] = float(score + (bias ? double(bias[c]) : 0.0));
        }
    }
}

// dL/dx = sum_c u_c w_c in the rows that were read.
template <class T>
__global__ void __launch_bounds__(kThreads) reward_rows(const RewardGradientArgs a) {
    const float* const head = static_cast<const float*>(a.head);  // [heads, width]
    for (int64_t b = blockIdx.x; b < a.sequences; b += gridDim.x) {
        if (a.last[b] < 0) continue;
        const float* const upstream = static_cast<const float*>(a.upstream) + b * a.heads;
        T* const to = static_cast<T*>(a.hidden_gradient) + a.last[b] * a.width;
        for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
            float sum = 0.f;
            for (int64_t c = 0; c < a.heads; ++c) sum = __fmaf_rn(upstream[c], __ldg(head + c * a.width + i), sum);
            to[i] = narrow<T>(sum);
        }
    }
}

// dL/dw_c = sum_b u_bc x_b: a warp's lanes are columns, the warps of a block share the sequences.
template <class T>
__global__ void __launch_bounds__(kThreads) reward_columns(const RewardGradientArgs a) {
    __shared__ double parts[kWarps][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t strips = (a.width + kWarp - 1) / kWarp;
    const float* const upstream = static_cast<const float*>(a.upstream);  // [sequences, heads]
    for (int64_t item = blockIdx.x; item < strips * a.heads; item += gridDim.x) {
        const int64_t c = item / strips, column = item % strips * kWarp + lane;
        double sum = 0;
        for (int64_t b = warp; b < a.sequences; b += kWarps) {
            const int64_t last = a.last[b];
            if (last < 0 || column >= a.width) continue;
            sum += double(upstream[b * a.heads + c]) * double(widen(row_pointer<const T>(a.hidden, last)[column]));
        }
        __syncthreads();
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp != 0 || column >= a.width) continue;
        sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sum += parts[i][lane];
        static_cast<float*>(a.head_gradient)[c * a.width + column] = float(sum);
    }
}

__global__ void __launch_bounds__(kThreads) reward_bias(const RewardGradientArgs a) {
    __shared__ double sums[kWarp];
    for (int64_t c = blockIdx.x; c < a.heads; c += gridDim.x) {
        double sum = 0;
        for (int64_t b = threadIdx.x; b < a.sequences; b += kThreads)
            if (a.last[b] >= 0) sum += static_cast<const float*>(a.upstream)[b * a.heads + c];
        sum = block_total(sum, sums);
        if (threadIdx.x == 0) static_cast<float*>(a.bias_gradient)[c] = float(sum);
    }
}

// ---- Groups ----

template <class T>
struct Scores {
    const T* scores;             // [size]
    int64_t begin, size, block;  // block: where its matrix starts
    float scale;

    __device__ __forceinline__ Scores(const GroupArgs& a, int64_t group) {
        begin = a.offsets ? a.offsets[group] : group * a.size;
        size = a.offsets ? a.offsets[group + 1] - begin : a.size;
        block = a.blocks ? a.blocks[group] : group * a.size * a.size;
        scores = static_cast<const T*>(a.scores) + begin;
        scale = float(a.scale);
    }
    __device__ __forceinline__ float operator[](int64_t i) const { return widen(scores[i]); }
    __device__ __forceinline__ Win<float> between(float one, int64_t other) const {
        return win(scale * (one - (*this)[other]));
    }
};

// `parts` blocks share a group, here and below.
template <class T>
__global__ void __launch_bounds__(kThreads) win_matrix(const GroupArgs a, int parts) {
    const int part = blockIdx.x % parts;
    for (int64_t index = blockIdx.x / parts; index < a.groups; index += gridDim.x / parts) {
        const Scores<T> group(a, index);
        float* const to = static_cast<float*>(a.result) + group.block;  // [size, size]
        const int64_t size = group.size, pairs = size * size, step = int64_t{parts} * kThreads;
        for (int64_t at = int64_t{part} * kThreads + threadIdx.x; at < pairs; at += step) {
            const int64_t i = size < 65536 ? uint32_t(at) / uint32_t(size) : at / size, j = at - i * size;
            to[at] = i == j ? 0.5f : group.between(group[i], j).p;
        }
    }
}

// A warp to a row of the matrix: rates, or the gradient of rates or of the matrix.
template <class T, GroupOp kOp>
__global__ void __launch_bounds__(kThreads, 4) win_sums(const GroupArgs a, int parts) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = blockIdx.x % parts;
    for (int64_t index = blockIdx.x / parts; index < a.groups; index += gridDim.x / parts) {
        const Scores<T> group(a, index);
        const int64_t size = group.size;
        // [size, size], or [size] of rates
        const float* const u = static_cast<const float*>(a.upstream) +
                               (kOp == GroupOp::kWinProbabilitiesGradient ? group.block : group.begin);
        const float share = kOp == GroupOp::kWinProbabilitiesGradient ? 1.f : size > 1 ? 1.f / float(size - 1) : 0.f;
        for (int64_t i = part * kWarps + warp; i < size; i += int64_t{parts} * kWarps) {
            const float score = group[i];
            float sum = 0.f;
            for (int64_t j = lane; j < size; j += kWarp) {
                if (i == j) continue;
                const Win<float> at = group.between(score, j);
                if constexpr (kOp == GroupOp::kWinRates)
                    sum += at.p;
                else if constexpr (kOp == GroupOp::kWinRatesGradient)
                    sum += at.slope * (u[i] - u[j]);
                else
                    sum += at.slope * (u[i * size + j] - u[j * size + i]);
            }
            sum = warp_sum(sum) * share;
            if (lane != 0) continue;
            if constexpr (kOp == GroupOp::kWinRates)
                static_cast<float*>(a.result)[group.begin + i] = size > 1 ? sum : 0.5f;
            else
                static_cast<T*>(a.result)[group.begin + i] = narrow<T>(group.scale * sum);
        }
    }
}

// A warp to a group.
template <class T>
__global__ void __launch_bounds__(kThreads) best_scores(const GroupArgs a) {
    const int lane = threadIdx.x % kWarp;
    const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, step = int64_t{gridDim.x} * kWarps;
    for (int64_t index = first; index < a.groups; index += step) {
        const Scores<T> group(a, index);
        int64_t best = -1;
        float highest = 0.f;
        const auto take = [&](int64_t i, float score) {
            if (i < 0 || score != score) return;
            if (best >= 0 && (score < highest || (score == highest && i > best))) return;
            best = i, highest = score;
        };
        for (int64_t i = lane; i < group.size; i += kWarp) take(i, group[i]);
        for (int other = kWarp / 2; other > 0; other /= 2) {
            const float score = __shfl_xor_sync(~0u, highest, other);
            take(__shfl_xor_sync(~0u, (long long)best, other), score);
        }
        if (lane == 0) static_cast<int64_t*>(a.result)[index] = best < 0 ? -1 : a.offsets ? group.begin + best : best;
    }
}

// ---- Metrics ----

constexpr int kTile = 1024;  // pairs

// A table for each block: its pairs tile by tile, each of its cells by one warp.
template <class T>
__global__ void __launch_bounds__(kThreads) pair_metrics(const MetricArgs a) {
    __shared__ float weights[kTile], right[kTile], losses[kTile], briers[kTile], confidences[kTile];
    __shared__ int cells[kTile];  // -1: doesn't count
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = int(a.cells());
    const float scale = float(a.scale);
    const int64_t per_piece = (a.count + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * per_piece;
    const int64_t end = begin + per_piece < a.count ? begin + per_piece : a.count;
    double* const table = a.table + blockIdx.x * (a.cells() * kStatistics);  // [cells, kStatistics]
    for (int64_t i = threadIdx.x; i < int64_t{count} * kStatistics; i += kThreads) table[i] = 0;

    for (int64_t tile = begin; tile < end; tile += kTile) {
        __syncthreads();
        for (int at = threadIdx.x; at < kTile; at += kThreads) {
            const int64_t i = tile + at;
            cells[at] = -1;
            if (i >= end || (a.mask && !a.mask[i])) continue;
            const float margin = a.margins ? static_cast<const float*>(a.margins)[i] : float(a.margin);
            const float gap = widen(static_cast<const T*>(a.chosen)[i]) - widen(static_cast<const T*>(a.rejected)[i]);
            const PairFigures<float> pair = pair_figures(scale * gap - margin);
            const int64_t category = a.category ? a.category[i] : 0;
            cells[at] = int(category * (a.bins + 1) + bin_of(pair.confidence, a.bins));
            weights[at] = a.weight ? static_cast<const float*>(a.weight)[i] : 1.f;
            right[at] = pair.right, losses[at] = pair.loss, briers[at] = pair.brier, confidences[at] = pair.confidence;
        }
        __syncthreads();
        for (int cell = warp; cell < count; cell += kWarps) {
            float sums[kStatistics] = {};
            for (int at = lane; at < kTile; at += kWarp) {
                if (cells[at] != cell) continue;
                const float w = weights[at], r = right[at];
                sums[0] += 1.f, sums[1] += w, sums[2] += w * w, sums[3] += w * r;
                sums[4] += w * (r != r ? r : r == 0.5f ? 1.f : 0.f);
                sums[5] += w * losses[at], sums[6] += w * briers[at], sums[7] += w * confidences[at];
            }
            if (!__any_sync(~0u, sums[0] != 0.f)) continue;
#pragma unroll
            for (int i = 0; i < kStatistics; ++i) {
                const float sum = warp_sum(sums[i]);
                if (lane == 0) table[int64_t{cell} * kStatistics + i] += double(sum);
            }
        }
    }
}

}  // namespace

void reward_scores(const RewardArgs& args, cudaStream_t stream) {
    element_size(args.hidden.dtype, "reward_scores");
    if (args.sequences == 0) return;
    with_type(args.hidden.dtype, [&](auto type) {
        check(launch({blocks_for(args.sequences), kThreads, 0, stream}, reward_heads<decltype(type)>, args),
              "reward_heads");
    });
}

void reward_gradient(const RewardGradientArgs& args, cudaStream_t stream) {
    const int64_t size = element_size(args.dtype, "reward_gradient");
    if (args.hidden_gradient && args.count > 0)
        check(cudaMemsetAsync(args.hidden_gradient, 0, size_t(args.count * args.width * size), stream),
              "reward_gradient");
    with_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        if (args.hidden_gradient && args.sequences > 0)
            check(launch({blocks_for(args.sequences), kThreads, 0, stream}, reward_rows<T>, args), "reward_rows");
        if (!args.head_gradient) return;
        const int64_t strips = (args.width + kWarp - 1) / kWarp * args.heads;
        check(launch({blocks_for(strips), kThreads, 0, stream}, reward_columns<T>, args), "reward_columns");
    });
    if (args.bias_gradient)
        check(launch({blocks_for(args.heads), kThreads, 0, stream}, reward_bias, args), "reward_bias");
}

void score_groups(const GroupArgs& args, cudaStream_t stream) {
    element_size(args.dtype, "score_groups");
    if (args.groups == 0) return;
    const int64_t size = 1 + args.count / args.groups;  // the mean
    with_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        if (args.op == GroupOp::kBest) {
            const int64_t blocks = blocks_for((args.groups + kWarps - 1) / kWarps);
            return check(launch({blocks, kThreads, 0, stream}, best_scores<T>, args), "best_scores");
        }
        const bool matrix = args.op == GroupOp::kWinProbabilities;
        const int64_t most = int64_t{current_device().processors} * 32;
        const int64_t wanted = 1 + (matrix ? size * size / (16 * kThreads) : size / (4 * kWarps));
        const int parts = int(std::min(wanted, most));
        const Launch how{parts * std::min(args.groups, most / parts), kThreads, 0, stream};
        if (matrix)
            check(launch(how, win_matrix<T>, args, parts), "win_matrix");
        else if (args.op == GroupOp::kWinRates)
            check(launch(how, win_sums<T, GroupOp::kWinRates>, args, parts), "win_sums");
        else if (args.op == GroupOp::kWinRatesGradient)
            check(launch(how, win_sums<T, GroupOp::kWinRatesGradient>, args, parts), "win_sums");
        else
            check(launch(how, win_sums<T, GroupOp::kWinProbabilitiesGradient>, args, parts), "win_sums");
    });
}

void preference_metrics(const MetricArgs& args, cudaStream_t stream) {
    element_size(args.dtype, "preference_metrics");
    if (args.cells() > std::numeric_limits<int>::max())
        throw std::invalid_argument("preference_metrics: too many categories and bins");
    with_type(args.dtype, [&](auto type) {
        check(launch({args.pieces, kThreads, 0, stream}, pair_metrics<decltype(type)>, args), "pair_metrics");
    });
}

}  // namespace pyalign::cuda
