"""Kernels over slices of rows, the ranks being threads of one process: on every backend, in every dtype."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from distill_support import DIVERGENCES, DTYPES, KERNELS, Engine, name_of
from torch import Tensor

from pyalign import _split
from pyalign._shards import Shards
from pyalign._split import SplitEngine, saved_width
from pyalign._types import Options, Tokens, accumulation_dtype
from pyalign.reference import distill as reference
from pyalign.reference import logprob as logprob_reference

T = TypeVar("T")
ENGINES = [engine for engine in KERNELS if engine.name != "cuda"]  # whose kernels take whole rows alone
CASES = [
    pytest.param(engine, dtype, id=f"{engine.name}-{name_of(dtype)}")
    for engine in ENGINES
    for dtype in ((torch.float32,) if engine.slow else DTYPES)  # what an interpreter takes seconds for is tested once
    if engine.serves(dtype)
]
B, S = 2, 4


class Ranks:
    """Threads that exchange tensors as the ranks of a process group do. One runs at a time: Triton's interpreter is a
    single one."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self._barrier = threading.Barrier(len(sizes), timeout=60)
        self._places: list[Tensor | None] = [None] * len(sizes)
        self._turn = threading.Lock()

    def gather(self, x: Tensor, shards: Shards) -> Tensor:
        self._places[shards.rank] = x.contiguous()
        self._everybody_else()
        everybody = torch.stack([x for x in self._places if x is not None])
        self._everybody_else()
        return everybody

    def _everybody_else(self) -> None:
        """Waits until all ranks have come here."""
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def run(self, function: Callable[[Shards, slice], T]) -> list[T]:
        """``function`` of every rank's shards and part of the vocabulary."""

        def one(rank: int) -> T:
            shards = Shards("", self.sizes, rank)
            try:
                with self._turn:
                    return function(shards, slice(shards.begin, shards.begin + self.sizes[rank]))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.sizes)) as threads:
            return list(threads.map(one, range(len(self.sizes))))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, ...]], Ranks]]:
    with contextlib.ExitStack():

        def make(sizes: tuple[int, ...]) -> Ranks:
            group = Ranks(sizes)
            monkeypatch.setattr(_split, "gather", group.gather)
            return group

        yield make


def sizes_for(engine: Engine) -> tuple[int, ...]:
    """Longer than a kernel's block, unless an interpreter runs it; one rank holds nothing."""
    return (9, 0, 14) if engine.slow else (700, 0, 1301)


def rows(vocab: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """(B, S, V) behind two strides, as ``logits[:, :-1]`` is, and with room after each row."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(B, S + 1, vocab + 3, generator=generator, dtype=torch.float64)
    return x.to(dtype).to(device)[:, :-1, :vocab]


def tokens_on(device: str, dtype: torch.dtype, vocab: int) -> Tokens:
    count, wide = B * S, accumulation_dtype(dtype)
    generator = torch.Generator().manual_seed(9)
    targets = torch.randint(0, vocab, (count,), generator=generator)
    targets[3] = -100
    return Tokens(
        mask=(torch.arange(count) % 4 != 1).to(device),
        teacher_rows=torch.randint(-1, count, (count,), generator=generator).to(device),
        weight=torch.rand(count, generator=generator, dtype=wide).to(device),
        targets=targets.to(device),
        reduction="none",
    )


def truth(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double().cpu().requires_grad_()
    loss = function(x)
    (gradient,) = torch.autograd.grad((loss * upstream.double().cpu()).sum(), x)
    return loss.detach(), gradient


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 4 * torch.finfo(dtype).eps)


def on_cpu(tokens: Tokens) -> Tokens:
    return Tokens(*(x.cpu() if isinstance(x, Tensor) else x for x in tokens))


def _refused(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a copy from the host to the device, which a CUDA graph can't capture")


def two_passes(
    ranks: Ranks, engine: Engine, kind: str, width: int, call: Callable[..., Any], x: Tensor, in_place: bool
) -> tuple[Tensor, Tensor]:
    """The losses that all ranks agree on, and their gradients side by side: from a forward and a backward pass."""

    def one(shards: Shards, mine: slice) -> tuple[Tensor, Tensor]:
        saved = torch.zeros(B * S, width, dtype=torch.float64, device=x.device)
        part = x[..., mine]
        loss = call(SplitEngine(engine.name, shards, record=saved), part, mine, None)
        part = part.clone() if in_place else part
        out = part if in_place else torch.empty(part.shape, dtype=part.dtype, device=part.device)
        call(SplitEngine(engine.name, shards, saved=saved), part, mine, out)
        return loss, out

    with pytest.MonkeyPatch.context() as patch:  # a GPU would wait for what the host copies to it
        patch.setattr(torch, "tensor", _refused)
        found = ranks.run(one)
    losses = [loss for loss, _ in found]
    assert all(torch.equal(loss, losses[0]) for loss in losses[1:])
    return losses[0], torch.cat([gradient for _, gradient in found], -1)


def compare(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.double().cpu().reshape(theirs.shape), theirs, rtol=tolerance(dtype), atol=tolerance(dtype)
        )


@pytest.mark.smoke
@pytest.mark.parametrize(("engine", "dtype"), CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(engine: Engine, dtype: torch.dtype, divergence: str, ranks: Callable[[tuple[int, ...]], Ranks]):
    sizes = sizes_for(engine)
    student, teacher = (rows(sum(sizes), dtype, engine.device, seed) for seed in (0, 1))
    tokens = tokens_on(engine.device, dtype, sum(sizes) - 2)
    hard = 0.0 if divergence == "tvd" else 0.3
    options = Options(sum(sizes) - 2, divergence, 0.3, 2.0, True, hard)
    upstream = torch.linspace(0.5, 1.5, B * S, dtype=accumulation_dtype(dtype), device=engine.device)

    def call(slices: SplitEngine, part: Tensor, mine: slice, out: Tensor | None) -> Tensor | None:
        given = tokens if out is None else tokens._replace(upstream=upstream)
        return slices.distill(
            part, teacher[..., mine], given, options, gradient=out, want_loss=out is None, want_metrics=False
        ).loss

    def exact(x: Tensor) -> Tensor:
        loss = reference.distill(x, teacher.double().cpu(), on_cpu(tokens), options).loss
        assert loss is not None
        return loss

    found = two_passes(ranks(sizes), engine, "distill", saved_width("distill"), call, student, divergence == "jsd")
    compare(found, truth(exact, student, upstream), dtype)


@pytest.mark.smoke
@pytest.mark.parametrize(("engine", "dtype"), CASES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_top_k(engine: Engine, dtype: torch.dtype, tail: str, ranks: Callable[[tuple[int, ...]], Ranks]):
    sizes, k = sizes_for(engine), 6
    student, teacher = (rows(sum(sizes), dtype, engine.device, seed) for seed in (0, 1))
    tokens, options = (
        tokens_on(engine.device, dtype, sum(sizes)),
        Options(sum(sizes), "forward_kl", 0.5, 2.0, False, 0.3),
    )
    logprobs, indices, residual = reference.topk(teacher, k, 2.0)
    indices[2, 1] = -1
    upstream = torch.linspace(0.5, 1.5, B * S, dtype=accumulation_dtype(dtype), device=engine.device)

    def call(slices: SplitEngine, part: Tensor, mine: slice, out: Tensor | None) -> Tensor | None:
        given = tokens if out is None else tokens._replace(upstream=upstream)
        return slices.topk_distill(
            part, logprobs, indices, residual, tail, given, options, gradient=out, want_loss=out is None,
            want_metrics=False,
        ).loss  # fmt: skip

    def exact(x: Tensor) -> Tensor:
        stored = (logprobs.double().cpu(), indices.cpu(), residual.double().cpu())
        loss = reference.topk_distill(x, *stored, tail, on_cpu(tokens), options).loss
        assert loss is not None
        return loss

    width = saved_width("topk_distill", k, True)
    found = two_passes(ranks(sizes), engine, "topk_distill", width, call, student, tail == "bucket")
    compare(found, truth(exact, student, upstream), dtype)


@pytest.mark.smoke
@pytest.mark.parametrize(("engine", "dtype"), CASES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probs_and_entropies(
    engine: Engine, dtype: torch.dtype, softcap: float | None, ranks: Callable[[tuple[int, ...]], Ranks]
):
    sizes = sizes_for(engine)
    logits = rows(sum(sizes), dtype, engine.device, 0)
    targets = tokens_on(engine.device, dtype, sum(sizes)).targets
    assert targets is not None
    upstream = torch.linspace(0.5, 1.5, B * S, dtype=accumulation_dtype(dtype), device=engine.device)

    def call(slices: SplitEngine, part: Tensor, mine: slice, out: Tensor | None) -> Tensor | None:
        if out is None:
            results = slices.logprob(part, targets, -100, 2.0, softcap, True, True)
            assert results.entropy is not None
            return results.logprob + 0.5 * results.entropy
        slices.logprob_gradient(part, targets, -100, 2.0, softcap, None, upstream, 0.5 * upstream, out)
        return None

    def exact(x: Tensor) -> Tensor:
        results = logprob_reference.logprob(x, targets.cpu(), -100, 2.0, softcap, True)
        assert results.entropy is not None
        return results.logprob + 0.5 * results.entropy

    found = two_passes(ranks(sizes), engine, "logprob", saved_width("logprob"), call, logits, softcap is None)
    compare(found, truth(exact, logits, upstream), dtype)


@pytest.mark.smoke
@pytest.mark.parametrize(("engine", "dtype"), CASES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cross_entropy(
    engine: Engine, dtype: torch.dtype, softcap: float | None, ranks: Callable[[tuple[int, ...]], Ranks]
):
    sizes = sizes_for(engine)
    logits = rows(sum(sizes), dtype, engine.device, 0)
    targets = tokens_on(engine.device, dtype, sum(sizes)).targets
    assert targets is not None
    factor = torch.full((), 0.7, dtype=accumulation_dtype(dtype), device=engine.device)

    def call(slices: SplitEngine, part: Tensor, mine: slice, out: Tensor | None) -> Tensor | None:
        return slices.cross_entropy(part, targets, -100, 0.2, 0.1, softcap, factor, out)

    def exact(x: Tensor) -> Tensor:
        return logprob_reference.row_cross_entropy(x, targets.cpu(), -100, 0.2, 0.1, softcap)

    found = two_passes(ranks(sizes), engine, "cross_entropy", saved_width("logprob"), call, logits, softcap is None)
    compare(found, truth(exact, logits, factor.expand(B * S)), dtype)
