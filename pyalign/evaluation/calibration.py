"""The calibration plot of preference models."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from pyalign._files import atomic_file
from pyalign._optional import require
from pyalign.scoring import PreferenceEvaluation


def plot_calibration(
    evaluations: PreferenceEvaluation | Mapping[Hashable, PreferenceEvaluation],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Any:
    """Accuracy against confidence, bin by bin, and how the pairs are spread over the bins.

    A calibrated model lies on the diagonal; one below it is overconfident. Bars are one standard error of a bin's
    accuracy.

    Args:
        evaluations: of :func:`pyalign.scoring.preference_metrics`; several under their names (models, or the ``slices``
            of one) are drawn together.
        path: where to write the figure, as PNG; None: nowhere.
        title: above the plot.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the extra ``pyalign[cli]`` brings it.
    """
    figure = require("matplotlib.figure").Figure(figsize=(5, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0.5, 1], [0.5, 1], color="#999", lw=1, ls="--", label="calibrated")
    named = {None: evaluations} if isinstance(evaluations, PreferenceEvaluation) else evaluations
    for name, evaluation in named.items():
        bins = evaluation.calibration
        edges, weights, confidence, accuracy = (
            x.tolist() for x in (bins.edges, bins.weight, bins.confidence, bins.accuracy)
        )
        total = sum(weights)
        effective = int(evaluation.pairs) / total if total > 0 else 0.0  # pairs per unit of weight
        points = [point for point in zip(confidence, accuracy, weights, strict=True) if point[2] > 0]
        errors = [(max(a * (1 - a), 0.0) / max(w * effective, 1.0)) ** 0.5 for _, a, w in points]
        label = f"ECE {float(evaluation.ece):.3f}, accuracy {float(evaluation.accuracy):.3f}"
        (line, *_) = upper.errorbar(
            [c for c, _, _ in points], [a for _, a, _ in points], errors, fmt="o-", ms=4, lw=1.2, elinewidth=0.8,
            label=label if name is None else f"{name}: {label}",
        )  # fmt: skip
        if total > 0:
            lower.stairs([w / total for w in weights], edges, color=line.get_color(), fill=len(named) == 1)
    upper.set(ylabel="accuracy", xlim=(0.5, 1), title=title)
    lower.set(xlabel="confidence max(p, 1 - p)", ylabel="share of pairs", ylim=(0, None))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend(frameon=False, fontsize="small")
    if path is not None:
        with atomic_file(Path(path)) as temporary:
            figure.savefig(temporary, format="png")
    return figure
