"""A run's figures, and their JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyalign import _info
from pyalign._files import write_text
from pyalign._options import OptionError
from pyalign.benchmark import peers

FORMAT = 1


@dataclass
class Row:
    """One way to one case's result."""

    case: str
    system: str
    op: str
    variant: str
    shape: dict[str, int]
    dtype: str
    backward: bool
    way: str
    kind: str
    """Of case.KINDS, or "yardstick": a copy or a matrix product that took turns with the others."""
    bytes: int
    """That the work needs at the least; of a yardstick what it moves."""
    flops: int
    failure: str | None = None
    seconds: list[float] = field(default_factory=list[float])
    """Of every round."""
    share_of_copy: float | None = None
    share_of_products: float | None = None
    peak_bytes: int | None = None
    """Beyond what was held before the call, gradients included; None: not measurable here."""
    value_error: float | None = None
    """Largest difference from float64, over the largest value."""
    gradient_error: float | None = None
    """Norm of the difference of all gradients from float64's, over the norm."""
    launches: int | None = None
    """Kernels that a call starts on a GPU."""
    graph_seconds: float | None = None
    """Median of a call that is replayed as a CUDA graph."""
    graph_failure: str | None = None
    """Why it couldn't be captured."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median; 0 of fewer than two rounds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


@dataclass
class Run:
    """What one run on one machine measured."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    rates: dict[str, float]
    """The machine's own: copy_GB_per_s, float32_GFLOP_per_s ..."""
    rows: list[Row] = field(default_factory=list[Row])
    not_installed: dict[str, str] = field(default_factory=dict[str, str])
    """Distributions whose ways are left out, and how that showed."""
    left_out: list[str] = field(default_factory=list[str])
    """Cases that the time didn't suffice for."""
    took: float = 0.0
    """Seconds of the whole run."""

    def cases(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, []).append(row)
        return found


def ours_of(rows: list[Row]) -> Row | None:
    """The row that others are compared with: the default backend's, the first of ours."""
    row = next((row for row in rows if row.kind == "pyalign"), None)
    return None if row is None or row.failure is not None else row


def rate(row: Row, what: str) -> float:
    """GB/s or GFLOP/s of the work."""
    return (row.bytes if what == "bytes" else row.flops) / row.median / 1e9


def machine(device: torch.device) -> tuple[dict[str, Any], dict[str, str | None]]:
    """What ran, and the versions of all that takes part."""
    info = _info.collect()
    described = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": info["threads"],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "platform": info["platform"],
        "cpu_isa": info["native"].get("cpu_isa"),
        "huge_pages_for_tensors": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
    }
    versions: dict[str, str | None] = {
        "pyalign": info["version"],
        "torch": info["torch"],
        "python": info["python"],
        "cuda": torch.version.cuda,
        "triton": info["triton"]["version"],
    }
    return described, {**versions, **{package: version(package) for package in peers.PACKAGES}}


def version(package: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


# ---- JSON ----


def _plain(x: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}  # pyright: ignore[reportUnknownVariableType]
    return [_plain(y) for y in x] if isinstance(x, list) else x  # pyright: ignore[reportUnknownVariableType]


_NUMBERS = ("share_of_copy", "share_of_products", "value_error", "gradient_error")


def save(run: Run, path: Path) -> None:
    """Whole or not at all."""
    content = {"format": FORMAT, **_plain(dataclasses.asdict(run))}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load(path: Path, option: str) -> Run:
    """What :func:`save` wrote; ``option`` is that of the command line that names the file.

    Raises:
        OptionError: there is no such file, or it is no run of this format.
    """
    if not path.is_file():
        raise OptionError(option, f"{path} is not a file; wanted what --json wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise OptionError(option, f"{path} is of another format; wanted format {FORMAT}")
        rows = [Row(**row) for row in content.pop("rows")]
        run = Run(**content, rows=rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(option, f"{path} is not what --json wrote ({error})") from error
    for row in run.rows:
        for name in _NUMBERS:
            value = getattr(row, name)
            setattr(row, name, None if value is None else float(value))
    return run
