// The distillation losses: divergences between softmax distributions, as fold, merge, map.
//
//   p = softmax(teacher / T), q = softmax(student / T), d_i = log q_i - log p_i.
//
//   1. fold    each row of logits into a Softmax state (running max, rescaled sum); `merge` joins states of lanes,
//              warps, clusters, tiles or ranks. Two finished states make a Pair, which maps logits to Points.
//   2. sum     each Point's term into Sums, which add.
//   3. map     each Point, given the Sums, into the derivative of the loss with respect to (student logit / T).
//
// Terms are written so that every one is >= 0 and small where p and q are close: a KL is a sum of p (e^d - 1 - d),
// because sum p e^d = sum q = 1 = sum p. So a loss near convergence is neither negative nor rounding noise.
//
// Conventions at the edges: p = q = 0 contributes nothing; p > 0 = q makes a forward KL +inf with the gradient q - p;
// a row whose logits are all -inf, or hold +inf or NaN, has NaN sums.
#pragma once

#include "common/distill_args.h"
#include "common/math.h"

PYALIGN_BEGIN

// sum_i exp((x_i - max) / T) over the logits folded so far. The empty state is {lowest, 0}.
template <class F>
struct Softmax {
    F max = std::numeric_limits<F>::lowest();
    F sum = F(0);
};

// The factor that brings a sum taken at `from` to the max `to` >= from.
template <class F>
PYALIGN_HD F rescale(F from, F to, F inverse_temperature) {
    return exp_nonpositive((from - to) * inverse_temperature);
}

template <class F>
PYALIGN_HD Softmax<F> merge(Softmax<F> a, Softmax<F> b, F inverse_temperature) {
    const F max = a.max > b.max ? a.max : b.max;
    return {max, a.sum * rescale(a.max, max, inverse_temperature) + b.sum * rescale(b.max, max, inverse_temperature)};
}

template <class F>
PYALIGN_HD Softmax<F> fold(Softmax<F> state, F logit, F inverse_temperature) {
    return merge(state, Softmax<F>{logit, logit == logit ? F(1) : logit}, inverse_temperature);
}

// One vocabulary entry: the teacher's and student's probability, and d = log q - log p. Where both are 0, d may be NaN:
// the divergences let a probability of 0 weigh nothing.
template <class F>
struct Point {
    F p, q, d;
};

// What two finished states say about every entry of their rows.
template <class F>
struct Pair {
    F student_max, student_scale;  // q = exp((s - student_max) / T) * student_scale
    F teacher_max, teacher_scale;
    F student_origin, teacher_origin, log_ratio;  // d = ((s - student_origin) - (t - teacher_origin)) / T - log_ratio
    F inverse_temperature;

    PYALIGN_HD Point<F> at(F student, F teacher) const {
        return with(exp_nonpositive((student - student_max) * inverse_temperature),
                    exp_nonpositive((teacher - teacher_max) * inverse_temperature), student, teacher);
    }

    // The same from e^((s - student_max) / T) and e^((t - teacher_max) / T), for engines with an exponential of their
    // own.
    PYALIGN_HD Point<F> with(F student_exp, F teacher_exp, F student, F teacher) const {
        return {teacher_exp * teacher_scale, student_exp * student_scale,
                ((student - student_origin) - (teacher - teacher_origin)) * inverse_temperature - log_ratio};
    }
};

// Max and sum stay apart: the difference of two log-sum-exps would carry the rounding of the logits' level. Where the
// two rows lie on one level, s - t is subtracted first and is nearly exact; where they don't, each row's max goes
// first.
template <class F, class A>
PYALIGN_HD Pair<F> finish(Softmax<A> student, Softmax<A> teacher, A inverse_temperature) {
    const A ratio = log_positive(student.sum / teacher.sum);
    const A level = (student.max - teacher.max) * inverse_temperature + ratio;
    const bool together = (level < A(0) ? -level : level) <= A(1);
    return {F(student.max),
            F(A(1) / student.sum),
            F(teacher.max),
            F(A(1) / teacher.sum),
            together ? F(0) : F(student.max),
            together ? F(0) : F(teacher.max),
            F(together ? level : ratio),
            F(inverse_temperature)};
}

// Sums over a row. `aux` is what the map needs to know of the whole row beside the loss.
template <class F>
struct Sums {
    F loss = F(0), aux = F(0);
};

template <class F>
PYALIGN_HD Sums<F> operator+(Sums<F> a, Sums<F> b) {
    return {a.loss + b.loss, a.aux + b.aux};
}

// x y with 0 * inf = 0: a probability of zero weighs nothing.
template <class F>
PYALIGN_HD F weigh(F probability, F value) {
    return probability == F(0) ? F(0) : probability * value;
}

// q - p = p (e^d - 1). kNear: from the series where the two are close, without cancellation.
template <bool kNear, class F>
PYALIGN_HD F probability_gap(Point<F> x) {
    const F far = x.q - x.p;
    if (!kNear) return far;
    const F near = x.p * x.d + x.p * phi_series(x.d);
    return in_series(x.d) ? near : far;
}

// weight (e^x - 1 - x) for the point where weight e^x = `weighted`: the summand of a KL.
template <bool kNear, class F>
PYALIGN_HD F kl_term(F weight, F weighted, F x) {
    const F far = (weighted - weight) - weigh(weight, x);
    if (!kNear) return far;
    const F near = weight * phi_series(x);
    return in_series(x) ? near : far;
}

// Closed forms err by 1e-7 of the row's mass. Where a row's loss is above this, that is no more than its own rounding,
// and an engine may take a divergence's Far form; every term is >= 0, so a part of the row's terms shows it.
template <class F>
constexpr F kFarLoss = F(0.0625);

// Each divergence D(p, q) = sum f(p, q) has
//   term   its summand in the non-negative form, and the row's aux (masses of p and q must each sum to 1);
//   slope  dD/d(logit / T) of an entry, given the row's Sums. Where it needs them it is q (g - sum q g), and an engine
//          that can keep a number per entry may take `pull`, which is g up to a constant, before it has the Sums;
//   plain  f(p, q) itself, and flow, q df/dq: for partial sums over some of the categories, whose gradient is
//          flow_i - q_i sum_j flow_j.
// kMapNeedsSums says whether `slope` reads the Sums; `far` is the form without series, see kFarLoss.

// KL(p || q) = sum p (log p - log q);  dD/dz = q - p.
template <class F, bool kNear = true>
struct ForwardKL {
    using Far = ForwardKL<F, false>;
    PYALIGN_HD Far far() const { return {}; }
    static constexpr bool kMapNeedsSums = false;
    PYALIGN_HD Sums<F> term(Point<F> x) const { return {kl_term<kNear>(x.p, x.q, x.d), F(0)}; }
    PYALIGN_HD F slope(Point<F> x, Sums<F>) const { return probability_gap<kNear>(x); }
    PYALIGN_HD F plain(Point<F> x) const { return -weigh(x.p, x.d); }
    PYALIGN_HD F flow(Point<F> x) const { return -x.p; }
};

// KL(q || p) = sum q (log q - log p);  dD/dz = q (d - D).
template <class F, bool kNear = true>
struct ReverseKL {
    using Far = ReverseKL<F, false>;
    PYALIGN_HD Far far() const { return {}; }
    static constexpr bool kMapNeedsSums = true;
    PYALIGN_HD Sums<F> term(Point<F> x) const { return {kl_term<kNear>(x.q, x.p, -x.d), F(0)}; }
    PYALIGN_HD F pull(Point<F> x) const { return x.d; }
    PYALIGN_HD F slope(F q, F pull, Sums<F> row) const { return weigh(q, pull) - q * row.loss; }
    PYALIGN_HD F slope(Point<F> x, Sums<F> row) const { return slope(x.q, pull(x), row); }
    PYALIGN_HD F plain(Point<F> x) const { return weigh(x.q, x.d); }
    PYALIGN_HD F flow(Point<F> x) const { return weigh(x.q, x.d + F(1)); }
};

// Series around d = 0 of log m/q and of (beta p log p/m + (1 - beta) q log q/m) / p, which is of the order of d^2.
// log m/p = log(beta + (1 - beta) e^d) generates the cumulants of a coin that shows the student with 1 - beta; the
// derivative of the other is (1 - beta) e^d (d - log m/p).
template <class F>
struct MixtureSeries;

// Relative 1e-8 for |d| < 1/4.
template <>
struct MixtureSeries<float> {
    float log_ratio_of[6], loss_of[6];  // of d, d^2, ...; of d^2, d^3, ...

    PYALIGN_HD explicit MixtureSeries(float beta) {
        const float student = 1.0f - beta, k2 = beta * student, k3 = k2 * (beta - student);
        const float k4 = k2 * (1.0f - 6.0f * k2), k5 = k3 * (1.0f - 12.0f * k2);
        const float k6 = k2 * (1.0f - 30.0f * k2 + 120.0f * k2 * k2);
        const float log_ratio[6] = {-beta, k2 / 2, k3 / 6, k4 / 24, k5 / 120, k6 / 720};
        const float slope[6] = {beta,  // of e^d (d - log m/p)
                                beta - k2 / 2,
                                beta / 2 - k2 / 2 - k3 / 6,
                                beta / 6 - k2 / 4 - k3 / 6 - k4 / 24,
                                beta / 24 - k2 / 12 - k3 / 12 - k4 / 24 - k5 / 120,
                                beta / 120 - k2 / 48 - k3 / 36 - k4 / 48 - k5 / 120 - k6 / 720};
        for (int i = 0; i < 6; ++i) {
            log_ratio_of[i] = log_ratio[i];
            loss_of[i] = student * slope[i] / float(i + 2);
        }
    }
    PYALIGN_HD static float horner(const float (&of)[6], float d) {
        float y = of[5];
        for (int i = 4; i >= 0; --i) y = y * d + of[i];
        return y;
    }
    // log((1 - weight) + weight e^distance), distance <= 0: what `log_ratio` replaces where it is small.
    PYALIGN_HD static float log_mixture(float weight, float distance) {
        return log_unit((1.0f - weight) + weight * exp_unit(distance));
    }
    PYALIGN_HD float log_ratio(float d, float) const { return horner(log_ratio_of, d) * d; }
    PYALIGN_HD float loss(Point<float> x, float, float) const { return x.p * (horner(loss_of, x.d) * (x.d * x.d)); }
};

// The library's log1p and expm1 are exact near 0, and each KL has its own series.
template <>
struct MixtureSeries<double> {
    double beta;

    PYALIGN_HD explicit MixtureSeries(double beta) : beta(beta) {}
    PYALIGN_HD static double log_mixture(double weight, double distance) {
        return log1p_nonpositive(weight * expm1_nonpositive(distance));
    }
    PYALIGN_HD double log_ratio(double, double m_over_q) const { return m_over_q; }
    PYALIGN_HD double loss(Point<double> x, double m_over_p, double m_over_q) const {
        return beta * (x.p * phi_series(m_over_p)) + (1.0 - beta) * (x.q * phi_series(m_over_q));
    }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q;  dD/dz = (1 - beta) q (log q/m - KL(q || m)).
// The mixture lives in log space: log m/p = log(beta + (1 - beta) e^d), taken from the larger of p and q.
template <class F, bool kNear = true>
struct JensenShannon {
    using Far = JensenShannon<F, false>;
    static constexpr bool kMapNeedsSums = true;
    F beta;
    MixtureSeries<F> series;

    PYALIGN_HD JensenShannon(F beta) : beta(beta), series(beta) {}
    PYALIGN_HD Far far() const { return {beta}; }

    struct Mixture {
        F m_over_p, m_over_q;  // log m/p, log m/q
    };
    PYALIGN_HD Mixture mixture(Point<F> x) const {
        const bool student_larger = x.d > F(0);
        const F distance = student_larger ? -x.d : x.d;  // -|d|, NaN stays
        const F weight = student_larger ? beta : F(1) - beta;
        const F log_m = MixtureSeries<F>::log_mixture(weight, distance);  // log m / max(p, q)
        const F m_over_p = log_m + (student_larger ? x.d : F(0)), m_over_q = log_m - (student_larger ? F(0) : x.d);
        if (!kNear) return {m_over_p, m_over_q};
        const F near = series.log_ratio(x.d, m_over_q);
        return {in_series(x.d) ? near + x.d : m_over_p, in_series(x.d) ? near : m_over_q};
    }
    PYALIGN_HD Sums<F> term(Point<F> x) const {
        const Mixture mix = mixture(x);
        const F student = weigh(x.q, -mix.m_over_q), far = beta * weigh(x.p, -mix.m_over_p) + (F(1) - beta) * student;
        if (!kNear) return {far, student};
        const F near = series.loss(x, mix.m_over_p, mix.m_over_q);
        return {in_series(x.d) ? near : far, student};
    }
    PYALIGN_HD F pull(Point<F> x) const { return mixture(x).m_over_q; }
    PYALIGN_HD F slope(F q, F pull, Sums<F> row) const { return (beta - F(1)) * (weigh(q, pull) + q * row.aux); }
    PYALIGN_HD F slope(Point<F> x, Sums<F> row) const { return slope(x.q, pull(x), row); }
    PYALIGN_HD F plain(Point<F> x) const {
        const Mixture mix = mixture(x);
        return -beta * weigh(x.p, mix.m_over_p) - (F(1) - beta) * weigh(x.q, mix.m_over_q);
    }
    PYALIGN_HD F flow(Point<F> x) const { return (beta - F(1)) * weigh(x.q, mixture(x).m_over_q); }
};

// 1/2 sum |p - q|;  dD/dz = q (g - sum q g), g = 1/2 sign(q - p), sign(0) = 0.
template <class F, bool kNear = true>
struct TotalVariation {
    using Far = TotalVariation<F, false>;
    PYALIGN_HD Far far() const { return {}; }
    static constexpr bool kMapNeedsSums = true;
    PYALIGN_HD F plain(Point<F> x) const {
        const F gap = probability_gap<kNear>(x);
        return F(0.5) * (gap < F(0) ? -gap : gap);
    }
    PYALIGN_HD F pull(Point<F> x) const {
        const F gap = probability_gap<kNear>(x);
        return gap > F(0) ? F(0.5) : gap < F(0) ? F(-0.5) : F(0) * gap;
    }
    PYALIGN_HD F flow(Point<F> x) const { return x.q * pull(x); }
    PYALIGN_HD Sums<F> term(Point<F> x) const { return {plain(x), flow(x)}; }
    PYALIGN_HD F slope(F q, F pull, Sums<F> row) const { return q * pull - q * row.aux; }
    PYALIGN_HD F slope(Point<F> x, Sums<F> row) const { return slope(x.q, pull(x), row); }
};

// body(the divergence of this kind): the one place where a kind becomes a type. The host calls it with lambdas of its
// own, which nvcc would warn of.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F, class Body>
PYALIGN_HD auto with_divergence(Divergence kind, F beta, Body body) {
    switch (kind) {
        case Divergence::kForwardKL: return body(ForwardKL<F>{});
        case Divergence::kReverseKL: return body(ReverseKL<F>{});
        case Divergence::kJensenShannon: return body(JensenShannon<F>{beta});
        case Divergence::kTotalVariation: return body(TotalVariation<F>{});
    }
    __builtin_unreachable();
}

// log(1 - e^x) for x <= 0: the log of the mass that log-probabilities with log-sum x leave over.
PYALIGN_HD double log1mexp(double x) { return x > -0.6931471805599453 ? ::log(-::expm1(x)) : ::log1p(-::exp(x)); }
PYALIGN_HD float log1mexp(float x) { return x > -0.69314718f ? ::logf(-::expm1f(x)) : ::log1pf(-::expf(x)); }

PYALIGN_END
