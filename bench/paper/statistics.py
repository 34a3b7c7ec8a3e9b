"""Means with intervals over seeds, and slopes against log parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyalign._optional import require

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over ``n`` independent seeds with its t interval, mean +- t_{(1 + LEVEL) / 2, n - 1} * sd / sqrt(n)."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def told(self) -> str:
        """A difference in words: what its interval says of its sign."""
        sign = "above 0" if self.low > 0 else "below 0" if self.high < 0 else "not told from 0"
        return f"{self}, {sign}"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one figure per seed; from one seed there is no interval, and its ends are NaN."""
    n = len(values)
    if n == 0:
        raise ValueError("values: got none; wanted a figure per seed")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = float(require("scipy.stats", extra="dev").t.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of first - second, seed by seed: both share what a seed settles (task, data), which cancels."""
    return mean_interval([a - b for a, b in zip(first, second, strict=True)])


class Fit(NamedTuple):
    """accuracy = intercept + slope * log10(parameters): each seed's least squares line, means with t intervals."""

    slope: Interval
    intercept: Interval


def fit_log(parameters: Sequence[float], accuracies: Sequence[Sequence[float]]) -> Fit:
    """``accuracies`` has a row for each seed, as long as ``parameters``."""
    lines = [np.polyfit(np.log10(parameters), row, 1) for row in accuracies]
    return Fit(mean_interval([float(line[0]) for line in lines]), mean_interval([float(line[1]) for line in lines]))
