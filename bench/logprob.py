"""Benchmarks of log-probs: `pytest bench/logprob.py`, or `make bench BENCH_ARGS="-k logprob"`.

The cases are those of `pyalign bench --system logprob`. Bytes are what the work must move (forward: read logits;
backward: read logits, write gradient). On a CPU all find memory that the process already has (`kept_memory`), but for
the first cases, where torch eager gets fresh pages for every tensor, as it does by default; pyalign allocates two
numbers a row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyalign.benchmark import fixture
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import logprob

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", logprob.entropies(DEVICE, backward=False), ids=str)
def test_logprobs_and_entropy_in_fresh_memory(benchmark: Any, case: Case) -> None:
    """The first of the file: later ones keep what they free."""
    fixture.run(benchmark, case, DEVICE, keep_memory=False, compiled=False)


@pytest.mark.parametrize("case", logprob.entropies(DEVICE, backward=False), ids=str)
def test_logprobs_and_entropy(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", logprob.entropies(DEVICE, backward=True), ids=str)
def test_logprobs_and_entropy_with_backward(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", logprob.cross_entropies(DEVICE), ids=str)
def test_logprobs_alone_with_backward(benchmark: Any, case: Case) -> None:
    """Beside the peers' cross-entropies from logits."""
    fixture.run(benchmark, case, DEVICE)
