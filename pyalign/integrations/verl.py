"""verl's top-k forward KL for on-policy distillation, under its name and signature.

Fits ``compute_forward_kl_topk`` of ``verl/trainer/distillation/fsdp/losses.py`` (commit 1dda039, August 2026), the
stage in which verl's FSDP and VeOmni workers see the logits. In every worker, for instance in the module that
``actor_rollout_ref.model.external_lib`` names::

    from pyalign.integrations import verl

    verl.install()  # tail="drop" for verl's own convention

- **Layout.** thd: student logits (1, N, V), the teacher's log-probs and ids nested (B, j, K), their values (N, K);
  results (1, N). Under Ulysses the teacher is cut to this rank's N positions, with verl's padding.
- **Label shift, masks, reduction.** None here: position t of the student meets position t of the teacher, and verl
  masks and aggregates the per-token losses later.
- **Tail.** verl's loss is the bare sum of p (log p - log q) over the K entries, which is negative wherever the student
  puts more mass on them than the teacher; verl then clamps the loss at 0, and such a token teaches nothing. The default
  here, ``tail="bucket"``, adds everything outside as one category: never negative, 0 only where the student agrees, and
  the clamp has nothing to do. ``tail="drop"`` is verl's sum.
- **Rows without a teacher.** verl fills the last position of a sequence, and padding, with one id K times. Such rows
  lose 0 and have no gradient.
- **Registry.** ``register_distillation_loss`` holds the stage after this one, which reads these results:
  ``loss_mode: forward_kl_topk`` stays as it is.
- **Refused.** ``log_prob_min_clamp`` (set it to null: log-probs are bounded by their own log-sum-exp here, and clamped
  entries would have no gradient), tensors that aren't nested, an id twice in a row (an error on a CPU, NaN on a GPU).
  The Megatron strategy, whose logits are cut along the vocabulary, keeps verl's own function.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import TopKLogprobs, _checks, topk_distillation_loss, topk_logprobs
from pyalign._types import TAILS
from pyalign.integrations._projects import imported

__all__ = ["compute_forward_kl_topk", "install"]


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
    *,
    tail: str = "bucket",
) -> dict[str, Tensor]:
    """Per-token KL from the teacher's K entries, and how the student's K entries overlap with them.

    Args:
        student_logits: (1, N, V) float32, bfloat16, float16 or float64.
        teacher_topk_log_probs: nested (B, j, K) log-probs at temperature 1.
        teacher_topk_ids: nested (B, j, K) int32 or int64.
        config: verl's ``DistillationConfig``; ``config.distillation_loss.log_prob_min_clamp`` must be None. Its
            ``use_chunked_topk`` asks for less memory, and none of the size of the logits is taken here in any case.
        data_format: "thd" or "bshd"; the teacher's values are the packed tokens in either.
        tail: "bucket", "drop" (verl's sum) or "renormalize", as in :func:`pyalign.topk_distillation_loss`.

    Returns:
        Tensors (1, N): ``distillation_losses`` float32 (float64 for float64); and, detached, ``student_mass`` and
        ``teacher_mass``, the probability of the K entries, ``overlap_count``, how many of them are among the student's
        K, and ``overlap_token_advantage``, the mean of -p (log p - log q) over those. 0 at rows without a teacher.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or value.
    """
    _checks.one_of("tail", tail, TAILS)
    _checks.one_of("data_format", data_format, ("thd", "bshd"))
    clamp = getattr(config.distillation_loss, "log_prob_min_clamp", None)
    if clamp is not None:
        _checks.refuse("log_prob_min_clamp", clamp, "None (null in verl's configuration)")
    _checks.floating("student_logits", student_logits, 3)
    for name, x in (("teacher_topk_log_probs", teacher_topk_log_probs), ("teacher_topk_ids", teacher_topk_ids)):
        if not isinstance(x, Tensor) or not x.is_nested:
            _checks.refuse(name, "a dense tensor" if isinstance(x, Tensor) else type(x).__name__, "a nested one")
    log_probs, ids = _this_rank(teacher_topk_log_probs.values(), teacher_topk_ids.values())  # (N, K)
    if student_logits.shape[:-1] != (1, ids.shape[0]) or log_probs.shape != ids.shape:
        given = f"logits {tuple(student_logits.shape)}, log-probs {tuple(log_probs.shape)}, ids {tuple(ids.shape)}"
        _checks.refuse("teacher_topk_ids", given, "(1, N, V), (N, K) and (N, K)")
    taught = _taught(ids)
    log_probs, ids = log_probs.masked_fill(~taught[:, None], -math.inf), ids.masked_fill(~taught[:, None], -1)
    teacher = TopKLogprobs(log_probs[None], ids[None])
    losses = topk_distillation_loss(student_logits, teacher, tail=tail, mask=taught[None], reduction="none")
    with torch.no_grad():
        metrics = _overlap(student_logits[0], log_probs, ids)
    return {"distillation_losses": losses, **{name: x[None] for name, x in metrics.items()}}


def _this_rank(log_probs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """This sequence-parallel rank's share of (N, K), padded at the end with missing entries."""
    ulysses = sys.modules.get("verl.utils.ulysses")
    size = 1 if ulysses is None else ulysses.get_ulysses_sequence_parallel_world_size()
    if size == 1:
        return log_probs, ids
    share = -(-ids.shape[0] // size)
    padding = (0, 0, 0, share * size - ids.shape[0])
    rank = ulysses.get_ulysses_sequence_parallel_rank()  # pyright: ignore[reportOptionalMemberAccess]
    mine = slice(rank * share, (rank + 1) * share)
    return F.pad(log_probs, padding, value=-math.inf)[mine], F.pad(ids, padding, value=-1)[mine]


def _taught(ids: Tensor) -> Tensor:
    """(N,) bool: rows with a teacher, which holds no id twice."""
    same = (ids == ids[:, :1]).all(-1) if ids.shape[-1] > 1 else torch.zeros_like(ids[:, 0], dtype=torch.bool)
    return ~same & (ids[:, 0] >= 0)


def _overlap(logits: Tensor, log_probs: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The four figures beside the loss, (N,) each."""
    own = topk_logprobs(logits, ids.shape[-1])
    normaliser = logits.gather(-1, own.indices[:, :1]).to(own.logprobs.dtype) - own.logprobs[:, :1]
    present = ids >= 0
    q_log = logits.gather(-1, ids.clamp(min=0).long()).to(own.logprobs.dtype) - normaliser
    p_log = log_probs.to(q_log.dtype)
    p, q = p_log.exp().where(present, 0.0), q_log.exp().where(present, 0.0)
    ordered = own.indices.sort(-1).values
    place = torch.searchsorted(ordered, ids.long()).clamp(max=ids.shape[-1] - 1)
    shared = (ordered.gather(-1, place) == ids) & present
    advantage = torch.where(shared & (p > 0), -p * (p_log - q_log), 0.0).sum(-1)
    count = shared.sum(-1)
    return {
        "student_mass": q.sum(-1),
        "teacher_mass": p.sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": advantage / count.clamp(min=1),
    }


def install(*, tail: str = "bucket") -> None:
    """Makes verl's FSDP and VeOmni workers use :func:`compute_forward_kl_topk`, in this process.

    Args:
        tail: as there.

    Raises:
        ModuleNotFoundError: verl, or the module that holds the function, is missing.
        AttributeError: the module has no ``compute_forward_kl_topk`` to replace.
    """
    _checks.one_of("tail", tail, TAILS)
    losses = imported("verl.trainer.distillation.fsdp.losses", "verl with on-policy distillation")
    if not hasattr(losses, "compute_forward_kl_topk"):
        raise AttributeError("verl.trainer.distillation.fsdp.losses has no compute_forward_kl_topk to replace")
    losses.compute_forward_kl_topk = functools.partial(compute_forward_kl_topk, tail=tail)
