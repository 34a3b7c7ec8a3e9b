"""What scored rows come to: accuracy and calibration, the length baseline beside them, plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyalign._files import atomic_file
from pyalign._optional import require
from pyalign.evaluation.calibration import plot_calibration
from pyalign.pair_scorer.records import PAIR
from pyalign.scoring import PreferenceEvaluation, preference_metrics


class Tally:
    """The numbers of output rows that a summary is made of, taken in one by one."""

    def __init__(self, kind: str):
        self._kind = kind
        self.rows = self.unscored = 0
        self._columns: tuple[list[float], ...] = ([], [], [], [])  # scores and lengths of chosen and rejected
        self._categories: list[str | None] = []
        self._best: list[float] = []  # of each set: its highest score, its mean, whether the longest is the best
        self._mean: list[float] = []
        self._longest: list[float] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        if self._kind == PAIR:
            values = [row[f"{who}_{what}"] for what in ("score", "length") for who in ("chosen", "rejected")]
            if None in values:
                self.unscored += 1
                return
            for column, value in zip(self._columns, values, strict=True):
                column.append(value)
            self._categories.append(row.get("category"))
        elif None in row["scores"]:
            self.unscored += 1
        else:
            scores, lengths = row["scores"], row["lengths"]
            self._best.append(max(scores))
            self._mean.append(sum(scores) / len(scores))
            longest = [score for score, n in zip(scores, lengths, strict=True) if n == max(lengths)]
            self._longest.append(sum(score == max(scores) for score in longest) / len(longest))

    def figures(self, *, scale: float, bins: int) -> Figures:
        if self._kind != PAIR:
            means = [float(np.mean(x)) if x else None for x in (self._best, self._mean, self._longest)]
            return Figures(self.rows, self.unscored, None, None, dict(zip(_SETS, means, strict=True)), np.zeros((0, 2)))
        chosen, rejected, longer, shorter = (torch.tensor(x, dtype=torch.float64) for x in self._columns)
        slices = any(c is not None for c in self._categories)
        category = [str(c) for c in self._categories] if slices else None
        model = preference_metrics(chosen, rejected, scale=scale, bins=bins, category=category)
        baseline = preference_metrics(longer, shorter, category=category)
        gaps = torch.stack([chosen - rejected, longer - shorter], 1).numpy()
        return Figures(self.rows, self.unscored, model, baseline, {}, gaps)


_SETS = ("mean_best_score", "mean_score", "longest_is_best")


@dataclass
class Figures:
    rows: int
    unscored: int  # without a score: dropped, or not finite
    model: PreferenceEvaluation | None
    length_baseline: PreferenceEvaluation | None  # "the longer answer (in characters) is better"
    sets: dict[str, float | None]
    gaps: Any  # (P, 2) chosen minus rejected: scores, lengths

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {"rows": self.rows, "unscored": self.unscored, **self.sets}
        if self.model is not None and self.length_baseline is not None:
            result["metrics"] = self.model.to_dict()
            plain = self.length_baseline.to_dict()
            short = ("accuracy", "standard_error", "ties")
            result["length_baseline"] = {name: plain[name] for name in short}
            if "slices" in plain:
                parts = plain["slices"].items()
                result["length_baseline"]["slices"] = {key: {n: part[n] for n in short} for key, part in parts}
        return result

    def plot(self, out: Path, title: str) -> list[Path]:
        """Draw the calibration, and score gaps against length gaps; the paths of the figures."""
        if self.model is None or not len(self.gaps):
            return []
        calibration, gaps = (out.with_name(out.name + end) for end in (".calibration.png", ".gaps.png"))
        plot_calibration(self.model, calibration, title=title)
        self._plot_gaps(gaps, title)
        return [calibration, gaps]

    def _plot_gaps(self, path: Path, title: str) -> None:
        figure = require("matplotlib.figure").Figure(figsize=(8, 4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        scores, lengths = self.gaps[:, 0], self.gaps[:, 1]
        count = min(60, max(10, int(math.sqrt(len(scores)))))
        width = float(scores.max() - scores.min()) / count or 1.0
        edges = width * np.arange(np.floor(scores.min() / width), np.floor(scores.max() / width) + 2)  # 0 is one
        left.hist(scores[scores > 0], edges, color="#2a7", label="right")
        left.hist(scores[scores <= 0], edges, color="#c54", label="wrong")
        left.set(xlabel="score of chosen - rejected", ylabel="pairs", title=title)
        left.legend(frameon=False)
        right.hexbin(lengths, scores, gridsize=40, mincnt=1, bins="log", cmap="viridis")
        right.axhline(0, color="#999", lw=0.8)
        right.axvline(0, color="#999", lw=0.8)
        right.set(xlabel="length of chosen - rejected, characters", ylabel="score of chosen - rejected")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png")
