"""Token and sequence log-probs, entropies, cross-entropies of rows: values, accuracy, what holds of them, edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_support import (
    DTYPES,
    KERNELS,
    Engine,
    every_engine,
    every_kernel,
    generator,
    logits,
    name_of,
    one_thread,
    over,
    quick_engine,
    to_float64,
    within,
)
from hypothesis import given
from hypothesis import strategies as st
from logprob_support import (
    IGNORED,
    assert_close,
    assert_gradient_close,
    evaluate,
    targets,
    truth,
    upstreams,
)
from torch import Tensor

import pyalign
from pyalign import _types, sequence_logprobs, token_logprobs
from pyalign._ops_logprob import engine as row_engine

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "capped": {"softcap": 5.0},
    "capped and cool": {"softcap": 3.0, "temperature": 0.6},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
SLOW_SHAPES = ((2, 3, 31), (2, 1100))
SHAPES = (*SLOW_SHAPES, (31,), (5, 1), (4, 2), (3, 513))


def rows(engine: Engine, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits and targets on the engine's device."""
    x = logits(*shape, dtype=dtype, device=engine.device, scale=scale)
    return x, targets(*shape[:-1], vocab=shape[-1]).to(engine.device)


# ---- Values ----


@every_engine
@every_dtype
@every_option
@pytest.mark.smoke
def test_log_probs_entropies_and_gradients_are_those_of_float64(
    engine: Engine, dtype: torch.dtype, options: dict[str, Any]
):
    if not engine.serves(dtype):
        pytest.skip(f"{engine.name} has no {dtype}")
    for shape in SLOW_SHAPES[: 1 if options else 2] if engine.slow else SHAPES:
        x, target = rows(engine, *shape, dtype=dtype)
        upstream = upstreams(*shape[:-1])
        exact = truth(x, target, upstream, **options)
        with engine():
            ours = evaluate(x, target, tuple(g.to(engine.device) for g in upstream), **options)
        assert_close(ours, exact, dtype, slack=2 if "softcap" in options else 1)


@over(tuple(engine for engine in KERNELS if not engine.slow))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(2, 32000), (2, 50257), (1, 151936)], ids=name_of)
def test_real_vocabularies(engine: Engine, dtype: torch.dtype, shape: tuple[int, ...]):
    x, target = rows(engine, *shape, dtype=dtype)
    for options in ({}, {"softcap": 3.0, "temperature": 0.6}):
        exact = truth(x, target, **options)
        with engine():
            assert_close(evaluate(x, target, **options), exact, dtype, slack=2)


def test_the_reference_is_what_torch_has_for_it():
    x, target = logits(40, 31, dtype=torch.float64), targets(40, vocab=31)
    logprob, entropy, _ = evaluate(x, target, temperature=1.3)
    counted = target != IGNORED
    theirs = -F.cross_entropy(x / 1.3, target, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(logprob, theirs)
    of_torch = torch.distributions.Categorical(logits=x / 1.3).entropy()
    torch.testing.assert_close(entropy, of_torch.where(counted, 0.0))
    capped = evaluate(x, target, softcap=2.0)
    torch.testing.assert_close(capped.logprob, evaluate(2.0 * torch.tanh(x / 2.0), target).logprob)


def plain(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What torch's user writes."""
    log_q = torch.log_softmax(x, -1)
    return log_q.gather(-1, target[:, None]).squeeze(-1), -(log_q.exp() * log_q).sum(-1)


@every_engine
@pytest.mark.parametrize(
    "case", ["level of 100", "level of -100", "peaked", "nearly certain", "flat", "ten thousand", "long"]
)
def test_errors_are_no_larger_than_torchs(engine: Engine, case: str):
    """Against float64, beside torch on float32: log-probs, entropies and gradients."""
    vocab = 151936 if case == "long" and not engine.slow else 3000
    x = logits(8, vocab, seed=4, scale=0.01 if case == "flat" else 2.0)
    if case.startswith("level"):
        x += 100.0 if case == "level of 100" else -100.0
    if case in ("peaked", "nearly certain"):
        x[:, 7] += 20.0 if case == "peaked" else 24.0
    if case == "ten thousand":
        x[:, ::2] += 1e4
        x[:, 1::2] -= 1e4
    target = torch.arange(8) + 4
    exact = truth(x, target)
    leaf = x.requires_grad_()
    theirs = plain(leaf, target)
    (their_gradient,) = torch.autograd.grad(theirs, leaf, [torch.ones(8)] * 2)
    with engine():
        ours = evaluate(x.to(engine.device), target.to(engine.device))
    for name, a, b, wanted in zip(
        ("logprob", "entropy", "gradient"), ours, (*theirs, their_gradient), exact, strict=True
    ):
        error, of_torch = ((to_float64(y) - wanted).abs().max() for y in (a, b))
        assert error <= of_torch + 4 * 2.0**-24 * (1 + wanted.abs().max()), name
    assert (ours.entropy >= 0).all()
    assert (ours.logprob <= 0).all()


# ---- What holds of them ----

settings = {"scale": st.floats(0.0, 30.0), "seed": st.integers(0, 2**16), "vocab": st.integers(1, 700)}


@quick_engine
@given(**settings, level=st.floats(-200.0, 200.0))
def test_a_shift_of_the_logits_changes_nothing(engine: Engine, scale: float, seed: int, vocab: int, level: float):
    x = logits(3, vocab, seed=seed, dtype=torch.float64, scale=scale)
    target = targets(3, vocab=vocab, seed=seed)
    with pyalign.backend("cpu" if engine.device == "cpu" and engine.name != "reference" else "reference"):
        for a, b in zip(evaluate(x, target), evaluate(x + level, target), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@quick_engine
@given(**settings, temperature=st.floats(0.1, 10.0))
def test_the_gradient_sums_to_zero_over_the_vocabulary(
    engine: Engine, scale: float, seed: int, vocab: int, temperature: float
):
    x = logits(3, vocab, seed=seed, scale=scale, device=engine.device)
    target = targets(3, vocab=vocab, seed=seed).to(engine.device)
    with engine():
        gradient = evaluate(x, target, temperature=temperature).gradient
    total, size = gradient.double().sum(-1), gradient.double().abs().sum(-1)
    assert (total.abs() <= 1e-5 * (size + 1 / temperature)).all()


@quick_engine
@given(scale=st.floats(0.0, 30.0), seed=st.integers(0, 2**16), vocab=st.integers(1, 60))
def test_probabilities_of_all_targets_sum_to_one(engine: Engine, scale: float, seed: int, vocab: int):
    x = logits(1, vocab, seed=seed, scale=scale, device=engine.device).expand(vocab, vocab)
    with engine():
        logprob = token_logprobs(x, torch.arange(vocab, device=engine.device))
    assert float(logprob.double().exp().sum()) == pytest.approx(1, abs=2e-6)


@quick_engine
@given(**settings, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_entropy_lies_between_0_and_that_of_a_uniform_distribution(
    engine: Engine, scale: float, seed: int, vocab: int, dtype: torch.dtype
):
    x = logits(4, vocab, seed=seed, scale=scale, dtype=dtype, device=engine.device)
    target = torch.zeros(4, dtype=torch.int64, device=engine.device)
    with engine():
        _, entropy = token_logprobs(x, target, return_entropy=True)
    assert (entropy >= 0).all()
    assert (entropy.double() <= math.log(vocab) * (1 + 2e-7) + 2e-7).all()


@every_engine
def test_equal_logits_have_the_largest_entropy_and_one_alone_has_none(engine: Engine):
    target = torch.tensor([0, 3], device=engine.device)
    x = torch.full((2, 31), 77.0, device=engine.device)
    x[1, :3], x[1, 4:] = -math.inf, -math.inf
    with engine():
        logprob, entropy = token_logprobs(x, target, return_entropy=True)
    torch.testing.assert_close(entropy.cpu(), torch.tensor([math.log(31), 0.0]), rtol=2e-7, atol=0)
    torch.testing.assert_close(logprob.cpu(), torch.tensor([-math.log(31), 0.0]), rtol=2e-7, atol=0)


# ---- Edges ----


@every_engine
@pytest.mark.smoke
def test_no_rows_and_ignored_rows_alone(engine: Engine):
    for shape in ((0, 31), (2, 0, 31), (2, 31)):
        x = logits(*shape, device=engine.device)
        with engine():
            ours = evaluate(x, torch.full(shape[:-1], IGNORED, device=engine.device))
        assert ours.logprob.shape == ours.entropy.shape == shape[:-1]
        assert not any(y.any() for y in ours)


@every_engine
def test_an_ignored_row_is_not_looked_at(engine: Engine):
    x, target = rows(engine, 6, 31)
    x[1] = math.nan
    for ignore_index in (IGNORED, 5):
        with engine():
            ours = evaluate(x, target.where(target != IGNORED, ignore_index), ignore_index=ignore_index)
        assert all(y.isfinite().all() for y in ours)
        assert not any(y[1].any() for y in ours)


@every_engine
@pytest.mark.smoke
def test_minus_infinity_is_a_probability_of_0(engine: Engine):
    """It contributes nothing to the entropy, nor to the gradient; as a target its log-prob is -inf."""
    x, target = rows(engine, 4, 31)
    x[:, 20:] = -math.inf
    target[:] = torch.tensor([3, 25, 4, 19], device=engine.device)
    with engine():
        ours, short = evaluate(x, target), evaluate(x[[0, 2, 3], :20], target[[0, 2, 3]])
    assert ours.logprob[1] == -math.inf
    for a, b in zip(ours[:2], short[:2], strict=True):
        torch.testing.assert_close(a[[0, 2, 3]], b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.gradient[[0, 2, 3], :20], short.gradient, rtol=1e-5, atol=1e-6)
    expected = torch.zeros(11)
    assert torch.equal(ours.gradient[0, 20:].cpu(), expected)
    expected[5] = 1.0  # [i = t] - 0
    assert torch.equal(ours.gradient[1, 20:].cpu(), expected)


@every_engine
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}], ids=["plain", "cool"])
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_broken_row_is_nan_alone(engine: Engine, options: dict[str, Any], given_dtype: torch.dtype):
    x, target = rows(engine, 5, 700, dtype=given_dtype)
    target[:] = 3
    good = x.clone()
    x[0], x[2, 600], x[4, 3] = -math.inf, math.inf, math.nan
    with engine():
        ours, expected = evaluate(x, target, **options), evaluate(good, target, **options)
    for a, b in zip(ours, expected, strict=True):
        assert a[[0, 2, 4]].isnan().all()
        assert torch.equal(a[[1, 3]], b[[1, 3]])


@every_engine
def test_a_softcap_brings_infinities_to_its_bounds(engine: Engine):
    x, target = rows(engine, 3, 31)
    target[:] = 4
    x[0, 4], x[1, 5], x[2, 6] = math.inf, -math.inf, math.nan
    bounded = x.clamp(-1e4, 1e4)
    with engine():
        ours, expected = evaluate(x, target, softcap=5.0), evaluate(bounded, target, softcap=5.0)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a[:2], b[:2])
        assert a[2].isnan().all()


@every_engine
@pytest.mark.parametrize("wrong", [31, -1, 2**40])
def test_a_target_out_of_range_raises_on_the_cpu_and_is_nan_alone_on_a_gpu(engine: Engine, wrong: int):
    x, target = rows(engine, 4, 31)
    target[:] = torch.tensor([1, IGNORED, wrong, 30], device=engine.device)
    if engine.name in ("cpu", "reference") and engine.device == "cpu":
        with engine(), pytest.raises(ValueError, match=rf"targets: row 2 holds {wrong}; wanted 0 <= targets < 31"):
            token_logprobs(x, target)
        return
    expected = target.clone()
    expected[2] = 0
    with engine():
        ours, right = evaluate(x, target), evaluate(x, expected)
    for a, b in zip(ours, right, strict=True):
        assert a[2].isnan().all()
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


@quick_engine
@pytest.mark.parametrize("rise", [3.0, 300.0])
def test_rows_whose_largest_logits_come_late(engine: Engine, rise: float):
    """The fold must move its sums to a new max, many times over."""
    x, target = rows(engine, 3, 5000)
    x += torch.linspace(0, rise, 5000, device=engine.device)
    with engine():
        ours = evaluate(x, target)
    assert_close(ours, truth(x, target), torch.float32, slack=2)


# ---- Layouts ----


@quick_engine
def test_shifted_logits_are_not_copied(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """``logits[:, :-1]`` are rows of two strides, whose gradient is written in full."""
    x = logits(3, 6, 31, device=engine.device)
    target = targets(3, 5, vocab=31).to(engine.device)
    with engine():
        expected = evaluate(x[:, :-1].contiguous(), target)
        real = Tensor.contiguous

        def contiguous(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
            assert self.numel() < 3 * 5 * 31 or self.is_contiguous(), "the logits were copied"
            return real(self, *arguments, **options)

        if engine.name != "reference":
            monkeypatch.setattr(Tensor, "contiguous", contiguous)
        ours = evaluate(x[:, :-1], target)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    assert _types.rows(x[:, :-1]).tensor.data_ptr() == x.data_ptr()


@every_engine
def test_layouts(engine: Engine):
    """A last stride other than 1, rows that overlap, starts that are aligned to nothing, targets of any stride."""
    x, target = rows(engine, 6, 37)
    with engine():
        expected = evaluate(x, target)
        wide = torch.stack([x, -x], -1)[..., 0]
        odd = torch.cat([x[:, :3], x], -1)[:, 3:]
        transposed = x.T.contiguous().T
        for other in (wide, odd, transposed):
            for a, b in zip(evaluate(other, target), expected, strict=True):
                assert torch.equal(a, b)
        spread = torch.stack([target, target * 0 + 999], -1)[:, 0]
        assert spread.stride() == (2,)
        plain = token_logprobs(x, target)
        assert torch.equal(token_logprobs(x, spread), plain)
        assert torch.equal(token_logprobs(x, target.to(torch.int16)), plain)
        same = x[:1].expand(6, 37)
        assert torch.equal(token_logprobs(same, target), token_logprobs(same.contiguous(), target))


def test_the_same_bits_whatever_the_number_of_threads(threads: Callable[[int], None]):
    x, target = logits(300, 700), targets(300, vocab=700)
    results: list[tuple[Tensor, ...]] = []
    for count in (1, 2, 5):
        threads(count)
        results.append(evaluate(x, target))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ---- The rows' engine functions, on which linear losses stand ----


def loss_of(x: Tensor, target: Tensor, smoothing: float, z_loss: float, softcap: float | None) -> Tensor:
    """In torch's words."""
    y = x if softcap is None else softcap * torch.tanh(x / softcap)
    nll = F.cross_entropy(y, target, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    return (nll + z_loss * y.logsumexp(-1) ** 2).where(target != IGNORED, 0.0)


LOSSES = ((0.0, 0.0, None), (0.1, 0.0, None), (0.0, 1e-2, None), (0.2, 1e-3, 5.0))
IN_AND_OUT = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
)


@every_engine
@pytest.mark.parametrize(("dtype", "out_dtype"), IN_AND_OUT, ids=name_of)
@pytest.mark.smoke
def test_cross_entropy_and_its_gradient_in_one_visit(engine: Engine, dtype: torch.dtype, out_dtype: torch.dtype):
    if not engine.serves(dtype):
        pytest.skip(f"{engine.name} has no {dtype}")
    accumulation = _types.accumulation_dtype(dtype)
    factor = torch.tensor(0.37, dtype=accumulation, device=engine.device)
    of_rows = row_engine(engine.name)
    for shape in (
        ((4, 37),) if engine.slow else ((4, 37), (3, 1), (3, 1500), (2, 80000))[: 4 if engine.name == "cpu" else 3]
    ):
        for smoothing, z_loss, softcap in LOSSES:
            x, target = rows(engine, *shape, dtype=dtype)
            leaf = to_float64(x).requires_grad_()
            with one_thread():
                wanted = loss_of(leaf, target.cpu(), smoothing, z_loss, softcap)
                (wanted_gradient,) = torch.autograd.grad(wanted.sum() * 0.37, leaf)
            out = torch.empty(shape, dtype=out_dtype, device=engine.device)
            with engine():
                loss = of_rows.cross_entropy(x, target, IGNORED, smoothing, z_loss, softcap, factor, out)
                alone = of_rows.cross_entropy(x, target, IGNORED, smoothing, z_loss, softcap, None, None)
            unit = 2.0**-24 if accumulation == torch.float32 else 2.0**-50
            for y in (loss, alone):
                assert y.dtype == accumulation
                within("loss", y, wanted.detach(), 16 * unit * (1 + wanted.detach().abs()))
            assert_gradient_close(out, wanted_gradient, out_dtype)
            if dtype == out_dtype:
                with engine():
                    again = of_rows.cross_entropy(x, target, IGNORED, smoothing, z_loss, softcap, factor, x)
                assert torch.equal(again, loss)
                assert torch.equal(x, out)


@every_engine
@pytest.mark.parametrize(("dtype", "out_dtype"), IN_AND_OUT, ids=name_of)
@pytest.mark.smoke
def test_gradients_from_a_state_and_without_one_in_place_and_narrowed(
    engine: Engine, dtype: torch.dtype, out_dtype: torch.dtype
):
    if not engine.serves(dtype):
        pytest.skip(f"{engine.name} has no {dtype}")
    of_rows = row_engine(engine.name)
    x, target = rows(engine, 4, 37, dtype=dtype)
    given = tuple(g.to(engine.device, _types.accumulation_dtype(dtype)) for g in upstreams(4))
    for options in ((1.0, None), (0.7, 3.0)):
        for upstream in (given, (given[0], None), (None, given[1]), (None, None)):
            pair = tuple(torch.zeros(4) if g is None else g for g in upstream)
            exact = truth(x, target, pair, temperature=options[0], softcap=options[1]).gradient
            with engine():
                state = of_rows.logprob(x, target, IGNORED, *options, upstream[1] is not None, True).state
                assert state.shape == (4, 3)
                for known in (state, None):
                    out = torch.empty(4, 37, dtype=out_dtype, device=engine.device)
                    of_rows.logprob_gradient(x, target, IGNORED, *options, known, *upstream, out)
                    assert_gradient_close(out, exact, out_dtype, slack=2)
                if dtype == out_dtype:
                    over_itself = x.clone()
                    of_rows.logprob_gradient(over_itself, target, IGNORED, *options, None, *upstream, over_itself)
                    assert torch.equal(over_itself, out)


@every_kernel
def test_rows_of_a_chunk_in_a_wider_workspace(engine: Engine):
    """Rows in and out behind strides of their own; nothing beside them is written."""
    of_rows = row_engine(engine.name)
    wide, target = rows(engine, 5, 64)
    x = wide[1:, 3:40]
    outside = wide.clone()
    target = targets(4, vocab=37).to(engine.device)
    expected = torch.empty(4, 37, device=engine.device)
    with engine():
        loss = of_rows.cross_entropy(x.clone(), target, IGNORED, 0.1, 0.0, None, None, expected)
        assert torch.equal(of_rows.cross_entropy(x, target, IGNORED, 0.1, 0.0, None, None, x), loss)
    assert torch.equal(x, expected)
    outside[1:, 3:40] = x
    assert torch.equal(wide, outside)


@every_engine
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_cross_entropy_of_excluded_entries(engine: Engine, smoothing: float):
    """As torch: an excluded target costs infinitely much, and so does any excluded entry under label smoothing."""
    x, target = rows(engine, 4, 31)
    x[0, 3], x[1, 4], x[2] = -math.inf, -math.inf, math.nan
    target[:] = 3
    wanted = loss_of(to_float64(x), target.cpu(), smoothing, 0.0, None)
    with engine():
        loss = row_engine(engine.name).cross_entropy(x, target, IGNORED, smoothing, 0.0, None, None, None)
    within("loss", loss, wanted, 1e-6)


# ---- Sequences ----


def packed(lengths: tuple[int, ...], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Log-probs of tokens and the offsets of their sequences."""
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    return logits(sum(lengths), seed=6, scale=3.0, device=device), offsets


LENGTHS = (3, 0, 7, 1, 0)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_are_their_sums_and_means(average: bool, masked: bool, device: str):
    x, offsets = packed(LENGTHS, device)
    mask = torch.rand(x.shape, generator=generator(2)).to(device) > 0.4 if masked else None
    leaf = x.clone().requires_grad_()
    result = sequence_logprobs(leaf, offsets=offsets, mask=mask, average=average)
    kept = torch.ones_like(x) if mask is None else mask.to(x)
    parts = (x.double() * kept).split(LENGTHS)
    counts = torch.stack([part.sum() for part in kept.double().split(LENGTHS)])
    sums = torch.stack([part.sum() for part in parts])
    wanted = sums / counts.clamp(min=1) if average else sums
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.detach().double(), wanted, rtol=1e-7, atol=1e-7)
    upstream = torch.arange(1.0, 6.0, device=device)
    (gradient,) = torch.autograd.grad(result, leaf, upstream)
    each = upstream.double() / counts.clamp(min=1) if average else upstream.double()
    expected = each.repeat_interleave(torch.tensor(LENGTHS, device=device)) * kept
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-7, atol=0)
    int32 = sequence_logprobs(x, offsets=offsets.int(), mask=None if mask is None else mask.int(), average=average)
    assert torch.equal(int32, result)


@pytest.mark.parametrize("average", [False, True])
def test_padded_sequences_are_the_packed_ones(average: bool):
    x, offsets = packed(LENGTHS)
    padded, mask = torch.full((5, 8), math.nan), torch.zeros(5, 8, dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        padded[i, :length], mask[i, :length] = x[offsets[i] : offsets[i + 1]], True
    leaf = padded.requires_grad_()
    result = sequence_logprobs(leaf, mask=mask, average=average)
    assert torch.equal(result, sequence_logprobs(x, offsets=offsets, average=average))
    (gradient,) = torch.autograd.grad(result.sum(), leaf)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()
    torch.testing.assert_close(sequence_logprobs(x[:10].view(2, 5)), x[:10].view(2, 5).sum(-1))
    torch.testing.assert_close(sequence_logprobs(x[:10].view(2, 5), average=True), x[:10].view(2, 5).mean(-1))


def test_sequences_of_nothing_are_0():
    nothing = torch.zeros(0, requires_grad=True)
    for average in (False, True):
        for result in (
            sequence_logprobs(nothing, offsets=torch.zeros(4, dtype=torch.int64), average=average),
            sequence_logprobs(nothing.view(3, 0), average=average),
            sequence_logprobs(torch.full((3, 2), math.nan), mask=torch.zeros(3, 2).bool(), average=average),
        ):
            assert torch.equal(result, torch.zeros(3))
        assert sequence_logprobs(nothing, offsets=torch.zeros(1, dtype=torch.int64), average=average).shape == (0,)


def test_long_sequences_keep_their_digits():
    """Added up one by one in float32, 100,000 tokens are off by a hundred times what is allowed here."""
    x = logits(3, 100_000, seed=5).abs().neg()
    exact = x.double().sum(-1)
    offsets = torch.arange(4) * 100_000
    for result in (sequence_logprobs(x), sequence_logprobs(x.flatten(), offsets=offsets)):
        within("sum", result, exact, 2.0**-24 * exact.abs())


@pytest.mark.parametrize("average", [False, True])
def test_gradients_of_sequences_by_finite_differences(average: bool):
    x, offsets = packed(LENGTHS)
    leaf = x.double().requires_grad_()
    mask = torch.arange(11) % 4 > 0
    for options in ({"offsets": offsets}, {"offsets": offsets, "mask": mask}):
        assert torch.autograd.gradcheck(lambda y, o=options: sequence_logprobs(y, average=average, **o), leaf)
    assert torch.autograd.gradcheck(lambda y: sequence_logprobs(y[:10].view(2, 5), average=average), leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=name_of)
def test_dtypes_of_sequences(dtype: torch.dtype):
    x = logits(2, 5).to(dtype).requires_grad_()
    result = sequence_logprobs(x)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.autograd.grad(result.sum(), x)[0].dtype == dtype


def test_offsets_that_do_not_cut_the_tokens_give_nan_where_nobody_may_look(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU; nothing is read through them."""
    monkeypatch.setattr("pyalign.logprob._may_look", lambda x: False)
    x, offsets = packed(LENGTHS)
    assert sequence_logprobs(x, offsets=offsets).isfinite().all()
    for bad in ([0, 5, 3, 11], [1, 5, 11], [0, 5, 10], [0, 5, 12], [-3, 5, 11], [0, 2**40, 11]):
        assert sequence_logprobs(x, offsets=torch.tensor(bad)).isnan().all(), bad


# ---- Bad arguments one by one ----

X, T = logits(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)
P, CUTS = logits(6), torch.tensor([0, 2, 6])
TOKEN = [
    ((X.tolist(), T), {}, TypeError, "logits: got list; wanted a tensor"),
    ((X.long(), T), {}, TypeError, "logits: got torch.int64; wanted float32, bfloat16, float16 or float64"),
    ((torch.tensor(1.0), T), {}, ValueError, "logits: got 0 dimensions; wanted at least 1"),
    ((X[..., :0], T), {}, ValueError, "logits: got shape (2, 3, 0); wanted a vocabulary of at least 1"),
    ((X, T.tolist()), {}, TypeError, "targets: got list; wanted a tensor"),
    ((X, T[:1]), {}, ValueError, "targets: got shape (1, 3); wanted (2, 3), one per token (nothing is broadcast)"),
    ((X, T[..., None]), {}, ValueError, "targets: got shape (2, 3, 1); wanted (2, 3)"),
    ((X, T.float()), {}, TypeError, "targets: got torch.float32; wanted an integer dtype"),
    ((X, T.bool()), {}, TypeError, "targets: got torch.bool; wanted an integer dtype"),
    ((X, T.to("meta")), {}, ValueError, "targets: got a tensor on meta; wanted one on cpu"),
    ((X, T), {"temperature": 0.0}, ValueError, "temperature: got 0.0; wanted a finite number > 0"),
    ((X, T), {"temperature": math.nan}, ValueError, "temperature: got nan; wanted a finite number > 0"),
    ((X, T), {"softcap": 0.0}, ValueError, "softcap: got 0.0; wanted None or a finite number > 0"),
    ((X, T), {"softcap": -1}, ValueError, "softcap: got -1; wanted None or a finite number > 0"),
    ((X, T), {"softcap": math.inf}, ValueError, "softcap: got inf; wanted None or a finite number > 0"),
    ((X, T), {"softcap": True}, ValueError, "softcap: got True; wanted None or a finite number > 0"),
    (
        (X, T),
        {"process_group": object()},
        TypeError,
        "process_group: got object; wanted a torch.distributed process group",
    ),
]
SEQUENCE = [
    (([1.0],), {}, TypeError, "token_logprobs: got list; wanted a tensor"),
    ((T,), {}, TypeError, "token_logprobs: got torch.int64; wanted float32"),
    ((P,), {}, ValueError, "token_logprobs: got shape (6,); wanted (B, S), or (T,) with offsets="),
    ((X,), {}, ValueError, "token_logprobs: got shape (2, 3, 7); wanted (B, S), or (T,) with offsets="),
    ((X[0],), {"offsets": CUTS}, ValueError, "token_logprobs: got shape (3, 7); wanted (T,) with offsets="),
    ((P,), {"offsets": [0, 6]}, TypeError, "offsets: got list; wanted a tensor"),
    ((P,), {"offsets": CUTS.float()}, TypeError, "offsets: got torch.float32; wanted int32 or int64"),
    ((P,), {"offsets": CUTS[:0]}, ValueError, "offsets: got shape (0,); wanted (B + 1,)"),
    ((P,), {"offsets": CUTS[None]}, ValueError, "offsets: got shape (1, 3); wanted (B + 1,)"),
    ((P,), {"offsets": CUTS.to("meta")}, ValueError, "offsets: got a tensor on meta; wanted one on cpu"),
    ((P,), {"offsets": CUTS + 1}, ValueError, "offsets: got first and last entries 1 and 7; wanted 0 and 6"),
    ((P,), {"offsets": CUTS[:2]}, ValueError, "offsets: got first and last entries 0 and 2; wanted 0 and 6"),
    (
        (P,), {"offsets": torch.tensor([0, 5, 4, 6])}, ValueError,
        "offsets: got 4 at 2; wanted no less than the one before it, 5",
    ),
    ((P,), {"offsets": CUTS, "mask": T}, ValueError, "mask: got shape (2, 3); wanted (6,), one per token"),
    ((X[0],), {"mask": X[0]}, TypeError, "mask: got torch.float32; wanted bool or an integer dtype"),
    ((X[0],), {"mask": [1]}, TypeError, "mask: got list; wanted a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [*((token_logprobs, *case) for case in TOKEN), *((sequence_logprobs, *case) for case in SEQUENCE)],
)
def test_a_bad_argument_is_named(
    function: Callable[..., Any], arguments: Any, options: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert message in str(caught.value)


@over((Engine("cuda", "cpu"), Engine("triton", "cpu")))
def test_a_forced_gpu_backend_refuses_float64(engine: Engine):
    with pyalign.backend(engine.name), pytest.raises(RuntimeError, match=r"torch\.float64 has no GPU kernel"):
        token_logprobs(X.double(), T)
