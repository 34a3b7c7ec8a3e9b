"""A run as pictures: a roofline, and bars of how many times our time others take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pyalign._files import atomic_file
from pyalign._optional import require
from pyalign.benchmark.results import Row, Run, ours_of, rate

SYSTEM_COLOURS = {
    "distill": "#246", "logprob": "#2a7", "linear": "#c52", "ranking": "#84b", "scoring": "#b92",
}  # fmt: skip
KIND_COLOURS = {"pyalign": "#246", "torch": "#9ab", "peer": "#c52", "bare": "#ccc"}


def draw(run: Run, directory: Path) -> list[Path]:
    """roofline.png and speedups.png in ``directory``, which is made if need be; a run without figures has none.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the extra ``pyalign[cli]`` brings it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, figure in (("roofline.png", roofline(run)), ("speedups.png", speedups(run))):
        if figure is not None:
            with atomic_file(directory / name) as temporary:
                figure.savefig(temporary, format="png")
            written.append(directory / name)
    return written


def _where(run: Run) -> str:
    return run.machine["gpu"] or f"{run.machine['cpu']}, {run.machine['threads']} threads"


def roofline(run: Run) -> Any:
    """Our default backend's FLOP rate over the FLOPs per byte that the work needs, under this machine's roofs."""
    points = [
        ours for rows in run.cases().values() if (ours := ours_of(rows)) is not None and ours.bytes and ours.flops
    ]
    if not points:
        return None
    figure = require("matplotlib.figure").Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    intensities = [p.flops / p.bytes for p in points]
    slope = run.rates["copy_GB_per_s"]
    roofs = {key.split("_")[0]: value for key, value in run.rates.items() if key.endswith("_GFLOP_per_s")}
    left, right = min(intensities) / 3, max(*intensities, *(roof / slope for roof in roofs.values())) * 3
    axes.plot([left, max(roofs.values()) / slope], [left * slope, max(roofs.values())], color="#555", lw=1)
    axes.annotate(f"copy, {slope:.0f} GB/s", (left, left * slope), fontsize=8, va="bottom", color="#555")
    for dtype, roof in roofs.items():
        axes.plot([roof / slope, right], [roof, roof], color="#555", lw=1, ls="-" if dtype == "float32" else "--")
        text = f"{dtype} products, {roof:,.0f} GFLOP/s"
        axes.annotate(text, (right, roof), fontsize=8, ha="right", va="bottom", color="#555")
    for system, colour in SYSTEM_COLOURS.items():
        mine = [p for p in points if p.system == system]
        for dtype, marker in (("float32", "o"), ("bfloat16", "^")):
            some = [p for p in mine if p.dtype == dtype]
            label = f"{system}, {dtype}" if some else None
            xs, ys = [p.flops / p.bytes for p in some], [rate(p, "flops") for p in some]
            axes.plot(xs, ys, marker, ms=6, color=colour, alpha=0.75, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs per byte that the work needs", ylabel="GFLOP/s", xlim=(left, right)
    )
    axes.set_title(f"pyalign on {_where(run)}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def speedups(run: Run) -> Any:
    """A bar for every other way: its time over ours, with quartiles; a way that failed says so."""
    cases = {name: rows for name, rows in run.cases().items() if ours_of(rows) is not None}
    bars: list[tuple[str, Row, Row]] = []
    for name, rows in cases.items():
        ours = ours_of(rows)
        assert ours is not None
        bars += [(name, ours, row) for row in rows if row is not ours and row.kind != "yardstick"]
    if not bars:
        return None
    height = 0.2 * (len(bars) + len(cases)) + 1.2
    figure = require("matplotlib.figure").Figure(figsize=(11, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    place, places, labels = 0.0, list[float](), list[str]()
    previous = ""
    for name, ours, row in bars:
        if name != previous:
            place += 1.0
            axes.annotate(
                name, (0.0, place), xycoords=("axes fraction", "data"), fontsize=8, weight="bold", va="center",
                xytext=(4, 0), textcoords="offset points",
            )  # fmt: skip
            previous, place = name, place + 1.0
        places.append(place)
        labels.append(row.way)
        if row.failure is None:
            ratio = row.median / ours.median
            axes.barh(place, math.log2(ratio), color=KIND_COLOURS[row.kind], height=0.8)
            beside = max(math.log2(ratio), 0.0) + 0.05
            axes.annotate(f"{ratio:.2f} x ± {100 * row.spread:.0f} %", (beside, place), fontsize=7, va="center")
        else:
            axes.annotate("failed", (0.05, place), fontsize=7, va="center", color="#a00")
        place += 1.0
    axes.set_yticks(places, [label.replace("$", r"\$") for label in labels], fontsize=7)
    axes.set_ylim(place, 0.0)
    axes.axvline(0.0, color="#246", lw=1)
    low, high = (f(axes.get_xlim()[i]) for i, f in ((0, math.floor), (1, math.ceil)))
    ticks = list(range(min(low, -1), max(high, 1) + 1))
    axes.set_xticks(ticks, [f"{2.0**t:g}" for t in ticks], fontsize=8)
    axes.set_xlabel("its time over that of pyalign's default backend (more than 1: pyalign is faster)")
    axes.set_title(_where(run), fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return figure
