"""Megatron-LM's sparse KL from cached teacher log-probs, under its name and signature.

Fits ``topk_kl_div`` of ``megatron/training/distillation/cached_logits_loss.py`` (commit d98e8a6, August 2026), which
``CachedLogitsKDLoss`` calls through its module::

    from megatron.training.distillation import cached_logits_loss
    from pyalign.integrations.megatron import topk_kl_div

    cached_logits_loss.topk_kl_div = topk_kl_div

- **Layout.** Student logits (S, B, V / tp), a rank's contiguous slice of the vocabulary in rank order; the teacher's
  log-probs and global ids (S, B, K); the result (B, S).
- **Label shift, masks, reduction.** None here: the caller multiplies by its loss mask, sums, and adds up over the
  tensor-parallel group. So the ranks' results add up to the loss: rank 0 returns it, the others zeros, and each has the
  whole gradient of its own slice.
- **Tail.** ``add_ghost_token=True`` (what ``CachedLogitsKDLoss`` passes) is ``tail="bucket"`` of
  :func:`pyalign.topk_distillation_loss`; False is ``tail="drop"``, which can be negative. Megatron takes the student's
  mass outside the K entries as 1 minus a sum, at least 1e-8; it is summed over the entries outside here, so that a
  peaked student keeps its gradient. Entries that Megatron masks (log-prob -1000, its sentinel) are missing ones.
- **In place.** Megatron subtracts the maximum from float32 logits in place; the logits are left alone here.
- **Refused.** A ``tp_size`` or ``tp_rank`` that isn't the group's, an id twice in one row (an error on a CPU, NaN on a
  GPU).
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from pyalign import TopKLogprobs, _checks, topk_distillation_loss
from pyalign.distributed import VocabularyShards

__all__ = ["topk_kl_div"]

_LOGPROB_SENTINEL = -1e3


def topk_kl_div(
    student_logits: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    tp_size: int,
    tp_rank: int,
    tp_group: dist.ProcessGroup | None,
    add_ghost_token: bool = False,
) -> Tensor:
    """KL(teacher || student) per token over the teacher's K entries, and the rest as one category if asked.

    Args:
        student_logits: (S, B, V / tp) float32, bfloat16, float16 or float64: this rank's slice.
        teacher_topk_logprobs: (S, B, K) log-probs; -1000 marks an entry that doesn't count.
        teacher_topk_indices: (S, B, K) int32 or int64 ids of the whole vocabulary.
        tp_size, tp_rank: the size of the tensor-parallel group and this rank in it.
        tp_group: the group; not read with ``tp_size=1``.
        add_ghost_token: everything outside the entries is one more category.

    Returns:
        (B, S) float32 (float64 for float64): the losses on rank 0, zeros on the others, to be added up over the group.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or value.
    """
    _checks.floating("student_logits", student_logits, 3)
    if student_logits.dim() != 3:
        _checks.refuse("student_logits", f"shape {tuple(student_logits.shape)}", "(S, B, V / tp)")
    shards = None
    if tp_size != 1:
        if tp_group is None or (dist.get_world_size(tp_group), dist.get_rank(tp_group)) != (tp_size, tp_rank):
            given = "no group" if tp_group is None else f"rank {dist.get_rank(tp_group)} of {tp_group.size()}"
            _checks.refuse("tp_group", given, f"one in which this process is rank {tp_rank} of {tp_size}")
        shards = VocabularyShards(tp_group, [student_logits.shape[-1]] * tp_size)
    elif tp_rank != 0:
        _checks.refuse("tp_rank", tp_rank, "0 with tp_size=1")
    _checks.floating("teacher_topk_logprobs", teacher_topk_logprobs, 3)
    present = teacher_topk_logprobs > _LOGPROB_SENTINEL
    teacher = TopKLogprobs(
        teacher_topk_logprobs.masked_fill(~present, -math.inf), teacher_topk_indices.masked_fill(~present, -1)
    )
    loss = topk_distillation_loss(
        student_logits,
        teacher,
        tail="bucket" if add_ghost_token else "drop",
        reduction="none",
        process_group=shards,
    )
    if tp_rank != 0:
        finite = loss.detach().nan_to_num(0.0, 0.0, 0.0)
        loss = loss - finite  # the value is rank 0's to give, the gradient is every rank's own
    return loss.transpose(0, 1).contiguous()
