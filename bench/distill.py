"""Benchmarks of the distillation losses: `pytest bench/distill.py`, or `make bench BENCH_ARGS="-k kl"`.

Each case measures pyalign, torch eager and torch.compile in turns with a copy of the same size, and reports bytes that
the work must move (read student, read teacher, write gradient: 3 x logits), GB/s, and the share of copy bandwidth.

On a CPU all of them find memory that the process already has (`kept_memory`). Only the first cases, one of which also
measures peak memory, leave every allocation to get fresh pages, as torch on glibc does by default: then the system's
clearing of pages takes longer than our kernels do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import distillation_loss, topk_distillation_loss, topk_logprobs
from pyalign.benchmark import copy_function, figures, interleaved, kept_memory, peak_extra_memory

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU_SHAPES = [(8192, 128256, torch.bfloat16), (4096, 151936, torch.bfloat16), (4096, 128256, torch.float32)]
CPU_SHAPES = [(1024, 32000, torch.float32), (1024, 32000, torch.bfloat16), (256, 128256, torch.float32)]
SHAPES = [
    pytest.param(*shape, id=f"{shape[0]}x{shape[1]}-{str(shape[2]).removeprefix('torch.')}")
    for shape in (GPU_SHAPES if DEVICE.type == "cuda" else CPU_SHAPES)
]


def torch_divergence(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    if divergence == "forward_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    if divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    if divergence == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    teacher_side = F.kl_div(log_m, log_p, log_target=True, reduction="none")
    return 0.5 * (teacher_side + F.kl_div(log_m, log_q, log_target=True, reduction="none")).sum(-1).mean()


def torch_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(logits, k), torch.logsumexp(logits, -1)  # pyright: ignore[reportReturnType]


def step(loss: Callable[[Tensor], Tensor], student: Tensor) -> Callable[[], None]:
    """Forward and backward; the gradient is given up after each step, as an optimizer's zero_grad does."""

    def run() -> None:
        student.grad = None
        loss(student).backward()

    return run


def report(benchmark: Any, functions: dict[str, Callable[[], object]], like: Tensor, bytes_moved: int) -> None:
    """Times ``functions`` (the first is ours) in turns with a copy and leaves the figures in ``extra_info``."""
    if benchmark.disabled:
        for function in functions.values():
            function()
        benchmark(next(iter(functions.values())))
        return
    copy, copy_bytes = copy_function(like)
    with kept_memory(12 * 4 * like.numel()) if DEVICE.type == "cpu" else contextlib.nullcontext():
        times = interleaved({**functions, "copy": copy}, DEVICE, rounds=7)
        benchmark.pedantic(next(iter(functions.values())), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(figures(times, bytes_moved, copy_bytes))


def logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, vocab, device=DEVICE).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def kl_functions(student: Tensor, teacher: Tensor, with_compile: bool) -> dict[str, Callable[[], object]]:
    functions: dict[str, Callable[[], object]] = {
        "pyalign": step(lambda s: distillation_loss(s, teacher), student),
        "eager": step(lambda s: torch_divergence(s, teacher, "forward_kl"), student),
    }
    if with_compile:
        compiled = torch.compile(torch_divergence)
        functions["compile"] = step(lambda s: compiled(s, teacher, "forward_kl"), student)
    return functions


def topk_logits(small: bool) -> Tensor:
    rows, vocab = (8, 1000) if small else (8192, 128256) if DEVICE.type == "cuda" else (1024, 49152)
    torch.manual_seed(0)
    return torch.randn(rows, vocab, device=DEVICE)


def topk_functions(small: bool) -> dict[str, Callable[[], object]]:
    x = topk_logits(small)
    return {"pyalign": lambda: topk_logprobs(x, 50), "eager": lambda: torch_topk(x, 50)}


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES[:2])
def test_kl_in_fresh_memory(benchmark: Any, rows: int, vocab: int, dtype: torch.dtype) -> None:
    """The KL as a script on this machine meets it, page faults and all, and its peak memory. It stands before the cases
    that keep the memory they free."""
    if benchmark.disabled:
        rows, vocab = 8, 1000
    student, teacher = logits(rows, vocab, dtype)
    functions = kl_functions(student, teacher, not benchmark.disabled)
    if not benchmark.disabled:
        times = interleaved(functions, DEVICE, rounds=5)
        benchmark.extra_info |= {f"{name}_ms": times[name] * 1e3 for name in functions}
        benchmark.extra_info |= {
            f"over_{name}": times[name] / times["pyalign"] for name in functions if name != "pyalign"
        }
        student.grad = None
        extra = peak_extra_memory(functions["pyalign"], DEVICE)
        benchmark.extra_info["extra_memory_over_gradient"] = extra / (teacher.numel() * teacher.element_size())
    benchmark.pedantic(functions["pyalign"], rounds=1)


def test_topk_logprobs_in_fresh_memory(benchmark: Any) -> None:
    functions = topk_functions(benchmark.disabled)
    if not benchmark.disabled:
        times = interleaved(functions, DEVICE, rounds=5)
        benchmark.extra_info |= {f"{name}_ms": times[name] * 1e3 for name in functions}
        benchmark.extra_info["over_eager"] = times["eager"] / times["pyalign"]
    benchmark.pedantic(functions["pyalign"], rounds=1)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_kl_loss_and_gradient(benchmark: Any, rows: int, vocab: int, dtype: torch.dtype) -> None:
    if benchmark.disabled:
        rows, vocab = 8, 1000
    student, teacher = logits(rows, vocab, dtype)
    functions = kl_functions(student, teacher, not benchmark.disabled)
    report(benchmark, functions, teacher, 3 * teacher.numel() * teacher.element_size())


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd"])
def test_divergence_loss_and_gradient(benchmark: Any, divergence: str) -> None:
    rows, vocab, dtype = (8, 1000, torch.float32) if benchmark.disabled else SHAPES[0].values
    student, teacher = logits(rows, vocab, dtype)  # pyright: ignore[reportArgumentType]
    functions = {
        "pyalign": step(lambda s: distillation_loss(s, teacher, divergence=divergence), student),
        "eager": step(lambda s: torch_divergence(s, teacher, divergence), student),
    }
    report(benchmark, functions, teacher, 3 * teacher.numel() * teacher.element_size())


def test_topk_logprobs(benchmark: Any) -> None:
    x = topk_logits(benchmark.disabled)
    report(benchmark, topk_functions(benchmark.disabled), x, x.numel() * x.element_size())


def test_topk_loss_and_gradient(benchmark: Any) -> None:
    rows, vocab, dtype = (8, 1000, torch.float32) if benchmark.disabled else SHAPES[0].values
    student, teacher = logits(rows, vocab, dtype)  # pyright: ignore[reportArgumentType]
    stored = topk_logprobs(teacher, 50)

    def eager(s: Tensor) -> Tensor:
        log_q = torch.log_softmax(s.float(), -1)
        picked = log_q.gather(-1, stored.indices)
        rest = torch.log(-torch.expm1(torch.logsumexp(picked, -1)))
        assert stored.residual is not None
        tail = stored.residual.exp() * (stored.residual - rest)
        return ((stored.logprobs.exp() * (stored.logprobs - picked)).sum(-1) + tail).mean()

    functions = {
        "pyalign": step(lambda s: topk_distillation_loss(s, stored), student),
        "eager": step(eager, student),
    }
    report(benchmark, functions, teacher, 2 * teacher.numel() * teacher.element_size())


def test_call_overhead(benchmark: Any) -> None:
    """Forward and backward of 8 x 32 logits: what a call costs beside its work."""
    student, teacher = logits(8, 32, torch.float32)
    ours = step(lambda s: distillation_loss(s, teacher), student)
    eager = step(lambda s: torch_divergence(s, teacher, "forward_kl"), student)
    if not benchmark.disabled:
        times = interleaved({"pyalign": ours, "eager": eager}, DEVICE, rounds=2001, warmup=200)
        benchmark.extra_info["pyalign_us"] = times["pyalign"] * 1e6
        benchmark.extra_info["eager_us"] = times["eager"] * 1e6
        benchmark.extra_info["times_eager"] = times["pyalign"] / times["eager"]
    benchmark(ours)
