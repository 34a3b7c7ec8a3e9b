"""Checks of arguments, shared by every op: each error names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from pyalign._types import REDUCTIONS, Tokens, accumulation_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse(name: str, given: object, wanted: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: got {given}; wanted {wanted}")


def one_of(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        refuse(name, repr(value), "one of " + ", ".join(repr(x) for x in options))


def floating(name: str, x: Tensor, minimum_dim: int = 1) -> None:
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    if not x.is_floating_point() or x.dtype.itemsize < 2:
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
    if num_items is not None:
        if reduction != "mean":
            refuse("num_items", num_items, f"None with reduction {reduction!r}: it replaces the mean's denominator")
        if isinstance(num_items, Tensor):
            if num_items.dim() != 0:
                refuse("num_items", f"shape {tuple(num_items.shape)}", "an int or a 0-dim tensor")
            same_device("num_items", num_items, student)
            num_items = num_items.detach().to(dtype)
        elif not isinstance(num_items, int) or num_items < 0:
            refuse("num_items", repr(num_items), "an int >= 0 or a 0-dim tensor")
        else:
            num_items = torch.full((), num_items, dtype=dtype, device=student.device)
    return Tokens(mask, labels, teacher_rows, weight, targets, num_items, None, ignore_index, reduction)
