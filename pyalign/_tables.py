"""Which layout of a kernel is the fastest on this GPU: as measured there by ``bench/choose_kernels.py``, else by rule.

A table is a JSON file of one kind of GPU: the user's, by the environment variable ``PYALIGN_KERNEL_TABLE``, or
pyalign's own in ``kernel_tables``. An entry serves calls of its op, dtype and divergence whose vocabulary is within
``FACTOR`` of its own; of several the nearest does. What no table knows is left to the rule of the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyalign import _backends
from pyalign._files import write_text
from pyalign._types import DIVERGENCES

VARIABLE = "PYALIGN_KERNEL_TABLE"
DIRECTORY = Path(__file__).resolve().parent / "kernel_tables"
FORMAT = 1
FACTOR = 1.25  # between a vocabulary that was measured and one that is served, either way
HIDDEN_FACTOR = 2.0  # the same of hidden states' width, and how many fewer tokens a call may have
WORTHWHILE = 1.02  # times faster than by the rule: less is noise

# Of the distillation kernels (cluster, stages), as in csrc/common/distill_args.h.
Layout = tuple[int, int]
BY_RULE: Layout = (0, 0)
ONE_BLOCK: Layout = (-1, 0)
# Of the chunk loop of losses from hidden states; the rule is the first.
IN_TURN, OVERLAPPED = LINEAR_CHOICES = ("in turn", "overlapped")
DISTILL, TOPK_DISTILL = "distill", "topk_distill"
LINEAR_OPS = ("linear_distill", "linear_topk_distill", "linear_cross_entropy", "linear_logprob")
DTYPES = ("float32", "bfloat16", "float16")


def layout_name(layout: Layout) -> str:
    cluster, stages = layout
    return "one block" if layout == ONE_BLOCK else f"cluster of {cluster}, {stages} stage{'s' if stages > 1 else ''}"


def layout_of(name: str) -> Layout | None:
    """What ``layout_name`` named so."""
    found = re.fullmatch(r"cluster of (\d+), (\d+) stages?", name)
    layout = (int(found[1]), int(found[2])) if found else ONE_BLOCK
    return layout if layout_name(layout) == name else None


# Tables


class TableError(ValueError):
    """A file that is no table."""


@dataclass(frozen=True)
class Entry:
    """What was measured of one op at one shape."""

    op: str
    """``DISTILL``, ``TOPK_DISTILL`` or one of ``LINEAR_OPS``."""
    dtype: str
    """Of the logits; of losses from hidden states, of the products' operands."""
    divergence: str
    """Empty for ops that have none, and for ``TOPK_DISTILL``, whose kernel serves all."""
    rows: int
    """Tokens."""
    vocab: int
    hidden: int
    """Of losses from hidden states their width, else 0."""
    choice: str
    rule: str
    """What would have run without a table."""
    milliseconds: dict[str, float]
    """Medians of all that could have been chosen."""

    @property
    def gain(self) -> float:
        """How many times faster than by the rule."""
        return self.milliseconds[self.rule] / self.milliseconds[self.choice]


@dataclass(frozen=True)
class Table:
    gpu: str
    torch: str
    cuda: str
    driver: str
    commit: str
    date: str
    entries: list[Entry]

    def save(self, path: Path) -> None:
        write_text(path, json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")


def chosen(milliseconds: dict[str, float], rule: str) -> str:
    """The fastest, where it is worth leaving the rule."""
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return fastest if milliseconds[rule] >= WORTHWHILE * milliseconds[fastest] else rule


def load(path: Path) -> Table:
    """What ``Table.save`` wrote.

    Raises:
        TableError: the file can't be read, or a field of it is not what ``bench/choose_kernels.py`` writes.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(
            f"{path}: not a table of kernels ({error}); wanted what bench/choose_kernels.py wrote"
        ) from None

    def fail(field: str, got: Any, wanted: str) -> TableError:
        return TableError(f"{path}: {field}: got {got!r}; wanted {wanted}")

    if not isinstance(content, dict):
        raise fail("the file", content, "an object")
    if content.get("format") != FORMAT:
        raise fail("format", content.get("format"), f"{FORMAT}, or a newer pyalign")
    described: dict[str, str] = {}
    for name in ("gpu", "torch", "cuda", "driver", "commit", "date"):
        value = content.get(name)
        if not isinstance(value, str):
            raise fail(name, value, "text")
        described[name] = value
    if not isinstance(content.get("entries"), list):
        raise fail("entries", content.get("entries"), "a list")

    entries: list[Entry] = []
    for i, x in enumerate(content["entries"]):
        where = f"entries[{i}]"
        names = [field.name for field in dataclasses.fields(Entry)]
        if not isinstance(x, dict) or set(x) != set(names):
            raise fail(where, x, f"an object of {', '.join(names)}")
        _check_entry(where, x, fail)
        entries.append(Entry(**x))
    return Table(**described, entries=entries)


def _check_entry(where: str, x: dict[str, Any], fail: Any) -> None:
    linear = x["op"] in LINEAR_OPS
    divergences = DIVERGENCES if x["op"] in (DISTILL, "linear_distill", "linear_topk_distill") else ("",)
    for name, values in (("op", (DISTILL, TOPK_DISTILL, *LINEAR_OPS)), ("dtype", DTYPES), ("divergence", divergences)):
        if x[name] not in values:
            raise fail(f"{where}.{name}", x[name], f"one of {', '.join(map(repr, values))}")
    for name, least in (("rows", 1), ("vocab", 1), ("hidden", 1 if linear else 0)):
        if type(x[name]) is not int or x[name] < least:
            raise fail(f"{where}.{name}", x[name], f"an integer of {least} or more")
    times = x["milliseconds"]
    good = isinstance(times, dict) and all(type(t) in (int, float) and 0 < t < math.inf for t in times.values())
    if not good:
        raise fail(f"{where}.milliseconds", times, "an object of positive numbers")
    for name in times:
        if name not in LINEAR_CHOICES if linear else layout_of(name) is None:
            wanted = " or ".join(map(repr, LINEAR_CHOICES)) if linear else "'one block' or 'cluster of 8, 2 stages'"
            raise fail(f"{where}.milliseconds", name, wanted)
    for name in ("choice", "rule"):
        if not isinstance(x[name], str) or x[name] not in times:
            raise fail(f"{where}.{name}", x[name], f"one of {', '.join(map(repr, times))}")


def file_name(gpu: str) -> str:
    """Of a GPU's table in ``DIRECTORY``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def _table(variable: str | None, gpu: str) -> tuple[Table | None, str]:
    """This GPU's table, or why there is none."""
    absent = f"no measured table for {gpu}"
    paths = [Path(variable)] if variable else []
    own = DIRECTORY / file_name(gpu)
    if own.is_file():
        paths.append(own)
    for path in paths:
        table = load(path)
        if table.gpu == gpu:
            return table, ""
        absent += f" ({path} is of {table.gpu})"
    return None, absent


# Choices


class Choice(NamedTuple):
    what: str
    name: str
    """Empty: whatever the rule says."""
    reason: str


class _Shape(NamedTuple):
    op: str
    dtype: str
    divergence: str
    rows: int
    vocab: int
    hidden: int

    def __str__(self) -> str:
        sizes = f"{self.rows} x {self.hidden} -> {self.vocab}" if self.hidden else f"rows of {self.vocab}"
        return " ".join(x for x in (self.op, self.divergence, self.dtype, sizes) if x)


def _distance(entry: Entry, shape: _Shape) -> float | None:
    """In factors, None where the entry says nothing of this shape."""
    if (entry.op, entry.dtype, entry.divergence) != (shape.op, shape.dtype, shape.divergence) or shape.vocab < 1:
        return None
    ratio = abs(math.log(shape.vocab / entry.vocab))
    if ratio > math.log(FACTOR) + 1e-12:
        return None
    if not shape.hidden:
        return ratio
    # More tokens are more chunks of the same size.
    widths = abs(math.log(shape.hidden / entry.hidden)) if entry.hidden else math.inf
    if widths > math.log(HIDDEN_FACTOR) + 1e-12 or HIDDEN_FACTOR * shape.rows < entry.rows:
        return None
    return ratio + widths + max(math.log(entry.rows / shape.rows), 0.0)


def nearest(entries: list[Entry], shape: _Shape) -> Entry | None:
    found = [(distance, i) for i, x in enumerate(entries) if (distance := _distance(x, shape)) is not None]
    return entries[min(found)[1]] if found else None


def _measured(variable: str | None, index: int, shape: _Shape, fits: Callable[[], Iterable[str]] | None) -> Choice:
    """``fits``: gives the names that may be chosen at this shape; None: all."""
    table, absent = _table(variable or None, torch.cuda.get_device_name(index))
    if table is None:
        return Choice(str(shape), "", f"by rule: {absent}")
    source = f"{table.gpu} ({table.date})"
    entry = nearest(table.entries, shape)
    if entry is None:
        return Choice(str(shape), "", f"by rule: nothing of about this shape was measured on {source}")
    if fits is not None and entry.choice not in fits():
        return Choice(str(shape), "", f"by rule: {entry.choice}, measured on {source} at {entry.vocab}, does not fit")
    gain = "the rule's" if entry.choice == entry.rule else f"{entry.gain:.2f}x faster than the rule's"
    return Choice(str(shape), entry.choice, f"measured on {source}: {entry.choice}, {gain}")


_used: dict[str, str] = {}  # by use()
_seen: list[Choice] | None = None


@contextlib.contextmanager
def use(*, distill: str = "", linear: str = "") -> Generator[None]:
    """For measurements: these layouts, whatever a table says. Of the whole process, as autograd has its own threads."""
    before = dict(_used)
    _used.update({key: name for key, name in (("distill", distill), ("linear", linear)) if name})
    try:
        yield
    finally:
        _used.clear()
        _used.update(before)


@contextlib.contextmanager
def watched() -> Generator[list[Choice]]:
    """The choices of the calls within it."""
    global _seen
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before


def distill_layout(index: int, vocab: int, dtype: torch.dtype, divergence: str) -> Layout:
    """The dense distillation kernel's on a GPU, for rows of this length."""
    return _layout(DISTILL, index, vocab, dtype, divergence)


def topk_distill_layout(index: int, vocab: int, dtype: torch.dtype) -> Layout:
    """The same of the kernel for a teacher's top k."""
    return _layout(TOPK_DISTILL, index, vocab, dtype, "")


def _layout(op: str, index: int, vocab: int, dtype: torch.dtype, divergence: str) -> Layout:
    layout, choice = _distill(_used.get("distill"), _backends.getenv(VARIABLE), op, index, vocab, dtype, divergence)
    if _seen is not None:
        _seen.append(choice)
    return layout


def _fitting(op: str, index: int, vocab: int, dtype: torch.dtype, divergence: str) -> Iterable[str]:
    """Asks the driver."""
    engine = _backends.engine("cuda")
    if op == DISTILL:
        layouts = engine.distill_layouts(vocab, dtype, divergence, index)
    else:
        layouts = engine.topk_distill_layouts(vocab, dtype, index)
    return map(layout_name, layouts)


@functools.cache
def _distill(
    used: str | None, variable: str | None, op: str, index: int, vocab: int, dtype: torch.dtype, divergence: str
) -> tuple[Layout, Choice]:
    shape = _Shape(op, _name(dtype), divergence, 0, vocab, 0)
    if used:
        choice = Choice(str(shape), used, f"{used}, as asked")
    else:
        choice = _measured(variable, index, shape, lambda: _fitting(op, index, vocab, dtype, divergence))
    return (layout_of(choice.name) if choice.name else None) or BY_RULE, choice


def overlaps(
    op: str, device: torch.device, dtype: torch.dtype, divergence: str, tokens: int, hidden: int, vocab: int
) -> bool:
    """Whether a chunk's row loss is to run beside the products of the next."""
    shape = _Shape(op, _name(dtype), divergence, tokens, vocab, hidden)
    choice = _linear(_used.get("linear"), _backends.getenv(VARIABLE), device.index or 0, shape)
    if _seen is not None:
        _seen.append(choice)
    return choice.name == OVERLAPPED


@functools.lru_cache(maxsize=1024)  # tokens differ from call to call
def _linear(used: str | None, variable: str | None, index: int, shape: _Shape) -> Choice:
    if used:
        return Choice(str(shape), used, f"{used}, as asked")
    return _measured(variable, index, shape, None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
