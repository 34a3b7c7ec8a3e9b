// The arguments of the log-prob engines: one struct, filled by bindings.cpp, read by the CPU and CUDA engines.
#pragma once

#include "common/distill_args.h"

namespace pyalign {

struct LogprobOptions {
    int64_t vocab = 0;
    double temperature = 1.0;
    double softcap = 0.0;  // 0: none
    double label_smoothing = 0.0, z_loss = 0.0;
    int64_t whole_vocab = 0;  // the entries of all slices, where rows are split
};

// Rows of logits with one target each: what is asked for of their log-prob, entropy and state, or their loss (row_loss
// is not null), and a gradient with respect to the logits. Null pointers mean "not given" or "not wanted"; numbers are
// in accumulation dtype (float; double for float64 logits). A row whose target is ignore_index isn't read: it gets
// zeros. A target of kElsewhere (of a row that is split, see Split) stands for entry 0 where a log-prob is asked for,
// and has no share in the gradient.
struct LogprobArgs {
    Rows logits;    // [count, vocab]
    Rows gradient;  // [count, vocab] any dtype; may be the logits themselves
    int64_t count = 0;
    const int64_t* targets = nullptr;  // [count]
    int64_t ignore_index = -100;
    const void* given_state = nullptr;       // [count, 3] an earlier call's `state`: the row isn't folded again
    const void* upstream_logprob = nullptr;  // [count] d result / d log-prob
    const void* upstream_entropy = nullptr;  // [count]
    const void* factor = nullptr;            // [1] d result / d row_loss, of all rows; null means 1
    LogprobOptions options;

    void* logprob = nullptr;   // [count]
    void* entropy = nullptr;   // [count]
    void* state = nullptr;     // [count, 3] max, sum, entropy (NaN unless the entropy is wanted)
    void* row_loss = nullptr;  // [count]
    void* above = nullptr;     // [count] sum (z - z_target)
};

}  // namespace pyalign
