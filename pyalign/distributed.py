"""Losses over the global batch of data-parallel training, and over a vocabulary that is split over ranks.

Every rank computes the loss of its own tokens (pairs, groups). DDP and FSDP2 average gradients over the ranks, so each
of W ranks takes ``W * loss(..., num_items=N)`` with N counted over all of them (:func:`global_num_items`): then the
gradient is that of the mean over the global batch, however ragged the ranks' shares are. A rank on which nothing counts
has a loss of 0 that takes part in the collectives of backward.

**FSDP2 and heads.** Losses from hidden states take ``model.lm_head.weight`` as it is. Between its module's forward and
backward passes FSDP2 keeps a parameter as a sharded DTensor: it is gathered once a call, whatever the number of chunks,
and its gradient is averaged over the mesh and sharded (one reduce-scatter), as FSDP2 does with the others. (Where
``set_gradient_divide_factor`` tells FSDP2 another divisor, the head's must be rescaled by hand.) What the root module
holds stays whole from its forward pass to backward, and is used without a collective. With a ``MixedPrecisionPolicy``
a sharded head is still in its own dtype: give ``weight.to(hidden.dtype)``, which is also cheaper to gather.

**Sequences over several ranks** (sequence or context parallelism). Losses per token need no more than N. Where a loss
is over sequences, sum the ranks' parts with the gradient of one's own, and proceed as above::

    part = sequence_logprobs(linear_token_logprobs(hidden, weight, labels))
    total = part.detach().clone()
    dist.all_reduce(total)
    logprobs = part + (total - part.detach())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pyalign import _checks

__all__ = ["VocabularyShards", "global_num_items"]


def global_num_items(count: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The number of items (tokens, pairs, groups) that count on all ranks: ``num_items=`` of a loss's mean.

    A rank's own mean divides by its own count, so the average over ranks weighs the tokens of a rank with few of them
    more. With N the count of all W ranks, and because DDP and FSDP average gradients over ranks,

        W * mean(..., num_items=N)

    on every rank gives the gradient of the mean over the global batch::

        num_items = global_num_items((labels != -100).sum())
        loss = dist.get_world_size() * distillation_loss(logits, teacher_logits, labels=labels, num_items=num_items)
        loss.backward()

    (The average of these losses over ranks is the mean over the global batch.) With gradient accumulation, count the
    tokens of all micro-batches first: their losses then add up.

    Args:
        count: () integer or floating, on the device that the group communicates from. It is left as it is.
        group: the process group to sum over; None: the default one, or no other process where none is initialised.

    Returns:
        () of the same dtype and device, the sum over ranks, which the host never reads.

    Raises:
        ValueError, TypeError: a count of the wrong shape or dtype.
    """
    if not isinstance(count, Tensor):
        _checks.refuse("count", type(count).__name__, "a 0-dim tensor, such as (labels != -100).sum()", TypeError)
    if count.dim() != 0:
        _checks.refuse("count", f"shape {tuple(count.shape)}", "a 0-dim tensor, such as (labels != -100).sum()")
    if count.dtype == torch.bool or count.is_complex():
        _checks.refuse("count", count.dtype, "an integer or floating dtype", TypeError)
    total = count.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
    elif group is not None:
        _checks.refuse("group", repr(group), "None, because no process group is initialised")
    return total


class VocabularyShards:
    """A vocabulary that is split over the ranks of a process group: ``process_group=`` of the losses.

    Rank r holds ``sizes[r]`` neighbouring entries, after those of the lower ranks. A bare process group does too; then
    every call asks all ranks for their sizes, a small collective that the host waits for. With the sizes known nothing
    is asked, and torch.compile and CUDA graphs can take the call::

        shards = VocabularyShards(group, [32064] * 4)
        loss = distillation_loss(student_logits, teacher_logits, process_group=shards)

    Args:
        process_group: a ``torch.distributed`` process group that this rank is in, or a 1-D DeviceMesh.
        sizes: the number of entries that each rank holds, 0 among them.

    Raises:
        ValueError, TypeError: no such group; sizes that aren't one int >= 0 for each of its ranks.
    """

    def __init__(self, process_group: Any, sizes: Sequence[int]) -> None:
        if isinstance(process_group, DeviceMesh):
            process_group = process_group.get_group()
        if not isinstance(process_group, dist.ProcessGroup):
            wanted = "a torch.distributed process group that this rank is in, or a 1-D DeviceMesh"
            _checks.refuse("process_group", type(process_group).__name__, wanted, TypeError)
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes)
        if len(sizes) != process_group.size() or not whole or sum(sizes) == 0:
            wanted = f"an int >= 0 for each of the group's {process_group.size()} ranks, not all of them 0"
            _checks.refuse("sizes", repr(sizes), wanted)
        self.group_name: str = process_group.group_name
        self.sizes = tuple(sizes)
        self.rank: int = process_group.rank()

    def __repr__(self) -> str:
        return f"VocabularyShards({self.group_name!r}, {list(self.sizes)})"
