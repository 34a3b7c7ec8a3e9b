"""A run as ``rich`` tables, one for each case."""

from __future__ import annotations

import math
from typing import Any

from pyalign._optional import require
from pyalign.benchmark.compare import Verdict
from pyalign.benchmark.results import Row, Run, ours_of, rate

COLUMNS = (
    "way", "median", "spread", "takes", "GB/s", "of copy", "GFLOP/s", "of products", "peak", "loss error",
    "gradient error",
)  # fmt: skip
GPU_COLUMNS = ("launches", "in a graph")
COLOURS = {
    "slower": "red", "less accurate": "red", "fails now": "red", "faster": "green", "works now": "green",
    "unclear": "yellow",
}  # fmt: skip


def seconds_in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def _amount(x: int, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {prefix}{unit}"
    return f"{x} {unit}"


def _share(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f} %" if x >= 0.01 else "< 1 %"


def _error(x: float | None) -> str:
    return "" if x is None else "NaN" if math.isnan(x) else f"{x:.1e}"


def _figures(row: Row, ours: Row | None, gpu: bool) -> list[str]:
    ratio = "" if ours is None or row.kind == "yardstick" else f"{row.median / ours.median:.2f} x"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
    shown = [
        seconds_in_words(row.median), f"± {100 * row.spread:.0f} %", ratio,
        f"{rate(row, 'bytes'):.1f}" if row.bytes else "", _share(row.share_of_copy),
        f"{rate(row, 'flops'):.1f}" if row.flops else "", _share(row.share_of_products),
        peak, _error(row.value_error), _error(row.gradient_error),
    ]  # fmt: skip
    if gpu:
        shown.append("" if row.launches is None else str(row.launches))
        graph = "" if row.graph_seconds is None else seconds_in_words(row.graph_seconds)
        shown.append("fails" if row.graph_failure else graph)
    return shown


def tables(run: Run) -> list[Any]:
    """A rich table for every case; a way that failed has its error in place of figures."""
    rich: Any = require("rich.table")
    text = require("rich.text").Text
    gpu = run.machine["device"] == "cuda"
    found: list[Any] = []
    for name, rows in run.cases().items():
        first = rows[0]
        title = f"{name}: needs {_amount(first.bytes, 'B')} and {_amount(first.flops, 'FLOP')}"
        table = rich.Table(title=text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in (*COLUMNS, *(GPU_COLUMNS if gpu else ())):
            table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
        ours = ours_of(rows)
        for row in rows:
            if row.failure is None:
                style = "green" if row is ours else "dim" if row.kind in ("yardstick", "bare") else ""
                table.add_row(text(row.way), *_figures(row, ours, gpu), style=style)
        found.append(table)
        failed = [row for row in rows if row.failure is not None]
        found += [text(f"{row.way}  failed: {row.failure}", style="red") for row in failed]
        found.append("")
    return found


def heading(run: Run) -> list[str]:
    """The machine, what is installed, and the machine's own rates, a line each."""
    machine = run.machine
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    installed = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    rates = ", ".join(
        f"{value:,.1f} {name.replace('_per_', '/').replace('_', ' ')}" for name, value in run.rates.items()
    )
    return [where, installed, f"this machine: {rates}"]


def closing(run: Run) -> list[str]:
    """What is not in the tables, and why."""
    lines = [f"left out: {reason}" for reason in run.not_installed.values()]
    if run.left_out:
        lines.append(f"not run, because the time was up: {', '.join(run.left_out)}")
    return lines


def comparison(verdicts: list[Verdict], tolerance: float) -> Any:
    """A rich table of verdicts."""
    rich: Any = require("rich.table")
    text = require("rich.text").Text
    title = f"against the earlier run; changes under {100 * tolerance:.0f} % don't count"
    table = rich.Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("case", "way", "verdict", "time", "95 %", "others' time"):
        table.add_column(column, justify="left" if column in ("case", "way", "verdict") else "right")
    for v in verdicts:
        ratio = "" if v.ratio is None else f"{v.ratio:.2f} x"
        interval = "" if v.low is None or v.high is None else f"{v.low:.2f} to {v.high:.2f}"
        drift = "" if v.drift is None else f"{v.drift:.2f} x"
        table.add_row(
            text(v.case), text(v.way), text(v.verdict, style=COLOURS.get(v.verdict, "")), ratio, interval, drift
        )
    return table
