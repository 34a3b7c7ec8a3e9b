"""Calibration: of choices by their probabilities, and the plot of it, for preference models too."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyalign import _checks
from pyalign._files import atomic_file
from pyalign._optional import require
from pyalign.evaluation.choices import choice_metrics, highest_probability
from pyalign.scoring import CalibrationBins, PreferenceEvaluation


@dataclass(frozen=True)
class ChoiceCalibration:
    """What :func:`choice_calibration` says of a set of questions."""

    questions: int
    """How many count."""
    accuracy: float
    """Share of them whose most probable choice is right; NaN of none."""
    ece: float
    """Expected calibration error: the mean distance of accuracy and confidence over bins, weighted by their
    questions."""
    calibration: CalibrationBins
    """Its edges run from 0 to 1."""


def choice_calibration(
    scores: Sequence[Sequence[float]], targets: Sequence[Sequence[bool]], *, bins: int = 10
) -> ChoiceCalibration:
    """How often the most probable choice is right, by its probability max softmax(scores) (Guo et al. 2017, arXiv
    1706.04599).

    The expected calibration error is sum_b n_b / n |accuracy_b - confidence_b| over bins of equal width of [0, 1]. It
    is an estimate that lies too high, the more so the fewer questions there are in a bin.

    Args:
        scores: of each question's choices; a question with one that is NaN doesn't count.
        targets: which of them are right; k that share the highest score count 1/k each.
        bins: how many, >= 1.

    Raises:
        ValueError: as :func:`choice_metrics`; ``bins`` out of range.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        _checks.refuse("bins", repr(bins), "an int >= 1")
    right = choice_metrics(scores, targets)["accuracy"]
    confidence = np.array([highest_probability(row) for row in scores], np.float64)
    counted = ~np.isnan(right)
    right, confidence = right[counted], confidence[counted]
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    weight, sums, hits = (
        np.bincount(place, weights=x, minlength=bins) for x in (np.ones_like(right), confidence, right)
    )
    with np.errstate(invalid="ignore"):  # of empty bins
        points = CalibrationBins(
            torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64),
            *map(torch.from_numpy, (weight, sums / weight, hits / weight)),
        )
    n = len(right)
    ece = float(np.abs(hits - sums).sum()) / n if n else math.nan
    return ChoiceCalibration(n, float(right.mean()) if n else math.nan, ece, points)


def plot_calibration(
    evaluations: PreferenceEvaluation | ChoiceCalibration | Mapping[Hashable, PreferenceEvaluation | ChoiceCalibration],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Any:
    """Accuracy against confidence, bin by bin, and how the pairs (or questions) are spread over the bins.

    A calibrated model lies on the diagonal; one below it is overconfident. Bars are one standard error of a bin's
    accuracy.

    Args:
        evaluations: of :func:`pyalign.scoring.preference_metrics` or :func:`choice_calibration`; several under their
            names (models, or the ``slices`` of one) are drawn together.
        path: where to write the figure, as PNG; None: nowhere.
        title: above the plot.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the extra ``pyalign[cli]`` brings it.
    """
    figure = require("matplotlib.figure").Figure(figsize=(5, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    named = {None: evaluations} if isinstance(evaluations, (PreferenceEvaluation, ChoiceCalibration)) else evaluations
    pairs = all(isinstance(x, PreferenceEvaluation) for x in named.values())
    lowest = 0.5 if pairs else 0.0
    upper.plot([lowest, 1], [lowest, 1], color="#999", lw=1, ls="--", label="calibrated")
    for name, evaluation in named.items():
        bins = evaluation.calibration
        edges, weights, confidence, accuracy = (
            x.tolist() for x in (bins.edges, bins.weight, bins.confidence, bins.accuracy)
        )
        total = sum(weights)
        count = evaluation.pairs if isinstance(evaluation, PreferenceEvaluation) else evaluation.questions
        effective = int(count) / total if total > 0 else 0.0  # pairs per unit of weight
        points = [point for point in zip(confidence, accuracy, weights, strict=True) if point[2] > 0]
        errors = [(max(a * (1 - a), 0.0) / max(w * effective, 1.0)) ** 0.5 for _, a, w in points]
        label = f"ECE {float(evaluation.ece):.3f}, accuracy {float(evaluation.accuracy):.3f}"
        (line, *_) = upper.errorbar(
            [c for c, _, _ in points], [a for _, a, _ in points], errors, fmt="o-", ms=4, lw=1.2, elinewidth=0.8,
            label=label if name is None else f"{name}: {label}",
        )  # fmt: skip
        if total > 0:
            lower.stairs([w / total for w in weights], edges, color=line.get_color(), fill=len(named) == 1)
    upper.set(ylabel="accuracy", xlim=(lowest, 1), title=title)
    xlabel, ylabel = ("max(p, 1 - p)", "pairs") if pairs else ("max p", "questions")
    lower.set(xlabel=f"confidence {xlabel}", ylabel=f"share of {ylabel}", ylim=(0, None))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend(frameon=False, fontsize="small")
    if path is not None:
        with atomic_file(Path(path)) as temporary:
            figure.savefig(temporary, format="png")
    return figure
