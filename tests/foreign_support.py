"""What the tests of adapters share: a project's formula and ours, compared in value and gradient."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same values, each a leaf of its own."""
    return [x.detach().clone().requires_grad_() for x in tensors]


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of its weighted sum (a sum alone would hide entries that trade places)."""
    copies = leaves(*inputs)
    result = function(*copies)
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(result.shape, generator=generator, dtype=torch.float64) + 0.5
    gradients = torch.autograd.grad((result * weights).sum(), copies, allow_unused=True)
    return result.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, copies, strict=True)]


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, atol: float = 1e-12
) -> None:
    """``ours`` and ``theirs`` agree in value, and in the gradient of every input."""
    value, gradients = value_and_gradients(ours, *inputs)
    expected, expected_gradients = value_and_gradients(theirs, *inputs)
    assert value.shape == expected.shape
    assert expected.abs().max() > 1e-6, "nothing is compared"
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=atol)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 1e-6, "nothing is compared"
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=atol)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(*shape: int, vocab: int, k: int, seed: int = 101) -> tuple[Tensor, Tensor]:
    """A teacher's k largest log-probs per token and their ids, (*shape, k) each."""
    top = torch.log_softmax(numbers(*shape, vocab, seed=seed, scale=2.0), -1).topk(k, -1)
    return top.values, top.indices


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> types.ModuleType:
    """A module of a project that isn't installed, with what the adapter reads of it."""
    parent = ""
    for part in name.split("."):
        whole = f"{parent}.{part}" if parent else part
        if whole not in sys.modules:
            module = types.ModuleType(whole)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, whole, module)
        parent = whole
    module = sys.modules[name]
    for key, value in contents.items():
        monkeypatch.setattr(module, key, value, raising=False)
    return module
