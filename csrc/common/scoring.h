// Win probabilities and what a pair of scores adds to a set's figures.
#pragma once

#include "common/ranking.h"
#include "common/scoring_args.h"

PYALIGN_BEGIN

// p = sigmoid(gap), gap = scale (s_i - s_j), and dp/dgap = p (1 - p), neither by subtraction.
template <class F>
struct Win {
    F p, slope;
};

template <class F>
PYALIGN_HD Win<F> win(F gap) {
    const LogisticParts<F> parts = logistic_parts(gap);
    return {parts.up, parts.up * parts.down};
}

// Of a pair with z = scale (chosen - rejected) - margin and p = sigmoid(z): whether it is right (a tie: a half) and a
// tie, -log p, (1 - p)^2 and max(p, 1 - p). All NaN where z is.
template <class F>
struct PairFigures {
    F right, tied, loss, brier, confidence;
};

template <class F>
PYALIGN_HD PairFigures<F> pair_figures(F z) {
    const Logistic<F> at = logistic(z);
    const F tied = z == z ? (z == F(0) ? F(1) : F(0)) : z;
    const F right = (z > F(0) ? F(1) : F(0)) + F(0.5) * tied;
    return {right, tied, at.cost, at.down * at.down, z > F(0) ? at.up : at.down};
}

// Bins cut [1/2, 1] into equal parts; a NaN has the one after the last.
template <class F>
PYALIGN_HD int64_t bin_of(F confidence, int64_t bins) {
    const F place = (confidence - F(0.5)) * F(2 * bins);
    return place < F(bins) ? int64_t(place) : place == place ? bins - 1 : bins;
}

PYALIGN_END
