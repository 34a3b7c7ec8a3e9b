"""Benchmarks of scoring: `pytest bench/scoring.py`, or `make bench BENCH_ARGS="-k scoring"`.

Each case measures pyalign, torch eager and torch.compile in turns with a copy, and reports the bytes that the work must
move, GB/s, and the share of the copy's bandwidth. On a CPU all of them find memory that the process already has
(`kept_memory`). What reads a handful of rows, or fits the cache, is bound by calls or arithmetic: its share says so.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalign import best_of_n, expected_win_rates, preference_metrics, reward_scores, win_probabilities
from pyalign.benchmark import copy_function, figures, interleaved, kept_memory

# torch.compile's own imports use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[], object]


def report(
    benchmark: Any,
    moved: int,
    step: Callable[[Any], Step],
    ours: Any,
    compiled: Any = None,
    *,
    rounds: int = 21,
    **others: Any,
) -> None:
    """Times ``step`` of ours, the others and torch.compile(compiled), and leaves the figures in ``extra_info``."""
    functions = {"pyalign": step(ours), **{name: step(other) for name, other in others.items()}}
    if benchmark.disabled:
        for function in functions.values():
            function()
        benchmark(functions["pyalign"])
        return
    if compiled is not None:
        functions["compile"] = step(torch.compile(compiled))
    copy, copy_bytes = copy_function(torch.empty(max(moved, 1 << 26) // 8, device=DEVICE))
    with kept_memory(max(16 * moved, 1 << 28)) if DEVICE.type == "cpu" else contextlib.nullcontext():
        times = interleaved({**functions, "copy": copy}, DEVICE, rounds=rounds, warmup=3)
        benchmark.pedantic(functions["pyalign"], rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(figures(times, moved, copy_bytes))


def forward(*inputs: Any) -> Callable[[Any], Step]:
    return lambda function: lambda: function(*inputs)


def with_backward(leaves: list[Tensor], *inputs: Any) -> Callable[[Any], Step]:
    def step(function: Any) -> Step:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            result = function(*leaves, *inputs)
            result.backward(torch.ones_like(result))

        return run

    return step


# ---- Reward heads ----


def last_of(mask: Tensor) -> Tensor:
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def gathered_head(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The rows are gathered, then multiplied."""
    rows = hidden[torch.arange(hidden.shape[0], device=hidden.device), last_of(mask)]
    return rows.float() @ weight.float()


def head_of_all_tokens(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """As transformers' classifiers do: the head over every token, of which one is kept."""
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype)[None]).squeeze(-1)
    return logits[torch.arange(hidden.shape[0], device=hidden.device), last_of(mask)].float()


def our_head(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return reward_scores(hidden, weight, mask=mask)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_reward_scores(benchmark: Any, dtype: torch.dtype, backward: bool) -> None:
    """64 sequences of up to 512 tokens. Backward's work is to write the gradient of the hidden states."""
    sequences, length, width = (2, 8, 64) if benchmark.disabled else (64, 512, 1024)
    torch.manual_seed(0)
    hidden = torch.randn(sequences, length, width, device=DEVICE).to(dtype)
    weight = torch.randn(width, device=DEVICE)
    lengths = torch.randint(1, length, (sequences, 1), device=DEVICE)
    mask = (torch.arange(length, device=DEVICE) < lengths).long()
    moved = sequences * width * hidden.element_size() + mask.numel() * mask.element_size()
    step = forward(hidden, weight, mask)
    if backward:
        moved += hidden.numel() * hidden.element_size()
        step = with_backward([hidden.requires_grad_(), weight.requires_grad_()], mask)
    report(
        benchmark, moved, step, our_head, gathered_head, eager=gathered_head, all_tokens=head_of_all_tokens
    )  # fmt: skip


# ---- Groups ----


def eager_matrix(x: Tensor) -> Tensor:
    return torch.sigmoid(x[:, :, None] - x[:, None, :])


def eager_rates(x: Tensor) -> Tensor:
    return (eager_matrix(x).sum(2) - 0.5) / (x.shape[1] - 1)


SHAPES = [pytest.param(*shape, id=f"{shape[0]}x{shape[1]}") for shape in ((4096, 16), (1024, 64), (1, 4096))]


def scores(benchmark: Any, groups: int, size: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2 if benchmark.disabled else groups, 8 if benchmark.disabled else size, device=DEVICE)


@pytest.mark.parametrize(("groups", "size"), SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_win_probabilities(benchmark: Any, groups: int, size: int, backward: bool) -> None:
    x = scores(benchmark, groups, size)
    moved = (2 if backward else 1) * x.numel() * x.shape[1] * 4  # write p; read its gradient
    step = with_backward([x.requires_grad_()]) if backward else forward(x)
    report(benchmark, moved, step, win_probabilities, eager_matrix, eager=eager_matrix)


@pytest.mark.parametrize(("groups", "size"), SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_expected_win_rates(benchmark: Any, groups: int, size: int, backward: bool) -> None:
    x = scores(benchmark, groups, size)
    moved = (4 if backward else 2) * x.numel() * 4
    step = with_backward([x.requires_grad_()]) if backward else forward(x)
    report(benchmark, moved, step, expected_win_rates, eager_rates, eager=eager_rates)


def test_best_of_ragged_groups(benchmark: Any) -> None:
    groups = 50 if benchmark.disabled else 10_000
    torch.manual_seed(0)
    sizes = torch.randint(1, 33, (groups,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    x, bounds = torch.randn(int(offsets[-1]), device=DEVICE), offsets.tolist()

    def loop(x: Tensor, offsets: Tensor) -> Tensor:
        return torch.stack([begin + x[begin:end].argmax() for begin, end in itertools.pairwise(bounds)])

    moved = 4 * x.numel() + 16 * groups
    report(benchmark, moved, forward(x, offsets.to(DEVICE)), best_of_n, rounds=5, python_loop=loop)


# ---- Metrics ----


def eager_metrics(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    """The same figures by torch's own functions, in float32."""
    z = chosen - rejected
    right = (z > 0).float() + 0.5 * (z == 0).float()
    confidence = torch.sigmoid(z.abs())
    index = ((confidence - 0.5) * 20).long().clamp(max=9)
    count, confident, correct = (
        torch.zeros(10, device=z.device).index_add(0, index, x) for x in (torch.ones_like(z), confidence, right)
    )
    ece = (confident - correct).abs().sum() / z.shape[0]
    return right.mean(), torch.nn.functional.softplus(-z).mean(), torch.sigmoid(-z).square().mean(), ece, count


@pytest.mark.parametrize("slices", [0, 20], ids=["whole", "slices"])
@pytest.mark.parametrize("pairs", [100_000, 10_000_000])
def test_preference_metrics(benchmark: Any, pairs: int, slices: int) -> None:
    pairs = 1000 if benchmark.disabled else pairs
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(pairs, device=DEVICE) for _ in range(2))
    moved = 2 * 4 * pairs
    if not slices:
        report(benchmark, moved, forward(chosen, rejected), preference_metrics, eager=eager_metrics, rounds=7)
        return
    category = torch.randint(0, slices, (pairs,), device=DEVICE)

    def per_slice(chosen: Tensor, rejected: Tensor) -> list[Any]:
        whole = eager_metrics(chosen, rejected)
        return [whole, *(eager_metrics(chosen[category == i], rejected[category == i]) for i in range(slices))]

    def ours(chosen: Tensor, rejected: Tensor) -> Any:
        return preference_metrics(chosen, rejected, category=category)

    report(benchmark, moved + 8 * pairs, forward(chosen, rejected), ours, eager=per_slice, rounds=5)
