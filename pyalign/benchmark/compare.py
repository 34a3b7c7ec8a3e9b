"""Whether our ways got slower or faster since an earlier run, as far as the noise lets one tell.

The ratio of medians has a bootstrap interval over the rounds of both runs. What torch and the yardsticks took in the
same rounds tells how the machine itself drifted between the runs. A verdict needs both intervals, of the plain ratio
and of the ratio over the drift, beyond the tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyalign._options import OptionError
from pyalign.benchmark import results
from pyalign.benchmark.results import Row, Run

RESAMPLES = 2000
WORSE = ("slower", "less accurate", "fails now")


@dataclass(frozen=True)
class Verdict:
    case: str
    way: str
    verdict: str
    """slower, faster, same or unclear; less accurate; fails now, works now, fails still; new, gone or not run."""
    ratio: float | None = None
    """Time now over time then."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the ratio over the machine's drift (of the plain ratio where nothing tells the drift)."""
    drift: float | None = None
    """What others' time did, the geometric mean."""


def load(path: Path, option: str, machine: dict[str, Any], *, keep_memory: bool) -> Run:
    """The earlier run that the file holds. One of another machine says nothing about the code, nor does one where
    freed memory was treated otherwise.

    Args:
        option: that of the command line that names the file.
        machine, keep_memory: those of the run that is to be compared with it.

    Raises:
        OptionError: naming what differs, or what is the matter with the file.
    """
    old = results.load(path, option)
    then = {**old.machine, "keep_memory": old.settings.get("keep_memory")}
    now = {**machine, "keep_memory": keep_memory}
    for key in ("device", "cpu", "gpu", "threads", "huge_pages_for_tensors", "keep_memory"):
        if then.get(key) != now[key]:
            raise OptionError(option, f"{path} was measured with {key} {then.get(key)!r}, this run with {now[key]!r}")
    return old


def compare(old: Run, new: Run, *, tolerance: float = 0.1, seed: int = 0) -> list[Verdict]:
    """A verdict for each of our ways, in the order of the new run; then what is gone."""
    before, after = old.cases(), new.cases()
    same_torch = old.versions.get("torch") == new.versions.get("torch")
    rng = np.random.default_rng(seed)
    found: list[Verdict] = []
    for name, rows in after.items():
        earlier = {row.way: row for row in before.get(name, [])}
        references = [
            (earlier[row.way], row)
            for row in rows
            if (row.kind == "yardstick" or (row.kind == "torch" and same_torch)) and _both(earlier.get(row.way), row)
        ]
        found += [
            _judge(earlier.get(row.way), row, references, tolerance, rng) for row in rows if row.kind == "pyalign"
        ]
    now = {(row.case, row.way) for row in new.rows}
    gone = [row for row in old.rows if row.kind == "pyalign" and (row.case, row.way) not in now]
    return found + [Verdict(row.case, row.way, "not run" if row.case in new.left_out else "gone") for row in gone]


def _both(a: Row | None, b: Row) -> bool:
    return a is not None and bool(a.seconds) and bool(b.seconds)


def _judge(old: Row | None, new: Row, references: list[tuple[Row, Row]], tolerance: float, rng: Any) -> Verdict:
    if old is None:
        return Verdict(new.case, new.way, "new" if new.failure is None else "fails now")
    if new.failure is not None:
        return Verdict(new.case, new.way, "fails now" if old.failure is None else "fails still")
    if old.failure is not None:
        return Verdict(new.case, new.way, "works now")
    plain = _log_ratios(old, new, rng)
    drift = np.mean([_log_ratios(a, b, rng) for a, b in references], axis=0) if references else np.zeros(RESAMPLES)
    adjusted = plain - drift
    limit = math.log1p(tolerance)
    lows, highs = zip(*(np.quantile(x, (0.025, 0.975)).tolist() for x in (plain, adjusted)), strict=True)
    if min(lows) > limit:
        verdict = "slower"
    elif max(highs) < -limit:
        verdict = "faster"
    else:
        verdict = "same" if lows[1] >= -limit and highs[1] <= limit else "unclear"
    if _less_accurate(old, new):
        verdict = "less accurate"
    known = [math.log(b.median / a.median) for a, b in references]
    return Verdict(
        new.case, new.way, verdict, new.median / old.median, math.exp(lows[1]), math.exp(highs[1]),
        math.exp(sum(known) / len(known)) if known else None,
    )  # fmt: skip


def _log_ratios(old: Row, new: Row, rng: Any) -> Any:
    """(RESAMPLES,) logs of new median over old median, of rounds drawn with replacement."""

    def medians(row: Row) -> Any:
        seconds = np.asarray(row.seconds)
        return np.median(seconds[rng.integers(0, len(seconds), (RESAMPLES, len(seconds)))], axis=1)

    return np.log(medians(new) / medians(old))


def _less_accurate(old: Row, new: Row) -> bool:
    """Twice the error, beyond float32's rounding; or NaN where there was a number."""
    for a, b in ((old.value_error, new.value_error), (old.gradient_error, new.gradient_error)):
        if a is not None and b is not None and not math.isnan(a) and not b <= 2 * a + 1e-6:
            return True
    return False
