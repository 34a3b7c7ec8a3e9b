"""Means of evaluations with their sampling error, and differences of two runs over the same items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyalign import _checks


@dataclass(frozen=True)
class Estimate:
    """A mean over items that stand for many more of their kind."""

    value: float
    """Mean of the items; NaN of none."""
    n: int
    """How many items it is a mean of."""
    standard_error: float
    """Standard deviation of the items (divisor n - 1) / sqrt(n), as lm-eval's ``mean_stderr``; NaN of fewer than
    two."""
    lower: float
    upper: float
    """Of the interval."""

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.lower:.4f} to {self.upper:.4f}, n = {self.n})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is no finite number becomes None."""
        return plain(self)


@dataclass(frozen=True)
class PairedDifference:
    """How far one run is above another on the same items: mean of value - baseline."""

    value: float
    """Mean difference; NaN of no items."""
    mean: float
    """Of the run, over the items that have a value in both."""
    baseline: float
    """The same of the baseline."""
    n: int
    """How many items have a value in both runs."""
    standard_error: float
    """Standard deviation of the differences (divisor n - 1) / sqrt(n); NaN of fewer than two."""
    lower: float
    upper: float
    """Of the interval."""
    above: int
    """Items on which the run is above the baseline."""
    below: int
    """Items on which it is below."""
    p_value: float
    """Of the two-sided exact sign test over the items that differ; McNemar's exact test where items are 0 or 1."""

    def __str__(self) -> str:
        spread = f"{self.lower:+.4f} to {self.upper:+.4f}, n = {self.n}"
        return f"{self.value:+.4f} ({spread}, {self.above} above, {self.below} below, p = {self.p_value:.3g})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is no finite number becomes None."""
        return plain(self)


def plain(x: Estimate | PairedDifference) -> dict[str, Any]:
    """Its fields; None for what isn't finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(x).items()}


def wilson_interval(successes: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion by inverting the score test (Wilson 1927).

    With p = successes / n and z the normal quantile of (1 + level) / 2:

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays within [0, 1], and has a width where all items agree.

    Args:
        successes: how many of the n; a tie may count a part of one, which makes the interval wider than need be.
        n: 0 gives (0, 1).
        level: between 0 and 1.

    Raises:
        ValueError: an argument out of range.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        _checks.refuse("n", repr(n), "an int >= 0")
    if not 0 <= successes <= n:
        _checks.refuse("successes", successes, f"a number from 0 to n, {n}")
    z = _quantile(level)
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    center, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    lower, upper = ((center + side) / (1 + z * z / n) for side in (-spread, spread))
    # At the ends the two terms cancel but for rounding.
    return (0.0 if successes == 0 else lower, 1.0 if successes == n else upper)


def mean_estimate(values: ArrayLike, *, proportion: bool | None = None, level: float = 0.95) -> Estimate:
    """Mean of items with its standard error and interval.

    Args:
        values: (n,) numbers; an item that is NaN has no value and is left out.
        proportion: whether the interval is Wilson's, of items within [0, 1] that are right or wrong (or tied);
            otherwise it is value -+ z standard errors, which is too narrow for few items. None: Wilson's where every
            item is 0 or 1.
        level: of the interval, between 0 and 1.

    Raises:
        ValueError: values of another shape; a proportion out of [0, 1]; ``level`` out of range.
    """
    x = _counted("values", values)
    z, n = _quantile(level), len(x)
    if proportion is None:
        proportion = bool(np.isin(x, (0.0, 1.0)).all())
    if proportion and not ((x >= 0) & (x <= 1)).all():
        _checks.refuse("values", f"{x.min()} to {x.max()}", "numbers from 0 to 1, of a proportion")
    if n == 0:
        return Estimate(math.nan, 0, math.nan, *((0.0, 1.0) if proportion else (math.nan, math.nan)))
    value, error = _mean(x), _standard_error(x)
    if proportion:
        return Estimate(value, n, error, *wilson_interval(min(max(math.fsum(x), 0.0), n), n, level=level))
    return Estimate(value, n, error, value - z * error, value + z * error)


def paired_difference(
    values: ArrayLike, baseline: ArrayLike, *, proportion: bool | None = None, level: float = 0.95
) -> PairedDifference:
    """Mean of values - baseline over the same items, which says more than two separate intervals: what items have in
    common cancels.

    The **alignment tax** of Askell et al. 2021 (arXiv 2112.00861) is this, with the scores of a prompted or distilled
    model as ``values`` and those of the plain one as ``baseline``: negative where alignment costs something.

    Args:
        values, baseline: (n,) numbers, item by item; items that are NaN in either are left out.
        proportion: whether items lie within [0, 1] and are right or wrong (or tied). Then the interval is the adjusted
            one of Bonett and Price 2012: with b the sum of what is gained where the run is better, c of what is lost
            where it is worse, p = (b + 1) / (n + 2) and q = (c + 1) / (n + 2), it is

                p - q -+ z sqrt((p + q - (p - q)^2) / (n + 2)),

            cut to [-1, 1]: it has a width where no item differs. Otherwise: value -+ z standard errors, too narrow for
            few items. None: the former where every item is 0 or 1.
        level: of the interval, between 0 and 1.

    Raises:
        ValueError: arguments of other shapes than said; a proportion out of [0, 1]; ``level`` out of range.
    """
    x, y = _vector("values", values), _vector("baseline", baseline)
    if x.shape != y.shape:
        _checks.refuse("baseline", f"{len(y)} items", f"{len(x)}, those of values in their order")
    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    z, n = _quantile(level), len(x)
    if proportion is None:
        proportion = bool(np.isin((x, y), (0.0, 1.0)).all())
    for name, side in (("values", x), ("baseline", y)):
        if proportion and not ((side >= 0) & (side <= 1)).all():
            _checks.refuse(name, f"{side.min()} to {side.max()}", "numbers from 0 to 1, of a proportion")
    with np.errstate(invalid="ignore"):  # infinite on both sides
        difference = x - y
    above, below = int((difference > 0).sum()), int((difference < 0).sum())
    value, error = _mean(difference), _standard_error(difference)
    if proportion:
        gained, lost = (math.fsum(side[side > 0]) for side in (difference, -difference))
        p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
        spread = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
        lower, upper = max(p - q - spread, -1.0), min(p - q + spread, 1.0)
    else:
        lower, upper = value - z * error, value + z * error
    p_value = sign_test(above, below)
    return PairedDifference(value, _mean(x), _mean(y), n, error, lower, upper, above, below, p_value)


def sign_test(above: int, below: int) -> float:
    """Two-sided exact p-value of above against below, if an item that differs were equally likely to do either.

        min(1, 2 P(X <= min(above, below))),  X binomial(above + below, 1/2)

    On items that are right or wrong it is McNemar's exact test. Items that don't differ don't count.

    Raises:
        ValueError: a negative number.
    """
    if min(above, below) < 0:
        _checks.refuse("above, below", f"{above}, {below}", "numbers >= 0")
    n, fewer = above + below, min(above, below)
    if 2 * fewer >= n - 1:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(fewer + 1)]
    largest = max(logs)
    tail = math.log(math.fsum(math.exp(x - largest) for x in logs)) + largest - n * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k completions drawn from n, of which c are right, is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), as the product 1 - prod_{i = n-c+1}^{n} (1 - k / i),
    whose factors neither overflow nor cancel.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= c <= n:
        _checks.refuse("c", c, f"a number from 0 to n, {n}")
    if not 1 <= k <= n:
        _checks.refuse("k", k, f"a number from 1 to n, {n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def _quantile(level: float) -> float:
    if not (isinstance(level, (int, float)) and 0 < level < 1):
        _checks.refuse("level", repr(level), "a number between 0 and 1")
    return NormalDist().inv_cdf((1 + level) / 2)


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, np.float64)
    if x.ndim != 1:
        _checks.refuse(name, f"shape {x.shape}", "(n,), one number an item")
    return x


def _counted(name: str, values: ArrayLike) -> NDArray[np.float64]:
    x = _vector(name, values)
    return x[~np.isnan(x)]


def _mean(x: NDArray[np.float64]) -> float:
    if not np.isfinite(x).all():
        with np.errstate(invalid="ignore"):
            return float(x.mean())
    return math.fsum(x) / len(x) if len(x) else math.nan


def _standard_error(x: NDArray[np.float64]) -> float:
    if len(x) < 2 or not np.isfinite(x).all():
        return math.nan
    return float(np.std(x, ddof=1)) / math.sqrt(len(x))
