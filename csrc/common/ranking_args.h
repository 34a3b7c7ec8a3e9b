// The arguments of the ranking engines: one struct per op, filled by bindings.cpp, read by the CPU and CUDA engines.
//
// Forward passes store gradients that aren't divided by the denominator yet, in accumulation dtype (float; double for
// float64 scores); the backward pass divides them, multiplies them by the upstream gradient and rounds them.
#pragma once

#include "common/distill_args.h"

namespace pyalign {

// In the order of pyalign/_types.py.
enum class PairLoss : int {
    kLogistic,
    kHinge,
    kExponential,
    kIpo,
    kRobust,
    kExo,
    kNca,
    kBco,
    kSppo,
    kApoZero,
    kApoDown,
    kDiscopop,
    kOddsRatio,
    kBinary,  // from here on: one score and a label per item
    kKto
};

struct PairOptions {
    PairLoss loss = PairLoss::kLogistic;
    double scale = 1, margin = 0, label_smoothing = 0, center = 0, tau = 1, delta = 0;
    double positive_weight = 1, negative_weight = 1;
    double log_chosen = 0, log_rejected = 0;  // log(1 - label_smoothing), log(label_smoothing)
};

// The loss of items: pairs of scores, or scores with labels. Null pointers mean "not given" or "not wanted".
struct PairArgs {
    int64_t count = 0;
    Dtype dtype = Dtype::kFloat32;           // of first, second and what is subtracted from them
    const void* first = nullptr;             // [count] the preferred score, or the only one
    const void* second = nullptr;            // [count]
    const void* first_reference = nullptr;   // [count]
    const void* second_reference = nullptr;  // [count]
    const void* margin = nullptr;            // [count] accumulation dtype; replaces options.margin
    int64_t margin_stride = 1;               // 0: one margin for all
    const uint8_t* labels = nullptr;         // [count], instead of `second`
    const void* weight = nullptr;            // [count] accumulation dtype
    const uint8_t* mask = nullptr;           // [count]
    Reduction reduction = Reduction::kMean;
    const void* num_items = nullptr;  // [1] accumulation dtype, replaces the count as the denominator of kMean
    PairOptions options;

    void* loss = nullptr;             // [1], or [count] for kNone
    void* denominator = nullptr;      // [1]: what kMean divides by
    void* first_gradient = nullptr;   // [count]
    void* second_gradient = nullptr;  // [count], not asked for where it is the negative of the first
    void* first_reward = nullptr;     // [count] scale * (first - first_reference)
    void* second_reward = nullptr;    // [count]
    void* block_sums = nullptr;       // [2, kPairBlocks] double, workspace of the GPU kernels: losses, counts
    int32_t* ticket = nullptr;        // [1] workspace of the GPU kernels, 0 before and after
};

constexpr int kPairBlocks = 512;  // of a GPU kernel, at most

constexpr int kSharedEntries = 4096, kSortedBytes = 20;  // of groups that a GPU sorts by rank

enum class RankMethod : int { kPairwise, kBreslow, kEfron };  // Plackett-Luce by its rule for ties

struct RankOptions {
    RankMethod method = RankMethod::kPairwise;
    double scale = 1, margin = 0, label_smoothing = 0;
    bool over_groups = false;  // the mean within a group, then over groups; else over all pairs
};

// The loss of groups of scores: dense, `size` each, or the entries offsets[g] .. offsets[g + 1].
struct RankArgs {
    int64_t groups = 0, size = 0, count = 0;  // count: entries of all groups
    Dtype dtype = Dtype::kFloat32;
    const void* scores = nullptr;      // [count]
    const int64_t* ranks = nullptr;    // [count] 0 is best, equal ranks tie, a negative one is absent
    const int64_t* offsets = nullptr;  // [groups + 1]
    Reduction reduction = Reduction::kMean;
    const void* num_items = nullptr;  // [1] accumulation dtype
    RankOptions options;

    void* loss = nullptr;         // [1], or [groups] for kNone
    void* denominator = nullptr;  // [1]
    void* gradient = nullptr;     // [count]
    void* group_loss = nullptr;   // [2, groups] float, workspace of the GPU kernels: losses and pairs of the groups
    void* rows = nullptr;         // [2, count] float, theirs for pairs: losses and pairs that each entry wins
    void* stages = nullptr;       // [3, count] float, theirs for Plackett-Luce
    void* sorted = nullptr;       // [2, count] kSortedBytes, theirs for groups of more than kSharedEntries
    int32_t* counters = nullptr;  // [1 + groups] theirs, 0 before and after: blocks, and entries of each group, done
};

// Whether a group's loss is the mean over its pairs, not their sum.
inline bool divides_by_pairs(const RankArgs& args) {
    return args.options.method == RankMethod::kPairwise && args.options.over_groups;
}

// result = gradient * upstream / denominator, in the scores' dtype; for pairs, twice.
struct ScoreGradientArgs {
    int64_t count = 0, groups = 0, size = 1;
    Dtype dtype = Dtype::kFloat32;
    const void* gradient = nullptr;         // [count] accumulation dtype
    const void* second_gradient = nullptr;  // [count]; null: the negative of `gradient`
    const void* upstream = nullptr;         // [1] or, where per_group, [groups] accumulation dtype
    bool per_group = false;
    const int64_t* offsets = nullptr;   // [groups + 1]; null: `size` entries per group
    const void* denominator = nullptr;  // [1]; null: 1
    void* result = nullptr;             // [count] dtype
    void* second_result = nullptr;      // [count] dtype, or not wanted
};

}  // namespace pyalign
