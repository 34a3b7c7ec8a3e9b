"""Checks of arguments, shared by every op: each error names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from pyalign._linear import Settings
from pyalign._shards import Shards
from pyalign._types import REDUCTIONS, Tokens, accumulation_dtype

_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse(name: str, given: object, wanted: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: got {given}; wanted {wanted}")


def one_of(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        refuse(name, repr(value), "one of " + ", ".join(repr(x) for x in options))


def floating(name: str, x: Tensor, minimum_dim: int = 1) -> None:
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    if x.dtype not in _FLOATING:
        refuse(name, x.dtype, "float32, bfloat16, float16 or float64", TypeError)
    if x.dim() < minimum_dim:
        refuse(name, f"{x.dim()} dimensions", f"at least {minimum_dim}")


def same_device(name: str, x: Tensor, reference: Tensor) -> None:
    if x.device != reference.device:
        refuse(name, f"a tensor on {x.device}", f"one on {reference.device}, where the logits are")


def per_token(name: str, x: Tensor, shape: torch.Size, device_of: Tensor) -> None:
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    if x.shape != shape:
        refuse(name, f"shape {tuple(x.shape)}", f"{tuple(shape)}, one per token (nothing is broadcast)")
    same_device(name, x, device_of)


def flat(x: Tensor) -> Tensor:
    """``x`` as one dense dimension: engines read it through its address (and ``reshape`` may keep strides)."""
    return x.contiguous().view(-1)


def integer_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _INTEGERS:
        refuse(name, x.dtype, "bool or an integer dtype", TypeError)


def integers(name: str, x: Tensor, shape: torch.Size, device_of: Tensor) -> Tensor:
    """``x`` as contiguous int64, flat."""
    per_token(name, x, shape, device_of)
    if x.dtype not in _INTEGERS:
        refuse(name, x.dtype, "an integer dtype", TypeError)
    return flat(x.to(torch.int64))


def temperature(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0.0 < value < math.inf):
        refuse(name, repr(value), "a finite number > 0")
    return float(value)


def softcap(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0.0 < value < math.inf):
        refuse(name, repr(value), "None or a finite number > 0")
    return float(value)


def denominator(num_items: int | Tensor | None, reduction: str, dtype: torch.dtype, like: Tensor) -> Tensor | None:
    """``num_items`` as a 0-dim tensor that the host never reads."""
    if num_items is None:
        return None
    if reduction != "mean":
        refuse("num_items", num_items, f"None with reduction {reduction!r}: it replaces the mean's denominator")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            refuse("num_items", f"shape {tuple(num_items.shape)}", "an int or a 0-dim tensor")
        same_device("num_items", num_items, like)
        return num_items.detach().to(dtype)
    if not isinstance(num_items, int) or num_items < 0:
        refuse("num_items", repr(num_items), "an int >= 0 or a 0-dim tensor")
    return torch.full((), num_items, dtype=dtype, device=like.device)


# Projections of hidden states


def projection(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, autocast: bool,
    split: bool = False,
) -> None:  # fmt: skip
    """Checks logits = softcap(hidden @ weight.T + bias); ``prefix`` is that of the arguments' names. Of a vocabulary
    that is ``split`` a rank may hold nothing."""
    floating(prefix + "hidden", hidden, 1)
    floating(prefix + "weight", weight, 1)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape[split:]:
        wanted = f"(V, {hidden.shape[-1]}), a row for each of V > 0 entries, as long as {prefix}hidden's"
        refuse(prefix + "weight", f"shape {tuple(weight.shape)}", wanted)
    _same_place(prefix + "weight", weight, prefix + "hidden", hidden)
    if weight.dtype != hidden.dtype and not autocast:
        refuse(prefix + "weight", weight.dtype, f"{hidden.dtype}, that of {prefix}hidden (or autocast)", TypeError)
    if bias is not None:
        floating(prefix + "bias", bias, 1)
        if bias.shape != weight.shape[:1]:
            refuse(
                prefix + "bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},), one per row of {prefix}weight"
            )
        _same_place(prefix + "bias", bias, prefix + "hidden", hidden)
    _softcap(prefix + "softcap", softcap)


_softcap = softcap


def flat_rows(x: Tensor) -> Tensor:
    """(..., H) as (N, H)."""
    return x.reshape(-1, x.shape[-1])


def _same_place(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        refuse(name, f"a tensor on {x.device}", f"one on {other.device}, where {other_name} is")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks products for; None outside it, and for float64, which it leaves alone."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def linear_settings(
    workspace_bytes: int | None,
    num_valid: int | None,
    logits_dtype: torch.dtype | None,
    gemm_dtype: torch.dtype | None,
    shards: Shards | None,
    *hidden: Tensor,
) -> Settings:
    """How logits are computed, ``hidden`` being the student's and, if there is one, the teacher's hidden states."""
    for name, value, least in (("workspace_bytes", workspace_bytes, 1), ("num_valid", num_valid, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            refuse(name, repr(value), f"an int >= {least}, or None")
    wide = accumulation_dtype(hidden[0].dtype)
    if logits_dtype is not None and logits_dtype != wide:
        products = {x.dtype if gemm_dtype is None else gemm_dtype for x in hidden}
        if products != {logits_dtype} or logits_dtype.itemsize != 2:
            given = " and ".join(sorted(str(x) for x in products))
            refuse("logits_dtype", logits_dtype, f"{wide}, or the 16-bit dtype of all products (here {given})")
    group, sizes = (None, None) if shards is None else (shards.group, shards.sizes)
    return Settings(workspace_bytes, num_valid, gemm_dtype, logits_dtype or wide, group, sizes)


def tokens(
    student: Tensor,
    *,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    teacher_rows: Tensor | None,
    weight: Tensor | None,
    targets: Tensor | None,
    hard_weight: float,
    num_items: int | Tensor | None,
    reduction: str,
) -> Tokens:
    """Checks and normalises what describes the tokens of ``student`` (..., V)."""
    shape, dtype = student.shape[:-1], accumulation_dtype(student.dtype)
    one_of("reduction", reduction, REDUCTIONS)
    if mask is not None:
        per_token("mask", mask, shape, student)
        if mask.dtype != torch.bool:
            if mask.dtype not in _INTEGERS:
                refuse("mask", mask.dtype, "bool or an integer dtype (use weight= for weights)", TypeError)
            mask = mask != 0
        mask = flat(mask)
    if labels is not None:
        labels = integers("labels", labels, shape, student)
    if teacher_rows is not None:
        teacher_rows = integers("teacher_rows", teacher_rows, shape, student)
    if weight is not None:
        per_token("weight", weight, shape, student)
        if not weight.is_floating_point():
            refuse("weight", weight.dtype, "a floating dtype", TypeError)
        if weight.requires_grad and torch.is_grad_enabled():
            refuse("weight", "a tensor that requires grad", "a constant: losses have no gradient for weight")
        weight = flat(weight.to(dtype))
    if not 0.0 <= hard_weight <= 1.0:
        refuse("hard_weight", hard_weight, "0 <= hard_weight <= 1")
    if hard_weight > 0:
        if targets is None:
            refuse("targets", None, f"token ids, because hard_weight is {hard_weight}")
        targets = integers("targets", targets, shape, student)
    else:
        targets = None
    num_items = denominator(num_items, reduction, dtype, student)
    return Tokens(mask, labels, teacher_rows, weight, targets, num_items, None, ignore_index, reduction)


# Preference losses: scores, and what there is one of per pair


def number(name: str, value: object, wanted: str, accept: Callable[[float], bool]) -> float:
    """``value`` as a float, if it is a finite number that ``accept`` takes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(name, repr(value), wanted)
    if not (-math.inf < value < math.inf and accept(value)):  # a comparison, which torch.compile traces
        refuse(name, repr(value), wanted)
    return float(value)


def positive(name: str, value: object) -> float:
    return number(name, value, "a finite number > 0", lambda x: x > 0)


def finite(name: str, value: object) -> float:
    return number(name, value, "a finite number", lambda x: True)


def scores(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """``x`` holds one score per item, (P,), as many as ``like``."""
    floating(name, x, 0)
    if like is None:
        if x.dim() != 1:
            refuse(name, f"shape {tuple(x.shape)}", "one score per item, (P,)")
        return
    per_item(name, x, like)


def score_pairs(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Both hold one score per pair, (P,)."""
    if (
        type(first) is type(second) is Tensor
        and first.dim() == 1
        and first.shape == second.shape
        and first.dtype in _FLOATING
        and second.dtype in _FLOATING
        and first.device == second.device
    ):
        return  # all is well in one look, which counts where a kernel takes microseconds
    scores(first_name, first)
    scores(second_name, second, first)


def per_item(name: str, x: Tensor, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    if x.shape != like.shape:
        refuse(name, f"shape {tuple(x.shape)}", f"{tuple(like.shape)}, one per item (nothing is broadcast)")
    if x.device != like.device:
        refuse(name, f"a tensor on {x.device}", f"one on {like.device}, where the scores are")


def item_mask(name: str, mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    per_item(name, mask, like)
    if mask.dtype == torch.bool:
        return mask
    integer_dtype(name, mask)
    return mask != 0


def constant(name: str, x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """One number per item that the loss has no gradient for."""
    per_item(name, x, like)
    if not x.is_floating_point():
        refuse(name, x.dtype, "a floating dtype", TypeError)
    if x.requires_grad and torch.is_grad_enabled():
        refuse(name, "a tensor that requires grad", f"a constant: losses have no gradient for {name}")
    return x.detach().to(dtype)


def group_integers(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    if tuple(x.shape) != shape:
        refuse(name, f"shape {tuple(x.shape)}", f"{shape} (nothing is broadcast)")
    if x.dtype not in _INTEGERS:
        refuse(name, x.dtype, "an integer dtype", TypeError)
    if x.device != like.device:
        refuse(name, f"a tensor on {x.device}", f"one on {like.device}, where the scores are")
    return x.to(torch.int64)
