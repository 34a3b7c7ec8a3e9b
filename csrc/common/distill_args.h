// The arguments of the distillation engines: one struct per op, filled by bindings.cpp, read by the CPU and CUDA
// engines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/platform.h"

namespace pyalign {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
PYALIGN_HD size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

enum class Divergence : int { kForwardKL = 0, kReverseKL = 1, kJensenShannon = 2, kTotalVariation = 3 };
enum class Tail : int { kBucket = 0, kRenormalize = 1, kDrop = 2 };
enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// Rows may be split: every rank holds a slice of the vocabulary, and what is merged passes between two calls.
//   kWhole  fold, sum and map, of whole rows
//   kFold   writes this slice's states, and as losses the divergence of the two conditional distributions over it
//   kSum    reads the merged states, writes this slice's sums
//   kMap    reads the merged states and sums, writes the gradient of this slice
enum class Stage : int { kWhole = 0, kFold = 1, kSum = 2, kMap = 3 };

// A target in another rank's slice: the row counts, and none of its entries here is the target.
constexpr int64_t kElsewhere = INT64_MIN;

struct Split {
    Stage stage = Stage::kWhole;
    double* states = nullptr;  // [count, 5] the student's max and sum, the teacher's, the student's sum at T = 1
    double* sums = nullptr;    // [count, 2] loss and aux
};

// Rows of a matrix behind two leading strides (in elements; the last stride is 1):
// row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Rows {
    void* data = nullptr;
    Dtype dtype = Dtype::kFloat32;
    int64_t inner = 1, outer_stride = 0, inner_stride = 0;

    PYALIGN_HD int64_t start(int64_t row) const {
        const int64_t outer = row < inner ? 0 : row / inner;  // most matrices have no outer rows: no division
        return outer * outer_stride + (row - outer * inner) * inner_stride;
    }
};

// Which tokens count, what they weigh, and what the sum over them is divided by. Null pointers mean "not given".
// A token counts where mask AND labels != ignore_index AND teacher_rows >= 0.
struct Tokens {
    int64_t count = 0;
    const uint8_t* mask = nullptr;          // [count]
    const int64_t* labels = nullptr;        // [count]
    const int64_t* teacher_rows = nullptr;  // [count], the teacher row of each token; without it, its own number
    const void* weight = nullptr;           // [count], accumulation dtype (float; double for float64 logits)
    const int64_t* targets = nullptr;       // [count], for hard_weight > 0; ignore_index means no hard term
    int64_t ignore_index = -100;
    int64_t teacher_count = 0;  // rows that the teacher has
    Reduction reduction = Reduction::kMean;
    const void* num_items = nullptr;  // [1] accumulation dtype, replaces the count as the denominator of kMean
    const void* upstream = nullptr;   // gradient of the result: [1], or [count] for kNone; null means 1
};

// Outputs are in accumulation dtype, except for the gradient, and are skipped where null. Uncounted tokens get 0.
struct Outputs {
    Rows gradient;                // [count, width]; may be the student itself, or 16 bits for float32 logits
    int64_t width = 0;            // columns of a gradient row; those past the vocabulary are set to zero
    void* loss = nullptr;         // [1], or [count] for kNone
    void* row_loss = nullptr;     // [count] workspace for kSum and kMean
    void* denominator = nullptr;  // [1] workspace: what kMean divides by
    void* entropy = nullptr;      // [count] entropy of the student's softmax(logits / T)
    uint8_t* agreement =
        nullptr;  // [count] whether student and teacher have the same most likely entry (first of equals)
};

struct DistillOptions {
    int64_t vocab = 0;
    Divergence divergence = Divergence::kForwardKL;
    double beta = 0.5;
    double temperature = 1.0;
    bool temperature_squared = false;  // the divergence times T^2; the hard term is at temperature 1 and stays
    double hard_weight = 0.0;
};

// How a GPU holds a row, or a row pair. The engine has a rule; what was measured on a GPU may know better.
struct Layout {
    static constexpr int kByRule = 0, kOneBlock = -1;  // instead of a cluster: one block, whatever the row's length

    int cluster = kByRule;  // blocks that hold a row together
    int stages = 0;         // rows that they have room for
};

// (1 - hard_weight) * divergence + hard_weight * cross-entropy, per token.
struct DistillArgs {
    Rows student, teacher;
    Tokens tokens;
    Outputs out;
    DistillOptions options;
    Split split;
    Layout layout;  // on a GPU
};

// The teacher as k (log-prob, index) entries per row and the log of the remaining mass. An index of -1 is no entry.
struct TopK {
    int64_t k = 0;
    const void* logprobs = nullptr;  // [teacher_count, k], dtype
    const void* indices = nullptr;   // [teacher_count, k], int32 or int64
    const void* residual = nullptr;  // [teacher_count], residual_dtype; null: log(1 - sum of the entries)
    Dtype dtype = Dtype::kFloat32, residual_dtype = Dtype::kFloat32;
    bool wide_indices = true;  // int64

    PYALIGN_HD int64_t index(int64_t at) const {
        return wide_indices ? static_cast<const int64_t*>(indices)[at] : static_cast<const int32_t*>(indices)[at];
    }
};

struct TopKDistillArgs {
    Rows student;
    TopK teacher;
    Tail tail = Tail::kBucket;
    Tokens tokens;
    Outputs out;
    DistillOptions options;
    Layout layout;  // on a GPU
};

// The k largest logits of every row as log-probs of softmax(logits / T), largest first, equals by lowest index, and
// the log of the mass outside them by log-sum-exp over it.
struct TopKArgs {
    Rows logits;
    int64_t count = 0, vocab = 0, k = 0;
    double temperature = 1.0;
    void* logprobs = nullptr;    // [count, k] accumulation dtype
    int64_t* indices = nullptr;  // [count, k]
    void* residual = nullptr;    // [count] accumulation dtype
};

// Rows of logits without a set of entries each: their softmax state (`states` is not null), or a gradient
//   a e^((x - m) / T) + b e^(x - n),  at the set's entries what `values` says.
struct OutsideArgs {
    Rows logits;
    int64_t count = 0, vocab = 0, k = 0;
    const uint8_t* mask = nullptr;     // [count], null: all rows count; others are not read
    const int64_t* indices = nullptr;  // [count, k] ascending in each row; entries outside [0, vocab) are none
    double temperature = 1.0;
    double* states = nullptr;  // [count, 3] max and sum over the entries outside, and their sum at T = 1

    const double* exponentials = nullptr;  // [count, 4] a, m, b, n
    const double* values = nullptr;        // [count, k]
    Rows gradient;                         // [count, width]; may be the logits themselves
    int64_t width = 0;
};

}  // namespace pyalign
