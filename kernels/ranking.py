# Triton types kernels when it compiles them, and ships no annotations.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false
# A kernel function called from Python raises: a type checker believes that none returns.
# pyright: reportGeneralTypeIssues=false
"""Preference losses: the twin of ``csrc/common/ranking.h`` and the kernels over items and groups.

Items are served by one program, which also reduces: a batch has thousands of pairs. Each group is served by a program
of its own, tile by tile of its matrix of pairs, both triangles, so that every row's gradient is complete without
atomics; the program that ends last adds up the groups. Nothing of size K x K is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyalign._tickets import gpu_tickets
from pyalign._types import (
    PairOptions,
    PairResults,
    PairTensors,
    RankOptions,
    RankResults,
    RankTensors,
    stores_both,
)

from .common import (
    LOG2_E,
    check_dtype,
    exp_nonpositive,
    expm1_nonpositive,
    in_series,
    launch,
    log_parts,
    log_positive,
    log_series,
    phi_series,
    store_rounded,
    weigh,
)

# Functions


@triton.jit
def exp_any(x):
    """e^x for any x, to relative 2e-7: x = n log 2 + r; +inf where float32 has no number for it."""
    x = tl.where(x > 200, 200.0, tl.where(x < -200, -200.0, x))
    n = tl.floor(x * LOG2_E + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    low = tl.where(n > 127, 127.0, n)
    return tl.exp2(low) * tl.exp2(r * LOG2_E + (n - low))


@triton.jit
def log1p_nonnegative(x):
    """log(1 + x) for x >= 0. Where 1 + x < sqrt(2), r is x itself, not 1 + x rounded, less 1."""
    n, r = log_parts(1.0 + x)
    return tl.where(x == x, log_series(n, tl.where(n == 0.0, x, r)), x)


@triton.jit
def logistic(x):
    """log(1 + e^-x), sigmoid(x), sigmoid(-x)."""
    e = exp_nonpositive(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    positive = x > 0
    cost = log1p_nonnegative(e) + tl.where(positive, 0.0, -x)
    return cost, tl.where(positive, inverse, e * inverse), tl.where(positive, e * inverse, inverse)


@triton.jit
def kl_term(weight, weighted, x):
    """weight (e^x - 1 - x) where weight e^x = weighted."""
    far = (weighted - weight) - weigh(weight, x)
    return tl.where(in_series(x), weight * phi_series(x), far)


# Forms: the loss of an item and its derivatives in both scores. Names and formulas are those of ranking.h.


@triton.jit
def margin_form(z, smoothing, log_chosen, log_rejected, tau, FORM: tl.constexpr):
    """The forms of z alone: the loss and its derivative."""
    if FORM == "hinge":
        gap = 1.0 - z
        return tl.where(gap < 0, 0.0, gap), tl.where(gap > 0, -1.0, tl.where(gap <= 0, 0.0, gap))
    elif FORM == "exponential":
        e = exp_any(-z)
        return e, -e
    elif FORM == "robust":
        cost, _, down = logistic(z)
        by = 1.0 / (1.0 - 2.0 * smoothing)
        return cost - weigh(smoothing, z) * by, -down - smoothing * by
    elif FORM == "exo_pair":
        cost, up, down = logistic(z)
        loss = kl_term(up, 1.0 - smoothing, log_chosen + cost)
        loss += kl_term(down, smoothing + 0.0 * z, log_rejected + (cost + z))
        return loss, weigh(up * down, z - (log_chosen - log_rejected))
    elif FORM == "discopop":
        cost, _, down = logistic(z)
        mix_cost, mix_up, mix_down = logistic(z / tau)
        power = exp_any(-z - mix_cost)
        slope = -down * mix_down - cost * (mix_up * mix_down / tau) + power * (mix_down / tau - 1.0)
        return cost * mix_down + power, slope
    else:
        tl.static_assert(FORM == "logistic")
        cost, _, down = logistic(z)
        return cost + weigh(smoothing, z), smoothing - down


@triton.jit
def item_form(
    first, second, margin, scale, smoothing, log_chosen, log_rejected, tau, delta, positive_weight, negative_weight,
    FORM: tl.constexpr,
):  # fmt: skip
    target = 0.5 / scale
    if FORM == "ipo":
        gap = first - second - margin - target
        return gap * gap, 2.0 * gap, -2.0 * gap
    elif FORM == "nca_pair":
        cost, up, down = logistic(scale * first)
        against, _, _ = logistic(-scale * first)
        rejected, _, falls = logistic(-scale * second)
        return cost + 0.5 * (against + rejected), scale * (0.5 * up - down), scale * (0.5 * falls)
    elif FORM == "bco_pair":
        cost, _, down = logistic(scale * first - delta)
        rejected, _, falls = logistic(delta - scale * second)
        return cost + rejected, -scale * down, scale * falls
    elif FORM == "sppo_hard":
        up, down = first - target, second + target
        return up * up + down * down, 2.0 * up, 2.0 * down
    elif FORM == "apo_zero":
        _, up, down = logistic(scale * first)
        _, rises, falls = logistic(scale * second)
        return down + rises, -scale * (up * down), scale * (rises * falls)
    elif FORM == "apo_down":
        _, up, down = logistic(scale * first)
        _, rises, falls = logistic(scale * (first - second))
        slope = scale * (rises * falls)
        return up + falls, scale * (up * down) - slope, slope
    elif FORM == "odds_ratio":
        highest = -5.9604644775390625e-08
        c, r = tl.where(first > highest, highest, first), tl.where(second > highest, highest, second)
        miss_c, miss_r = -expm1_nonpositive(c), -expm1_nonpositive(r)
        cost, _, _ = logistic((c - r) + log_positive(miss_r / miss_c))
        top = tl.where(c > r, c, r)
        a, b = exp_nonpositive(c - top), exp_nonpositive(r - top)
        part = b / (a * miss_r + b * miss_c)
        return scale * cost, -scale * part, scale * part * (miss_c / miss_r)
    elif FORM == "binary":
        sign = tl.where(second > 0, scale, -scale)
        cost, _, down = logistic(sign * first)
        return cost, -sign * down, 0.0 * cost
    elif FORM == "kto":
        weight = tl.where(second > 0, positive_weight, negative_weight)
        sign = tl.where(second > 0, scale, -scale)
        _, up, down = logistic(sign * (first - margin))
        return weight * down, -(weight * sign) * (up * down), 0.0 * down
    else:
        loss, slope = margin_form(scale * (first - second) - margin, smoothing, log_chosen, log_rejected, tau, FORM)
        return loss, scale * slope, -scale * slope


# Items


@triton.jit
def load_side(x, reference, item, inside):
    value = tl.load(x + item, mask=inside, other=0.0).to(tl.float32)
    if reference is not None:
        value -= tl.load(reference + item, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["count"])
def pair_kernel(
    first,  # (N,)
    second,  # (N,) or None
    first_reference,  # (N,) or None
    second_reference,  # (N,) or None
    margins,  # (N,) or () float32, or None: margin
    labels,  # (N,) or None
    weights,  # (N,) float32 or None
    mask,  # (N,) or None
    num_items,  # () float32 or None
    loss,  # (N,) or () float32
    denominator,  # () float32
    gradient,  # (N,) or, with BOTH, (2, N) float32, or None
    rewards,  # (2, N) or (1, N) float32, or None
    count,
    scale,
    margin,
    smoothing,
    log_chosen,
    log_rejected,
    center,
    tau,
    delta,
    positive_weight,
    negative_weight,
    FORM: tl.constexpr,
    REDUCTION: tl.constexpr,
    MARGIN_STRIDE: tl.constexpr,
    CENTERED: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, count, BLOCK):
        item = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = item < count
        a = load_side(first, first_reference, item, inside)
        if second is not None:
            b = load_side(second, second_reference, item, inside)
        else:
            b = (tl.load(labels + item, mask=inside, other=0) != 0).to(tl.float32)
        m = margin + 0.0 * item.to(tl.float32)
        if margins is not None:
            m = tl.load(margins + item * MARGIN_STRIDE, mask=inside, other=0.0)
        if rewards is not None:
            tl.store(rewards + item, scale * a, mask=inside)
            if second is not None:
                tl.store(rewards + count + item, scale * b, mask=inside)
        cost, by_first, by_second = item_form(
            a, b, m, scale, smoothing, log_chosen, log_rejected, tau, delta, positive_weight, negative_weight, FORM
        )
        if CENTERED:
            cost += center * ((a + b) * (a + b))
            by_first += 2.0 * center * (a + b)
            by_second += 2.0 * center * (a + b)
        if weights is not None:
            weight = tl.load(weights + item, mask=inside, other=0.0)
            cost, by_first, by_second = cost * weight, by_first * weight, by_second * weight
        keep = inside
        if mask is not None:
            keep = keep & (tl.load(mask + item, mask=inside, other=0) != 0)
        cost = tl.where(keep, cost, 0.0)
        if gradient is not None:
            tl.store(gradient + item, tl.where(keep, by_first, 0.0), mask=inside)
            if BOTH:
                tl.store(gradient + count + item, tl.where(keep, by_second, 0.0), mask=inside)
        if REDUCTION == "none":
            tl.store(loss + item, cost, mask=inside)
        total += cost
        counted += keep.to(tl.int64)
    over = 1.0
    if REDUCTION == "mean":
        over = tl.sum(counted, 0).to(tl.float32)
        if num_items is not None:
            over = tl.load(num_items)
    tl.store(denominator, over)
    if REDUCTION != "none":
        tl.store(loss, tl.where(over == 0, 0.0, tl.sum(total, 0) / over))


# Groups


@triton.jit
def load_entries(scores, ranks, begin, place, size, scale):
    """float32 scores times ``scale``, and ranks, -1 past the group's end."""
    inside = place < size
    x = tl.load(scores + begin + place, mask=inside, other=0.0).to(tl.float32) * scale
    rank = tl.load(ranks + begin + place, mask=inside, other=-1)
    return tl.where(rank >= 0, x, 0.0), rank


@triton.jit
def count_pairs(ranks, begin, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The pairs of entries with different ranks."""
    total = tl.zeros((ROWS,), tl.int64)
    for row_start in range(0, size, ROWS):
        row = row_start + tl.arange(0, ROWS)
        rank = tl.load(ranks + begin + row, mask=row < size, other=-1)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            other = tl.load(ranks + begin + column, mask=column < size, other=-1)
            wins = (rank[:, None] >= 0) & (rank[:, None] < other[None, :])
            total += tl.sum(wins.to(tl.int64), 1)
    return tl.sum(total, 0)


@triton.jit
def pairwise_group(
    scores, ranks, gradient, begin, size, scale, margin, smoothing, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sum over all pairs of a group; the gradient is multiplied by ``factor``."""
    total = tl.zeros((ROWS,), tl.float32)
    for row_start in range(0, size, ROWS):
        row = row_start + tl.arange(0, ROWS)
        x, rank = load_entries(scores, ranks, begin, row, size, scale)
        slopes = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            y, other = load_entries(scores, ranks, begin, column, size, scale)
            both = (rank[:, None] >= 0) & (other[None, :] >= 0)
            wins = both & (rank[:, None] < other[None, :])
            loses = both & (rank[:, None] > other[None, :])
            z = (x[:, None] - y[None, :]) - margin * (other[None, :] - rank[:, None]).to(tl.float32)
            cost, slope = margin_form(tl.where(wins, z, -z), smoothing, 0.0, 0.0, 1.0, "logistic")
            total += tl.sum(tl.where(wins, cost, 0.0), 1)
            slopes += tl.sum(tl.where(wins, slope, tl.where(loses, -slope, 0.0)), 1)
        if gradient is not None:
            tl.store(gradient + begin + row, tl.where(rank >= 0, slopes * (scale * factor), 0.0), mask=row < size)
    return tl.sum(total, 0)


@triton.jit
def stage_weights(rank, other, share, EFRON: tl.constexpr):
    """w_ij of row i: 1 for what is ranked after it, its share for what ties with it, else 0. (ROWS, COLUMNS)."""
    both = (rank[:, None] >= 0) & (other[None, :] >= 0)
    weight = tl.where(both & (rank[:, None] < other[None, :]), 1.0, 0.0)
    return weight + tl.where(both & (rank[:, None] == other[None, :]), share[:, None] if EFRON else 1.0, 0.0)


@triton.jit
def listwise_group(
    scores, ranks, gradient, stages, begin, count, size, scale, EFRON: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Plackett-Luce: entry i costs log(sum_j w_ij e^(s_j - s_i)).

    ``stages`` (3, N) keeps the max, the log of the sum and the share of each entry's stage between the two passes; the
    log is +inf where there is none.
    """
    total = tl.zeros((ROWS,), tl.float32)
    for row_start in range(0, size, ROWS):
        row = row_start + tl.arange(0, ROWS)
        x, rank = load_entries(scores, ranks, begin, row, size, scale)
        tied, before, left = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            _, other = load_entries(scores, ranks, begin, column, size, scale)
            same = (rank[:, None] >= 0) & (rank[:, None] == other[None, :])
            tied += tl.sum(same.to(tl.int32), 1)
            before += tl.sum((same & (column[None, :] < row[:, None])).to(tl.int32), 1)
            left += tl.sum(((rank[:, None] >= 0) & (rank[:, None] <= other[None, :])).to(tl.int32), 1)
        share = 1.0 - before.to(tl.float32) / tl.maximum(tied, 1).to(tl.float32)
        top = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            y, other = load_entries(scores, ranks, begin, column, size, scale)
            weight = stage_weights(rank, other, share, EFRON)
            within = tl.where(weight > 0, y[None, :], -3.4028234663852886e38)
            best = tl.maximum(top, tl.max(within, 1))
            mass = mass * exp_nonpositive(top - best)
            mass += tl.sum(tl.where(weight > 0, weight * exp_nonpositive(y[None, :] - best[:, None]), 0.0), 1)
            top = best
        has_stage = left > 1
        log_mass = log_positive(mass)
        total += tl.where(has_stage, (top - x) + log_mass, 0.0)
        tl.store(stages + begin + row, top, mask=row < size)
        tl.store(stages + count + begin + row, tl.where(has_stage, log_mass, float("inf")), mask=row < size)
        tl.store(stages + 2 * count + begin + row, share, mask=row < size)
    if gradient is not None:
        tl.debug_barrier()
        for row_start in range(0, size, ROWS):
            row = row_start + tl.arange(0, ROWS)
            x, rank = load_entries(scores, ranks, begin, row, size, scale)
            slopes = tl.zeros((ROWS,), tl.float32)
            for start in range(0, size, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                inside = column < size
                _, other = load_entries(scores, ranks, begin, column, size, scale)
                top = tl.load(stages + begin + column, mask=inside, other=0.0)
                log_mass = tl.load(stages + count + begin + column, mask=inside, other=float("inf"))
                share = tl.load(stages + 2 * count + begin + column, mask=inside, other=0.0)
                weight = tl.trans(stage_weights(other, rank, share, EFRON))
                log_part = (x[:, None] - top[None, :]) - log_mass[None, :]
                slopes += tl.sum(tl.where(weight > 0, weight * exp_nonpositive(log_part), 0.0), 1)
            own = tl.load(stages + count + begin + row, mask=row < size, other=float("inf")) < float("inf")
            own = own | (x != x)
            slopes = (slopes - own.to(tl.float32)) * scale
            tl.store(gradient + begin + row, tl.where(rank >= 0, slopes, 0.0), mask=row < size)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["groups", "count", "size"])
def rank_kernel(
    scores,  # (N,)
    ranks,  # (N,)
    offsets,  # (G + 1,) or None: groups of ``size``
    num_items,  # () float32 or None
    loss,  # (G,) or () float32
    denominator,  # () float32
    gradient,  # (N,) float32 or None
    group_loss,  # (2, G) float32: losses and pairs
    stages,  # (3, N) float32, or None for pairs
    ticket,  # () int32, 0 before and after
    groups,
    count,
    size,
    scale,
    margin,
    smoothing,
    METHOD: tl.constexpr,
    OVER_GROUPS: tl.constexpr,
    REDUCTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    begin = group * size
    if offsets is not None:
        begin = tl.load(offsets + group)
        end = tl.load(offsets + group + 1)
        valid = (begin >= 0) & (begin <= end) & (end <= count)
        size = tl.where(valid, end - begin, 0).to(tl.int32)
    pairs = count_pairs(ranks, begin, size, ROWS, COLUMNS).to(tl.float32)
    if METHOD == "pairwise":
        factor = tl.where(pairs > 0, 1.0 / tl.maximum(pairs, 1.0), 0.0) if OVER_GROUPS else 1.0
        value = pairwise_group(
            scores, ranks, gradient, begin, size, scale, margin, smoothing, factor, ROWS, COLUMNS
        ) * factor  # fmt: skip
    else:
        value = listwise_group(
            scores, ranks, gradient, stages, begin, count, size, tl.where(pairs > 0, scale, 0.0), METHOD == "efron",
            ROWS, COLUMNS,
        )  # fmt: skip
        value = tl.where(pairs > 0, value, 0.0)
    if offsets is not None:
        value = tl.where(valid, value, float("nan"))
        pairs = tl.where(valid, pairs, float("nan"))
    tl.store(group_loss + group, value)
    tl.store(group_loss + groups + group, pairs)
    if REDUCTION == "none":
        tl.store(loss + group, value)

    # The program that ends last adds up.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == groups - 1:
        total = tl.zeros((BLOCK,), tl.float64)
        counted = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, groups, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < groups
            one = tl.load(group_loss + index, mask=inside, other=0.0, cache_modifier=".cg")
            of = tl.load(group_loss + groups + index, mask=inside, other=0.0, cache_modifier=".cg")
            total += one.to(tl.float64)
            counted += (tl.where(of > 0, 1.0, of) if OVER_GROUPS else of).to(tl.float64)  # 0 and NaN stay
        number = tl.sum(counted, 0).to(tl.float32)
        over = 1.0
        if REDUCTION == "mean":
            over = number
            if num_items is not None:
                over = tl.load(num_items)
        result = tl.where(over == 0, 0.0, tl.sum(total, 0) / over).to(tl.float32)
        if offsets is not None:  # NaN, and NaN gradients, unless the groups are a cut of all the scores
            whole = (tl.load(offsets) == 0) & (tl.load(offsets + groups) == count)
            whole = whole & (number == number)
            over = tl.where(whole, over, float("nan"))
            result = tl.where(whole, result, float("nan"))
        tl.store(denominator, over)
        if REDUCTION != "none":
            tl.store(loss, result)
        tl.store(ticket, 0)


# Backward


@triton.jit
def factor_of(upstream, denominator):
    over = tl.load(denominator)
    return tl.where(over == 0, 0.0, upstream / over)


@triton.jit(do_not_specialize=["count", "size"])
def gradient_kernel(
    gradient,  # (N,) or, with BOTH, (2, N) float32
    upstream,  # () or (G,) float32
    denominator,  # () float32
    result,  # (N,)
    second_result,  # (N,) or None
    count,  # N
    size,
    BOTH: tl.constexpr,  # else the second's gradient is the negative of the first's
    PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    by = factor_of(tl.load(upstream + (place // size if PER_GROUP else 0 * place), mask=inside, other=0.0), denominator)
    first = tl.load(gradient + place, mask=inside, other=0.0)
    store_rounded(result + place, first * by, inside)
    if second_result is not None:
        second = -first
        if BOTH:
            second = tl.load(gradient + count + place, mask=inside, other=0.0)
        store_rounded(second_result + place, second * by, inside)


@triton.jit(do_not_specialize=["count"])
def group_gradient_kernel(
    gradient,  # (N,) float32
    upstream,  # (G,) float32
    denominator,  # () float32
    offsets,  # (G + 1,)
    result,  # (N,)
    count,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    begin, end = tl.maximum(tl.load(offsets + group), 0), tl.minimum(tl.load(offsets + group + 1), count)
    by = factor_of(tl.load(upstream + group), denominator)
    for start in range(0, (end - begin).to(tl.int32), BLOCK):
        place = begin + start + tl.arange(0, BLOCK)
        value = tl.load(gradient + place, mask=place < end, other=0.0) * by
        store_rounded(result + place, value, place < end)


# The engine functions


def _bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.uint8)


def pair_loss(
    first: Tensor,
    second: Tensor | None,
    tensors: PairTensors,
    options: PairOptions,
    *,
    want_gradient: bool,
    want_rewards: bool,
) -> PairResults:
    """The loss of items; every tensor is contiguous."""
    check_dtype("scores", first)
    count, device = first.shape[0], first.device
    sides, both = 1 if second is None else 2, stores_both(options)
    loss = torch.empty((count,) if options.reduction == "none" else (), dtype=torch.float32, device=device)
    denominator = torch.empty((), dtype=torch.float32, device=device)
    gradient = torch.empty((2, count) if both else (count,), dtype=torch.float32, device=device)
    rewards = torch.empty(sides, count, dtype=torch.float32, device=device) if want_rewards else None
    smoothing = options.label_smoothing
    logs = _logs(smoothing) if options.form == "exo_pair" else (0.0, 0.0)
    block = min(max(triton.next_power_of_2(count), 64), 1024)
    launch(
        pair_kernel,
        1,
        4,
        first=first,
        second=second,
        first_reference=tensors.first_reference,
        second_reference=tensors.second_reference,
        margins=tensors.margin,
        labels=_bytes(tensors.labels),
        weights=tensors.weight,
        mask=_bytes(tensors.mask),
        num_items=tensors.num_items,
        loss=loss,
        denominator=denominator,
        gradient=gradient if want_gradient else None,
        rewards=rewards,
        count=count,
        scale=options.scale,
        margin=options.margin,
        smoothing=smoothing,
        log_chosen=logs[0],
        log_rejected=logs[1],
        center=options.center,
        tau=options.tau,
        delta=options.delta,
        positive_weight=options.positive_weight,
        negative_weight=options.negative_weight,
        FORM=options.form,
        REDUCTION=options.reduction,
        MARGIN_STRIDE=0 if tensors.margin is None else tensors.margin.dim(),
        CENTERED=options.center != 0,
        BOTH=both,
        BLOCK=block,
    )
    return PairResults(loss, denominator, gradient if want_gradient else None, rewards)


def _logs(smoothing: float) -> tuple[float, float]:
    return math.log1p(-smoothing), math.log(smoothing)


def _ticket(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return gpu_tickets(device)
    return torch.zeros((), dtype=torch.int32, device=device)


def ranked_loss(scores: Tensor, tensors: RankTensors, options: RankOptions, *, want_gradient: bool) -> RankResults:
    """The loss of groups; every tensor is contiguous."""
    check_dtype("scores", scores)
    device, offsets, count = scores.device, tensors.group_offsets, scores.numel()
    groups, size = scores.shape if offsets is None else (offsets.shape[0] - 1, 0)
    if groups == 0:  # no program, and nobody to write a result
        shape = (0,) if options.reduction == "none" else ()
        gradient = torch.zeros(count, dtype=torch.float32, device=device) if want_gradient else None
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return RankResults(zero.new_zeros(shape), zero, gradient)
    loss = torch.empty((groups,) if options.reduction == "none" else (), dtype=torch.float32, device=device)
    denominator = torch.empty((), dtype=torch.float32, device=device)
    gradient = torch.empty(count, dtype=torch.float32, device=device) if want_gradient else None
    stages = None
    if options.method != "pairwise":
        stages = torch.empty(3, count, dtype=torch.float32, device=device)
    tile = min(max(triton.next_power_of_2(size), 16), 64) if offsets is None else 32
    launch(
        rank_kernel,
        groups,
        1 if tile == 16 else 4,
        scores=scores,
        ranks=tensors.ranks,
        offsets=offsets,
        num_items=tensors.num_items,
        loss=loss,
        denominator=denominator,
        gradient=gradient,
        group_loss=torch.empty(2, groups, dtype=torch.float32, device=device),
        stages=stages,
        ticket=_ticket(device),
        groups=groups,
        count=count,
        size=size,
        scale=options.scale,
        margin=options.margin,
        smoothing=options.label_smoothing,
        METHOD=options.method,
        OVER_GROUPS=options.over_groups,
        REDUCTION=options.reduction,
        ROWS=16 if offsets is not None else min(tile, 32),
        COLUMNS=tile,
        BLOCK=256,
    )
    return RankResults(loss, denominator, gradient)


def score_gradient(
    gradient: Tensor,
    upstream: Tensor,
    denominator: Tensor,
    group_offsets: Tensor | None,
    size: int,
    dtype: torch.dtype,
    sides: int,
) -> list[Tensor]:
    """``sides`` times (N,) gradient * upstream / denominator as ``dtype``; upstream is () or one per group of ``size``.
    A gradient (N,) of two sides is that of the first, and of the second the negative."""
    count = gradient.shape[-1]
    results = [torch.empty(count, dtype=dtype, device=gradient.device) for _ in range(sides)]
    shared: dict[str, Any] = {
        "gradient": gradient, "upstream": upstream, "denominator": denominator, "result": results[0], "count": count,
    }  # fmt: skip
    if upstream.dim() == 1 and group_offsets is not None:
        launch(group_gradient_kernel, upstream.shape[0], 1, offsets=group_offsets, BLOCK=64, **shared)
        return results
    block = 1024
    launch(
        gradient_kernel,
        triton.cdiv(count, block),
        4,
        second_result=results[1] if sides == 2 else None,
        size=max(size, 1),
        BOTH=gradient.dim() == 2,
        PER_GROUP=upstream.dim() == 1,
        BLOCK=block,
        **shared,
    )
    return results
