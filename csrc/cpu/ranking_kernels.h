// The ranking kernels that are compiled once per instruction set, and what they are told beside their op's arguments.
#pragma once

#include <cstddef>

#include "common/ranking_args.h"

namespace pyalign::cpu {

struct LossSum {
    double loss = 0, count = 0;
};

// One group, its present entries best first. The arrays are scratch memory with room for kLanes entries more.
struct Group {
    int64_t begin = 0, size = 0;                   // its entries in the scores
    int64_t present = 0;                           // how many have a rank
    int64_t* order = nullptr;                      // [present] where each stands in the group
    int64_t* ranks = nullptr;                      // [present]
    int64_t* after = nullptr;                      // [present] the first entry of a worse rank
    void *scores = nullptr, *distances = nullptr;  // [present] F: scale * score; margin * (rank - the best rank)
    void* tile = nullptr;                          // [2, present] F or double, for what a loss needs
    double* gradient = nullptr;                    // [present]
};

struct RankingKernels {
    const char* isa;
    LossSum (*pairs)(const PairArgs&, int64_t begin, int64_t end);

    // Whole groups: results[group] is the loss, before it is divided by anything, and the pairs of each.
    void (*rank_groups)(const RankArgs&, int64_t begin, int64_t end, std::byte* scratch, LossSum* results);

    // A large group is opened once; its rows (the pairs that an entry wins) are anybody's, who brings a tile [present]
    // and a gradient [present] of his own. It is closed when group.gradient holds their sum.
    void (*open_group)(const RankArgs&, int64_t group, std::byte* scratch, Group&);
    double (*pair_rows)(const RankArgs&, const Group&, int64_t begin, int64_t end, void* tile, double* gradient);
    void (*close_group)(const RankArgs&, const Group&, LossSum& result);

    // [begin, end) counts entries or, where each group has an upstream gradient, groups.
    void (*score_gradient)(const ScoreGradientArgs&, int64_t begin, int64_t end);
};

constexpr int64_t kLanes = 16;

size_t group_scratch(int64_t size);    // bytes that open_group needs for a group of this size
int64_t pairs_of(const Group& group);  // of entries with different ranks

// Sorts (rank, place) by rank. Compiled once: see kernels.h.
void sort_by_rank(int64_t* ranks, int64_t* order, int64_t count);

}  // namespace pyalign::cpu
