// The scoring kernels that are compiled once per instruction set, and what they are told beside their op's arguments.
#pragma once

#include <cstddef>

#include "common/scoring_args.h"

namespace pyalign::cpu {

// Whole groups [begin, end) or, of one group, the rows [first, last) of its matrix of pairs.
struct GroupPart {
    int64_t begin, end, first = 0, last = 0;
    bool stream = false;  // write the matrix past the caches
    bool is_whole() const { return first == last; }
};

struct ScoringKernels {
    const char* isa;
    // [begin, end) counts sequences; `scratch` has room for a row in accumulation dtype.
    void (*reward)(const RewardArgs&, int64_t begin, int64_t end, std::byte* scratch);
    void (*reward_hidden_gradient)(const RewardGradientArgs&, int64_t begin, int64_t end);
    // [begin, end) counts columns.
    void (*reward_head_gradient)(const RewardGradientArgs&, int64_t begin, int64_t end);
    // All of GroupOp but kBest; `scratch` from group_row_scratch.
    void (*win_part)(const GroupArgs&, const GroupPart&, std::byte* scratch);
    // A large group's gradient of the matrix: the rows of a part into a gradient [size] of its own, which are added up.
    void (*matrix_gradient)(const GroupArgs&, const GroupPart&, std::byte* scratch, double* gradient);
    void (*finish_gradient)(const GroupArgs&, int64_t group, const double* gradient);
    void (*best)(const GroupArgs&, int64_t begin, int64_t end);
    // Adds the pairs [begin, end) to table [categories, bins + 1, kStatistics].
    void (*metrics)(const MetricArgs&, int64_t begin, int64_t end, double* table);
};

constexpr int64_t kStrip = 16;  // rows of a group's matrix that are summed side by side

// Bytes that win_part needs for groups up to this size.
inline size_t group_row_scratch(int64_t size) { return sizeof(double) * 3 * static_cast<size_t>(size + kStrip); }

}  // namespace pyalign::cpu
