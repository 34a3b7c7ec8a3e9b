# Triton types kernels when it compiles them, and ships no annotations.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false
# A kernel function called from Python raises: a type checker believes that none returns.
# pyright: reportGeneralTypeIssues=false
"""What every kernel is made of: float32 functions, softmax states, rows in memory, tokens, the launch.

The functions are those of ``csrc/common/math.h`` and ``distill.h``, over Triton tensors. One program serves one row.
It walks the row in blocks of ``BLOCK`` columns, each thread keeps a state of its own, and the states are merged once at
the end, so that the loop over a row holds no reduction across threads. Only the first walk reads from memory; later
ones find the row in the L2 cache, as far as it fits, and alternate their direction to meet first what was read last.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from pyalign._types import Rows, Tokens

LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
MANTISSA = tl.constexpr(0x007FFFFF)
INFINITY = tl.constexpr(float("inf"))
ELSEWHERE = tl.constexpr(-(1 << 63))  # a target in another slice of a row that is split, see csrc/common/distill_args.h
INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# Functions


@triton.jit
def exp_nonpositive(x):
    """e^x for x <= 0. The product with log2 e rounds: the relative error is at most 1e-7 + 6e-8 |x|."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def exp_scaled(x, inverse_temperature):
    """e^(x / T) for x <= 0."""
    return tl.exp2(x * (inverse_temperature * LOG2_E))


@triton.jit
def log_parts(x):
    """(n, r) with x = 2^n (1 + r), 1 + r in [sqrt(1/2), sqrt(2))."""
    offset = x.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    return (offset >> 23).to(tl.float32), ((offset & MANTISSA) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def log_series(n, r):
    y = 7.0376836292e-2 * r - 1.1514610310e-1
    y = y * r + 1.1676998740e-1
    y = y * r - 1.2420140846e-1
    y = y * r + 1.4249322787e-1
    y = y * r - 1.6668057665e-1
    y = y * r + 2.0000714765e-1
    y = y * r - 2.4999993993e-1
    y = y * r + 3.3333331174e-1
    square = r * r
    return ((y * r * square - n * 2.12194440e-4) - 0.5 * square) + r + n * 0.693359375


@triton.jit
def log_positive(x):
    """log x for normal x > 0 to relative 1e-7; 0 gives -inf. No branches, unlike the device's."""
    n, r = log_parts(x)
    return tl.where(x > 0, log_series(n, r), tl.where(x == 0, -INFINITY, x * float("nan")))


@triton.jit
def log1p_nonpositive(x):
    """log(1 + x) for -1 < x <= 0. Where 1 + x > sqrt(1/2), r is x itself, not 1 + x rounded, less 1."""
    n, r = log_parts(1.0 + x)
    return log_series(n, tl.where(n == 0.0, x, r))


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
def weigh(probability, value):
    """probability * value with 0 * inf = 0: a probability of zero weighs nothing."""
    return tl.where(probability == 0.0, 0.0, probability * value)


@triton.jit
def log1mexp(x):
    """log(1 - e^x): the log of the mass that log-probabilities with log-sum x leave over; -inf for x >= 0."""
    inside = tl.minimum(x, -1e-30, propagate_nan=tl.PropagateNan.ALL)
    near = log_positive(-expm1_nonpositive(inside))
    far = log1p_nonpositive(-exp_nonpositive(inside))
    return tl.where(x >= 0, -INFINITY, tl.where(x > -LN_2, near, far))


# The GROUP columns of a block that one thread holds share a state: neighbours where loads are vectors (ALIGN > 1),
# else every BLOCK / GROUP-th column.


@triton.jit
def grouped(x, ALIGN: tl.constexpr, GROUP: tl.constexpr):
    return tl.reshape(x, (x.shape[0] // GROUP, GROUP) if ALIGN > 1 else (GROUP, x.shape[0] // GROUP))


@triton.jit
def group_sum(x, ALIGN: tl.constexpr, GROUP: tl.constexpr):
    return tl.sum(grouped(x, ALIGN, GROUP), 1 if ALIGN > 1 else 0)


# Softmax states: best is the largest of the logits folded so far (LOWEST before the first) and total is
# sum exp((x - best) / T), which is rescaled once per group.


@triton.jit
def fold(best, total, logits, inverse_temperature, ALIGN: tl.constexpr, GROUP: tl.constexpr):
    """(best, total) of BLOCK / GROUP states with BLOCK more logits."""
    AXIS: tl.constexpr = 1 if ALIGN > 1 else 0
    x = grouped(logits, ALIGN, GROUP)
    top = tl.maximum(best, tl.max(x, AXIS))
    total *= exp_scaled(best - top, inverse_temperature)
    return top, total + tl.sum(exp_scaled(x - tl.expand_dims(top, AXIS), inverse_temperature), AXIS)


@triton.jit
def merge_states(best, total, top, inverse_temperature):
    """The total of all states, taken at ``top``."""
    return tl.sum(total * exp_scaled(best - top, inverse_temperature), 0)


@triton.jit
def merge_checked(best, total, top, inverse_temperature):
    return checked(top, merge_states(best, total, top, inverse_temperature))


@triton.jit
def finite_max(top, total):
    """The total of a slice of a row, NaN if its logits held +inf or NaN."""
    return tl.where(top < INFINITY, total, float("nan"))


@triton.jit
def checked(top, total):
    """The total of a row, NaN if its logits were all -inf or held +inf or NaN."""
    return tl.where((total > 0) & (top < INFINITY), total, float("nan"))


# The most likely entry: each lane of a block remembers the best of its columns (-inf before the first), and
# the first of them that holds it.


@triton.jit
def lead(best, first, logits, columns):
    return tl.where(logits > best, logits, best), tl.where(logits > best, columns, first)


@triton.jit
def leader(best, first):
    """The lowest column that holds the largest logit of a row."""
    return tl.min(tl.where(best == tl.max(best, 0), first, 0x7FFFFFFF), 0)


@triton.jit
def fold_lane(best, total, logits, inverse_temperature):
    """The total of ``lead``'s lanes, at max(best, LOWEST), with one more logit each; called before it."""
    rise = logits - tl.maximum(best, LOWEST)
    decay = exp_scaled(-tl.abs(rise), inverse_temperature)
    return tl.where(rise > 0, total * decay + 1.0, total + decay)


# Rows and tokens


@triton.jit
def multiple(x, ALIGN: tl.constexpr):
    """x, which is a multiple of ALIGN, in a form that tells the compiler."""
    return x // ALIGN * ALIGN


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, ALIGN: tl.constexpr):
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    return multiple(start, ALIGN)


@triton.jit
def load_logits(row, columns, vocab, limit, RAGGED: tl.constexpr):
    """float32 logits at ``columns``, -inf from ``vocab`` on.

    Where the vocabulary's end is ragged, loads stay whole by reading on to ``limit``, a multiple of their
    length.
    """
    x = tl.load(row + columns, mask=columns < limit, other=-INFINITY).to(tl.float32)
    if RAGGED:
        x = tl.where(columns < vocab, x, -INFINITY)
    return x


@triton.jit
def store_rounded(pointer, value, mask):
    """Stores float32 as the pointer's type, rounded to nearest."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:  # where Triton's interpreter would truncate
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -65536).to(tl.float32, bitcast=True)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def clear(pointer, width, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), pointer.dtype.element_ty)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(pointer + columns, zero, mask=columns < width)


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


_REDUCE_BLOCK = 2048


# The host's side


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: got {x.dtype}; the Triton kernels take float32, bfloat16 and float16"
            ' (pyalign.backend("reference") takes float64)'
        )


def _quiet_interpreter() -> Any:
    """The interpreter computes with its NumPy, which would warn of every -inf - -inf that a select drops."""
    return importlib.import_module("triton.runtime.interpreter").np.errstate(all="ignore")


def launch(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
    """Runs ``kernel`` on the device of its tensors, if there is anything to run."""
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    if device.type == "cpu" and not knobs.runtime.interpret:
        raise RuntimeError("the Triton kernels got CPU tensors: those need TRITON_INTERPRET=1 in the environment")
    if programs == 0:
        return
    with _quiet_interpreter() if device.type == "cpu" else torch.get_device_module(device).device(device):
        kernel[(programs,)](**arguments, num_warps=warps, enable_fp_fusion=True)


def warp_size(device: torch.device) -> int:
    if device.type == "cuda" and torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).warp_size
    return 32


def threads(row_bytes: int, most: int = 1024) -> int:
    """Threads of a program, each of which takes 8 columns of a block (16 bytes of a 16-bit type).

    Long rows get large programs: fewer rows are then under way at once, and what they re-read is still in the
    cache.
    """
    wanted = 128 if row_bytes <= 4096 else 256 if row_bytes <= 16384 else 512 if row_bytes <= 65536 else 1024
    return min(wanted, most)


COLUMNS_PER_THREAD = 8


def row_arguments(name: str, matrix: Rows) -> dict[str, Any]:
    return {
        name: matrix.tensor,
        f"{name}_inner": matrix.inner,
        f"{name}_outer": matrix.outer_stride,
        f"{name}_stride": matrix.inner_stride,
    }


def access(vocab: int, widths: list[int], matrices: list[Rows], stored: bool) -> dict[str, Any]:
    """How far rows may be read and in what vectors.

    ALIGN is what every row starts at a multiple of, and ``limit``, how far beyond the vocabulary rows may be
    read, is a multiple of it: vectorised access needs both. So is the width of a row that is stored (the
    first of ``widths``).
    """
    for align in (16, 8, 4, 2, 1):
        limit = -(-vocab // align) * align
        whole = all(m.outer_stride % align == 0 and m.inner_stride % align == 0 for m in matrices)
        if whole and limit <= min(widths) and (not stored or widths[0] % align == 0):
            break
    return {"vocab": vocab, "limit": limit, "RAGGED": limit > vocab, "ALIGN": align}


def group_size(align: int, matrices: list[Rows]) -> int:
    """Columns of a block that one thread holds side by side, or, without vectors, at all."""
    itemsize = max(m.tensor.element_size() for m in matrices)
    return min(align, 16 // itemsize) if align > 1 else COLUMNS_PER_THREAD


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
        8,
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
