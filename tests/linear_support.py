"""What the tests of losses from hidden states share: inputs of every kind of loss, and the float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from distill_support import generator, one_thread, to_float64, within
from torch import Tensor

import pyalign
from pyalign import TopKLogprobs, _linear, topk_logprobs
from pyalign._types import accumulation_dtype
from pyalign.reference import distill as reference_distill

KINDS = ("distill", "topk", "cross_entropy", "logprob")
every_kind = pytest.mark.parametrize("kind", KINDS)
COUNT, VOCAB, WIDTH, TEACHER_WIDTH = 21, 67, 9, 6


class Operands(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    def leaves(self, *frozen: str) -> Operands:
        return Operands(
            *(
                None if x is None else x.detach().requires_grad_(name not in frozen)
                for name, x in zip(self._fields, self, strict=True)
            )
        )


def normal(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 1.0
) -> Tensor:
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype).to(device)


def operands(
    count: int = COUNT, dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = True, **sizes: int
) -> Operands:
    vocab, width = sizes.get("vocab", VOCAB), sizes.get("width", WIDTH)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    return Operands(
        normal(count, width, seed=1, **options),
        normal(vocab, width, seed=2, scale=0.7, **options),
        normal(vocab, seed=3, **options) if bias else None,
    )


class Teacher(NamedTuple):
    """What a loss compares with: of each kind its own positional arguments."""

    hidden: Tensor
    weight: Tensor
    stored: TopKLogprobs
    targets: Tensor

    def arguments(self, kind: str) -> tuple[Any, ...]:
        of = {"distill": (self.hidden, self.weight), "topk": (self.stored,)}
        return of.get(kind, (self.targets,))


def teacher(
    count: int = COUNT, dtype: torch.dtype = torch.float32, device: str = "cpu", ignored: int = 4, **sizes: int
) -> Teacher:
    """Every ``ignored``-th target is -100; 0: none is."""
    vocab = sizes.get("vocab", VOCAB)
    hidden = normal(count, TEACHER_WIDTH, seed=4, dtype=dtype, device=device)
    weight = normal(vocab, TEACHER_WIDTH, seed=5, dtype=dtype, device=device)
    stored = topk_logprobs(normal(count, vocab, seed=6, scale=2.0), 5)
    targets = torch.randint(0, vocab, (count,), generator=generator(7))
    if ignored:
        targets[::ignored] = -100
    place = TopKLogprobs(*(x.to(device) if isinstance(x, Tensor) else x for x in stored))
    return Teacher(hidden, weight, place, targets.to(device))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "distill": pyalign.linear_distillation_loss,
    "topk": pyalign.linear_topk_distillation_loss,
    "cross_entropy": pyalign.linear_cross_entropy,
    "logprob": pyalign.linear_token_logprobs,
}


def call(kind: str, x: Operands, other: Teacher, **options: Any) -> Any:
    bias = "student_bias" if kind in ("distill", "topk") else "bias"
    return FUNCTIONS[kind](x.hidden, x.weight, *other.arguments(kind), **{bias: x.bias}, **options)


class Outcome(NamedTuple):
    results: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    metrics: tuple[Tensor, ...] = ()


def evaluate(kind: str, x: Operands, other: Teacher, frozen: tuple[str, ...] = (), **options: Any) -> Outcome:
    """Results and the gradients of what isn't frozen, with upstream gradients that are no powers of two."""
    leaves = x.leaves(*frozen)
    result = call(kind, leaves, other, **options)
    results, metrics = (result, ()) if isinstance(result, tuple) else ((result,), ())
    if options.get("return_metrics"):
        results, metrics = results[:1], tuple(results[1])
    upstreams = [_upstream(y) for y in results]
    wanted = [y for y in leaves if y is not None and y.requires_grad]
    return Outcome(tuple(y.detach() for y in results), torch.autograd.grad(results, wanted, upstreams), metrics)


def _upstream(like: Tensor) -> Tensor:
    return (0.3 + torch.arange(like.numel(), dtype=torch.float64) / 7).to(like).view(like.shape)


def in_float64(x: Any) -> Any:
    if isinstance(x, tuple):
        return type(x)(*(in_float64(y) for y in x))
    return to_float64(x)


def truth(kind: str, x: Operands, other: Teacher, frozen: tuple[str, ...] = (), **options: Any) -> Outcome:
    with pyalign.backend("reference"), one_thread():
        return evaluate(kind, in_float64(x), in_float64(other), frozen, **to_float64(options))


# Of results: logits of 16-bit operands are sums of two rounded products on a CPU. Of gradients: d loss / d logits is
# rounded to the products' dtype, and so are the results.
RESULT = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 1e-4, torch.float16: 3e-5}
GRADIENT = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(ours: Outcome, exact: Outcome, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Results within a few roundings, gradients within a few of the largest of theirs."""
    for y, z in zip(ours.results, exact.results, strict=True):
        assert y.dtype == accumulation_dtype(dtype)
        assert y.shape == z.shape
        within("result", y, z, slack * RESULT[dtype] * (1 + z.abs()))
    for y, z in zip(ours.gradients, exact.gradients, strict=True):
        assert y.dtype == dtype
        assert y.shape == z.shape
        largest = z.abs().amax() if z.numel() else 0.0
        within("gradient", y, z, slack * GRADIENT[dtype] * (z.abs() + largest + 1e-30))
    for y, z in zip(ours.metrics, exact.metrics, strict=True):
        if z.dtype == torch.bool:
            assert torch.equal(y.cpu(), z)
        else:
            within("metric", y, z, slack * RESULT[dtype] * (1 + z.abs()))


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of tokens of a chunk."""

    def set_rows(rows: int) -> None:
        monkeypatch.setattr(_linear, "chunk_rows", lambda layout, count, workspace, device: rows)

    return set_rows


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU: nobody asks how many tokens count."""
    monkeypatch.setattr(_linear, "_can_count", lambda device: False)
    monkeypatch.setattr(reference_distill, "_can_raise", lambda x: False)


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has, on the CPU: products of 16-bit operands with a float32 result."""

    def product(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
        assert a.dtype == b.dtype
        assert a.element_size() == 2
        out.copy_(a.float() @ b.float() + (out if beta else 0.0))

    monkeypatch.setattr(_linear, "_has_wide_products", lambda device: True)
    monkeypatch.setattr(_linear, "_wide_product", product)
