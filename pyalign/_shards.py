"""A vocabulary that is split over the ranks of a process group: who holds what, and what the ranks tell each other."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# A target in another rank's slice, as the kernels know it (csrc/common/distill_args.h).
ELSEWHERE = -(1 << 63)


class Shards(NamedTuple):
    """Rank r holds ``sizes[r]`` neighbouring entries, those of lower ranks come first.

    ``group`` is the name of the process group: raw ops take it, a graph of torch.compile holds it.
    """

    group: str
    sizes: tuple[int, ...]
    rank: int

    @property
    def begin(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def vocab(self) -> int:
        """The entries of all ranks."""
        return sum(self.sizes)

    def cut(self, vocab: int) -> Shards:
        """What is left of the slices of the first ``vocab`` entries."""
        ends = itertools.accumulate(self.sizes)
        kept = (max(min(size, size - (end - vocab)), 0) for size, end in zip(self.sizes, ends, strict=True))
        return self._replace(sizes=tuple(kept))

    def local(self, index: Tensor) -> Tensor:
        """Numbers of entries as those of this rank's slice, ELSEWHERE where they lie in another."""
        index = index - self.begin
        return torch.where((index >= 0) & (index < self.sizes[self.rank]), index, ELSEWHERE)


def of_group(name: str, sizes: tuple[int, ...]) -> Shards:
    return Shards(name, sizes, dist.get_rank(_group(name)))


def _group(name: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return resolve(name)  # torch offers no other way


def gather(x: Tensor, shards: Shards) -> Tensor:
    """``x`` of all ranks, which have the same shape: (R, ...)."""
    x = x.contiguous()
    everybody = x.new_empty((len(shards.sizes), *x.shape))
    if x.numel():
        dist.all_gather(list(everybody.unbind(0)), x, group=_group(shards.group))
    return everybody


def gather_vocabulary(x: Tensor, shards: Shards) -> Tensor:
    """Slices (..., own size) joined to (..., all sizes)."""
    widest = max(shards.sizes)
    padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
    parts = gather(padded, shards).unbind(0)
    return torch.cat([part[..., :size] for part, size in zip(parts, shards.sizes, strict=True)], -1)


def agree(value: int, shards: Shards, device: torch.device) -> int:
    """The least of all ranks' ``value``, which the host waits for."""
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=_group(shards.group))
    return int(least)


def sum_over(x: Tensor, shards: Shards) -> Tensor:
    """The sum of all ranks' ``x``, in place."""
    if x.numel():
        dist.all_reduce(x, group=_group(shards.group))
    return x


class _GatherVocabulary(torch.autograd.Function):
    """All slices, differentiable in this rank's: what follows is computed alike on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.begin, ctx.size = shards.begin, x.shape[-1]
        return gather_vocabulary(x, shards)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[..., ctx.begin : ctx.begin + ctx.size].contiguous(), None


class _Copied(torch.autograd.Function):
    """The identity on what every rank has; each rank's gradient is a part of the whole, which is their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradient.clone(memory_format=torch.contiguous_format), ctx.shards), None


def whole_vocabulary(x: Tensor, shards: Shards) -> Tensor:
    """(..., V) of every rank's (..., own size), differentiable in this rank's."""
    return _GatherVocabulary.apply(x, shards)


def copied(x: Tensor, shards: Shards) -> Tensor:
    """``x``, the same on every rank, into ops of which each rank computes a part."""
    return _Copied.apply(x, shards)
