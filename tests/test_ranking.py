"""Preference losses: golden values, every backend against float64, groups of any shape, edges."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from distill_support import DTYPES, ENGINES, Engine, every_engine, name_of, over, quick_engine
from ranking_support import (
    DPO_LOSSES,
    METHODS,
    PAIRWISE,
    Outcome,
    assert_close,
    evaluate,
    naive_pairs,
    naive_plackett_luce,
    ranks,
    scores,
    trl_dpo,
    truth,
)
from torch import Tensor

import pyalign
from pyalign import (
    binary_discrimination_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    pairwise_preference_loss,
    ranked_preference_loss,
    simpo_loss,
)
from pyalign.ranking import binarised_pairs, discrimination_pairs, margin_metrics, pairs_of_ranks

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
float64_engine = over(tuple(engine for engine in ENGINES if engine.serves(torch.float64)))
every_dpo = pytest.mark.parametrize("loss_type", DPO_LOSSES)
every_pairwise = pytest.mark.parametrize("loss_type", PAIRWISE)
every_method = pytest.mark.parametrize("method", METHODS)
PACKED = torch.tensor([0, 3, 3, 4, 11, 13, 40])


def on(engine: Engine, x: Any) -> Any:
    if isinstance(x, dict):
        return {key: on(engine, value) for key, value in x.items()}
    return x.to(engine.device) if isinstance(x, Tensor) else x


def check(engine: Engine, function: Callable[..., Any], dtype: torch.dtype, *tensors: Tensor, **options: Any) -> None:
    """Loss and gradients of this engine against float64 in plain torch."""
    exact = truth(function, *tensors, **options)
    constants = tuple(on(engine, x) for x in options.pop("constants", ()))
    with engine():
        ours = evaluate(function, *(on(engine, x) for x in tensors), constants=constants, **on(engine, options))
    ours = Outcome(ours.loss.cpu(), tuple(x.cpu() for x in ours.gradients))
    assert_close(ours, exact, dtype)


# ---- Golden values ----


@float64_engine
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("difference", "value"),
    [
        (0.0, 0.6931471805599453),
        (1.0, 0.31326168751822286),
        (-1.0, 1.3132616875182228),
        (5.0, 0.006715348489118068),
        (20.0, 2.061153620314381e-09),
        (-20.0, 20.000000002061153),
    ],
)
def test_equation_3_1(engine: Engine, difference: float, value: float):
    with engine():
        for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 3e-7)):
            chosen = torch.tensor([difference], dtype=dtype)
            loss = pairwise_preference_loss(chosen, torch.zeros(1, dtype=dtype))
            assert float(loss) == pytest.approx(value, rel=tolerance)


@every_engine
@pytest.mark.smoke
def test_golden_ranking(engine: Engine):
    x, order = on(engine, torch.tensor([[2.0, 1.0, 0.0, -1.0]])), on(engine, torch.tensor([[0, 1, 2, 3]]))
    with engine():
        listwise = ranked_preference_loss(x, order, method="plackett_luce")
        assert float(listwise) == pytest.approx(1.1610573505237984, rel=3e-7)
        assert float(ranked_preference_loss(x, order)) == pytest.approx(0.2070380727023926, rel=3e-7)


# ---- Every backend against float64 ----


@every_engine
@every_dtype
@every_dpo
@pytest.mark.smoke
def test_dpo_losses(engine: Engine, dtype: torch.dtype, loss_type: str):
    if not engine.serves(dtype) or (engine.slow and dtype == torch.float16):
        return
    tensors = [scores(70, seed=i, dtype=dtype) for i in range(4)]
    options = {"loss_type": loss_type, "beta": 0.4, **DPO_LOSSES[loss_type]}
    check(engine, dpo_loss, dtype, *tensors[:2], constants=tuple(tensors[2:]), **options)


@every_engine
@every_pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pairwise_with_every_option(engine: Engine, loss_type: str, reduction: str):
    options: dict[str, Any] = {
        "margin": scores(70, seed=3).abs(),
        "weight": scores(70, seed=4).abs(),
        "mask": scores(70, seed=5) > -1,
        "center_coefficient": 0.05,
        "scale": 0.8,
        "reduction": reduction,
        **PAIRWISE[loss_type],
    }
    if reduction == "none":
        options["upstream"] = scores(70, seed=6)
    if reduction == "mean":
        options["num_items"] = torch.tensor(33)
    check(
        engine, pairwise_preference_loss, torch.float32, scores(70, seed=1), scores(70, seed=2),
        loss_type=loss_type, **options,
    )  # fmt: skip


@every_engine
@every_dtype
@every_method
@pytest.mark.smoke
def test_dense_groups(engine: Engine, dtype: torch.dtype, method: str):
    if engine.serves(dtype):
        check(
            engine, ranked_preference_loss, dtype, scores(7, 9, dtype=dtype), constants=(ranks(7, 9),),
            **METHODS[method],
        )  # fmt: skip


@every_engine
@every_method
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_packed_groups(engine: Engine, method: str, reduction: str):
    """Sizes 3, 0, 1, 7, 2 and 27."""
    options: dict[str, Any] = {**METHODS[method], "reduction": reduction}
    if reduction == "none":
        options["upstream"] = scores(6, seed=3)
    check(
        engine, ranked_preference_loss, torch.float32, scores(40), constants=(ranks(40), PACKED), **options
    )  # fmt: skip


@every_engine
@pytest.mark.parametrize("labels", [torch.arange(70) % 3, torch.arange(70) % 2 == 0], ids=["integers", "bool"])
def test_labelled_scores(engine: Engine, labels: Tensor):
    check(
        engine, binary_discrimination_loss, torch.float32, scores(70), constants=(labels,), mask=scores(70, seed=1) > 0
    )  # fmt: skip
    check(
        engine, kto_loss, torch.float32, scores(70), constants=(scores(70, seed=1), labels, torch.tensor(0.3)),
        desirable_weight=1.5, undesirable_weight=0.5, reduction="sum",
    )  # fmt: skip
    exact = F.binary_cross_entropy_with_logits(scores(70), (labels != 0).float())
    with engine():
        ours = binary_discrimination_loss(on(engine, scores(70)), on(engine, labels))
    torch.testing.assert_close(ours.cpu(), exact)


@every_engine
def test_reference_free_losses(engine: Engine):
    """ORPO, SimPO and CPO with their NLL and length terms."""
    chosen, rejected, nll = -scores(40, seed=1).abs() - 0.01, -scores(40, seed=2).abs() - 0.01, scores(40, seed=3).abs()
    lengths, mask = torch.arange(1, 41), torch.arange(40) % 4 != 0
    for function, options in (
        (orpo_loss, {"lambda_": 0.3}),
        (simpo_loss, {"gamma": 0.7}),
        (simpo_loss, {"loss_type": "hinge"}),
        (cpo_loss, {"label_smoothing": 0.1}),
        (cpo_loss, {"loss_type": "ipo"}),
    ):
        check(engine, function, torch.float32, chosen, rejected, mask=mask, **options)
        check(engine, function, torch.float32, chosen, rejected, chosen_nll=nll, nll_weight=0.5, mask=mask, **options)
    for function in (orpo_loss, simpo_loss):
        with engine():
            a, b, n = on(engine, chosen), on(engine, rejected), on(engine, lengths)
            by_length = function(a * n, b * n, chosen_lengths=n, rejected_lengths=n).loss
            torch.testing.assert_close(by_length, function(a, b).loss)


# ---- Gradients by finite differences ----


@float64_engine
@every_dpo
def test_dpo_gradient_by_finite_differences(engine: Engine, loss_type: str):
    tensors = [scores(6, seed=i, dtype=torch.float64) for i in range(4)]
    with engine():
        assert torch.autograd.gradcheck(
            lambda a, b: dpo_loss(a, b, *tensors[2:], loss_type=loss_type, beta=0.5, **DPO_LOSSES[loss_type]).loss,
            [x.requires_grad_() for x in tensors[:2]],
        )


@float64_engine
@every_method
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ranked_gradient_by_finite_differences(engine: Engine, method: str, reduction: str):
    with engine():
        for order, offsets, shape in ((ranks(3, 5), None, (3, 5)), (ranks(40), PACKED, (40,))):
            assert torch.autograd.gradcheck(
                lambda x, order=order, offsets=offsets: ranked_preference_loss(
                    x, order, offsets, reduction=reduction, **METHODS[method]
                ),
                scores(*shape, dtype=torch.float64).requires_grad_(),
            )


@float64_engine
def test_other_gradients_by_finite_differences(engine: Engine):
    x, y = (-scores(6, seed=i, dtype=torch.float64).abs() - 0.1 for i in (1, 2))
    labels, nll = torch.tensor([1, 0, 1, 1, 0, 0]), scores(6, seed=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, nll)]
    with engine():
        for function in (orpo_loss, simpo_loss, cpo_loss):
            assert torch.autograd.gradcheck(lambda a, b, n, f=function: f(a, b, chosen_nll=n).loss, leaves)
        assert torch.autograd.gradcheck(lambda a: binary_discrimination_loss(a, labels), leaves[:1])
        assert torch.autograd.gradcheck(lambda a: kto_loss(a, None, labels, 0.2).loss, leaves[:1])
        for loss_type, options in PAIRWISE.items():
            assert torch.autograd.gradcheck(
                lambda a, b, loss_type=loss_type, options=options: pairwise_preference_loss(
                    a, b, loss_type=loss_type, margin=0.1, center_coefficient=0.2, weight=nll.detach(), **options
                ),
                leaves[:2],
            )


# ---- Accuracy beside torch's ----


@quick_engine
@every_method
@pytest.mark.parametrize("shape", [(64, 16), (8, 64), (3, 300), (1, 1000)], ids=name_of)
def test_errors_are_no_larger_than_torchs_in_float32(engine: Engine, method: str, shape: tuple[int, int]):
    """Relative to the loss and to the largest gradient, and up to two roundings."""
    x, order = scores(*shape, scale=4.0), ranks(*shape, most=shape[1] // 2)
    exact = truth(ranked_preference_loss, x, constants=(order,), **METHODS[method])
    with pyalign.backend("reference"):
        theirs = evaluate(ranked_preference_loss, x, constants=(order,), **METHODS[method])
    with engine():
        ours = evaluate(ranked_preference_loss, on(engine, x), constants=(on(engine, order),), **METHODS[method])

    def errors(outcome: Outcome) -> tuple[float, float]:
        loss, (gradient,) = outcome.loss.cpu().double(), outcome.gradients
        worst = (gradient.cpu().double() - exact.gradients[0]).abs().max() / exact.gradients[0].abs().max()
        return float((loss - exact.loss).abs() / exact.loss), float(worst)

    for mine, torchs in zip(errors(ours), errors(theirs), strict=True):
        assert mine <= torchs + 2.0**-23


# ---- Groups ----


@every_engine
def test_two_entries_are_a_pair_listwise_and_pairwise(engine: Engine):
    x = on(engine, scores(50, 2))
    order = on(engine, torch.tensor([[0, 1]]).expand(50, 2))
    with engine():
        pair = evaluate(pairwise_preference_loss, x[:, 0], x[:, 1])
        for options in ({}, {"method": "plackett_luce"}, {"method": "plackett_luce", "ties": "efron"}):
            group = evaluate(ranked_preference_loss, x, constants=(order,), **options)
            torch.testing.assert_close(group.loss, pair.loss)
            torch.testing.assert_close(group.gradients[0], torch.stack(pair.gradients, 1))


@quick_engine
@every_method
def test_order_does_not_matter(engine: Engine, method: str):
    """Neither that of the groups nor that of the entries within one."""
    x, order = scores(12, 7, dtype=torch.float64), ranks(12, 7)
    by_group, by_entry = torch.randperm(12), torch.argsort(torch.rand(12, 7), 1)
    if not engine.serves(torch.float64):
        x = x.float()
    with engine():
        one = evaluate(ranked_preference_loss, x, constants=(order,), **METHODS[method])
        two = evaluate(ranked_preference_loss, x[by_group], constants=(order[by_group],), **METHODS[method])
        three = evaluate(
            ranked_preference_loss, x.gather(1, by_entry), constants=(order.gather(1, by_entry),), **METHODS[method]
        )
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(two.gradients[0], one.gradients[0][by_group])
    torch.testing.assert_close(three.loss, one.loss)
    torch.testing.assert_close(three.gradients[0], one.gradients[0].gather(1, by_entry))


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    sizes = draw(st.lists(st.integers(0, 9), min_size=0, max_size=6))
    count = sum(sizes)
    values = draw(st.lists(st.floats(-30, 30), min_size=count, max_size=count))
    order = draw(st.lists(st.integers(-1, 4), min_size=count, max_size=count))
    offsets = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(order, dtype=torch.int64), offsets


@pytest.mark.parametrize("name", ["cpu", "reference"])
@hypothesis.given(case=ragged(), margin=st.floats(0, 2), scale=st.floats(0.1, 3))
def test_ragged_groups_against_a_loop_over_pairs(
    name: str, case: tuple[Tensor, Tensor, Tensor], margin: float, scale: float
):
    """Over all pairs, and by Open-Assistant's convention: the mean of a group, then over groups."""
    x, order, offsets = case
    with pyalign.backend(name):
        for reduction in ("pairs", "groups"):
            ours = evaluate(
                ranked_preference_loss, x, constants=(order, offsets), margin=margin, scale=scale,
                group_reduction=reduction,
            )  # fmt: skip
            leaf = x.clone().requires_grad_()
            groups = naive_pairs(leaf, order, offsets, margin, scale)
            if reduction == "pairs":
                expected = sum((t for t, _ in groups), leaf.sum() * 0) / max(sum(n for _, n in groups), 1)
            else:
                means = [t / n for t, n in groups if n]
                expected = sum(means, leaf.sum() * 0) / max(len(means), 1)
            torch.testing.assert_close(ours.loss, expected.detach(), rtol=1e-9, atol=1e-12)
            (gradient,) = torch.autograd.grad(expected, leaf)
            torch.testing.assert_close(ours.gradients[0], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("ties", ["breslow", "efron"])
@hypothesis.given(case=ragged())
def test_ragged_plackett_luce_against_its_stages(name: str, ties: str, case: tuple[Tensor, Tensor, Tensor]):
    x, order, offsets = case
    with pyalign.backend(name):
        ours = ranked_preference_loss(x, order, offsets, method="plackett_luce", ties=ties, reduction="none")
    expected = [naive_plackett_luce(x[a:b], order[a:b], ties) for a, b in itertools.pairwise(offsets)]
    torch.testing.assert_close(ours, torch.stack(expected) if expected else x.new_zeros(0), rtol=1e-7, atol=1e-7)


@quick_engine
def test_packed_and_dense_are_the_same(engine: Engine):
    x, order = on(engine, scores(6, 5)), on(engine, ranks(6, 5))
    offsets = on(engine, torch.arange(0, 31, 5))
    with engine():
        for options in METHODS.values():
            dense = evaluate(ranked_preference_loss, x, constants=(order,), **options)
            packed = evaluate(ranked_preference_loss, x.flatten(), constants=(order.flatten(), offsets), **options)
            torch.testing.assert_close(packed.loss, dense.loss)
            torch.testing.assert_close(packed.gradients[0].view(6, 5), dense.gradients[0])


@pytest.mark.parametrize("size", [767, 1500, 4096])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "margin": 0.001, "group_reduction": "groups"}])
def test_large_groups(size: int, options: dict[str, Any]):
    """Shared by threads from 768 on; compared with torch a row of pairs at a time."""
    x, order = scores(1, size), torch.randperm(size)[None] // 2
    ours = evaluate(ranked_preference_loss, x, constants=(order,), **options)
    leaf = x[0].double().requires_grad_()
    e, margin, total, pairs = options.get("label_smoothing", 0.0), options.get("margin", 0.0), leaf.sum() * 0, 0
    for begin in range(0, size, 512):
        rows, row_ranks = leaf[begin : begin + 512, None], order[0][begin : begin + 512, None]
        z = rows - leaf - margin * (order[0] - row_ranks)
        wins = row_ranks < order[0]
        total = total - (((1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) * wins).sum()
        pairs += int(wins.sum())
    expected = total / pairs
    torch.testing.assert_close(ours.loss.double(), expected.detach(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(ours.gradients[0][0].double(), gradient, rtol=1e-5, atol=1e-6 * float(gradient.max()))


def test_a_large_group_listwise():
    x, order = scores(1, 4096), torch.randperm(4096)[None]
    leaf = x[0].double().requires_grad_()
    descending = leaf[order[0].argsort()]
    expected = (torch.logcumsumexp(descending.flip(0), 0).flip(0) - descending).sum()
    ours = evaluate(ranked_preference_loss, x, constants=(order,), method="plackett_luce")
    torch.testing.assert_close(ours.loss.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours.gradients[0][0].double(), torch.autograd.grad(expected, leaf)[0], rtol=1e-5, atol=1e-6
    )


# ---- Edges ----


@every_engine
@pytest.mark.smoke
def test_nothing_to_compare_is_a_differentiable_zero(engine: Engine):
    empty, offsets = torch.zeros(0), torch.tensor([0])
    cases: list[tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]] = [
        (pairwise_preference_loss, (empty, empty), (), {}),
        (pairwise_preference_loss, (scores(4), scores(4)), (), {"mask": torch.zeros(4, dtype=torch.bool)}),
        (pairwise_preference_loss, (scores(4), scores(4)), (), {"num_items": 0}),
        (binary_discrimination_loss, (scores(4),), (torch.ones(4),), {"mask": torch.zeros(4, dtype=torch.int64)}),
        (dpo_loss, (scores(4), scores(4)), (), {"mask": torch.zeros(4, dtype=torch.bool)}),
    ]
    cases[3] = (*cases[3][:2], (torch.ones(4, dtype=torch.int64),), cases[3][3])
    for options in METHODS.values():
        for x, order in (
            (torch.zeros(0, 5), torch.zeros(0, 5)),  # no group
            (torch.zeros(3, 0), torch.zeros(3, 0)),  # groups of nothing
            (scores(3, 1), torch.zeros(3, 1)),  # of one entry
            (scores(3, 4), torch.zeros(3, 4)),  # all tied
            (scores(3, 4), torch.tensor([-1, -1, 0, -1]).expand(3, 4)),
        ):
            cases.append((ranked_preference_loss, (x,), (order.long(),), options))
        cases.append((ranked_preference_loss, (empty,), (empty.long(), offsets), options))
        cases.append((ranked_preference_loss, (empty,), (empty.long(), torch.tensor([0, 0, 0])), options))
    with engine():
        for function, tensors, constants, options in cases:
            ours = evaluate(
                function, *(on(engine, x) for x in tensors), constants=tuple(on(engine, x) for x in constants),
                **on(engine, options),
            )  # fmt: skip
            assert float(ours.loss) == 0
            assert all(not gradient.any() for gradient in ours.gradients)


@every_engine
@pytest.mark.smoke
def test_groups_without_a_pair_leave_the_denominator(engine: Engine):
    x, order = scores(3, 3), torch.tensor([[0, 1, 2], [1, 1, 1], [-1, 0, -1]])
    with engine():
        for options in METHODS.values():
            whole = evaluate(ranked_preference_loss, on(engine, x), constants=(on(engine, order),), **options)
            alone = evaluate(ranked_preference_loss, on(engine, x[:1]), constants=(on(engine, order[:1]),), **options)
            torch.testing.assert_close(whole.loss, alone.loss)
            torch.testing.assert_close(whole.gradients[0][:1], alone.gradients[0])
            assert not whole.gradients[0][1:].any()


@quick_engine
@every_dpo
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_extremes_are_what_float64_says(engine: Engine, loss_type: str, dtype: torch.dtype):
    """Margins of +-1e3 and saturated probabilities, where peers give NaN."""
    if not engine.serves(dtype):
        return
    levels = torch.tensor([-1000.0, -80.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 80.0, 1000.0], dtype=torch.float64)
    chosen, rejected = torch.cartesian_prod(levels, levels).unbind(1)
    options = {"loss_type": loss_type, "beta": 1.0, "reduction": "none", **DPO_LOSSES[loss_type]}
    exact = truth(dpo_loss, chosen, rejected, **options)
    with engine():
        ours = evaluate(dpo_loss, on(engine, chosen.to(dtype)), on(engine, rejected.to(dtype)), **options)
    assert bool(ours.loss.isfinite().all())
    slack = 8 if dtype == torch.float32 else 64  # the inputs themselves are rounded
    assert_close(Outcome(ours.loss.cpu(), tuple(x.cpu() for x in ours.gradients)), exact, dtype, slack)


@every_engine
def test_certain_log_probs_have_finite_odds(engine: Engine):
    """p -> 1: 1 - e^x underflows, and its quotient with the sigmoid must not be 0 / 0."""
    levels = torch.tensor([-1000.0, -30.0, -1.0, -1e-4, -1e-7, -1e-30, 0.0])
    chosen, rejected = torch.cartesian_prod(levels, levels).unbind(1)
    check(engine, orpo_loss, torch.float32, chosen, rejected, lambda_=1.0, reduction="sum")
    with engine():
        ours = evaluate(orpo_loss, on(engine, chosen), on(engine, rejected))
    assert all(bool(x.isfinite().all()) for x in (ours.loss, *ours.gradients))


@every_engine
def test_losses_near_convergence_keep_their_digits(engine: Engine):
    """1e-9 per pair: 1 + e^-z would round to 1."""
    x = torch.tensor([[20.0, 0.0, -21.0, -60.0]]).repeat(3, 1)
    order = torch.arange(4).expand(3, 4)
    for options in ({}, {"group_reduction": "groups"}):
        exact = truth(ranked_preference_loss, x, constants=(order,), **options)
        with engine():
            ours = evaluate(ranked_preference_loss, on(engine, x), constants=(on(engine, order),), **options)
        assert float(ours.loss) == pytest.approx(float(exact.loss), rel=1e-5)
        torch.testing.assert_close(ours.gradients[0].cpu().double(), exact.gradients[0], rtol=1e-4, atol=1e-30)
    with engine():
        exo = dpo_loss(
            on(engine, torch.tensor([math.log(9)])), on(engine, torch.zeros(1)), beta=1.0, loss_type="exo_pair",
            label_smoothing=0.1,
        ).loss  # fmt: skip
    assert 0 <= float(exo) < 1e-12 or engine.name == "reference"


@every_engine
def test_infinite_and_missing_numbers(engine: Engine):
    """NaN stays with its pair or group; a chosen -inf costs +inf, a rejected one nothing."""
    inf, nan = math.inf, math.nan
    chosen, rejected = torch.tensor([-inf, 1.0, nan, 2.0, -inf]), torch.tensor([0.0, -inf, 0.0, 1.0, -inf])
    with engine():
        ours = evaluate(pairwise_preference_loss, on(engine, chosen), on(engine, rejected), reduction="none")
        loss = ours.loss.cpu().tolist()
        assert loss[0] == inf
        assert loss[1] == 0
        assert loss[3] == pytest.approx(0.3132617)
        assert math.isnan(loss[2])
        assert math.isnan(loss[4])
        assert ours.gradients[0].isnan().cpu().tolist() == [False, False, True, False, True]
        for options in METHODS.values():
            x = on(engine, torch.tensor([[1.0, 0.0, 2.0], [nan, 0.0, 1.0], [1.0, -inf, 2.0], [0.0, nan, 1.0]]))
            order = on(engine, torch.tensor([[0, 1, 2], [0, 1, 2], [1, 2, 0], [0, -1, 1]]))
            groups = evaluate(ranked_preference_loss, x, constants=(order,), reduction="none", **options)
            bad = groups.loss.isnan().cpu().tolist()
            assert bad[0] is False
            assert bad[1] is True
            assert bad[3] is False  # the score of an absent entry is not read
            assert groups.gradients[0].isnan().any(1).cpu().tolist()[::3] == [False, False]
            if not options.get("label_smoothing"):
                assert bad[2] is False  # what is last may be impossible


@every_engine
@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_infinite_scores_of_stages(engine: Engine, size: int, ties: str):
    """Plackett-Luce: what is last may be impossible, with a gradient of 0; +inf makes the whole group NaN."""
    x, order = scores(4, size), torch.arange(size).expand(4, size).contiguous()
    x[1, size - 1], x[2, size // 2], x[3, 0] = -math.inf, math.inf, math.inf
    with engine():
        ours = evaluate(
            ranked_preference_loss, on(engine, x), constants=(on(engine, order),), method="plackett_luce", ties=ties,
            reduction="none",
        )  # fmt: skip
    assert ours.loss.isnan().cpu().tolist() == [False, False, True, True]
    assert ours.gradients[0].isnan().sum(1).cpu().tolist() == [0, 0, size, size]
    assert ours.gradients[0][1, size - 1] == 0


@every_engine
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_group_that_is_nan_leaves_the_gradients_of_the_others(engine: Engine, reduction: str):
    x, order = scores(40), ranks(40)
    spoiled = x.clone()
    spoiled[5] = math.nan
    order[4:11] = torch.arange(7)
    for options in METHODS.values():
        with engine():
            clean, ours = (
                evaluate(
                    ranked_preference_loss, on(engine, y), constants=(on(engine, order), on(engine, PACKED)),
                    reduction=reduction, **options,
                ).gradients[0].cpu()
                for y in (x, spoiled)
            )  # fmt: skip
        torch.testing.assert_close(ours[:4], clean[:4])
        torch.testing.assert_close(ours[11:], clean[11:])


@over(tuple(engine for engine in ENGINES if engine.name in ("triton", "cuda")))
@pytest.mark.parametrize("offsets", [[1, 4], [0, 3, 2, 4], [0, 2], [0, 6], [0, 6, 4], [-1, 4]])
def test_on_a_gpu_offsets_that_do_not_cut_the_scores_give_nan(engine: Engine, offsets: list[int]):
    constants = on(engine, torch.arange(4)), on(engine, torch.tensor(offsets))
    with engine():
        for options in METHODS.values():
            ours = evaluate(ranked_preference_loss, on(engine, scores(4)), constants=constants, **options)
            assert bool(ours.loss.isnan())
            assert bool(ours.gradients[0].isnan().all())


@quick_engine
def test_masked_pairs_are_not_read(engine: Engine):
    chosen, rejected, mask = scores(5), scores(5, seed=1), torch.tensor([True, False, True, True, False])
    spoiled = chosen.masked_fill(~mask, math.nan)
    with engine():
        clean = evaluate(
            pairwise_preference_loss, on(engine, chosen), on(engine, rejected), mask=on(engine, mask)
        )  # fmt: skip
        ours = evaluate(pairwise_preference_loss, on(engine, spoiled), on(engine, rejected), mask=on(engine, mask))
    assert torch.equal(ours.loss, clean.loss)
    assert torch.equal(ours.gradients[0], clean.gradients[0])
    assert not ours.gradients[0][~on(engine, mask)].any()


@every_engine
def test_strided_scores_and_constants(engine: Engine):
    """Columns of a head's output, every second pair, an expanded margin."""
    head = on(engine, scores(40, 3))
    masks, margins = on(engine, scores(40, 2, seed=1) > -1), on(engine, torch.tensor(0.3)).expand(20)
    weights = on(engine, scores(40, seed=2).abs())[::2]
    options = {"mask": masks[::2, 0], "margin": margins, "weight": weights}
    with engine():
        ours = evaluate(pairwise_preference_loss, head[::2, 0], head[::2, 2], **options)
        same = evaluate(
            pairwise_preference_loss, head[::2, 0].contiguous(), head[::2, 2].contiguous(),
            **{key: x.contiguous() for key, x in options.items()},
        )  # fmt: skip
        assert torch.equal(ours.loss, same.loss)
        assert all(torch.equal(a, b) for a, b in zip(ours.gradients, same.gradients, strict=True))
        order = on(engine, ranks(3, 40)).T
        ours = evaluate(ranked_preference_loss, head, constants=(order,), reduction="sum")
        same = evaluate(ranked_preference_loss, head.clone(), constants=(order.contiguous(),), reduction="sum")
        assert torch.equal(ours.loss, same.loss)
        assert torch.equal(ours.gradients[0], same.gradients[0])
        leaf = head.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pairwise_preference_loss(leaf[::2, 0], leaf[::2, 2], **options), leaf)
        assert int(gradient.count_nonzero()) == 2 * int(options["mask"].sum())


@quick_engine
def test_integers_of_any_width_are_ranks(engine: Engine):
    x, order = on(engine, scores(4, 5)), ranks(4, 5)
    with engine():
        expected = ranked_preference_loss(x, on(engine, order))
        for dtype in (torch.int8, torch.int16, torch.int32):
            assert torch.equal(ranked_preference_loss(x, on(engine, order.to(dtype))), expected)
        far = on(engine, torch.where(order >= 0, order * 2**40, order))
        assert torch.equal(ranked_preference_loss(x, far), expected)


def test_mixed_dtypes_take_the_wider():
    policy, reference = scores(20, dtype=torch.bfloat16), scores(20, seed=1)
    leaf = policy.clone().requires_grad_()
    output = dpo_loss(leaf, policy, reference, reference)
    wide = dpo_loss(policy.float(), policy.float(), reference, reference)
    torch.testing.assert_close(output.loss, wide.loss)
    output.loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


# ---- Peers ----


@every_dpo
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_dpo_equals_trl(name: str, loss_type: str):
    tensors = [scores(200, seed=i, dtype=torch.float64) for i in range(4)]
    options = DPO_LOSSES[loss_type]
    expected = trl_dpo(*tensors, beta=0.3, loss_type=loss_type, **options)
    with pyalign.backend(name):
        output = dpo_loss(*tensors, beta=0.3, loss_type=loss_type, reduction="none", **options)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.chosen_rewards, 0.3 * (tensors[0] - tensors[2]))
    torch.testing.assert_close(output.rejected_rewards, 0.3 * (tensors[1] - tensors[3]))


def test_the_others_equal_trl():
    chosen, rejected = (-scores(200, seed=i, dtype=torch.float64).abs() - 0.01 for i in (1, 2))
    labels, kl, beta = torch.arange(200) % 3 == 0, torch.tensor(0.4, dtype=torch.float64), 0.3
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    torch.testing.assert_close(orpo_loss(chosen, rejected, lambda_=beta).loss, -beta * F.logsigmoid(log_odds).mean())
    z = beta * (chosen - rejected - 0.7 / beta)
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta=beta, gamma=0.7).loss, -F.logsigmoid(z).mean())
    smooth = -0.9 * F.logsigmoid(beta * (chosen - rejected)) - 0.1 * F.logsigmoid(-beta * (chosen - rejected))
    torch.testing.assert_close(cpo_loss(chosen, rejected, beta=beta, label_smoothing=0.1).loss, smooth.mean())
    ratio = chosen - rejected
    kto = torch.where(labels, 1 - torch.sigmoid(beta * (ratio - kl)), 1.5 * (1 - torch.sigmoid(beta * (kl - ratio))))
    ours = kto_loss(chosen, rejected, labels, kl, beta=beta, undesirable_weight=1.5)
    torch.testing.assert_close(ours.loss, kto.mean())
    torch.testing.assert_close(ours.rewards, beta * ratio)


def trl_source() -> Path | None:
    spec = importlib.util.find_spec("trl")
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(folders[0]) / "trainer" / "dpo_trainer.py" if folders else None
    return path if path is not None and path.exists() else None


@pytest.mark.skipif(trl_source() is None, reason="trl is not installed")
@every_dpo
def test_dpo_equals_the_installed_trl(loss_type: str):
    """The lines of TRL's trainer that follow ``if loss_type == "...":``, run on our tensors."""
    source = trl_source()
    assert source is not None
    branches: dict[str, list[ast.stmt]] = {}
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.left, ast.Name):
            (right,) = node.test.comparators
            if node.test.left.id == "loss_type" and isinstance(right, ast.Constant):
                branches[str(right.value)] = node.body
    if loss_type not in branches:
        pytest.skip("the installed trl writes its losses in another way")
    chosen, rejected = (scores(50, seed=i, dtype=torch.float64) for i in (1, 2))
    options = {**DPO_LOSSES[loss_type], "bco_delta": 0.0}
    names: dict[str, Any] = {
        "self": SimpleNamespace(
            beta=0.3,
            label_smoothing=options.get("label_smoothing", 0.0),
            args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        ),
        **dict.fromkeys(("chosen_logratios", "chosen_scores"), chosen),
        **dict.fromkeys(("rejected_logratios", "rejected_scores"), rejected),
        "delta_score": chosen - rejected,
        "completion_mask": torch.ones(100, 1),
        "device": "cpu",
        "torch": torch,
        "F": F,
    }
    exec(compile(ast.Module(branches[loss_type], []), str(source), "exec"), names)
    output = dpo_loss(chosen, rejected, beta=0.3, loss_type=loss_type, reduction="none", **options)
    torch.testing.assert_close(output.loss, names["per_sequence_loss"], rtol=1e-6, atol=1e-7)


# ---- Metrics and data ----


@quick_engine
def test_metrics_count_ties_as_a_half(engine: Engine):
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([0.0, 2.0, 4.0, 0.0])
    mask = torch.tensor([True, True, True, False])
    with engine():
        output = dpo_loss(on(engine, chosen), on(engine, rejected), beta=2.0)
    metrics = output.metrics(on(engine, mask))
    assert [float(x) for x in metrics] == [0.5, 0.0, 4.0, 4.0]
    assert float(margin_metrics(chosen, rejected).accuracy) == 0.625
    assert not output.chosen_rewards.requires_grad


def test_pairs_of_texts_and_ranks():
    assert pairs_of_ranks([1, 0, 0, -1, 2]) == [(0, 4), (1, 0), (1, 4), (2, 0), (2, 4)]
    assert discrimination_pairs(["C:"], ["right"], ["wrong"]) == [("C:right", "C:wrong")]
    assert binarised_pairs(["A"], ["B"]) == [("GOOD:A", "BAD:A"), ("BAD:B", "GOOD:B")]
    with pytest.raises(ValueError, match="got 1, 2 texts"):
        binarised_pairs(["A"], ["B", "C"])


def test_pairs_of_ranks_are_those_of_the_loss():
    x, order = scores(1, 6), ranks(1, 6)
    winners, losers = torch.tensor(pairs_of_ranks(order[0].tolist())).unbind(1)
    torch.testing.assert_close(
        ranked_preference_loss(x, order), pairwise_preference_loss(x[0][winners], x[0][losers])
    )  # fmt: skip


def test_the_readme_trains_a_reward_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Its example as it stands, on pairs that a byte tells apart."""
    readme = Path(__file__).parent.parent / "README.md"
    section = readme.read_text().partition("## Train a reward model")[2]
    code = (
        section.partition("```python\n")[2]
        .partition("```")[0]
        .replace("range(50)", "range(31)")
        .replace("= 256, 256,", "= 32, 256,")
    )
    pairs = [{"chosen": f"{i} is good", "rejected": f"{i} is bad!"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.1 < 0.6 < losses[0]
