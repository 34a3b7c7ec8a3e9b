"""Preference losses and autograd: when gradients are computed, repeated and second derivatives, tracing, threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distill_support import KERNELS, ON_GPU, Engine, every_kernel, name_of, over, quick_engine
from ranking_support import METHODS, Outcome, assert_close, evaluate, ranks, scores, truth
from torch import Tensor

import pyalign
from pyalign import (
    _ops_ranking,
    binary_discrimination_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    nn,
    orpo_loss,
    pairwise_preference_loss,
    ranked_preference_loss,
    simpo_loss,
)
from pyalign._types import PairTensors, RankOptions, RankTensors, pair_options

quick_kernel = over(tuple(engine for engine in KERNELS if not engine.slow))
PACKED = torch.tensor([0, 3, 3, 4, 11, 13, 40])


def cases(device: str) -> list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each op with each kind of upstream gradient."""
    a, b, x, y = (t.to(device) for t in (scores(40), scores(40, seed=1), scores(5, 8), scores(40)))
    order, flat, offsets, labels = (t.to(device) for t in (ranks(5, 8), ranks(40), PACKED, torch.arange(40) % 2))
    chosen: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = []
    for reduction in ("mean", "none"):
        chosen += [
            (lambda a, b, r=reduction: pairwise_preference_loss(a, b, reduction=r), (a, b)),
            (lambda a, b, r=reduction: dpo_loss(a, b, reduction=r).loss, (a, b)),
            (lambda a, r=reduction: binary_discrimination_loss(a, labels, reduction=r), (a,)),
            (lambda x, r=reduction: ranked_preference_loss(x, order, reduction=r), (x,)),
            (lambda y, r=reduction: ranked_preference_loss(y, flat, offsets, reduction=r), (y,)),
        ]
    return chosen


# ---- When gradients are computed ----


@every_kernel
@pytest.mark.smoke
def test_a_gradient_is_computed_where_it_is_needed(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, bool]] = []
    real = _ops_ranking.engine(engine.name)

    class Watched:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                calls.append((name, options.get("want_gradient", False)))
                return getattr(real, name)(*arguments, **options)

            return run

    monkeypatch.setattr(_ops_ranking, "engine", lambda name: Watched())
    with engine():
        for function, tensors in cases(engine.device):
            with torch.no_grad():
                assert not function(*(x.clone().requires_grad_() for x in tensors)).requires_grad
            assert not function(*tensors).requires_grad
            assert not any(gradient for _, gradient in calls)
            calls.clear()
            loss = function(*(x.clone().requires_grad_() for x in tensors))
            assert [gradient for _, gradient in calls] == [True]
            loss.sum().backward()
            assert [name for name, _ in calls[1:]] == ["score_gradient"]
            calls.clear()


@quick_kernel
def test_one_frozen_side_gets_no_gradient(engine: Engine):
    chosen, rejected = (scores(9, seed=i).to(engine.device) for i in (1, 2))
    with engine():
        both = evaluate(pairwise_preference_loss, chosen, rejected)
        leaf = rejected.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pairwise_preference_loss(chosen, leaf), leaf)
    assert torch.equal(gradient, both.gradients[1])


# ---- Repeated backward ----


@every_kernel
@pytest.mark.smoke
def test_two_backwards_over_a_retained_graph_are_both_right(engine: Engine):
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            loss = function(*leaves)
            upstream = scores(*loss.shape, seed=9).to(loss)
            first, second = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in range(2))
            twice = torch.autograd.grad(loss, leaves, 2 * upstream)
            for one, two, three in zip(first, second, twice, strict=True):
                assert torch.equal(one, two)
                assert one.data_ptr() != two.data_ptr()
                torch.testing.assert_close(three, 2 * one)


@every_kernel
def test_float16_gradients_of_many_pairs_do_not_flush_to_zero_before_a_scaler_can_save_them(engine: Engine):
    chosen, rejected = (scores(8, seed=i, dtype=torch.float16, scale=0.01).to(engine.device) for i in (1, 2))
    with engine():
        leaf = chosen.clone().requires_grad_()
        loss = pairwise_preference_loss(leaf, rejected, num_items=10**8)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**16, device=engine.device))
    torch.testing.assert_close(gradient.float().cpu(), torch.full((8,), -0.5 * 2**16 / 1e8), rtol=0.05, atol=0)


@quick_engine
def test_an_upstream_gradient_of_stride_0(engine: Engine):
    """What ``sum()`` sends back for "none"."""
    x, order = scores(5, 8).to(engine.device), ranks(5, 8).to(engine.device)
    with engine():
        expected = evaluate(ranked_preference_loss, x, constants=(order,), reduction="sum")
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ranked_preference_loss(leaf, order, reduction="none").sum(), leaf)
    torch.testing.assert_close(gradient, expected.gradients[0])


# ---- Second derivatives and function transforms ----


@every_kernel
@pytest.mark.smoke
def test_a_second_derivative_raises(engine: Engine):
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            gradients = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
            for gradient in gradients:
                assert gradient.requires_grad
                with pytest.raises(RuntimeError, match="no second derivative"):
                    gradient.square().sum().backward(retain_graph=True)


def test_the_reference_has_second_derivatives():
    x, order = scores(3, 4, dtype=torch.float64).requires_grad_(), ranks(3, 4)
    with pyalign.backend("reference"):
        for options in METHODS.values():
            assert torch.autograd.gradgradcheck(lambda x, o=options: ranked_preference_loss(x, order, **o), x)


@quick_kernel
def test_torch_func_grad(engine: Engine):
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            expected = torch.autograd.grad(function(*leaves).sum(), leaves)
            places = tuple(range(len(tensors)))
            gradients = torch.func.grad(lambda *x, f=function: f(*x).sum(), argnums=places)(*tensors)
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own formulas
@quick_kernel
def test_forward_mode_and_vmap_raise(engine: Engine):
    a, b = (scores(9, seed=i).to(engine.device) for i in (1, 2))
    with engine():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x: pairwise_preference_loss(x, b), (a,), (b,))
        with pytest.raises(RuntimeError, match="Batching rule not implemented for pyalign"):
            torch.func.vmap(lambda x, y: pairwise_preference_loss(x, y))(a[None], b[None])


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@quick_kernel
def test_compiles_without_a_graph_break(engine: Engine):
    weight, mask = scores(40, seed=5).abs().to(engine.device), (scores(40, seed=6) > 0).to(engine.device)
    a, b = (scores(40, seed=i).to(engine.device) for i in (1, 2))
    x, order = scores(5, 8).to(engine.device), ranks(5, 8).to(engine.device)

    def step(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        pair = pairwise_preference_loss(a * 2, b, weight=weight, mask=mask, margin=0.1)
        family = dpo_loss(a, b, a.detach(), b.detach(), loss_type="discopop")
        group = ranked_preference_loss(x, order, method="plackett_luce")
        each = ranked_preference_loss(x.flatten(), order.flatten(), torch.arange(0, 41, 8, device=x.device))
        return pair + family.loss + group + each, family.chosen_rewards

    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (a, b, x)]
        loss, rewards = function(*leaves)
        return loss.detach(), rewards, *torch.autograd.grad(loss, leaves)

    with engine():
        expected = gradients(step)
        ours = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@quick_kernel
def test_batches_of_any_size_compile(engine: Engine):
    """``dynamic=True``, with several losses in one graph."""

    def step(a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        return pairwise_preference_loss(a, b) + dpo_loss(a, b).loss + binary_discrimination_loss(a, labels)

    function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with engine():
        for count in (40, 50, 33):
            a, b = (scores(count, seed=i).to(engine.device).requires_grad_() for i in (1, 2))
            labels = torch.arange(count, device=engine.device) % 2
            ours = torch.autograd.grad(function(a, b, labels), (a, b))
            expected = torch.autograd.grad(step(a, b, labels), (a, b))
            for one, two in zip(ours, expected, strict=True):
                torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@quick_kernel
def test_ops_are_what_torch_expects_of_them(engine: Engine):
    a, b, order = scores(40).to(engine.device), scores(40, seed=1).to(engine.device), ranks(5, 8).to(engine.device)
    labels = torch.ones(40, dtype=torch.bool, device=engine.device)
    offsets, flat = PACKED.to(engine.device), ranks(40).to(engine.device)
    ops, tests = torch.ops.pyalign, ("test_schema", "test_faketensor")
    name = engine.name
    for reduction in ("mean", "none"):
        options = pair_options(reduction=reduction)
        torch.library.opcheck(
            ops.pair_loss, (a, b, *PairTensors(margin=b), *options, True, True, name), test_utils=tests
        )
        options = options._replace(form="binary")
        labelled = PairTensors(labels=labels)
        torch.library.opcheck(ops.pair_loss, (a, None, *labelled, *options, True, True, name), test_utils=tests)
        groups = RankOptions(reduction=reduction)
        dense, packed = RankTensors(order), RankTensors(flat, offsets)
        torch.library.opcheck(ops.ranked_loss, (a.view(5, 8), *dense, *groups, True, name), test_utils=tests)
        torch.library.opcheck(ops.ranked_loss, (a, *packed, *groups, False, name), test_utils=tests)
    upstream, denominator = torch.ones(6, device=engine.device), torch.ones((), device=engine.device)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (a, upstream, denominator, offsets, 0, dtype, 1, name)
        torch.library.opcheck(ops.score_gradient, arguments, test_utils=tests)
        arguments = (a, denominator, denominator, None, 1, dtype, 2, name)
        torch.library.opcheck(ops.score_gradient, arguments, test_utils=tests)


@quick_kernel
def test_a_score_that_escaped_from_torch_func(engine: Engine):
    escaped: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        escaped.append(2 * x)
        return x.sum()

    torch.func.grad(function)(scores(9).to(engine.device))
    rejected = scores(9, seed=1).to(engine.device).requires_grad_()
    with engine():
        loss = pairwise_preference_loss(escaped[0], rejected)
        loss.backward()
        with torch.no_grad():
            assert torch.equal(pairwise_preference_loss(escaped[0], rejected), loss)
    wanted = evaluate(pairwise_preference_loss, 2 * scores(9).to(engine.device), rejected.detach())
    assert rejected.grad is not None
    torch.testing.assert_close(rejected.grad, wanted.gradients[1])


@quick_kernel
def test_pairs_of_a_difference_store_one_gradient(engine: Engine):
    """The second scores' is its negative, to the bit; with centring there are two."""
    chosen, rejected = (scores(9, seed=i).to(engine.device) for i in (1, 2))
    for center, shape in ((0.0, (9,)), (0.1, (2, 9))):
        options = pair_options(center=center)
        raw = torch.ops.pyalign.pair_loss(chosen, rejected, *PairTensors(), *options, True, False, engine.name)
        assert raw[2].shape == shape
        with engine():
            both = evaluate(pairwise_preference_loss, chosen, rejected, center_coefficient=center).gradients
        assert torch.equal(both[0], -both[1]) == (center == 0)


# ---- Determinism and threads ----


def test_the_same_bits_whatever_the_number_of_threads(threads: Callable[[int], None]):
    offsets = torch.tensor([0, 1500, 1500, 1510, 2400, 2500, 4000])
    large = [scores(4000), *(scores(30000, seed=i) for i in (1, 2))]
    results: list[tuple[Outcome, ...]] = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            (
                evaluate(ranked_preference_loss, large[0], constants=(ranks(4000, most=900), offsets)),
                evaluate(
                    ranked_preference_loss, large[0], constants=(ranks(4000), offsets), method="plackett_luce"
                ),
                evaluate(pairwise_preference_loss, large[1], large[2]),
            )
        )  # fmt: skip
    for result in results[1:]:
        for one, two in zip(result, results[0], strict=True):
            assert torch.equal(one.loss, two.loss)
            assert all(torch.equal(a, b) for a, b in zip(one.gradients, two.gradients, strict=True))


def test_calls_from_several_python_threads():
    from concurrent.futures import ThreadPoolExecutor

    x, order = scores(300, 16), ranks(300, 16)
    expected = evaluate(ranked_preference_loss, x, constants=(order,))
    with ThreadPoolExecutor(4) as pool:
        for ours in pool.map(lambda _: evaluate(ranked_preference_loss, x, constants=(order,)), range(16)):
            assert torch.equal(ours.loss, expected.loss)
            assert torch.equal(ours.gradients[0], expected.gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_many_pairs(dtype: torch.dtype):
    """Several blocks of lanes, several pieces, and a ragged end."""
    a, b = (scores(20011, seed=i, dtype=dtype) for i in (1, 2))
    exact = truth(pairwise_preference_loss, a, b)
    assert_close(evaluate(pairwise_preference_loss, a, b), exact, dtype)


# ---- Modules ----


def test_modules_are_their_functions():
    a, b, x, order = -scores(9).abs(), -scores(9, seed=1).abs(), scores(3, 4), ranks(3, 4)
    labels = torch.arange(9) % 2
    pairs: list[tuple[Any, Any]] = [
        (nn.PairwisePreferenceLoss(scale=2.0, reduction="sum")(a, b, margin=0.5),
         pairwise_preference_loss(a, b, scale=2.0, reduction="sum", margin=0.5)),
        (nn.RankedPreferenceLoss(method="plackett_luce", ties="efron")(x, order),
         ranked_preference_loss(x, order, method="plackett_luce", ties="efron")),
        (nn.RankedPreferenceLoss()(x.flatten(), order.flatten(), torch.tensor([0, 5, 12])),
         ranked_preference_loss(x.flatten(), order.flatten(), torch.tensor([0, 5, 12]))),
        (nn.BinaryDiscriminationLoss(reduction="sum")(a, labels),
         binary_discrimination_loss(a, labels, reduction="sum")),
        (nn.DPOLoss(beta=0.3, loss_type="robust", label_smoothing=0.1)(a, b, b, a).loss,
         dpo_loss(a, b, b, a, beta=0.3, loss_type="robust", label_smoothing=0.1).loss),
        (nn.CPOLoss(loss_type="hinge")(a, b, chosen_nll=a).loss, cpo_loss(a, b, loss_type="hinge", chosen_nll=a).loss),
        (nn.SimPOLoss(gamma=1.0)(a, b).loss, simpo_loss(a, b, gamma=1.0).loss),
        (nn.ORPOLoss(lambda_=0.2)(a, b).loss, orpo_loss(a, b, lambda_=0.2).loss),
        (nn.KTOLoss(undesirable_weight=2.0)(a, b, labels, 0.1).loss,
         kto_loss(a, b, labels, 0.1, undesirable_weight=2.0).loss),
    ]  # fmt: skip
    for ours, expected in pairs:
        assert torch.equal(ours, expected)
    assert "gamma=1.0" in repr(nn.SimPOLoss(gamma=1.0))


def test_every_option_of_the_functions_is_one_of_the_modules_or_of_their_call():
    import inspect

    given = {"mask", "weight", "num_items", "chosen_nll", "nll_weight", "chosen_lengths", "rejected_lengths"}
    modules = {
        pairwise_preference_loss: (nn.PairwisePreferenceLoss, {"margin"}),  # (P,)
        ranked_preference_loss: (nn.RankedPreferenceLoss, set[str]()),
        binary_discrimination_loss: (nn.BinaryDiscriminationLoss, set[str]()),
        dpo_loss: (nn.DPOLoss, set[str]()),
        cpo_loss: (nn.CPOLoss, set[str]()),
        simpo_loss: (nn.SimPOLoss, set[str]()),
        orpo_loss: (nn.ORPOLoss, set[str]()),
        kto_loss: (nn.KTOLoss, set[str]()),
    }
    for function, (module, also_given) in modules.items():
        options = {x.name for x in inspect.signature(function).parameters.values() if x.kind is x.KEYWORD_ONLY}
        assert options - given - also_given == set(inspect.signature(module).parameters)


# ---- Bad arguments ----


A, B, X, R = scores(4), scores(4, seed=1), scores(2, 3), ranks(2, 3)
GRAD = scores(4).requires_grad_()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pairwise_preference_loss([1.0], B), TypeError, "chosen: got list; wanted a tensor"),
        (lambda: pairwise_preference_loss(A.long(), B), TypeError, "chosen: got torch.int64; wanted float32"),
        (lambda: pairwise_preference_loss(A[:, None], B), ValueError, r"chosen: got shape \(4, 1\); wanted one score"),
        (lambda: pairwise_preference_loss(A, B[:, None]), ValueError, r"rejected: got shape \(4, 1\); wanted \(4,\)"),
        (lambda: pairwise_preference_loss(A, B[:3]), ValueError, r"rejected: got shape \(3,\); wanted \(4,\)"),
        (lambda: pairwise_preference_loss(A, B, margin=A[:, None]), ValueError, r"margin: got shape \(4, 1\); wanted"),
        (lambda: pairwise_preference_loss(A, B, margin=torch.tensor(1.0)), ValueError, r"margin: got shape \(\)"),
        (lambda: pairwise_preference_loss(A, B, margin=A.long()), TypeError, "margin: got torch.int64"),
        (lambda: pairwise_preference_loss(A, B, margin=math.inf), ValueError, "margin: got inf; wanted a finite"),
        (lambda: pairwise_preference_loss(A, B, margin=GRAD), ValueError, "margin: .*wanted a constant"),
        (lambda: pairwise_preference_loss(A, B, weight=GRAD), ValueError, "weight: .*wanted a constant"),
        (lambda: pairwise_preference_loss(A, B, weight=A[:2]), ValueError, r"weight: got shape \(2,\)"),
        (lambda: pairwise_preference_loss(A, B, mask=A), TypeError, "mask: got torch.float32; wanted bool"),
        (lambda: pairwise_preference_loss(A, B, mask=[1]), TypeError, "mask: got list; wanted a tensor"),
        (lambda: pairwise_preference_loss(A, B.to("meta")), ValueError, "rejected: got a tensor on meta"),
        (lambda: pairwise_preference_loss(A, B, scale=0), ValueError, "scale: got 0; wanted a finite number > 0"),
        (lambda: pairwise_preference_loss(A, B, scale="1"), ValueError, "scale: got '1'; wanted a finite number > 0"),
        (lambda: pairwise_preference_loss(A, B, label_smoothing=1.0), ValueError, "label_smoothing: got 1.0; wanted 0"),
        (lambda: pairwise_preference_loss(A, B, label_smoothing=0.1, loss_type="ipo"), ValueError, "label_smoothing:.*"
         "wanted 0 with loss_type 'ipo'"),
        (lambda: pairwise_preference_loss(A, B, center_coefficient=-1), ValueError, "center_coefficient: got -1"),
        (lambda: pairwise_preference_loss(A, B, loss_type="sigmoid"), ValueError, "loss_type: got 'sigmoid'; wanted"),
        (lambda: pairwise_preference_loss(A, B, reduction="avg"), ValueError, "reduction: got 'avg'; wanted one of"),
        (lambda: pairwise_preference_loss(A, B, num_items=2, reduction="sum"), ValueError, "num_items: .*'sum'"),
        (lambda: pairwise_preference_loss(A, B, num_items=-1), ValueError, "num_items: got -1"),
        (lambda: pairwise_preference_loss(A, B, num_items=A), ValueError, r"num_items: got shape \(4,\)"),
        (lambda: ranked_preference_loss(A, R), ValueError, r"scores: got shape \(4,\); wanted \(G, K\)"),
        (lambda: ranked_preference_loss(X, R, torch.tensor([0, 6])), ValueError, r"scores: got shape \(2, 3\); wanted"),
        (lambda: ranked_preference_loss(X, R[:, :2]), ValueError, r"ranks: got shape \(2, 2\); wanted \(2, 3\)"),
        (lambda: ranked_preference_loss(X, X), TypeError, "ranks: got torch.float32; wanted an integer dtype"),
        (lambda: ranked_preference_loss(X, [[0]]), TypeError, "ranks: got list; wanted a tensor"),
        (lambda: ranked_preference_loss(A, A.long(), [0, 4]), TypeError, "group_offsets: got list; wanted a tensor"),
        (lambda: ranked_preference_loss(A, A.long(), torch.zeros(0).long()), ValueError, "group_offsets: got shape"),
        (lambda: ranked_preference_loss(A, A.long(), A), TypeError, "group_offsets: got torch.float32"),
        (lambda: ranked_preference_loss(X, R, method="listmle"), ValueError, "method: got 'listmle'"),
        (lambda: ranked_preference_loss(X, R, ties="exact"), ValueError, "ties: got 'exact'"),
        (lambda: ranked_preference_loss(X, R, ties="efron"), ValueError, "ties: got 'efron'; wanted the default"),
        (lambda: ranked_preference_loss(X, R, method="plackett_luce", margin=1.0), ValueError, "margin: got 1.0"),
        (lambda: ranked_preference_loss(X, R, method="plackett_luce", label_smoothing=0.1), ValueError,
         "label_smoothing: got 0.1"),
        (lambda: ranked_preference_loss(X, R, method="plackett_luce", group_reduction="pairs"), ValueError,
         "group_reduction: got 'pairs'; wanted one of 'groups'"),
        (lambda: ranked_preference_loss(X, R, margin=A), ValueError, "margin: got tensor"),
        (lambda: binary_discrimination_loss(A, A), TypeError, "labels: got torch.float32; wanted bool"),
        (lambda: binary_discrimination_loss(A, torch.ones(3).long()), ValueError, r"labels: got shape \(3,\)"),
        (lambda: dpo_loss(A, B, A), ValueError, "reference_rejected: got None; wanted .* both sides"),
        (lambda: dpo_loss(A, B, None, A), ValueError, "reference_chosen: got None; wanted .* both sides"),
        (lambda: dpo_loss(A, B, A, B[:2]), ValueError, r"reference_rejected: got shape \(2,\)"),
        (lambda: dpo_loss(A, B, loss_type="logistic"), ValueError, "loss_type: got 'logistic'"),
        (lambda: dpo_loss(A, B, beta=0.0), ValueError, "beta: got 0.0; wanted a finite number > 0"),
        (lambda: dpo_loss(A, B, loss_type="exo_pair"), ValueError, "label_smoothing: got 0.0; wanted 0 < label"),
        (lambda: dpo_loss(A, B, loss_type="robust", label_smoothing=0.5), ValueError, "label_smoothing: got 0.5"),
        (lambda: dpo_loss(A, B, loss_type="hinge", label_smoothing=0.1), ValueError, "label_smoothing: got 0.1"),
        (lambda: dpo_loss(A, B, discopop_tau=0.1), ValueError, "discopop_tau: got 0.1; wanted 0.05"),
        (lambda: dpo_loss(A, B, loss_type="discopop", discopop_tau=0.0), ValueError, "discopop_tau: got 0.0"),
        (lambda: dpo_loss(A, B, bco_delta=0.1), ValueError, "bco_delta: got 0.1; wanted 0.0"),
        (lambda: cpo_loss(A, B, loss_type="robust"), ValueError, "loss_type: got 'robust'"),
        (lambda: cpo_loss(A, B, nll_weight=0.5), ValueError, "nll_weight: got 0.5; wanted 1.0"),
        (lambda: cpo_loss(A, B, chosen_nll=A[:2]), ValueError, r"chosen_nll: got shape \(2,\)"),
        (lambda: simpo_loss(A, B, chosen_lengths=A[:2]), ValueError, r"chosen_lengths: got shape \(2,\)"),
        (lambda: orpo_loss(A, B, lambda_=-1.0), ValueError, "lambda_: got -1.0; wanted a finite number > 0"),
        (lambda: kto_loss(A, B, A > 0, A), ValueError, r"kl: got shape \(4,\); wanted a number or a 0-dim tensor"),
        (lambda: kto_loss(A, B, A > 0, math.nan), ValueError, "kl: got nan; wanted a finite number"),
        (lambda: kto_loss(A, B, A > 0, 0.0, desirable_weight=-1.0), ValueError, "desirable_weight: got -1.0"),
        (lambda: kto_loss(A, B[:2], A > 0, 0.0), ValueError, r"reference_logps: got shape \(2,\)"),
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
        ([0, 2], r"entry 1 is 2; wanted 4, the number of scores"),
        ([0, 6], r"entry 1 is 6; wanted 4, the number of scores"),
    ],
)
def test_offsets_that_do_not_cut_the_scores_raise(name: str, offsets: list[int], message: str):
    with pyalign.backend(name), pytest.raises(ValueError, match="group_offsets: " + message):
        ranked_preference_loss(A, A.long(), torch.tensor(offsets))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_forced_gpu_backend_refuses_float64(name: str):
    with pyalign.backend(name), pytest.raises(RuntimeError, match=f"backend '{name}', .*can't serve"):
        pairwise_preference_loss(A.double(), B.double())


# ---- Memory, graphs ----


def test_one_group_takes_memory_in_proportion_to_its_size():
    """16,384 scores make a matrix of 1 GB; the kernel keeps some hundred bytes per score."""
    import resource

    x, order = scores(1, 16384), torch.randperm(16384)[None]
    evaluate(ranked_preference_loss, x[:, :1024], constants=(order[:, :1024],))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(ranked_preference_loss, x, constants=(order,))
    evaluate(ranked_preference_loss, x, constants=(order,), method="plackett_luce")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes; bytes on macOS
    assert grown < 32 * 1024


@over(ON_GPU)
def test_a_cuda_graph_holds_the_loss_and_its_gradients(engine: Engine):
    """Nothing waits for the host, and the kernels find their workspaces as they left them, replay after replay."""
    with engine():
        for function, tensors in cases(engine.device):
            leaves = [x.clone().requires_grad_() for x in tensors]
            expected = torch.autograd.grad(function(*leaves).sum(), leaves)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                gradients = torch.autograd.grad(function(*leaves).sum(), leaves)
            for _ in range(3):
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@over(ON_GPU)
def test_scores_on_another_gpu_than_the_current_one(engine: Engine):
    given, order = scores(5, 7), ranks(5, 7)
    with engine(), torch.cuda.device(0):
        ours = ranked_preference_loss(given.to("cuda:1"), order.to("cuda:1"))
    torch.testing.assert_close(ours.cpu(), ranked_preference_loss(given, order), rtol=1e-6, atol=1e-6)
