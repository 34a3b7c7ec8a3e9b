// Log-probs, entropies, cross-entropies and their gradients on the CPU, one row of logits at a time. A row is read from
// memory once: the map finds it in the cache, and a loss's exponentials too, unless the row is too long to keep them.
#include "cpu/logprob_kernels.h"

#include "common/logprob.h"
#include "cpu/simd.h"

PYALIGN_BEGIN
namespace {

using cpu::Span;

// ---- Blocks: the bodies of the loops stand outside, see distill_kernels.cpp ----

template <class F>
PYALIGN_HD F capped_at(Softcap<F> softcap, F x, F* slope) {
    const Tanh<F> tanh = softcap.tanh(x);
    *slope = tanh.slope;
    return softcap.cap * tanh.value;
}

// y and dy/dx of a block.
template <class T, class F>
void cap_block(const T* x, int64_t count, Softcap<F> softcap, F* y, F* slope) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = capped_at(softcap, value(x[i]), slope + i);
}

// The sums of e^((y - origin) / T) and of e^((y - origin) / T) (origin - y), and the max in passing.
template <class Y, class F>
LogprobState<F> sum_block(const Y* y, int64_t count, F origin, ScaledExp<F> exp, const std::byte* ahead) {
    constexpr F kFarthest = F(-1e38);  // finite, so that 0 * kFarthest = 0; NaN stays
    F sums[kLanes], distances[kLanes], maxima[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) sums[i] = distances[i] = 0, maxima[i] = std::numeric_limits<F>::lowest();
    const auto add = [&](int64_t first, int64_t i) {
        const F logit = value(y[first + i]), above = logit - origin, e = exp(above);
        sums[i] += e;
        distances[i] -= e * (kFarthest > above ? kFarthest : above);
        maxima[i] = logit > maxima[i] ? logit : maxima[i];
    };
    const int64_t whole = count - count % kLanes;
    for (int64_t first = 0; first < whole; first += kLanes) {
        if (ahead) fetch_line<Y>(ahead, first);
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) add(first, i);
    }
    for (int64_t i = 0; i < count - whole; ++i) add(whole, i);
    F sum = 0, distance = 0, max = std::numeric_limits<F>::lowest();
#pragma omp simd reduction(+ : sum, distance) reduction(max : max)
    for (int64_t i = 0; i < kLanes; ++i) {
        sum += sums[i];
        distance += distances[i];
        max = maxima[i] > max ? maxima[i] : max;
    }
    return {{max, sum}, distance};
}

// Folds a row block by block, with the distances. Their terms are >= 0 over the max alone: a block with a larger one
// than those before it is taken again. (Without distances, RowFold is content with an origin near the max.)
template <class F>
class DistanceFold {
  public:
    explicit DistanceFold(double inverse_temperature)
        : exp_(inverse_temperature), inverse_temperature_(inverse_temperature) {}

    // `ahead` is what is fetched meanwhile, line by line, or null: [count] entries as long as those of y.
    template <class Y>
    PYALIGN_HD void add(const Y* y, int64_t count, const std::byte* ahead) {
        if (state_.softmax.sum == 0) raise_to(max_of(y, count));
        LogprobState<F> block = sum_block(y, count, F(state_.softmax.max), exp_, ahead);
        if (double(block.softmax.max) > state_.softmax.max) {
            raise_to(block.softmax.max);
            block = sum_block(y, count, F(state_.softmax.max), exp_, ahead);
        }
        state_.softmax.sum += double(block.softmax.sum);
        state_.distance += double(block.distance);
    }

    LogprobState<double> finish() const { return state_; }

  private:
    PYALIGN_HD void raise_to(F max) {
        if (double(max) > state_.softmax.max) state_ = raise(state_, double(max), inverse_temperature_);
    }

    ScaledExp<F> exp_;
    double inverse_temperature_;
    LogprobState<double> state_;
};

template <class Y, class F>
F sum_above(const Y* y, int64_t count, F target) {
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += value(y[i]) - target;
    return sum;
}

// gradient = q mass + all, from e = e^((y - origin) / T) and q = e scale.
template <class F>
void map_kept(const F* e, int64_t count, F scaled_mass, F all, F* gradient) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) gradient[i] = e[i] * scaled_mass + all;
}

template <class F>
PYALIGN_HD F slope_at(Slope<F> slope, LogprobRow<F> row, F scale, F e, F y) {
    return slope.at(e * scale, row.logprob(y));
}

template <class Y, class F>
void map_block(const Y* y, int64_t count, const LogprobRow<F>& row, Slope<F> slope, ScaledExp<F> exp, F* gradient) {
    const LogprobRow<F> r = row;
    const F max = r.max, scale = F(1) / r.sum, scaled_mass = scale * slope.mass, all = slope.all;
    if (slope.surprise == F(0)) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) gradient[i] = exp(value(y[i]) - max) * scaled_mass + all;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
            gradient[i] = slope_at(slope, r, scale, exp(value(y[i]) - max), value(y[i]));
    }
}

// ---- Rows ----

template <class F>
void put_state(void* data, int64_t row, Softmax<double> state, double entropy) {
    put<F>(data, 3 * row, state.max);
    put<F>(data, 3 * row + 1, state.sum);
    put<F>(data, 3 * row + 2, entropy);
}

template <class F>
void write_ignored(const LogprobArgs& args, int64_t row) {
    put<F>(args.logprob, row, 0);
    put<F>(args.entropy, row, 0);
    put_state<F>(args.state, row, {0, 1}, 0);
    put<F>(args.row_loss, row, 0);
    put<F>(args.above, row, 0);
    if (args.gradient.data)
        std::memset(row_of(args.gradient, row), 0,
                    static_cast<size_t>(args.options.vocab) * size_of(args.gradient.dtype));
}

int64_t next_counted(const LogprobArgs& args, int64_t row, int64_t end) {
    while (++row < end)
        if (args.targets[row] != args.ignore_index) return row;
    return -1;
}

bool keeps_exponentials(const LogprobArgs& args) { return args.row_loss && args.gradient.data && !args.given_state; }

// What a row's fold comes to. `distance` and `above` are there where they were asked for.
struct Folded {
    LogprobState<double> state;
    double above = 0;  // sum y - y_target
};

// One thread's rows.
template <class T>
class LogprobRows {
  public:
    using F = ValueOf<T>;

    LogprobRows(const LogprobArgs& args, Span span)
        : args_(args),
          span_(span),
          inverse_temperature_(1 / args.options.temperature),
          exp_(inverse_temperature_),
          softcap_(args.options.softcap) {
        if (keeps_exponentials(args)) kept_ = KeptRow<F>::in(span.scratch, args.options.vocab);
    }

    void run() {
        for (int64_t row = span_.begin; row < span_.end; ++row) {
            if (args_.targets[row] == args_.ignore_index) {
                write_ignored<F>(args_, row);
                continue;
            }
            const int64_t next = next_counted(args_, row, span_.end);
            ahead_.start(args_.logits, row, next, args_.options.vocab);
            next_ = reinterpret_cast<const T*>(row_of(args_.logits, next < 0 ? row : next));
            one(row, reinterpret_cast<const T*>(row_of(args_.logits, row)), args_.targets[row]);
        }
        if (span_.stream) finish_streams();
    }

  private:
    void one(int64_t row, const T* logits, int64_t target) {
        const LogprobOptions& options = args_.options;
        F ignored_slope;
        const F logit = value(logits[target == kElsewhere ? 0 : target]);
        const F y = softcap_.caps() ? capped_at(softcap_, logit, &ignored_slope) : logit;

        // Fold
        Folded folded;
        double entropy = kNaN;
        const bool given = args_.given_state != nullptr;
        if (given) {
            folded.state.softmax = {at<F>(args_.given_state, 3 * row), at<F>(args_.given_state, 3 * row + 1)};
            entropy = at<F>(args_.given_state, 3 * row + 2);
        } else {
            folded = fold(logits, y);
        }
        const LogprobRow<double> result(folded.state.softmax, inverse_temperature_);
        if (wants_entropy() && !given) entropy = result.entropy(folded.state.distance);

        // Finish
        put<F>(args_.logprob, row, result.logprob(double(y)));
        put<F>(args_.entropy, row, entropy);
        put_state<F>(args_.state, row, folded.state.softmax, entropy);
        put<F>(args_.above, row, folded.above * inverse_temperature_);
        if (args_.row_loss) {
            const double above = folded.above * inverse_temperature_ / double(options.vocab);
            put<F>(args_.row_loss, row,
                   cross_entropy(result, double(y), above, options.label_smoothing, options.z_loss));
        }
        if (args_.gradient.data) map(row, logits, target, folded.state.softmax, result, slope(row, result, entropy));
    }

    bool wants_entropy() const { return args_.entropy || args_.upstream_entropy; }

    // Calls body(y) for the entries [first, first + count): the logits themselves, or capped ones.
    template <class Body>
    void with_block(const T* logits, int64_t first, int64_t count, Body body) {
        if (!softcap_.caps()) return body(logits + first);
        cap_block(logits + first, count, softcap_, capped_, cap_slope_);
        body(static_cast<const F*>(capped_));
    }

    Folded fold(const T* logits, F target) {
        Folded folded;
        DistanceFold<F> with_distances(inverse_temperature_);
        RowFold<F> plain(inverse_temperature_);
        const bool distances = wants_entropy(), aboves = args_.options.label_smoothing > 0 || args_.above;
        // Nothing but a read of the row, and memory is what takes the time: 16-bit entries are bound by arithmetic.
        const bool lines = !args_.gradient.data && !softcap_.caps() && sizeof(T) > 2;
        for (int64_t first = 0; first < args_.options.vocab; first += kBlock) {
            const int64_t count = minimum(kBlock, args_.options.vocab - first);
            const std::byte* ahead = nullptr;
            if (lines)
                ahead = lying_ahead(logits, next_, args_.options.vocab, first);
            else
                ahead_.fold(first);
            with_block(logits, first, count, [&](const auto* y) {
                if (distances) {
                    with_distances.add(y, count, ahead);
                } else if (lines) {
                    plain.add(y, count, BlockGroups<F>{ahead});
                } else if (kept_.exp) {
                    plain.add(y, count, kept_.exp + first);
                    kept_.origins[first / kBlock] = plain.origin();
                } else {
                    plain.add(y, count);
                }
                if (aboves) folded.above += double(sum_above(y, count, target));
            });
        }
        folded.state = distances ? with_distances.finish() : LogprobState<double>{plain.finish()};
        return folded;
    }

    // d result / d z of this row.
    Slope<double> slope(int64_t row, const LogprobRow<double>& result, double entropy) const {
        if (args_.row_loss) {
            const double factor = args_.factor ? at<F>(args_.factor, 0) : 1;
            return factor * cross_entropy_slope(result, args_.options.label_smoothing, args_.options.z_loss,
                                                double(args_.options.whole_vocab));
        }
        return logprob_slope(args_.upstream_logprob ? at<F>(args_.upstream_logprob, row) : 0.0,
                             args_.upstream_entropy ? at<F>(args_.upstream_entropy, row) : 0.0, entropy);
    }

    void map(int64_t row, const T* logits, int64_t target, Softmax<double> state, const LogprobRow<double>& result,
             Slope<double> of_z) {
        const int64_t vocab = args_.options.vocab;
        const Slope<double> of_y = inverse_temperature_ * of_z;
        const Slope<F> slope{F(of_y.target), F(of_y.mass), F(of_y.surprise), F(of_y.all)};
        const LogprobRow<F> narrow(Softmax<F>{F(result.max), F(result.sum)}, F(inverse_temperature_));
        RowWriter<F> writer(row_of(args_.gradient, row), args_.gradient.dtype, span_.stream);
        for (int64_t first = 0; first < vocab; first += kBlock) {
            const int64_t count = minimum(kBlock, vocab - first);
            F* const gradient = writer.block();
            ahead_.map();
            if (kept_.exp) {
                const double origin = kept_.origins[first / kBlock];
                const double scale = rescale(origin, state.max, inverse_temperature_) / result.sum;
                if (softcap_.caps()) cap_block(logits + first, count, softcap_, capped_, cap_slope_);
                map_kept(kept_.exp + first, count, F(of_y.mass * scale), slope.all, gradient);
            } else {
                with_block(logits, first, count,
                           [&](const auto* y) { map_block(y, count, narrow, slope, exp_, gradient); });
            }
            if (target >= first && target < first + count) gradient[target - first] += slope.target;
            if (softcap_.caps()) {
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) gradient[i] *= cap_slope_[i];
            }
            writer.write(count);
        }
        writer.finish(vocab, vocab);
    }

    const LogprobArgs& args_;
    const Span span_;
    const double inverse_temperature_;
    const ScaledExp<F> exp_;
    const Softcap<F> softcap_;
    KeptRow<F> kept_;
    Ahead ahead_;
    const T* next_ = nullptr;  // the row after this one
    alignas(64) F capped_[kBlock], cap_slope_[kBlock];
};

}  // namespace

void logprob(const LogprobArgs& args, Span span) {
    switch (args.logits.dtype) {
        case Dtype::kFloat32: return LogprobRows<float>(args, span).run();
        case Dtype::kBFloat16: return LogprobRows<BFloat16>(args, span).run();
        case Dtype::kFloat16: return LogprobRows<Float16>(args, span).run();
        case Dtype::kFloat64: return LogprobRows<double>(args, span).run();
    }
}

size_t logprob_scratch(const LogprobArgs& args) {
    if (!keeps_exponentials(args)) return 0;
    const int64_t vocab = args.options.vocab;
    return args.logits.dtype == Dtype::kFloat64 ? KeptRow<double>::bytes(vocab) : KeptRow<float>::bytes(vocab);
}

PYALIGN_END
