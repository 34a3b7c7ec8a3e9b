"""Log-probs, entropies and cross-entropies of rows of logits in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyalign._types import LogprobResults, accumulation_dtype
from pyalign.reference.distill import checked_index


def capped_rows(logits: Tensor, softcap: float | None, counted: Tensor) -> Tensor:
    """(N, V) softcap(logits) in accumulation dtype; rows that aren't counted are zeros."""
    x = logits.reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits.dtype))
    x = torch.where(counted[:, None], x, 0.0)
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def logprob(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    want_entropy: bool,
    want_state: bool = False,
) -> LogprobResults:
    """(N,) log-probs of the targets and entropies, differentiable; 0 at ignored targets.

    logits (..., V), targets (N,).
    """
    counted = targets != ignore_index
    index, bad = checked_index("targets", targets, logits.shape[-1], counted)
    y = capped_rows(logits, softcap, counted)
    log_q = torch.log_softmax(y / temperature, -1)
    result = log_q.gather(-1, index[:, None]).squeeze(-1).masked_fill(bad, math.nan)
    entropy = None
    if want_entropy:
        impossible = log_q == -math.inf
        surprise = torch.where(impossible, 0.0, log_q)  # 0 log 0 = 0, and its derivative too
        entropy = -(torch.where(impossible, 0.0, log_q.exp()) * surprise).sum(-1)
        entropy = torch.where(counted, entropy, 0.0).masked_fill(bad, math.nan)
    state = None
    if want_state:
        top = y.detach().amax(-1)
        total = ((y.detach() - top[:, None]) / temperature).exp().sum(-1)
        state = torch.stack([top, total, torch.full_like(top, math.nan) if entropy is None else entropy.detach()], -1)
    return LogprobResults(torch.where(counted, result, 0.0), entropy, state)


def logprob_gradient(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    state: Tensor | None,
    upstream_logprob: Tensor | None,
    upstream_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """Writes into ``out``, which may be ``logits``, the gradient with respect to the logits."""
    with torch.enable_grad():
        x = logits.detach().to(accumulation_dtype(logits.dtype)).requires_grad_()
        results = logprob(x, targets, ignore_index, temperature, softcap, upstream_entropy is not None)
        pairs = [(results.logprob, upstream_logprob), (results.entropy, upstream_entropy)]
        given = [(y, upstream) for y, upstream in pairs if y is not None and upstream is not None]
        total = x.sum() * 0.0 if not given else torch.stack([(y * g).sum() for y, g in given]).sum()
    out.copy_(torch.autograd.grad(total, x)[0])


def row_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    """(N,) -(1 - e) log q_t - e mean log q + z lse^2, differentiable; 0 at ignored targets.

    logits (..., V), targets (N,).
    """
    counted = targets != ignore_index
    index, bad = checked_index("targets", targets, logits.shape[-1], counted)
    y = capped_rows(logits, softcap, counted)
    log_q = torch.log_softmax(y, -1)
    loss = -(1.0 - label_smoothing) * log_q.gather(-1, index[:, None]).squeeze(-1)
    if label_smoothing > 0:
        loss = loss - label_smoothing * log_q.mean(-1)
    if z_loss != 0:
        loss = loss + z_loss * torch.logsumexp(y, -1) ** 2
    return torch.where(counted, loss, 0.0).masked_fill(bad, math.nan)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    factor: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """(N,) losses, detached, and in ``out``, which may be ``logits``, ``factor`` times their gradient."""
    with torch.set_grad_enabled(out is not None):
        x = logits.detach().to(accumulation_dtype(logits.dtype)).requires_grad_(out is not None)
        loss = row_cross_entropy(x, targets, ignore_index, label_smoothing, z_loss, softcap)
    if out is not None:
        gradient = torch.autograd.grad(loss.sum(), x)[0]
        out.copy_(gradient if factor is None else gradient * factor)
    return loss.detach()
