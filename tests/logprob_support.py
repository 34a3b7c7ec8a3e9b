"""What the log-prob tests share: results and gradients of the ops, the float64 truth, how far from it is allowed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from distill_support import ROUNDING, SMALLEST, generator, one_thread, to_float64, within
from torch import Tensor

import pyalign
from pyalign._types import accumulation_dtype

IGNORED = -100


def targets(*shape: int, vocab: int, seed: int = 3, ignored: bool = True) -> Tensor:
    """Random targets, every fifth of them ignored."""
    x = torch.randint(0, vocab, shape, generator=generator(seed))
    if ignored:
        x.view(-1)[1::5] = IGNORED
    return x


def upstreams(*shape: int) -> tuple[Tensor, Tensor]:
    """For log-probs and entropies, no powers of 2, so that all of them round."""
    return tuple(torch.randn(shape, generator=generator(seed), dtype=torch.float64) for seed in (7, 8))  # pyright: ignore


class Outcome(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    gradient: Tensor


def evaluate(logits: Tensor, targets: Tensor, upstream: tuple[Tensor, Tensor] | None = None, **options: Any) -> Outcome:
    """Log-probs, entropies, and the gradient of their sum weighed by ``upstream``."""
    logits = logits.detach().requires_grad_()
    results = pyalign.token_logprobs(logits, targets, return_entropy=True, **options)
    given = [torch.ones_like(x) for x in results] if upstream is None else [x.to(results[0]) for x in upstream]
    (gradient,) = torch.autograd.grad(results, logits, given)
    return Outcome(*(x.detach() for x in results), gradient)


def truth(logits: Tensor, targets: Tensor, upstream: tuple[Tensor, Tensor] | None = None, **options: Any) -> Outcome:
    """The same in float64, in plain torch, on the CPU."""
    with pyalign.backend("reference"), one_thread():
        return evaluate(to_float64(logits), targets.cpu(), upstream, **options)


def assert_close(ours: Outcome, exact: Outcome, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Log-probs and entropies within 8 roundings of the accumulation dtype of their size and of 1; each gradient within
    two roundings of its dtype of its own size plus 64 of the accumulation dtype of the largest of its row, or of 1."""
    accumulation = accumulation_dtype(dtype)
    assert ours.logprob.dtype == ours.entropy.dtype == accumulation
    assert ours.gradient.dtype == dtype
    unit = slack * (2.0**-24 if accumulation == torch.float32 else 2.0**-50)  # the truth is float64 too
    for name, x, wanted in zip(("logprob", "entropy"), ours[:2], exact[:2], strict=True):
        assert x.shape == wanted.shape
        within(name, x, wanted, 8 * unit * (1 + wanted.abs()))
    assert_gradient_close(ours.gradient, exact.gradient, dtype, slack)


def assert_gradient_close(ours: Tensor, exact: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    assert ours.shape == exact.shape
    unit = slack * (2.0**-50 if dtype == torch.float64 else 2.0**-24)
    largest = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact
    within(
        "gradient",
        ours,
        exact,
        2 * ROUNDING[dtype] * exact.abs() + SMALLEST.get(dtype, 0.0) + 64 * unit * (largest + 1),
    )
