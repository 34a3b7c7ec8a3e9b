"""Losses straight from hidden states in plain torch: all logits at once, in the accumulation dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign._linear import Projection, Settings
from pyalign._shards import copied, whole_vocabulary
from pyalign._types import LogprobResults, Options, Results, Tokens
from pyalign.reference import distill as _distill
from pyalign.reference import logprob as _logprob


def project(side: Projection, settings: Settings, counted: Tensor | None = None) -> Tensor:
    """softcap(hidden @ weight.T + bias), operands rounded to the dtype of the products and multiplied in the logits'.

    What lies in hidden states of tokens that don't count never meets a gradient. Of a vocabulary that is split over
    ranks, all logits are gathered.
    """
    hidden, weight, bias, softcap = side
    shards = settings.shards
    if shards is not None:
        hidden = copied(hidden, shards)
    if counted is not None:
        hidden = torch.where(counted[:, None], hidden, 0.0)
    if settings.gemm_dtype is not None:
        hidden, weight = hidden.to(settings.gemm_dtype), weight.to(settings.gemm_dtype)
    dtype = settings.logits_dtype
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits if shards is None else whole_vocabulary(logits, shards)


def linear_distill(
    student: Projection, teacher: Projection, tokens: Tokens, options: Options, settings: Settings, want_metrics: bool
) -> Results:
    """Divergence between the distributions of two projections, differentiable in the student's."""
    count, device = student.hidden.shape[0], student.hidden.device
    counted = _distill.counted_tokens(tokens, count, device)
    with torch.no_grad():
        matched = None if tokens.teacher_rows is not None else counted
        other = project(teacher, settings, matched)
    logits = project(student, settings, counted)
    return _distill.distill(logits, other, tokens, options, want_metrics=want_metrics)


def linear_topk_distill(
    student: Projection,
    teacher: tuple[Tensor, Tensor, Tensor | None, str],
    tokens: Tokens,
    options: Options,
    settings: Settings,
    want_metrics: bool,
) -> Results:
    """Divergence of a projection from a teacher's stored entries, differentiable in the projection."""
    counted = _distill.counted_tokens(tokens, student.hidden.shape[0], student.hidden.device)
    logits = project(student, settings, counted)
    return _distill.topk_distill(logits, *teacher, tokens, options, want_metrics=want_metrics)


def linear_cross_entropy(
    head: Projection,
    targets: Tensor,
    num_items: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    settings: Settings,
) -> Tensor:
    """Cross-entropy of targets (N,), reduced, differentiable in the projection."""
    counted = targets != ignore_index
    logits = project(head._replace(softcap=None), settings, counted)
    losses = _logprob.row_cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, head.softcap)
    return _distill.reduce(losses, counted, Tokens(num_items=num_items, reduction=reduction))


def linear_logprob(
    head: Projection, targets: Tensor, ignore_index: int, temperature: float, want_entropy: bool, settings: Settings
) -> LogprobResults:
    """Log-probs and entropies of targets (N,), differentiable in the projection."""
    logits = project(head._replace(softcap=None), settings, targets != ignore_index)
    return _logprob.logprob(logits, targets, ignore_index, temperature, head.softcap, want_entropy)
