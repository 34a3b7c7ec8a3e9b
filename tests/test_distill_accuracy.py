"""Our error against float64 is no larger than plain torch's on the inputs upcast to float32, plus a stated epsilon.

And near convergence, where losses are 1e-6 and their gradients differences of nearly equal probabilities; with stored
log-probabilities that were rounded; where probabilities underflow; and over the vocabularies of real models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distill_support import (
    DIVERGENCES,
    ENGINES,
    ROUNDING,
    Engine,
    Outcome,
    assert_close,
    evaluate,
    every_divergence,
    every_engine,
    every_kernel,
    logits,
    name_of,
    one_thread,
    to_device,
    to_float64,
    truth,
    within,
)
from torch import Tensor
from torch.nn import functional as F

from pyalign import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs

CPU = ENGINES[0]
FLOAT = 2.0**-24  # half the distance of neighbouring float32, relative
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


# What torch's user writes


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(...) KL(p || q)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def plain_divergence(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """(...) of log-probabilities (..., V), beta = 1/2."""
    if divergence == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))
    return kl(log_p, log_q) if divergence == "forward_kl" else kl(log_q, log_p)


def bucket(log_q: Tensor, teacher: TopKLogprobs) -> tuple[Tensor, Tensor]:
    """(..., k + 1) student's and teacher's log-probabilities of the entries and of all the rest."""
    assert teacher.residual is not None
    rest_q = log_q.scatter(-1, teacher.indices, -math.inf).logsumexp(-1, keepdim=True)
    return (
        torch.cat([log_q.gather(-1, teacher.indices), rest_q], -1),
        torch.cat([teacher.logprobs, teacher.residual[..., None]], -1),
    )


def plain_loss(student: Tensor, teacher: Tensor | TopKLogprobs, divergence: str, tail: str = "bucket") -> Tensor:
    """(...) per token, in the dtype of its inputs."""
    log_q = student.log_softmax(-1)
    if not isinstance(teacher, TopKLogprobs):
        return plain_divergence(teacher.log_softmax(-1), log_q, divergence)
    log_p, on_s = teacher.logprobs, log_q.gather(-1, teacher.indices)
    if tail == "drop":
        return plain_divergence(log_p, on_s, divergence)
    if tail == "renormalize":
        return plain_divergence(log_p.log_softmax(-1), on_s.log_softmax(-1), divergence)
    log_q, log_p = bucket(log_q, teacher)
    return plain_divergence(log_p.log_softmax(-1), log_q, divergence)


def upcast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, TopKLogprobs):
        assert x.residual is not None
        return x._replace(logprobs=x.logprobs.to(dtype), residual=x.residual.to(dtype))
    return x.to(dtype)


def plain(student: Tensor, teacher: Any, dtype: torch.dtype, **options: Any) -> Outcome:
    """Loss and gradient of each token by torch, computed in ``dtype``; the gradient comes back in the student's."""
    leaf = student.detach().requires_grad_()
    loss = plain_loss(leaf.to(dtype), upcast(teacher, dtype), **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return Outcome(loss.detach(), gradient)


# Comparisons


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def assert_no_worse(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, scale: Tensor, excuse: float = 0.0) -> None:
    """The RMS error is at most torch's plus 2 roundings of float32 of the RMS of ``scale``; the largest error at most
    torch's plus 8 of its largest.
    """
    ours, theirs = ((to_float64(x) - exact).abs() for x in (ours, theirs))
    for measure, roundings in ((rms, 2), (largest, 8)):
        allowed = measure(theirs) + roundings * FLOAT * measure(scale) + excuse
        report = f"{name}: {measure.__name__} error {measure(ours):.3e}, torch's {measure(theirs):.3e}"
        assert measure(ours) <= allowed, f"{report}, allowed {allowed:.3e}"


def probabilities(student: Tensor, teacher: Any) -> Tensor:
    """(N, V) p + q: what a gradient is a difference of."""
    q = student.double().softmax(-1)
    if isinstance(teacher, TopKLogprobs):
        return q.scatter_add(-1, teacher.indices, teacher.logprobs.double().exp())
    return q + teacher.double().softmax(-1)


def mass_at_the_kink(student: Tensor, teacher: Any) -> float:
    """The largest probability that a row has in categories where float32 can't tell the sign of p - q: a wrong one
    moves the gradient of total variation by as much.
    """
    log_q, log_p = student.double().log_softmax(-1), teacher
    if isinstance(teacher, TopKLogprobs):
        log_q, log_p = bucket(log_q, upcast(teacher, torch.float64))
    log_p = log_p.double().log_softmax(-1)
    return largest(log_q.exp().masked_fill((log_q - log_p).abs() > 1e-6, 0.0).sum(-1))


def assert_no_worse_than_torch(engine: Engine, student: Tensor, teacher: Any, **options: Any) -> None:
    """Of the losses and, rounded to the student's dtype as ours are, of the gradients."""
    with one_thread():
        exact = truth(student, teacher, reduction="none", **options)
        theirs = plain(student, teacher, torch.float32, **options)
        scale = probabilities(student, teacher)
        if options["divergence"] == "reverse_kl":
            scale = scale * (1 + exact.loss[:, None])  # q (d - D), where log-ratios d are of the size of their mean D
        excuse = mass_at_the_kink(student, teacher) if options["divergence"] == "tvd" else 0.0
    with engine():
        ours = evaluate(
            to_device(student, engine.device), to_device(teacher, engine.device), reduction="none", **options
        )
    assert_no_worse("loss", ours.loss, theirs.loss, exact.loss, 1 + exact.loss.abs())
    assert_no_worse("gradient", ours.gradient, theirs.gradient, exact.gradient, scale, excuse)


# Against plain torch


def shape_of(engine: Engine) -> tuple[int, int]:
    return (3, 515) if engine.slow else (32, 515)


def far(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return logits(rows, vocab, seed=1, dtype=dtype), logits(rows, vocab, seed=2, dtype=dtype)


def peaked(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return logits(rows, vocab, seed=1, dtype=dtype, scale=10.0), logits(rows, vocab, seed=2, dtype=dtype, scale=10.0)


def close(rows: int, vocab: int, dtype: torch.dtype, noise: float = 1.0, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """A student that is the teacher and noise, before both are rounded to ``dtype``."""
    teacher = logits(rows, vocab, seed=2, dtype=torch.float64) + mean
    student = teacher + logits(rows, vocab, seed=3, dtype=torch.float64, scale=noise)
    return student.to(dtype), teacher.to(dtype)


def converged(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return close(rows, vocab, dtype, noise=1e-3, mean=100.0)


PAIRS = (far, peaked, close, converged)


def cases(losses: list[tuple[str, ...]]) -> Iterator[Any]:
    """Every engine, loss, pair and dtype; in Triton's interpreter two pairs for every loss, in one dtype each."""
    for engine in ENGINES:
        for n, loss in enumerate(losses):
            for i, pair in enumerate(PAIRS):
                for j, dtype in enumerate(DTYPES):
                    if not engine.slow or ((n + i) % 2 == 0 and (n + i + j) % 3 == 0):
                        name = "-".join([engine.name, *loss, pair.__name__, str(dtype)[6:]])
                        yield pytest.param(engine, *loss, pair, dtype, id=name)


DENSE: list[tuple[str, ...]] = [(divergence,) for divergence in DIVERGENCES]
TOPK = [*((divergence, "bucket") for divergence in DIVERGENCES), ("forward_kl", "renormalize"), ("forward_kl", "drop")]


@pytest.mark.parametrize(("engine", "divergence", "pair", "dtype"), list(cases(DENSE)))
def test_the_errors_of_loss_and_gradient_are_no_larger_than_torchs(
    engine: Engine, divergence: str, pair: Any, dtype: torch.dtype
):
    assert_no_worse_than_torch(engine, *pair(*shape_of(engine), dtype), divergence=divergence)


@pytest.mark.parametrize(("engine", "divergence", "tail", "pair", "dtype"), list(cases(TOPK)))
def test_the_errors_of_a_topk_loss_and_its_gradient_are_no_larger_than_torchs(
    engine: Engine, divergence: str, tail: str, pair: Any, dtype: torch.dtype
):
    student, teacher = pair(*shape_of(engine), dtype)
    stored = upcast(topk_logprobs(teacher.double(), 50), torch.float32)
    assert_no_worse_than_torch(engine, student, stored, divergence=divergence, tail=tail)


@every_divergence
def test_what_torchs_user_writes_is_the_reference_in_float64(divergence: str):
    """The two sides of the comparisons above compute the same function."""
    student, teacher = far(4, 1030, torch.float64)
    stored = topk_logprobs(teacher, 50)
    for other, tails in ((teacher, ("bucket",)), (stored, ("bucket", "renormalize", "drop"))):
        for tail in tails:
            ours = plain(student, other, torch.float64, divergence=divergence, tail=tail)
            options = {} if other is teacher else {"tail": tail}
            exact = truth(student, other, divergence=divergence, reduction="none", **options)
            torch.testing.assert_close(ours[:2], exact[:2], rtol=1e-12, atol=1e-13)


# Near convergence


@every_kernel
@every_divergence
def test_losses_of_a_millionth_are_not_negative_and_right_to_a_hundred_thousandth(engine: Engine, divergence: str):
    """Logits of mean 100: a difference of log-sum-exps errs by 7e-6 there, ten times the loss."""
    student, teacher = converged(*((3, 2050) if engine.slow else (4, 128256)), torch.float32)
    exact = truth(student, teacher, divergence=divergence, reduction="none")
    assert (exact.loss < 1e-3).all() if divergence == "tvd" else ((exact.loss > 1e-8) & (exact.loss < 1e-6)).all()
    student, teacher = student.to(engine.device), teacher.to(engine.device)
    with engine():
        ours = evaluate(student, teacher, divergence=divergence, reduction="none")
        mean = distillation_loss(student, teacher, divergence=divergence)
    assert (ours.loss >= 0).all()
    within("loss", ours.loss, exact.loss, 1e-5 * exact.loss)
    within("mean", mean, exact.loss.mean(), 1e-5 * exact.loss.mean())
    error = (to_float64(ours.gradient) - exact.gradient).norm() / exact.gradient.norm()
    assert error < (1e-2 if divergence == "tvd" else 2e-4), error  # p - q of what differs by 1e-3, and a kink


@every_kernel
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_bfloat16_gradients_near_convergence_are_the_true_ones_rounded_once(engine: Engine, divergence: str):
    """A softmax rounded to bfloat16 before its difference is taken is off by per cents (Liger #1432)."""
    student, teacher = close(4, 1030, torch.bfloat16, noise=0.02)
    exact = truth(student, teacher, divergence=divergence, reduction="none").gradient
    student, teacher = student.to(engine.device), teacher.to(engine.device)
    with engine():
        ours = to_float64(evaluate(student, teacher, divergence=divergence, reduction="none").gradient)

    def error(gradient: Tensor) -> float:
        return float((gradient.double() - exact).norm() / exact.norm())

    assert error(ours) <= error(exact.bfloat16()) + 1e-5
    assert error(ours) < ROUNDING[torch.bfloat16]
    if divergence == "forward_kl":  # the data shows the trap
        assert error((student.softmax(-1) - teacher.softmax(-1)).cpu()) > 0.02


@every_kernel
@every_divergence
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_losses_of_rounded_logits_near_convergence_are_not_negative(
    engine: Engine, divergence: str, dtype: torch.dtype
):
    if engine.slow and dtype != torch.bfloat16:
        pytest.skip("as bfloat16, in Triton's interpreter")
    for noise in (0.0, 1e-2) if engine.slow else (0.0, 1e-4, 1e-2):
        student, teacher = close(*shape_of(engine), dtype, noise=noise)
        exact = truth(student, teacher, divergence=divergence, reduction="none")
        with engine():
            ours = evaluate(
                student.to(engine.device), teacher.to(engine.device), divergence=divergence, reduction="none"
            )
        assert (ours.loss >= 0).all()
        # Total variation is of first order: each |p - q| bears the normalisers' rounding.
        within("loss", ours.loss, exact.loss, 1e-5 * exact.loss + (4 * FLOAT if divergence == "tvd" else 1e-12))


# Stored log-probabilities that were rounded


@every_kernel
@every_divergence
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("stored", HALVES, ids=name_of)
def test_rounded_entries_make_no_loss_negative_and_keep_its_gradient(
    engine: Engine, divergence: str, tail: str, stored: torch.dtype
):
    """The categories are renormalised: the bare sum over rounded ones is negative, and a clamp has no gradient."""
    if engine.slow and (stored, tail) != (torch.bfloat16, "bucket"):
        pytest.skip("as bfloat16 in a bucket, in Triton's interpreter")
    for k in (50,) if engine.slow else (2, 50):
        teacher = logits(3 if engine.slow else 16, 515, seed=2)
        top = topk_logprobs(teacher, k)
        assert top.residual is not None
        rounded = top._replace(logprobs=top.logprobs.to(stored), residual=top.residual.to(stored))
        exact = truth(teacher, rounded, divergence=divergence, tail=tail, reduction="none")
        with engine():
            ours = evaluate(
                teacher.to(engine.device), to_device(rounded, engine.device), divergence=divergence, tail=tail,
                reduction="none",
            )  # fmt: skip
        assert (ours.loss >= 0).all()
        within("loss", ours.loss, exact.loss, 1e-3 * exact.loss + (4 * FLOAT if divergence == "tvd" else 1e-9))
        error = (to_float64(ours.gradient) - exact.gradient).norm() / exact.gradient.norm()
        assert error < 1e-3
        assert ours.gradient.any(-1).all()


@pytest.mark.parametrize("stored", HALVES, ids=name_of)
def test_the_bare_sum_over_rounded_categories_is_negative(stored: torch.dtype):
    """The trap of the test above is real: without the renormalisation even float64 falls below 0."""
    teacher = logits(16, 515, seed=2, dtype=torch.float64)
    log_p, indices, rest_p, _ = topk_logprobs(teacher, 50)
    assert rest_p is not None
    log_q = torch.cat([log_p, rest_p[:, None]], -1)
    assert (kl(log_q.to(stored).double(), log_q) < 0).any()
    bucket = topk_distillation_loss(
        teacher, TopKLogprobs(log_p.to(stored), indices, rest_p.to(stored)), reduction="none"
    )
    assert (bucket >= 0).all()


# Probabilities that underflow


@every_engine
@every_dtype
def test_the_jsd_is_finite_and_right_where_both_probabilities_underflow(engine: Engine, dtype: torch.dtype):
    """Logits spread over 800: m = (p + q) / 2 is 0 in float32, its logarithm isn't (Liger #1453)."""
    student, teacher = (logits(4, 515, seed=seed, dtype=dtype, scale=100.0) for seed in (1, 2))
    student[2:, :5], teacher[2:, :5] = 1000.0, 1000.0  # and here both agree on where the mass is
    mixed = (student.float().softmax(-1) + teacher.float().softmax(-1)) / 2
    assert (mixed == 0).sum() > 1000
    exact = truth(student, teacher, divergence="jsd", reduction="none")
    with engine():
        ours = evaluate(student.to(engine.device), teacher.to(engine.device), divergence="jsd", reduction="none")
    assert ours.gradient.isfinite().all()
    assert_close(ours, exact, dtype)
    torch.testing.assert_close(exact.loss, torch.tensor([math.log(2)] * 2 + [0.0] * 2).double(), rtol=0, atol=1e-3)


@every_engine
@every_dtype
@pytest.mark.parametrize("padded", ["both", "student", "student more"])
def test_a_reverse_kl_looks_at_no_entry_that_the_student_excludes(engine: Engine, dtype: torch.dtype, padded: str):
    """q log q is 0 at q = 0: heads padded with -inf have a finite loss and gradient (trl#5594)."""
    if engine.slow and dtype != torch.float32:
        pytest.skip("as float32, in Triton's interpreter")
    student, teacher = logits(4, 515, seed=1, dtype=dtype), logits(4, 515, seed=2, dtype=dtype)
    student[:, 500:] = -math.inf
    if padded != "student":
        teacher[:, 500 if padded == "both" else 507 :] = -math.inf
    log_q, log_p = student[:, :500].double().log_softmax(-1), teacher.double().log_softmax(-1)[:, :500]
    loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    gradient = log_q.exp() * (log_q - log_p - loss[:, None])
    exact = Outcome(loss, F.pad(gradient, (0, 15)))
    with engine():
        ours = evaluate(student.to(engine.device), teacher.to(engine.device), divergence="reverse_kl", reduction="none")
    assert_close(ours, exact, dtype, slack=2)
    assert not ours.gradient[:, 500:].any()


# Vocabularies of real models


REAL = (32000, 50257, 128256, 151936)


@pytest.mark.parametrize("vocab", REAL)
@every_divergence
def test_real_vocabularies_are_no_worse_than_torch(vocab: int, divergence: str):
    assert_no_worse_than_torch(CPU, *converged(2, vocab, torch.float32), divergence=divergence)
    if divergence == "forward_kl":
        assert_no_worse_than_torch(CPU, *far(2, vocab, torch.bfloat16), divergence=divergence)


@pytest.mark.parametrize("vocab", REAL)
@pytest.mark.parametrize(
    ("k", "divergence", "pair", "dtype"),
    [
        (50, "forward_kl", converged, torch.float32),
        (50, "jsd", close, torch.float16),
        (256, "forward_kl", far, torch.bfloat16),
        (256, "reverse_kl", close, torch.float32),
    ],
    ids=["50", "50-jsd", "256", "256-reverse_kl"],
)
def test_topk_losses_of_real_vocabularies_are_no_worse_than_torch(
    vocab: int, k: int, divergence: str, pair: Any, dtype: torch.dtype
):
    student, teacher = pair(2, vocab, dtype)
    assert_no_worse_than_torch(CPU, student, topk_logprobs(teacher, k), divergence=divergence, tail="bucket")


@every_dtype
def test_topk_logprobs_of_the_largest_vocabulary(dtype: torch.dtype):
    """V = 262144 and k = 256: entries, order among equals and the residual, right to a rounding of float32."""
    vocab, k = 262144, 256
    x = logits(4, vocab, dtype=dtype)
    x[1] = x[1].sort().values  # every entry is larger than all before it
    x[2] = 8 * x[2]
    x[3, vocab - k :] = 60.0  # all of the mass in k equals, and the rest at 1e-20
    logprobs, indices, residual, _ = topk_logprobs(x, k)
    assert residual is not None
    order = x.double().sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(indices, order[:, :k])
    exact = x.double().log_softmax(-1)
    inside, outside = exact.gather(-1, order[:, :k]), exact.gather(-1, order[:, k:]).logsumexp(-1)
    within("logprobs", logprobs, inside, 4 * FLOAT * (1 + inside.abs()))
    within("residual", residual, outside, 4 * FLOAT * (1 + outside.abs()))
    assert float(outside[3]) < -40
    assert float(1 - logprobs[3].double().exp().sum()) == pytest.approx(0.0, abs=1e-6)  # one minus a sum can't know
