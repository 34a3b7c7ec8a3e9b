// What the kernels call for each row and need no vector instructions for.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/distill.h"
#include "common/half.h"
#include "cpu/kernels.h"

namespace pyalign::cpu {

bool is_counted(const Tokens& tokens, int64_t row) {
    if (tokens.mask && !tokens.mask[row]) return false;
    if (tokens.labels && tokens.labels[row] == tokens.ignore_index) return false;
    return !tokens.teacher_rows || tokens.teacher_rows[row] >= 0;
}

namespace {

double value_at(const void* data, Dtype dtype, int64_t at) {
    switch (dtype) {
        case Dtype::kFloat32: return static_cast<const float*>(data)[at];
        case Dtype::kBFloat16: return bfloat16_to_float(static_cast<const uint16_t*>(data)[at]);
        case Dtype::kFloat16: return float16_to_float(static_cast<const uint16_t*>(data)[at]);
        case Dtype::kFloat64: return static_cast<const double*>(data)[at];
    }
    return NAN;
}

}  // namespace

int64_t sorted_entries(const TopK& teacher, int64_t teacher_row, int64_t vocab, Entry* entries) {
    const int64_t first = teacher_row * teacher.k;
    int64_t count = 0;
    for (int64_t place = 0; place < teacher.k; ++place) {
        const int64_t index = teacher.index(first + place);
        if (index == -1) continue;
        if (index < 0 || index >= vocab) return -1;
        entries[count++] = {value_at(teacher.logprobs, teacher.dtype, first + place), index, place};
    }
    sort_by_index(entries, count);
    for (int64_t i = 1; i < count; ++i)
        if (entries[i].index == entries[i - 1].index) return -1;
    return count;
}

double residual_of(const TopK& teacher, int64_t teacher_row, int64_t vocab, const Entry* entries, int64_t count) {
    if (teacher.residual) return value_at(teacher.residual, teacher.residual_dtype, teacher_row);
    if (count == vocab) return -INFINITY;
    Softmax<double> state;
    for (int64_t i = 0; i < count; ++i) state = fold(state, entries[i].value, 1.0);
    const double log_sum = state.max + std::log(state.sum);
    return log_sum < 0 ? log1mexp(log_sum) : log_sum != log_sum ? log_sum : -INFINITY;
}

void sort_by_index(Entry* entries, int64_t count) {
    std::sort(entries, entries + count, [](const Entry& a, const Entry& b) { return a.index < b.index; });
}

namespace {

// Descending, equals by ascending index.
constexpr auto before = [](const Entry& a, const Entry& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
};

}  // namespace

void sort_by_value(Entry* entries, int64_t count) { std::sort(entries, entries + count, before); }

void keep_best(Entry* entries, int64_t count, int64_t k) {
    if (count > k)
        std::nth_element(entries, entries + (k - 1), entries + count, before);
    else
        std::iter_swap(entries + (k - 1), std::max_element(entries, entries + k, before));
}

}  // namespace pyalign::cpu
