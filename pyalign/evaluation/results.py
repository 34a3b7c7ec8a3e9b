"""What an evaluation came to, item by item: estimates per subset, and comparison with another run over the items."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyalign import _checks
from pyalign._options import OptionError
from pyalign.evaluation.estimates import Estimate, PairedDifference, mean_estimate, paired_difference
from pyalign.pair_scorer.output import read_output

OVERALL = "overall"


@dataclass(frozen=True)
class Evaluation:
    """Values of items, one array a metric, all in the same order.

    ``Evaluation.of({"accuracy": right}, ids=ids)`` makes one of whatever was measured per item.
    """

    values: Mapping[str, NDArray[np.float64]]
    """(n,) of each metric; NaN where it isn't defined for an item."""
    ids: tuple[str, ...]
    """What tells the items apart, the same in every run over them."""
    subsets: tuple[str | None, ...]
    """The group of each item."""

    def __post_init__(self) -> None:
        if OVERALL in self.subsets:
            _checks.refuse("subsets", repr(OVERALL), "other names: this one stands for all items")

    @classmethod
    def of(
        cls,
        values: Mapping[str, ArrayLike],
        *,
        ids: Sequence[str] | None = None,
        subsets: Sequence[str | None] | None = None,
    ) -> Evaluation:
        """One of plain values, (n,) of each metric.

        Args:
            values: by metric.
            ids: of the items; None: their numbers, for runs over the same items in the same order.
            subsets: of the items; None: no groups.

        Raises:
            ValueError: no metric; arguments of different lengths.
        """
        arrays = {name: np.asarray(x, np.float64) for name, x in values.items()}
        if not arrays:
            _checks.refuse("values", "no metric", "one or more")
        n = len(next(iter(arrays.values())))
        for name, x in arrays.items():
            if x.shape != (n,):
                _checks.refuse(f"values[{name!r}]", f"shape {x.shape}", f"({n},), one number an item")
        for name, x in (("ids", ids), ("subsets", subsets)):
            if x is not None and len(x) != n:
                _checks.refuse(name, f"{len(x)} entries", f"{n}, one an item")
        return Evaluation(
            arrays, tuple(map(str, range(n))) if ids is None else tuple(ids), tuple(subsets or (None,) * n)
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """The evaluation whose items ``pyalign eval --out`` has written to ``path``, JSONL or Parquet.

        Raises:
            OptionError: it is missing, or is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise OptionError("baseline", f"{path} is not a file")
        try:
            rows = list(read_output(path))
            ids, subsets = [row["id"] for row in rows], [row["subset"] for row in rows]
            names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
            values = {name: [_number(row["metrics"].get(name)) for row in rows] for name in names}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(
                "baseline", f"{path} holds no items of an evaluation; wanted what pyalign eval --out has written"
            ) from error
        return cls.of(values, ids=ids, subsets=subsets)

    def __len__(self) -> int:
        return len(self.ids)

    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Which items are in each subset, in order of appearance, after "overall"."""
        names = list(dict.fromkeys(name for name in self.subsets if name is not None))
        every = {OVERALL: np.ones(len(self), bool)}
        return every | {name: np.array([x == name for x in self.subsets]) for name in names}

    def estimate(self, metric: str, *, subset: str = OVERALL, level: float = 0.95) -> Estimate:
        """Mean of a metric with its standard error and interval (:func:`mean_estimate`).

        Raises:
            ValueError: no such metric or subset.
        """
        values, groups = self._values(metric), self.groups()
        _checks.one_of("subset", subset, tuple(groups))
        return mean_estimate(values[groups[subset]], proportion=_proportion(metric), level=level)

    def estimates(self, *, level: float = 0.95) -> dict[str, dict[str, Estimate]]:
        """By subset, "overall" first, and metric."""
        return {
            subset: {metric: self.estimate(metric, subset=subset, level=level) for metric in self.values}
            for subset in self.groups()
        }

    def compare(self, baseline: Evaluation, *, level: float = 0.95) -> Comparison:
        """What is better or worse here than in ``baseline``, item by item, per metric and subset.

        With a prompted or distilled model here and the plain one as the baseline, the differences are the **alignment
        tax** (Askell et al. 2021, arXiv 2112.00861), or bonus where they are positive.

        Raises:
            ValueError: the runs are over other items, or have no metric in common.
        """
        if baseline.ids != self.ids:
            same = len(set(self.ids) & set(baseline.ids))
            given = f"{len(baseline)} items of which {same} are among the {len(self)} here"
            _checks.refuse("baseline", given, "a run over the same items in the same order")
        common = [name for name in self.values if name in baseline.values]
        if not common:
            _checks.refuse("baseline", f"the metrics {', '.join(baseline.values)}", f"one of {', '.join(self.values)}")
        differences = {
            subset: {
                name: paired_difference(
                    self.values[name][inside], baseline.values[name][inside], proportion=_proportion(name), level=level
                )
                for name in common
            }
            for subset, inside in self.groups().items()
        }
        alone = [name for name in (*self.values, *baseline.values) if name not in common]
        return Comparison(differences, tuple(alone))

    def _values(self, metric: str) -> NDArray[np.float64]:
        _checks.one_of("metric", metric, tuple(self.values))
        return self.values[metric]


@dataclass(frozen=True)
class Comparison:
    """Of two runs over the same items."""

    differences: Mapping[str, Mapping[str, PairedDifference]]
    """By subset, "overall" first, and metric."""
    not_compared: tuple[str, ...]
    """Metrics that one of the runs alone has."""

    def __getitem__(self, metric: str) -> PairedDifference:
        """Over all items."""
        return self.differences[OVERALL][metric]


def alignment_tax(aligned: Evaluation, plain: Evaluation, *, level: float = 0.95) -> Comparison:
    """score(prompted or distilled) - score(plain) on the same items: :meth:`Evaluation.compare` under the paper's name.

    Where a higher value is better, negative is a tax and positive a bonus.
    """
    return aligned.compare(plain, level=level)


def row_of(evaluation: Evaluation, index: int) -> dict[str, Any]:
    """An item as ``pyalign eval`` writes it; values that aren't finite are None."""
    return {
        "index": index,
        "id": evaluation.ids[index],
        "subset": evaluation.subsets[index],
        "metrics": {name: finite(x[index]) for name, x in evaluation.values.items()},
    }


def rows_of(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for index in range(len(evaluation)):
        yield row_of(evaluation, index)


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _proportion(metric: str) -> bool | None:
    """Accuracies are proportions also where ties make them fractions."""
    return True if metric.rpartition("/")[2] == "accuracy" else None
