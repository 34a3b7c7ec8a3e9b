"""What public functions are told of a vocabulary that is split: by a process group, or by DTensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pyalign import _checks, _dtensor
from pyalign._dtensor import is_dtensor
from pyalign._shards import Shards
from pyalign.distributed import VocabularyShards


def resolve(process_group: Any, width: int, device: torch.device) -> Shards | None:
    """Who holds what, where this rank's slice has ``width`` entries; None for whole rows."""
    if process_group is None:
        return None
    if isinstance(process_group, VocabularyShards):
        shards = Shards(process_group.group_name, process_group.sizes, process_group.rank)
        if shards.sizes[shards.rank] != width:
            _checks.refuse(
                "process_group", f"sizes {shards.sizes} on rank {shards.rank}", f"{width} there, this rank's slice"
            )
        return shards if len(shards.sizes) > 1 else None
    if isinstance(process_group, DeviceMesh):
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


def constants(**tensors: Any) -> tuple[Any, ...]:
    """What is the same on every rank, of DTensors this rank's copy."""
    return tuple(replicated(name, x) for name, x in tensors.items())


def limit(shards: Shards, vocab_size: int | None) -> int:
    """How many entries of the whole vocabulary are used."""
    if vocab_size is None:
        return shards.vocab
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= shards.vocab:
        wanted = f"an int with 0 < vocab_size <= {shards.vocab}, the entries of all ranks"
        _checks.refuse("vocab_size", repr(vocab_size), wanted)
    return vocab_size


def head(
    prefix: str, hidden: Any, weight: Any, bias: Any, process_group: Any
) -> tuple[Tensor, Tensor, Tensor | None, Shards | None]:
    """Hidden states, this rank's rows of weight and bias, and who holds which; ``prefix`` is that of the arguments'
    names.

    A DTensor weight is split over the vocabulary where a process group or hidden states that are a DTensor say so; else
    data-parallel training keeps it in parts, and it is gathered.
    """
    if process_group is None and not is_dtensor(hidden):
        return hidden, *_dtensor.head(prefix, hidden, weight, bias), None
    hidden = replicated(prefix + "hidden", hidden)
    weight, shards = local(prefix + "weight", weight, process_group, 0)
    return hidden, weight, None if bias is None else like(prefix + "bias", bias, shards, prefix + "weight", 0), shards


def other_head(
    prefix: str, hidden: Any, weight: Any, bias: Any, shards: Shards | None, other: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Another head, whole or split as ``other`` is."""
    if shards is None:
        return hidden, *_dtensor.head(prefix, hidden, weight, bias)
    hidden = replicated(prefix + "hidden", hidden)
    weight = like(prefix + "weight", weight, shards, other, 0)
    return hidden, weight, None if bias is None else like(prefix + "bias", bias, shards, other, 0)
