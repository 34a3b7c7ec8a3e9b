"""What the scoring tests share: hidden states, and results and gradients of an engine against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distill_support import ROUNDING, SMALLEST, Engine, generator, within
from ranking_support import Outcome, evaluate, scores, truth
from torch import Tensor

from pyalign._types import accumulation_dtype

PACKED = torch.tensor([0, 3, 3, 4, 11, 13, 40])  # groups of 3, 0, 1, 7, 2 and 27


def on(engine: Engine, x: Any) -> Any:
    if isinstance(x, dict):
        return {key: on(engine, value) for key, value in x.items()}
    return x.to(engine.device) if isinstance(x, Tensor) else x


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def check(
    engine: Engine, function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor, slack: float = 1,
    **options: Any,
) -> Outcome:  # fmt: skip
    """Result and gradients of this engine, for a random upstream gradient, against float64 in plain torch."""
    shape = function(*tensors, **options).shape
    upstream = scores(*shape, seed=9, scale=1.0)
    exact = truth(function, *tensors, upstream=upstream, **options)
    with engine():
        ours = evaluate(
            function, *(on(engine, x) for x in tensors), upstream=on(engine, upstream), **on(engine, options)
        )  # fmt: skip
    ours = Outcome(ours.loss.cpu(), tuple(x.cpu() for x in ours.gradients))
    assert_close(ours, exact, dtype, tuple(x.dtype for x in tensors), slack)
    return ours


def assert_close(
    ours: Outcome, exact: Outcome, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], slack: float = 1
) -> None:
    """The result within 8 roundings of its size and of 1, gradients within two of their dtype and 32 of the largest."""
    accumulation = accumulation_dtype(dtype)
    assert ours.loss.dtype == accumulation
    unit = slack * (2.0**-24 if accumulation == torch.float32 else 2.0**-50)
    within("result", ours.loss, exact.loss, 8 * unit * (1 + exact.loss.abs()))
    for place, (x, wanted, own) in enumerate(zip(ours.gradients, exact.gradients, dtypes, strict=True)):
        assert x.dtype == own
        finite = wanted[wanted.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        bound = 2 * ROUNDING[own] * wanted.abs() + SMALLEST.get(own, 0.0) + 32 * unit * (largest + 1e-30)
        within(f"gradient {place}", x, wanted, bound)
