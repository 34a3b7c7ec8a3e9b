# Kernels are typed by Triton when they are compiled; triton itself ships no annotations.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownLambdaType=false, reportPrivateUsage=false
"""What every kernel is made of: accurate float32 functions, softmax states, rows in memory, tokens, and the launch.

The functions are those of ``csrc/common/math.h`` and ``distill.h``, over Triton tensors. One program serves one row.
It walks the row in blocks of ``BLOCK`` columns, each lane of a block keeps a state of its own, and the lanes are
merged once at the end, so that the loop over a row holds no reduction. Only the first walk reads from memory; later
ones find the row in the L2 cache, and alternate their direction to meet first what was read last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyalign._types import Rows, Tokens

LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950216293335)  # the float nearest to log2 e, and what it lacks
LOG2_E_REST = tl.constexpr(1.925962989e-8)
LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
MANTISSA = tl.constexpr(0x007FFFFF)
NAN = tl.constexpr(float("nan"))
INFINITY = tl.constexpr(float("inf"))

# Functions


@triton.jit
def exp_nonpositive(x):
    """e^x to relative 2e-7. Meant for x <= 0: from -104 down it is 0. NaN stays NaN."""
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    power = x * LOG2_E
    lost = tl.fma(x, LOG2_E, -power) + x * LOG2_E_REST  # by rounding the product: up to 3e-6 of the result
    y = tl.exp2(power)
    return y + y * (lost * LN_2)


@triton.jit
def log_positive(x):
    """log x for normal x > 0 to relative 1e-7; 0 gives -inf. No branches, unlike the device's."""
    offset = x.to(tl.int32, bitcast=True) - SQRT_HALF_BITS  # x = 2^n (1 + r), 1 + r in [sqrt(1/2), sqrt(2))
    n = (offset >> 23).to(tl.float32)
    r = ((offset & MANTISSA) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    y = 7.0376836292e-2 * r - 1.1514610310e-1
    y = y * r + 1.1676998740e-1
    y = y * r - 1.2420140846e-1
    y = y * r + 1.4249322787e-1
    y = y * r - 1.6668057665e-1
    y = y * r + 2.0000714765e-1
    y = y * r - 2.4999993993e-1
    y = y * r + 3.3333331174e-1
    square = r * r
    result = ((y * r * square - n * 2.12194440e-4) - 0.5 * square) + r + n * 0.693359375
    return tl.where(x > 0, result, tl.where(x == 0, -INFINITY, x * NAN))


@triton.jit
def log1p_nonpositive(x):
    """log(1 + x) for -1 <= x <= 0. 1 + x rounds to u; the last term puts back what the rounding took."""
    u = 1.0 + x
    lost = x - (u - 1.0)
    return log_positive(u) + tl.where(u > 0, lost / u, 0.0)


@triton.jit
def in_series(x):
    return tl.abs(x) < 0.25


@triton.jit
def phi_series(x):
    """e^x - 1 - x for |x| < 1/4, to relative 1e-8. Never negative."""
    y = 1.9841270e-4 * x + 1.3888889e-3
    y = y * x + 8.3333333e-3
    y = y * x + 4.1666667e-2
    y = y * x + 1.6666667e-1
    y = y * x + 0.5
    return y * (x * x)


@triton.jit
def expm1_nonpositive(x):
    return tl.where(in_series(x), x + phi_series(x), exp_nonpositive(x) - 1.0)


@triton.jit
def log1mexp(x):
    """log(1 - e^x): the log of the mass that log-probabilities with log-sum x leave over; -inf for x >= 0."""
    inside = tl.minimum(x, -1e-30, propagate_nan=tl.PropagateNan.ALL)
    near = log_positive(-expm1_nonpositive(inside))
    far = log1p_nonpositive(-exp_nonpositive(inside))
    return tl.where(x >= 0, -INFINITY, tl.where(x > -LN_2, near, far))


# Softmax states: a lane has folded logits into best (the largest, -inf at first), first (its column, the lowest of
# equals), and total = sum exp((x - max(best, LOWEST)) / T).


@triton.jit
def fold(best, first, total, logit, columns, inverse_temperature):
    rise = logit - tl.maximum(best, LOWEST)
    decay = exp_nonpositive(-tl.abs(rise) * inverse_temperature)
    total = tl.where(rise > 0, total * decay + 1.0, total + decay)
    first = tl.where(logit > best, columns, first)
    best = tl.where(logit > best, logit, best)
    return best, first, total


@triton.jit
def fold_total(best, total, logit, inverse_temperature):
    """The new total alone, where another temperature's state shares ``best``; to be called before ``fold``."""
    rise = logit - tl.maximum(best, LOWEST)
    decay = exp_nonpositive(-tl.abs(rise) * inverse_temperature)
    return tl.where(rise > 0, total * decay + 1.0, total + decay)


@triton.jit
def rescale(best, to, inverse_temperature):
    """The factor that brings a total taken at ``best`` to the maximum ``to``."""
    return exp_nonpositive((tl.maximum(best, LOWEST) - tl.maximum(to, LOWEST)) * inverse_temperature)


@triton.jit
def merge_lanes(best, total, top, inverse_temperature):
    return tl.sum(total * rescale(best, top, inverse_temperature), 0)


@triton.jit
def checked(top, total):
    """The total of a row, NaN if its logits were all -inf or held +inf or NaN."""
    return tl.where((total > 0) & (top < INFINITY), total, NAN)


@triton.jit
def first_of(best, first, top):
    """The lowest column that holds ``top``."""
    return tl.min(tl.where(best == top, first, 0x7FFFFFFF), 0)


# Rows and tokens


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, ALIGN: tl.constexpr):
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    return tl.multiple_of(start, ALIGN)


@triton.jit
def load_logits(row, columns, vocab, limit):
    """float32 logits at ``columns``, -inf from ``vocab`` on. ``limit`` >= vocab: how far may be read.

    Reading up to a multiple of the vector's length keeps the loads whole where the vocabulary's end is ragged.
    """
    x = tl.load(row + columns, mask=columns < limit, other=-INFINITY).to(tl.float32)
    return tl.where(columns < vocab, x, -INFINITY)


@triton.jit
def is_counted(row, inside, mask, labels, teacher_rows, ignore_index):
    """A token counts where mask AND labels != ignore_index AND teacher_rows >= 0."""
    counted = inside
    if mask is not None:
        counted = counted & (tl.load(mask + row, mask=inside, other=0) != 0)
    if labels is not None:
        counted = counted & (tl.load(labels + row, mask=inside, other=0) != ignore_index)
    if teacher_rows is not None:
        counted = counted & (tl.load(teacher_rows + row, mask=inside, other=-1) >= 0)
    return counted


@triton.jit
def row_factor(row, weight, upstream, denominator, count, PER_ROW: tl.constexpr):
    """weight * upstream / denominator; the mean of nothing is 0."""
    divisor = count
    if denominator is not None:
        divisor = tl.load(denominator)
    factor = tl.where(divisor == 0, 0.0, 1.0 / divisor)
    if weight is not None:
        factor *= tl.load(weight + row)
    if upstream is not None:
        if PER_ROW:
            factor *= tl.load(upstream + row)
        else:
            factor *= tl.load(upstream)
    return factor


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def count_kernel(
    mask,  # (N,) or None
    labels,  # (N,) or None
    teacher_rows,  # (N,) or None
    counted,  # () float32
    rows,
    ignore_index,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += is_counted(row, row < rows, mask, labels, teacher_rows, ignore_index).to(tl.int32)
    tl.store(counted, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "count"])
def reduce_kernel(
    row_loss,  # (N,) float32
    denominator,  # () float32, or None: count
    loss,  # () float32
    rows,
    count,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss + row, mask=row < rows, other=0.0)
    divisor = count
    if denominator is not None:
        divisor = tl.load(denominator)
    tl.store(loss, tl.where(divisor == 0, 0.0, tl.sum(total, 0) / divisor))


_REDUCE_BLOCK = 4096


# The host's side


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: got {x.dtype}; the Triton kernels take float32, bfloat16 and float16"
            ' (pyalign.backend("reference") takes float64)'
        )


def launch(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
    """Runs ``kernel`` on the device of its tensors, if there is anything to run."""
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "the Triton kernels got CPU tensors; those need TRITON_INTERPRET=1 in the environment before the start"
        )
    if programs == 0:
        return
    # The interpreter computes with NumPy, which would warn of every -inf - -inf that a select drops.
    context = np.errstate(all="ignore") if device.type == "cpu" else torch.get_device_module(device).device(device)
    with context:
        kernel[(programs,)](**arguments, num_warps=warps, enable_fp_fusion=True)


def warp_size(device: torch.device) -> int:
    if device.type == "cuda" and torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).warp_size
    return 32


def threads(vocab: int) -> int:
    """Threads of a program, each of which takes 8 columns of a block (16 bytes of a 16-bit type).

    Long rows get large programs: fewer rows are then under way at once, and what they re-read is still in the cache.
    """
    return 128 if vocab <= 2048 else 256 if vocab <= 8192 else 512 if vocab <= 32768 else 1024


COLUMNS_PER_THREAD = 8


def row_arguments(name: str, matrix: Rows) -> dict[str, Any]:
    return {
        name: matrix.tensor,
        f"{name}_inner": matrix.inner,
        f"{name}_outer": matrix.outer_stride,
        f"{name}_stride": matrix.inner_stride,
    }


def alignment(vocab: int, widths: list[int], matrices: list[Rows], stored: int | None) -> tuple[int, int]:
    """(ALIGN, limit): what every row starts at a multiple of, and how far beyond the vocabulary rows may be read.

    Vectorised access needs both, and so does the width of a row that is stored.
    """
    for align in (16, 8, 4, 2):
        limit = -(-vocab // align) * align
        whole = all(m.outer_stride % align == 0 and m.inner_stride % align == 0 for m in matrices)
        if whole and limit <= min(widths) and (stored is None or stored % align == 0):
            return align, limit
    return 1, vocab


def denominator_of(tokens: Tokens, count: int, device: torch.device) -> tuple[Tensor | None, float]:
    """What row losses are divided by, as a tensor on the device or, where the host knows it, a number."""
    if tokens.reduction != "mean":
        return None, 1.0
    if tokens.num_items is not None:
        return tokens.num_items, 0.0
    if tokens.mask is None and tokens.labels is None and tokens.teacher_rows is None:
        return None, float(count)
    counted = torch.empty((), dtype=torch.float32, device=device)
    launch(
        count_kernel,
        1,
        4,
        **token_arguments(tokens),
        counted=counted,
        rows=count,
        ignore_index=tokens.ignore_index,
        BLOCK=_REDUCE_BLOCK,
    )
    return counted, 0.0


def token_arguments(tokens: Tokens) -> dict[str, Tensor | None]:
    mask = None if tokens.mask is None else tokens.mask.view(torch.uint8)
    return {"mask": mask, "labels": tokens.labels, "teacher_rows": tokens.teacher_rows}


def reduce_loss(row_loss: Tensor, denominator: Tensor | None, count: float) -> Tensor:
    """() the sum of row losses (N,), always in the same order, over the denominator."""
    loss = torch.empty((), dtype=torch.float32, device=row_loss.device)
    launch(
        reduce_kernel,
        1,
        8,
        row_loss=row_loss,
        denominator=denominator,
        loss=loss,
        rows=row_loss.numel(),
        count=count,
        BLOCK=_REDUCE_BLOCK,
    )
    return loss
