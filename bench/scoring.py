"""Benchmarks of scoring: `pytest bench/scoring.py`, or `make bench BENCH_ARGS="-k scoring"`.

The cases are those of `pyalign bench --system scoring`. On a CPU all find memory that the process already has
(`kept_memory`). What reads a handful of rows, or fits the cache, is bound by calls or arithmetic: its share says so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyalign.benchmark import fixture
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import scoring

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", scoring.heads(), ids=str)
def test_reward_scores(benchmark: Any, case: Case) -> None:
    """64 sequences of up to 512 tokens. Backward's work is to write the gradient of the hidden states."""
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", scoring.win_matrices(), ids=str)
def test_win_probabilities(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", scoring.win_rates(), ids=str)
def test_expected_win_rates(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", scoring.best(), ids=str)
def test_best_of_ragged_groups(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", scoring.metrics(), ids=str)
def test_preference_metrics(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)
