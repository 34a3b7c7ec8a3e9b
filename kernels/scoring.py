# Triton types kernels when it compiles them, and ships no annotations.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false
# A kernel function called from Python raises: a type checker believes that none returns.
# pyright: reportGeneralTypeIssues=false
"""Scoring in Triton: the twin of ``csrc/common/scoring.h`` and the kernels over sequences, groups and pairs.

A sequence's score is one program's work, whose blocks depend on nothing but the dtype: it has the same bits in every
batch. (So rows aren't read in vectors where their alignment would allow it.) A group's matrix is gone through in tiles,
both triangles, so that every row's sum is complete without atomics; a set of pairs in pieces, a program to each piece
and cell of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyalign._types import STATISTICS, MetricOptions, MetricTensors, RewardGradients, rows

from .common import check_dtype, launch, row_arguments, row_start, store_rounded
from .ranking import logistic

_STRIDES = ["hidden_inner", "hidden_outer", "hidden_stride"]

# Reward heads


@triton.jit(do_not_specialize=[*_STRIDES, "heads", "width", "length"])
def reward_kernel(
    hidden,  # (T, H) rows, behind two leading strides
    hidden_inner,
    hidden_outer,
    hidden_stride,
    head,  # (C, H) float32
    bias,  # (C,) float32, or None
    offsets,  # (B + 1,), or None: sequences of ``length``
    mask,  # (B, length), or None: every token counts
    last,  # (B,) the row that was read, -1 for none
    scores,  # (B, C) float32
    heads,
    width,
    length,
    BLOCK: tl.constexpr,
):
    sequence, c = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    if offsets is not None:
        end = tl.load(offsets + sequence + 1)
        row = tl.where(end > tl.load(offsets + sequence), end - 1, -1)
    else:
        place = length - 1
        if mask is not None:
            found = tl.full((BLOCK,), -1, tl.int32)
            for start in range(0, length, BLOCK):
                at = start + tl.arange(0, BLOCK)
                found = tl.where(tl.load(mask + sequence * length + at, mask=at < length, other=0) != 0, at, found)
            place = tl.max(found, 0)
        row = tl.where(place >= 0, sequence * length + place, -1)
    if c == 0:
        tl.store(last + sequence, row)
    x_row = hidden + row_start(tl.maximum(row, 0), hidden_inner, hidden_outer, hidden_stride, 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < width) & (row >= 0)
        x = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(head + c * width + column, mask=inside, other=0.0)
    score = tl.sum(total, 0)
    if bias is not None:
        score += tl.load(bias + c)
    tl.store(scores + sequence * heads + c, tl.where(row >= 0, score, float("nan")))


@triton.jit(do_not_specialize=["heads", "width"])
def reward_rows_kernel(
    upstream,  # (B, C) float32
    last,  # (B,)
    head,  # (C, H) float32
    gradient,  # (T, H), zero before
    heads,
    width,
    BLOCK: tl.constexpr,
):
    """dL/dx = sum_c u_c w_c in the rows that were read."""
    parts = tl.cdiv(width, BLOCK)
    sequence = tl.program_id(0).to(tl.int64) // parts
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(last + sequence)
    total = tl.zeros((BLOCK,), tl.float32)
    weights = head + column
    for c in range(heads):
        total += tl.load(upstream + sequence * heads + c) * tl.load(weights, mask=column < width, other=0.0)
        weights += width
    store_rounded(gradient + tl.maximum(row, 0) * width + column, total, (column < width) & (row >= 0))


@triton.jit(do_not_specialize=[*_STRIDES, "sequences", "heads", "width"])
def reward_columns_kernel(
    upstream,  # (B, C) float32
    last,  # (B,)
    hidden,  # (T, H) rows, behind two leading strides
    hidden_inner,
    hidden_outer,
    hidden_stride,
    gradient,  # (C, H) float32
    sequences,
    heads,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dL/dw_c = sum_b u_bc x_b, over the sequences in their order."""
    parts = tl.cdiv(width, COLUMNS)
    c = tl.program_id(0).to(tl.int64) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, sequences, ROWS):
        sequence = start + tl.arange(0, ROWS).to(tl.int64)
        row = tl.load(last + sequence, mask=sequence < sequences, other=-1)
        there = row >= 0
        u = tl.load(upstream + sequence * heads + c, mask=there, other=0.0)
        at = row_start(tl.maximum(row, 0), hidden_inner, hidden_outer, hidden_stride, 1)
        inside = there[:, None] & (column < width)[None, :]
        x = tl.load(hidden + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(inside, u[:, None] * x, 0.0), 0)
    tl.store(gradient + c * width + column, total, mask=column < width)


# Groups


@triton.jit(do_not_specialize=["size", "parts"])
def group_kernel(
    scores,  # (N,)
    offsets,  # (G + 1,), or None: groups of ``size``
    blocks,  # (G + 1,) where each packed group's matrix starts, for the matrix ops
    upstream,  # of the forward result, float32, for the gradients
    result,  # matrices or (N,)
    size,
    parts,  # programs that share a group
    scale,
    OP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    begin = group * size
    block = begin * size
    if offsets is not None:
        begin = tl.load(offsets + group)
        size = (tl.load(offsets + group + 1) - begin).to(tl.int32)
        if blocks is not None:
            block = tl.load(blocks + group)
    for first in range(part * ROWS, size, parts * ROWS):
        row = first + tl.arange(0, ROWS)
        x = tl.load(scores + begin + row, mask=row < size, other=0.0).to(tl.float32)
        if OP == "expected_win_rates_gradient":
            mine = tl.load(upstream + begin + row, mask=row < size, other=0.0)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            y = tl.load(scores + begin + column, mask=column < size, other=0.0).to(tl.float32)
            _, up, down = logistic(scale * (x[:, None] - y[None, :]))
            both = (row < size)[:, None] & (column < size)[None, :]
            others = both & (row[:, None] != column[None, :])
            place = block + row[:, None].to(tl.int64) * size + column[None, :]
            if OP == "win_probabilities":
                tl.store(result + place, tl.where(others, up, 0.5), mask=both)
            elif OP == "expected_win_rates":
                total += tl.sum(tl.where(others, up, 0.0), 1)
            else:
                if OP == "win_probabilities_gradient":
                    transposed = block + column[None, :].to(tl.int64) * size + row[:, None]
                    u = tl.load(upstream + place, mask=others, other=0.0)
                    u -= tl.load(upstream + transposed, mask=others, other=0.0)
                else:
                    u = mine[:, None] - tl.load(upstream + begin + column, mask=column < size, other=0.0)[None, :]
                total += tl.sum(tl.where(others, up * down * u, 0.0), 1)
        if OP != "win_probabilities":
            value = total
            if OP != "win_probabilities_gradient":
                value = total / tl.maximum(size - 1, 1).to(tl.float32)
            if OP == "expected_win_rates":
                value = tl.where(size > 1, value, 0.5)
            else:
                value *= scale
            store_rounded(result + begin + row, value, row < size)


@triton.jit(do_not_specialize=["size"])
def best_kernel(
    scores,  # (N,)
    offsets,  # (G + 1,), or None: groups of ``size``
    result,  # (G,)
    size,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    begin = group * size
    if offsets is not None:
        begin = tl.load(offsets + group)
        size = (tl.load(offsets + group + 1) - begin).to(tl.int32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    first = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(scores + begin + place, mask=place < size, other=float("nan")).to(tl.float32)
        better = (x > best) | ((first < 0) & (x == x))
        best, first = tl.where(better, x, best), tl.where(better, place, first)
    top = tl.max(best, 0)
    index = tl.min(tl.where((first >= 0) & (best == top), first, 0x7FFFFFFF), 0).to(tl.int64)
    found = index < 0x7FFFFFFF
    if offsets is not None:
        index += begin
    tl.store(result + group, tl.where(found, index, -1))


# Metrics


@triton.jit(do_not_specialize=["count", "per_piece", "bins", "cells"])
def metrics_kernel(
    chosen,  # (P,)
    rejected,  # (P,)
    margins,  # (P,) float32 or None
    weights,  # (P,) float32 or None
    mask,  # (P,) or None
    category,  # (P,) or None
    table,  # (pieces, cells, 8) float64
    count,
    per_piece,
    bins,
    cells,
    scale,
    margin,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    piece, cell = program // cells, program % cells
    begin = piece * per_piece
    pairs = tl.zeros((BLOCK,), tl.float32)
    total, squares, rights, ties = pairs, pairs, pairs, pairs
    losses, briers, confidences = pairs, pairs, pairs
    for start in range(0, per_piece, BLOCK):
        place = begin + start + tl.arange(0, BLOCK)
        inside = (place < count) & (start + tl.arange(0, BLOCK) < per_piece)
        gap = tl.load(chosen + place, mask=inside, other=0.0).to(tl.float32)
        gap -= tl.load(rejected + place, mask=inside, other=0.0).to(tl.float32)
        z = scale * gap
        if margins is not None:
            z -= tl.load(margins + place, mask=inside, other=0.0)
        else:
            z -= margin
        cost, up, down = logistic(z)
        confidence = tl.where(z > 0, up, down)
        known = z == z
        index = tl.where(known, (confidence - 0.5) * (2.0 * bins), 0.0).to(tl.int32)
        own = tl.where(known, tl.minimum(index, bins - 1), bins).to(tl.int64)
        if category is not None:
            own += tl.load(category + place, mask=inside, other=0) * (bins + 1)
        here = inside & (own == cell)
        if mask is not None:
            here = here & (tl.load(mask + place, mask=inside, other=0) != 0)
        w = tl.where(here, 1.0, 0.0)
        pairs += w
        if weights is not None:
            w = tl.load(weights + place, mask=here, other=0.0)
        tied = tl.where(known, (z == 0).to(tl.float32), z)
        right = (z > 0).to(tl.float32) + 0.5 * tied
        total += w
        squares += w * w
        rights += tl.where(here, w * right, 0.0)
        ties += tl.where(here, w * tied, 0.0)
        losses += tl.where(here, w * cost, 0.0)
        briers += tl.where(here, w * (down * down), 0.0)
        confidences += tl.where(here, w * confidence, 0.0)
    to = table + program * 8
    tl.store(to, tl.sum(pairs.to(tl.float64), 0))
    tl.store(to + 1, tl.sum(total.to(tl.float64), 0))
    tl.store(to + 2, tl.sum(squares.to(tl.float64), 0))
    tl.store(to + 3, tl.sum(rights.to(tl.float64), 0))
    tl.store(to + 4, tl.sum(ties.to(tl.float64), 0))
    tl.store(to + 5, tl.sum(losses.to(tl.float64), 0))
    tl.store(to + 6, tl.sum(briers.to(tl.float64), 0))
    tl.store(to + 7, tl.sum(confidences.to(tl.float64), 0))


# The engine functions


def _bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.uint8)


def reward_scores(
    hidden: Tensor, head: Tensor, bias: Tensor | None, offsets: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, C) scores and (B,) the rows that were read, -1 for none."""
    check_dtype("hidden", hidden)
    heads, width = head.shape
    sequences = hidden.shape[0] if offsets is None else offsets.shape[0] - 1
    scores = torch.empty(sequences, heads, dtype=torch.float32, device=hidden.device)
    last = torch.empty(sequences, dtype=torch.int64, device=hidden.device)
    launch(
        reward_kernel,
        sequences * heads,
        4,
        **row_arguments("hidden", rows(hidden)),
        head=head,
        bias=bias,
        offsets=offsets,
        mask=_bytes(mask),
        last=last,
        scores=scores,
        heads=heads,
        width=width,
        length=0 if offsets is not None else hidden.shape[1],
        BLOCK=1024,
    )
    return scores, last


def reward_gradient(
    upstream: Tensor,
    last: Tensor,
    hidden: Tensor | None,
    head: Tensor | None,
    count: int,
    dtype: torch.dtype,
    want_bias: bool,
) -> RewardGradients:
    """Gradients of ``count`` hidden states if the head is given, of the head if they are, of the bias if wanted."""
    (sequences, heads), device = upstream.shape, upstream.device
    by_hidden = by_head = by_bias = None
    if head is not None:
        width, block = head.shape[1], 1024
        by_hidden = torch.zeros(count, width, dtype=dtype, device=device)
        launch(
            reward_rows_kernel,
            sequences * triton.cdiv(width, block),
            4,
            upstream=upstream,
            last=last,
            head=head,
            gradient=by_hidden,
            heads=heads,
            width=width,
            BLOCK=block,
        )
    if hidden is not None:
        width, columns = hidden.shape[-1], 64
        by_head = torch.empty(heads, width, dtype=torch.float32, device=device)
        launch(
            reward_columns_kernel,
            heads * triton.cdiv(width, columns),
            4,
            upstream=upstream,
            last=last,
            **row_arguments("hidden", rows(hidden)),
            gradient=by_head,
            sequences=sequences,
            heads=heads,
            width=width,
            ROWS=16,
            COLUMNS=columns,
        )
    if want_bias:
        by_bias = torch.where(last[:, None] >= 0, upstream, 0.0).sum(0)
    return RewardGradients(by_hidden, by_head, by_bias)


def score_groups(
    op: str,
    scores: Tensor,
    offsets: Tensor | None,
    blocks: Tensor | None,
    upstream: Tensor | None,
    scale: float,
    result: Tensor,
) -> None:
    """Writes ``result``: see csrc/common/scoring_args.h."""
    check_dtype("scores", scores)
    groups, size = scores.shape if offsets is None else (offsets.shape[0] - 1, 0)
    mean = triton.cdiv(scores.numel(), max(groups, 1))
    shared: dict[str, Any] = {"scores": scores, "offsets": offsets, "result": result, "size": size}
    if op == "best_of_n":
        launch(best_kernel, groups, 1, BLOCK=min(max(triton.next_power_of_2(mean), 32), 256), **shared)
        return
    rows_at_once, columns = 16, min(max(triton.next_power_of_2(mean), 16), 64)
    parts = max(triton.cdiv(mean, 4 * rows_at_once), 1)
    launch(
        group_kernel,
        groups * parts,
        1 if columns == 16 else 4,
        blocks=blocks,
        upstream=upstream,
        parts=parts,
        scale=scale,
        OP=op,
        ROWS=rows_at_once,
        COLUMNS=columns,
        **shared,
    )


def preference_metrics(chosen: Tensor, rejected: Tensor, tensors: MetricTensors, options: MetricOptions) -> Tensor:
    """(categories, bins + 1, 8) float64 sums of ``STATISTICS``."""
    check_dtype("scores", chosen)
    count, cells, block = chosen.shape[0], options.categories * (options.bins + 1), 1024
    room = max((1 << 22) // (cells * len(STATISTICS)), 1)  # numbers in the pieces' tables
    pieces = max(min(triton.cdiv(count, 64 * block), room), 1)
    table = torch.empty(pieces, cells, len(STATISTICS), dtype=torch.float64, device=chosen.device)
    launch(
        metrics_kernel,
        pieces * cells,
        4,
        chosen=chosen,
        rejected=rejected,
        margins=tensors.margin,
        weights=tensors.weight,
        mask=_bytes(tensors.mask),
        category=tensors.category,
        table=table,
        count=count,
        per_piece=triton.cdiv(count, pieces),
        bins=options.bins,
        cells=cells,
        scale=options.scale,
        margin=options.margin,
        BLOCK=block,
    )
    return table.sum(0).view(options.categories, options.bins + 1, -1)
