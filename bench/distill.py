"""Benchmarks of the distillation losses: `pytest bench/distill.py`, or `make bench BENCH_ARGS="-k kl"`.

The cases are those of `pyalign bench --system distill`: pyalign, torch eager, torch.compile and installed peers take
turns with a copy. Bytes are what the work must move (read student, read teacher, write gradient: 3 x logits).

On a CPU all of them find memory that the process already has (`kept_memory`). Only the first cases leave every
allocation to get fresh pages, as torch on glibc does by default: then the system's clearing of pages takes longer than
our kernels do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyalign.benchmark import fixture
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import distill

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", distill.kl(DEVICE)[:2], ids=str)
def test_kl_in_fresh_memory(benchmark: Any, case: Case) -> None:
    """The KL as a script on this machine meets it, page faults and all. It stands before the cases that keep the memory
    they free."""
    fixture.run(benchmark, case, DEVICE, keep_memory=False)


@pytest.mark.parametrize("case", distill.topk(DEVICE), ids=str)
def test_topk_logprobs_in_fresh_memory(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE, keep_memory=False)


@pytest.mark.parametrize("case", distill.kl(DEVICE), ids=str)
def test_kl_loss_and_gradient(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", distill.divergences(DEVICE), ids=str)
def test_divergence_loss_and_gradient(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", distill.topk(DEVICE), ids=str)
def test_topk_logprobs(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", distill.topk_loss(DEVICE), ids=str)
def test_topk_loss_and_gradient(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", distill.call_overhead(DEVICE), ids=str)
def test_call_overhead(benchmark: Any, case: Case) -> None:
    """Forward and backward of 8 x 32 logits: what a call costs beside its work."""
    fixture.run(benchmark, case, DEVICE)
