// What a row of logits x says about one target t, and its gradient, as fold, merge, map.
//
//   y = softcap(x) = c tanh(x / c),  z = y / T,  q = softmax(z)
//
//   1. fold   the row into a LogprobState: the Softmax state of distill.h and, for the entropy, the distances to the
//   max.
//   2. finish a state into the target's log-prob, the log-sum-exp, the entropy, a loss.
//   3. map    every entry into dresult/dz_i = a [i = t] + q_i (b + c log q_i) + u, which dz/dx makes one of x. All
//             results have gradients of this form, and a Slope holds its four numbers.
//
// Max and sum stay apart: x - (max + log sum) would carry the rounding of the logits' level. Every term of the
// entropy's sum is >= 0, so it is neither negative nor rounding noise where the row is peaked.
//
// Conventions at the edges: q = 0 contributes nothing; a row whose z are all -inf, or hold +inf or NaN, has a sum of 0
// or NaN, and everything of it is NaN.
#pragma once

#include "common/distill.h"
#include "common/logprob_args.h"

PYALIGN_BEGIN

// y = c tanh(x / c) and dy/dx; c = 0 leaves x as it is.
template <class F>
struct Softcap {
    F cap, inverse;

    PYALIGN_HD explicit Softcap(double cap) : cap(F(cap)), inverse(F(cap > 0 ? 1 / cap : 0)) {}
    PYALIGN_HD bool caps() const { return cap != F(0); }
    PYALIGN_HD Tanh<F> tanh(F x) const { return tanh_with_slope(x * inverse); }
};

// Of the y folded so far: the softmax state, and sum e^((y - max) / T) (max - y).
template <class F>
struct LogprobState {
    Softmax<F> softmax;
    F distance = F(0);
};

// The state with its sums taken at the max `to` >= its own.
template <class F>
PYALIGN_HD LogprobState<F> raise(LogprobState<F> state, F to, F inverse_temperature) {
    const F scale = rescale(state.softmax.max, to, inverse_temperature);
    const F distance = state.distance + weigh(state.softmax.sum, to - state.softmax.max);
    return {{to, state.softmax.sum * scale}, distance * scale};
}

template <class F>
PYALIGN_HD LogprobState<F> merge(LogprobState<F> a, LogprobState<F> b, F inverse_temperature) {
    const F max = a.softmax.max > b.softmax.max ? a.softmax.max : b.softmax.max;
    a = raise(a, max, inverse_temperature), b = raise(b, max, inverse_temperature);
    return {{max, a.softmax.sum + b.softmax.sum}, a.distance + b.distance};
}

// What a finished state says. `logprob` is log q of the entry y.
template <class F>
struct LogprobRow {
    static constexpr F kNaN = std::numeric_limits<F>::quiet_NaN(), kInfinity = std::numeric_limits<F>::infinity();
    F max, sum, inverse_temperature, log_sum;

    PYALIGN_HD LogprobRow(Softmax<F> state, F inverse_temperature)
        : max(state.max),
          sum(state.sum > F(0) ? state.sum : kNaN),
          inverse_temperature(inverse_temperature),
          log_sum(log_positive(sum)) {}

    PYALIGN_HD F logprob(F y) const { return (y - max) * inverse_temperature - log_sum; }
    PYALIGN_HD F log_sum_exp() const { return max * inverse_temperature + log_sum; }
    PYALIGN_HD F entropy(F distance) const { return log_sum + distance * inverse_temperature / sum; }
};

// Cross-entropy with label smoothing e, as torch defines it, and z-loss (Chowdhery et al. 2022, PaLM):
//   -(1 - e) log q_t - e mean_i log q_i + z lse^2,  where  mean_i log q_i = log q_t + mean_i (z_i - z_t).
// `above` is mean_i (z_i - z_t), which has no level of its own to lose digits to.
template <class F>
PYALIGN_HD F cross_entropy(const LogprobRow<F>& row, F target, F above, F label_smoothing, F z_loss) {
    const F nll = -row.logprob(target), lse = row.log_sum_exp();
    if (nll == row.kInfinity) return nll;  // the target's z is -inf, `above` is no number
    return nll - weigh(label_smoothing, above) + z_loss * (lse * lse);
}

// a, b, c, u of dresult/dz_i = a [i = t] + q_i (b + c log q_i) + u.
template <class F>
struct Slope {
    F target, mass, surprise, all;

    // Of an entry that isn't the target.
    PYALIGN_HD F at(F q, F log_q) const { return weigh(q, mass + surprise * log_q) + all; }
};

template <class F>
PYALIGN_HD Slope<F> operator*(F factor, Slope<F> x) {
    return {factor * x.target, factor * x.mass, factor * x.surprise, factor * x.all};
}

// logprob * log q_t + entropy * H:  d log q_t/dz_i = [i = t] - q_i,  dH/dz_i = -q_i (log q_i + H).
template <class F>
PYALIGN_HD Slope<F> logprob_slope(F logprob, F entropy, F row_entropy) {
    return {logprob, -logprob - weigh(entropy, row_entropy), -entropy, F(0)};
}

// d lse^2/dz_i = 2 lse q_i
template <class F>
PYALIGN_HD Slope<F> cross_entropy_slope(const LogprobRow<F>& row, F label_smoothing, F z_loss, F vocab) {
    return {label_smoothing - F(1), F(1) + F(2) * z_loss * row.log_sum_exp(), F(0), -label_smoothing / vocab};
}

PYALIGN_END
