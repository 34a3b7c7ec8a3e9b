"""Reward heads, win probabilities, best-of-n and the metrics of pairs in plain torch."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from pyalign._types import STATISTICS, MetricOptions, MetricTensors, accumulation_dtype
from pyalign.reference.ranking import check_offsets, padded, softplus


def last_rows(count: int, length: int, offsets: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """(B,) the row of each sequence's last token among ``count`` rows, -1 where it has none.

    offsets (B + 1,), or mask (B, length), or neither: every one of ``length`` counts.
    """
    if offsets is not None:
        if offsets.device.type == "cpu":
            check_offsets(offsets, count, "offsets", "the number of tokens")
        begin, end = offsets[:-1], offsets[1:]
        whole = (offsets[0] == 0) & (offsets[-1] == count)
        return torch.where(whole & (begin >= 0) & (begin < end) & (end <= count), end - 1, -1)
    place = torch.arange(length, device=like.device)
    sequences = like.shape[0]
    if mask is None:
        last = torch.full((sequences,), length - 1, device=like.device)
    elif length == 0:
        last = torch.full((sequences,), -1, device=like.device)
    else:
        last = torch.where(mask, place, -1).amax(1)
    return torch.where(last < 0, -1, last + length * torch.arange(sequences, device=like.device))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Products run in their own dtype."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def reward_scores(
    hidden: Tensor, head: Tensor, bias: Tensor | None, offsets: Tensor | None, mask: Tensor | None
) -> Tensor:
    """(B, C) scores of hidden states (T, H) or (B, S, H), differentiable; head (C, H), bias (C,)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = last_rows(flat.shape[0], 0 if hidden.dim() == 2 else hidden.shape[1], offsets, mask, hidden)
    there = (rows >= 0)[:, None]
    if flat.shape[0] == 0:  # where there would be no row 0 to index
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
    with _without_autocast(hidden.device.type):
        scores = torch.where(there, flat[rows.clamp(min=0)].to(head.dtype), 0.0) @ head.T
    if bias is not None:
        scores = scores + bias
    return torch.where(there, scores, math.nan)


def groups_of(scores: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(G, K) scores in accumulation dtype, and which of them there are; packed ones are padded to the largest."""
    x = scores.to(accumulation_dtype(scores.dtype))
    if offsets is None:
        return x, torch.ones_like(x, dtype=torch.bool)
    x, there = padded(x, torch.zeros_like(scores, dtype=torch.int64), offsets)
    return x, there >= 0


def win_matrix(x: Tensor, scale: float, counted: Tensor | None = None) -> Tensor:
    """(G, K, K) sigmoid(scale * (x_i - x_j)), 1/2 on the diagonal and where ``counted`` is False."""
    others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    counted = others if counted is None else counted & others
    return torch.sigmoid(torch.where(counted, scale * (x[:, :, None] - x[:, None, :]), 0.0))


def win_probabilities(scores: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    """(G, K, K) or, of packed groups, their blocks one after the other."""
    x, there = groups_of(scores, offsets)
    wins = win_matrix(x, scale)
    return wins if offsets is None else wins[there[:, :, None] & there[:, None, :]]


def expected_win_rates(scores: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    """(G, K) or (N,) the mean of an entry's wins over the others of its group; 1/2 where there are none."""
    x, there = groups_of(scores, offsets)
    both = there[:, :, None] & there[:, None, :]
    others = both & ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    opponents = others.sum(2)
    rates = torch.where(others, win_matrix(x, scale, both), 0.0).sum(2) / opponents.clamp(min=1)
    rates = torch.where(opponents > 0, rates, 0.5)
    return rates if offsets is None else rates[there]


def best_of_n(scores: Tensor, offsets: Tensor | None) -> Tensor:
    """(G,) where each group's best score is in the last dimension of ``scores``; -1 where there is none."""
    x, there = groups_of(scores.detach(), offsets)
    there = there & ~x.isnan()
    if x.shape[1] == 0:
        return torch.full((x.shape[0],), -1, device=x.device)
    best = torch.where(there, x, -math.inf).amax(1, keepdim=True)
    place = torch.arange(x.shape[1], device=x.device)
    first = torch.where(there & (x == best), place, x.shape[1]).amin(1)
    begin = 0 if offsets is None else offsets[:-1]
    return torch.where(there.any(1), first + begin, -1)


def preference_metrics(chosen: Tensor, rejected: Tensor, tensors: MetricTensors, options: MetricOptions) -> Tensor:
    """(categories, bins + 1, 8) float64 sums of ``STATISTICS`` over the pairs of each cell."""
    dtype = accumulation_dtype(chosen.dtype)
    cells = options.categories * (options.bins + 1)
    table = torch.zeros(cells, len(STATISTICS), dtype=torch.float64, device=chosen.device)
    pieces = 1 << 20  # at a time: the intermediate results of all pairs would be many times the scores
    for begin in range(0, chosen.shape[0], pieces):
        part = slice(begin, begin + pieces)
        margin, weight, mask, category = (None if x is None else x[part] for x in tensors)
        gap = chosen[part].to(dtype) - rejected[part].to(dtype)
        z = options.scale * gap - (options.margin if margin is None else margin)
        w = torch.ones_like(z) if weight is None else weight
        count = torch.ones_like(z) if mask is None else mask.to(dtype)
        confidence = torch.sigmoid(z.abs())
        index = ((confidence - 0.5) * (2 * options.bins)).long().clamp(0, options.bins - 1)
        cell = torch.where(z.isnan(), options.bins, index)
        if category is not None:
            cell = cell + category * (options.bins + 1)
        tied = torch.where(z.isnan(), z, (z == 0).to(dtype))
        right = (z > 0) + 0.5 * tied
        each = torch.stack(
            [torch.ones_like(z), w, w * w, w * right, w * tied, w * softplus(-z), w * torch.sigmoid(-z) ** 2,
             w * confidence], 1,
        )  # fmt: skip
        table.index_add_(0, cell, torch.where(count[:, None] > 0, each, 0.0).double())
    return table.view(options.categories, options.bins + 1, -1)
