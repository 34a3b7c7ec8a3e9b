// The arguments of the scoring engines: one struct per op, filled by bindings.cpp, read by the CPU and CUDA engines.
#pragma once

#include "common/distill_args.h"

namespace pyalign {

// Heads read at the last token of every sequence. Null pointers mean "not given".
struct RewardArgs {
    Rows hidden;                       // [count, width]
    int64_t count = 0, width = 0;      // of all sequences; width is H
    int64_t sequences = 0, heads = 1;  // B, C
    const int64_t* offsets = nullptr;  // [sequences + 1]
    const uint8_t* mask = nullptr;     // [sequences, length]; without it and offsets, all of `length` count
    int64_t length = 0;
    const void* head = nullptr;  // [heads, width] accumulation dtype
    const void* bias = nullptr;  // [heads] accumulation dtype

    int64_t* last = nullptr;  // [sequences] the row that was read; -1: none, and the scores are NaN
    void* scores = nullptr;   // [sequences, heads] accumulation dtype
};

// upstream x head in the rows that were read, upstream^T x those rows, the sum of upstream; skipped where null.
struct RewardGradientArgs {
    Rows hidden;                    // [count, width]; without data where head_gradient is null
    Dtype dtype = Dtype::kFloat32;  // of the hidden states
    int64_t count = 0, width = 0, sequences = 0, heads = 1;
    const int64_t* last = nullptr;   // [sequences]
    const void* head = nullptr;      // [heads, width] accumulation dtype, like all below
    const void* upstream = nullptr;  // [sequences, heads]

    void* hidden_gradient = nullptr;  // [count, width] dtype; 0 but in the rows of `last`
    void* head_gradient = nullptr;    // [heads, width]
    void* bias_gradient = nullptr;    // [heads]
};

// In the order of pyalign/_types.py.
enum class GroupOp : int {
    kWinProbabilities,          // [sum of K^2] p_ij
    kWinProbabilitiesGradient,  // [count] sum_j p_ij p_ji (u_ij - u_ji), in the scores' dtype
    kWinRates,                  // [count] the mean of p_ij over j != i, 1/2 for K = 1
    kWinRatesGradient,          // [count] sum_j p_ij p_ji (u_i - u_j) / (K - 1), in the scores' dtype
    kBest                       // [groups] int64, index into `scores` or, of dense groups, into their row; -1: none
};

// Groups of scores: dense, `size` each, or the entries offsets[g] .. offsets[g + 1].
struct GroupArgs {
    GroupOp op = GroupOp::kWinProbabilities;
    int64_t groups = 0, size = 0, count = 0;  // count: entries of all groups
    Dtype dtype = Dtype::kFloat32;
    const void* scores = nullptr;      // [count]
    const int64_t* offsets = nullptr;  // [groups + 1]
    const int64_t* blocks = nullptr;   // [groups + 1] where each packed group's matrix starts, for the matrix ops
    double scale = 1;
    const void* upstream = nullptr;  // for the gradients, of what the forward op returned
    void* result = nullptr;          // accumulation dtype but where stated
};

// In the order of pyalign/_types.py.
constexpr int kStatistics = 8;  // pairs, weight, weight^2, and times weight: right, tied, -log p, (1 - p)^2, confidence

// Sums over pairs, by category and bin of confidence.
struct MetricArgs {
    int64_t count = 0, categories = 1, bins = 10;
    Dtype dtype = Dtype::kFloat32;      // of the scores
    const void* chosen = nullptr;       // [count]
    const void* rejected = nullptr;     // [count]
    const void* margins = nullptr;      // [count] accumulation dtype; replaces margin
    const void* weight = nullptr;       // [count] accumulation dtype
    const uint8_t* mask = nullptr;      // [count]
    const int64_t* category = nullptr;  // [count] 0 .. categories - 1
    double scale = 1, margin = 0;

    int64_t pieces = 1;       // of the CUDA engine, a table for each
    double* table = nullptr;  // [pieces, categories, bins + 1, kStatistics]; the last bin is for NaN

    PYALIGN_HD int64_t cells() const { return categories * (bins + 1); }
};

}  // namespace pyalign
