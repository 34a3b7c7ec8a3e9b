"""Benchmarks of losses straight from hidden states: `pytest bench/linear.py`, or `make bench BENCH_ARGS="-k linear"`.

The cases are those of `pyalign bench --system linear`. Each takes turns with the bare matrix products that it can't do
without (three for a cross-entropy, four for a distillation, in the chunks of the same workspace), with plain torch,
with torch's own fused op where this torch has one, and with installed peers.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import pyalign
from pyalign import linear_distillation_loss
from pyalign.benchmark import fixture
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import linear

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", linear.cross_entropies(DEVICE), ids=str)
def test_linear_cross_entropy(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", linear.distillations(DEVICE), ids=str)
def test_linear_distillation(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", linear.topk_losses(DEVICE), ids=str)
def test_linear_topk_distillation(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", linear.logprobs(DEVICE), ids=str)
def test_linear_logprobs_and_their_gradient(benchmark: Any, case: Case) -> None:
    """Four products: backward projects again."""
    fixture.run(benchmark, case, DEVICE)


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
