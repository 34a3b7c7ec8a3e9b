"""Losses over the global batch of data-parallel training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pyalign import _checks

__all__ = ["global_num_items"]


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
