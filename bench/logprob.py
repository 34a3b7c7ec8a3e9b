"""Benchmarks of log-probs: `pytest bench/logprob.py`, or `make bench BENCH_ARGS="-k logprob"`.

Each case measures pyalign, torch eager and torch.compile in turns with a copy of the logits, and reports the bytes that
the work must move (forward: read logits; backward: read logits, write gradient), GB/s, and the share of the copy's
bandwidth. On a CPU all of them find memory that the process already has (`kept_memory`), but for the first case, where
torch eager gets fresh pages for every tensor, as it does by default; pyalign allocates two numbers a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalign import token_logprobs
from pyalign.benchmark import copy_function, figures, interleaved, kept_memory

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU_SHAPES = [(8192, 151936, torch.bfloat16), (8192, 128256, torch.bfloat16), (4096, 128256, torch.float32)]
CPU_SHAPES = [(1024, 32000, torch.float32), (1024, 49152, torch.float32), (1024, 32000, torch.bfloat16)]
SHAPES = [
    pytest.param(*shape, id=f"{shape[0]}x{shape[1]}-{str(shape[2]).removeprefix('torch.')}")
    for shape in (GPU_SHAPES if DEVICE.type == "cuda" else CPU_SHAPES)
]


def torch_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(logits.float(), -1)
    return log_q.gather(-1, targets[:, None]).squeeze(-1), -(log_q.exp() * log_q).sum(-1)


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(logits, targets, return_entropy=True)


def report(benchmark: Any, step: Callable[[Any], Callable[[], object]], like: Tensor, reads_and_writes: int) -> None:
    """Times ``step`` of every way to log-probs and entropies, and leaves the figures in ``extra_info``."""
    functions = {"pyalign": step(ours), "eager": step(torch_logprobs)}
    if benchmark.disabled:
        for function in functions.values():
            function()
        benchmark(functions["pyalign"])
        return
    functions["compile"] = step(torch.compile(torch_logprobs))
    copy, copy_bytes = copy_function(like)
    moved = reads_and_writes * like.numel() * like.element_size()
    with kept_memory(8 * 4 * like.numel()) if DEVICE.type == "cpu" else contextlib.nullcontext():
        times = interleaved({**functions, "copy": copy}, DEVICE, rounds=7)
        benchmark.pedantic(functions["pyalign"], rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(figures(times, moved, copy_bytes))


def inputs(benchmark: Any, rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if benchmark.disabled:
        rows, vocab = 8, 1000
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, device=DEVICE).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), device=DEVICE)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_logprobs_and_entropy_in_fresh_memory(benchmark: Any, rows: int, vocab: int, dtype: torch.dtype) -> None:
    """The first case of the file: later ones keep what they free."""
    logits, targets = inputs(benchmark, rows, vocab, dtype)
    functions = {"pyalign": lambda: ours(logits, targets), "eager": lambda: torch_logprobs(logits, targets)}
    if not benchmark.disabled:
        times = interleaved(functions, DEVICE, rounds=7)
        benchmark.extra_info |= {f"{name}_ms": times[name] * 1e3 for name in functions}
        benchmark.extra_info["over_eager"] = times["eager"] / times["pyalign"]
    benchmark.pedantic(functions["pyalign"], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_logprobs_and_entropy(benchmark: Any, rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, targets = inputs(benchmark, rows, vocab, dtype)
    report(benchmark, lambda function: lambda: function(logits, targets), logits, reads_and_writes=1)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_logprobs_and_entropy_with_backward(benchmark: Any, rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, targets = inputs(benchmark, rows, vocab, dtype)
    leaf = logits.requires_grad_()

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def run() -> None:
            leaf.grad = None
            logprob, entropy = function(leaf, targets)
            (logprob.sum() + 0.01 * entropy.sum()).backward()

        return run

    report(benchmark, step, logits.detach(), reads_and_writes=3)
