"""Fixtures of every test. Without a GPU the Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import hypothesis
from distributed_support import Pools

# The same examples in every run: what fails here fails on the next machine too.
hypothesis.settings.register_profile("pyalign", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("pyalign")


def _poison(x: torch.Tensor) -> torch.Tensor:
    if x.is_floating_point():
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max // 2)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poison(*arguments: Any, **options: Any) -> torch.Tensor:
        return _poison(allocate(*arguments, **options))

    return allocate_poison


@pytest.fixture
def unpoisoned() -> None:
    """Asked for by tests whose tracing must see torch's own functions."""


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or garbage where it holds integers, so that an unwritten output can't pass."""
    if "unpoisoned" in request.fixturenames:
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def single_thread(threads: Callable[[int], None]) -> None:
    """For modules of many small models, on machines where other tests run beside them."""
    threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """``pool(n)``: n processes with a gloo process group, started once."""
    pools = Pools()
    yield pools
    pools.close()
