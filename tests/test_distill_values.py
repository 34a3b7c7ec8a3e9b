"""Losses and gradients of every backend against plain torch in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distill_support import (
    DIVERGENCES,
    DTYPES,
    ENGINES,
    TAILS,
    Engine,
    assert_close,
    evaluate,
    every_divergence,
    every_engine,
    every_tail,
    generator,
    logits,
    name_of,
    quick_engine,
    student_and_teacher,
    to_device,
    truth,
    within,
)
from torch import Tensor
from torch.nn import functional as F

import pyalign
from pyalign import TopKLogprobs

SHAPES = ((1,), (2, 2), (3, 31), (2, 3, 257), (2, 1, 3, 1030))
LONG = ((2, 32000), (2, 50257), (2, 128256), (2, 151936))

# Options of the losses by name; those whose value is a tensor are made by ``options_of``.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum at T = 2.5": {"reduction": "sum", "temperature": 2.5},
    "none at T = 0.5, squared": {"reduction": "none", "temperature": 0.5, "temperature_squared": True},
    "mask": {"mask": ...},
    "mask of integers, num_items": {"integer_mask": ..., "num_items": 7},
    "labels": {"labels": ..., "reduction": "none"},
    "weight, own ignore_index": {"labels": ..., "ignore_index": 1, "weight": ...},
    "teacher_rows": {"teacher_rows": ...},
    "targets": {"targets": ..., "hard_weight": 0.25, "temperature": 2.0, "temperature_squared": True},
    "targets alone": {"targets": ..., "hard_weight": 1.0, "reduction": "sum"},
    "metrics": {"return_metrics": True, "temperature": 1.5, "mask": ...},
    "all at once": {
        "mask": ..., "labels": ..., "teacher_rows": ..., "weight": ..., "targets": ..., "hard_weight": 0.5,
        "temperature": 0.7, "temperature_squared": True, "num_items": torch.tensor(3), "return_metrics": True,
    },
}  # fmt: skip


def options_of(name: str, shape: tuple[int, ...], teacher_count: int) -> dict[str, Any]:
    options, tokens, vocab, random = dict(OPTIONS[name]), shape[:-1], shape[-1], generator(3)
    if "mask" in options:
        options["mask"] = torch.rand(tokens, generator=random) < 0.7
    if options.pop("integer_mask", None):
        options["mask"] = torch.randint(0, 3, tokens, generator=random)
    if "labels" in options:
        options["labels"] = torch.randint(0, 3, tokens, generator=random)
        options["labels"][options["labels"] == 2] = options.get("ignore_index", -100)
    if "teacher_rows" in options:
        options["teacher_rows"] = torch.randint(-1, teacher_count, tokens, generator=random)
    if "weight" in options:
        options["weight"] = torch.rand(tokens, generator=random) * 2
    if "targets" in options:
        targets = torch.randint(0, vocab, tokens, generator=random)
        options["targets"] = targets.where(
            torch.rand(tokens, generator=random) < 0.7, options.get("ignore_index", -100)
        )
    return options


def upstream_of(options: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    if options.get("reduction") == "none":
        return torch.rand(shape[:-1], generator=generator(4)) + 0.5
    return torch.tensor(0.37)


def dense_cases() -> Iterator[Any]:
    """All combinations for compiled kernels; enough for every pair of values in Triton's interpreter."""
    for engine in ENGINES:
        for d, divergence in enumerate(DIVERGENCES):
            for t, dtype in enumerate(DTYPES):
                for s, shape in enumerate(SHAPES):
                    for o, options in enumerate(OPTIONS):
                        period = len(OPTIONS) if engine.slow else 4 if engine.name == "reference" else 1
                        if not engine.serves(dtype) or (o + 4 * t + 3 * s + d) % period:
                            continue
                        marks = [pytest.mark.smoke] if s == 2 and (t == 0 or o == 0) else []
                        yield pytest.param(engine, divergence, dtype, shape, options, marks=marks)


@pytest.mark.parametrize(("engine", "divergence", "dtype", "shape", "options"), list(dense_cases()), ids=name_of)
def test_distillation_loss_and_gradient(
    engine: Engine, divergence: str, dtype: torch.dtype, shape: tuple[int, ...], options: str
):
    chosen = {"divergence": divergence, **options_of(options, shape, 5)}
    student, teacher = student_and_teacher(*shape, dtype=dtype)
    if "teacher_rows" in chosen:
        teacher = logits(5, shape[-1], seed=2, dtype=dtype)
    upstream = upstream_of(chosen, shape)
    exact = truth(student, teacher, upstream, **chosen)
    student, teacher, chosen = (to_device(x, engine.device) for x in (student, teacher, chosen))
    with engine():
        ours = evaluate(student, teacher, upstream.to(engine.device), **chosen)
    assert_close(ours, exact, dtype)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", LONG, ids=name_of)
def test_vocabularies_of_real_models(divergence: str, dtype: torch.dtype, shape: tuple[int, ...]):
    student, teacher = student_and_teacher(*shape, dtype=dtype)
    ours = evaluate(student, teacher, divergence=divergence)
    assert_close(ours, truth(student, teacher, divergence=divergence), dtype)


@every_engine
@every_divergence
@pytest.mark.smoke
def test_teacher_of_another_dtype(engine: Engine, divergence: str):
    for student_dtype, teacher_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        student = logits(3, 31, seed=1, dtype=student_dtype, device=engine.device)
        teacher = logits(3, 31, seed=2, dtype=teacher_dtype, device=engine.device)
        with engine():
            ours = evaluate(student, teacher, divergence=divergence)
        assert_close(ours, truth(student, teacher, divergence=divergence), student_dtype)


@every_engine
@pytest.mark.smoke
def test_float64_beside_float32(engine: Engine):
    """A teacher in float64 is rounded for a float32 student; one in float32 is exact in float64."""
    if not engine.serves(torch.float64):
        pytest.skip("float64 goes to the reference")
    student, teacher = student_and_teacher(3, 31, dtype=torch.float64)
    with engine():
        assert_close(evaluate(student, teacher.float()), truth(student, teacher.float()), torch.float64)
        assert_close(evaluate(student.float(), teacher), truth(student.float(), teacher), torch.float32)


@every_engine
@every_divergence
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("student_width", "teacher_width", "vocab"), [(31, 31, 20), (40, 33, 33), (33, 64, 17), (31, 31, 1)]
)
def test_vocab_size_limits_both_sides(
    engine: Engine, divergence: str, student_width: int, teacher_width: int, vocab: int
):
    """Padded heads: both softmaxes over the shared prefix, and no gradient beyond it, whatever stands there."""
    if engine.slow and divergence in ("reverse_kl", "tvd"):
        pytest.skip("as the others, in Triton's interpreter")
    student, teacher = logits(3, student_width, seed=1), logits(3, teacher_width, seed=2)
    exact = truth(student[:, :vocab], teacher[:, :vocab], divergence=divergence, targets=torch.tensor([0, 0, -100]),
                  hard_weight=0.5, temperature=2.0)  # fmt: skip
    student[:, vocab:], teacher[:, vocab:] = math.nan, math.inf
    student, teacher = student.to(engine.device), teacher.to(engine.device)
    with engine():
        ours = evaluate(student, teacher, divergence=divergence, vocab_size=vocab, hard_weight=0.5, temperature=2.0,
                        targets=torch.tensor([0, 0, -100], device=engine.device))  # fmt: skip
    assert not ours.gradient[:, vocab:].any()
    assert_close(ours._replace(gradient=ours.gradient[:, :vocab]), exact, torch.float32)


# Top-k


STORED = (torch.float32, torch.bfloat16, torch.float16)


def stored_teacher(
    *shape: int, k: int, dtype: torch.dtype, wide: bool, with_residual: bool, missing: bool, temperature: float
) -> TopKLogprobs:
    """A teacher as a store has it: k rounded log-probs, some of them missing."""
    with pyalign.backend("reference"):
        logprobs, indices, residual, _ = pyalign.topk_logprobs(logits(*shape, seed=2), k, temperature=temperature)
    assert residual is not None
    if missing:
        gone = torch.rand(indices.shape, generator=generator(5)) < 0.25
        gone[..., 0] = False
        residual = torch.logaddexp(residual, logprobs.masked_fill(~gone, -math.inf).logsumexp(-1))
        logprobs, indices = logprobs.masked_fill(gone, -math.inf), indices.masked_fill(gone, -1)
    indices = indices if wide else indices.int()
    return TopKLogprobs(logprobs.to(dtype), indices, residual.to(dtype) if with_residual else None, temperature)


def topk_cases() -> Iterator[Any]:
    sizes = (((2,), 1), ((3, 31), 1), ((3, 31), 7), ((2, 3, 257), 50), ((2, 3, 1030), 130), ((2, 5), 5))
    names = [name for name in OPTIONS if name not in ("labels", "mask of integers, num_items")]
    number = 0
    for engine in ENGINES:
        for d, divergence in enumerate(DIVERGENCES):
            for a, tail in enumerate(TAILS):
                for t, dtype in enumerate(DTYPES):
                    for s, (shape, k) in enumerate(sizes):
                        for o, options in enumerate(names):
                            number += 1
                            period = len(names) if engine.slow else 5
                            if not engine.serves(dtype) or (o + s + t + 2 * a + d) % period:
                                continue
                            if engine.slow and (s + a + d) % 2 and s != 3:
                                continue
                            marks = [pytest.mark.smoke] if s in (2, 5) and t == d else []
                            stored = STORED[(s + o) % 3]
                            yield pytest.param(
                                engine, divergence, tail, dtype, shape, k, options, stored, number % 2 == 0,
                                number % 3 > 0, number % 4 == 1, marks=marks,
                            )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "divergence", "tail", "dtype", "shape", "k", "options", "stored", "wide", "with_residual", "missing"),
    list(topk_cases()),
    ids=name_of,
)
def test_topk_distillation_loss_and_gradient(
    engine: Engine, divergence: str, tail: str, dtype: torch.dtype, shape: tuple[int, ...], k: int, options: str,
    stored: torch.dtype, wide: bool, with_residual: bool, missing: bool,
):  # fmt: skip
    chosen = {"divergence": divergence, "tail": tail, **options_of(options, shape, 5)}
    temperature = chosen.get("temperature", 1.0)
    if k == shape[-1]:  # nothing is outside: rounded entries would say that something is
        with_residual, missing = True, False
    rows = (5, shape[-1]) if "teacher_rows" in chosen else shape
    teacher = stored_teacher(
        *rows, k=k, dtype=stored, wide=wide, with_residual=with_residual, missing=missing, temperature=temperature
    )
    student = logits(*shape, seed=1, dtype=dtype)
    upstream = upstream_of(chosen, shape)
    exact = truth(student, teacher, upstream, **chosen)
    student, teacher, chosen = (to_device(x, engine.device) for x in (student, teacher, chosen))
    with engine():
        ours = evaluate(student, teacher, upstream.to(engine.device), **chosen)
    assert_close(ours, exact, dtype)


@every_divergence
@every_tail
@pytest.mark.parametrize("vocab", [50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_topk_of_real_vocabularies(divergence: str, tail: str, vocab: int, dtype: torch.dtype):
    student, teacher_logits = student_and_teacher(2, vocab, dtype=dtype)
    teacher = pyalign.topk_logprobs(teacher_logits, 50)
    ours = evaluate(student, teacher, divergence=divergence, tail=tail)
    assert_close(ours, truth(student, teacher, divergence=divergence, tail=tail), dtype)


EXTRACTION = (((1,), 1), ((2, 2), 1), ((2, 2), 2), ((3, 31), 7), ((2, 3, 257), 50), ((2, 1030), 256), ((2, 4099), 9))


@every_engine
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("shape", "k"), EXTRACTION, ids=name_of)
def test_topk_logprobs(engine: Engine, dtype: torch.dtype, shape: tuple[int, ...], k: int):
    if not engine.serves(dtype):
        pytest.skip("float64 goes to the reference")
    for temperature in (1.0,) if engine.slow else (1.0, 0.5, 3.0):
        check_topk(engine, logits(*shape, dtype=dtype), k, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 151936])
@pytest.mark.parametrize("k", [1, 50, 256, 1000])
def test_topk_logprobs_of_real_vocabularies(dtype: torch.dtype, vocab: int, k: int):
    check_topk(ENGINES[0], logits(2, vocab, dtype=dtype), k, 1.0)


ORDERS = (
    "ascending",
    "descending",
    "equal",
    "one peak",
    "peaks",
    "few finite",
    "ten finite",
    "ruled out",
    "outlier",
    "sawtooth",
    "cluster",
    "out of sample",
)


@pytest.mark.parametrize(("n", "k"), [(5000, 64), (20011, 9), (20011, 256)], ids=name_of)
@pytest.mark.parametrize("order", ORDERS)
@quick_engine
def test_topk_logprobs_of_adversarial_rows(engine: Engine, order: str, n: int, k: int):
    """Orders that make a threshold or a buffer of candidates work hardest."""
    place = torch.arange(n)
    noise = logits(n)
    x = {
        "ascending": torch.linspace(-5, 5, n),
        "descending": torch.linspace(5, -5, n),
        "equal": torch.zeros(n),
        "one peak": torch.full((n,), -30.0).index_fill(0, torch.tensor([n - 1]), 30.0),
        "peaks": torch.zeros(n).index_fill(0, torch.arange(n - 64, n), 150.0),  # the rest at e^-150
        "few finite": torch.full((n,), -math.inf).index_fill(0, torch.arange(0, n, 120), 1.0),
        "ten finite": noise.masked_fill(place % (n // 10) != 7, -math.inf),
        "ruled out": noise.masked_fill(place > n // 5, -math.inf),
        "outlier": place.cos().index_fill(0, torch.tensor([7]), -3e38),
        "sawtooth": place.remainder(97) / 10,
        "cluster": noise + 30 * (place // (n // 7) == 3),  # more than find room
        "out of sample": noise - 20 * (place // 512 % 4 == 0),  # every fourth round of 128 vectors
    }[order]
    check_topk(engine, torch.stack([x, x.flip(0)]), k, 1.0)


def check_topk(engine: Engine, x: Tensor, k: int, temperature: float) -> None:
    """The largest k, equals by lowest index, and the log-sum-exp of the others."""
    exact_x = x.double()
    order = exact_x.sort(dim=-1, descending=True, stable=True).indices
    log_p = (exact_x / temperature).log_softmax(-1)
    with engine():
        logprobs, indices, residual, stored_temperature = pyalign.topk_logprobs(
            x.to(engine.device), k, temperature=temperature
        )
    assert stored_temperature == temperature
    assert residual is not None
    assert indices.dtype == torch.int64
    assert torch.equal(indices.cpu(), order[..., :k])
    assert logprobs.dtype == residual.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    unit = torch.finfo(logprobs.dtype).eps * (
        4 if x.dtype == torch.float64 else 1
    )  # sums of 1e5 terms round in the truth too
    exact = log_p.gather(-1, order[..., :k])
    within("logprobs", logprobs, exact, 4 * unit * (1 + exact.abs()))
    rest = log_p.gather(-1, order[..., k:])
    exact = rest.logsumexp(-1) if k < x.shape[-1] else torch.full(x.shape[:-1], -math.inf, dtype=torch.float64)
    within("residual", residual, exact, 4 * unit * (1 + exact.nan_to_num(neginf=0).abs()))


# The reference itself, against torch's own functions.


def plain(student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float) -> Tensor:
    """(N,) by torch.nn.functional alone."""
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    if divergence == "tvd":
        return 0.5 * F.l1_loss(log_q.exp(), log_p.exp(), reduction="none").sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    pairs = {
        "forward_kl": [(1.0, log_p, log_q)],
        "reverse_kl": [(1.0, log_q, log_p)],
        "jsd": [(beta, log_p, log_m), (1 - beta, log_q, log_m)],
    }[divergence]
    return sum(
        (w * F.kl_div(b, a, reduction="none", log_target=True).sum(-1) for w, a, b in pairs), log_p.new_zeros(())
    )


@every_divergence
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_the_reference_is_what_torch_computes(divergence: str, beta: float):
    student, teacher = student_and_teacher(6, 31, dtype=torch.float64)
    student.requires_grad_()
    targets, keep, h, temperature = torch.arange(6), torch.arange(6) % 3 != 0, 0.3, 1.7
    rows = (1 - h) * temperature**2 * plain(student, teacher, divergence, beta, temperature)
    rows = rows + h * F.cross_entropy(student, targets, reduction="none")
    expected = (rows * keep).sum() / keep.sum()
    with pyalign.backend("reference"):
        loss = pyalign.distillation_loss(
            student, teacher, divergence=divergence, beta=beta, temperature=temperature, temperature_squared=True,
            mask=keep, targets=targets, hard_weight=h,
        )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), rtol=1e-12, atol=1e-12
    )


@every_engine
@every_divergence
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_beta_of_the_mixture(engine: Engine, divergence: str, beta: float):
    """beta weighs the teacher's side of the Jensen-Shannon divergence; the others don't look at it."""
    student, teacher = student_and_teacher(3, 31)
    exact = truth(student, teacher, divergence=divergence, beta=beta)
    if divergence != "jsd":
        assert exact.loss == truth(student, teacher, divergence=divergence).loss
    with engine():
        ours = evaluate(student.to(engine.device), teacher.to(engine.device), divergence=divergence, beta=beta)
    assert_close(ours, exact, torch.float32)


# Golden values


STUDENT, TEACHER = [0.5, 1.5, 0.0, -0.5, 0.25, -1.0], [2.0, 1.0, 0.5, 0.0, -1.0, -2.0]
FULL = 0.4432257301869813
BUCKET = {1: 0.368311881312411, 2: 0.3803327036277864, 3: 0.4042550018591862, 5: FULL}


@every_engine
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_golden_values(engine: Engine, dtype: torch.dtype):
    if not engine.serves(dtype):
        pytest.skip("float64 goes to the reference")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    student, teacher = (torch.tensor(x, dtype=dtype, device=engine.device) for x in (STUDENT, TEACHER))
    with engine():
        assert float(pyalign.distillation_loss(student, teacher)) == pytest.approx(FULL, abs=tolerance)
        for k, expected in BUCKET.items():
            loss = pyalign.topk_distillation_loss(student, pyalign.topk_logprobs(teacher, k))
            assert float(loss) == pytest.approx(expected, abs=tolerance)
