"""Where losses are usually wrong: nothing to count, infinities, extreme logits, strides, ties, threads, sizes."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_support import (
    Engine,
    assert_close,
    evaluate,
    every_divergence,
    every_engine,
    every_tail,
    logits,
    quick_engine,
    student_and_teacher,
    to_device,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import pyalign
from pyalign import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs
from pyalign._types import rows

INF = math.inf


def pair(engine: Engine, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return student_and_teacher(*shape, dtype=dtype, device=engine.device)


# Reductions and what counts


@every_engine
@pytest.mark.smoke
def test_an_all_masked_batch_gives_a_differentiable_zero(engine: Engine):
    student, teacher = pair(engine, 3, 31)
    nothing = torch.zeros(3, dtype=torch.bool, device=engine.device)
    with engine():
        for function, other in ((distillation_loss, teacher), (topk_distillation_loss, topk_logprobs(teacher, 3))):
            for reduction in ("mean", "sum", "none"):
                s = student.clone().requires_grad_()
                loss = function(s, other, mask=nothing, reduction=reduction)
                assert not loss.any()
                (gradient,) = torch.autograd.grad(loss.sum(), s)
                assert gradient.shape == s.shape
                assert not gradient.any()


@every_engine
@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(0, 31), (2, 0, 31)])
def test_the_mean_of_no_tokens_is_a_differentiable_zero(engine: Engine, shape: tuple[int, ...]):
    student, teacher = pair(engine, *shape)
    with engine():
        stored = topk_logprobs(teacher, 5)
        assert stored.logprobs.shape == stored.indices.shape == (*shape[:-1], 5)
        for other in (teacher, stored):
            for reduction in ("mean", "sum", "none"):
                ours = evaluate(student, other, reduction=reduction)
                assert ours.loss.shape == (shape[:-1] if reduction == "none" else ())
                assert not ours.loss.any()
                assert ours.gradient.shape == shape


@every_engine
def test_num_items_of_zero_gives_zero_not_nan(engine: Engine):
    student, teacher = pair(engine, 3, 31)
    with engine():
        for num_items in (0, torch.tensor(0, device=engine.device)):
            ours = evaluate(student, teacher, num_items=num_items)
            assert ours.loss == 0
            assert not ours.gradient.any()


@quick_engine
def test_weight_never_enters_the_denominator(engine: Engine):
    student, teacher = pair(engine, 4, 31)
    weight = torch.tensor([2.0, 0.0, 1.0, 5.0], device=engine.device)
    mask = torch.tensor([True, True, False, True], device=engine.device)
    with engine():
        each = distillation_loss(student, teacher, reduction="none")
        loss = distillation_loss(student, teacher, weight=weight, mask=mask)
    torch.testing.assert_close(loss, (each * weight * mask).sum() / 3)


@every_engine
@pytest.mark.smoke
def test_masked_rows_are_not_looked_at(engine: Engine):
    """NaN and infinities in rows that don't count neither reach the loss nor the gradient of any row."""
    student, teacher = pair(engine, 5, 31)
    keep = torch.tensor([True, False, True, False, True], device=engine.device)
    with engine():
        stored = topk_logprobs(teacher, 4)
        clean = [evaluate(student, other, mask=keep) for other in (teacher, stored)]
        student[1], student[3], teacher[1], teacher[3] = math.nan, INF, -INF, math.nan
        stored.logprobs[1], stored.indices[3] = math.nan, 7
        assert stored.residual is not None
        stored.residual[3] = math.nan
        labels = torch.where(keep, 5, -100)
        matched = torch.where(keep, torch.arange(5, device=engine.device), -1)
        for other, expected in zip((teacher, stored), clean, strict=True):
            for how in ({"mask": keep}, {"labels": labels}, {"teacher_rows": matched}):
                ours = evaluate(student, other, **how)
                assert torch.equal(ours.loss, expected.loss)
                assert torch.equal(ours.gradient, expected.gradient)
                assert not ours.gradient[~keep].any()


@quick_engine
def test_a_token_counts_where_mask_and_labels_and_teacher_rows_say_so(engine: Engine):
    student, teacher = pair(engine, 8, 31)
    bits = torch.arange(8, device=engine.device)
    mask, labels = (bits & 1) > 0, torch.where((bits & 2) > 0, 9, -7)
    matched = torch.where((bits & 4) > 0, bits, -1)
    with engine():
        loss = distillation_loss(
            student, teacher, mask=mask, labels=labels, ignore_index=-7, teacher_rows=matched, reduction="none"
        )
        assert loss.nonzero().flatten().tolist() == [7]
        alone = distillation_loss(student, teacher, mask=mask, labels=labels, ignore_index=-7, teacher_rows=matched)
    assert alone == loss[7]


@quick_engine
def test_targets_of_ignore_index_have_no_hard_term_but_count(engine: Engine):
    student, teacher = pair(engine, 4, 31)
    targets = torch.tensor([3, -100, 30, -100], device=engine.device)
    with engine():
        soft = distillation_loss(student, teacher, reduction="none")
        loss = distillation_loss(student, teacher, targets=targets, hard_weight=0.25)
    hard = F.cross_entropy(student, targets, reduction="none")  # 0 where ignored
    torch.testing.assert_close(loss, (0.75 * soft + 0.25 * hard).mean())


@every_engine
def test_a_hard_weight_of_one_is_cross_entropy_even_where_the_divergence_is_infinite(engine: Engine):
    student, teacher = pair(engine, 4, 31)
    student[:, 5] = -INF  # where the teacher is not zero
    targets = torch.tensor([0, 1, 2, 30], device=engine.device)
    with engine():
        for other in (teacher, topk_logprobs(teacher, 31)):
            ours = evaluate(student, other, targets=targets, hard_weight=1.0)
            s = student.clone().requires_grad_()
            expected = F.cross_entropy(s, targets)
            torch.testing.assert_close(ours.loss, expected.detach())
            torch.testing.assert_close(ours.gradient, torch.autograd.grad(expected, s)[0])


@quick_engine
def test_temperature_squared_multiplies_loss_and_gradient_but_not_the_hard_term(engine: Engine):
    student, teacher = pair(engine, 4, 31)
    targets = torch.tensor([0, 1, 2, 30], device=engine.device)
    with engine():
        plain = evaluate(student, teacher, temperature=3.0)
        squared = evaluate(student, teacher, temperature=3.0, temperature_squared=True)
        both = evaluate(student, teacher, temperature=3.0, temperature_squared=True, targets=targets, hard_weight=0.5)
    torch.testing.assert_close(squared.loss, 9 * plain.loss)
    torch.testing.assert_close(squared.gradient, 9 * plain.gradient)
    torch.testing.assert_close(both.loss, 0.5 * squared.loss + 0.5 * F.cross_entropy(student, targets))


@every_engine
def test_teacher_rows_follow_flat_rows_of_any_leading_shape(engine: Engine):
    """Context distillation: student position t is matched with teacher position len(prompt) + t."""
    prompt, length = 3, 4
    student, teacher = logits(2, length, 31, seed=1), logits(2, prompt + length, 31, seed=2)
    matched = torch.arange(length) + prompt + torch.tensor([[0], [prompt + length]])
    matched[1, 2] = -1
    expected = truth(student, teacher[:, prompt:], mask=matched >= 0)
    student, teacher, matched = (x.to(engine.device) for x in (student, teacher, matched))
    with engine():
        assert_close(evaluate(student, teacher, teacher_rows=matched), expected, torch.float32)
        stored = topk_logprobs(teacher, 31)
        ours = evaluate(student, stored, teacher_rows=matched)
    torch.testing.assert_close(ours.loss.cpu().double(), expected.loss, rtol=1e-5, atol=1e-6)


# Infinities and NaN


def rows_of(engine: Engine, *values: list[float]) -> Tensor:
    return torch.tensor(values, device=engine.device)


@every_engine
@every_divergence
@pytest.mark.smoke
def test_minus_infinity_on_both_sides_contributes_nothing(engine: Engine, divergence: str):
    """As if the entry were not there: padded heads and banned tokens."""
    student, teacher = logits(3, 40, seed=1), logits(3, 40, seed=2)
    gone = torch.tensor([0, 7, 8, 39])
    left = torch.tensor([i for i in range(40) if i not in gone])
    exact = truth(student[:, left], teacher[:, left], divergence=divergence)
    student[:, gone], teacher[:, gone] = -INF, -INF
    with engine():
        ours = evaluate(student.to(engine.device), teacher.to(engine.device), divergence=divergence)
    assert not ours.gradient[:, gone].any()
    assert_close(ours._replace(gradient=ours.gradient[:, left]), exact, torch.float32)


@every_engine
@pytest.mark.smoke
def test_a_forward_kl_is_infinite_where_the_student_excludes_an_entry_and_its_gradient_is_q_minus_p(engine: Engine):
    student = rows_of(engine, [1.0, -INF, 0.5, 2.0], [0.1, 0.2, 0.3, 0.4])
    teacher = rows_of(engine, [0.5, 0.0, 1.5, -1.0], [0.4, 0.3, 0.2, 0.1])
    with engine():
        ours = evaluate(student, teacher, reduction="sum")
        each = distillation_loss(student, teacher, reduction="none")
    assert ours.loss == INF
    assert each[0] == INF
    assert each[1].isfinite()
    torch.testing.assert_close(ours.gradient, student.softmax(-1) - teacher.softmax(-1))


@every_engine
@pytest.mark.parametrize("divergence", ["jsd", "tvd"])
def test_bounded_divergences_stay_finite_where_one_side_excludes_an_entry(engine: Engine, divergence: str):
    student = torch.tensor([[1.0, -INF, 0.5, 2.0], [0.1, 0.2, 0.3, 0.4], [0.0, -INF, -INF, -INF]])
    teacher = torch.tensor([[0.5, 0.0, 1.5, -1.0], [0.4, -INF, 0.2, 0.1], [-INF, 0.0, -INF, -INF]])
    exact = truth(student, teacher, divergence=divergence, reduction="none")
    assert exact.loss[2] == pytest.approx(math.log(2) if divergence == "jsd" else 1.0)
    with engine():
        ours = evaluate(student.to(engine.device), teacher.to(engine.device), divergence=divergence, reduction="none")
    assert_close(ours, exact, torch.float32)


@every_engine
def test_a_reverse_kl_is_infinite_where_the_teacher_excludes_an_entry(engine: Engine):
    student = rows_of(engine, [1.0, 0.0, 0.5], [1.0, -INF, 0.5], [0.1, 0.2, 0.3])
    teacher = rows_of(engine, [0.5, -INF, 1.5], [0.5, 0.0, 1.5], [0.4, 0.3, 0.2])
    with engine():
        loss = distillation_loss(student, teacher, divergence="reverse_kl", reduction="none")
    assert loss[0] == INF
    assert loss[1:].isfinite().all()


@every_engine
@every_divergence
@pytest.mark.smoke
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_row_is_nan_alone(engine: Engine, divergence: str, side: str):
    """All -inf, a +inf or a NaN, wherever in the row it stands."""
    sound, other = pair(engine, 6, 67)
    with engine():
        expected = evaluate(sound, other, divergence=divergence, reduction="none")
        broken = {"student": sound.clone(), "teacher": other.clone()}
        x = broken[side]
        x[1], x[2, 3], x[3, 0], x[4, 66] = -INF, INF, math.nan, math.nan
        ours = evaluate(**broken, divergence=divergence, reduction="none")
        mean = evaluate(**broken, divergence=divergence)
    assert ours.loss[1:5].isnan().all()
    if (engine.name, divergence, side) != ("reference", "tvd", "teacher"):  # to torch, the slope of |NaN| is 0
        assert ours.gradient[1:5].isnan().all(-1).all()
    for row in (0, 5):
        assert torch.equal(ours.loss[row], expected.loss[row])
        assert torch.equal(ours.gradient[row], expected.gradient[row])
        assert mean.gradient[row].isfinite().all()
    assert mean.loss.isnan()


@every_engine
@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
def test_a_broken_row_of_a_topk_loss_is_nan_alone(engine: Engine, tail: str):
    student, other = pair(engine, 5, 67)
    with engine():
        stored = topk_logprobs(other, 4)
        expected = evaluate(student, stored, tail=tail, reduction="none")
        inside = stored.indices[:, 0]
        student[1], student[2, inside[2]] = -INF, math.nan
        stored.logprobs[3, 1] = math.nan
        ours = evaluate(student, stored, tail=tail, reduction="none")
    assert ours.loss[1:4].isnan().all()
    for row in (0, 4):
        assert torch.equal(ours.loss[row], expected.loss[row])
        assert torch.equal(ours.gradient[row], expected.gradient[row])


@every_engine
@pytest.mark.smoke
def test_topk_logprobs_of_broken_rows(engine: Engine):
    x = logits(6, 67, device=engine.device)
    with engine():
        sound = topk_logprobs(x, 5)
        x[1, 3], x[2, 66], x[3], x[4, 10:] = math.nan, INF, -INF, -INF
        logprobs, indices, residual, _ = topk_logprobs(x, 5)
        few = topk_logprobs(x, 20)
    assert residual is not None
    assert sound.residual is not None
    assert logprobs[1:4].isnan().all()
    for row in (0, 5):
        assert torch.equal(logprobs[row], sound.logprobs[row])
        assert torch.equal(indices[row], sound.indices[row])
        assert torch.equal(residual[row], sound.residual[row])
    # Ten entries are left: the rest is -inf, in order of index, and nothing remains outside.
    torch.testing.assert_close(few.logprobs[4, :10], x[4, :10].log_softmax(-1).sort(descending=True).values)
    assert (few.logprobs[4, 10:] == -INF).all()
    assert few.indices[4, 10:].tolist() == list(range(10, 20))
    assert few.residual is not None
    assert few.residual[4] == -INF


@every_engine
def test_ties_go_to_the_lowest_index(engine: Engine):
    x = torch.tensor(
        [[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, -1.0, 0.0, -0.0]], device=engine.device
    )
    with engine():
        assert topk_logprobs(x, 4).indices.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 3, 4]]
        _, metrics = distillation_loss(x, x.roll(1, -1), return_metrics=True)
        assert metrics.agreement.tolist() == [False, True, True]
        _, metrics = distillation_loss(x, x + 1, return_metrics=True)
        assert metrics.agreement.all()


# Sizes of numbers


@every_engine
@every_divergence
@pytest.mark.parametrize("level", [1e4, -1e4])
def test_logits_of_ten_thousand(engine: Engine, divergence: str, level: float):
    student, teacher = pair(engine, 3, 31)
    exact = truth(student + level, teacher - level, divergence=divergence)
    with engine():
        ours = evaluate(student + level, teacher - level, divergence=divergence)
    assert_close(ours, exact, torch.float32)


@every_engine
@every_divergence
def test_probabilities_that_underflow(engine: Engine, divergence: str):
    """Spread over 2e4: nearly all probabilities are 0 in float32, on both sides (Liger #1453)."""
    student = torch.tensor([[1e4, 0.0, -1e4, 3.0], [0.0, 1e4, 9990.0, -1e4], [300.0, 200.0, 100.0, 0.0]])
    teacher = torch.tensor([[1e4, -1e4, 0.0, 2.0], [1e4, 0.0, -1e4, 5.0], [300.0, 190.0, 110.0, 1.0]])
    exact = truth(student, teacher, divergence=divergence, reduction="none")
    with engine():
        ours = evaluate(student.to(engine.device), teacher.to(engine.device), divergence=divergence, reduction="none")
    # q (d - D) where d and D are 2e4 and nearly equal: what float32 can't tell apart.
    assert_close(ours, exact, torch.float32, slack=256 if divergence == "reverse_kl" else 4)


@every_engine
@every_divergence
@pytest.mark.smoke
def test_a_vocabulary_of_one_has_loss_and_gradient_zero(engine: Engine, divergence: str):
    student, teacher = pair(engine, 3, 1)
    with engine():
        for other in (teacher, topk_logprobs(teacher, 1)):
            ours = evaluate(student, other, divergence=divergence)
            assert abs(float(ours.loss)) < 1e-7
            assert float(ours.gradient.abs().max()) < 1e-7


# Strides


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "without the last position": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "without the first position": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "a slice of a wider head": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other position": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "both": lambda x: F.pad(x, (3, 6, 1, 0))[:, 1:, 3 : 3 + x.shape[-1]],
    "batch and time swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "4-D": lambda x: x.unflatten(0, (1, -1)),
    "4-D that needs a copy": lambda x: F.pad(x.unflatten(1, (2, 2)), (0, 0, 0, 1, 0, 1))[:, :2, :2],
    "one row expanded": lambda x: x[:1, :1].expand(3, 4, -1),
    "one sequence expanded": lambda x: x[:1].expand(3, -1, -1),
}
NEEDS_A_COPY = {"vocabulary first", "4-D that needs a copy"}


@every_engine
@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(engine: Engine, layout: str):
    student, teacher = (LAYOUTS[layout](x) for x in pair(engine, 3, 4, 31))
    expected = truth(student, teacher)
    assert (rows(student).tensor is student) == (layout not in NEEDS_A_COPY)
    leaf = student.detach().requires_grad_()  # grad of a view: the layout is kept
    with engine():
        (gradient,) = torch.autograd.grad(distillation_loss(leaf, teacher), leaf)
        assert_close(evaluate(student, teacher), expected, torch.float32)
        assert torch.equal(gradient, evaluate(student, teacher).gradient)
        if engine.slow and layout not in ("both", "vocabulary first"):
            return
        flat = topk_logprobs(teacher.contiguous(), 5)
        for ours, theirs in zip(topk_logprobs(teacher, 5)[:3], flat[:3], strict=True):
            assert torch.equal(ours, theirs)
        expected = evaluate(student.contiguous(), flat)
        ours = evaluate(student, TopKLogprobs(*(x.mT.contiguous().mT for x in flat[:2]), flat.residual))
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.gradient, expected.gradient)


def test_shifted_logits_are_not_copied():
    """``logits[:, :-1]`` cannot be viewed as rows of one stride; the kernels take two."""
    x = logits(3, 5, 31)[:, :-1]
    matrix = rows(x)
    assert matrix.tensor is x
    assert (matrix.count, matrix.inner, matrix.outer_stride, matrix.inner_stride) == (12, 4, 5 * 31, 31)


@quick_engine
def test_options_of_any_layout(engine: Engine):
    student, teacher = pair(engine, 3, 4, 31)
    mask = (torch.arange(12, device=engine.device).view(4, 3) % 3 > 0).T
    weight = torch.rand(4, 6, device=engine.device)[:, ::2].T
    with engine():
        strided = distillation_loss(student, teacher, mask=mask, weight=weight)
        assert torch.equal(
            strided, distillation_loss(student, teacher, mask=mask.contiguous(), weight=weight.contiguous())
        )


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every other one of a longer tensor, the rest of which is nonsense."""
    return torch.stack([x, x.flip(0)], -1)[..., 0]


@every_engine
def test_one_dimensional_options_with_strides(engine: Engine):
    """Kernels read options through their address: entries between those that are meant must not be."""
    student, teacher = pair(engine, 6, 31)
    options: dict[str, dict[str, Any]] = {
        "mask": {"mask": torch.arange(6) % 3 > 0},
        "labels": {"labels": torch.tensor([1, -100, 2, -100, -100, 3])},
        "weight": {"weight": torch.arange(6) / 3},
        "teacher_rows": {"teacher_rows": torch.tensor([5, 0, -1, 2, 2, 1])},
        "targets": {"targets": torch.tensor([3, 0, 30, 7, -100, 1]), "hard_weight": 0.5},
    }
    with engine():
        for name, dense in options.items():
            dense = to_device(dense, engine.device)
            assert not spread(dense[name]).is_contiguous()
            ours = evaluate(student, teacher, **{**dense, name: spread(dense[name])})
            expected = evaluate(student, teacher, **dense)
            assert torch.equal(ours.loss, expected.loss), name
            assert torch.equal(ours.gradient, expected.gradient), name
        one = torch.tensor(2.0, device=engine.device)
        ours, expected = (evaluate(student, teacher, weight=w) for w in (one.expand(6), one.repeat(6)))
        assert torch.equal(ours.loss, expected.loss)


@pytest.mark.smoke
@pytest.mark.parametrize(("vocab", "rise"), [(2100, 30.0), (2100, 70.0), (2100, 5000.0), (66_001, 70.0)])
@every_divergence
@quick_engine
def test_rows_whose_largest_logits_come_late(engine: Engine, divergence: str, vocab: int, rise: float):
    """What was folded before a larger logit turns up is rescaled, and so are exponentials that were kept; those of the
    longest rows are not."""
    student, teacher = pair(engine, 3, vocab)
    steps = rise * (torch.arange(vocab, device=engine.device) // (vocab // 3))
    for s, t in ((student + steps, teacher + steps), (student + steps, teacher), (student, teacher + steps.flip(0))):
        with engine():
            ours = evaluate(s, t, divergence=divergence)
        assert_close(ours, truth(s, t, divergence=divergence), torch.float32, slack=4.0)


def test_an_unaligned_row_start():
    """Vector loads begin wherever a row does."""
    for offset in range(9):
        for width in (15, 16, 17, 33):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                storage = logits(offset + 3 * width + 5, dtype=dtype)
                student = storage[offset : offset + 3 * width].view(3, width)
                teacher = logits(3, width, seed=2, dtype=dtype)
                assert_close(evaluate(student, teacher), truth(student, teacher), dtype)


# Determinism and threads


@quick_engine
@every_divergence
def test_the_same_input_gives_the_same_bits(engine: Engine, divergence: str):
    student, teacher = pair(engine, 64, 1030)
    with engine():
        stored = topk_logprobs(teacher, 20)
        for other in (teacher, stored):
            first, second = (evaluate(student, other, divergence=divergence) for _ in range(2))
            assert torch.equal(first.loss, second.loss)
            assert torch.equal(first.gradient, second.gradient)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(divergence: str, dtype: torch.dtype, threads: Callable[[int], None]):
    student, teacher = student_and_teacher(67, 3001, dtype=dtype)
    outcomes = []
    for count in (1, 2, 3):
        threads(count)
        stored = topk_logprobs(teacher, 20)
        outcomes.append([evaluate(student, other, divergence=divergence) for other in (teacher, stored)])
    for others in outcomes[1:]:
        for first, other in zip(outcomes[0], others, strict=True):
            assert torch.equal(first.loss, other.loss)
            assert torch.equal(first.gradient, other.gradient)


@quick_engine
def test_several_python_threads_at_once(engine: Engine):
    inputs = [pair(engine, 16, 500 + i) for i in range(8)]
    with engine():
        expected = [evaluate(*both) for both in inputs]
    barrier = threading.Barrier(4)

    def work(i: int) -> list[Any]:
        barrier.wait(30)
        with engine():
            return [evaluate(*inputs[j % 8]) for j in range(i, i + 24)]

    with ThreadPoolExecutor(4) as pool:
        for i, outcomes in enumerate(pool.map(work, range(4))):
            for j, ours in enumerate(outcomes):
                assert torch.equal(ours.loss, expected[(i + j) % 8].loss)
                assert torch.equal(ours.gradient, expected[(i + j) % 8].gradient)


def python(code: str, **environment: str) -> str:
    """What this code prints, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FORK = """
import os, warnings
import torch
from pyalign import distillation_loss, topk_logprobs
s, t = torch.randn(64, 5000, requires_grad=True), torch.randn(64, 5000)
def run():
    (gradient,) = torch.autograd.grad(distillation_loss(s, t, reduction={reduction!r}).sum(), s)
    return gradient
{before}
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    gradient = run()
    topk_logprobs(t, 50)
    torch.set_num_threads(1)  # torch's own ops would hang
    print("child", gradient.isfinite().all().item(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent", run().isfinite().all().item())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("before", ["", "run()"], ids=["first call", "after calls"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_calls_work_after_a_fork(before: str, reduction: str):
    """OpenMP's threads don't survive a fork, and waiting for them would hang."""
    assert python(FORK.format(before=before, reduction=reduction)).split() == ["child", "True", "parent", "True"]


THREADS = """
import os, numpy, torch
torch.set_num_threads({threads})
from pyalign import distillation_loss
count = lambda: len(os.listdir("/proc/self/task"))
s, t = (torch.from_numpy(numpy.ones((64, 5000), numpy.float32)) for _ in range(2))
{first}
before = count()
with torch.no_grad():
    distillation_loss(s, t)
print(count() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_torch_set_num_threads_is_obeyed_and_its_threads_are_shared():
    for threads, first, started in ((1, "", 0), (3, "", 2), (3, "s + t", 0)):
        code = THREADS.format(threads=threads, first=first)
        assert int(python(code, OMP_NUM_THREADS="2")) == started


ISA = """
import sys, torch
from pyalign import _C, distillation_loss, topk_distillation_loss, topk_logprobs
torch.manual_seed(0)
results = {"isa": _C.cpu.isa()}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    s, t = 3 * torch.randn(5, 1037, dtype=torch.float64), 3 * torch.randn(5, 1037, dtype=torch.float64)
    s, t = s.to(dtype).requires_grad_(), t.to(dtype)
    stored = topk_logprobs(t, 33)
    results[f"{dtype} topk"] = stored[:3]
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        for name, loss in (
            ("dense", distillation_loss(s, t, divergence=divergence, temperature=1.5)),
            ("entries", topk_distillation_loss(s, stored, divergence=divergence)),
        ):
            results[f"{dtype} {divergence} {name}"] = (loss.detach(), torch.autograd.grad(loss, s)[0])
torch.save(results, sys.argv[1] if len(sys.argv) > 1 else "{path}")
"""


def test_every_instruction_set_gives_the_same_results(tmp_path: Any):
    """What this machine can't run is said to be refused; what it can agrees with the plainest."""
    from pyalign import _C

    results: dict[str, dict[str, Any]] = {}
    for isa in _C.cpu.isas():
        path = tmp_path / isa
        python(ISA.replace("{path}", str(path)), PYALIGN_CPU_ISA=isa)
        results[isa] = torch.load(path)
        assert results[isa].pop("isa") == isa
    plainest = results.pop("baseline" if "baseline" in results else "neon")
    for isa, found in results.items():
        for case, expected in plainest.items():
            rounded = case.startswith(("torch.bfloat16", "torch.float16"))
            for ours, theirs in zip(found[case], expected, strict=True):
                coarse = rounded and ours.dtype in (torch.bfloat16, torch.float16)
                tolerance = {"rtol": 0.008, "atol": 1e-6} if coarse else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(
                    ours, theirs, **tolerance, msg=lambda text, isa=isa, case=case: f"{isa} {case}: {text}"
                )


def test_an_unknown_instruction_set_is_refused_by_name():
    call = "pyalign.topk_logprobs(torch.zeros(2), 1)"
    code = f"import torch, pyalign\ntry:\n    {call}\nexcept Exception as e:\n    print(e)"
    assert "PYALIGN_CPU_ISA: got 'sse9'; wanted one of " in python(code, PYALIGN_CPU_ISA="sse9")


# Beyond 2^31 elements


BIG = (17_000, 131_072)  # 2.2e9 elements, 4.5 GB in bfloat16


def big_student() -> Tensor:
    """bfloat16 logits of which only the last rows matter: those whose offsets don't fit 31 bits."""
    assert BIG[0] * BIG[1] > 2**31
    return torch.zeros(BIG, dtype=torch.bfloat16)


@pytest.mark.large
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_2_31_elements(inplace: bool):
    """Loss and gradient of the last rows, 64-bit offsets away from the first."""
    student = big_student()
    last, teacher = logits(1, BIG[1], seed=1, dtype=torch.bfloat16), logits(1, BIG[1], seed=2, dtype=torch.bfloat16)
    student[-1] = last[0]
    exact = truth(last, teacher)
    mask = torch.zeros(BIG[0], dtype=torch.bool)
    mask[-1] = True
    matched = torch.zeros(BIG[0], dtype=torch.int64)
    if inplace:
        leaf = torch.zeros((), requires_grad=True)
        student = _Attach.apply(student, leaf)
        loss = distillation_loss(student, teacher, teacher_rows=matched, mask=mask, inplace=True)
        gradient = student.detach()
    else:
        loss = distillation_loss(student.requires_grad_(), teacher, teacher_rows=matched, mask=mask)
        (gradient,) = torch.autograd.grad(loss, student)
    assert_close(exact._replace(loss=loss.detach(), gradient=gradient[-1:]), exact, torch.bfloat16)
    assert not gradient[:-1].any()


class _Attach(torch.autograd.Function):
    """Makes a tensor part of a graph without a copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None


@pytest.mark.large
@pytest.mark.usefixtures("unpoisoned")
def test_more_than_2_31_elements_of_a_teacher_and_topk():
    teacher = big_student()
    teacher[-1] = logits(BIG[1], seed=2, dtype=torch.bfloat16)
    student = logits(1, BIG[1], seed=1, dtype=torch.bfloat16)
    exact = truth(student, teacher[-1:])
    matched = torch.tensor([BIG[0] - 1])
    assert_close(evaluate(student, teacher, teacher_rows=matched), exact, torch.bfloat16)
    stored = topk_logprobs(teacher, 50)
    expected = topk_logprobs(teacher[-1:], 50)
    assert torch.equal(stored.logprobs[-1:], expected.logprobs)
    assert torch.equal(stored.indices[-1:], expected.indices)
    with torch.no_grad():
        loss = topk_distillation_loss(teacher, stored, reduction="none")
    assert float(loss.abs().max()) < 1e-6


@every_tail
@quick_engine
def test_missing_entries_are_as_if_they_were_not_stored(engine: Engine, tail: str):
    student, teacher = pair(engine, 3, 31)
    with engine():
        full = topk_logprobs(teacher, 4)
        missing = TopKLogprobs(
            F.pad(full.logprobs, (1, 2), value=-INF).contiguous(), F.pad(full.indices, (1, 2), value=-1), full.residual
        )
        expected, ours = (evaluate(student, x, tail=tail, return_metrics=True) for x in (full, missing))
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.gradient, expected.gradient)
    assert torch.equal(ours.metrics[1], expected.metrics[1])


@quick_engine
def test_a_row_without_any_entry(engine: Engine):
    """All mass is in the rest, on both sides: nothing to learn, and no NaN."""
    student, _ = pair(engine, 2, 31)
    empty = TopKLogprobs(
        torch.full((2, 3), -INF, device=engine.device), torch.full((2, 3), -1, device=engine.device),
        torch.zeros(2, device=engine.device),
    )  # fmt: skip
    with engine():
        for tail in ("bucket", "renormalize", "drop"):
            for stored in (empty, empty._replace(residual=None)):
                ours = evaluate(student, stored, tail=tail, reduction="none")
                assert float(ours.loss.abs().max()) < 1e-6
                assert float(ours.gradient.abs().max()) < 1e-6


@every_engine
def test_log_probs_and_residual_of_two_dtypes(engine: Engine):
    """Each is read in its own precision: a float32 residual isn't rounded to the log-probs' bfloat16."""
    student, teacher = pair(engine, 5, 31)
    with engine():
        stored = topk_logprobs(teacher, 4)
        mixed = TopKLogprobs(stored.logprobs.bfloat16(), stored.indices, stored.residual)
        assert_close(evaluate(student, mixed), truth(student, mixed), torch.float32)
        other = TopKLogprobs(stored.logprobs, stored.indices, stored.residual.half())
        assert_close(evaluate(student, other), truth(student, other), torch.float32)


@quick_engine
def test_renormalize_looks_at_the_entries_alone(engine: Engine):
    """Its loss and gradient are of the k entries: a NaN elsewhere in the row is none of its business."""
    student, teacher = pair(engine, 3, 31)
    with engine():
        stored = topk_logprobs(teacher, 4)
        expected = evaluate(student, stored, tail="renormalize")
        outside = torch.ones_like(student, dtype=torch.bool).scatter(-1, stored.indices, False)
        if engine.name != "reference":
            ours = evaluate(student.masked_fill(outside, float("nan")), stored, tail="renormalize")
            assert torch.equal(ours.loss, expected.loss)
            assert torch.equal(ours.gradient, expected.gradient)
        assert not expected.gradient[outside].any()


@pytest.mark.parametrize("k", [1, 5])
@every_engine
def test_all_entries_stored_without_a_residual(engine: Engine, k: int):
    """k = V and rounded log-probs: what rounding leaves over is no rest, for there is none."""
    student, teacher = pair(engine, 3, k)
    with engine():
        stored = topk_logprobs(teacher, k)
        rounded = TopKLogprobs(stored.logprobs.bfloat16() - 0.01, stored.indices)
        ours = evaluate(student, rounded)
        exact = distillation_loss(student, teacher)
    assert float(ours.loss) == pytest.approx(float(exact), abs=0.02)
    assert ours.gradient.isfinite().all()


def test_backend_errors_leave_no_state_behind():
    student, teacher = student_and_teacher(2, 5)
    for _ in range(2):
        with pytest.raises(ValueError, match="targets: row 0"):
            distillation_loss(student, teacher, targets=torch.tensor([9, 0]), hard_weight=0.5)
        assert pyalign.distillation_loss(student, teacher).isfinite()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without transparent huge pages"
)
def test_a_large_gradient_asks_for_huge_pages():
    """A fresh one's 4 KiB pages take longer to clear than its entries to compute."""
    student = logits(160, 32000, dtype=torch.float32).requires_grad_()
    distillation_loss(student, student.detach().flip(0)).backward()
    assert student.grad is not None
    middle = student.grad.data_ptr() + student.grad.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split(), line
            return
    pytest.fail("the gradient's mapping was not found")
