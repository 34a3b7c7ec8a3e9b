// The preference losses: closed forms of a margin z, a pair of scores or a score with a label, and their derivatives.
//
// Every form is stable wherever its value is representable: softplus(-z) = max(-z, 0) + log(1 + e^-|z|), sigmoids from
// the same e^-|z|, products of a large and a small exponential as the exponential of a sum.
#pragma once

#include "common/distill.h"
#include "common/ranking_args.h"

PYALIGN_BEGIN

// ---- Functions ----

template <class F>
PYALIGN_HD F absolute(F x) {
    return x < F(0) ? -x : x;
}

// log(1 + x) for x >= 0, given 1 / (1 + x). 1 + x rounds to u; the last term puts back what the rounding took.
PYALIGN_HD float log1p_nonnegative(float x, float inverse) {
#if defined(__CUDA_ARCH__)
    return ::log1pf(x);
#else
    const float u = 1.0f + x;
    return log_positive(u) + (x - (u - 1.0f)) * inverse;
#endif
}

PYALIGN_HD double log1p_nonnegative(double x, double) { return ::log1p(x); }

// log(1 + x) for 0 <= x <= 1, relative error 2e-7: a polynomial of half the length, fitted to log(1 + x) / x.
PYALIGN_HD float log1p_unit(float x) {
#if defined(__CUDA_ARCH__)
    return ::log1pf(x);
#else
    float y = -3.244013991e-3f;
    y = y * x + 1.985141262e-2f;
    y = y * x - 5.695943907e-2f;
    y = y * x + 1.060364544e-1f;
    y = y * x - 1.530558765e-1f;
    y = y * x + 1.967593729e-1f;
    y = y * x - 2.495413274e-1f;
    y = y * x + 3.332996368e-1f;
    y = y * x - 4.999990165e-1f;
    return (y * x + 1.0f) * x;
#endif
}

PYALIGN_HD double log1p_unit(double x) { return ::log1p(x); }

// e^x for any x; +inf above 88.7 (float) as it should be.
template <class F>
PYALIGN_HD F exp_any(F x) {
    const F half = exp_nonpositive(F(-0.5) * absolute(x)), inverse = F(1) / half;
    return x > F(0) ? inverse * inverse : exp_nonpositive(x > F(0) ? F(0) : x);
}

// What the logistic forms need of x: log(1 + e^-x) = base + log(1 + e), sigmoid(x) and sigmoid(-x), none by
// subtraction. `e` is in [0, 1]: where many are summed, log(1 + e) of each costs more than the product of 1 + e.
template <class F>
struct LogisticParts {
    F base, e, up, down;
};

template <class F>
PYALIGN_HD LogisticParts<F> logistic_parts(F x) {
    const F e = exp_nonpositive(-absolute(x)), inverse = F(1) / (F(1) + e), small = e * inverse;
    const bool positive = x > F(0);
    return {positive ? F(0) : -x, e, positive ? inverse : small, positive ? small : inverse};
}

template <class F>
struct Logistic {
    F cost, up, down;
};

template <class F>
PYALIGN_HD Logistic<F> logistic(F x) {
    const LogisticParts<F> parts = logistic_parts(x);
    return {log1p_unit(parts.e) + parts.base, parts.up, parts.down};
}

// ---- Forms of a margin ----

// A loss and its derivative in the margin.
template <class F>
struct Slope {
    F loss, slope;
};

// (1 - e) softplus(-z) + e softplus(z) = softplus(-z) + e z; Askell et al. 2021, Eq. 3.1, at e = 0.
template <class F>
struct LogisticForm {
    F smoothing;
    PYALIGN_HD Slope<F> operator()(F z) const {
        const Logistic<F> at = logistic(z);
        return {at.cost + weigh(smoothing, z), smoothing - at.down};
    }
};

// max(0, 1 - z); the derivative at z = 1 is 0.
template <class F>
struct HingeForm {
    PYALIGN_HD Slope<F> operator()(F z) const {
        const F gap = F(1) - z;
        return {gap < F(0) ? F(0) : gap, gap > F(0) ? F(-1) : gap <= F(0) ? F(0) : gap};
    }
};

// e^-z
template <class F>
struct ExponentialForm {
    PYALIGN_HD Slope<F> operator()(F z) const {
        const F e = exp_any(-z);
        return {e, -e};
    }
};

// ((1 - e) softplus(-z) - e softplus(z)) / (1 - 2e); Chowdhury et al. 2024 (arXiv 2403.00409).
template <class F>
struct RobustForm {
    F smoothing;
    PYALIGN_HD Slope<F> operator()(F z) const {
        const Logistic<F> at = logistic(z);
        const F by = F(1) / (F(1) - F(2) * smoothing);
        return {at.cost - weigh(smoothing, z) * by, -at.down - smoothing * by};
    }
};

// KL((q, 1 - q) || (1 - e, e)), q = sigmoid(z); Ji et al. 2024 (arXiv 2402.00856). dL/dz = q (1 - q) (z -
// log((1-e)/e)).
template <class F>
struct ExoForm {
    F smoothing, log_chosen, log_rejected;  // e, log(1 - e), log e
    PYALIGN_HD Slope<F> operator()(F z) const {
        const Logistic<F> at = logistic(z);
        const F chosen = log_chosen + at.cost, rejected = log_rejected + (at.cost + z);  // log p/q of the categories
        return {kl_term<true>(at.up, F(1) - smoothing, chosen) + kl_term<true>(at.down, smoothing, rejected),
                weigh(at.up * at.down, z - (log_chosen - log_rejected))};
    }
};

// softplus(-z) (1 - m) + e^-z m, m = sigmoid(z / tau); Lu et al. 2024 (arXiv 2406.08414). e^-z m is taken as
// e^(-z - softplus(-z / tau)).
template <class F>
struct DiscopopForm {
    F tau;
    PYALIGN_HD Slope<F> operator()(F z) const {
        const Logistic<F> at = logistic(z), mix = logistic(z / tau);
        const F power = exp_any(-z - mix.cost);
        return {at.cost * mix.down + power,
                -at.down * mix.down - at.cost * (mix.up * mix.down / tau) + power * (mix.down / tau - F(1))};
    }
};

// ---- Forms of an item ----

// A loss and its derivatives in both scores.
template <class F>
struct Item {
    F loss, first, second;
};

// z = scale (chosen - rejected) - margin
template <class F, class Form>
struct OfMargin {
    Form form;
    F scale;
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F margin) const {
        const Slope<F> at = form(scale * (chosen - rejected) - margin);
        return {at.loss, scale * at.slope, -scale * at.slope};
    }
};

// (chosen - rejected - margin - 1 / (2 scale))^2; Azar et al. 2023 (arXiv 2310.12036).
template <class F>
struct Ipo {
    F target;  // 1 / (2 scale)
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F margin) const {
        const F gap = chosen - rejected - margin - target;
        return {gap * gap, F(2) * gap, F(-2) * gap};
    }
};

// softplus(-u) + softplus(u) / 2 + softplus(v) / 2, u and v the scaled scores; Chen et al. 2024 (arXiv 2402.05369).
template <class F>
struct Nca {
    F scale;
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F) const {
        const Logistic<F> up = logistic(scale * chosen), against = logistic(-scale * chosen);
        const Logistic<F> down = logistic(-scale * rejected);
        return {up.cost + F(0.5) * (against.cost + down.cost), scale * (F(0.5) * up.up - up.down),
                scale * (F(0.5) * down.down)};
    }
};

// softplus(-(u - delta)) + softplus(v - delta); Jung et al. 2024 (arXiv 2404.04656).
template <class F>
struct Bco {
    F scale, delta;
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F) const {
        const Logistic<F> up = logistic(scale * chosen - delta), down = logistic(delta - scale * rejected);
        return {up.cost + down.cost, -scale * up.down, scale * down.down};
    }
};

// (chosen - t)^2 + (rejected + t)^2, t = 1 / (2 scale); Wu et al. 2024 (arXiv 2405.00675).
template <class F>
struct Sppo {
    F target;
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F) const {
        const F up = chosen - target, down = rejected + target;
        return {up * up + down * down, F(2) * up, F(2) * down};
    }
};

// sigmoid(-u) + sigmoid(v); D'Oosterlinck et al. 2024 (arXiv 2408.06266).
template <class F>
struct ApoZero {
    F scale;
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F) const {
        const Logistic<F> up = logistic(scale * chosen), down = logistic(scale * rejected);
        return {up.down + down.up, -scale * (up.up * up.down), scale * (down.up * down.down)};
    }
};

// sigmoid(u) + sigmoid(v - u); the same paper.
template <class F>
struct ApoDown {
    F scale;
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F) const {
        const Logistic<F> level = logistic(scale * chosen), gap = logistic(scale * (chosen - rejected));
        const F slope = scale * (gap.up * gap.down);
        return {level.up + gap.down, scale * (level.up * level.down) - slope, slope};
    }
};

// softplus(-(odds(chosen) - odds(rejected))), odds(x) = x - log(1 - e^x) of a mean log-prob x; Hong et al. 2024
// (arXiv 2403.07691). x counts as at most -2^-24, where 1 - e^x is still a number. The derivatives
// -sigmoid(-z) / (1 - e^x) are infinity times zero as x -> 0, so numerator and denominator are multiplied out.
template <class F>
struct OddsRatio {
    F scale;
    PYALIGN_HD static F miss(F x) { return -expm1_nonpositive(x); }  // 1 - e^x
    PYALIGN_HD Item<F> operator()(F chosen, F rejected, F) const {
        constexpr F kHighest = F(-5.9604644775390625e-08);
        const F c = chosen > kHighest ? kHighest : chosen, r = rejected > kHighest ? kHighest : rejected;
        const F miss_c = miss(c), miss_r = miss(r);
        const Logistic<F> at = logistic((c - r) + log_positive(miss_r / miss_c));
        const F top = c > r ? c : r, a = exp_nonpositive(c - top), b = exp_nonpositive(r - top);
        const F whole = a * miss_r + b * miss_c;
        return {scale * at.cost, -scale * (b / whole), scale * (b / whole) * (miss_c / miss_r)};
    }
};

// softplus(-x) for a positive label, softplus(x) for a negative one.
template <class F>
struct Binary {
    F scale;
    PYALIGN_HD Item<F> operator()(F score, F label, F) const {
        const F sign = label > F(0) ? scale : -scale;
        const Logistic<F> at = logistic(sign * score);
        return {at.cost, -sign * at.down, F(0)};
    }
};

// w sigmoid(-(u - kl)) for a desirable one, w sigmoid(u - kl) for an undesirable one, u the scaled log-ratio;
// Ethayarajh et al. 2024 (arXiv 2402.01306). The kl comes as the margin.
template <class F>
struct Kto {
    F scale, desirable, undesirable;
    PYALIGN_HD Item<F> operator()(F ratio, F label, F kl) const {
        const bool good = label > F(0);
        const F weight = good ? desirable : undesirable, sign = good ? scale : -scale;
        const Logistic<F> at = logistic(sign * (ratio - kl));
        return {weight * at.down, -(weight * sign) * (at.up * at.down), F(0)};
    }
};

// body(form) for the form that the options name.
template <class F, class Body>
PYALIGN_HD void with_form(const PairOptions& o, Body body) {
    const F scale = F(o.scale), smoothing = F(o.label_smoothing), target = F(0.5 / o.scale);
    switch (o.loss) {
        case PairLoss::kLogistic: return body(OfMargin<F, LogisticForm<F>>{{smoothing}, scale});
        case PairLoss::kHinge: return body(OfMargin<F, HingeForm<F>>{{}, scale});
        case PairLoss::kExponential: return body(OfMargin<F, ExponentialForm<F>>{{}, scale});
        case PairLoss::kIpo: return body(Ipo<F>{target});
        case PairLoss::kRobust: return body(OfMargin<F, RobustForm<F>>{{smoothing}, scale});
        case PairLoss::kExo:
            return body(OfMargin<F, ExoForm<F>>{{smoothing, F(o.log_chosen), F(o.log_rejected)}, scale});
        case PairLoss::kNca: return body(Nca<F>{scale});
        case PairLoss::kBco: return body(Bco<F>{scale, F(o.delta)});
        case PairLoss::kSppo: return body(Sppo<F>{target});
        case PairLoss::kApoZero: return body(ApoZero<F>{scale});
        case PairLoss::kApoDown: return body(ApoDown<F>{scale});
        case PairLoss::kDiscopop: return body(OfMargin<F, DiscopopForm<F>>{{F(o.tau)}, scale});
        case PairLoss::kOddsRatio: return body(OddsRatio<F>{scale});
        case PairLoss::kBinary: return body(Binary<F>{scale});
        case PairLoss::kKto: return body(Kto<F>{scale, F(o.positive_weight), F(o.negative_weight)});
    }
}

PYALIGN_END
