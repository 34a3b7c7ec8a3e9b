"""Distillation losses in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign._types import Options, Results, Tokens, accumulation_dtype

NEG_INF = -math.inf


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """D(p, q) summed over the last dimension, from log-probabilities (..., V); a probability of zero weighs nothing."""
    no_p, no_q = log_p == NEG_INF, log_q == NEG_INF
    neither = no_p & no_q
    if kind == "forward_kl":
        return (log_p.exp() * (log_p.masked_fill(no_p, 0.0) - log_q.masked_fill(no_p, 0.0))).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q.masked_fill(no_q, 0.0) - log_p.masked_fill(no_q, 0.0))).sum(-1)
    if kind == "jsd":
        p_side, q_side = log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)
        log_m = torch.logaddexp(p_side + math.log(beta), q_side + math.log1p(-beta))
        teacher = (log_p.exp() * (p_side - log_m).masked_fill(no_p, 0.0)).sum(-1)
        student = (log_q.exp() * (q_side - log_m).masked_fill(no_q, 0.0)).sum(-1)
        return beta * teacher + (1.0 - beta) * student
    assert kind == "tvd"
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def counted_tokens(tokens: Tokens, count: int, device: torch.device) -> Tensor:
    """(N,) bool: mask AND labels != ignore_index AND teacher_rows >= 0."""
    counted = torch.ones(count, dtype=torch.bool, device=device)
    if tokens.mask is not None:
        counted = counted & tokens.mask
    if tokens.labels is not None:
        counted = counted & (tokens.labels != tokens.ignore_index)
    if tokens.teacher_rows is not None:
        counted = counted & (tokens.teacher_rows >= 0)
    return counted


def reduce(row_loss: Tensor, counted: Tensor, tokens: Tokens) -> Tensor:
    """Weights (N,) losses, drops the uncounted ones and reduces; the mean of nothing is 0."""
    if tokens.weight is not None:
        row_loss = row_loss * tokens.weight
    row_loss = torch.where(counted, row_loss, 0.0)
    if tokens.reduction == "none":
        return row_loss
    total = row_loss.sum()
    if tokens.reduction == "sum":
        return total
    denominator = counted.sum().to(total.dtype) if tokens.num_items is None else tokens.num_items
    return torch.where(denominator == 0, total * 0.0, total / torch.where(denominator == 0, 1.0, denominator))


def _can_raise(x: Tensor) -> bool:
    """Whether values may be looked at: not on a GPU, where that would mean to wait, and not in a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_index(name: str, index: Tensor, limit: int, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """``index`` with irrelevant and out-of-range entries set to 0, and which rows were out of range.

    On the CPU, outside torch.compile, an out-of-range entry raises instead.
    """
    bad = relevant & ((index < 0) | (index >= limit))
    if _can_raise(index) and bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        value = int(index[bad][0])
        raise ValueError(f"{name}: row {row} holds {value}; wanted 0 <= {name} < {limit}")
    return torch.where(relevant & ~bad, index, 0), bad


def _finish(
    soft: Tensor,
    bad: Tensor,
    scaled: Tensor,
    raw: Tensor,
    teacher_top: Tensor,
    counted: Tensor,
    tokens: Tokens,
    options: Options,
    want_metrics: bool,
) -> Results:
    """Adds the hard term to the soft losses (N,), reduces, and computes metrics. ``scaled`` is ``raw`` (N, V) / T."""
    loss = soft * options.temperature**2 if options.temperature_squared else soft
    if options.hard_weight > 0:
        assert tokens.targets is not None
        has_target = tokens.targets != tokens.ignore_index
        target, bad_target = checked_index("targets", tokens.targets, raw.shape[-1], counted & has_target)
        hard = F.cross_entropy(raw, target, reduction="none").where(has_target, 0.0)
        soft_part = (1.0 - options.hard_weight) * loss if options.hard_weight < 1 else 0.0
        loss = soft_part + options.hard_weight * hard
        bad = bad | bad_target
    loss = loss.masked_fill(bad, math.nan)
    entropy = agreement = None
    if want_metrics:
        log_q = torch.log_softmax(scaled.detach(), -1)
        entropy = -(log_q.exp() * log_q.masked_fill(log_q == NEG_INF, 0.0)).sum(-1).where(counted, 0.0)
        agreement = (first_argmax(raw.detach()) == teacher_top) & counted
    return Results(reduce(loss, counted, tokens), entropy, agreement)


def first_argmax(x: Tensor) -> Tensor:
    """The lowest index of the largest entry of each row (torch's argmax promises no order among equals)."""
    position = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), position, x.shape[-1]).amin(-1)


def distill(
    student: Tensor, teacher: Tensor, tokens: Tokens, options: Options, *, want_metrics: bool = False
) -> Results:
    """Divergence between softmax(teacher / T) and softmax(student / T) per row, differentiable in the student.

    student (..., V_s), teacher (..., V_t); both are cut to their first ``options.vocab`` entries.
    """
    dtype = torch.promote_types(accumulation_dtype(student.dtype), accumulation_dtype(teacher.dtype))
    count = math.prod(student.shape[:-1])
    counted = counted_tokens(tokens, count, student.device)
    raw = student[..., : options.vocab].reshape(count, options.vocab).to(dtype)
    other = teacher.detach()[..., : options.vocab].reshape(-1, options.vocab).to(dtype)
    bad = torch.zeros_like(counted)
    if tokens.teacher_rows is not None:
        index, bad = checked_index("teacher_rows", tokens.teacher_rows, other.shape[0], counted)
        other = other[index] if other.shape[0] else raw.detach()
    raw = torch.where(counted[:, None], raw, 0.0)
    other = torch.where(counted[:, None], other, 0.0)
    scaled = raw / options.temperature
    log_p, log_q = torch.log_softmax(other / options.temperature, -1), torch.log_softmax(scaled, -1)
    soft = divergence(log_p, log_q, options.divergence, options.beta)
    return _finish(soft, bad, scaled, raw, first_argmax(other), counted, tokens, options, want_metrics)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x); -inf for x >= 0, where rounding left no mass."""
    near = x > -math.log(2.0)
    inside = torch.where(x < 0, x, -1.0)
    result = torch.where(near, torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(inside)))
    return torch.where(x < 0, result, NEG_INF)


def duplicates(index: Tensor, present: Tensor, vocab: int) -> Tensor:
    """(N,) bool: which rows of ``index`` (N, k) hold a present entry twice; on the CPU such a row raises instead."""
    absent = vocab + torch.arange(index.shape[-1], device=index.device)
    ordered = torch.where(present, index, absent).sort(-1).values
    duplicate = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if _can_raise(index) and bool(duplicate.any()):
        raise ValueError(f"teacher.indices: row {int(duplicate.nonzero()[0, 0])} holds an index twice")
    return duplicate


def topk_distill(
    student: Tensor,
    logprobs: Tensor,
    indices: Tensor,
    residual: Tensor | None,
    tail: str,
    tokens: Tokens,
    options: Options,
    *,
    want_metrics: bool = False,
) -> Results:
    """Divergence over the teacher's k entries (and, for ``tail="bucket"``, all the rest as one category).

    student (..., V), logprobs and indices (..., k), residual (...).
    """
    dtype = accumulation_dtype(student.dtype)
    count, vocab, k = math.prod(student.shape[:-1]), options.vocab, indices.shape[-1]
    counted = counted_tokens(tokens, count, student.device)
    raw = student[..., :vocab].reshape(count, vocab).to(dtype)
    raw = torch.where(counted[:, None], raw, 0.0)
    scaled = raw / options.temperature

    log_p = logprobs.detach().reshape(-1, k).to(dtype)
    index = indices.reshape(-1, k).long()
    log_rest_p = None if residual is None else residual.detach().reshape(-1).to(dtype)
    bad = torch.zeros_like(counted)
    if tokens.teacher_rows is not None:
        row, bad = checked_index("teacher_rows", tokens.teacher_rows, log_p.shape[0], counted)
        if log_p.shape[0] == 0:
            row, log_p, index = row.new_zeros(count), log_p.new_full((1, k), NEG_INF), index.new_full((1, k), -1)
            log_rest_p = None if log_rest_p is None else log_rest_p.new_zeros(1)
        log_p, index = log_p[row], index[row]
        log_rest_p = None if log_rest_p is None else log_rest_p[row]

    # Entries: missing ones have probability zero on both sides.
    present = (index != -1) & counted[:, None]
    flat_index, bad_index = checked_index("teacher.indices", index, vocab, present)
    bad = bad | bad_index.any(-1) | duplicates(flat_index, present, vocab)
    log_p = torch.where(present, log_p, NEG_INF)
    log_q_all = torch.log_softmax(scaled, -1)
    log_q = torch.where(present, log_q_all.gather(-1, flat_index), NEG_INF)

    if tail == "bucket":
        member = torch.zeros(count, vocab + 1, dtype=torch.bool, device=student.device)
        member = member.scatter(-1, torch.where(present, flat_index, vocab), True)[:, :vocab]
        nothing_left = member.all(-1)
        if log_rest_p is None:
            log_rest_p = log1mexp(torch.logsumexp(log_p, -1)).masked_fill(nothing_left, NEG_INF)
        rest = log_q_all.masked_fill(member & ~nothing_left[:, None], NEG_INF)
        only_zeros = nothing_left | (rest == NEG_INF).all(-1)
        rest = torch.where(only_zeros[:, None], 0.0, rest)
        log_rest_q = torch.logsumexp(rest, -1).masked_fill(only_zeros, NEG_INF)
        log_p = torch.cat([log_p, log_rest_p[:, None]], -1)
        log_q = torch.cat([log_q, log_rest_q[:, None]], -1)
        log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
    elif tail == "renormalize":
        log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
        gathered = torch.where(present, scaled.gather(-1, flat_index), NEG_INF)
        empty = ~present.any(-1, keepdim=True)
        log_q = torch.where(empty, NEG_INF, torch.log_softmax(torch.where(empty, 0.0, gathered), -1))
        log_p = torch.where(empty, NEG_INF, log_p)
    else:
        assert tail == "drop"
    log_p = torch.where(counted[:, None], log_p, NEG_INF)
    log_q = torch.where(counted[:, None], log_q, NEG_INF)
    soft = divergence(log_p, log_q, options.divergence, options.beta)
    best = log_p[:, :k].argmax(-1, keepdim=True)
    teacher_top = index.gather(-1, best).squeeze(-1)
    return _finish(soft, bad, scaled, raw, teacher_top, counted, tokens, options, want_metrics)


def topk(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest log-probs of softmax(logits / T) per row (N, k), their indices, and the log of the rest's mass."""
    x = logits.detach().reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits.dtype))
    indices = x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    log_p = torch.log_softmax(x / temperature, -1)
    rest = log_p.scatter(-1, indices, NEG_INF)
    return log_p.gather(-1, indices), indices, torch.logsumexp(rest, -1)
