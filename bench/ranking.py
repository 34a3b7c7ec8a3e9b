"""Benchmarks of the preference losses: `pytest bench/ranking.py`, or `make bench BENCH_ARGS="-k ranking"`.

Each case measures forward and backward of pyalign and its competitors in turns; `over_x` says how many times as long x
takes. Torch has two ways to all pairs of a group: the full K x K matrix under a mask, and the pairs picked by index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import pairwise_preference_loss, ranked_preference_loss
from pyalign.benchmark import interleaved

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step(loss: Callable[[Tensor], Tensor], scores: Tensor) -> Callable[[], None]:
    """Forward and backward; the gradient is given up after each step."""

    def run() -> None:
        scores.grad = None
        loss(scores).backward()

    return run


def report(benchmark: Any, functions: dict[str, Callable[[], None]], rounds: int) -> None:
    """Times ``functions`` (the first is ours) in turns and leaves the figures in ``extra_info``."""
    ours = next(iter(functions))
    if benchmark.disabled:
        for function in functions.values():
            function()
    else:
        times = interleaved(functions, DEVICE, rounds=rounds, warmup=3)
        for name, seconds in times.items():
            benchmark.extra_info[f"{name}_us"] = seconds * 1e6
            if name != ours:
                benchmark.extra_info[f"over_{name}"] = seconds / times[ours]
    benchmark.pedantic(functions[ours], rounds=5, warmup_rounds=1)


def full_matrix(scores: Tensor, wins: Tensor) -> Tensor:
    gaps = scores[:, :, None] - scores[:, None, :]
    return (F.softplus(-gaps) * wins).sum() / wins.sum()


def picked_pairs(scores: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    return F.softplus(scores[:, losers] - scores[:, winners]).mean()


def test_all_pairs(benchmark: Any) -> None:
    groups, size = (16, 16) if benchmark.disabled else (4096, 16)
    torch.manual_seed(0)
    scores = torch.randn(groups, size, device=DEVICE, requires_grad=True)
    ranks = torch.arange(size, device=DEVICE).expand(groups, size).contiguous()
    wins = ranks[:, :, None] < ranks[:, None, :]
    winners, losers = torch.triu_indices(size, size, 1, device=DEVICE)
    functions = {
        "pyalign": step(lambda x: ranked_preference_loss(x, ranks), scores),
        "eager_full_matrix": step(lambda x: full_matrix(x, wins), scores),
        "eager_picked_pairs": step(lambda x: picked_pairs(x, winners, losers), scores),
    }
    if not benchmark.disabled:
        compiled_matrix, compiled_pairs = torch.compile(full_matrix), torch.compile(picked_pairs)
        functions["compile_full_matrix"] = step(lambda x: compiled_matrix(x, wins), scores)
        functions["compile_picked_pairs"] = step(lambda x: compiled_pairs(x, winners, losers), scores)
    report(benchmark, functions, rounds=41)


@pytest.mark.parametrize("method", ["pairwise", "plackett_luce"])
def test_one_large_group(benchmark: Any, method: str) -> None:
    """K = 4096: the K x K matrix would be 64 MB in float32, several times over in torch."""
    size = 64 if benchmark.disabled else 4096
    torch.manual_seed(0)
    scores, ranks = torch.randn(1, size, device=DEVICE, requires_grad=True), torch.randperm(size, device=DEVICE)[None]
    wins = ranks[:, :, None] < ranks[:, None, :]
    functions = {"pyalign": step(lambda x: ranked_preference_loss(x, ranks, method=method), scores)}
    if method == "pairwise":
        functions["eager_full_matrix"] = step(lambda x: full_matrix(x, wins), scores)
    report(benchmark, functions, rounds=5)


@pytest.mark.parametrize("pairs", [4096, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pairs(benchmark: Any, dtype: torch.dtype, pairs: int) -> None:
    """A few thousand pairs are mostly the overhead of calls: one Python Function against four of torch's own."""
    torch.manual_seed(0)
    rejected = torch.randn(pairs, device=DEVICE).to(dtype).requires_grad_()
    chosen = torch.randn(pairs, device=DEVICE).to(dtype).requires_grad_()

    def both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            chosen.grad = rejected.grad = None
            loss(chosen, rejected).backward()

        return run

    functions = {
        "pyalign": both(pairwise_preference_loss),
        "eager": both(lambda a, b: -F.logsigmoid(a - b).mean()),
    }
    report(benchmark, functions, rounds=301)


def test_ragged_groups(benchmark: Any) -> None:
    groups = 50 if benchmark.disabled else 10_000
    torch.manual_seed(0)
    sizes = torch.randint(2, 17, (groups,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    scores = torch.randn(int(offsets[-1]), device=DEVICE, requires_grad=True)
    ranks = torch.cat([torch.arange(int(size)) for size in sizes]).to(DEVICE)
    bounds, on_device = offsets.tolist(), offsets.to(DEVICE)

    def loop(x: Tensor) -> Tensor:
        total, count = x.new_zeros(()), 0
        for begin, end in itertools.pairwise(bounds):
            group = x[begin:end]
            gaps = group[:, None] - group
            pairs = torch.triu(torch.ones_like(gaps), 1)
            total, count = total + (F.softplus(-gaps) * pairs).sum(), count + gaps.numel()
        return total / count

    functions = {
        "pyalign": step(lambda x: ranked_preference_loss(x, ranks, on_device), scores),
        "python_loop": step(loop, scores),
    }
    report(benchmark, functions, rounds=3)
