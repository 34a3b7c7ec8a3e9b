"""Benchmarks of the preference losses: `pytest bench/ranking.py`, or `make bench BENCH_ARGS="-k ranking"`.

The cases are those of `pyalign bench --system ranking`, forward and backward; `over_x` says how many times as long x
takes. Torch has two ways to all pairs of a group: the full K x K matrix under a mask, and the pairs picked by index.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyalign.benchmark import fixture
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import ranking

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", ranking.all_pairs(), ids=str)
def test_all_pairs(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", ranking.one_large_group(), ids=str)
def test_one_large_group(benchmark: Any, case: Case) -> None:
    """K = 4096: the K x K matrix would be 64 MB in float32, several times over in torch."""
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", ranking.pairs(), ids=str)
def test_pairs(benchmark: Any, case: Case) -> None:
    """A few thousand pairs are mostly the overhead of calls: one Python Function against four of torch's own."""
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", ranking.dpo(), ids=str)
def test_dpo(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", ranking.ragged_groups(), ids=str)
def test_ragged_groups(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)


@pytest.mark.parametrize("case", ranking.binary(), ids=str)
def test_binary_discrimination(benchmark: Any, case: Case) -> None:
    fixture.run(benchmark, case, DEVICE)
