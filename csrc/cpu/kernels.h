// The table of kernels that is compiled once per instruction set, and what a kernel is told beside its op's arguments.
#pragma once

#include <cstddef>

#include "common/distill_args.h"
#include "common/logprob_args.h"

namespace pyalign::cpu {

// One entry of a teacher's top-k set, or of the set being extracted.
struct Entry {
    double value;  // log-prob
    int64_t index;
    int64_t place;  // where it stands in the teacher's row
};

// The rows [begin, end) are one thread's; `scratch` is that thread's own.
struct Span {
    int64_t begin, end;
    std::byte* scratch;
    bool stream;  // write the gradient past the caches
};

struct Kernels {
    const char* isa;
    size_t (*distill_scratch)(const DistillArgs&);  // bytes that `distill` wants
    // `denominator` is what the sum is divided by: 1, the count or num_items; row losses go to `row_loss`.
    void (*distill)(const DistillArgs&, double denominator, void* row_loss, Span);
    void (*topk_distill)(const TopKDistillArgs&, double denominator, void* row_loss, Span);
    size_t (*topk_scratch)(const TopKArgs&);
    void (*topk)(const TopKArgs&, Span);
    void (*outside)(const OutsideArgs&, Span);
    void (*scale)(void* x, Dtype, int64_t begin, int64_t end, double factor);
    // out[0 .. count) = a [+ b] [+ out]; a and b of a 16-bit dtype, b may be null.
    void (*widen)(float* out, const void* a, const void* b, Dtype, int64_t count, bool add);
    size_t (*logprob_scratch)(const LogprobArgs&);
    void (*logprob)(const LogprobArgs&, Span);
};

constexpr int64_t kBlock = 512;
constexpr int64_t kCandidatesPerEntry = 4;  // room for candidates while the k largest entries are searched

// Compiled once (entries.cpp), called by the kernels: no instruction set's copy of a standard algorithm may serve
// another's.
bool is_counted(const Tokens& tokens, int64_t row);
// The teacher's entries for this row, by ascending index; -1 where an index is out of range or stands twice.
int64_t sorted_entries(const TopK& teacher, int64_t teacher_row, int64_t vocab, Entry* entries);
// The log of the teacher's mass outside its entries, of which there is none where they are the whole vocabulary.
double residual_of(const TopK& teacher, int64_t teacher_row, int64_t vocab, const Entry* entries, int64_t count);
void sort_by_index(Entry* entries, int64_t count);
void sort_by_value(Entry* entries, int64_t count);  // descending, equals by ascending index

void keep_best(Entry* entries, int64_t count, int64_t k);  // the first k become the k largest, the least of them last

const Kernels& kernels();

// Throws for an index that is out of range.
[[noreturn]] void refuse(const char* name, int64_t row, int64_t value, int64_t limit);
// Whether a gradient is so large that it leaves the caches before anybody reads it; then it gets huge pages, too.
bool begin_stream(const Rows& gradient, const Rows& logits, int64_t elements);

}  // namespace pyalign::cpu
