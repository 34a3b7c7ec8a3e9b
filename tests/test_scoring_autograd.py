"""Scoring and autograd: what is computed and kept, repeated and second derivatives, tracing, threads, arguments."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distill_support import KERNELS, ON_GPU, Engine, every_kernel, over, quick_engine
from ranking_support import evaluate, scores
from scoring_support import PACKED, normal, on
from torch import Tensor

import pyalign
from pyalign import (
    _ops_scoring,
    best_of_n,
    expected_win_rates,
    preference_metrics,
    reward_scores,
    win_probabilities,
)

quick_kernel = over(tuple(engine for engine in KERNELS if not engine.slow))
OFFSETS = torch.tensor([0, 3, 3, 4, 11, 20])
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def cases(device: str) -> list[Case]:
    """Each differentiable op, dense and packed; results without NaN."""
    hidden, weight, bias = (x.to(device) for x in (normal(20, 6), normal(2, 6, seed=1), normal(2, seed=2)))
    offsets, groups, mask = OFFSETS.to(device), PACKED.to(device), MASK.to(device)
    return [
        (lambda h, w, b: reward_scores(h, w, head_bias=b, offsets=offsets).nan_to_num(), (hidden, weight, bias)),
        (
            lambda h, w, b: reward_scores(h, w, head_bias=b, mask=mask).nan_to_num(),
            (hidden.view(4, 5, 6), weight, bias),
        ),
        (lambda h, w: reward_scores(h, w), (hidden.view(4, 5, 6), weight[0])),
        (lambda x: win_probabilities(x, scale=0.7), (scores(4, 7).to(device),)),
        (lambda x: win_probabilities(x, groups), (scores(40).to(device),)),
        (lambda x: expected_win_rates(x, scale=0.7), (scores(4, 7).to(device),)),
        (lambda x: expected_win_rates(x, groups), (scores(40).to(device),)),
    ]


# ---- What is computed and kept ----


@every_kernel
@pytest.mark.smoke
def test_only_what_is_needed_is_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, tuple[Any, ...]]] = []
    real = _ops_scoring.engine(engine.name)

    class Watched:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                calls.append((name, arguments))
                return getattr(real, name)(*arguments)

            return run

    monkeypatch.setattr(_ops_scoring, "engine", lambda name: Watched())
    with engine():
        for function, tensors in cases(engine.device):
            with torch.no_grad():
                assert not function(*(x.clone().requires_grad_() for x in tensors)).requires_grad
            assert not function(*tensors).requires_grad
            calls.clear()
            result = function(*(x.clone().requires_grad_() for x in tensors))
            result.sum().backward()
            assert len(calls) == 2
            calls.clear()
        function, (hidden, weight, bias) = cases(engine.device)[0]
        for frozen in range(1, 7):
            wanted = [frozen & 1 == 0, frozen & 2 == 0, frozen & 4 == 0]
            leaves = [x.clone().requires_grad_(want) for x, want in zip((hidden, weight, bias), wanted, strict=True)]
            calls.clear()
            function(*leaves).sum().backward()
            _, (_, _, given_hidden, given_head, *_, want_bias) = calls[1]
            assert [given_head is not None, given_hidden is not None, want_bias] == wanted
            assert [x.grad is not None for x in leaves] == wanted


@quick_kernel
def test_hidden_states_are_kept_for_the_head_alone(engine: Engine):
    hidden, weight = (on(engine, x).requires_grad_() for x in (normal(20, 6), normal(2, 6, seed=1)))
    offsets = on(engine, OFFSETS)
    with engine():
        both = reward_scores(hidden, weight, offsets=offsets).grad_fn
        frozen_head = reward_scores(hidden, weight.detach(), offsets=offsets).grad_fn
        frozen_body = reward_scores(hidden.detach(), weight, offsets=offsets).grad_fn

    def kept(node: Any) -> list[tuple[int, ...]]:
        return [tuple(x.shape) for x in node.saved_tensors if x is not None]

    assert kept(both) == [(5,), (20, 6), (2, 6)]
    assert kept(frozen_head) == [(5,), (2, 6)]
    assert kept(frozen_body) == [(5,), (20, 6)]


def test_what_backward_needs_must_not_be_modified():
    weight = normal(2, 6).requires_grad_()
    hidden = normal(20, 6).requires_grad_()
    result = reward_scores(hidden, weight, offsets=OFFSETS)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), hidden)
    x = scores(4, 7).requires_grad_()
    rates = expected_win_rates(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rates.sum().backward()


# ---- Repeated backward ----


@every_kernel
@pytest.mark.smoke
def test_two_backwards_over_a_retained_graph_are_both_right(engine: Engine):
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            result = function(*leaves)
            upstream = scores(*result.shape, seed=9).to(result)
            first, second = (torch.autograd.grad(result, leaves, upstream, retain_graph=True) for _ in range(2))
            twice = torch.autograd.grad(result, leaves, 2 * upstream)
            for one, two, three in zip(first, second, twice, strict=True):
                assert torch.equal(one, two)
                torch.testing.assert_close(three, 2 * one)


@quick_engine
def test_an_upstream_gradient_of_stride_0(engine: Engine):
    """What ``sum()`` sends back, and what a transposed use does."""
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            ones = torch.autograd.grad(function(*leaves), leaves, torch.ones_like(function(*leaves)))
            summed = torch.autograd.grad(function(*leaves).sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(ones, summed, strict=True))
        x = on(engine, scores(1, 7)).requires_grad_()
        upstream = on(engine, scores(7, 7, seed=3))
        (turned,) = torch.autograd.grad(win_probabilities(x)[0].T, x, upstream)
        (straight,) = torch.autograd.grad(win_probabilities(x)[0], x, upstream.T.contiguous())
        torch.testing.assert_close(turned, straight)


class Dropped(torch.autograd.Function):
    """0, and no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        return None


def test_a_result_without_a_gradient_sends_none_back():
    for function, tensors in cases("cpu"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        total = Dropped.apply(function(*leaves)) + sum(x.sum() for x in leaves)
        for gradient in torch.autograd.grad(total, leaves):
            assert torch.equal(gradient, torch.ones_like(gradient))


# ---- Second derivatives and function transforms ----


@every_kernel
@pytest.mark.smoke
def test_a_second_derivative_raises(engine: Engine):
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            result = function(*leaves).square().sum()
            for gradient in torch.autograd.grad(result, leaves, create_graph=True):
                assert gradient.requires_grad
                with pytest.raises(RuntimeError, match="no second derivative"):
                    gradient.square().sum().backward(retain_graph=True)


def test_the_reference_has_second_derivatives():
    with pyalign.backend("reference"):
        for function, tensors in cases("cpu"):
            assert torch.autograd.gradgradcheck(function, [x.double().requires_grad_() for x in tensors])


@quick_kernel
def test_torch_func_grad(engine: Engine):
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
            places = tuple(range(len(tensors)))
            gradients = torch.func.grad(lambda *x, f=function: f(*x).square().sum(), argnums=places)(*tensors)
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own formulas
@quick_kernel
def test_forward_mode_raises_and_vmap_is_right(engine: Engine):
    x, hidden, weight = (on(engine, t) for t in (scores(4, 7), normal(4, 5, 6), normal(6)))
    with engine():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(expected_win_rates, (x,), (x,))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda w: reward_scores(hidden, w), (weight,), (weight,))
        for function in (win_probabilities, expected_win_rates, best_of_n):
            both = torch.func.vmap(function)(torch.stack([x, -x]))
            assert torch.equal(both, torch.stack([function(x), function(-x)]))


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@quick_kernel
def test_compiles_without_a_graph_break(engine: Engine):
    """Packed win probabilities excepted, whose size is data."""
    hidden, weight, bias, x, y = (
        on(engine, t) for t in (normal(20, 6), normal(2, 6, seed=1), normal(2, seed=2), scores(4, 7), scores(40))
    )
    offsets, groups, mask = (on(engine, t) for t in (OFFSETS, PACKED, MASK))

    def step(h: Tensor, w: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        packed = reward_scores(h * 2, w, head_bias=b, offsets=offsets).nan_to_num()
        padded = reward_scores(h.view(4, 5, 6), w[0], mask=mask).nan_to_num()
        wins = win_probabilities(x, scale=0.7).square().sum()
        rates = expected_win_rates(x).square().sum() + expected_win_rates(y, groups).square().sum()
        metrics = preference_metrics(x[0], x[1], bins=4)
        best = best_of_n(x), best_of_n(y, groups)
        return packed.square().sum() + padded.sum() + wins + rates, metrics.accuracy, metrics.ece, *best

    def gradients(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias, x, y)]
        loss, *rest = function(*leaves)
        return [loss.detach(), *rest, *torch.autograd.grad(loss, leaves)]

    with engine():
        expected = gradients(step)
        ours = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"))
        dynamic = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for one, two, three in zip(ours, expected, gradients(dynamic), strict=True):
            torch.testing.assert_close(one, two)
            torch.testing.assert_close(three, two)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@quick_kernel
def test_ops_are_what_torch_expects_of_them(engine: Engine):
    ops, tests, name = torch.ops.pyalign, ("test_schema", "test_faketensor"), engine.name
    hidden, weight, bias, x = (on(engine, t) for t in (normal(20, 6), normal(2, 6), normal(2), scores(40)))
    offsets, groups, mask = (on(engine, t) for t in (OFFSETS, PACKED, MASK.bool()))
    sizes = groups.diff().square()
    blocks, total = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), int(sizes.sum())

    def opcheck(op: Any, *arguments: Any) -> None:
        torch.library.opcheck(op, (*arguments, name), test_utils=tests)

    opcheck(ops.reward_scores, hidden, weight, bias, offsets, None)
    opcheck(ops.reward_scores, hidden.view(4, 5, 6).bfloat16(), weight, None, None, mask)
    upstream, last = on(engine, normal(5, 2)), on(engine, torch.tensor([2, -1, 3, 10, 19]))
    for given in ((hidden, weight, True), (None, weight, False), (hidden, None, False), (None, None, True)):
        opcheck(ops.reward_gradient, upstream, last, *given[:2], 20, torch.float32, given[2])
    opcheck(ops.reward_gradient, upstream, last, None, weight, 20, torch.bfloat16, False)
    for op in ("win_probabilities", "expected_win_rates", "best_of_n"):
        opcheck(ops.score_groups, x.view(4, 10), None, None, None, op, 0, 0.7)
        opcheck(ops.score_groups, x.bfloat16(), groups, blocks, None, op, total, 0.7)
    matrix, rates = on(engine, normal(total)), on(engine, normal(40))
    for dtype in (torch.float32, torch.float16):
        opcheck(ops.score_groups, x.to(dtype), groups, blocks, matrix, "win_probabilities_gradient", total, 1.0)
        opcheck(ops.score_groups, x.to(dtype), groups, None, rates, "expected_win_rates_gradient", 0, 1.0)
    category = on(engine, torch.arange(40) % 3)
    opcheck(ops.preference_metrics, x, x.flip(0), x, x.abs(), category > 0, category, 3, 4, 1.0, 0.0)
    opcheck(ops.preference_metrics, x, x.flip(0), None, None, None, None, 1, 10, 1.0, 0.5)


# ---- Determinism, threads, memory ----


def test_the_same_bits_whatever_the_number_of_threads(threads: Callable[[int], None]):
    """Gradients of the head and of large and small groups among them."""
    hidden, weight, bias = normal(600, 1030), normal(3, 1030, seed=1), normal(3, seed=2)
    x, offsets = scores(3000), torch.tensor([0, 7, 7, 1200, 1216, 1500, 3000])
    results: list[list[Tensor]] = []
    for count in (1, 2, 3):
        threads(count)
        outcomes = [
            evaluate(
                lambda h, w, b: reward_scores(h, w, head_bias=b, offsets=torch.arange(0, 601, 3)),
                hidden, weight, bias, upstream=normal(200, 3, seed=4),
            ),
            evaluate(expected_win_rates, x, constants=(offsets,), upstream=normal(3000, seed=4)),
            evaluate(win_probabilities, x[:1500], constants=(offsets[:6],), upstream=normal(int(
                offsets[:6].diff().square().sum()), seed=4)),
        ]  # fmt: skip
        results.append([y for outcome in outcomes for y in (outcome.loss, *outcome.gradients)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_calls_from_several_python_threads():
    from concurrent.futures import ThreadPoolExecutor

    hidden, weight = normal(64, 2000), normal(2, 2000, seed=1)
    offsets = torch.arange(0, 65, 4)
    expected = evaluate(reward_scores, hidden, weight, offsets=offsets)
    with ThreadPoolExecutor(4) as pool:
        for ours in pool.map(lambda _: evaluate(reward_scores, hidden, weight, offsets=offsets), range(16)):
            assert torch.equal(ours.loss, expected.loss)
            assert all(torch.equal(a, b) for a, b in zip(ours.gradients, expected.gradients, strict=True))


def test_rates_take_memory_in_proportion_to_the_group():
    """16,384 scores make a matrix of 1 GB."""
    x = scores(1, 16384)
    evaluate(expected_win_rates, x[:, :512])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(expected_win_rates, x, upstream=normal(1, 16384))
    best_of_n(x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes; bytes on macOS
    assert grown < 16 * 1024


def test_scores_of_a_batch_take_no_memory_of_its_size():
    """512 MB of hidden states, if they weren't one row over and over: no copy of them is made."""
    hidden, weight = torch.zeros(1024, dtype=torch.bfloat16).expand(64, 4096, 1024), normal(1024)
    mask = torch.ones(64, 4096, dtype=torch.bool)
    reward_scores(hidden[:, :8], weight, mask=mask[:, :8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reward_scores(hidden, weight, mask=mask).shape == (64,)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 16 * 1024


@over(ON_GPU)
def test_a_cuda_graph_holds_results_and_gradients(engine: Engine):
    with engine():
        for place, (function, tensors) in enumerate(cases(engine.device)):
            if place == 4:  # packed win probabilities, whose size is read on the host
                continue
            leaves = [x.clone().requires_grad_() for x in tensors]
            expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                gradients = torch.autograd.grad(function(*leaves).square().sum(), leaves)
            for _ in range(3):
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


# ---- Arguments ----

H, W, X, A = normal(4, 5, 6), normal(6), scores(2, 3), scores(4)
GRAD_FREE = MASK.float()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reward_scores([1.0], W), TypeError, "hidden: got list; wanted a tensor"),
        (lambda: reward_scores(H.long(), W), TypeError, "hidden: got torch.int64; wanted float32"),
        (lambda: reward_scores(H[0, 0], W), ValueError, "hidden: got 1 dimensions; wanted at least 2"),
        (lambda: reward_scores(H[0], W), ValueError, r"hidden: got shape \(5, 6\); wanted \(B, S, H\), or \(T, H\) wi"),
        (lambda: reward_scores(H, W, offsets=OFFSETS), ValueError, r"hidden: got shape \(4, 5, 6\); wanted \(T, H\),"),
        (lambda: reward_scores(H, W[:5]), ValueError, r"head_weight: got shape \(5,\); wanted \(6,\), as long as hidd"),
        (lambda: reward_scores(H, H), ValueError, r"head_weight: got shape \(4, 5, 6\); wanted \(6,\)"),
        (lambda: reward_scores(H, W.new_zeros(0, 6)), ValueError, r"head_weight: got shape \(0, 6\)"),
        (lambda: reward_scores(H, W.long()), TypeError, "head_weight: got torch.int64"),
        (lambda: reward_scores(H, W.double()), TypeError, "head_weight: got torch.float64; wanted a narrower dtype"),
        (lambda: reward_scores(H, W.to("meta")), ValueError, "head_weight: got a tensor on meta; wanted one on cpu"),
        (lambda: reward_scores(H, W, head_bias=W), ValueError, r"head_bias: got shape \(6,\); wanted \(\), one per he"),
        (lambda: reward_scores(H, W[None], head_bias=W[0]), ValueError, r"head_bias: got shape \(\); wanted \(1,\)"),
        (lambda: reward_scores(H, W, head_bias=0.5), TypeError, "head_bias: got float; wanted a tensor"),
        (lambda: reward_scores(H, W, mask=MASK[:3]), ValueError, r"mask: got shape \(3, 5\); wanted \(4, 5\)"),
        (lambda: reward_scores(H, W, mask=GRAD_FREE), TypeError, "mask: got torch.float32; wanted bool or an integer"),
        (lambda: reward_scores(H, W, mask=[[1]]), TypeError, "mask: got list; wanted a tensor"),
        (lambda: reward_scores(H, W, mask=MASK.to("meta")), ValueError, "mask: got a tensor on meta; wanted one on cp"),
        (lambda: reward_scores(H[0], W, offsets=OFFSETS, mask=MASK), ValueError, "mask: got a tensor; wanted None, be"),
        (lambda: reward_scores(H[0], W, offsets=[0, 5]), TypeError, "offsets: got list; wanted a tensor"),
        (lambda: reward_scores(H[0], W, offsets=torch.tensor([0.0, 5])), TypeError, "offsets: got torch.float32"),
        (lambda: reward_scores(H[0], W, offsets=OFFSETS.to("meta")), ValueError, "offsets: .*, where the hidden"),
        (lambda: reward_scores(H[0], W, offsets=MASK), ValueError, r"offsets: got shape \(4, 5\); wanted \(B \+ 1,\)"),
        (lambda: reward_scores(H[0], W, offsets=OFFSETS[:0]), ValueError, r"offsets: got shape \(0,\); wanted"),
        (lambda: win_probabilities([1.0]), TypeError, "scores: got list; wanted a tensor"),
        (lambda: win_probabilities(A), ValueError, r"scores: got shape \(4,\); wanted \(G, K\), or \(N,\) with"),
        (lambda: win_probabilities(X, torch.tensor([0, 6])), ValueError, r"scores: got shape \(2, 3\); wanted \(N,\),"),
        (lambda: win_probabilities(X.long()), TypeError, "scores: got torch.int64; wanted float32"),
        (lambda: win_probabilities(X, scale=0), ValueError, "scale: got 0; wanted a finite number > 0"),
        (lambda: expected_win_rates(X, scale=math.inf), ValueError, "scale: got inf; wanted a finite number > 0"),
        (lambda: expected_win_rates(A, [0, 4]), TypeError, "group_offsets: got list; wanted a tensor"),
        (lambda: expected_win_rates(A, A), TypeError, "group_offsets: got torch.float32; wanted an integer dtype"),
        (lambda: best_of_n(A, X.long()), ValueError, r"group_offsets: got shape \(2, 3\); wanted \(G \+ 1,\)"),
        (lambda: best_of_n(A, torch.tensor([0, 4], device="meta")), ValueError, "group_offsets: got a tensor on meta"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match="^" + message):
        call()


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4], "entry 0 is 1; wanted 0"),
        ([0, 3, 2, 4], "entry 2 is 2; wanted no less than the one before it, 3"),
        ([0, 2], "entry 1 is 2; wanted 4, the number of "),
        ([0, 6], "entry 1 is 6; wanted 4, the number of "),
    ],
)
def test_offsets_that_do_not_cut_raise(name: str, offsets: list[int], message: str):
    cut = torch.tensor(offsets)
    with pyalign.backend(name):
        for function in (win_probabilities, expected_win_rates, best_of_n):
            with pytest.raises(ValueError, match="^group_offsets: " + message):
                function(A, cut)
        with pytest.raises(ValueError, match="^offsets: " + message):
            reward_scores(H[0, :4], W, offsets=cut)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_forced_gpu_backend_refuses_float64(name: str):
    calls: list[Callable[[], Any]] = [
        lambda: reward_scores(H.double(), W),
        lambda: expected_win_rates(X.double()),
        lambda: best_of_n(X.double()),
        lambda: preference_metrics(A.double(), A),
    ]
    for call in calls:
        with pyalign.backend(name), pytest.raises(RuntimeError, match=f"backend '{name}', .*can't serve"):
            call()
