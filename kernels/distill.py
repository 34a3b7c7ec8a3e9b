# Triton types kernels when it compiles them, and ships no annotations.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false
# A kernel function called from Python raises: a type checker believes that none returns.
# pyright: reportGeneralTypeIssues=false
"""Distillation losses and top-k extraction in Triton: the twin of ``csrc/common/distill.h``.

With p = softmax(teacher / T), q = softmax(student / T) and d = log q - log p, a program walks its row to

1. fold both sides into softmax states,
2. sum the divergence's terms, which are >= 0 and small where p and q are close, and
3. map every entry into the gradient: weight * upstream / denominator * d loss / d student.

The last two are one walk where the gradient does not need the sums (forward KL).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyalign._types import Options, Results, Rows, Tokens, rows

from .common import (
    COLUMNS_PER_THREAD,
    ELSEWHERE,
    INFINITY,
    LOWEST,
    access,
    check_dtype,
    checked,
    clear,
    denominator_of,
    exp_nonpositive,
    exp_scaled,
    expm1_nonpositive,
    finite_max,
    fold,
    fold_lane,
    group_size,
    group_sum,
    in_series,
    is_counted,
    launch,
    lead,
    leader,
    load_logits,
    log1mexp,
    log1p_nonpositive,
    log_positive,
    merge_checked,
    merge_states,
    multiple,
    phi_series,
    reduce_loss,
    row_arguments,
    row_factor,
    row_start,
    store_rounded,
    threads,
    token_arguments,
    warp_size,
    weigh,
)

MAX_K = 256

# Points: the teacher's and student's probability p and q of an entry, and d = log q - log p (0 where both are
# 0).


@triton.jit
def finish(student_max, student_total, teacher_max, teacher_total, inverse_temperature):
    """What two finished states say about every entry of their rows, for ``point``.

    Max and total stay apart: the difference of two log-sum-exps would carry the rounding of the logits'
    level. Where the two rows lie on one level, s - t is subtracted first and is nearly exact; else each row's
    max goes first.
    """
    ratio = log_positive(tl.div_rn(student_total, teacher_total))
    level = (student_max - teacher_max) * inverse_temperature + ratio
    together = tl.abs(level) <= 1.0
    student_origin = tl.where(together, 0.0, student_max)
    teacher_origin = tl.where(together, 0.0, teacher_max)
    log_ratio = tl.where(together, level, ratio)
    student_side = (student_max, 1.0 / student_total, student_origin)
    return student_side, (teacher_max, 1.0 / teacher_total, teacher_origin), log_ratio


@triton.jit
def point(student, teacher, pair, inverse_temperature):
    student_side, teacher_side, log_ratio = pair
    student_max, student_scale, student_origin = student_side
    teacher_max, teacher_scale, teacher_origin = teacher_side
    q = exp_scaled(student - student_max, inverse_temperature) * student_scale
    p = exp_scaled(teacher - teacher_max, inverse_temperature) * teacher_scale
    d = ((student - student_origin) - (teacher - teacher_origin)) * inverse_temperature - log_ratio
    return p, q, tl.where(p + q == 0.0, 0.0, d)


@triton.jit
def probability_gap(p, q, d):
    """q - p = p (e^d - 1), without cancellation where they are close."""
    return tl.where(in_series(d), p * (d + phi_series(d)), q - p)


@triton.jit
def kl_term(weight, weighted, x):
    """weight (e^x - 1 - x) where weight e^x = weighted: the summand of a KL."""
    return tl.where(in_series(x), weight * phi_series(x), (weighted - weight) - weigh(weight, x))


# Divergences D(p, q) = sum f(p, q):
#   term   its summand in the non-negative form, and the row's aux (masses of p and q must each sum to 1);
#   slope  dD/d(logit / T) of an entry, given the row's sums of loss and aux;
#   plain  f(p, q) itself, and flow, q df/dq: for partial sums over some of the categories, whose gradient is
#          flow_i - q_i sum_j flow_j.


@triton.jit
def mixture(p, q, d, beta):
    """m = beta p + (1 - beta) q, log m/p and log m/q, expanded around the larger of p and q in log space."""
    student_larger = d > 0.0
    distance = tl.where(student_larger, -d, d)
    weight = tl.where(student_larger, beta, 1.0 - beta)
    log_m = log1p_nonpositive(weight * expm1_nonpositive(distance))  # log m / max(p, q)
    m_over_p = log_m + tl.where(student_larger, d, 0.0)
    m_over_q = log_m - tl.where(student_larger, 0.0, d)
    return beta * p + (1.0 - beta) * q, m_over_p, m_over_q


@triton.jit
def term(p, q, d, beta, DIVERGENCE: tl.constexpr):
    aux = tl.zeros_like(p)
    if DIVERGENCE == "forward_kl":  # sum p (log p - log q)
        loss = kl_term(p, q, d)
    elif DIVERGENCE == "reverse_kl":  # sum q (log q - log p)
        loss = kl_term(q, p, -d)
    elif DIVERGENCE == "jsd":  # beta KL(p || m) + (1 - beta) KL(q || m)
        m, m_over_p, m_over_q = mixture(p, q, d, beta)
        aux = kl_term(q, m, m_over_q)
        loss = beta * kl_term(p, m, m_over_p) + (1.0 - beta) * aux
    else:
        tl.static_assert(DIVERGENCE == "tvd")  # 1/2 sum |p - q|
        loss = 0.5 * tl.abs(probability_gap(p, q, d))
        aux = flow(p, q, d, beta, DIVERGENCE)
    return loss, aux


@triton.jit
def slope(p, q, d, row_loss, row_aux, beta, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "forward_kl":  # q - p
        result = probability_gap(p, q, d)
    elif DIVERGENCE == "reverse_kl":  # q (d - D)
        result = weigh(q, d) - q * row_loss
    elif DIVERGENCE == "jsd":  # (1 - beta) q (log q/m - KL(q || m))
        result = flow(p, q, d, beta, DIVERGENCE) - (1.0 - beta) * (q * row_aux)
    else:  # q (g - sum q g), g = 1/2 sign(q - p)
        result = flow(p, q, d, beta, DIVERGENCE) - q * row_aux
    return result


@triton.jit
def plain(p, q, d, beta, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "forward_kl":
        result = -weigh(p, d)
    elif DIVERGENCE == "reverse_kl":
        result = weigh(q, d)
    elif DIVERGENCE == "jsd":
        _, m_over_p, m_over_q = mixture(p, q, d, beta)
        result = -beta * weigh(p, m_over_p) - (1.0 - beta) * weigh(q, m_over_q)
    else:
        result = 0.5 * tl.abs(probability_gap(p, q, d))
    return result


@triton.jit
def flow(p, q, d, beta, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "forward_kl":
        result = -p
    elif DIVERGENCE == "reverse_kl":
        result = weigh(q, d + 1.0)
    elif DIVERGENCE == "jsd":
        _, _, m_over_q = mixture(p, q, d, beta)
        result = (beta - 1.0) * weigh(q, m_over_q)
    else:
        gap = probability_gap(p, q, d)
        result = tl.where(gap > 0.0, 0.5 * q, tl.where(gap < 0.0, -0.5 * q, 0.0 * gap))
    return result


def _map_needs_sums(divergence: str) -> bool:
    """Whether ``slope`` reads the row's sums."""
    return divergence != "forward_kl"


# The hard term: cross-entropy of softmax(student) at temperature 1. A target of ignore_index asks for none,
# one out of range makes its row NaN, and ELSEWHERE is in another slice of a row that is split.


@triton.jit
def load_target(targets, row, student_row, vocab, ignore_index):
    """(target, its logit): -1 and 0 without a target, -2 and NaN for one out of range, -2 and 0 for one elsewhere."""
    target = tl.load(targets + row)
    ignored = target == ignore_index
    elsewhere = target == ELSEWHERE
    known = (target >= 0) & (target < vocab)
    logit = tl.load(student_row + target, mask=known, other=float("nan")).to(tl.float32)
    target = tl.where(known, target, -2)
    return tl.where(ignored, -1, target), tl.where(ignored | elsewhere, 0.0, logit)


@triton.jit
def store_states(to, student_max, student_total, teacher_max, teacher_total, hard_total):
    """A slice's states; a total is NaN where logits held +inf or NaN."""
    tl.store(to, student_max.to(tl.float64))
    tl.store(to + 1, finite_max(student_max, student_total).to(tl.float64))
    tl.store(to + 2, teacher_max.to(tl.float64))
    tl.store(to + 3, finite_max(teacher_max, teacher_total).to(tl.float64))
    tl.store(to + 4, finite_max(student_max, hard_total).to(tl.float64))


@triton.jit
def hard_loss(target, logit, student_max, hard_total):
    return tl.where(target == -1, 0.0, (student_max - logit) + log_positive(hard_total))


@triton.jit
def hard_slope(student, columns, target, logit, student_max, hard_total):
    """softmax(student) - [column is the target]; NaN with the target's logit, 0 without a target."""
    scale = tl.where(logit == logit, 1.0 / hard_total, float("nan"))
    q = exp_nonpositive(student - student_max) * scale
    return tl.where(target == -1, 0.0, q - tl.where(columns == target, 1.0, 0.0))


@triton.jit(
    do_not_specialize=[
        *(f"{matrix}_{part}" for matrix in ("student", "teacher", "gradient") for part in ("inner", "outer", "stride")),
        *("teacher_count", "vocab", "limit", "width", "ignore_index"),
    ]
)
def distill_kernel(
    student,  # (N, V) rows, behind two leading strides
    student_inner,
    student_outer,
    student_stride,
    teacher,  # (teacher_count, V) rows
    teacher_inner,
    teacher_outer,
    teacher_stride,
    gradient,  # (N, width) rows, or None; may be the student
    gradient_inner,
    gradient_outer,
    gradient_stride,
    row_loss,  # (N,) float32, or None
    entropy,  # (N,) float32, or None
    agreement,  # (N,) uint8, or None
    mask,  # (N,) or None
    labels,  # (N,) or None
    teacher_rows,  # (N,) or None
    weight,  # (N,) float32, or None
    targets,  # (N,) where HARD
    upstream,  # () float32, (N,) where PER_ROW, or None
    denominator,  # () float32, or None: count
    states,  # (N, 5) float64: student's max and total, teacher's, student's total at T = 1; None where not split
    sums,  # (N, 2) float64: loss and aux
    count,
    ignore_index,
    teacher_count,
    vocab,
    limit,
    width,
    inverse_temperature,
    soft_weight,
    soft_slope,  # of d divergence / d (student / T)
    hard_weight,
    beta,
    STAGE: tl.constexpr,  # of csrc/common/distill_args.h
    DIVERGENCE: tl.constexpr,
    MAP_NEEDS_SUMS: tl.constexpr,
    SUMS: tl.constexpr,  # a walk that sums, before or without the one that maps
    HARD: tl.constexpr,  # with a hard term
    WARM: tl.constexpr,  # T is not 1: the hard term needs its own total
    PER_ROW: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    limit = multiple(limit, ALIGN)
    width = multiple(width, ALIGN)
    student_row = student + row_start(row, student_inner, student_outer, student_stride, ALIGN)
    if gradient is not None:
        gradient_row = gradient + row_start(row, gradient_inner, gradient_outer, gradient_stride, ALIGN)

    if is_counted(row, row >= 0, mask, labels, teacher_rows, ignore_index):
        # A teacher row that does not exist is not read: it stays a row of -inf, and the loss is NaN.
        teacher_number = row
        if teacher_rows is not None:
            teacher_number = tl.load(teacher_rows + row)
        exists = teacher_number < teacher_count
        teacher_limit = multiple(tl.where(exists, limit, 0), ALIGN)
        teacher_number = tl.where(exists, teacher_number, 0)
        teacher_row = teacher + row_start(teacher_number, teacher_inner, teacher_outer, teacher_stride, ALIGN)
        if HARD:
            target, target_logit = load_target(targets, row, student_row, vocab, ignore_index)

        # Fold, unless an earlier call did
        if STAGE == "whole" or STAGE == "fold":
            student_max = tl.full((BLOCK // GROUP,), LOWEST, tl.float32)
            teacher_max = tl.full((BLOCK // GROUP,), LOWEST, tl.float32)
            student_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
            teacher_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
            hard_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
            student_best = tl.full((BLOCK,), -INFINITY, tl.float32)
            teacher_best = tl.full((BLOCK,), -INFINITY, tl.float32)
            student_first = lanes
            teacher_first = lanes
            for start in range(0, vocab, BLOCK):
                columns = start + lanes
                s = load_logits(student_row, columns, vocab, limit, RAGGED)
                t = load_logits(teacher_row, columns, vocab, teacher_limit, RAGGED)
                if HARD and WARM:
                    _, hard_sum = fold(student_max, hard_sum, s, 1.0, ALIGN, GROUP)
                student_max, student_sum = fold(student_max, student_sum, s, inverse_temperature, ALIGN, GROUP)
                teacher_max, teacher_sum = fold(teacher_max, teacher_sum, t, inverse_temperature, ALIGN, GROUP)
                if agreement is not None:
                    student_best, student_first = lead(student_best, student_first, s, columns)
                    teacher_best, teacher_first = lead(teacher_best, teacher_first, t, columns)
            student_top = tl.max(student_max, 0)
            teacher_top = tl.max(teacher_max, 0)
            hard_sum = merge_states(student_max, hard_sum, student_top, 1.0)
            student_sum = merge_states(student_max, student_sum, student_top, inverse_temperature)
            teacher_sum = merge_states(teacher_max, teacher_sum, teacher_top, inverse_temperature)
            if not WARM:
                hard_sum = student_sum
            if STAGE == "fold":  # a slice may hold nothing but -inf
                store_states(states + 5 * row, student_top, student_sum, teacher_top, teacher_sum, hard_sum)
            student_sum = checked(student_top, student_sum)
            teacher_sum = checked(teacher_top, teacher_sum)
            hard_sum = checked(student_top, hard_sum)
            if agreement is not None:
                agree = leader(student_best, student_first) == leader(teacher_best, teacher_first)
                agree = agree & (student_sum == student_sum) & (teacher_sum == teacher_sum)
                tl.store(agreement + row, agree.to(tl.uint8))
        else:
            student_top = tl.load(states + 5 * row).to(tl.float32)
            student_sum = tl.load(states + 5 * row + 1).to(tl.float32)
            teacher_top = tl.load(states + 5 * row + 2).to(tl.float32)
            teacher_sum = tl.load(states + 5 * row + 3).to(tl.float32)
            hard_sum = tl.load(states + 5 * row + 4).to(tl.float32)
        pair = finish(student_top, student_sum, teacher_top, teacher_sum, inverse_temperature)

        # Sum
        losses = tl.zeros((BLOCK // GROUP,), tl.float32)
        auxes = tl.zeros((BLOCK // GROUP,), tl.float32)
        surprise = tl.zeros((BLOCK // GROUP,), tl.float32)  # q (max - s) / T
        loss = 0.0
        aux = 0.0
        blocks = tl.cdiv(vocab, BLOCK)
        if STAGE == "map":
            loss = tl.load(sums + 2 * row).to(tl.float32)
            aux = tl.load(sums + 2 * row + 1).to(tl.float32)
        elif SUMS:
            for i in range(blocks):
                columns = (blocks - 1 - i) * BLOCK + lanes
                s = load_logits(student_row, columns, vocab, limit, RAGGED)
                t = load_logits(teacher_row, columns, vocab, teacher_limit, RAGGED)
                p, q, d = point(s, t, pair, inverse_temperature)
                term_loss, term_aux = term(p, q, d, beta, DIVERGENCE)
                losses += group_sum(term_loss, ALIGN, GROUP)
                auxes += group_sum(term_aux, ALIGN, GROUP)
                if entropy is not None:
                    part = weigh(q, (student_top - s) * inverse_temperature)
                    surprise += group_sum(part, ALIGN, GROUP)
            loss = tl.sum(losses, 0)
            aux = tl.sum(auxes, 0)
        if STAGE == "sum":
            tl.store(sums + 2 * row, loss.to(tl.float64))
            tl.store(sums + 2 * row + 1, aux.to(tl.float64))

        # Map
        if gradient is not None:
            factor = row_factor(row, weight, upstream, denominator, count, PER_ROW)
            soft_factor = soft_slope * factor
            hard_factor = hard_weight * factor
            blocks = tl.cdiv(width, BLOCK)
            for i in range(blocks):
                block = i if MAP_NEEDS_SUMS else blocks - 1 - i
                columns = block * BLOCK + lanes
                s = load_logits(student_row, columns, vocab, limit, RAGGED)
                t = load_logits(teacher_row, columns, vocab, teacher_limit, RAGGED)
                p, q, d = point(s, t, pair, inverse_temperature)
                value = slope(p, q, d, loss, aux, beta, DIVERGENCE) * soft_factor
                if HARD:
                    value = tl.where(soft_factor == 0.0, 0.0, value) + hard_factor * hard_slope(
                        s, columns, target, target_logit, student_top, hard_sum
                    )
                value = tl.where(columns < vocab, value, 0.0)
                store_rounded(gradient_row + columns, value, columns < width)
                if not MAP_NEEDS_SUMS:
                    term_loss, term_aux = term(p, q, d, beta, DIVERGENCE)
                    losses += group_sum(term_loss, ALIGN, GROUP)
                    if entropy is not None:
                        part = weigh(q, (student_top - s) * inverse_temperature)
                        surprise += group_sum(part, ALIGN, GROUP)
            if not MAP_NEEDS_SUMS:
                loss = tl.sum(losses, 0)

        if row_loss is not None:
            result = loss
            if STAGE == "whole":
                result = soft_weight * loss
                if HARD:
                    result = tl.where(soft_weight == 0.0, 0.0, result) + hard_weight * hard_loss(
                        target, target_logit, student_top, hard_sum
                    )
                if weight is not None:
                    result *= tl.load(weight + row)
            tl.store(row_loss + row, result)
        if entropy is not None:
            tl.store(entropy + row, log_positive(student_sum) + tl.sum(surprise, 0))
    else:
        if gradient is not None:
            clear(gradient_row, width, BLOCK)
        if row_loss is not None:
            tl.store(row_loss + row, 0.0)
        if entropy is not None:
            tl.store(entropy + row, 0.0)
        if agreement is not None:
            tl.store(agreement + row, 0)


@triton.jit(
    do_not_specialize=[
        *(f"{matrix}_{part}" for matrix in ("student", "gradient") for part in ("inner", "outer", "stride")),
        *("teacher_count", "k", "vocab", "limit", "width", "ignore_index"),
    ]
)
def topk_distill_kernel(
    student,  # (N, V) rows, behind two leading strides
    student_inner,
    student_outer,
    student_stride,
    logprobs,  # (teacher_count, k)
    indices,  # (teacher_count, k), -1 where there is no entry
    ordered,  # (teacher_count, k) indices, ascending in each row
    residual,  # (teacher_count,) or None
    gradient,  # (N, width) rows, or None; may be the student. scatter_kernel writes the entries of the set
    gradient_inner,
    gradient_outer,
    gradient_stride,
    entry_gradient,  # (N, k) float32: the gradients of the entries; where gradient is not None
    row_loss,  # (N,) float32, or None
    entropy,  # (N,) float32, or None
    agreement,  # (N,) uint8, or None
    mask,  # (N,) or None
    labels,  # (N,) or None
    teacher_rows,  # (N,) or None
    weight,  # (N,) float32, or None
    targets,  # (N,) where HARD
    upstream,  # () float32, (N,) where PER_ROW, or None
    denominator,  # () float32, or None: count
    count,
    ignore_index,
    teacher_count,
    k,
    vocab,
    limit,
    width,
    inverse_temperature,
    soft_weight,
    soft_slope,
    hard_weight,
    beta,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    HARD: tl.constexpr,
    WARM: tl.constexpr,
    PER_ROW: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,  # k up to a power of two
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    limit = multiple(limit, ALIGN)
    width = multiple(width, ALIGN)
    student_row = student + row_start(row, student_inner, student_outer, student_stride, ALIGN)
    if gradient is not None:
        gradient_row = gradient + row_start(row, gradient_inner, gradient_outer, gradient_stride, ALIGN)

    if is_counted(row, row >= 0, mask, labels, teacher_rows, ignore_index):
        teacher_number = row
        if teacher_rows is not None:
            teacher_number = tl.load(teacher_rows + row)
        exists = teacher_number < teacher_count
        teacher_number = tl.where(exists, teacher_number, 0)
        if HARD:
            target, target_logit = load_target(targets, row, student_row, vocab, ignore_index)

        # The teacher's entries, and what they say is wrong: an index out of range, or one that stands twice.
        entry = tl.arange(0, ENTRIES)
        place = teacher_number * k + entry
        known = tl.where(exists, k, 0)  # entries that may be read
        inside = entry < known
        index = tl.load(indices + place, mask=inside, other=-1).to(tl.int64)
        present = index != -1
        readable = (index >= 0) & (index < vocab)
        here = tl.load(ordered + place, mask=inside, other=-1)
        after = tl.load(ordered + place + 1, mask=entry + 1 < known, other=-1)
        wrong = (present & (readable == 0)) | ((here == after) & (here >= 0))
        sound = exists & (tl.sum(wrong.to(tl.int32), 0) == 0)
        entry_p = tl.load(logprobs + place, mask=inside & present, other=-INFINITY).to(tl.float32)  # log p
        entry_s = tl.load(student_row + index, mask=readable, other=-INFINITY).to(tl.float32)
        entry_max = tl.maximum(tl.max(entry_s, 0), LOWEST)

        # Fold the row, without the set where the rest is a category of its own.
        rest_max = tl.full((BLOCK // GROUP,), LOWEST, tl.float32)
        rest_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
        hard_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
        best = tl.full((BLOCK,), -INFINITY, tl.float32)
        first = lanes
        if TAIL != "renormalize" or HARD or entropy is not None or agreement is not None:
            next_place = teacher_number * k
            last_place = next_place + known
            member = tl.load(ordered + next_place, mask=exists, other=0x7FFFFFFF).to(tl.int64)
            for start in range(0, vocab, BLOCK):
                columns = start + lanes
                s = load_logits(student_row, columns, vocab, limit, RAGGED)
                if agreement is not None:
                    best, first = lead(best, first, s, columns)
                if TAIL == "bucket":
                    while member < start + BLOCK:
                        s = tl.where(columns == member, -INFINITY, s)
                        next_place += 1
                        member = tl.load(ordered + next_place, mask=next_place < last_place, other=0x7FFFFFFF)
                        member = member.to(tl.int64)
                if HARD and WARM:
                    _, hard_sum = fold(rest_max, hard_sum, s, 1.0, ALIGN, GROUP)
                rest_max, rest_sum = fold(rest_max, rest_sum, s, inverse_temperature, ALIGN, GROUP)
        rest_top = tl.max(rest_max, 0)
        hard_sum = merge_states(rest_max, hard_sum, rest_top, 1.0)
        rest_sum = merge_states(rest_max, rest_sum, rest_top, inverse_temperature)

        # Join the two parts of the row: student_max and student_sum are of what the losses' q is normalised
        # over, row_max and row_sum of the whole row.
        row_max = rest_top
        row_sum = rest_sum
        if TAIL == "bucket":
            row_max = tl.maximum(rest_top, entry_max)
            row_sum = rest_sum * exp_scaled(rest_top - row_max, inverse_temperature)
            row_sum += tl.sum(exp_scaled(entry_s - row_max, inverse_temperature), 0)
            hard_sum = hard_sum * exp_nonpositive(rest_top - row_max)
            hard_sum += tl.sum(exp_nonpositive(entry_s - row_max), 0)
        row_sum = checked(row_max, row_sum)
        hard_sum = checked(row_max, hard_sum)
        if not WARM:
            hard_sum = row_sum
        student_max = row_max
        student_sum = row_sum
        if TAIL == "renormalize":
            student_max = entry_max
            student_sum = checked(entry_max, tl.sum(exp_scaled(entry_s - entry_max, inverse_temperature), 0))

        # Categories: z = (student - student_max) / T beside log p, as logits at temperature 1.
        entry_z = (entry_s - student_max) * inverse_temperature
        rest_z = -INFINITY
        rest_p = -INFINITY
        teacher_max = 0.0
        teacher_sum = 1.0
        if TAIL != "drop":
            teacher_max = tl.maximum(tl.max(entry_p, 0), LOWEST)
            teacher_sum = tl.sum(exp_nonpositive(entry_p - teacher_max), 0)
            if TAIL == "bucket":
                if rest_sum != 0.0:  # NaN too
                    rest_z = (rest_top - row_max) * inverse_temperature + log_positive(rest_sum)
                if residual is not None:
                    rest_p = tl.load(residual + teacher_number, mask=exists, other=float("nan"))
                    rest_p = rest_p.to(tl.float32)
                else:
                    everything = tl.sum(present.to(tl.int32), 0) == vocab
                    rest_p = tl.where(everything, -INFINITY, log1mexp(teacher_max + log_positive(teacher_sum)))
                entries_max = teacher_max
                teacher_max = tl.maximum(entries_max, rest_p)
                teacher_sum *= exp_nonpositive(entries_max - teacher_max)
                teacher_sum += exp_nonpositive(rest_p - teacher_max)
            teacher_sum = checked(teacher_max, teacher_sum)
            if TAIL == "renormalize":
                # No entry at all: nothing to compare.
                empty = tl.sum(present.to(tl.int32), 0) == 0
                student_sum = tl.where(empty, 1.0, student_sum)
                teacher_sum = tl.where(empty, 1.0, teacher_sum)
        student_sum = tl.where(sound, student_sum, float("nan"))
        pair = finish(0.0, student_sum, teacher_max, teacher_sum, 1.0)
        p, q, d = point(entry_z, entry_p, pair, 1.0)
        if TAIL == "drop":
            loss = tl.sum(plain(p, q, d, beta, DIVERGENCE), 0)
            flows = tl.where(present, flow(p, q, d, beta, DIVERGENCE), 0.0)
            total_flow = tl.sum(flows, 0)
            entry_slope = flows - q * total_flow
            outside = -total_flow / student_sum
            outside_max = student_max
        else:
            losses, auxes = term(p, q, d, beta, DIVERGENCE)
            loss = tl.sum(losses, 0)
            aux = tl.sum(auxes, 0)
            outside = 0.0 * student_sum
            outside_max = row_max
            if TAIL == "bucket":
                p_rest, q_rest, d_rest = point(rest_z, rest_p, pair, 1.0)
                loss_rest, aux_rest = term(p_rest, q_rest, d_rest, beta, DIVERGENCE)
                loss += loss_rest
                aux += aux_rest
                rest_slope = slope(p_rest, q_rest, d_rest, loss, aux, beta, DIVERGENCE)
                outside = tl.where(rest_sum == 0.0, 0.0 * student_sum, rest_slope / rest_sum)
                outside_max = rest_top
            entry_slope = slope(p, q, d, loss, aux, beta, DIVERGENCE)

        # Metrics, before the gradient may replace the logits
        if agreement is not None:
            top_entry = tl.min(tl.where(entry_p == tl.max(entry_p, 0), entry, ENTRIES), 0)
            teacher_top = tl.sum(tl.where(entry == top_entry, index, 0), 0)
            agree = (leader(best, first) == teacher_top) & (row_sum == row_sum)
            tl.store(agreement + row, agree.to(tl.uint8))
        if entropy is not None:
            surprise = tl.zeros((BLOCK // GROUP,), tl.float32)
            blocks = tl.cdiv(vocab, BLOCK)
            for i in range(blocks):
                columns = (blocks - 1 - i) * BLOCK + lanes
                s = load_logits(student_row, columns, vocab, limit, RAGGED)
                exponential = exp_scaled(s - row_max, inverse_temperature)
                part = weigh(exponential, (row_max - s) * inverse_temperature)
                surprise += group_sum(part, ALIGN, GROUP)
            tl.store(entropy + row, log_positive(row_sum) + tl.sum(surprise, 0) / row_sum)

        # Map
        if gradient is not None:
            factor = row_factor(row, weight, upstream, denominator, count, PER_ROW)
            entry_slope *= soft_slope
            outside *= soft_slope
            if HARD:
                entry_slope = tl.where(soft_slope == 0.0, 0.0, entry_slope) + hard_weight * hard_slope(
                    entry_s, index, target, target_logit, row_max, hard_sum
                )
            tl.store(entry_gradient + row * k + entry, entry_slope * factor, mask=entry < k)
            blocks = tl.cdiv(width, BLOCK)
            for i in range(blocks):
                columns = (blocks - 1 - i) * BLOCK + lanes
                s = load_logits(student_row, columns, vocab, limit, RAGGED)
                if TAIL == "renormalize":
                    derivative = tl.zeros_like(s) + outside
                else:
                    derivative = exp_scaled(s - outside_max, inverse_temperature) * outside
                if HARD:
                    derivative = tl.where(soft_slope == 0.0, 0.0, derivative) + hard_weight * hard_slope(
                        s, columns, target, target_logit, row_max, hard_sum
                    )
                value = tl.where(columns < vocab, derivative * factor, 0.0)
                store_rounded(gradient_row + columns, value, columns < width)

        if row_loss is not None:
            result = soft_weight * loss
            if HARD:
                result = tl.where(soft_weight == 0.0, 0.0, result) + hard_weight * hard_loss(
                    target, target_logit, row_max, hard_sum
                )
            if weight is not None:
                result *= tl.load(weight + row)
            tl.store(row_loss + row, result)
    else:
        if gradient is not None:
            clear(gradient_row, width, BLOCK)
        if row_loss is not None:
            tl.store(row_loss + row, 0.0)
        if entropy is not None:
            tl.store(entropy + row, 0.0)
        if agreement is not None:
            tl.store(agreement + row, 0)


@triton.jit(
    do_not_specialize=[
        "gradient_inner",
        "gradient_outer",
        "gradient_stride",
        "teacher_count",
        "k",
        "vocab",
        "ignore_index",
    ]
)
def scatter_kernel(
    gradient,  # (N, width) rows
    gradient_inner,
    gradient_outer,
    gradient_stride,
    entry_gradient,  # (N, k) float32
    indices,  # (teacher_count, k)
    mask,  # (N,) or None
    labels,  # (N,) or None
    teacher_rows,  # (N,) or None
    ignore_index,
    teacher_count,
    k,
    vocab,
    ENTRIES: tl.constexpr,
):
    """Writes the gradients of the teacher's entries over what topk_distill_kernel left there.

    A kernel of its own: within one, not every GPU orders two threads' writes to one address.
    """
    row = tl.program_id(0).to(tl.int64)
    if is_counted(row, row >= 0, mask, labels, teacher_rows, ignore_index):
        teacher_number = row
        if teacher_rows is not None:
            teacher_number = tl.load(teacher_rows + row)
        entry = tl.arange(0, ENTRIES)
        inside = entry < tl.where(teacher_number < teacher_count, k, 0)
        index = tl.load(indices + teacher_number * k + entry, mask=inside, other=-1).to(tl.int64)
        value = tl.load(entry_gradient + row * k + entry, mask=inside, other=0.0)
        gradient_row = gradient + row_start(row, gradient_inner, gradient_outer, gradient_stride, 1)
        store_rounded(gradient_row + index, value, (index >= 0) & (index < vocab))


# Rows without a set, of which the caller knows the categories: their states, and a gradient of two exponentials.


@triton.jit(
    do_not_specialize=[
        *(f"{matrix}_{part}" for matrix in ("logits", "gradient") for part in ("inner", "outer", "stride")),
        *("k", "vocab", "limit", "width"),
    ]
)
def outside_kernel(
    logits,  # (N, V) rows
    logits_inner,
    logits_outer,
    logits_stride,
    mask,  # (N,) or None
    indices,  # (N, k) int64, ascending in each row; outside [0, vocab): none
    states,  # (N, 3) float64: max and total over the entries outside, their total at T = 1; or None
    exponentials,  # (N, 4) float64: a, m, b, n
    gradient,  # (N, width) rows: a e^((x - m) / T) + b e^(x - n), or None; may be the logits
    gradient_inner,
    gradient_outer,
    gradient_stride,
    k,
    vocab,
    limit,
    width,
    inverse_temperature,
    RAGGED: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    limit = multiple(limit, ALIGN)
    width = multiple(width, ALIGN)
    logits_row = logits + row_start(row, logits_inner, logits_outer, logits_stride, ALIGN)
    counted = row >= 0
    if mask is not None:
        counted = tl.load(mask + row) != 0
    if states is not None:
        best = tl.full((BLOCK // GROUP,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK // GROUP,), tl.float32)
        hard_total = tl.zeros((BLOCK // GROUP,), tl.float32)
        if counted:
            place = row * k
            last = place + k
            member = tl.load(indices + place, mask=place < last, other=0x7FFFFFFF)
            while (member < 0) & (place < last):
                place += 1
                member = tl.load(indices + place, mask=place < last, other=0x7FFFFFFF)
            for start in range(0, vocab, BLOCK):
                columns = start + lanes
                x = load_logits(logits_row, columns, vocab, limit, RAGGED)
                while member < start + BLOCK:
                    x = tl.where(columns == member, -INFINITY, x)
                    place += 1
                    member = tl.load(indices + place, mask=place < last, other=0x7FFFFFFF)
                _, hard_total = fold(best, hard_total, x, 1.0, ALIGN, GROUP)
                best, total = fold(best, total, x, inverse_temperature, ALIGN, GROUP)
        top = tl.max(best, 0)
        total = merge_states(best, total, top, inverse_temperature)
        hard_total = merge_states(best, hard_total, top, 1.0)
        tl.store(states + 3 * row, top.to(tl.float64))
        tl.store(states + 3 * row + 1, finite_max(top, total).to(tl.float64))
        tl.store(states + 3 * row + 2, finite_max(top, hard_total).to(tl.float64))
    if gradient is not None:
        gradient_row = gradient + row_start(row, gradient_inner, gradient_outer, gradient_stride, ALIGN)
        if counted:
            a = tl.load(exponentials + 4 * row).to(tl.float32)
            m = tl.load(exponentials + 4 * row + 1).to(tl.float32)
            b = tl.load(exponentials + 4 * row + 2).to(tl.float32)
            n = tl.load(exponentials + 4 * row + 3).to(tl.float32)
            for start in range(0, width, BLOCK):
                columns = start + lanes
                x = load_logits(logits_row, columns, vocab, limit, RAGGED)
                value = weigh(a, exp_scaled(x - m, inverse_temperature)) + weigh(b, exp_nonpositive(x - n))
                store_rounded(gradient_row + columns, tl.where(columns < vocab, value, 0.0), columns < width)
        else:
            clear(gradient_row, width, BLOCK)


# Top-k extraction. Entries are ordered by key: larger logits first, of equals the lower index. A block's lane
# takes every BLOCK-th column, and the k largest entries stand in the k lanes whose largest entries have the
# largest keys. So one walk folds the lanes; the states of all others are the tail; and of the k lanes, k * V
# / BLOCK candidates, what is not among the k largest joins the tail.

INDEX_BITS = tl.constexpr(18)
INDEX_MASK = tl.constexpr((1 << 18) - 1)


@triton.jit
def key_of(value, index, DROPPED_BITS: tl.constexpr):
    """int64 >= 0, larger for larger values and, of equals, for lower indices.

    DROPPED_BITS of a float are always the same in the logits' own dtype. NaN counts as -inf.
    """
    value = tl.where(value == 0.0, 0.0, tl.where(value == value, value, -INFINITY))  # -0 equals 0
    bits = value.to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return ((rank >> DROPPED_BITS) << INDEX_BITS) | (index ^ INDEX_MASK)


@triton.jit
def kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of the distinct ``keys`` (-1 is none), or less where no key lies between."""
    threshold = tl.sum(keys * 0, 0)
    step = (threshold + 1) << (BITS - 1)
    reach = tl.sum((keys >= 0).to(tl.int32), 0)
    while (step > 0) & (reach != k):
        trial = threshold + step
        n = tl.sum((keys >= trial).to(tl.int32), 0)
        reach = tl.where(n >= k, n, reach)
        threshold = tl.where(n >= k, trial, threshold)
        step = step >> 1
    return threshold


@triton.jit(do_not_specialize=["logits_inner", "logits_outer", "logits_stride", "k", "vocab", "limit"])
def lanes_kernel(
    logits,  # (N, V) rows
    logits_inner,
    logits_outer,
    logits_stride,
    chosen,  # (N, k) int32: the lanes that hold the k largest entries
    states,  # (N, 4) float32: max and total of the row, and of the lanes not chosen
    k,
    vocab,
    limit,
    inverse_temperature,
    DROPPED_BITS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    limit = multiple(limit, ALIGN)
    logits_row = logits + row_start(row, logits_inner, logits_outer, logits_stride, ALIGN)

    best = tl.full((BLOCK,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = lanes
    for start in range(0, vocab, BLOCK):
        columns = start + lanes
        x = load_logits(logits_row, columns, vocab, limit, RAGGED)
        total = fold_lane(best, total, x, inverse_temperature)
        best, first = lead(best, first, x, columns)
    anchor = tl.maximum(best, LOWEST)
    row_max = tl.max(anchor, 0)
    row_sum = merge_checked(anchor, total, row_max, inverse_temperature)

    keys = tl.where(lanes < vocab, key_of(best, first, DROPPED_BITS), -1)
    threshold = kth_largest(keys, k, 32 - DROPPED_BITS + INDEX_BITS)
    taken = keys >= threshold
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen + row * k + place, lanes, mask=taken & (place < k))

    rest = tl.where(taken, LOWEST, anchor)
    rest_max = tl.max(rest, 0)
    rest_sum = merge_states(rest, tl.where(taken, 0.0, total), rest_max, inverse_temperature)
    tl.store(states + row * 4, row_max)
    tl.store(states + row * 4 + 1, row_sum)
    tl.store(states + row * 4 + 2, rest_max)
    tl.store(states + row * 4 + 3, rest_sum)


@triton.jit(do_not_specialize=["logits_inner", "logits_outer", "logits_stride", "k", "vocab"])
def select_kernel(
    logits,  # (N, V) rows
    logits_inner,
    logits_outer,
    logits_stride,
    chosen,  # (N, k) int32
    states,  # (N, 4) float32
    keys,  # (N, k) int64: of the k largest entries, in any order
    residual,  # (N,) float32
    k,
    vocab,
    inverse_temperature,
    DROPPED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # of lanes_kernel
    DEPTH: tl.constexpr,  # columns of a lane, up to a power of two
    ENTRIES: tl.constexpr,  # k up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits + row_start(row, logits_inner, logits_outer, logits_stride, 1)
    row_max = tl.load(states + row * 4)
    row_sum = tl.load(states + row * 4 + 1)
    rest_max = tl.load(states + row * 4 + 2)
    rest_sum = tl.load(states + row * 4 + 3)

    candidate = tl.arange(0, ENTRIES * DEPTH)
    slot = candidate // DEPTH
    lane = tl.load(chosen + row * k + slot, mask=slot < k, other=0)
    column = lane + (candidate % DEPTH) * BLOCK
    inside = (slot < k) & (column < vocab)
    x = tl.load(logits_row + column, mask=inside, other=-INFINITY)
    key = tl.where(inside, key_of(x.to(tl.float32), column, DROPPED_BITS), -1)
    threshold = kth_largest(key, k, 32 - DROPPED_BITS + INDEX_BITS)
    taken = key >= threshold
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(keys + row * k + place, key, mask=taken & (place < k))

    # Read again, from the cache: registers are short.
    x = tl.load(logits_row + column, mask=inside & (key < threshold), other=-INFINITY)
    evicted = x.to(tl.float32)
    tail_max = tl.maximum(rest_max, tl.max(evicted, 0))
    tail_sum = rest_sum * exp_scaled(rest_max - tail_max, inverse_temperature)
    tail_sum += tl.sum(exp_scaled(evicted - tail_max, inverse_temperature), 0)
    tail = (tail_max - row_max) * inverse_temperature + (log_positive(tail_sum) - log_positive(row_sum))
    tl.store(residual + row, tl.where((tail_sum == 0.0) & (row_sum == row_sum), -INFINITY, tail))


@triton.jit(do_not_specialize=["logits_inner", "logits_outer", "logits_stride", "k"])
def order_kernel(
    logits,  # (N, V) rows
    logits_inner,
    logits_outer,
    logits_stride,
    states,  # (N, 4) float32
    keys,  # (N, k) int64
    logprobs,  # (N, k) float32
    indices,  # (N, k) int64
    k,
    inverse_temperature,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits + row_start(row, logits_inner, logits_outer, logits_stride, 1)
    row_max = tl.load(states + row * 4)
    row_sum = tl.load(states + row * 4 + 1)
    entry = tl.arange(0, ENTRIES)
    key = tl.sort(tl.load(keys + row * k + entry, mask=entry < k, other=-1), descending=True)
    index = (key & INDEX_MASK) ^ INDEX_MASK
    value = tl.load(logits_row + index, mask=entry < k, other=-INFINITY).to(tl.float32)
    log_prob = (value - row_max) * inverse_temperature - log_positive(row_sum)
    tl.store(logprobs + row * k + entry, log_prob, mask=entry < k)
    tl.store(indices + row * k + entry, index, mask=entry < k)


@triton.jit(do_not_specialize=["x_inner", "x_outer", "x_stride", "width", "chunks"])
def scale_kernel(
    x,  # (N, width) rows
    x_inner,
    x_outer,
    x_stride,
    factor,  # () float32
    width,
    chunks,  # programs of a row
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor)
    if by != 1.0:
        program = tl.program_id(0).to(tl.int64)
        width = multiple(width, ALIGN)
        x_row = x + row_start(program // chunks, x_inner, x_outer, x_stride, ALIGN)
        columns = program % chunks * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32) * by
        store_rounded(x_row + columns, value, inside)


# Engine functions


def distill(
    student: Tensor,
    teacher: Tensor,
    tokens: Tokens,
    options: Options,
    *,
    gradient: Tensor | None,
    want_loss: bool,
    want_metrics: bool,
    stage: str = "whole",
    states: Tensor | None = None,
    sums: Tensor | None = None,
) -> Results:
    """Divergence between softmax(teacher / T) and softmax(student / T) per row, plus the hard term.

    student (..., V_s) and teacher (..., V_t), of float32, bfloat16 or float16, are cut to their first
    ``options.vocab`` entries. ``gradient`` is of the student's shape and dtype, written in full, and may be
    the student. Returns losses and metrics in float32. ``stage``, ``states`` (N, 5) and ``sums`` (N, 2) are for rows
    that are split, see csrc/common/distill_args.h.
    """
    check_dtype("student_logits", student)
    check_dtype("teacher_logits", teacher)
    call = _Call(student, rows(teacher), tokens, options, gradient, want_loss, want_metrics)
    launch(
        distill_kernel,
        call.student.count,
        call.warps,
        **call.arguments,
        **row_arguments("teacher", call.teacher),
        teacher_count=call.teacher.count,
        states=states,
        sums=sums,
        STAGE=stage,
        MAP_NEEDS_SUMS=_map_needs_sums(options.divergence),
        SUMS=(want_loss or want_metrics)
        if stage == "fold"
        else gradient is None or _map_needs_sums(options.divergence),
    )
    return call.results()


def topk_distill(
    student: Tensor,
    logprobs: Tensor,
    indices: Tensor,
    residual: Tensor | None,
    tail: str,
    tokens: Tokens,
    options: Options,
    *,
    gradient: Tensor | None,
    want_loss: bool,
    want_metrics: bool,
) -> Results:
    """Divergence over the teacher's k entries and, for ``tail="bucket"``, all the rest as one category.

    student (..., V); logprobs and indices (..., k); residual (...). A row with an index twice or out of range
    is NaN. The rest's mass is folded over the entries outside the set: their indices are sorted, and each
    block of the row takes out its own.
    """
    check_dtype("student_logits", student)
    k = indices.shape[-1]
    logprobs, indices = logprobs.reshape(-1, k).contiguous(), indices.reshape(-1, k).contiguous()
    call = _Call(student, None, tokens, options, gradient, want_loss, want_metrics)
    count, device = call.student.count, student.device
    entry_gradient = None if gradient is None else torch.empty((count, k), dtype=torch.float32, device=device)
    shared = {"teacher_count": indices.shape[0], "k": k, "ENTRIES": triton.next_power_of_2(max(k, 16))}
    launch(
        topk_distill_kernel,
        count,
        call.warps,
        **call.arguments,
        **shared,
        logprobs=logprobs,
        indices=indices,
        ordered=indices.sort(-1).values,
        residual=None if residual is None else residual.reshape(-1).contiguous(),
        entry_gradient=entry_gradient,
        TAIL=tail,
    )
    if call.gradient is not None:
        launch(
            scatter_kernel,
            count,
            1,
            **row_arguments("gradient", call.gradient),
            **token_arguments(tokens),
            **shared,
            entry_gradient=entry_gradient,
            indices=indices,
            ignore_index=tokens.ignore_index,
            vocab=options.vocab,
        )
    return call.results()


def outside(
    logits: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    vocab: int,
    temperature: float,
    *,
    states: Tensor | None = None,
    exponentials: Tensor | None = None,
    values: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Rows of logits (..., V) without the entries of ``indices`` (N, k), ascending in each row; those outside
    [0, vocab) are none. Writes ``states`` (N, 3) of the rest, or the ``gradient`` a e^((x - m) / T) + b e^(x - n) by
    ``exponentials`` (N, 4), with ``values`` (N, k) at the entries. Rows that ``mask`` leaves out are zeros.
    """
    source, count, k = rows(logits), indices.shape[0], indices.shape[1]
    written = None if gradient is None else rows(gradient)
    matrices = [source] + ([written] if written else [])
    reading = access(vocab, [logits.shape[-1]], matrices, stored=written is not None)
    per_program = threads(vocab * logits.element_size(), 512)
    arguments: dict[str, Any] = {
        **row_arguments("logits", source),
        **row_arguments("gradient", written or Rows(logits, 0, 1, 0, 0)),
        **reading,
        "mask": None if mask is None else mask.view(torch.uint8),
        "indices": indices,
        "states": states,
        "exponentials": exponentials,
        "k": k,
        "width": logits.shape[-1],
        "inverse_temperature": 1.0 / temperature,
        "GROUP": group_size(reading["ALIGN"], matrices),
        "BLOCK": per_program * COLUMNS_PER_THREAD,
    }
    if written is None:
        arguments["gradient"] = None
    launch(outside_kernel, count, per_program // warp_size(logits.device), **arguments)
    if written is not None and values is not None:
        launch(
            scatter_kernel,
            count,
            1,
            **row_arguments("gradient", written),
            **token_arguments(Tokens(mask=mask)),
            entry_gradient=values,
            indices=indices,
            ignore_index=0,
            teacher_count=count,
            k=k,
            vocab=vocab,
            ENTRIES=triton.next_power_of_2(max(k, 16)),
        )


def topk(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest log-probs of softmax(logits / T) per row, their indices, the log of the remaining mass.

    logits (..., V) with k <= 256 and V <= 262144. Returns (N, k) float32, largest first, equals by lowest
    index; (N, k) int64; and (N,) float32, by log-sum-exp over the entries outside.
    """
    check_dtype("logits", logits)
    vocab = logits.shape[-1]
    if not 0 < k <= min(MAX_K, vocab):
        raise ValueError(f"k: got {k} for logits with {vocab} entries; wanted 1 <= k <= {min(MAX_K, vocab)}")
    if vocab > 1 << INDEX_BITS.value:
        raise ValueError(f"logits: got {vocab} entries per row; top-k extraction takes up to {1 << INDEX_BITS.value}")
    matrix, device = rows(logits), logits.device
    count = matrix.count
    logprobs = torch.empty((count, k), dtype=torch.float32, device=device)
    indices = torch.empty((count, k), dtype=torch.int64, device=device)
    residual = torch.empty(count, dtype=torch.float32, device=device)
    chosen = torch.empty((count, k), dtype=torch.int32, device=device)
    keys = torch.empty((count, k), dtype=torch.int64, device=device)
    states = torch.empty((count, 4), dtype=torch.float32, device=device)
    # Lanes: few, so that choosing among them is quick, but enough that the k of them hold few candidates.
    per_program = 128 if vocab <= 8192 else 256 if vocab <= 32768 else 512 if vocab <= 131072 else 1024
    block = per_program * COLUMNS_PER_THREAD
    entries, depth = triton.next_power_of_2(max(k, 16)), triton.next_power_of_2(triton.cdiv(vocab, block))
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    source = {**row_arguments("logits", matrix), "inverse_temperature": 1.0 / temperature, "k": k}

    def warps(elements: int) -> int:
        return max(1, min(512, elements // COLUMNS_PER_THREAD) // warp_size(device))

    launch(
        lanes_kernel,
        count,
        per_program // warp_size(device),
        **source,
        **access(vocab, [vocab], [matrix], stored=False),
        chosen=chosen,
        states=states,
        DROPPED_BITS=dropped,
        BLOCK=block,
    )
    launch(
        select_kernel,
        count,
        warps(entries * depth),
        **source,
        vocab=vocab,
        chosen=chosen,
        states=states,
        keys=keys,
        residual=residual,
        DROPPED_BITS=dropped,
        BLOCK=block,
        DEPTH=depth,
        ENTRIES=entries,
    )
    launch(
        order_kernel,
        count,
        warps(entries),
        **source,
        states=states,
        keys=keys,
        logprobs=logprobs,
        indices=indices,
        ENTRIES=entries,
    )
    return logprobs, indices, residual


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a () float32 tensor on the device; returns at once, there, when it is 1."""
    check_dtype("x", x)
    if x.numel() == 0:
        return
    matrix, width = rows(x), x.shape[-1]
    if x.is_contiguous():
        matrix, width = Rows(x, 1, 1, 0, 0), x.numel()
    block = 256 * COLUMNS_PER_THREAD
    chunks = triton.cdiv(width, block)
    launch(
        scale_kernel,
        matrix.count * chunks,
        256 // warp_size(x.device),
        **row_arguments("x", matrix),
        factor=factor,
        width=width,
        chunks=chunks,
        ALIGN=access(width, [width], [matrix], stored=True)["ALIGN"],
        BLOCK=block,
    )


class _Call:
    """What the two losses share: outputs, and the arguments that both kernels take."""

    def __init__(
        self,
        student: Tensor,
        teacher: Rows | None,
        tokens: Tokens,
        options: Options,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
    ):
        self.student = rows(student)
        self.gradient = None if gradient is None else rows(gradient)
        self.teacher = rows(student) if teacher is None else teacher
        self.tokens = tokens
        count, device, width = self.student.count, student.device, student.shape[-1]
        self.denominator, self.count = denominator_of(tokens, count, device)
        self.row_loss = self.entropy = self.agreement = None
        if want_loss:
            self.row_loss = torch.empty(count, dtype=torch.float32, device=device)
        if want_metrics:
            self.entropy = torch.empty(count, dtype=torch.float32, device=device)
            self.agreement = torch.empty(count, dtype=torch.bool, device=device)

        matrices = [self.student, self.teacher] + ([self.gradient] if self.gradient else [])
        widths = [width, self.teacher.tensor.shape[-1]]
        # Programs of 1024 threads have 64 registers per thread, too few for the longer formulas. And where there is
        # no teacher's row, twice the programs have as much under way.
        heavy = options.divergence == "jsd" or options.hard_weight > 0.0 or want_metrics or teacher is None
        per_program = threads(options.vocab * student.element_size(), 512 if heavy else 1024)
        self.warps = per_program // warp_size(device)
        reading = access(options.vocab, widths, matrices, stored=self.gradient is not None)
        soft_weight = (1.0 - options.hard_weight) * (options.temperature**2 if options.temperature_squared else 1.0)
        self.arguments: dict[str, Any] = {
            **row_arguments("student", self.student),
            **row_arguments("gradient", self.gradient or Rows(student, 0, 1, 0, 0)),
            **token_arguments(tokens),
            "row_loss": self.row_loss,
            "entropy": self.entropy,
            "agreement": None if self.agreement is None else self.agreement.view(torch.uint8),
            "weight": tokens.weight,
            "targets": tokens.targets,
            "upstream": tokens.upstream,
            "denominator": self.denominator,
            "count": self.count,
            "ignore_index": tokens.ignore_index,
            **reading,
            "GROUP": group_size(reading["ALIGN"], matrices),
            "width": width,
            "inverse_temperature": 1.0 / options.temperature,
            "soft_weight": soft_weight,
            "soft_slope": soft_weight / options.temperature,
            "hard_weight": options.hard_weight,
            "beta": options.beta,
            "DIVERGENCE": options.divergence,
            "HARD": options.hard_weight > 0.0,
            "WARM": options.temperature != 1.0,
            "PER_ROW": tokens.reduction == "none",
            "BLOCK": per_program * COLUMNS_PER_THREAD,
        }
        if self.gradient is None:
            self.arguments["gradient"] = None

    def results(self) -> Results:
        loss = self.row_loss
        if loss is not None and self.tokens.reduction != "none":
            loss = reduce_loss(loss, self.denominator, self.count)
        return Results(loss, self.entropy, self.agreement)
