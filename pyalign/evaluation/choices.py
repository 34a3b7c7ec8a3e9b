"""Scores of choices into accuracy, probability and log-loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyalign import _checks

TIES = ("split", "first")


def choice_metrics(
    scores: Sequence[Sequence[float]], targets: Sequence[Sequence[bool]], *, ties: str = "split"
) -> dict[str, NDArray[np.float64]]:
    """``accuracy``, ``probability``, ``log_loss`` and ``brier`` of each question, (n,) float64, by its choices' scores.

    See :func:`evaluate_multiple_choice`. A question with a score that is NaN is NaN everywhere. Sums run in log space,
    so that scores of any size serve.

    Raises:
        ValueError: not as many targets as scores, or none of them right.
    """
    _checks.one_of("ties", ties, TIES)
    if len(scores) != len(targets):
        _checks.refuse("targets", f"{len(targets)} questions", f"{len(scores)}, as many as scores")
    result = {name: np.full(len(scores), math.nan) for name in ("accuracy", "probability", "log_loss", "brier")}
    for i, (row, right) in enumerate(zip(scores, targets, strict=True)):
        s, r = np.asarray(row, np.float64), np.asarray(right, bool)
        if s.shape != r.shape or not r.any():
            _checks.refuse(f"targets[{i}]", list(right), f"{len(s)}, one per choice, of which some are right")
        if np.isnan(s).any():
            continue
        highest = s == s.max()
        result["accuracy"][i] = r[highest].mean() if ties == "split" else r[highest.argmax()]
        logs = _log_softmax(s)
        mass = _log_sum(logs[r])
        result["probability"][i], result["log_loss"][i] = math.exp(mass), -mass if mass else 0.0
        if r.sum() == 1:
            result["brier"][i] = float(np.square(np.exp(logs) - r).sum())
    return result


def highest_probability(scores: Sequence[float]) -> float:
    """max softmax(scores); NaN where one of them is."""
    s = np.asarray(scores, np.float64)
    return math.nan if np.isnan(s).any() else math.exp(_log_softmax(s).max())


def _log_softmax(s: NDArray[np.float64]) -> NDArray[np.float64]:
    if s.max() == -math.inf:  # nothing is known of them
        return np.full(len(s), -math.log(len(s)))
    return s - _log_sum(s)


def _log_sum(x: NDArray[np.float64]) -> float:
    largest = float(x.max())
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(np.exp(x - largest)))
