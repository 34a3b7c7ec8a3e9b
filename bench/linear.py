"""Benchmarks of losses straight from hidden states: `pytest bench/linear.py`, or `make bench BENCH_ARGS="-k linear"`.

Each case takes turns with the bare matrix products that it can't do without (three for a cross-entropy, four for a
distillation, in the chunks of the same workspace that suit them best), with plain torch and with torch's own fused op
where this torch has one. It reports FLOPs, GFLOP/s, the share of the bare products' rate, and the peak memory.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyalign
from pyalign import linear_cross_entropy, linear_distillation_loss
from pyalign.benchmark import interleaved, kept_memory, peak_extra_memory

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU, CPU = (8192, 4096, 128256), (1024, 576, 49152)
TOKENS, HIDDEN, VOCAB = GPU if DEVICE.type == "cuda" else CPU
DTYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
LARGEST_CHUNK = 4096 if DEVICE.type == "cuda" else 512  # of our default workspace
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))


class Inputs:
    def __init__(self, dtype: torch.dtype, small: bool) -> None:
        self.tokens, self.width, self.vocab = (8, 16, 100) if small else (TOKENS, HIDDEN, VOCAB)
        torch.manual_seed(0)
        self.hidden, self.teacher_hidden = (self._normal(self.tokens, 1.0, dtype) for _ in range(2))
        self.weight, self.teacher_weight = (self._normal(self.vocab, 0.05, dtype) for _ in range(2))
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.targets = torch.randint(0, self.vocab, (self.tokens,), device=DEVICE)

    def _normal(self, rows: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (scale * torch.randn(rows, self.width, device=DEVICE)).to(dtype)

    def step(self, loss: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward; the gradients are given up after each step, as an optimizer's zero_grad does."""

        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            loss().backward()

        return run

    def products(self, rows: int, sides: int) -> Callable[[], None]:
        """The bare matrix products of a step: one projection a side, and the two gradients."""
        hidden, weight = self.hidden.detach(), self.weight.detach()

        def run() -> None:
            logits = [torch.empty(rows, self.vocab, dtype=hidden.dtype, device=DEVICE) for _ in range(sides)]
            hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)
            for begin in range(0, self.tokens, rows):
                chunk = slice(begin, min(begin + rows, self.tokens))
                count = chunk.stop - begin
                torch.mm(hidden[chunk], weight.t(), out=logits[0][:count])
                if sides == 2:
                    torch.mm(self.teacher_hidden[chunk], self.teacher_weight.t(), out=logits[1][:count])
                torch.mm(logits[0][:count], weight, out=hidden_gradient[chunk])
                if begin:
                    weight_gradient.addmm_(logits[0][:count].t(), hidden[chunk])
                else:
                    torch.mm(logits[0][:count].t(), hidden[chunk], out=weight_gradient)

        return run


def peak_mib(case: str, dtype: torch.dtype) -> float:
    """Extra memory at the peak of one step, its gradients included: `python bench/linear.py CASE DTYPE`, in a process
    where nothing else moves it."""
    command = [sys.executable, __file__, case, str(dtype).removeprefix("torch.")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(benchmark: Any, x: Inputs, functions: dict[str, Callable[[], object]], sides: int) -> None:
    """Times ``functions`` (the first is ours) in turns with the bare products and leaves the figures in
    ``extra_info``."""
    ours = next(iter(functions))
    if benchmark.disabled:
        for function in functions.values():
            function()
        benchmark(functions[ours])
        return
    chunks = {rows: x.products(rows, sides) for rows in (LARGEST_CHUNK // 2, LARGEST_CHUNK)}
    with kept_memory(4 << 30) if DEVICE.type == "cpu" else contextlib.nullcontext():
        everything = {**functions, **{f"products_{rows}": run for rows, run in chunks.items()}}
        times = interleaved(everything, DEVICE, rounds=7, warmup=1)
        benchmark.pedantic(functions[ours], rounds=3, warmup_rounds=1)
    bare = min(times[f"products_{rows}"] for rows in chunks)
    flops = (sides + 2) * 2 * x.tokens * x.width * x.vocab
    info = benchmark.extra_info
    info["flops"] = flops
    info["GFLOP_per_s"] = flops / times[ours] / 1e9
    info["products_GFLOP_per_s"] = flops / bare / 1e9
    info["over_products"] = times[ours] / bare
    info["logits_MiB"] = sides * x.tokens * x.vocab * x.hidden.element_size() / 2**20
    info["gradients_MiB"] = (x.hidden.nbytes + x.weight.nbytes) / 2**20
    for name in functions:
        info[f"{name}_ms"] = times[name] * 1e3
        if name != ours:
            info[f"over_{name}"] = times[name] / times[ours]


def eager_cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy((x.hidden @ x.weight.T).float(), x.targets)


def eager_distillation(x: Inputs) -> Tensor:
    log_q = torch.log_softmax((x.hidden @ x.weight.T).float(), -1)
    log_p = torch.log_softmax((x.teacher_hidden @ x.teacher_weight.T).float(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def torch_fused(x: Inputs) -> dict[str, Callable[[], object]]:
    """torch's own linear cross-entropy, in chunks and whole, from the version on that has it."""
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        return {}
    options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "torch_fused": x.step(lambda: function(x.hidden, x.weight, x.targets, options=options)),
        "torch_whole": x.step(lambda: function(x.hidden, x.weight, x.targets)),
    }


@every_dtype
def test_linear_cross_entropy(benchmark: Any, dtype: torch.dtype) -> None:
    x = Inputs(dtype, benchmark.disabled)

    def eager() -> Tensor:
        return eager_cross_entropy(x)

    functions: dict[str, Callable[[], object]] = {
        "pyalign": x.step(lambda: linear_cross_entropy(x.hidden, x.weight, x.targets)),
        "eager": x.step(eager),
        **torch_fused(x),
    }
    if dtype != torch.float32:
        narrow = x.step(lambda: linear_cross_entropy(x.hidden, x.weight, x.targets, logits_dtype=dtype))
        functions["pyalign_16_bit_logits"] = narrow
    if not benchmark.disabled:
        functions["compile"] = x.step(torch.compile(eager))
    report(benchmark, x, functions, sides=1)
    if not benchmark.disabled:
        benchmark.extra_info["extra_MiB"] = peak_mib("cross_entropy", dtype)
        benchmark.extra_info["eager_extra_MiB"] = peak_mib("cross_entropy_eager", dtype)


@every_dtype
def test_linear_distillation(benchmark: Any, dtype: torch.dtype) -> None:
    x = Inputs(dtype, benchmark.disabled)
    teacher = (x.teacher_hidden, x.teacher_weight)

    def eager() -> Tensor:
        return eager_distillation(x)

    functions: dict[str, Callable[[], object]] = {
        "pyalign": x.step(lambda: linear_distillation_loss(x.hidden, x.weight, *teacher)),
        "eager": x.step(eager),
    }
    if dtype != torch.float32:
        narrow = x.step(lambda: linear_distillation_loss(x.hidden, x.weight, *teacher, logits_dtype=dtype))
        functions["pyalign_16_bit_logits"] = narrow
    if not benchmark.disabled:
        functions["compile"] = x.step(torch.compile(eager))
    report(benchmark, x, functions, sides=2)
    if not benchmark.disabled:
        benchmark.extra_info["extra_MiB"] = peak_mib("distillation", dtype)
        benchmark.extra_info["eager_extra_MiB"] = peak_mib("distillation_eager", dtype)


def test_linear_logprobs_and_their_gradient(benchmark: Any) -> None:
    """Four products: backward projects again."""
    x = Inputs(DTYPES[0], benchmark.disabled)

    def eager() -> Tensor:
        return torch.log_softmax((x.hidden @ x.weight.T).float(), -1).gather(-1, x.targets[:, None]).sum()

    functions: dict[str, Callable[[], object]] = {
        "pyalign": x.step(lambda: pyalign.linear_token_logprobs(x.hidden, x.weight, x.targets).sum()),
        "eager": x.step(eager),
    }
    report(benchmark, x, functions, sides=2)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x).removeprefix("torch."))
def test_rounding_near_convergence(benchmark: Any, logits_dtype: torch.dtype) -> None:
    """What chunks of logits in 16 bits do to a distillation in bfloat16 whose KL is 3e-4: relative errors of the loss
    and of the hidden states' gradient against float64."""
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 64).bfloat16(), 0.2 * torch.randn(2000, 64)
    weight, teacher = head.bfloat16(), (head + 0.2 * 2.0**-6 * torch.randn_like(head)).bfloat16()
    hidden, weight, teacher = (y.to(DEVICE) for y in (hidden, weight, teacher))
    results: list[tuple[Tensor, Tensor]] = []
    for dtype in (torch.bfloat16, torch.float64):
        student = hidden.to(dtype, copy=True).requires_grad_()
        options = {} if dtype == torch.float64 else {"logits_dtype": logits_dtype}
        sides = (student, weight.to(dtype), hidden.to(dtype), teacher.to(dtype))
        with pyalign.backend("reference") if dtype == torch.float64 else contextlib.nullcontext():
            loss = linear_distillation_loss(*sides, **options)
        loss.backward()
        assert student.grad is not None
        results.append((loss.detach().double(), student.grad.double()))
    (loss, gradient), (exact, exact_gradient) = results
    benchmark.extra_info["kl"] = float(exact)
    benchmark.extra_info["loss_error"] = float((loss - exact).abs() / exact)
    benchmark.extra_info["gradient_error"] = float((gradient - exact_gradient).norm() / exact_gradient.norm())
    benchmark.pedantic(lambda: linear_distillation_loss(hidden, weight, hidden, teacher), rounds=1)


def main() -> None:
    case, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    losses: dict[str, Callable[[Inputs], Tensor]] = {
        "cross_entropy": lambda x: linear_cross_entropy(x.hidden, x.weight, x.targets),
        "cross_entropy_eager": eager_cross_entropy,
        "distillation": lambda x: linear_distillation_loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight),
        "distillation_eager": eager_distillation,
    }
    for small in (True, False):  # the first loads code, starts threads
        x = Inputs(dtype, small)
        x.products(min(LARGEST_CHUNK, x.tokens), 2)()  # for which the vendor's library keeps buffers of its own
        step = x.step(functools.partial(losses[case], x))
        peak = peak_extra_memory(step, DEVICE)
    print(peak / 2**20)


if __name__ == "__main__":
    main()
