"""What a benchmark case is: an op, its shape and dtype, how inputs are made, and all who compute the same from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[[Inputs], Outputs]
Shape = Mapping[str, int]

KINDS = ("pyalign", "torch", "peer", "bare")


@dataclass(frozen=True)
class Way:
    """One way to compute a case's result from its inputs."""

    name: str
    kind: str
    """Of KINDS; "bare" does a part of the work, such as the matrix products alone, and has no result to check."""
    load: Callable[[], Function]
    """Gives the function; imports the package that it comes from. Where that is not installed, the way is left out."""
    package: str = ""
    """The distribution that a peer comes from, as its index calls it."""
    compiles: bool = False
    """Whether it runs torch.compile, which takes its time."""


def way(name: str, kind: str, function: Function) -> Way:
    return Way(name, kind, lambda: function)


class Work(NamedTuple):
    """What any implementation must do at the least: bytes to and from memory, FLOPs (exp and log count as one)."""

    bytes: int
    flops: int


class Draw:
    """Random tensors of one seed, on one device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self._generator, device=self.device)).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """An op at one shape and dtype, with everybody who computes it."""

    system: str
    op: str
    variant: str
    """The op's options, as "jsd"; may be empty."""
    shape: Shape
    dtype: torch.dtype
    make: Callable[[Shape, torch.dtype, Draw], Inputs]
    ours: Function
    eager: Mapping[str, Function]
    """The ways of plain torch, by name; the first is the oracle too, run on float64 inputs."""
    work: Callable[[Case], Work]
    checked_at: Shape
    """Overrides of the shape for the errors against float64, and the check of every way: rows are independent, so fewer
    of them do."""
    tiny: Shape
    """Overrides for a run that measures nothing."""
    leaves: tuple[str, ...] = ()
    """Inputs whose gradients are computed too; none: forward alone."""
    others: tuple[Way, ...] = ()
    compiled: bool = True
    """Whether the eager ways run under torch.compile as well (a Python loop over data can't)."""
    bound: str = "memory"
    """"memory", "products" or "calls": what it takes turns with, a copy or a matrix product; calls with neither."""
    quick: Shape | None = None
    """Overrides in a quick run; None: not part of one."""
    product: Callable[[Shape], tuple[int, int, int]] | None = None
    """(rows, inner, columns) of the matrix product that one bound by products takes turns with."""
    kept_bytes: int = 0
    """Freed memory to keep for the ways on a CPU where their peak can't be measured."""

    @property
    def name(self) -> str:
        sizes = "x".join(str(x) for x in self.shape.values())
        dtype = str(self.dtype).removeprefix("torch.")
        direction = "backward" if self.leaves else "forward"
        return "/".join(x for x in (self.op, self.variant, sizes, dtype, direction) if x)

    def __str__(self) -> str:
        return self.name

    def at(self, overrides: Shape) -> Case:
        return self.replaced(shape={**self.shape, **overrides})

    def replaced(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        made = self.make(self.shape, self.dtype, Draw(device, seed))
        for name in self.leaves:
            made[name].requires_grad_()
        return made

    def elements(self) -> int:
        return math.prod(self.shape.values())


def widened(x: Tensor) -> Tensor:
    """As plain torch computes it carefully: 16-bit floats as float32, float64 left alone."""
    return x if x.dtype == torch.float64 else x.float()


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64, with gradients for the same leaves."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
