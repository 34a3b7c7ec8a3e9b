"""Reward heads, win probabilities and best-of-n: golden values, every backend against float64, identities, edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from distill_support import DTYPES, ENGINES, Engine, every_engine, every_kernel, name_of, over, quick_engine
from ranking_support import Outcome, evaluate, scores, truth
from scoring_support import PACKED, check, normal, on
from torch import Tensor

import pyalign
from pyalign import best_of_n, expected_win_rates, nn, reward_scores, win_probabilities

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
float64_engine = over(tuple(engine for engine in ENGINES if engine.serves(torch.float64)))
quick_kernel = over(tuple(engine for engine in ENGINES if engine.name != "reference" and not engine.slow))
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)
OFFSETS = torch.tensor([0, 3, 3, 4, 11, 20])  # sequences of 3, 0, 1, 7 and 9 tokens


# ---- Golden values ----


@every_engine
@pytest.mark.smoke
def test_the_head_is_read_at_the_last_token(engine: Engine):
    """Packed, padded on either side, with a mask of holes, and without any."""
    hidden = on(engine, torch.arange(40.0).view(4, 5, 2))  # row t of sequence b holds 10 b + 2 t and the next
    weight, bias = on(engine, torch.tensor([1.0, 2.0])), on(engine, torch.tensor(0.5))
    with engine():

        def read(**options: Any) -> list[float]:
            return reward_scores(hidden, weight, **on(engine, options)).tolist()

        assert read() == [26.0, 56.0, 86.0, 116.0]
        assert read(mask=RIGHT[[0, 1, 1, 2]]) == [14.0, 56.0, 86.0, 92.0]
        assert read(mask=LEFT[[0, 1, 2, 1]]) == [26.0, 56.0, 86.0, 116.0]
        assert read(mask=torch.tensor([[0, 3, 0, -1, 0]] * 4) != 0, head_bias=bias) == [20.5, 50.5, 80.5, 110.5]
        packed = reward_scores(hidden.view(20, 2), weight, offsets=on(engine, OFFSETS))
        assert packed.tolist()[:1] + packed.tolist()[2:] == [14.0, 20.0, 62.0, 116.0]
        assert math.isnan(packed.tolist()[1])


@every_engine
@pytest.mark.smoke
def test_golden_win_probabilities(engine: Engine):
    x = on(engine, torch.tensor([[1.0, 0.0, 2.0]]))
    one, two = 0.7310585786300049, 0.8807970779778823  # sigmoid of 1 and 2
    wins = [[0.5, one, 1 - one], [1 - one, 0.5, 1 - two], [one, two, 0.5]]
    with engine():
        torch.testing.assert_close(win_probabilities(x).cpu(), torch.tensor([wins]))
        rates = torch.tensor([[0.5, (2 - one - two) / 2, (one + two) / 2]])
        torch.testing.assert_close(expected_win_rates(x).cpu(), rates)
        elo = win_probabilities(on(engine, torch.tensor([[400.0, 0.0]])), scale=math.log(10) / 400)
        torch.testing.assert_close(elo.cpu()[0, 0, 1], torch.tensor(10 / 11))
        assert best_of_n(x).tolist() == [2]


# ---- Every backend against float64 ----


@every_engine
@every_dtype
@pytest.mark.smoke
@pytest.mark.parametrize("heads", [0, 1, 3], ids=["one", "one of C", "three"])
def test_reward_scores(engine: Engine, dtype: torch.dtype, heads: int):
    """Packed and padded, with gradients of hidden states, head and bias."""
    if not engine.serves(dtype):
        return
    shape = (heads, 70) if heads else (70,)
    weight, bias = normal(*shape, seed=1, dtype=dtype), normal(*shape[:-1], seed=2, dtype=dtype)
    hidden = normal(20, 70, dtype=dtype)

    def score(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return reward_scores(hidden, weight, head_bias=bias, **options)

    slack = 4  # of a sum of 70 products
    check(engine, score, dtype, hidden, weight, bias, offsets=OFFSETS, slack=slack)
    check(engine, score, dtype, hidden, weight, bias, offsets=OFFSETS.int(), slack=slack)
    for mask in (RIGHT, LEFT, RIGHT.bool(), RIGHT.to(torch.uint8)):
        check(engine, score, dtype, hidden.view(4, 5, 70), weight, bias, mask=mask, slack=slack)
    check(engine, reward_scores, dtype, hidden.view(4, 5, 70), weight, slack=slack)


@every_engine
@pytest.mark.parametrize("width", [1, 15, 16, 511, 513, 1100])
def test_rows_of_any_width(engine: Engine, width: int):
    check(engine, reward_scores, torch.float32, normal(4, 5, width), normal(2, width, seed=1), mask=RIGHT, slack=4)


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_a_float32_head_reads_hidden_states_of_16_bits(engine: Engine, dtype: torch.dtype):
    """Its gradient is float32, theirs has their dtype."""
    check(engine, reward_scores, dtype, normal(20, 70, dtype=dtype), normal(2, 70, seed=1), offsets=OFFSETS, slack=4)


@every_engine
@every_dtype
@pytest.mark.smoke
@pytest.mark.parametrize("function", [win_probabilities, expected_win_rates])
def test_groups(engine: Engine, function: Callable[..., Tensor], dtype: torch.dtype):
    if not engine.serves(dtype):
        return
    check(engine, function, dtype, scores(3, 7, dtype=dtype))
    check(engine, function, dtype, scores(2, 33, dtype=dtype), scale=0.7)
    check(engine, lambda x, offsets: function(x, offsets, scale=0.7), dtype, scores(40, dtype=dtype), offsets=PACKED)


@quick_engine
@pytest.mark.parametrize("function", [win_probabilities, expected_win_rates])
def test_large_groups(engine: Engine, function: Callable[..., Tensor]):
    """Shared by threads, with small groups before and after, and a matrix that is written past the caches."""
    check(engine, function, torch.float32, scores(1, 2100), slack=4)
    offsets = torch.tensor([0, 5, 5, 705, 708, 1008, 1010])
    check(engine, lambda x, offsets: function(x, offsets), torch.float32, scores(1010), offsets=offsets, slack=4)


@every_engine
@every_dtype
@pytest.mark.smoke
def test_best_of_n(engine: Engine, dtype: torch.dtype):
    if not engine.serves(dtype):
        return
    x = scores(40, dtype=dtype)
    with engine():
        assert torch.equal(best_of_n(on(engine, x.view(4, 10))).cpu(), x.view(4, 10).argmax(1))
        best = best_of_n(on(engine, x), on(engine, PACKED)).cpu()
    sizes = itertools.pairwise(PACKED.tolist())
    assert best.tolist() == [begin + int(x[begin:end].argmax()) if end > begin else -1 for begin, end in sizes]


# ---- Gradients by finite differences ----


@float64_engine
@pytest.mark.parametrize("options", [{}, {"mask": RIGHT}, {"mask": LEFT}], ids=["whole", "right", "left"])
def test_reward_gradients_by_finite_differences(engine: Engine, options: dict[str, Any]):
    leaves = [normal(4, 5, 3, dtype=torch.float64), normal(2, 3, dtype=torch.float64), normal(2, dtype=torch.float64)]

    def score(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reward_scores(hidden, weight, head_bias=bias, **options).nan_to_num(0.0)

    with engine():
        assert torch.autograd.gradcheck(score, [x.requires_grad_() for x in leaves])


@float64_engine
@pytest.mark.parametrize("function", [win_probabilities, expected_win_rates])
def test_group_gradients_by_finite_differences(engine: Engine, function: Callable[..., Tensor]):
    x, packed = (scores(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 5), (13,)))
    with engine():
        assert torch.autograd.gradcheck(lambda x: function(x, scale=0.7), x)
        assert torch.autograd.gradcheck(lambda x: function(x, PACKED[:6]), packed)


# ---- Accuracy beside torch's ----


def errors(ours: Outcome, exact: Outcome) -> list[float]:
    """Of the result and of each gradient, relative to the largest."""
    pairs = zip((ours.loss, *ours.gradients), (exact.loss, *exact.gradients), strict=True)
    return [float((x.cpu().double() - y).abs().max() / y.abs().max()) for x, y in pairs]


@quick_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_reward_errors_are_no_larger_than_torchs_in_float32(engine: Engine, dtype: torch.dtype):
    """Plus two roundings; gradients are compared in float32, which 16-bit ones are rounded from."""
    hidden, weight = normal(64, 4096, dtype=dtype), normal(3, 4096, seed=1, dtype=dtype)
    offsets = torch.arange(0, 65, 2)
    upstream = normal(32, 3, seed=2)
    exact = truth(reward_scores, hidden, weight, upstream=upstream, offsets=offsets)

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden[1::2].float() @ weight.float().T

    theirs = evaluate(eager, hidden.float(), weight.float(), upstream=upstream)
    with engine():
        ours = evaluate(
            reward_scores, on(engine, hidden), on(engine, weight.float()), upstream=on(engine, upstream),
            offsets=on(engine, offsets),
        )  # fmt: skip
    slack = (2.0**-23, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23, 2.0**-23)
    for mine, torchs, more in zip(errors(ours, exact), errors(theirs, exact), slack, strict=True):
        assert mine <= torchs + more


@quick_engine
@pytest.mark.parametrize("shape", [(64, 16), (8, 64), (3, 300), (1, 1000)], ids=name_of)
@pytest.mark.parametrize("function", [win_probabilities, expected_win_rates])
def test_group_errors_are_no_larger_than_torchs_in_float32(
    engine: Engine, function: Callable[..., Tensor], shape: tuple[int, int]
):
    """Plus two roundings."""
    x = scores(*shape, scale=4.0)
    upstream = normal(*function(x).shape, seed=2)
    exact = truth(function, x, upstream=upstream)
    with pyalign.backend("reference"):
        theirs = evaluate(function, x, upstream=upstream)
    with engine():
        ours = evaluate(function, on(engine, x), upstream=on(engine, upstream))
    for mine, torchs in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine <= torchs + 2.0**-23


@every_engine
def test_small_probabilities_keep_their_digits(engine: Engine):
    """p and its derivative of 1e-9 to a relative 1e-5, where 1 - p of the other side would be 0."""
    x = torch.tensor([[20.5, 0.0, -3.0]])
    upstream = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    exact = truth(win_probabilities, x, upstream=upstream)
    with engine():
        ours = evaluate(win_probabilities, on(engine, x), upstream=on(engine, upstream))
    torch.testing.assert_close(ours.loss.cpu().double(), exact.loss, rtol=1e-5, atol=0)
    if engine.name != "reference":  # torch's own derivative, p (1 - p)
        torch.testing.assert_close(ours.gradients[0].cpu().double(), exact.gradients[0], rtol=1e-4, atol=0)


# ---- Batch invariance ----


@every_kernel
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("width", [64, 577, 2050])
def test_scores_have_the_same_bits_in_every_batch(
    engine: Engine, dtype: torch.dtype, width: int, threads: Callable[[int], None]
):
    """Alone, among others, in another order, packed or padded on either side, at any address and stride, and whatever
    the number of threads and heads."""
    sizes = [3, 1, 6, 2, 5, 4, 6, 3] if engine.slow else [3, 1, 9, 2, 5, 17, 4, 6] * 8
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    hidden, weight = normal(sum(sizes), width, dtype=dtype), normal(2, width, seed=1)
    weight, longest = on(engine, weight), max(sizes)
    right, left = (torch.full((len(sizes), longest, width), math.nan, dtype=dtype) for _ in range(2))
    ends, starts = (torch.zeros(len(sizes), longest, dtype=torch.bool) for _ in range(2))
    for b, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        right[b, : end - begin] = left[b, longest - (end - begin) :] = hidden[begin:end]
        ends[b, : end - begin] = starts[b, longest - (end - begin) :] = True
    shifted = torch.zeros(sum(sizes), width + 3, dtype=dtype)[:, 1 : width + 1]
    shifted.copy_(hidden)

    with engine(), torch.no_grad():

        def read(x: Tensor, head: Tensor = weight, **options: Tensor) -> Tensor:
            return reward_scores(on(engine, x), head, **on(engine, options)).cpu()

        expected = read(hidden, offsets=offsets)
        for b in range(0, len(sizes), 3):
            begin, end = offsets[b : b + 2].tolist()
            assert torch.equal(read(hidden[begin:end], offsets=torch.tensor([0, end - begin]))[0], expected[b])
            assert torch.equal(read(hidden[None, begin:end])[0], expected[b])
        assert torch.equal(read(right, mask=ends), expected)
        assert torch.equal(read(left, mask=starts), expected)
        assert torch.equal(read(right.flip(0), mask=ends.flip(0)).flip(0), expected)
        assert torch.equal(read(shifted, offsets=offsets), expected)
        assert torch.equal(read(hidden, weight[0], offsets=offsets), expected[:, 0])
        for count in (1, 3):
            threads(count)
            assert torch.equal(read(hidden, offsets=offsets), expected)


@every_engine
def test_autocast_leaves_the_head_in_float32(engine: Engine):
    hidden, weight = on(engine, normal(20, 70)), on(engine, normal(2, 70, seed=1))
    with engine():
        plain = evaluate(reward_scores, hidden, weight, offsets=on(engine, OFFSETS))
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        with torch.autocast(engine.device, torch.bfloat16):
            result = reward_scores(*leaves, offsets=on(engine, OFFSETS))
        gradients = torch.autograd.grad(result, leaves, torch.ones_like(result))
    assert torch.equal(result.nan_to_num(), plain.loss.nan_to_num())
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain.gradients, strict=True))


# ---- Identities ----


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Packed scores and offsets, groups of 0 to 40."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=0, max_size=6))
    seed, scale = draw(st.integers(0, 1000)), draw(st.sampled_from([0.1, 2.0, 50.0]))
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return scores(sum(sizes), seed=seed, scale=scale), offsets


def matrices(wins: Tensor, offsets: Tensor) -> list[Tensor]:
    sizes = offsets.diff().tolist()
    return [block.view(size, size) for block, size in zip(wins.split([n * n for n in sizes]), sizes, strict=True)]


@pytest.mark.parametrize("name", ["cpu", "reference"])
@hypothesis.given(case=groups())
def test_win_probabilities_of_ragged_groups(name: str, case: tuple[Tensor, Tensor]):
    """p_ij + p_ji = 1, 1/2 on the diagonal, order kept, and rates that are the means of rows with mean 1/2."""
    x, offsets = case
    with pyalign.backend(name):
        blocks = matrices(win_probabilities(x, offsets), offsets)
        rates = expected_win_rates(x, offsets)
        best = best_of_n(x, offsets).tolist()
    for block, begin, chosen in zip(blocks, offsets.tolist(), best, strict=False):
        size = block.shape[0]
        own, rate = x[begin : begin + size], rates[begin : begin + size]
        torch.testing.assert_close(block + block.T, torch.ones(size, size))
        assert torch.equal(block.diagonal(), torch.full((size,), 0.5))
        assert torch.equal(block >= 0.5, own[:, None] >= own)
        if size == 0:
            assert chosen == -1
            continue
        assert own[chosen - begin] == own.max()
        if size == 1:
            assert rate.tolist() == [0.5]
            continue
        torch.testing.assert_close(rate, (block.sum(1) - 0.5) / (size - 1), rtol=1e-5, atol=1e-6)
        assert float(rate.mean()) == pytest.approx(0.5, abs=1e-6)
        assert rate[chosen - begin] >= rate.max() - 1e-6


@quick_engine
def test_a_shift_of_a_group_changes_nothing(engine: Engine):
    """Of a multiple of 2^-10, so that differences stay what they were."""
    x = on(engine, (scores(5, 9) * 1024).round() / 1024)
    shift = on(engine, torch.tensor([0.0, 1.0, -3.5, 100.25, 7.0]))[:, None]
    with engine():
        for function in (win_probabilities, expected_win_rates, best_of_n):
            assert torch.equal(function(x + shift), function(x))


@quick_kernel
def test_entries_and_groups_may_come_in_any_order(engine: Engine):
    x = on(engine, scores(5, 9))
    by_group, by_entry = (on(engine, torch.randperm(n)) for n in (5, 9))
    with engine():
        wins, rates = win_probabilities(x), expected_win_rates(x)
        assert torch.equal(win_probabilities(x[by_group]), wins[by_group])
        assert torch.equal(win_probabilities(x[:, by_entry]), wins[:, by_entry][:, :, by_entry])
        torch.testing.assert_close(expected_win_rates(x[:, by_entry]), rates[:, by_entry])
        assert torch.equal(by_entry[best_of_n(x[:, by_entry])], best_of_n(x))


@quick_kernel
def test_packed_and_dense_are_the_same(engine: Engine):
    x, offsets = on(engine, scores(6, 5)), on(engine, torch.arange(0, 31, 5))
    with engine():
        for function in (win_probabilities, expected_win_rates):
            upstream = on(engine, normal(*function(x).shape))
            dense = evaluate(function, x, upstream=upstream)
            packed = evaluate(function, x.flatten(), constants=(offsets,), upstream=upstream.flatten())
            assert torch.equal(packed.loss, dense.loss.flatten())
            assert torch.equal(packed.gradients[0], dense.gradients[0].flatten())
        assert torch.equal(best_of_n(x.flatten(), offsets) - offsets[:-1], best_of_n(x))


def test_gradients_of_a_group_sum_to_zero():
    for function in (win_probabilities, expected_win_rates):
        upstream = normal(*function(scores(4, 30)).shape, dtype=torch.float64)
        (gradient,) = evaluate(function, scores(4, 30, dtype=torch.float64), upstream=upstream).gradients
        torch.testing.assert_close(gradient.sum(1), torch.zeros(4, dtype=torch.float64))


# ---- Edges ----


@every_engine
@pytest.mark.smoke
def test_no_sequences_and_no_tokens(engine: Engine):
    """No sequence; sequences without tokens, packed, padded to length 0 and masked: NaN, with gradients of zero."""
    weight = on(engine, normal(2, 6))
    cases = [
        (torch.zeros(0, 6), {"offsets": torch.tensor([0])}, 0),
        (torch.zeros(0, 6), {"offsets": torch.tensor([0, 0, 0])}, 2),
        (torch.zeros(0, 4, 6), {}, 0),
        (torch.zeros(3, 0, 6), {}, 3),
        (torch.zeros(3, 0, 6), {"mask": torch.zeros(3, 0, dtype=torch.bool)}, 3),
        (normal(3, 4, 6), {"mask": torch.zeros(3, 4, dtype=torch.int64)}, 3),
    ]
    with engine():
        for hidden, options, count in cases:
            leaves = [on(engine, hidden).requires_grad_(), weight.clone().requires_grad_()]
            bias = torch.zeros(2, device=engine.device, requires_grad=True)
            result = reward_scores(*leaves, head_bias=bias, **on(engine, options))
            assert result.shape == (count, 2)
            assert bool(result.isnan().all())
            for gradient in torch.autograd.grad(result, [*leaves, bias], torch.full_like(result, math.nan)):
                assert not gradient.any()


@every_engine
@pytest.mark.smoke
def test_empty_groups_and_single_entries(engine: Engine):
    with engine():
        for shape in ((0, 5), (3, 0), (0, 0)):
            x = torch.zeros(shape, device=engine.device, requires_grad=True)
            for function, wanted in ((win_probabilities, (*shape, shape[1])), (expected_win_rates, shape)):
                result = function(x)
                assert result.shape == wanted
                assert torch.autograd.grad(result.sum(), x)[0].shape == shape
            assert best_of_n(x).tolist() == [-1] * shape[0]
        alone = on(engine, torch.tensor([[3.0]])).requires_grad_()
        for function in (win_probabilities, expected_win_rates):
            result = function(alone)
            assert result.flatten().tolist() == [0.5]
            assert torch.autograd.grad(result.sum(), alone)[0].tolist() == [[0.0]]
        nothing, offsets = torch.zeros(0, device=engine.device), on(engine, torch.tensor([0, 0]))
        assert win_probabilities(nothing, offsets).shape == (0,)
        assert expected_win_rates(nothing, offsets).shape == (0,)
        assert best_of_n(nothing, offsets).tolist() == [-1]


@every_engine
def test_scores_that_are_not_numbers(engine: Engine):
    """A NaN spoils its row and column, an infinite score decides, two of one sign are undecided; other groups stay."""
    inf, nan = math.inf, math.nan
    x = on(engine, torch.tensor([[1.0, nan, 0.0], [inf, 0.0, -inf], [inf, inf, 0.0], [1.0, 2.0, 3.0]]))
    with engine():
        wins, rates = win_probabilities(x).cpu(), expected_win_rates(x).cpu()
        assert wins.diagonal(dim1=1, dim2=2).eq(0.5).all()
        assert wins[0].isnan().tolist() == [[False, True, False], [True, False, True], [False, True, False]]
        assert wins[1].tolist() == [[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5]]
        assert wins[2].isnan().tolist() == [[False, True, False], [True, False, False], [False, False, False]]
        assert rates.isnan().any(1).tolist() == [True, False, True, False]
        assert rates[1].tolist() == [1.0, 0.5, 0.0]
        gradient = evaluate(expected_win_rates, x).gradients[0].cpu()
        assert gradient.isnan().any(1).tolist() == [True, False, True, False]
        assert best_of_n(x).tolist() == [0, 0, 0, 2]
        nothing = on(engine, torch.tensor([[nan, nan], [nan, -inf], [-inf, -inf]]))
        assert best_of_n(nothing).tolist() == [-1, 1, 0]


@every_engine
def test_the_first_of_equals_is_the_best(engine: Engine):
    x = torch.zeros(3, 300)
    x[0, 40:260] = x[1, 299] = x[2, [7, 130, 263]] = 1.0
    with engine():
        assert best_of_n(on(engine, x)).tolist() == [40, 299, 7]
        assert best_of_n(on(engine, x.flatten()), on(engine, torch.tensor([0, 300, 900]))).tolist() == [40, 599]


@every_engine
def test_rows_that_are_not_read_may_hold_anything(engine: Engine):
    hidden, weight = normal(4, 5, 6), normal(6, seed=1)
    spoiled = hidden.clone()
    spoiled[RIGHT == 0] = math.nan
    spoiled[0, :2] = math.inf
    with engine():
        clean, ours = (
            evaluate(reward_scores, on(engine, x), on(engine, weight), mask=on(engine, RIGHT))
            for x in (hidden, spoiled)
        )
    assert torch.equal(ours.loss[:3], clean.loss[:3])
    assert all(torch.equal(a, b) for a, b in zip(ours.gradients, clean.gradients, strict=True))
    read = ours.gradients[0].cpu().any(-1)
    assert read.sum(1).tolist() == [1, 1, 1, 0]
    assert read[torch.arange(3), torch.tensor([2, 4, 0])].all()


@every_kernel
def test_strided_hidden_states_and_scores(engine: Engine):
    """Every second token, every second feature, a transposed batch, an expanded head; columns of scores."""
    whole = on(engine, normal(8, 6, 20))
    weight, offsets = on(engine, normal(1, 20)).expand(3, 20), on(engine, torch.tensor([0, 2, 8]))
    mask = on(engine, RIGHT.repeat(1, 2)[:, ::2])
    with engine():
        for view, options in (
            (whole[::2, 1:], {"mask": mask}),
            (whole[:4, :5].transpose(0, 1)[:4, :4], {}),
            (whole[:, 0], {"offsets": offsets}),
            (whole.movedim(2, 1)[:, :8, 0].T, {"offsets": offsets}),
        ):
            head = weight[:, : view.shape[-1]]
            ours = evaluate(reward_scores, view, head, **options)
            same = evaluate(reward_scores, view.contiguous(), head.contiguous(), **options)
            assert torch.equal(ours.loss.nan_to_num(), same.loss.nan_to_num())
            assert all(torch.equal(a, b) for a, b in zip(ours.gradients, same.gradients, strict=True))
        x = on(engine, scores(9, 4)).T[::2]
        for function in (win_probabilities, expected_win_rates, best_of_n):
            assert torch.equal(function(x), function(x.contiguous()))


@over(tuple(engine for engine in ENGINES if engine.name in ("triton", "cuda")))
@pytest.mark.parametrize("offsets", [[1, 4], [0, 3, 2, 4], [0, 2], [0, 6], [0, 6, 4], [-1, 4]])
def test_on_a_gpu_offsets_that_do_not_cut_give_nan(engine: Engine, offsets: list[int]):
    cut = on(engine, torch.tensor(offsets))
    with engine():
        rates = evaluate(expected_win_rates, on(engine, scores(4)), constants=(cut,))
        assert bool(rates.loss.isnan().all())
        assert bool(rates.gradients[0].isnan().all())
        assert best_of_n(on(engine, scores(4)), cut).tolist() == [-1] * (len(offsets) - 1)
        heads = evaluate(reward_scores, on(engine, normal(4, 6)), on(engine, normal(6)), offsets=cut)
        assert bool(heads.loss.isnan().all())
        assert not any(bool(x.any()) for x in heads.gradients)


@pytest.mark.large
@pytest.mark.parametrize("name", ["cpu"])
def test_more_hidden_states_than_32_bits_count(name: str):
    """2^31 numbers and a few rows: 4 GiB in bfloat16."""
    width = 4096
    tokens = 2**31 // width + 8
    hidden = torch.zeros(tokens, width, dtype=torch.bfloat16)
    hidden[-1] = 1
    offsets, weight = torch.tensor([0, 5, tokens]), torch.ones(width)
    with pyalign.backend(name):
        leaf = hidden.requires_grad_()
        result = reward_scores(leaf, weight, offsets=offsets)
        assert result.tolist() == [0.0, float(width)]
        (gradient,) = torch.autograd.grad(result[1], leaf)
    assert gradient[-1].eq(1).all()
    assert not gradient[-2].any()


# ---- Modules ----


def test_the_module_is_the_function_over_a_linear_layer():
    hidden, layer = normal(4, 5, 6), torch.nn.Linear(6, 1, bias=False)
    head = nn.RewardHead(6)
    head.load_state_dict(layer.state_dict())
    ours = head(hidden, mask=RIGHT)
    assert torch.equal(ours.nan_to_num(), reward_scores(hidden, layer.weight[0], mask=RIGHT).nan_to_num())
    torch.testing.assert_close(ours[:3], torch.stack([layer(hidden[b, t])[0] for b, t in ((0, 2), (1, 4), (2, 0))]))
    several = nn.RewardHead(6, 3, bias=True, dtype=torch.float64)
    assert several(hidden.double()).shape == (4, 3)
    assert several(hidden.double().flatten(0, 1), offsets=OFFSETS).shape == (5, 3)
    ours[:3].sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.shape == (1, 6)
