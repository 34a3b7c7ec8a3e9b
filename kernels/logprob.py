# Triton types kernels when it compiles them, and ships no annotations.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false
# A kernel function called from Python raises: a type checker believes that none returns.
# pyright: reportGeneralTypeIssues=false
"""Log-probs, entropies, cross-entropies and their gradients in Triton: the twin of ``csrc/common/logprob.h``.

With y = softcap(x), z = y / T and q = softmax(z), a program walks its row to

1. fold it into a softmax state and, for the entropy, the distances to the max, unless it is given an earlier state;
2. finish the state into the target's log-prob, the entropy, a loss; and
3. map every entry into the gradient, a [i = t] + q_i (b + c log q_i) + u, times dz/dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyalign._types import LogprobResults, Rows, rows

from .common import (
    COLUMNS_PER_THREAD,
    ELSEWHERE,
    INFINITY,
    LOWEST,
    access,
    check_dtype,
    checked,
    clear,
    exp_nonpositive,
    exp_scaled,
    finite_max,
    group_size,
    group_sum,
    grouped,
    in_series,
    launch,
    load_logits,
    log_positive,
    multiple,
    phi_series,
    row_arguments,
    row_start,
    store_rounded,
    threads,
    warp_size,
    weigh,
)


@triton.jit
def tanh_with_slope(x):
    """tanh x and its derivative, from e^(-2 |x|); neither cancels, near 0 or far from it."""
    twice = -2.0 * tl.abs(x)
    e = exp_nonpositive(twice)
    scale = 1.0 / (1.0 + e)
    value = tl.where(in_series(twice), -(twice + phi_series(twice)), 1.0 - e) * scale
    return tl.where(x < 0.0, -value, value), 4.0 * e * (scale * scale)


@triton.jit
def load_capped(row, columns, vocab, softcap, SOFTCAP: tl.constexpr):
    """(y, dy/dx) at ``columns``; y is -inf from ``vocab`` on."""
    x = load_logits(row, columns, vocab, vocab, False)
    slope = 1.0
    if SOFTCAP:
        tanh, slope = tanh_with_slope(x / softcap)
        x = tl.where(columns < vocab, softcap * tanh, -INFINITY)
    return x, slope


@triton.jit
def raise_state(best, total, distance, top, inverse_temperature):
    """The sums of the states, which were taken at ``best``, at ``top``."""
    decay = exp_scaled(best - top, inverse_temperature)
    return total * decay, (distance + weigh(total, top - best)) * decay


@triton.jit(
    do_not_specialize=[
        *(f"{matrix}_{part}" for matrix in ("logits", "gradient") for part in ("inner", "outer", "stride")),
        *("vocab", "whole_vocab", "ignore_index"),
    ]
)
def logprob_kernel(
    logits,  # (N, V) rows, behind two leading strides
    logits_inner,
    logits_outer,
    logits_stride,
    gradient,  # (N, V) rows, or None; may be the logits
    gradient_inner,
    gradient_outer,
    gradient_stride,
    targets,  # (N,)
    given_state,  # (N, 3) float32: not folded again, or None
    upstream_logprob,  # (N,) float32, or None
    upstream_entropy,  # (N,) float32, or None
    factor,  # () float32, or None
    logprob,  # (N,) float32, or None
    entropy,  # (N,) float32, or None
    state,  # (N, 3) float32: max, sum, entropy; or None
    row_loss,  # (N,) float32, or None
    sum_above,  # (N,) float32: sum (z - z_target), or None
    ignore_index,
    vocab,
    whole_vocab,  # of all slices, where rows are split
    inverse_temperature,
    softcap,
    label_smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,  # wanted, or needed for its gradient
    SMOOTH: tl.constexpr,  # label_smoothing is not 0
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    vocab = multiple(vocab, ALIGN)
    logits_row = logits + row_start(row, logits_inner, logits_outer, logits_stride, ALIGN)
    if gradient is not None:
        gradient_row = gradient + row_start(row, gradient_inner, gradient_outer, gradient_stride, ALIGN)

    target = tl.load(targets + row)
    if target != ignore_index:
        # A target out of range is not read, and makes its row NaN. For one in another slice stands entry 0.
        elsewhere = target == ELSEWHERE
        known = ((target >= 0) & (target < vocab)) | elsewhere
        y_target = 0.0
        if logprob is not None or row_loss is not None:
            y_target = tl.load(logits_row + tl.where(elsewhere, 0, target), mask=known, other=0.0).to(tl.float32)
            if SOFTCAP:
                y_target = softcap * tanh_with_slope(y_target / softcap)[0]

        # Fold
        above = 0.0
        surprise = float("nan")
        if given_state is not None:
            top = tl.load(given_state + 3 * row)
            raw_total = tl.load(given_state + 3 * row + 1)
            if upstream_entropy is not None:
                surprise = tl.load(given_state + 3 * row + 2)
        else:
            AXIS: tl.constexpr = 1 if ALIGN > 1 else 0
            best = tl.full((BLOCK // GROUP,), LOWEST, tl.float32)
            totals = tl.zeros((BLOCK // GROUP,), tl.float32)
            distances = tl.zeros((BLOCK // GROUP,), tl.float32)
            aboves = tl.zeros((BLOCK // GROUP,), tl.float32)
            for start in range(0, vocab, BLOCK):
                columns = start + lanes
                y, _ = load_capped(logits_row, columns, vocab, softcap, SOFTCAP)
                x = grouped(y, ALIGN, GROUP)
                risen = tl.maximum(best, tl.max(x, AXIS))
                totals, distances = raise_state(best, totals, distances, risen, inverse_temperature)
                best = risen
                below = tl.expand_dims(risen, AXIS) - x
                e = exp_scaled(-below, inverse_temperature)
                totals += tl.sum(e, AXIS)
                if ENTROPY:
                    distances += tl.sum(weigh(e, below), AXIS)
                if SMOOTH:
                    aboves += group_sum(tl.where(columns < vocab, y - y_target, 0.0), ALIGN, GROUP)
            top = tl.max(best, 0)
            totals, distances = raise_state(best, totals, distances, top, inverse_temperature)
            raw_total = finite_max(top, tl.sum(totals, 0))  # 0 where all is -inf, which a slice may be
            above = tl.sum(aboves, 0) * inverse_temperature
        total = tl.where(known, checked(top, raw_total), float("nan"))

        # Finish
        log_total = log_positive(total)
        if ENTROPY and given_state is None:
            surprise = log_total + tl.sum(distances, 0) * inverse_temperature / total
        log_q = (y_target - top) * inverse_temperature - log_total
        log_sum_exp = top * inverse_temperature + log_total
        if logprob is not None:
            tl.store(logprob + row, log_q)
        if entropy is not None:
            tl.store(entropy + row, surprise)
        if state is not None:
            tl.store(state + 3 * row, top)
            tl.store(state + 3 * row + 1, tl.where(known, raw_total, float("nan")))
            tl.store(state + 3 * row + 2, surprise)
        if sum_above is not None:
            tl.store(sum_above + row, above)
        if row_loss is not None:
            loss = z_loss * (log_sum_exp * log_sum_exp) - log_q
            if SMOOTH:
                loss -= label_smoothing * above / vocab
            tl.store(row_loss + row, tl.where(log_q == -INFINITY, INFINITY, loss))

        # Map
        if gradient is not None:
            if row_loss is not None:
                scale = inverse_temperature
                if factor is not None:
                    scale *= tl.load(factor)
                slope_target = scale * (label_smoothing - 1.0)
                slope_mass = scale * (1.0 + 2.0 * z_loss * log_sum_exp)
                slope_surprise = 0.0
                slope_all = -scale * label_smoothing / whole_vocab
            else:
                slope_target = 0.0
                slope_surprise = 0.0
                slope_all = 0.0
                if upstream_logprob is not None:
                    slope_target = tl.load(upstream_logprob + row) * inverse_temperature
                slope_mass = -slope_target
                if upstream_entropy is not None:
                    slope_surprise = -tl.load(upstream_entropy + row) * inverse_temperature
                    slope_mass += weigh(slope_surprise, surprise)
            blocks = tl.cdiv(vocab, BLOCK)
            for i in range(blocks):
                columns = (blocks - 1 - i) * BLOCK + lanes
                y, slope = load_capped(logits_row, columns, vocab, softcap, SOFTCAP)
                q = exp_scaled(y - top, inverse_temperature) / total
                mass = slope_mass
                if upstream_entropy is not None:
                    mass += slope_surprise * ((y - top) * inverse_temperature - log_total)
                value = weigh(q, mass) + slope_all + tl.where(columns == target, slope_target, 0.0)
                store_rounded(gradient_row + columns, value * slope, columns < vocab)
    else:
        if logprob is not None:
            tl.store(logprob + row, 0.0)
        if entropy is not None:
            tl.store(entropy + row, 0.0)
        if state is not None:
            tl.store(state + 3 * row, 0.0)
            tl.store(state + 3 * row + 1, 1.0)
            tl.store(state + 3 * row + 2, 0.0)
        if row_loss is not None:
            tl.store(row_loss + row, 0.0)
        if sum_above is not None:
            tl.store(sum_above + row, 0.0)
        if gradient is not None:
            clear(gradient_row, vocab, BLOCK)


# Engine functions


def logprob(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    want_entropy: bool,
    want_state: bool,
) -> LogprobResults:
    """Log-probs of the targets (N,), entropies, and the states that spare a gradient the fold.

    logits (..., V) of float32, bfloat16 or float16, targets (N,) int64.
    """
    count, device = targets.shape[0], logits.device
    logprob = torch.empty(count, dtype=torch.float32, device=device)
    entropy = torch.empty(count, dtype=torch.float32, device=device) if want_entropy else None
    state = torch.empty((count, 3), dtype=torch.float32, device=device) if want_state else None
    _run(logits, None, targets, ignore_index, temperature, softcap, logprob=logprob, entropy=entropy, state=state)
    return LogprobResults(logprob, entropy, state)


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
    """Writes the gradient into ``out``: of the logits' shape, or the logits themselves; any dtype that kernels take."""
    _run(
        logits, out, targets, ignore_index, temperature, softcap, given_state=state, upstream_logprob=upstream_logprob,
        upstream_entropy=upstream_entropy,
    )  # fmt: skip


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
    """(N,) losses and, in ``out``, ``factor`` times their gradient; ``factor`` is a () float32 tensor on the device."""
    row_loss = torch.empty(targets.shape[0], dtype=torch.float32, device=logits.device)
    _run(
        logits, out, targets, ignore_index, 1.0, softcap, label_smoothing=label_smoothing, z_loss=z_loss, factor=factor,
        row_loss=row_loss,
    )  # fmt: skip
    return row_loss


def logprob_slice(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    want_entropy: bool,
    want_above: bool,
) -> tuple[LogprobResults, Tensor | None]:
    """Of rows that are split: targets may be ELSEWHERE, for which entry 0 stands. Also (N,) sum (z - z_target)."""
    count, device = targets.shape[0], logits.device
    logprob = torch.empty(count, dtype=torch.float32, device=device)
    entropy = torch.empty(count, dtype=torch.float32, device=device) if want_entropy else None
    above = torch.empty(count, dtype=torch.float32, device=device) if want_above else None
    state = torch.empty((count, 3), dtype=torch.float32, device=device)
    _run(
        logits, None, targets, ignore_index, temperature, softcap, logprob=logprob, entropy=entropy, state=state,
        above=above,
    )  # fmt: skip
    return LogprobResults(logprob, entropy, state), above


def cross_entropy_gradient(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    state: Tensor,
    factor: Tensor | None,
    whole_vocab: int,
    out: Tensor,
) -> None:
    """``factor`` times the gradient of ``cross_entropy`` over a slice of rows whose merged state is ``state``."""
    _run(
        logits, out, targets, ignore_index, 1.0, softcap, label_smoothing=label_smoothing, z_loss=z_loss, factor=factor,
        given_state=state, row_loss=torch.empty(targets.shape[0], dtype=torch.float32, device=logits.device),
        whole_vocab=whole_vocab,
    )  # fmt: skip


def _run(
    logits: Tensor,
    gradient: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    given_state: Tensor | None = None,
    upstream_logprob: Tensor | None = None,
    upstream_entropy: Tensor | None = None,
    factor: Tensor | None = None,
    logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    state: Tensor | None = None,
    row_loss: Tensor | None = None,
    above: Tensor | None = None,
    whole_vocab: int | None = None,
) -> None:
    check_dtype("logits", logits)
    vocab = logits.shape[-1]
    source = rows(logits)
    written = source if gradient is logits else None if gradient is None else rows(gradient)
    matrices = [source] + ([written] if written else [])
    align = access(vocab, [vocab], matrices, stored=gradient is not None)["ALIGN"]
    per_program = threads(vocab * logits.element_size(), 512)
    arguments: dict[str, Any] = {
        **row_arguments("logits", source),
        **row_arguments("gradient", written or Rows(logits, 0, 1, 0, 0)),
        "targets": targets,
        "given_state": given_state,
        "upstream_logprob": upstream_logprob,
        "upstream_entropy": upstream_entropy,
        "factor": factor,
        "logprob": logprob,
        "entropy": entropy,
        "state": state,
        "row_loss": row_loss,
        "sum_above": above,
        "whole_vocab": whole_vocab or vocab,
        "ignore_index": ignore_index,
        "vocab": vocab,
        "inverse_temperature": 1.0 / temperature,
        "softcap": softcap or 0.0,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "SOFTCAP": softcap is not None,
        "ENTROPY": entropy is not None or upstream_entropy is not None,
        "SMOOTH": label_smoothing > 0.0 or above is not None,
        "ALIGN": align,
        "GROUP": group_size(align, matrices),
        "BLOCK": per_program * COLUMNS_PER_THREAD,
    }
    if written is None:
        arguments["gradient"] = None
    launch(logprob_kernel, targets.shape[0], per_program // warp_size(logits.device), **arguments)
