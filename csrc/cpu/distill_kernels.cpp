// Distillation losses on the CPU, one row of logits at a time. A row is read from memory once, by the fold; the sums
// and the map find it in the cache, and its exponentials too, unless the row is too long to keep them.
#include "cpu/logprob_kernels.h"
#include "cpu/simd.h"

PYALIGN_BEGIN

void topk(const TopKArgs& args, cpu::Span span);  // topk_kernels.cpp
size_t topk_scratch(const TopKArgs& args);

namespace {

using cpu::Entry;
using cpu::Kernels;
using cpu::Span;

// ---- What every loss does for a row: its weight, its hard term, its metrics ----

// d result / d loss of the row.
template <class F>
double row_factor(const Tokens& tokens, int64_t row, double denominator) {
    double factor = denominator == 0 ? 0 : 1 / denominator;
    if (tokens.weight) factor *= at<F>(tokens.weight, row);
    if (tokens.upstream) factor *= at<F>(tokens.upstream, tokens.reduction == Reduction::kNone ? row : 0);
    return factor;
}

int64_t teacher_row_of(const Tokens& tokens, int64_t row) {
    return tokens.teacher_rows && row >= 0 ? tokens.teacher_rows[row] : row;
}

// The first counted row after `row` and before `end`, or -1.
int64_t next_counted(const Tokens& tokens, int64_t row, int64_t end) {
    while (++row < end)
        if (cpu::is_counted(tokens, row)) return row;
    return -1;
}

template <class F>
void write_uncounted(const Outputs& out, void* row_loss, int64_t row) {
    if (row_loss) put<F>(row_loss, row, 0);
    if (out.entropy) put<F>(out.entropy, row, 0);
    if (out.agreement) out.agreement[row] = 0;
    if (out.gradient.data) std::memset(row_of(out.gradient, row), 0, out.width * size_of(out.gradient.dtype));
}

bool has_hard_term(const Tokens& tokens, const DistillOptions& options, int64_t row) {
    return options.hard_weight != 0 && tokens.targets[row] != tokens.ignore_index;
}

// The student's state at temperature 1, where the hard term asks for it, given the one at the options' T.
template <class T>
Softmax<double> hard_state(const Tokens& tokens, const DistillOptions& options, int64_t row, const T* student,
                           Softmax<double> state) {
    if (options.temperature == 1 || !has_hard_term(tokens, options, row)) return state;
    return fold_row(student, options.vocab, 1.0);
}

// h * cross-entropy(student at temperature 1, target) and its gradient h * (softmax - 1[target]).
template <class T>
struct HardTerm {
    using F = ValueOf<T>;
    double loss = 0, weight = 0;
    int64_t target = -1;
    F max = 0, scale = 0;
    ScaledExp<F> exp{1.0};

    // `state` is the student's at temperature 1.
    HardTerm(const Tokens& tokens, const DistillOptions& options, int64_t row, const T* student,
             Softmax<double> state) {
        if (!has_hard_term(tokens, options, row)) return;
        weight = options.hard_weight;
        target = tokens.targets[row];
        max = F(state.max);
        scale = F(1 / state.sum);
        if (target != kElsewhere)
            loss = weight * ((state.max - double(value(student[target]))) + log_positive(state.sum));
    }

    // Adds factor * (softmax - 1[target]) to the gradients of the entries [first, first + count).
    void add(F* gradient, const T* student, int64_t first, int64_t count, double factor) const {
        if (weight == 0) return;
        const F f = F(factor * weight) * scale, m = max;
        const ScaledExp<F> e = exp;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) gradient[i] += f * e(value(student[first + i]) - m);
        if (target >= first && target < first + count) gradient[target - first] -= F(factor * weight);
    }
};

// Entropy of softmax(x / T) in nats: -sum q log q.
template <class T>
double entropy(const T* x, int64_t vocab, Softmax<double> state, double inverse_temperature) {
    using F = ValueOf<T>;
    const F max = F(state.max), scale = F(1 / state.sum), log_sum = F(log_positive(state.sum));
    const F inverse = F(inverse_temperature);
    const ScaledExp<F> exp(inverse_temperature);
    double total = 0;
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const T* const block = x + first;
        const int64_t count = minimum(kBlock, vocab - first);
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i)
            sum += weigh(exp(value(block[i]) - max) * scale, log_sum - (value(block[i]) - max) * inverse);
        total += double(sum);
    }
    return total;
}

template <class T>
int64_t first_equal(const T* x, int64_t vocab, double wanted) {
    using F = ValueOf<T>;
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const T* const block = x + first;
        const int64_t count = minimum(kBlock, vocab - first);
        int found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = 0; i < count; ++i) found |= value(block[i]) == F(wanted);
        if (!found) continue;
        for (int64_t i = 0; i < count; ++i)
            if (value(block[i]) == F(wanted)) return first + i;
    }
    return -1;
}

// ---- Dense: a divergence between two rows ----

// The bodies of the loops below. They stand outside: a struct that lives inside a simd loop goes to memory, lane by
// lane. `es` and `et` are the exponentials of s and t.
template <class F, class D>
PYALIGN_HD F term_at(D divergence, Pair<F> pair, F es, F et, F s, F t, F* aux) {
    const Sums<F> term = divergence.term(pair.with(es, et, s, t));
    *aux = term.aux;
    return term.loss;
}

template <class F, class D>
PYALIGN_HD F slope_at(D divergence, Pair<F> pair, Sums<F> row, F es, F et, F s, F t) {
    return divergence.slope(pair.with(es, et, s, t), row);
}

template <class F, class D>
PYALIGN_HD F term_and_slope_at(D divergence, Pair<F> pair, F es, F et, F s, F t, F factor, F* gradient) {
    const Point<F> x = pair.with(es, et, s, t);
    *gradient = factor * divergence.slope(x, Sums<F>{});
    return divergence.term(x).loss;
}

// A block of two folded rows.
template <class T>
struct BlockPair {
    using F = ValueOf<T>;
    Pair<F> pair;
    const T *s, *t;    // [count]
    const F *es, *et;  // [count]
    int64_t count;
};

// Two folded rows, and their blocks.
template <class T>
class RowPair {
  public:
    using F = ValueOf<T>;

    RowPair(const T* student, const T* teacher, Softmax<double> student_state, Softmax<double> teacher_state,
            KeptRow<F> kept_student, KeptRow<F> kept_teacher, int64_t vocab, double inverse_temperature)
        : pair_(finish<F>(student_state, teacher_state, inverse_temperature)),
          student_(student),
          teacher_(teacher),
          kept_student_(kept_student),
          kept_teacher_(kept_teacher),
          student_state_(student_state),
          teacher_state_(teacher_state),
          vocab_(vocab),
          inverse_temperature_(inverse_temperature) {}

    PYALIGN_HD BlockPair<T> block(int64_t first) {
        BlockPair<T> block{pair_, student_ + first, teacher_ + first, es_, et_, minimum(kBlock, vocab_ - first)};
        if (kept_student_.exp) {
            block.es = kept_student_.exp + first;
            block.et = kept_teacher_.exp + first;
            block.pair.student_scale = scale(student_state_, kept_student_.origins[first / kBlock]);
            block.pair.teacher_scale = scale(teacher_state_, kept_teacher_.origins[first / kBlock]);
        } else {
            const ScaledExp<F> exp(inverse_temperature_);
            take(block.s, block.count, pair_.student_max, exp, es_);
            take(block.t, block.count, pair_.teacher_max, exp, et_);
        }
        return block;
    }

  private:
    // What brings e^((x - origin) / T) to a probability.
    PYALIGN_HD F scale(Softmax<double> state, double origin) const {
        return F((origin == state.max ? 1.0 : rescale(origin, state.max, inverse_temperature_)) / state.sum);
    }

    static PYALIGN_HD void take(const T* x, int64_t count, F origin, ScaledExp<F> exp, F* to) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] = exp(value(x[i]) - origin);
    }

    Pair<F> pair_;
    const T *student_, *teacher_;
    KeptRow<F> kept_student_, kept_teacher_;
    Softmax<double> student_state_, teacher_state_;
    int64_t vocab_;
    double inverse_temperature_;
    alignas(64) F es_[kBlock], et_[kBlock];
};

template <class T, class D>
Sums<double> sum_block(D divergence, BlockPair<T> x) {
    using F = ValueOf<T>;
    alignas(64) F aux[kBlock];
    F loss = 0, aux_sum = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < x.count; ++i)
        loss += term_at(divergence, x.pair, x.es[i], x.et[i], value(x.s[i]), value(x.t[i]), aux + i);
#pragma omp simd reduction(+ : aux_sum)
    for (int64_t i = 0; i < x.count; ++i) aux_sum += aux[i];
    return {double(loss), double(aux_sum)};
}

// gradient = factor * slope
template <class T, class D, class F>
void map_block(D divergence, BlockPair<T> x, Sums<F> sums, F factor, F* gradient) {
#pragma omp simd
    for (int64_t i = 0; i < x.count; ++i)
        gradient[i] = factor * slope_at(divergence, x.pair, sums, x.es[i], x.et[i], value(x.s[i]), value(x.t[i]));
}

// Both at once, for a divergence whose map needs no sums; returns the block's loss.
template <class T, class D, class F>
double sum_and_map_block(D divergence, BlockPair<T> x, F factor, F* gradient) {
    F loss = 0;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < x.count; ++i)
        loss +=
            term_and_slope_at(divergence, x.pair, x.es[i], x.et[i], value(x.s[i]), value(x.t[i]), factor, gradient + i);
    return double(loss);
}

// A row in another dtype than the loops', converted into `buffer`.
template <class T>
const T* row_as(const Rows& rows, int64_t row, int64_t vocab, T* buffer) {
    const std::byte* const data = row_of(rows, row);
    if (rows.dtype == DtypeOf<T>::value) return reinterpret_cast<const T*>(data);
    if constexpr (sizeof(T) == sizeof(float)) {
        if (rows.dtype == Dtype::kBFloat16) {
            const BFloat16* x = reinterpret_cast<const BFloat16*>(data);
            for (int64_t i = 0; i < vocab; ++i) buffer[i] = value(x[i]);
        } else {
            const Float16* x = reinterpret_cast<const Float16*>(data);
            for (int64_t i = 0; i < vocab; ++i) buffer[i] = value(x[i]);
        }
    }
    return buffer;
}

template <class T, class D>
void distill_rows(const DistillArgs& args, D divergence, double denominator, void* row_loss, Span span) {
    using F = ValueOf<T>;
    const DistillOptions& options = args.options;
    const Outputs& out = args.out;
    const Split& split = args.split;
    const bool folds = split.stage == Stage::kWhole || split.stage == Stage::kFold;
    const int64_t vocab = options.vocab;
    const double inverse_temperature = 1 / options.temperature;
    const double soft_weight =
        (1 - options.hard_weight) * (options.temperature_squared ? options.temperature * options.temperature : 1);
    const double far_loss = kFarLoss<double>;
    std::byte* const memory = span.scratch;
    const size_t kept_bytes = KeptRow<F>::bytes(vocab);
    const KeptRow<F> kept_student = folds ? KeptRow<F>::in(memory, vocab) : KeptRow<F>{};
    const KeptRow<F> kept_teacher = folds ? KeptRow<F>::in(memory + kept_bytes, vocab) : KeptRow<F>{};
    T* const converted = reinterpret_cast<T*>(memory + 2 * kept_bytes);
    Ahead student_ahead, teacher_ahead;

    for (int64_t row = span.begin; row < span.end; ++row) {
        if (!cpu::is_counted(args.tokens, row)) {
            write_uncounted<F>(out, row_loss, row);
            continue;
        }
        const int64_t next = next_counted(args.tokens, row, span.end);
        const int64_t teacher_row = teacher_row_of(args.tokens, row);
        student_ahead.start(args.student, row, next, vocab);
        teacher_ahead.start(args.teacher, teacher_row, teacher_row_of(args.tokens, next), vocab);

        // Fold, unless an earlier call did
        const T* const student = row_as(args.student, row, vocab, converted);
        const T* const teacher = row_as(args.teacher, teacher_row, vocab, converted + vocab);
        Softmax<double> student_state, teacher_state, at_one;
        if (folds) {
            student_state = fold_row(student, vocab, inverse_temperature, &student_ahead, kept_student);
            teacher_state = fold_row(teacher, vocab, inverse_temperature, &teacher_ahead, kept_teacher);
            at_one = hard_state(args.tokens, options, row, student, student_state);
        } else {
            const double* const given = split.states + 5 * row;
            student_state = {given[0], given[1]}, teacher_state = {given[2], given[3]}, at_one = {given[0], given[4]};
        }
        if (split.stage == Stage::kFold) {
            double* const states = split.states + 5 * row;
            states[0] = student_state.max, states[1] = student_state.sum, states[4] = at_one.sum;
            states[2] = teacher_state.max, states[3] = teacher_state.sum;
        }
        RowPair<T> pair(student, teacher, student_state, teacher_state, kept_student, kept_teacher, vocab,
                        inverse_temperature);
        const HardTerm<T> hard(args.tokens, options, row, student, at_one);
        if (out.entropy) put<F>(out.entropy, row, entropy(student, vocab, student_state, inverse_temperature));
        if (out.agreement)
            out.agreement[row] =
                first_equal(student, vocab, student_state.max) == first_equal(teacher, vocab, teacher_state.max);

        // Sum, unless the map does it in passing
        const bool map = out.gradient.data != nullptr;
        Sums<double> sums;
        if (split.stage == Stage::kMap)
            sums = {split.sums[2 * row], split.sums[2 * row + 1]};
        else if (split.stage == Stage::kFold ? row_loss != nullptr : D::kMapNeedsSums || !map)
            for (int64_t first = 0; first < vocab; first += kBlock) {
                student_ahead.map();
                teacher_ahead.map();
                const BlockPair<T> block = pair.block(first);
                sums =
                    sums + (sums.loss > far_loss ? sum_block(divergence.far(), block) : sum_block(divergence, block));
            }
        if (split.stage == Stage::kSum) split.sums[2 * row] = sums.loss, split.sums[2 * row + 1] = sums.aux;

        // Map
        if (map) {
            const double factor = row_factor<F>(args.tokens, row, denominator);
            const F slope_factor = F(factor * soft_weight * inverse_temperature);
            RowWriter<F> writer(row_of(out.gradient, row), out.gradient.dtype, span.stream);
            for (int64_t first = 0; first < vocab; first += kBlock) {
                student_ahead.map();
                teacher_ahead.map();
                const BlockPair<T> block = pair.block(first);
                F* const gradient = writer.block();
                const bool far = sums.loss > far_loss;
                if (D::kMapNeedsSums) {
                    const Sums<F> total = {F(sums.loss), F(sums.aux)};
                    if (far)
                        map_block(divergence.far(), block, total, slope_factor, gradient);
                    else
                        map_block(divergence, block, total, slope_factor, gradient);
                } else if (far) {
                    sums.loss += sum_and_map_block(divergence.far(), block, slope_factor, gradient);
                } else {
                    sums.loss += sum_and_map_block(divergence, block, slope_factor, gradient);
                }
                hard.add(gradient, student, first, block.count, factor);
                writer.write(block.count);
            }
            writer.finish(vocab, out.width);
        }

        if (row_loss && split.stage == Stage::kFold) {
            put<F>(row_loss, row, sums.loss);
        } else if (row_loss) {
            const double weight = args.tokens.weight ? at<F>(args.tokens.weight, row) : 1;
            const double soft = soft_weight == 0 ? 0 : soft_weight * sums.loss;
            put<F>(row_loss, row, weight * (soft + hard.loss));
        }
    }
    if (span.stream) finish_streams();
}

template <class T>
void distill_dispatch(const DistillArgs& args, double denominator, void* row_loss, Span span) {
    with_divergence(args.options.divergence, ValueOf<T>(args.options.beta),
                    [&](const auto& divergence) { distill_rows<T>(args, divergence, denominator, row_loss, span); });
}

// Rows of two dtypes meet in float.
void distill(const DistillArgs& args, double denominator, void* row_loss, Span span) {
    const Dtype dtype = args.student.dtype == args.teacher.dtype ? args.student.dtype : Dtype::kFloat32;
    switch (dtype) {
        case Dtype::kFloat32: return distill_dispatch<float>(args, denominator, row_loss, span);
        case Dtype::kBFloat16: return distill_dispatch<BFloat16>(args, denominator, row_loss, span);
        case Dtype::kFloat16: return distill_dispatch<Float16>(args, denominator, row_loss, span);
        case Dtype::kFloat64: return distill_dispatch<double>(args, denominator, row_loss, span);
    }
}

size_t distill_scratch(const DistillArgs& args) {
    const bool mixed = args.student.dtype != args.teacher.dtype;  // both rows are converted to float
    const int64_t vocab = args.options.vocab;
    const size_t kept =
        !mixed && args.student.dtype == Dtype::kFloat64 ? KeptRow<double>::bytes(vocab) : KeptRow<float>::bytes(vocab);
    return 2 * kept + (mixed ? 2 * sizeof(float) * static_cast<size_t>(vocab) : 0);
}

// ---- Top-k: the teacher's entries are categories, and with a bucket all the rest is one more ----

// The state of all entries of a row that are not in the set; the set's logits go to `members`. Calls ahead(first)
// before each block.
template <class T, class Fetch>
Softmax<double> fold_rest(const T* x, int64_t vocab, double inverse_temperature, const Entry* entries, int64_t count,
                          double* members, Fetch ahead) {
    using F = ValueOf<T>;
    RowFold<F> fold(inverse_temperature);
    alignas(64) F patched[kBlock];
    int64_t entry = 0;
    for (int64_t first = 0; first < vocab; first += kBlock) {
        const T* const block = x + first;
        const int64_t length = minimum(kBlock, vocab - first);
        ahead(first);
        if (entry == count || entries[entry].index >= first + length) {
            fold.add(block, length);
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) patched[i] = value(block[i]);
        for (; entry < count && entries[entry].index < first + length; ++entry) {
            members[entry] = double(patched[entries[entry].index - first]);
            patched[entries[entry].index - first] = F(-kInfinity);
        }
        fold.add(patched, length);
    }
    return fold.finish();
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
Categories categorize(const D& divergence, Tail tail, const TopK& teacher, int64_t teacher_row, int64_t vocab,
                      Entry* entries, int64_t count, const double* members, Softmax<double> rest,
                      double inverse_temperature) {
    Softmax<double> student;  // of the categories
    for (int64_t i = 0; i < count; ++i) student = fold(student, members[i], inverse_temperature);
    if (tail != Tail::kRenormalize) student = merge(student, rest, inverse_temperature);
    const double log_student = log_positive(student.sum);

    const double residual =
        tail == Tail::kBucket ? cpu::residual_of(teacher, teacher_row, vocab, entries, count) : -kInfinity;
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
        return Point<double>{exp_nonpositive(log_p - log_teacher), exp_nonpositive(log_q),
                             log_q - (log_p - log_teacher)};
    };
    const Point<double> outside = rest.sum == 0
                                      ? Point<double>{exp_nonpositive(residual - log_teacher), 0.0, -kInfinity}
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
    return with_divergence(args.options.divergence, args.options.beta, [&](const auto& divergence) {
        return categorize(divergence, args.tail, args.teacher, teacher_row, args.options.vocab, entries, count, members,
                          rest, 1 / args.options.temperature);
    });
}

int64_t most_likely(const Entry* entries, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
        if (best < 0 || entries[i].value > entries[best].value ||
            (entries[i].value == entries[best].value && entries[i].place < entries[best].place))
            best = i;
    return best < 0 ? -1 : entries[best].index;
}

template <class T>
void topk_distill_rows(const TopKDistillArgs& args, double denominator, void* row_loss, Span span) {
    using F = ValueOf<T>;
    const DistillOptions& options = args.options;
    const Outputs& out = args.out;
    const int64_t vocab = options.vocab;
    const double inverse_temperature = 1 / options.temperature;
    const ScaledExp<F> exp(inverse_temperature);
    const double soft_weight =
        (1 - options.hard_weight) * (options.temperature_squared ? options.temperature * options.temperature : 1);
    Entry* const entries = reinterpret_cast<Entry*>(span.scratch);
    double* const members = reinterpret_cast<double*>(entries + args.teacher.k);
    const bool reads_row = args.tail != Tail::kRenormalize || options.hard_weight > 0 || out.entropy || out.agreement;
    Ahead ahead;

    for (int64_t row = span.begin; row < span.end; ++row) {
        if (!cpu::is_counted(args.tokens, row)) {
            write_uncounted<F>(out, row_loss, row);
            continue;
        }
        ahead.start(args.student, row, next_counted(args.tokens, row, span.end), vocab);

        // Fold
        const int64_t teacher_row = teacher_row_of(args.tokens, row);
        const int64_t count = cpu::sorted_entries(args.teacher, teacher_row, vocab, entries);
        if (count < 0) {  // the caller raises
            if (row_loss) put<F>(row_loss, row, kNaN);
            continue;
        }
        const T* const student = reinterpret_cast<const T*>(row_of(args.student, row));
        Softmax<double> rest;
        if (reads_row)
            rest = fold_rest(student, vocab, inverse_temperature, entries, count, members,
                             [&](int64_t first) { ahead.fold(first); });
        else
            for (int64_t i = 0; i < count; ++i) members[i] = double(value(student[entries[i].index]));
        Softmax<double> all = rest;
        for (int64_t i = 0; i < count; ++i) all = fold(all, members[i], inverse_temperature);
        const HardTerm<T> hard(args.tokens, options, row, student, hard_state(args.tokens, options, row, student, all));
        if (out.entropy) put<F>(out.entropy, row, entropy(student, vocab, all, inverse_temperature));
        if (out.agreement) out.agreement[row] = first_equal(student, vocab, all.max) == most_likely(entries, count);

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
            const T* const s = student + first;
            ahead.map();
            F* const block = writer.block();
            if (args.tail == Tail::kRenormalize) {
                std::memset(block, 0, length * sizeof(F));
            } else {
#pragma omp simd
                for (int64_t i = 0; i < length; ++i) block[i] = scale * exp(value(s[i]) - max);
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
    switch (args.student.dtype) {
        case Dtype::kFloat32: return topk_distill_rows<float>(args, denominator, row_loss, span);
        case Dtype::kBFloat16: return topk_distill_rows<BFloat16>(args, denominator, row_loss, span);
        case Dtype::kFloat16: return topk_distill_rows<Float16>(args, denominator, row_loss, span);
        case Dtype::kFloat64: return topk_distill_rows<double>(args, denominator, row_loss, span);
    }
}

// ---- Rows without a set, of which the caller knows the categories ----

template <class T>
void outside_rows(const OutsideArgs& args, Span span) {
    using F = ValueOf<T>;
    const int64_t vocab = args.vocab;
    const double inverse_temperature = 1 / args.temperature;
    const ScaledExp<F> exp(inverse_temperature), exp_at_one(1.0);
    Entry* const entries = reinterpret_cast<Entry*>(span.scratch);
    double* const members = reinterpret_cast<double*>(entries + args.k);

    for (int64_t row = span.begin; row < span.end; ++row) {
        std::byte* const to = args.gradient.data ? row_of(args.gradient, row) : nullptr;
        if (args.mask && !args.mask[row]) {
            if (to) std::memset(to, 0, args.width * size_of(args.gradient.dtype));
            if (args.states) args.states[3 * row] = 0, args.states[3 * row + 1] = args.states[3 * row + 2] = 1;
            continue;
        }
        const T* const x = reinterpret_cast<const T*>(row_of(args.logits, row));
        int64_t count = 0;
        for (int64_t place = 0; place < args.k; ++place) {
            const int64_t index = args.indices[row * args.k + place];
            if (index < 0 || index >= vocab) continue;
            entries[count++] = {args.values ? args.values[row * args.k + place] : 0.0, index, place};
        }

        if (args.states) {
            const auto fold = [&](double at) {
                return fold_rest(x, vocab, at, entries, count, members, [](int64_t) {});
            };
            const Softmax<double> state = fold(inverse_temperature);
            args.states[3 * row] = state.max;
            args.states[3 * row + 1] = state.sum;
            args.states[3 * row + 2] = inverse_temperature == 1 ? state.sum : fold(1.0).sum;
        }
        if (!to) continue;

        const double* const terms = args.exponentials + 4 * row;
        const F a = F(terms[0]), m = F(terms[1]), b = F(terms[2]), n = F(terms[3]);
        RowWriter<F> writer(to, args.gradient.dtype, span.stream);
        int64_t entry = 0;
        for (int64_t first = 0; first < vocab; first += kBlock) {
            const int64_t length = minimum(kBlock, vocab - first);
            const T* const s = x + first;
            F* const block = writer.block();
#pragma omp simd
            for (int64_t i = 0; i < length; ++i) block[i] = weigh(a, exp(value(s[i]) - m));
            if (b != 0) {
#pragma omp simd
                for (int64_t i = 0; i < length; ++i) block[i] += b * exp_at_one(value(s[i]) - n);
            }
            for (; entry < count && entries[entry].index < first + length; ++entry)
                block[entries[entry].index - first] = F(entries[entry].value);
            writer.write(length);
        }
        writer.finish(vocab, args.width);
    }
    if (span.stream) finish_streams();
}

void outside(const OutsideArgs& args, Span span) {
    switch (args.logits.dtype) {
        case Dtype::kFloat32: return outside_rows<float>(args, span);
        case Dtype::kBFloat16: return outside_rows<BFloat16>(args, span);
        case Dtype::kFloat16: return outside_rows<Float16>(args, span);
        case Dtype::kFloat64: return outside_rows<double>(args, span);
    }
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

// ---- Widen ----

template <class T>
void widen_with(float* out, const void* first, const void* second, int64_t count, bool add) {
    const T *a = static_cast<const T*>(first), *b = static_cast<const T*>(second);
    if (b && !add) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = value(a[i]) + value(b[i]);
    } else if (!b && add) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] += value(a[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = (add ? out[i] : 0) + value(a[i]) + (b ? value(b[i]) : 0);
    }
}

void widen(float* out, const void* a, const void* b, Dtype dtype, int64_t count, bool add) {
    if (dtype == Dtype::kBFloat16) return widen_with<BFloat16>(out, a, b, count, add);
    widen_with<Float16>(out, a, b, count, add);
}

}  // namespace

#define PYALIGN_STRING(x) #x
#define PYALIGN_NAME(x) PYALIGN_STRING(x)
extern const Kernels kKernels;
const Kernels kKernels = {
    PYALIGN_NAME(PYALIGN_ISA), distill_scratch, distill, topk_distill, topk_scratch, topk, outside, scale, widen,
    logprob_scratch,           logprob};

PYALIGN_END
