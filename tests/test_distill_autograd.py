"""Gradients: by finite differences, when they are computed, over several backward passes, in place, and not twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distill_support import (
    KERNELS,
    Engine,
    assert_close,
    evaluate,
    every_divergence,
    every_engine,
    every_kernel,
    every_tail,
    generator,
    logits,
    over,
    quick_engine,
    student_and_teacher,
    truth,
)
from torch import Tensor

import pyalign
from pyalign import _ops, distillation_loss, topk_distillation_loss, topk_logprobs

quick_kernel = over(tuple(engine for engine in KERNELS if not engine.slow))


def tensors(engine: Engine, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = student_and_teacher(4, 31, dtype=dtype, device=engine.device)
    return student.requires_grad_(), teacher


# Finite differences


@pytest.mark.parametrize("name", ["cpu", "reference"])
@every_divergence
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.7, "temperature_squared": True, "reduction": "none"},
        {"reduction": "sum", "weight": torch.tensor([0.5, 2.0, 0.0])},
        {"mask": torch.tensor([True, False, True]), "targets": torch.tensor([1, 2, -100]), "hard_weight": 0.4},
        {"vocab_size": 4, "num_items": 7, "teacher_rows": torch.tensor([2, -1, 0])},
    ],
    ids=["plain", "warm", "weight", "mask and targets", "rows and vocab_size"],
)
def test_gradient_by_finite_differences(name: str, divergence: str, options: dict[str, Any]):
    student, teacher = student_and_teacher(3, 6, dtype=torch.float64)
    with pyalign.backend(name):
        assert torch.autograd.gradcheck(
            lambda s: distillation_loss(s, teacher, divergence=divergence, **options), student.requires_grad_()
        )


@pytest.mark.parametrize("name", ["cpu", "reference"])
@every_divergence
@every_tail
@pytest.mark.parametrize("with_residual", [True, False])
def test_topk_gradient_by_finite_differences(name: str, divergence: str, tail: str, with_residual: bool):
    student, teacher = student_and_teacher(3, 6, dtype=torch.float64)
    stored = topk_logprobs(teacher, 3, temperature=1.3)
    stored = stored if with_residual else stored._replace(residual=None)
    targets = torch.tensor([0, 5, -100])
    with pyalign.backend(name):
        assert torch.autograd.gradcheck(
            lambda s: topk_distillation_loss(
                s, stored, divergence=divergence, tail=tail, targets=targets, hard_weight=0.3, reduction="none"
            ),
            student.requires_grad_(),
        )


# When gradients are computed


class Spy:
    """Counts what the raw ops are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.calls: list[tuple[str, bool, bool]] = []  # (name, wants a gradient, wants a loss)
        real = _ops.engine(engine.name)

        class Watched:
            def __getattr__(watched, name: str) -> Callable[..., Any]:
                def run(*arguments: Any, **options: Any) -> Any:
                    if "gradient" in options:
                        self.calls.append((name, options["gradient"] is not None, options["want_loss"]))
                    else:
                        self.calls.append((name, False, False))
                    return getattr(real, name)(*arguments, **options)

                return run

        monkeypatch.setattr(_ops, "engine", lambda name: Watched())

    def take(self) -> list[tuple[str, bool, bool]]:
        calls, self.calls = self.calls, []
        return calls


@every_kernel
@pytest.mark.smoke
def test_nothing_is_computed_for_a_frozen_student_or_without_grad_mode(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    student, teacher = tensors(engine)
    spy = Spy(monkeypatch, engine)
    with engine():
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not distillation_loss(student, teacher).requires_grad
        assert not distillation_loss(student.detach(), teacher).requires_grad
        assert not distillation_loss(student.detach(), teacher.clone().requires_grad_()).requires_grad
        assert not topk_distillation_loss(student.detach(), topk_logprobs(teacher, 3)).requires_grad
    assert not any(gradient for _, gradient, _ in spy.take())


@every_kernel
def test_a_scalar_loss_has_its_gradient_from_the_forward_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Backward is one scale kernel; a second loss pass would read both logits again."""
    student, teacher = tensors(engine)
    spy = Spy(monkeypatch, engine)
    with engine():
        loss = distillation_loss(student, teacher)
        assert spy.take() == [("distill", True, True)]
        loss.backward()
        assert spy.take() == [("scale", False, False)]


@every_kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_and_per_token_upstreams_compute_their_gradient_in_backward(
    engine: Engine, reduction: str, monkeypatch: pytest.MonkeyPatch
):
    student, teacher = tensors(engine, torch.float16 if reduction == "mean" else torch.float32)
    spy = Spy(monkeypatch, engine)
    with engine():
        loss = distillation_loss(student, teacher, reduction=reduction)
        assert spy.take() == [("distill", False, True)]
        loss.sum().backward()
        assert spy.take() == [("distill", True, False)]


@every_engine
def test_the_gradient_goes_to_the_student_alone(engine: Engine):
    student, teacher = tensors(engine)
    teacher.requires_grad_()
    with engine():
        distillation_loss(student, teacher).backward()
        topk_distillation_loss(student, topk_logprobs(teacher, 3)).backward()
    assert student.grad is not None
    assert teacher.grad is None


@every_engine
def test_metrics_are_detached(engine: Engine):
    student, teacher = tensors(engine)
    with engine():
        _, metrics = distillation_loss(student, teacher, return_metrics=True)
    assert not metrics.entropy.requires_grad
    assert metrics.agreement.dtype == torch.bool


# float16


@every_engine
@pytest.mark.smoke
def test_float16_gradients_of_many_tokens_do_not_flush_to_zero_before_a_scaler_can_save_them(engine: Engine):
    """1/N and q - p are each representable, their product is not: it must meet the scaler's factor before rounding."""
    student, teacher = logits(4, 64, seed=1, scale=0.01), logits(4, 64, seed=2, scale=0.01)
    student, teacher = student.half().to(engine.device), teacher.half().to(engine.device)
    scaler = torch.tensor(65536.0)
    for options in ({"num_items": 10**6}, {"num_items": torch.tensor(1e6)}):
        options = {key: x.to(engine.device) if isinstance(x, Tensor) else x for key, x in options.items()}
        exact = truth(student, teacher, scaler, **options)
        assert exact.gradient.abs().max() / scaler < 2.0**-25  # float16 has 0 for these
        with engine():
            ours = evaluate(student, teacher, scaler.to(engine.device), **options)
        assert ours.gradient.any()
        assert_close(ours, exact, torch.float16)


# Backward twice


@every_engine
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_backwards_over_a_retained_graph_are_both_right(engine: Engine, dtype: torch.dtype):
    """The first scales the stored gradient in place; later ones must not scale it again, nor return its memory."""
    student, teacher = tensors(engine, dtype)
    exact = truth(student, teacher, torch.tensor(3.0)).gradient.float()
    with engine():
        loss = distillation_loss(student, teacher)
        first, second, third = (
            torch.autograd.grad(loss, student, torch.tensor(3.0, device=engine.device), retain_graph=True)[0]
            for _ in range(3)
        )
    for gradient in (first, second, third):
        torch.testing.assert_close(gradient.cpu().float(), exact, rtol=0.01, atol=1e-5)
    assert torch.equal(second, third)
    assert len({x.data_ptr() for x in (first, second, third)}) == 3


@every_engine
def test_accumulation_over_two_backwards(engine: Engine):
    student, teacher = tensors(engine)
    with engine():
        loss = distillation_loss(student, teacher)
        loss.backward(retain_graph=True)
        assert student.grad is not None
        once = student.grad.clone()
        loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


@quick_engine
def test_a_third_party_scales_the_loss_before_and_after(engine: Engine):
    """Gradient accumulation, a scaler and a sum of losses: upstreams other than 1."""
    student, teacher = tensors(engine)
    with engine():
        one = torch.autograd.grad(distillation_loss(student, teacher), student)[0]
        both = distillation_loss(student, teacher) / 8 + 3 * distillation_loss(student * 2, teacher)
        other = torch.autograd.grad(distillation_loss(student * 2, teacher), student)[0]
        torch.testing.assert_close(torch.autograd.grad(both, student)[0], one / 8 + 3 * other)
        zero = torch.autograd.grad(distillation_loss(student, teacher) * 0, student)[0]
        assert not zero.any()


@quick_engine
def test_an_upstream_gradient_of_stride_0(engine: Engine):
    """What ``sum()`` and ``expand()`` send back for "none"."""
    student, teacher = tensors(engine)
    with engine():
        expected = torch.autograd.grad(distillation_loss(student, teacher, reduction="sum"), student)[0]
        loss = distillation_loss(student, teacher, reduction="none")
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), student)[0], expected)


# Version counters


@quick_kernel
def test_changing_an_input_before_a_second_backward_raises(engine: Engine):
    """Later backwards recompute from the inputs: torch's own version check guards every one of them."""
    for changed in ("student", "teacher", "weight", "mask"):
        leaf, teacher = tensors(engine)
        mask, weight = torch.ones(4, dtype=torch.bool, device=engine.device), torch.ones(4, device=engine.device)
        student = leaf * 1
        with engine():
            loss = distillation_loss(student, teacher, mask=mask, weight=weight)
            loss.backward(retain_graph=True)
            {"student": student.detach(), "teacher": teacher, "weight": weight, "mask": mask}[changed].zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@quick_kernel
def test_changing_an_input_before_a_backward_that_recomputes_raises(engine: Engine):
    leaf, teacher = tensors(engine)
    with engine():
        loss = distillation_loss(leaf * 1, teacher, reduction="none").sum()
        teacher.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@quick_kernel
def test_a_freed_graph_raises_as_torch_does(engine: Engine):
    student, teacher = tensors(engine)
    with engine():
        loss = distillation_loss(student, teacher)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


# In place


@every_kernel
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_in_place_gives_the_same_loss_and_gradient_over_the_logits(engine: Engine, dtype: torch.dtype, kind: str):
    leaf, teacher = tensors(engine, dtype)
    mask = torch.tensor([True, True, False, True], device=engine.device)
    function = distillation_loss if kind == "dense" else topk_distillation_loss
    with engine():
        other = teacher if kind == "dense" else topk_logprobs(teacher, 5)
        upstream = torch.tensor(0.5, device=engine.device)
        expected = function(leaf, other, mask=mask)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, upstream)
        student = leaf * 1
        loss = function(student, other, mask=mask, inplace=True)
        assert torch.equal(loss, expected)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        assert torch.equal(gradient, expected_gradient)
        assert torch.equal(student.detach(), expected_gradient)  # the logits' memory


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@every_kernel
def test_in_place_over_logits_of_two_strides(engine: Engine, upstream: float):
    leaf = logits(2, 5, 31, seed=1, device=engine.device).requires_grad_()
    teacher = logits(2, 4, 31, seed=2, device=engine.device)
    with engine():
        expected = torch.autograd.grad(upstream * distillation_loss(leaf[:, :-1], teacher), leaf)[0]
        whole = leaf * 1
        rest = whole[:, -1].clone()
        loss = upstream * distillation_loss(whole[:, :-1], teacher, inplace=True)
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient, expected)
    assert torch.equal(whole[:, -1], rest)  # the positions that were left out are not written


@quick_kernel
def test_in_place_refuses_a_view_of_a_parameter(engine: Engine):
    leaf, teacher = tensors(engine)
    before = leaf.detach().clone()
    with engine(), pytest.raises(ValueError, match="a view of a leaf that requires grad"):
        distillation_loss(leaf[..., :-1], teacher[..., :-1], inplace=True)
    assert torch.equal(leaf, before)


@quick_kernel
def test_in_place_logits_that_change_before_backward_raise(engine: Engine):
    """They hold the gradient by then."""
    leaf, teacher = tensors(engine)
    with engine():
        student = leaf * 1
        loss = distillation_loss(student, teacher, inplace=True)
        student.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@quick_kernel
def test_in_place_bumps_the_version_so_that_another_consumer_of_the_logits_gets_an_error(engine: Engine):
    leaf, teacher = tensors(engine)
    with engine():
        student = leaf * 1
        other = student.logsumexp(-1).sum()
        loss = distillation_loss(student, teacher, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other).backward()


@quick_kernel
def test_in_place_a_second_backward_raises(engine: Engine):
    leaf, teacher = tensors(engine)
    with engine():
        loss = distillation_loss(leaf * 1, teacher, inplace=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward needs the student's logits"):
            loss.backward()


@quick_kernel
def test_in_place_refuses_what_it_cannot_serve(engine: Engine):
    leaf, teacher = tensors(engine)
    with engine():
        for student, options, message in (
            (leaf, {}, "is a leaf that requires grad"),
            ((leaf * 1).T.contiguous().T, {}, "wanted a last stride of 1"),
            ((leaf[:, :1] * 1).expand(4, 31), {}, "wanted a last stride of 1, no stride of 0"),
            ((leaf[:1] * 1).expand(4, 31), {}, "no stride of 0"),
            (leaf * 1, {"reduction": "none"}, "wanted 'mean' or 'sum'"),
            ((leaf * 1).half(), {}, "other than float16"),
        ):
            with pytest.raises(ValueError, match="inplace: .*" + message):
                distillation_loss(student, teacher.to(student.dtype), inplace=True, **options)
    with pyalign.backend("reference"), pytest.raises(ValueError, match="inplace: the reference backend"):
        distillation_loss(leaf * 1, teacher, inplace=True)


@quick_kernel
def test_in_place_writes_nothing_where_no_gradient_is_needed(engine: Engine):
    leaf, teacher = tensors(engine)
    before = leaf.detach().clone()
    with engine(), torch.no_grad():
        distillation_loss(leaf, teacher, inplace=True)
        distillation_loss(leaf.detach(), teacher, inplace=True)
    assert torch.equal(leaf.detach(), before)


# Second derivatives and function transforms


@every_kernel
@pytest.mark.smoke
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_raises(engine: Engine, reduction: str):
    """Even where the upstream gradient is a constant, and the penalty would vanish silently."""
    student, teacher = tensors(engine)
    with engine():
        loss = distillation_loss(student, teacher, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()


def test_the_reference_has_second_derivatives():
    student, teacher = student_and_teacher(2, 5, dtype=torch.float64)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        with pyalign.backend("reference"):
            assert torch.autograd.gradgradcheck(
                lambda s, divergence=divergence: distillation_loss(s, teacher, divergence=divergence),
                student.requires_grad_(),
            )


@quick_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "return_metrics": True}])
def test_torch_func_grad(engine: Engine, dtype: torch.dtype, options: dict[str, Any]):
    student, teacher = tensors(engine, dtype)

    def loss(s: Tensor) -> Tensor:
        result = distillation_loss(s, teacher, **options)
        return result[0] if isinstance(result, tuple) else result

    with engine():
        expected = torch.autograd.grad(loss(student), student)[0]
        assert torch.equal(torch.func.grad(loss)(student.detach()), expected)
        gradient, value = torch.func.grad_and_value(loss)(student.detach())
        assert torch.equal(gradient, expected)
        assert torch.equal(value, loss(student))


@quick_kernel
def test_vmap_raises(engine: Engine):
    student, teacher = tensors(engine)
    with engine():
        with pytest.raises(RuntimeError, match="Batching rule not implemented for pyalign"):
            torch.func.vmap(distillation_loss)(student.detach(), teacher)
        with pytest.raises(RuntimeError, match="does not have vmap support"):
            torch.func.vmap(torch.func.grad(lambda s: distillation_loss(s, teacher[0])))(student.detach())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own formulas
def test_forward_mode_raises_or_is_right():
    """A kernel has no forward-mode derivative, and a tangent of zero would be a lie; the reference has one."""
    student, teacher = student_and_teacher(4, 31)
    tangent = torch.randn(4, 31, generator=generator(3))
    gradient = evaluate(student, teacher).gradient
    for engine in KERNELS:
        s, t, v = (x.to(engine.device) for x in (student, teacher, tangent))
        with engine():
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.func.jvp(lambda s, t=t: distillation_loss(s, t), (s,), (v,))
            with (
                torch.autograd.forward_ad.dual_level(),
                pytest.raises(RuntimeError, match="no forward-mode derivative"),
            ):
                distillation_loss(torch.autograd.forward_ad.make_dual(s, v), t)
    with pyalign.backend("reference"):
        _, forward = torch.func.jvp(lambda s: distillation_loss(s, teacher), (student,), (tangent,))
    torch.testing.assert_close(forward.float(), (gradient * tangent).sum())


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """The sizes in bytes of what ``torch.empty`` and its kin give out."""
    sizes: list[int] = []
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def watch(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **options: Any) -> Tensor:
            x = allocate(*arguments, **options)
            sizes.append(x.nbytes)
            return x

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, function in real.items():
            patch.setattr(torch, name, watch(function))
        yield sizes


@quick_kernel
def test_the_extra_memory_is_one_gradient_and_a_few_numbers_per_token(engine: Engine):
    student = logits(64, 5000, seed=1, device=engine.device).requires_grad_()
    teacher = logits(64, 5000, seed=2, device=engine.device)
    with engine():
        stored = topk_logprobs(teacher, 50)
        for function, other in ((distillation_loss, teacher), (topk_distillation_loss, stored)):
            with allocations() as sizes:
                torch.autograd.grad(function(student, other), student)
            assert sizes.count(student.nbytes) == 1
            assert sum(sizes) - student.nbytes <= 64 * 4 * 60
            with allocations() as sizes, torch.no_grad():
                function(student, other)
            assert sum(sizes) <= 64 * 4 * 60


@quick_kernel
def test_gradients_flow_through_views_of_the_student(engine: Engine):
    """Through the shift that a trainer makes, a slice of the vocabulary and a cast."""
    leaf = logits(2, 6, 40, seed=1, device=engine.device).requires_grad_()
    teacher = logits(2, 5, 31, seed=2, device=engine.device)
    with engine():
        (ours,) = torch.autograd.grad(distillation_loss(leaf[:, 1:, 4:35].bfloat16(), teacher), leaf)
    exact = truth(leaf[:, 1:, 4:35].bfloat16(), teacher).gradient
    torch.testing.assert_close(ours[:, 1:, 4:35].cpu().double(), exact, rtol=0.01, atol=1e-6)
    assert not ours[:, 0].any()
    assert not ours[..., :4].any()


def test_random_upstreams_for_every_reduction():
    student, teacher = student_and_teacher(16, 31)
    for reduction in ("mean", "sum", "none"):
        shape = (16,) if reduction == "none" else ()
        upstream = torch.randn(shape, generator=generator(7))
        ours = evaluate(student, teacher, upstream, reduction=reduction)
        assert_close(ours, truth(student, teacher, upstream, reduction=reduction), torch.float32)
