// The k largest entries of every row, and the log of the mass outside them, in one read of the row.
//
// The fold leaves, beside the row's softmax state, the max and the sum of each group of its entries. A threshold that
// just over k of the maxima reach is found by bisection, and only the groups that reach it are looked at again. The
// mass outside is the sum of the groups that hold none of the k largest, and of the others' entries once more without
// those: nothing is subtracted.
#include "cpu/simd.h"

PYALIGN_BEGIN
namespace {

using cpu::Entry;

// What is known of a row's groups: group g is the entries first(g), first(g) + kGroups, ... of a block.
template <class F>
struct RowGroups {
    int64_t count;    // kGroups for each block
    F *max, *sum;     // [count], sum of e^((x - origin of its block) / T)
    double* origin;   // [count / kGroups]
    int64_t* chosen;  // [count] those that may hold one of the k largest
    F* members;       // [count, kMembers] the entries of those chosen; -inf past the row's end

    static int64_t count_of(int64_t vocab) { return (vocab + kBlock - 1) / kBlock * kGroups; }
    static size_t bytes(int64_t vocab) {
        const size_t count = static_cast<size_t>(count_of(vocab));
        return count * ((2 + kMembers) * sizeof(F) + sizeof(int64_t)) + count / kGroups * sizeof(double);
    }
    static RowGroups in(std::byte* memory, int64_t vocab) {
        const int64_t count = count_of(vocab);
        F* const members = reinterpret_cast<F*>(memory);
        F* const max = members + count * kMembers;
        double* const origin = reinterpret_cast<double*>(max + 2 * count);
        return {count, max, max + count, origin, reinterpret_cast<int64_t*>(origin + count / kGroups), members};
    }
    static int64_t first(int64_t group) { return group / kGroups * kBlock + group % kGroups; }
};

// `next` is the row that is folded after this one.
template <class T, class F>
Softmax<double> fold_groups(const T* x, const T* next, int64_t vocab, double inverse_temperature, RowGroups<F> groups) {
    RowFold<F> fold(inverse_temperature);
    for (int64_t block = 0; block * kBlock < vocab; ++block) {
        const int64_t first = block * kBlock, length = minimum(kBlock, vocab - first);
        const BlockGroups<F> place{lying_ahead(x, next, vocab, first), groups.max + block * kGroups,
                                   groups.sum + block * kGroups};
        if (length == kBlock) {
            fold.add(x + first, kBlock, place);
        } else {
            F padded[kBlock];
            for (int64_t i = 0; i < kBlock; ++i) padded[i] = i < length ? value(x[first + i]) : F(-kInfinity);
            fold.add(padded, kBlock, place);
        }
        groups.origin[block] = fold.origin();
    }
    return fold.finish();
}

template <class F>
int64_t count_reaching(const F* x, int64_t count, F threshold) {
    int reaching = 0;
#pragma omp simd reduction(+ : reaching)
    for (int64_t i = 0; i < count; ++i) reaching += x[i] >= threshold;
    return reaching;
}

// A threshold that at least k of the maxima reach, and so at least k entries do: close to the k-th largest maximum, and
// -inf where there are fewer than k above -inf.
template <class F>
F threshold_of(const F* maxima, int64_t count, int64_t k) {
    constexpr int kSteps = 32;
    F low = std::numeric_limits<F>::max(), high = std::numeric_limits<F>::lowest();
    int finite = 0;
#pragma omp simd reduction(+ : finite) reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < count; ++i) {
        const bool is_finite = maxima[i] > std::numeric_limits<F>::lowest();
        const F floor = is_finite ? maxima[i] : std::numeric_limits<F>::max();
        low = floor < low ? floor : low;
        high = maxima[i] > high ? maxima[i] : high;
        finite += is_finite;
    }
    if (finite < k) return F(-kInfinity);
    for (int step = 0; step < kSteps; ++step) {
        const F middle = low / 2 + high / 2;
        const int64_t reaching = count_reaching(maxima, count, middle);
        (reaching < k ? high : low) = middle;
        if (reaching >= k && reaching <= k + k / 8) break;
    }
    return low;
}

// Calls body(i) for each of x[0 .. count) that reaches the threshold; count is a multiple of kGroups.
template <class F, class Body>
PYALIGN_HD void for_each_reaching(const F* x, int64_t count, F threshold, Body body) {
    constexpr int64_t kWord = 8;
    for (int64_t first = 0; first < count; first += kGroups) {
        alignas(kGroups) uint8_t reaching[kGroups];
#pragma omp simd
        for (int64_t i = 0; i < kGroups; ++i) reaching[i] = x[first + i] >= threshold;
        for (int64_t word = 0; word < kGroups; word += kWord) {
            uint64_t bytes;
            std::memcpy(&bytes, reaching + word, sizeof bytes);
            for (; bytes != 0; bytes &= bytes - 1) body(first + word + __builtin_ctzll(bytes) / 8);
        }
    }
}

// Lists the groups whose max reaches the threshold.
template <class F>
int64_t choose_groups(RowGroups<F> groups, F threshold) {
    int64_t chosen = 0;
    for_each_reaching(groups.max, groups.count, threshold, [&](int64_t g) { groups.chosen[chosen++] = g; });
    return chosen;
}

// Brings a group's entries together.
template <class T, class F>
void gather(const T* x, int64_t vocab, int64_t group, F* members) {
    const int64_t first = RowGroups<F>::first(group);
    const int64_t there = minimum(kMembers, (vocab - first + kGroups - 1) / kGroups);
    for (int64_t j = 0; j < there; ++j) members[j] = value(x[first + j * kGroups]);
    for (int64_t j = there; j < kMembers; ++j) members[j] = F(-kInfinity);
}

// The entries that may be among the k largest. When the room for four times as many is used up, only the k largest
// stay, and the least of them becomes the threshold.
template <class F>
class Candidates {
  public:
    Candidates(Entry* entries, int64_t k, F threshold) : entries_(entries), k_(k), threshold_(threshold) {}

    PYALIGN_HD void add(F value, int64_t index) {
        if (!(value >= threshold_)) return;
        if (value == threshold_ && index > last_) return;  // of equals the earlier ones are larger
        entries_[count_++] = {double(value), index, 0};
        if (count_ == cpu::kCandidatesPerEntry * k_) keep_best();
    }
    Entry keep_best() {
        cpu::keep_best(entries_, count_, k_);
        count_ = k_;
        threshold_ = F(entries_[k_ - 1].value);
        last_ = entries_[k_ - 1].index;
        return entries_[k_ - 1];
    }

  private:
    Entry* entries_;
    int64_t k_, count_ = 0;
    F threshold_;
    int64_t last_ = std::numeric_limits<int64_t>::max();
};

// Whether an entry comes after the least of the k largest.
template <class F>
PYALIGN_HD bool is_outside(F x, int64_t index, F least, int64_t least_index) {
    return x < least || (x == least && index > least_index);
}

// The same mass from the row itself, over its own max: where all of it is too far below the row's max.
template <class T, class F>
Softmax<double> fold_outside(const T* x, int64_t vocab, F least, int64_t least_index, double inverse_temperature) {
    Softmax<double> state;
    F max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < vocab; ++i) {
        const F logit = value(x[i]);
        max = is_outside(logit, i, least, least_index) && logit > max ? logit : max;
    }
    const ScaledExp<F> exp(inverse_temperature);
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const int64_t end = minimum(first + kBlock, vocab);
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < end; ++i) {
            const F logit = value(x[i]);
            const F term = exp(logit - max);
            sum += is_outside(logit, i, least, least_index) ? term : F(0);
        }
        state.sum += double(sum);
    }
    state.max = double(max);
    return state;
}

// The state of all entries but the k largest, the last of which is `last`.
template <class T, class F>
Softmax<double> outside(const T* x, int64_t vocab, Softmax<double> all, Entry last, RowGroups<F> groups, int64_t chosen,
                        double inverse_temperature) {
    constexpr double kTooSmall = 1e-20;  // entries of e^-87 and less count as 0: now they are not seen
    const F least = F(last.value);

    // Groups that hold none of them
    double sum = 0, scale = 1, origin = all.max;
    for (int64_t first = 0; first < groups.count; first += kGroups) {
        if (groups.origin[first / kGroups] != origin) {
            origin = groups.origin[first / kGroups];
            scale = rescale(origin, all.max, inverse_temperature);
        }
        F below = 0;
#pragma omp simd reduction(+ : below)
        for (int64_t g = first; g < first + kGroups; ++g) below += groups.max[g] < least ? groups.sum[g] : F(0);
        sum += double(below) * scale;
    }

    // The others, member by member
    const ScaledExp<F> exp(inverse_temperature);
    const F max = F(all.max);
    for (int64_t i = 0; i < chosen; ++i) {
        if (groups.max[groups.chosen[i]] < least) continue;
        const int64_t first = RowGroups<F>::first(groups.chosen[i]);
        const F* const members = groups.members + i * kMembers;
        F group_sum = 0;
#pragma omp simd reduction(+ : group_sum)
        for (int64_t j = 0; j < kMembers; ++j) {
            const F term = exp(members[j] - max);
            group_sum += is_outside(members[j], first + j * kGroups, least, last.index) ? term : F(0);
        }
        sum += double(group_sum);
    }
    return sum > kTooSmall ? Softmax<double>{all.max, sum}
                           : fold_outside(x, vocab, least, last.index, inverse_temperature);
}

template <class T>
void topk_rows(const TopKArgs& args, cpu::Span span) {
    using F = ValueOf<T>;
    const double inverse_temperature = 1 / args.temperature;
    Entry* const entries = reinterpret_cast<Entry*>(span.scratch);
    const RowGroups<F> groups =
        RowGroups<F>::in(reinterpret_cast<std::byte*>(entries + cpu::kCandidatesPerEntry * args.k), args.vocab);

    for (int64_t row = span.begin; row < span.end; ++row) {
        const T* const logits = reinterpret_cast<const T*>(row_of(args.logits, row));
        const T* const next = reinterpret_cast<const T*>(row_of(args.logits, row + 1 < span.end ? row + 1 : row));
        const Softmax<double> all = fold_groups(logits, next, args.vocab, inverse_temperature, groups);
        if (!(all.sum > 0) || all.sum == kInfinity) {  // NaN, +inf, or -inf alone
            for (int64_t i = 0; i < args.k; ++i) {
                put<F>(args.logprobs, row * args.k + i, kNaN);
                args.indices[row * args.k + i] = i;
            }
            put<F>(args.residual, row, kNaN);
            continue;
        }

        // The k largest
        const F threshold = threshold_of(groups.max, groups.count, args.k);
        const int64_t chosen = choose_groups(groups, threshold);
        Candidates<F> best(entries, args.k, threshold);
        for (int64_t i = 0; i < chosen; ++i) {
            const int64_t first = RowGroups<F>::first(groups.chosen[i]);
            F* const members = groups.members + i * kMembers;
            gather(logits, args.vocab, groups.chosen[i], members);
            for_each_reaching(members, kMembers, threshold, [&](int64_t j) {
                const int64_t index = first + j * kGroups;
                if (index < args.vocab) best.add(members[j], index);
            });
        }
        const Entry last = best.keep_best();
        const Softmax<double> rest = outside(logits, args.vocab, all, last, groups, chosen, inverse_temperature);
        cpu::sort_by_value(entries, args.k);

        const double log_all = log_positive(all.sum);
        for (int64_t i = 0; i < args.k; ++i) {
            const double logprob = (entries[i].value - all.max) * inverse_temperature - log_all;
            put<F>(args.logprobs, row * args.k + i, logprob);
            args.indices[row * args.k + i] = entries[i].index;
        }
        put<F>(args.residual, row, (rest.max - all.max) * inverse_temperature + log_positive(rest.sum) - log_all);
    }
}

}  // namespace

void topk(const TopKArgs& args, cpu::Span span) {
    switch (args.logits.dtype) {
        case Dtype::kFloat32: return topk_rows<float>(args, span);
        case Dtype::kBFloat16: return topk_rows<BFloat16>(args, span);
        case Dtype::kFloat16: return topk_rows<Float16>(args, span);
        case Dtype::kFloat64: return topk_rows<double>(args, span);
    }
}

size_t topk_scratch(const TopKArgs& args) {
    const size_t entries = sizeof(Entry) * static_cast<size_t>(cpu::kCandidatesPerEntry * args.k);
    return entries + (args.logits.dtype == Dtype::kFloat64 ? RowGroups<double>::bytes(args.vocab)
                                                           : RowGroups<float>::bytes(args.vocab));
}

PYALIGN_END
