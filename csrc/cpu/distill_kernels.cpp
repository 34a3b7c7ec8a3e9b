// Distillation losses on the CPU, one row of logits at a time. A row is read from memory once, by the fold; the sums and
// the map find it in the cache.
#include "cpu/simd.h"

PYALIGN_BEGIN
namespace {

using cpu::Entry;
using cpu::Kernels;
using cpu::Span;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- What every loss does for a row: its weight, its hard term, its metrics ----

template <class F>
double at(const void* data, int64_t index) {
    return static_cast<double>(static_cast<const F*>(data)[index]);
}

template <class F>
void put(void* data, int64_t index, double value) {
    static_cast<F*>(data)[index] = F(value);
}

// d result / d loss of the row.
template <class F>
double row_factor(const Tokens& tokens, int64_t row, double denominator) {
    double factor = denominator == 0 ? 0 : 1 / denominator;
    if (tokens.weight) factor *= at<F>(tokens.weight, row);
    if (tokens.upstream) factor *= at<F>(tokens.upstream, tokens.reduction == Reduction::kNone ? row : 0);
    return factor;
}

template <class F>
void write_uncounted(const Outputs& out, void* row_loss, int64_t row) {
    if (row_loss) put<F>(row_loss, row, 0);
    if (out.entropy) put<F>(out.entropy, row, 0);
    if (out.agreement) out.agreement[row] = 0;
    if (out.gradient.data) std::memset(row_of(out.gradient, row), 0, out.width * size_of(out.gradient.dtype));
}

// h * cross-entropy(student at temperature 1, target) and its gradient h * (softmax - 1[target]).
template <class F>
struct HardTerm {
    double loss = 0, weight = 0;
    int64_t target = -1;
    F max = 0, scale = 0;
    ScaledExp<F> exp{1.0};

    HardTerm(const Tokens& tokens, const DistillOptions& options, int64_t row, const F* student, Softmax<double> folded) {
        if (options.hard_weight == 0 || tokens.targets[row] == tokens.ignore_index) return;
        weight = options.hard_weight;
        target = tokens.targets[row];
        Softmax<double> state = folded;
        if (options.temperature != 1) {
            state.sum = 0;
            for (int64_t i = 0; i < options.vocab; i += kBlock)
                state.sum += sum_exp<F>(student + i, minimum(kBlock, options.vocab - i), F(state.max), exp);
        }
        max = F(state.max);
        scale = F(1 / state.sum);
        loss = weight * ((state.max - double(student[target])) + log_positive(state.sum));
    }

    // Adds factor * (softmax - 1[target]) to the gradients of the entries [first, first + count).
    void add(F* gradient, const F* student, int64_t first, int64_t count, double factor) const {
        if (target < 0) return;
        const F f = F(factor * weight), m = max, f_scaled = F(factor * weight) * scale;
        const ScaledExp<F> e = exp;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) gradient[i] += f_scaled * e(student[first + i] - m);
        if (target >= first && target < first + count) gradient[target - first] -= f;
    }
};

// Entropy of softmax(x / T) in nats: -sum q log q.
template <class F>
double entropy(const F* x, int64_t vocab, Softmax<double> state, double inverse) {
    const F max = F(state.max), scale = F(1 / state.sum), log_sum = F(log_positive(state.sum));
    const F inverse_temperature = F(inverse);
    const ScaledExp<F> exp(inverse);
    double total = 0;
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const int64_t count = minimum(kBlock, vocab - first);
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) {
            const F log_q = (x[first + i] - max) * inverse_temperature - log_sum;
            sum += weigh(exp(x[first + i] - max) * scale, -log_q);
        }
        total += sum;
    }
    return total;
}

template <class F>
int64_t first_equal(const F* x, int64_t vocab, F value) {
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const int64_t count = minimum(kBlock, vocab - first);
        int found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = 0; i < count; ++i) found |= x[first + i] == value;
        if (!found) continue;
        for (int64_t i = 0; i < count; ++i)
            if (x[first + i] == value) return first + i;
    }
    return -1;
}

// ---- Dense: a divergence between two rows ----

// A row that has been read from memory once and folded: its logits in F, its state, and the exponentials of each block
// over that block's origin, e^((x - origin) / T).
template <class F>
class FoldedRow {
public:
    Softmax<double> state;

    FoldedRow(F* scratch, int64_t vocab, ScaledExp<F> exp, double inverse_temperature)
        : buffer_(scratch), kept_(scratch + vocab), origins_(scratch + 2 * vocab), vocab_(vocab), exp_(exp),
          inverse_temperature_(inverse_temperature) {}

    void fold(const std::byte* row, Dtype dtype) {
        logits_ = load(row, dtype, 0, 0, buffer_);
        Softmax<double> sums;  // at a logit near the max: a larger one moves it only where e^x might overflow
        F max = std::numeric_limits<F>::lowest();
        const double reach = 40 / inverse_temperature_;
        for (int64_t first = 0, block = 0; first < vocab_; first += kBlock, ++block) {
            const int64_t count = minimum(kBlock, vocab_ - first);
            prefetch(row, dtype, first + kBlock, vocab_);
            const F* x = load(row, dtype, first, count, buffer_ + first);
            if (block == 0) sums.max = max_of(x, count);
            BlockSum<F> folded = sum_exp(x, count, F(sums.max), exp_, kept_ + first);
            if (double(folded.max) > sums.max + reach) {
                sums = raise_max(sums, folded.max, inverse_temperature_);
                folded = sum_exp(x, count, F(sums.max), exp_, kept_ + first);
            }
            max = folded.max > max ? folded.max : max;
            origins_[block] = F(sums.max);
            sums.sum += folded.sum;
        }
        state = raise_max(sums, max, inverse_temperature_);
    }

    const F* logits() const { return logits_; }
    const F* exponentials() const { return kept_; }

    // The probabilities of a block are its exponentials times this.
    F scale(int64_t block) const {
        const double scale = 1 / state.sum;
        const double origin = origins_[block];
        return F(origin == state.max ? scale : scale * rescale(origin, state.max, inverse_temperature_));
    }

    static size_t scratch(int64_t vocab) { return static_cast<size_t>(2 * vocab + vocab / kBlock + 1); }

private:
    F *buffer_, *kept_, *origins_;
    const F* logits_ = nullptr;
    int64_t vocab_;
    ScaledExp<F> exp_;
    double inverse_temperature_;
};

// One block of both rows, and what maps it to Points.
template <class F>
struct PairBlock {
    Pair<F> pair;
    const F *student, *teacher, *student_exp, *teacher_exp;
    F student_scale, teacher_scale;
    int64_t count;

    PairBlock(const Pair<F>& pair, const FoldedRow<F>& s, const FoldedRow<F>& t, int64_t block, int64_t vocab)
        : pair(pair), student(s.logits() + block * kBlock), teacher(t.logits() + block * kBlock),
          student_exp(s.exponentials() + block * kBlock), teacher_exp(t.exponentials() + block * kBlock),
          student_scale(s.scale(block)), teacher_scale(t.scale(block)), count(minimum(kBlock, vocab - block * kBlock)) {}
};

// The bodies of the loops below. They stand outside: a struct that lives inside a simd loop goes to memory, lane by lane.
template <class F, class D>
PYALIGN_HD F term_at(D divergence, Pair<F> pair, F p, F q, F s, F t, F* aux) {
    const Sums<F> term = divergence.term(pair.with(p, q, s, t));
    *aux = term.aux;
    return term.loss;
}

template <class F, class D>
PYALIGN_HD F slope_at(D divergence, Pair<F> pair, Sums<F> row, F p, F q, F s, F t) {
    return divergence.slope(pair.with(p, q, s, t), row);
}

template <class F, class D>
PYALIGN_HD F term_and_slope_at(D divergence, Pair<F> pair, F p, F q, F s, F t, F factor, F* gradient) {
    const Point<F> x = pair.with(p, q, s, t);
    *gradient = factor * divergence.slope(x, Sums<F>{});
    return divergence.term(x).loss;
}

template <class F, class D>
Sums<double> sum_block(D divergence, PairBlock<F> b) {
    alignas(64) F aux[kBlock];
    F loss = 0, aux_sum = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < b.count; ++i)
        loss += term_at(divergence, b.pair, b.teacher_exp[i] * b.teacher_scale, b.student_exp[i] * b.student_scale,
                        b.student[i], b.teacher[i], aux + i);
#pragma omp simd reduction(+ : aux_sum)
    for (int64_t i = 0; i < b.count; ++i) aux_sum += aux[i];
    return {double(loss), double(aux_sum)};
}

template <class F, class D>
void map_block(D divergence, PairBlock<F> b, Sums<F> row, F factor, F* gradient) {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i)
        gradient[i] = factor * slope_at(divergence, b.pair, row, b.teacher_exp[i] * b.teacher_scale,
                                        b.student_exp[i] * b.student_scale, b.student[i], b.teacher[i]);
}

template <class F, class D>
double sum_and_map_block(D divergence, PairBlock<F> b, F factor, F* gradient) {
    F loss = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < b.count; ++i)
        loss += term_and_slope_at(divergence, b.pair, b.teacher_exp[i] * b.teacher_scale,
                                  b.student_exp[i] * b.student_scale, b.student[i], b.teacher[i], factor, gradient + i);
    return double(loss);
}

template <class F, class D>
void distill_rows(const DistillArgs& args, D divergence, double denominator, void* row_loss, Span span) {
    const DistillOptions& options = args.options;
    const Outputs& out = args.out;
    const int64_t vocab = options.vocab, blocks = (vocab + kBlock - 1) / kBlock;
    const double inverse_temperature = 1 / options.temperature;
    const double soft_weight = (1 - options.hard_weight) *
                               (options.temperature_squared ? options.temperature * options.temperature : 1);
    const ScaledExp<F> exp(inverse_temperature);
    F* const scratch = reinterpret_cast<F*>(span.scratch);
    FoldedRow<F> student(scratch, vocab, exp, inverse_temperature);
    FoldedRow<F> teacher(scratch + FoldedRow<F>::scratch(vocab), vocab, exp, inverse_temperature);

    for (int64_t row = span.begin; row < span.end; ++row) {
        if (!cpu::is_counted(args.tokens, row)) {
            write_uncounted<F>(out, row_loss, row);
            continue;
        }

        // Fold
        student.fold(row_of(args.student, row), args.student.dtype);
        teacher.fold(row_of(args.teacher, args.tokens.teacher_rows ? args.tokens.teacher_rows[row] : row),
                     args.teacher.dtype);
        const Pair<F> pair = finish<F>(student.state, teacher.state, inverse_temperature);
        const HardTerm<F> hard(args.tokens, options, row, student.logits(), student.state);
        if (out.entropy) put<F>(out.entropy, row, entropy(student.logits(), vocab, student.state, inverse_temperature));
        if (out.agreement)
            out.agreement[row] = first_equal(student.logits(), vocab, F(student.state.max)) ==
                                 first_equal(teacher.logits(), vocab, F(teacher.state.max));

        // Sum, unless the map does it in passing
        const bool map = out.gradient.data != nullptr;
        Sums<double> sums;
        if (D::kMapNeedsSums || !map)
            for (int64_t block = 0; block < blocks; ++block)
                sums = sums + sum_block(divergence, PairBlock<F>(pair, student, teacher, block, vocab));

        // Map
        if (map) {
            const double factor = row_factor<F>(args.tokens, row, denominator);
            const F slope_factor = F(factor * soft_weight * inverse_temperature);
            RowWriter<F> writer(row_of(out.gradient, row), out.gradient.dtype, span.stream);
            for (int64_t block = 0; block < blocks; ++block) {
                const PairBlock<F> b(pair, student, teacher, block, vocab);
                F* const gradient = writer.block();
                if (D::kMapNeedsSums || !row_loss)
                    map_block(divergence, b, Sums<F>{F(sums.loss), F(sums.aux)}, slope_factor, gradient);
                else
                    sums.loss += sum_and_map_block(divergence, b, slope_factor, gradient);
                hard.add(gradient, student.logits(), block * kBlock, b.count, factor);
                writer.write(b.count);
            }
            writer.finish(vocab, out.width);
        }

        if (row_loss) {
            const double weight = args.tokens.weight ? at<F>(args.tokens.weight, row) : 1;
            const double soft = soft_weight == 0 ? 0 : soft_weight * sums.loss;
            put<F>(row_loss, row, weight * (soft + hard.loss));
        }
    }
    if (span.stream) finish_streams();
}

template <class F>
void distill_dispatch(const DistillArgs& args, double denominator, void* row_loss, Span span) {
    switch (args.options.divergence) {
        case Divergence::kForwardKL: return distill_rows<F>(args, ForwardKL<F>{}, denominator, row_loss, span);
        case Divergence::kReverseKL: return distill_rows<F>(args, ReverseKL<F>{}, denominator, row_loss, span);
        case Divergence::kJensenShannon:
            return distill_rows<F>(args, JensenShannon<F>{F(args.options.beta)}, denominator, row_loss, span);
        case Divergence::kTotalVariation:
            return distill_rows<F>(args, TotalVariation<F>{}, denominator, row_loss, span);
    }
}

void distill(const DistillArgs& args, double denominator, void* row_loss, Span span) {
    if (args.student.dtype == Dtype::kFloat64)
        distill_dispatch<double>(args, denominator, row_loss, span);
    else
        distill_dispatch<float>(args, denominator, row_loss, span);
}

// ---- Top-k: the teacher's entries are categories, and with a bucket all the rest is one more ----

// The row in F, and the state of all entries that are not in the set; the set's logits go to `members`.
template <class F>
const F* fold_rest(const std::byte* row, Dtype dtype, int64_t vocab, double inverse_temperature, F* buffer,
                   const Entry* entries, int64_t count, double* members, Softmax<double>& rest) {
    const F* start = load(row, dtype, 0, 0, buffer);
    const ScaledExp<F> exp(inverse_temperature);
    alignas(64) F patched[kBlock];
    int64_t entry = 0;
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const int64_t length = minimum(kBlock, vocab - first);
        prefetch(row, dtype, first + kBlock, vocab);
        const F* block = load(row, dtype, first, length, buffer + first);
        if (entry < count && entries[entry].index < first + length) {
            std::memcpy(patched, block, length * sizeof(F));
            for (; entry < count && entries[entry].index < first + length; ++entry) {
                members[entry] = double(block[entries[entry].index - first]);
                patched[entries[entry].index - first] = F(-kInfinity);
            }
            block = patched;
        }
        rest = raise_max(rest, max_of(block, length), inverse_temperature);
        rest.sum += sum_exp(block, length, F(rest.max), exp);
    }
    return start;
}

double log_sum(Softmax<double> state, double inverse_temperature) {
    return state.max * inverse_temperature + log_positive(state.sum);
}

// What the categories of one row come to: the loss, the slopes of the set's entries (over the entries' values), and for
// an entry outside the slope outside_scale * exp((s - outside_max) / T).
struct Categories {
    double loss = 0, outside_scale = 0, outside_max = 0;
};

template <class D>
Categories categorize(const D& divergence, Tail tail, const TopK& teacher, int64_t teacher_row, Entry* entries,
                      int64_t count, const double* members, Softmax<double> rest, double inverse_temperature) {
    Softmax<double> student;  // of the categories
    for (int64_t i = 0; i < count; ++i) student = fold(student, members[i], inverse_temperature);
    if (tail != Tail::kRenormalize) student = merge(student, rest, inverse_temperature);
    const double log_student = log_positive(student.sum);

    const double residual =
        tail == Tail::kBucket ? cpu::residual_of(teacher, teacher_row, entries, count) : -kInfinity;
    double log_teacher = 0;
    if (tail != Tail::kDrop) {
        // Stored log-probs are rounded: the categories are normalised again, or their KL could be negative.
        Softmax<double> masses;
        for (int64_t i = 0; i < count; ++i) masses = fold(masses, entries[i].value, 1.0);
        if (tail == Tail::kBucket) masses = fold(masses, residual, 1.0);
        log_teacher = log_sum(masses, 1.0);
    }
    // Logits relative to the student's max: the level of the logits must not cost digits.
    const auto category = [&](double log_p, double logit, double log_mass) {
        const double log_q = (logit - student.max) * inverse_temperature + log_mass - log_student;
        return Point<double>{exp_nonpositive(log_p - log_teacher), exp_nonpositive(log_q), log_q - (log_p - log_teacher)};
    };
    const Point<double> outside =
        rest.sum == 0 ? Point<double>{exp_nonpositive(residual - log_teacher), 0.0, -kInfinity}
                      : category(residual, rest.max, log_positive(rest.sum));

    Categories row;
    Sums<double> sums;
    double flow = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Point<double> x = category(entries[i].value, members[i], 0);
        if (tail == Tail::kDrop) {
            row.loss += divergence.plain(x);
            flow += divergence.flow(x);
        } else {
            sums = sums + divergence.term(x);
        }
    }
    if (tail == Tail::kBucket) sums = sums + divergence.term(outside);
    if (tail != Tail::kDrop) row.loss = sums.loss;
    for (int64_t i = 0; i < count; ++i) {
        const Point<double> x = category(entries[i].value, members[i], 0);
        entries[i].value = tail == Tail::kDrop ? divergence.flow(x) - x.q * flow : divergence.slope(x, sums);
    }
    if (tail == Tail::kBucket && rest.sum != 0) {
        row.outside_scale = divergence.slope(outside, sums) / rest.sum;
        row.outside_max = rest.max;
    } else if (tail == Tail::kDrop) {
        row.outside_scale = -flow / student.sum;
        row.outside_max = student.max;
    }
    return row;
}

Categories categorize(const TopKDistillArgs& args, int64_t teacher_row, Entry* entries, int64_t count,
                      const double* members, Softmax<double> rest) {
    const auto run = [&](const auto& divergence) {
        return categorize(divergence, args.tail, args.teacher, teacher_row, entries, count, members, rest,
                          1 / args.options.temperature);
    };
    switch (args.options.divergence) {
        case Divergence::kReverseKL: return run(ReverseKL<double>{});
        case Divergence::kJensenShannon: return run(JensenShannon<double>{args.options.beta});
        case Divergence::kTotalVariation: return run(TotalVariation<double>{});
        default: return run(ForwardKL<double>{});
    }
}

int64_t most_likely(const Entry* entries, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
        if (best < 0 || entries[i].value > entries[best].value ||
            (entries[i].value == entries[best].value && entries[i].place < entries[best].place))
            best = i;
    return best < 0 ? -1 : entries[best].index;
}

template <class F>
void topk_distill_rows(const TopKDistillArgs& args, double denominator, void* row_loss, Span span) {
    const DistillOptions& options = args.options;
    const Outputs& out = args.out;
    const int64_t vocab = options.vocab;
    const double inverse_temperature = 1 / options.temperature;
    const ScaledExp<F> exp(inverse_temperature);
    const double soft_weight = (1 - options.hard_weight) *
                               (options.temperature_squared ? options.temperature * options.temperature : 1);
    Entry* const entries = reinterpret_cast<Entry*>(span.scratch);
    double* const members = reinterpret_cast<double*>(entries + args.teacher.k);
    F* const buffer = reinterpret_cast<F*>(members + args.teacher.k);

    for (int64_t row = span.begin; row < span.end; ++row) {
        if (!cpu::is_counted(args.tokens, row)) {
            write_uncounted<F>(out, row_loss, row);
            continue;
        }

        // Fold
        const int64_t teacher_row = args.tokens.teacher_rows ? args.tokens.teacher_rows[row] : row;
        const int64_t count = cpu::sorted_entries(args.teacher, teacher_row, vocab, entries);
        if (count < 0) {  // the caller raises
            if (row_loss) put<F>(row_loss, row, kNaN);
            continue;
        }
        Softmax<double> rest;
        const F* student = fold_rest(row_of(args.student, row), args.student.dtype, vocab, inverse_temperature, buffer,
                                     entries, count, members, rest);
        Softmax<double> all = rest;
        for (int64_t i = 0; i < count; ++i) all = fold(all, members[i], inverse_temperature);
        const HardTerm<F> hard(args.tokens, options, row, student, all);
        if (out.entropy) put<F>(out.entropy, row, entropy(student, vocab, all, inverse_temperature));
        if (out.agreement)
            out.agreement[row] = first_equal(student, vocab, F(all.max)) == most_likely(entries, count);

        // Sum over the categories; the entries' values become slopes
        const Categories categories = categorize(args, teacher_row, entries, count, members, rest);
        if (row_loss) {
            const double weight = args.tokens.weight ? at<F>(args.tokens.weight, row) : 1;
            const double soft = soft_weight == 0 ? 0 : soft_weight * categories.loss;
            put<F>(row_loss, row, weight * (soft + hard.loss));
        }
        if (!out.gradient.data) continue;

        // Map
        const double factor = row_factor<F>(args.tokens, row, denominator);
        const double slope_factor = factor * soft_weight * inverse_temperature;
        const F scale = F(slope_factor * categories.outside_scale), max = F(categories.outside_max);
        RowWriter<F> writer(row_of(out.gradient, row), out.gradient.dtype, span.stream);
        int64_t entry = 0;
        for (int64_t first = 0; first < vocab; first += kBlock) {
            const int64_t length = minimum(kBlock, vocab - first);
            const F* const s = student + first;
            F* const block = writer.block();
            if (args.tail == Tail::kRenormalize) {
                std::memset(block, 0, length * sizeof(F));
            } else {
#pragma omp simd
                for (int64_t i = 0; i < length; ++i)
                    block[i] = scale * exp(s[i] - max);
            }
            for (; entry < count && entries[entry].index < first + length; ++entry)
                block[entries[entry].index - first] = F(slope_factor * entries[entry].value);
            hard.add(block, student, first, length, factor);
            writer.write(length);
        }
        writer.finish(vocab, out.width);
    }
    if (span.stream) finish_streams();
}

void topk_distill(const TopKDistillArgs& args, double denominator, void* row_loss, Span span) {
    if (args.student.dtype == Dtype::kFloat64)
        topk_distill_rows<double>(args, denominator, row_loss, span);
    else
        topk_distill_rows<float>(args, denominator, row_loss, span);
}

// ---- Extraction of the k largest entries ----

// A heap of the k best entries so far, the worst on top: a smaller value, or of equals the later one.
template <class F>
class Best {
public:
    Best(Entry* heap, int64_t k) : heap_(heap), k_(k) {}

    F threshold() const { return count_ < k_ ? F(-kInfinity) : F(heap_[0].value); }
    bool full() const { return count_ == k_; }

    void offer(F value, int64_t index) {
        if (count_ < k_) {
            int64_t hole = count_++;
            for (; hole > 0 && worse(Entry{double(value), index, 0}, heap_[(hole - 1) / 2]); hole = (hole - 1) / 2)
                heap_[hole] = heap_[(hole - 1) / 2];
            heap_[hole] = {double(value), index, 0};
            return;
        }
        if (!(double(value) > heap_[0].value)) return;  // of equals the earlier one stays
        int64_t hole = 0;
        const Entry entry{double(value), index, 0};
        for (int64_t child; (child = 2 * hole + 1) < k_; hole = child) {
            if (child + 1 < k_ && worse(heap_[child + 1], heap_[child])) ++child;
            if (!worse(heap_[child], entry)) break;
            heap_[hole] = heap_[child];
        }
        heap_[hole] = entry;
    }

private:
    static bool worse(const Entry& a, const Entry& b) {
        return a.value < b.value || (a.value == b.value && a.index > b.index);
    }
    Entry* heap_;
    int64_t k_, count_ = 0;
};

// Reads the row once from memory; returns false where it holds a NaN.
template <class F>
bool select(const std::byte* row, Dtype dtype, int64_t vocab, int64_t k, F* buffer, Entry* entries) {
    constexpr int64_t kGroup = 64;
    Best<F> best(entries, k);
    int invalid = 0;
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const int64_t count = minimum(kBlock, vocab - first);
        prefetch(row, dtype, first + kBlock, vocab);
        const F* block = load(row, dtype, first, count, buffer + first);
        for (int64_t group = 0; group < count; group += kGroup) {
            const F *x = block + group, threshold = best.threshold();
            const int64_t length = minimum(kGroup, count - group);
            int above = !best.full();
#pragma omp simd reduction(| : above, invalid)
            for (int64_t i = 0; i < length; ++i) {
                above |= x[i] > threshold;
                invalid |= x[i] != x[i];
            }
            if (!above) continue;
            for (int64_t i = 0; i < length; ++i)
                if (!best.full() || x[i] > best.threshold()) best.offer(x[i], first + group + i);
        }
    }
    return !invalid;
}

template <class F>
void topk_rows(const TopKArgs& args, Span span) {
    const double inverse_temperature = 1 / args.temperature;
    Entry* const entries = reinterpret_cast<Entry*>(span.scratch);
    double* const members = reinterpret_cast<double*>(entries + args.k);
    F* const buffer = reinterpret_cast<F*>(members + args.k);

    for (int64_t row = span.begin; row < span.end; ++row) {
        const std::byte* logits = row_of(args.logits, row);
        const bool valid = select(logits, args.logits.dtype, args.vocab, args.k, buffer, entries);
        if (valid) cpu::sort_by_index(entries, args.k);
        Softmax<double> rest, all;
        fold_rest(logits, args.logits.dtype, args.vocab, inverse_temperature, buffer, entries, valid ? args.k : 0,
                  members, rest);
        all = rest;
        for (int64_t i = 0; valid && i < args.k; ++i) all = fold(all, members[i], inverse_temperature);
        if (valid) cpu::sort_by_value(entries, args.k);

        const double log_all = valid ? log_positive(all.sum) : kNaN;
        for (int64_t i = 0; i < args.k; ++i) {
            const double value = valid ? (entries[i].value - all.max) * inverse_temperature - log_all : kNaN;
            put<F>(args.logprobs, row * args.k + i, value);
            args.indices[row * args.k + i] = valid ? entries[i].index : i;
        }
        put<F>(args.residual, row, (rest.max - all.max) * inverse_temperature + log_positive(rest.sum) - log_all);
    }
}

void topk(const TopKArgs& args, Span span) {
    if (args.logits.dtype == Dtype::kFloat64)
        topk_rows<double>(args, span);
    else
        topk_rows<float>(args, span);
}

// ---- Scale ----

template <class T, class Load, class Store>
void scale_with(void* data, int64_t begin, int64_t end, float factor, Load load_one, Store store_one) {
    T* x = static_cast<T*>(data);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) x[i] = store_one(load_one(x[i]) * factor);
}

void scale(void* x, Dtype dtype, int64_t begin, int64_t end, double factor) {
    switch (dtype) {
        case Dtype::kFloat64:
            for (int64_t i = begin; i < end; ++i) static_cast<double*>(x)[i] *= factor;
            return;
        case Dtype::kFloat32: {
            const auto same = [](float value) { return value; };
            return scale_with<float>(x, begin, end, float(factor), same, same);
        }
        case Dtype::kBFloat16:
            return scale_with<uint16_t>(x, begin, end, float(factor), bfloat16_to_float, float_to_bfloat16);
        case Dtype::kFloat16:
            return scale_with<uint16_t>(x, begin, end, float(factor), float16_to_float, float_to_float16);
    }
}

}  // namespace

#define PYALIGN_STRING(x) #x
#define PYALIGN_NAME(x) PYALIGN_STRING(x)
extern const Kernels kKernels;
const Kernels kKernels = {PYALIGN_NAME(PYALIGN_ISA), distill, topk_distill, topk, scale};

PYALIGN_END
