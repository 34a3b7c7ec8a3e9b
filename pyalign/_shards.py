"""A vocabulary that is split over the ranks of a process group: who holds what, and what the ranks tell each other."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyalign import _checks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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

    def limit(self, vocab_size: int | None) -> int:
        """How many entries of the whole vocabulary are used."""
        if vocab_size is None:
            return self.vocab
        if not isinstance(vocab_size, int) or not 0 < vocab_size <= self.vocab:
            wanted = f"an int with 0 < vocab_size <= {self.vocab}, the entries of all ranks"
            _checks.refuse("vocab_size", repr(vocab_size), wanted)
        return vocab_size

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
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateUsage]


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


# What public functions are given


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # which nobody has a DTensor without
    return module is not None and isinstance(x, module.DTensor)


def resolve(process_group: Any, width: int, device: torch.device) -> Shards | None:
    """Who holds what, where this rank's slice has ``width`` entries; None for whole rows."""
    from pyalign.distributed import VocabularyShards

    if process_group is None:
        return None
    if isinstance(process_group, VocabularyShards):
        shards = Shards(process_group.group_name, process_group.sizes, process_group.rank)
        if shards.sizes[shards.rank] != width:
            _checks.refuse(
                "process_group", f"sizes {shards.sizes} on rank {shards.rank}", f"{width} there, this rank's slice"
            )
        return shards if len(shards.sizes) > 1 else None
    if isinstance(process_group, dist.DeviceMesh):
        process_group = process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        wanted = "a torch.distributed process group that this rank is in, a 1-D DeviceMesh or VocabularyShards"
        _checks.refuse("process_group", type(process_group).__name__, wanted, TypeError)
    if process_group.size() == 1:
        return None
    if torch.compiler.is_compiling():
        wanted = "VocabularyShards(group, sizes): to ask all ranks for their sizes would break the graph"
        _checks.refuse("process_group", "a bare group under torch.compile", wanted)
    return Shards(process_group.group_name, exchange_sizes(process_group, width, device), process_group.rank())


def exchange_sizes(group: dist.ProcessGroup, width: int, device: torch.device) -> tuple[int, ...]:
    """Every rank's ``width``, which the host waits for."""
    mine = torch.tensor([width], device=device)
    sizes = torch.empty(group.size(), 1, dtype=mine.dtype, device=device)
    dist.all_gather(list(sizes.unbind(0)), mine, group=group)
    return tuple(sizes.flatten().tolist())


def local(name: str, x: Any, process_group: Any, dim: int = -1) -> tuple[Tensor, Shards | None]:
    """This rank's part of ``x``, and who holds what of dimension ``dim``, its vocabulary.

    A DTensor says that itself; a ``process_group`` beside it must be the one that it is split over.
    """
    if not is_dtensor(x):
        _checks.floating(name, x, 1)
        return x, resolve(process_group, x.shape[dim], x.device)
    dim = dim % x.ndim
    mesh_dims = [i for i, placement in enumerate(x.placements) if placement.is_shard(dim)]
    others = [p for i, p in enumerate(x.placements) if i not in mesh_dims]
    if len(mesh_dims) > 1 or not all(placement.is_replicate() for placement in others):
        wanted = f"one Shard({dim}), of the vocabulary, and Replicate besides (or this rank's part: .to_local())"
        _checks.refuse(name, f"a DTensor with placements {x.placements}", wanted)
    part = x.to_local()
    if not mesh_dims:
        return part, resolve(process_group, part.shape[dim], part.device)
    group = x.device_mesh.get_group(mesh_dims[0])
    sizes = chunk_sizes(x.shape[dim], group.size())
    shards = Shards(group.group_name, sizes, group.rank())
    if process_group is not None:
        given = resolve(process_group, part.shape[dim], part.device)
        if given != (shards if group.size() > 1 else None):
            _checks.refuse("process_group", "another split", f"that of {name}, or None: a DTensor knows its group")
    return part, shards if group.size() > 1 else None


def chunk_sizes(size: int, parts: int) -> tuple[int, ...]:
    """How DTensor (and torch.chunk) cuts ``size`` entries."""
    each = -(-size // parts)
    return tuple(max(min(each, size - each * part), 0) for part in range(parts))


def like(name: str, x: Any, shards: Shards | None, other: str, dim: int = -1) -> Tensor:
    """This rank's part of ``x``, which is split as ``other`` is, or, for a plain tensor, believed to be."""
    if not is_dtensor(x):
        return x
    part, its = local(name, x, None, dim)
    if its != shards:
        _checks.refuse(name, f"a DTensor with placements {x.placements}", f"the split of {other}")
    return part


def replicated(name: str, x: Any) -> Any:
    """``x``, or, of a DTensor that all ranks have whole, this rank's."""
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        _checks.refuse(name, f"a DTensor with placements {x.placements}", "a plain tensor, or Replicate")
    return x.to_local()
