"""A case under pytest-benchmark, as the files of ``bench/`` run it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch

from pyalign.benchmark.case import Case
from pyalign.benchmark.measure import Settings, Upstream, input_sets, measure, rotated, step
from pyalign.benchmark.results import Row, ours_of
from pyalign.benchmark.timing import kept_memory

ONCE = Settings(
    seconds=0.0, warmup=0.0, fewest_rounds=1, most_sets=1, compiled=False, peers=False, keep_memory=False, memory=False
)  # fmt: skip
MOST_ERROR = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 2e-2)}
"""Of values and gradients, of ways that are meant to be right: far above rounding, far below a wrong formula."""


def check(case: Case, device: torch.device) -> None:
    """Every way of ours and torch's once, at the tiny shape, and its errors against float64.

    Raises:
        AssertionError: a way failed, or is wrong.
    """
    alone = case.at(case.tiny).replaced(checked_at={}, bound="calls", product=None)  # no yardstick beside it
    rows, _ = measure(alone, device, ONCE)
    for row in rows:
        assert row.failure is None, f"{row.case}, {row.way}: {row.failure}"
        for error, most in zip((row.value_error, row.gradient_error), MOST_ERROR[case.dtype], strict=True):
            assert error is None or error <= most, f"{row.case}, {row.way}: error {error:.1e}; wanted at most {most}"


def run(benchmark: Any, case: Case, device: torch.device, **settings: Any) -> None:
    """Measures the case and leaves its figures in ``extra_info``; where benchmarks are disabled, :func:`check`.

    Args:
        benchmark: pytest-benchmark's fixture. What it times is our default backend.
        settings: of :class:`pyalign.benchmark.measure.Settings`.
    """
    if benchmark.disabled:
        check(case, device)
        benchmark(lambda: None)
        return
    wanted = dataclasses.replace(Settings(check_compiled=False), **settings)
    rows, _ = measure(case, device, wanted)
    benchmark.extra_info.update(figures(rows))
    ours = rotated([step(case, case.ours, inputs, Upstream()) for inputs in input_sets(case, device, wanted.most_sets)])
    peak = next((row.peak_bytes for row in rows if row.peak_bytes), None) or case.kept_bytes
    keeps = device.type == "cpu" and wanted.keep_memory
    with kept_memory(2 * peak + (64 << 20)) if keeps else contextlib.nullcontext():
        benchmark.pedantic(functools.partial(ours), rounds=5, warmup_rounds=1)


def figures(rows: list[Row]) -> dict[str, Any]:
    """Flat: everybody's median in milliseconds, how many times ours it is, what fails, and of ours all the rest."""
    ours = ours_of(rows)
    found: dict[str, Any] = {}
    for row in rows:
        name = row.way.replace(" ", "_")
        if row.failure is not None:
            found[f"{name}_failed"] = row.failure
            continue
        found[f"{name}_ms"] = row.median * 1e3
        if row.peak_bytes is not None:
            found[f"{name}_peak_MiB"] = row.peak_bytes / 2**20
        if ours is not None and row is not ours and row.kind != "yardstick":
            found[f"over_{name}"] = row.median / ours.median
    if ours is not None:
        found |= {"bytes": ours.bytes, "flops": ours.flops, "GB_per_s": ours.bytes / ours.median / 1e9}
        for name in ("share_of_copy", "share_of_products", "value_error", "gradient_error", "launches"):
            value = getattr(ours, name)
            if value is not None:
                found[name] = value
    return found
