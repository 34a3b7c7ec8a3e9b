"""Losses straight from hidden states against the float64 reference: values, gradients, chunks, edges, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distill_support import (
    DTYPES,
    TAILS,
    Engine,
    every_divergence,
    every_engine,
    every_kernel,
    name_of,
    quick_engine,
)
from linear_support import (
    COUNT,
    KINDS,
    VOCAB,
    Operands,
    Teacher,
    assert_close,
    call,
    chunks_of,
    evaluate,
    every_kind,
    normal,
    operands,
    teacher,
    truth,
    uncounted,
    wide_products,
)
from torch import Tensor

import pyalign
from pyalign import TopKLogprobs, _linear, distillation_loss, linear_cross_entropy, linear_distillation_loss

__all__ = ["chunks_of", "uncounted", "wide_products"]  # fixtures
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
SetRows = Callable[[int], None]


def pair(engine: Engine, dtype: torch.dtype, **sizes: int) -> tuple[Operands, Teacher]:
    options: dict[str, Any] = {"dtype": dtype, "device": engine.device, **sizes}
    return operands(**options), teacher(**options)


def tokens(count: int = COUNT, device: str = "cpu") -> dict[str, Tensor]:
    numbers = torch.arange(count, device=device)
    return {"mask": numbers % 5 != 1, "labels": torch.where(numbers % 7 == 3, -100, numbers), "weight": numbers / 9}


# Values and gradients


@every_engine
@every_kind
@every_dtype
@pytest.mark.parametrize("rows", [None, 8], ids=["whole", "chunks"])
@pytest.mark.smoke
def test_results_and_gradients(engine: Engine, kind: str, dtype: torch.dtype, rows: int | None, chunks_of: SetRows):
    """8 doesn't divide the number of tokens that count."""
    if not engine.serves(dtype) or (engine.slow and (dtype == torch.float16 or not rows)):
        pytest.skip("not served, or as the others in Triton's interpreter")
    x, other = pair(engine, dtype)
    if rows:
        chunks_of(rows)
    with engine():
        ours = evaluate(kind, x, other)
    assert_close(ours, truth(kind, x, other), dtype)


@quick_engine
@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_divergence_and_reduction(
    engine: Engine, divergence: str, dtype: torch.dtype, reduction: str, chunks_of: SetRows
):
    x, other = pair(engine, dtype)
    chunks_of(8)
    options = {
        **tokens(device=engine.device), "divergence": divergence, "beta": 0.3, "temperature": 1.7,
        "reduction": reduction, "temperature_squared": True, "student_softcap": 4.0, "teacher_softcap": 3.0,
        "return_metrics": True,
    }  # fmt: skip
    with engine():
        ours = evaluate("distill", x, other, **options)
    assert_close(ours, truth("distill", x, other, **options), dtype, slack=4)


@quick_engine
@every_divergence
@pytest.mark.parametrize("tail", TAILS)
def test_every_tail(engine: Engine, divergence: str, tail: str, chunks_of: SetRows):
    x, other = pair(engine, torch.float32)
    chunks_of(8)
    options = {**tokens(device=engine.device), "divergence": divergence, "tail": tail, "student_softcap": 4.0}
    with engine():
        ours = evaluate("topk", x, other, **options)
    assert_close(ours, truth("topk", x, other, **options), torch.float32)


@quick_engine
@pytest.mark.parametrize("kind", ["distill", "topk"])
def test_hard_targets_a_vocabulary_prefix_and_given_denominator(engine: Engine, kind: str, chunks_of: SetRows):
    x, other = pair(engine, torch.float32)
    chunks_of(8)
    other = other._replace(stored=other.stored._replace(indices=other.stored.indices % 50))
    distinct = torch.arange(5, device=engine.device).expand(COUNT, 5)
    other = other._replace(stored=other.stored._replace(indices=distinct.contiguous()))
    options = {
        "targets": other.targets % 50, "hard_weight": 0.4, "vocab_size": 50, "mask": other.targets >= 0,
        "num_items": torch.tensor(5, device=engine.device), "return_metrics": True,
    }  # fmt: skip
    with engine():
        ours = evaluate(kind, x, other, **options)
    assert_close(ours, truth(kind, x, other, **options), torch.float32)
    assert not ours.gradients[1][50:].any()
    assert not ours.gradients[2][50:].any()


@quick_engine
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1, "z_loss": 0.02}, {"reduction": "none", "softcap": 3.0}])
def test_cross_entropy_options(engine: Engine, options: dict[str, Any], chunks_of: SetRows):
    x, other = pair(engine, torch.float32)
    chunks_of(8)
    with engine():
        ours = evaluate("cross_entropy", x, other, **options)
    assert_close(ours, truth("cross_entropy", x, other, **options), torch.float32)


def test_cross_entropy_is_torchs():
    x, other = operands(), teacher()
    leaves = x.leaves()
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*leaves), other.targets, label_smoothing=0.2
    )
    ours = linear_cross_entropy(*leaves[:2], other.targets, bias=leaves.bias, label_smoothing=0.2)
    torch.testing.assert_close(ours, expected)
    for y, z in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(y, z)


@quick_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_logprobs_and_entropies_with_an_upstream_per_token(engine: Engine, dtype: torch.dtype, chunks_of: SetRows):
    x, other = pair(engine, dtype)
    chunks_of(8)
    options = {"return_entropy": True, "temperature": 1.4, "softcap": 3.0}
    with engine():
        ours = evaluate("logprob", x, other, **options)
        only = x.leaves()
        logprob, entropy = call("logprob", only, other, **options)
        for result in (logprob, entropy):  # the other has no upstream gradient
            torch.autograd.grad(result.sum(), only, retain_graph=True)
    assert_close(ours, truth("logprob", x, other, **options), dtype, slack=4)


def test_bias_then_softcap_then_temperature():
    """logits = softcap(hidden @ weight.T + bias) / T, on both sides, as the logits op sees it."""
    x, other = operands(), teacher()
    cap = lambda z, c: c * torch.tanh(z / c)  # noqa: E731
    student = cap(torch.nn.functional.linear(*x), 2.0)
    of_teacher = cap(other.hidden @ other.weight.T + 1.0, 5.0)
    expected = distillation_loss(student, of_teacher, temperature=3.0)
    ours = call(
        "distill", x, other, student_softcap=2.0, teacher_softcap=5.0, teacher_bias=torch.ones(VOCAB), temperature=3.0
    )
    torch.testing.assert_close(ours, expected)


@quick_engine
@pytest.mark.parametrize("kind", ["distill", "topk"])
def test_teacher_rows_match_tokens_of_another_sequence(engine: Engine, kind: str, chunks_of: SetRows):
    """Context distillation: student position t with teacher position len(prompt) + t; -1 doesn't count."""
    x, _ = pair(engine, torch.float32, count=12)
    other = teacher(30, device=engine.device)
    rows = torch.arange(12, device=engine.device) + 15
    rows[::5] = -1
    chunks_of(4)
    with engine():
        ours = evaluate(kind, x, other, teacher_rows=rows)
    assert_close(ours, truth(kind, x, other, teacher_rows=rows), torch.float32)


@every_kind
def test_leading_dimensions_are_free(kind: str):
    x, other = operands(12, bias=False), teacher(12)
    flat = call(kind, x, other, **({} if kind == "logprob" else {"reduction": "none"}))
    logprobs, indices, residual, _ = other.stored
    assert residual is not None
    stored = TopKLogprobs(logprobs.view(2, 6, -1), indices.view(2, 6, -1), residual.view(2, 6))
    shaped = Teacher(other.hidden.view(2, 6, -1), other.weight, stored, other.targets.view(2, 6))
    hidden = torch.cat([x.hidden.view(2, 6, -1), torch.full((2, 1, x.hidden.shape[1]), torch.nan)], 1)[:, :-1]
    ours = call(
        kind, x._replace(hidden=hidden), shaped, **({} if kind == "logprob" else {"reduction": "none"})
    )  # the slice that a trainer's shift makes
    assert torch.equal(ours, flat.view(2, 6))


# Chunks


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_any_chunk_gives_the_same(kind: str, dtype: torch.dtype, rows: int, chunks_of: SetRows):
    x, other = operands(dtype=dtype), teacher(dtype=dtype)
    whole = evaluate(kind, x, other)
    chunks_of(rows)
    ours = evaluate(kind, x, other)
    for y, z in zip(ours.results + ours.gradients, whole.results + whole.gradients, strict=True):
        tolerance = 2e-2 if y.dtype == torch.bfloat16 else 1e-4 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance * float(z.abs().max()))


@every_kernel
@every_kind
@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("num_valid", [None, 16, 18, 40])
def test_fixed_chunks_of_a_gpu(engine: Engine, kind: str, num_valid: int | None, chunks_of: SetRows):
    """Nobody knows how many tokens count: all are computed, or as many as the caller says, in a stable order."""
    if engine.slow and num_valid != 18:
        pytest.skip("as the others, in Triton's interpreter")
    x, other = pair(engine, torch.float32)
    other.targets[:4] = -100
    chunks_of(8)
    counted = other.targets >= 0
    assert int(counted.sum()) <= 16
    options: dict[str, Any] = {"mask": counted} if kind in ("distill", "topk") else {}
    x.hidden[~counted] = torch.nan  # a masked token is not read, and must not meet a gradient of zero
    with engine():
        ours = evaluate(kind, x, other, num_valid=num_valid, **options)
    assert_close(ours, truth(kind, x, other, **options), torch.float32)


@pytest.mark.usefixtures("uncounted")
def test_on_a_gpu_more_tokens_than_num_valid_give_nan():
    x, other = operands(), teacher()
    loss = linear_cross_entropy(x.hidden, x.weight, other.targets, num_valid=3)
    assert loss.isnan()
    each = linear_cross_entropy(x.hidden, x.weight, other.targets, num_valid=3, reduction="none")
    assert int(each.isnan().sum()) == int((other.targets >= 0).sum()) - 3


def test_on_a_cpu_more_tokens_than_num_valid_raise():
    x, other = operands(), teacher()
    valid = int((other.targets >= 0).sum())
    with pytest.raises(ValueError, match=f"num_valid: got 3; wanted at least {valid}, the tokens that count"):
        linear_cross_entropy(x.hidden, x.weight, other.targets, num_valid=3)
    linear_cross_entropy(x.hidden, x.weight, other.targets, num_valid=valid)


@pytest.mark.usefixtures("uncounted")
def test_on_a_gpu_a_teacher_row_out_of_range_gives_nan_for_its_token():
    x, other = operands(), teacher()
    rows = torch.arange(COUNT)
    rows[3], rows[5] = 99, -1
    loss = call("distill", x, other, teacher_rows=rows, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    none = call("distill", x, other._replace(hidden=other.hidden[:0]), teacher_rows=torch.full((COUNT,), -1))
    assert float(none) == 0.0


@every_kind
@pytest.mark.usefixtures("wide_products", "uncounted")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_products_with_a_float32_result(
    kind: str, dtype: torch.dtype, bias: bool, chunks_of: SetRows, monkeypatch: pytest.MonkeyPatch
):
    """The arithmetic of a GPU, its products replaced by torch's on the CPU."""
    monkeypatch.setattr(_linear, "gemm_dtype", lambda own, settings, device: settings.gemm_dtype or own)
    monkeypatch.setattr(_linear, "_TILE", {"cpu": 16})
    x, other = operands(dtype=dtype, bias=bias), teacher(dtype=dtype)
    chunks_of(8)
    assert_close(evaluate(kind, x, other), truth(kind, x, other), dtype)


def gradients_of(
    kind: str, x: Operands, other: Teacher, monkeypatch: pytest.MonkeyPatch, rounds: bool, **options: Any
) -> tuple[list[Tensor], set[torch.dtype]]:
    """Gradients, and what dtypes the row loss wrote them in; ``rounds`` False: not rounded there."""
    run, buffer = _linear.run, _linear.Products.gradient_buffer
    dtypes: set[torch.dtype] = set()

    def written(self: _linear.Products, logits: Tensor, buffers: _linear.Buffers) -> Tensor:
        to = buffer(self, logits, buffers)
        dtypes.add(to.dtype)
        return to

    with monkeypatch.context() as patch:
        patch.setattr(_linear.Products, "gradient_buffer", written)
        if not rounds:
            patch.setattr(_linear, "run", lambda *given, **named: run(*given, **{**named, "rounds": False}))
        return evaluate(kind, x, other, **options).gradients, dtypes


@every_engine
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_a_gradient_rounded_where_it_is_written_has_the_bits_of_one_rounded_later(
    engine: Engine, kind: str, dtype: torch.dtype, chunks_of: SetRows, monkeypatch: pytest.MonkeyPatch
):
    """It is written once, in 16 bits, and not in 32 bits to be read and converted."""
    monkeypatch.setattr(_linear, "gemm_dtype", lambda own, settings, device: settings.gemm_dtype or own)
    x, other = pair(engine, dtype)
    x = x._replace(bias=None)
    chunks_of(8)
    ours, written = gradients_of(kind, x, other, monkeypatch, rounds=True)
    later, in_float32 = gradients_of(kind, x, other, monkeypatch, rounds=False)
    assert (written, in_float32) == ({dtype}, {torch.float32})
    for y, z in zip(ours, later, strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize(
    ("kind", "bias", "options"),
    [
        ("cross_entropy", False, {"reduction": "none"}),
        ("distill", False, {"student_softcap": 3.0}),
        ("distill", True, {}),
    ],
    ids=["a factor per token", "the soft cap's derivative", "the sum for the bias"],
)
def test_a_gradient_that_something_else_uses_is_not_rounded_yet(
    kind: str, bias: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_linear, "_has_bfloat16_products", lambda: True)
    x, other = operands(dtype=torch.bfloat16, bias=bias), teacher(dtype=torch.bfloat16)
    assert gradients_of(kind, x, other, monkeypatch, rounds=True, **options)[1] == {torch.float32}


@pytest.mark.usefixtures("wide_products")
@pytest.mark.parametrize(("group", "dtype"), [(None, torch.bfloat16), ("0", torch.float32)])
def test_gradients_of_hidden_states_from_slices_of_a_vocabulary_are_added_unrounded(
    group: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_linear, "_has_bfloat16_products", lambda: True)
    x = operands(dtype=torch.bfloat16, bias=False)
    settings = _linear.Settings(None, None, None, torch.float32, group)
    products = _linear.Products(_linear.Projection(*x, None), settings, "", _linear.Wanted(True, True, True, False))
    assert products.hidden_dtype == dtype


@every_kind
@pytest.mark.parametrize("fast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tile", [16, 4096])
def test_tiles_of_the_vocabulary(kind: str, fast: bool, tile: int, chunks_of: SetRows, monkeypatch: pytest.MonkeyPatch):
    """With matrix instructions for bfloat16, and without."""
    monkeypatch.setattr(_linear, "_has_bfloat16_products", lambda: fast)
    monkeypatch.setattr(_linear, "_TILE", {"cpu": tile})
    x, other = operands(dtype=torch.bfloat16), teacher(dtype=torch.bfloat16)
    chunks_of(8)
    assert_close(evaluate(kind, x, other), truth(kind, x, other), torch.bfloat16)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_chunks_of_16_bits_when_asked(kind: str, dtype: torch.dtype, chunks_of: SetRows):
    """Logits are rounded: as far off as torch's own 16-bit head."""
    x, other = operands(dtype=dtype), teacher(dtype=dtype)
    chunks_of(8)
    ours, exact = evaluate(kind, x, other, logits_dtype=dtype), truth(kind, x, other)
    unit = float(torch.finfo(dtype).eps)
    for y, z in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(y.double(), z, rtol=8 * unit, atol=8 * unit * max(1.0, float(z.abs().max())))


# The workspace


def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every workspace that is allocated."""
    given: list[int] = []
    real = _linear.Layout.allocate

    def allocate(self: _linear.Layout, chunk: int, device: torch.device) -> list[_linear.Buffers]:
        given.append(self.bytes(chunk))
        return real(self, chunk, device)

    monkeypatch.setattr(_linear.Layout, "allocate", allocate)
    return given


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_workspace_is_never_exceeded(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    x, other = operands(300, dtype), teacher(300, dtype)
    given = sizes(monkeypatch)
    with pytest.raises(
        ValueError, match=r"workspace_bytes: got 1; wanted at least \d+, the smallest chunk: 64"
    ) as error:
        call(kind, x.leaves(), other, workspace_bytes=1)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    for workspace in (least, least + 1, 2 * least, 100 * least):
        call(kind, x.leaves(), other, workspace_bytes=workspace)
        assert given.pop() <= workspace
    assert not given
    with pytest.raises(ValueError, match=f"workspace_bytes: got {least - 1}; wanted at least {least}"):
        call(kind, x.leaves(), other, workspace_bytes=least - 1)


def test_fewer_tokens_than_the_smallest_chunk_need_less():
    x, other = operands(3), teacher(3)
    call("cross_entropy", x, other, workspace_bytes=4 * VOCAB * 4)


def test_chunks_are_of_one_size_and_as_large_as_fits():
    layout = _linear.Layout()
    layout.add("logits", 1000, torch.float32)
    cpu = torch.device("cpu")
    assert _linear.chunk_rows(layout, 1000, 4000 * 400, cpu) == 336
    assert _linear.chunk_rows(layout, 1000, None, cpu) == 512
    assert _linear.chunk_rows(layout, 1030, None, cpu) == 352
    assert _linear.chunk_rows(layout, 7, None, cpu) == 7


def test_by_default_a_chunk_takes_no_more_than_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch):
    layout = _linear.Layout()
    layout.add("logits", 1000, torch.float32)
    cpu = torch.device("cpu")
    monkeypatch.setattr(_linear, "available_memory", lambda device: 4 * 4000 * 300)
    assert _linear.chunk_rows(layout, 1000, None, cpu) == 256
    monkeypatch.setattr(_linear, "available_memory", lambda device: 0)
    assert _linear.chunk_rows(layout, 1000, None, cpu) == 64


def test_available_memory_is_some_of_this_machines():
    assert 1 << 20 < _linear.available_memory(torch.device("cpu")) < 1 << 50


MEASURE = """
import json, sys, torch, pyalign
from pyalign.benchmark import peak_extra_memory
kind, count, width, vocab, workspace = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
def inputs(count, vocab):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(count, width, generator=g), torch.randn(vocab, width, generator=g)
    other = torch.randn(vocab, width, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), other, torch.arange(count) % vocab
def run(hidden, weight, other, targets):
    if kind == "distill":
        loss = pyalign.linear_distillation_loss(hidden, weight, hidden.detach(), other, workspace_bytes=workspace)
    elif kind == "cross_entropy":
        loss = pyalign.linear_cross_entropy(hidden, weight, targets, workspace_bytes=workspace)
    elif kind == "logprob":
        loss = pyalign.linear_token_logprobs(hidden, weight, targets, workspace_bytes=workspace).sum()
    return torch.autograd.grad(loss, (hidden, weight))
run(*inputs(64, 300))
x = inputs(count, vocab)
print(json.dumps(peak_extra_memory(lambda: run(*x), torch.device("cpu"))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["distill", "cross_entropy", "logprob"])
def test_peak_memory_is_the_workspace_and_the_gradients(kind: str):
    """Logits would be 160 MB a side."""
    count, width, vocab, workspace = 2000, 32, 20000, 24 << 20
    arguments = [sys.executable, "-c", MEASURE, kind, *map(str, (count, width, vocab, workspace))]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    gradients = 4 * width * (count + vocab)
    assert json.loads(result.stdout) <= workspace + gradients + (6 << 20)


# Edges


@every_kernel
@every_kind
def test_no_tokens_and_none_that_count(engine: Engine, kind: str):
    """A differentiable zero, and gradients of zero."""
    for count in (0, 3):
        x, other = pair(engine, torch.float32, count=count)
        other.targets.fill_(-100)
        options = {"mask": other.targets >= 0} if kind in ("distill", "topk") else {}
        with engine():
            leaves = x.leaves()
            result = call(kind, leaves, other, **options)
            assert result.requires_grad
            assert not result.any()
            for y in torch.autograd.grad(result.sum(), leaves):
                assert not y.any()


@every_kind
def test_one_token(kind: str):
    x, other = operands(1), teacher(1, ignored=0)
    assert_close(evaluate(kind, x, other), truth(kind, x, other), torch.float32)


@every_kind
def test_a_head_of_one_entry(kind: str):
    x = operands(5, vocab=1)
    other = teacher(5)._replace(weight=normal(1, 6, seed=5), targets=torch.zeros(5, dtype=torch.int64))
    stored = TopKLogprobs(torch.zeros(5, 1), torch.zeros(5, 1, dtype=torch.int64))
    ours = evaluate(kind, x, other._replace(stored=stored))
    assert not any(y.any() for y in ours.results + ours.gradients)


@quick_engine
@every_kind
def test_what_lies_in_masked_tokens_is_not_read(engine: Engine, kind: str, chunks_of: SetRows):
    x, other = pair(engine, torch.float32)
    masked = other.targets < 0
    options = {"mask": ~masked} if kind in ("distill", "topk") else {}
    chunks_of(8)
    with engine():
        clean = evaluate(kind, x, other, **options)
        x.hidden[masked] = torch.nan
        other.hidden[masked] = torch.inf
        dirty = evaluate(kind, x, other, **options)
    for y, z in zip(clean.results + clean.gradients, dirty.results + dirty.gradients, strict=True):
        assert torch.equal(y, z)


def test_a_nan_stays_in_its_token():
    x, other = operands(), teacher()
    x.hidden[3] = torch.nan
    loss = call("distill", x, other, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]


@quick_engine
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("distill", {"teacher_rows": torch.tensor([0, 21, -1] + [0] * 18)}, "teacher_rows: row 1 holds 21; wanted"),
        ("topk", {"teacher_rows": torch.tensor([0, -1, 44] + [0] * 18)}, "teacher_rows: row 2 holds 44; wanted"),
        ("distill", {"targets": torch.tensor([0] * 20 + [67]), "hard_weight": 0.1}, "targets: row 20 holds 67; wanted"),
        ("topk", {"vocab_size": 3}, "teacher.indices: row 0 holds"),
    ],
)  # fmt: skip
def test_an_index_out_of_range_raises_under_its_number_among_all_tokens(
    engine: Engine, kind: str, options: dict[str, Any], message: str, chunks_of: SetRows
):
    if engine.device != "cpu":
        pytest.skip("gives NaN on a GPU")
    x, other = operands(), teacher()
    chunks_of(8)
    with engine(), pytest.raises(ValueError, match=message):
        call(kind, x, other, **options)


def test_targets_and_entries_are_checked():
    x, other = operands(), teacher(ignored=0)
    other.targets[17] = -1
    for kind in ("cross_entropy", "logprob"):
        with pytest.raises(ValueError, match="targets: row 17 holds -1; wanted 0 <= targets < 67"):
            call(kind, x, other)
    other.stored.indices[18, 1] = other.stored.indices[18, 0]
    with pytest.raises(ValueError, match=r"teacher.indices: row 18 holds an index twice"):
        call("topk", x, other)
    call("topk", x, other, mask=torch.arange(COUNT) != 18)


@every_kind
def test_the_same_bits_every_time(kind: str, chunks_of: SetRows):
    x, other = operands(), teacher()
    chunks_of(5)
    first, second = evaluate(kind, x, other), evaluate(kind, x, other)
    for y, z in zip(first.results + first.gradients, second.results + second.gradients, strict=True):
        assert torch.equal(y, z)


def test_a_weight_of_any_strides():
    """A head tied to an embedding that is stored the other way round."""
    x, other = operands(bias=False), teacher()
    across = x._replace(weight=x.weight.T.contiguous().T)
    for y, z in zip(evaluate("distill", across, other).gradients, evaluate("distill", x, other).gradients, strict=True):
        torch.testing.assert_close(y, z)


# Accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@every_divergence
def test_near_convergence_no_further_off_than_torch_with_float32_operands(dtype: torch.dtype, divergence: str):
    """The student is the teacher plus 2^-8 of noise: losses of 1e-5, which rounding logits to bfloat16 would drown."""
    count, width, vocab = 64, 64, 2000
    other = teacher(count, dtype, vocab=vocab)
    student = Operands(
        normal(count, width, seed=1, dtype=dtype), normal(vocab, width, seed=2, dtype=dtype, scale=0.2), None
    )
    noise = normal(vocab, width, seed=8, scale=0.2 * 2.0**-8)
    other = other._replace(hidden=student.hidden, weight=(student.weight.double() + noise).to(dtype))
    exact = truth("distill", student, other, divergence=divergence, reduction="none")
    ours = evaluate("distill", student, other, divergence=divergence, reduction="none")
    with pyalign.backend("reference"):
        upcast = Operands(student.hidden.float(), student.weight.float(), None)
        above = other._replace(hidden=other.hidden.float(), weight=other.weight.float())
        torchs = evaluate("distill", upcast, above, divergence=divergence, reduction="none")
    assert float(ours.results[0].min()) >= 0.0
    theirs = (torchs.results[0] - exact.results[0]).abs().max()
    # "a + b" of a bfloat16 product has 17 bits: what is lost, times the difference of the distributions.
    lost = 2.0**-16 if dtype == torch.bfloat16 else 0.0
    epsilon = lost * (1.0 if divergence == "tvd" else float(exact.results[0].max().sqrt()))
    assert float((ours.results[0] - exact.results[0]).abs().max()) <= float(theirs) + epsilon + 1e-9
    if divergence == "tvd":
        return  # its gradient jumps where the distributions cross
    unit = {torch.float32: 0.0, torch.bfloat16: 8e-3, torch.float16: 5e-4}[dtype]
    for x, y, z in zip(torchs.gradients, ours.gradients, exact.gradients, strict=True):
        errors = [float((g.double() - z).norm() / z.norm()) for g in (x, y)]
        assert errors[1] <= 1.2 * errors[0] + unit


def test_16_bit_logits_drown_a_small_difference():
    """Why they are not the default."""
    student = operands(64, torch.bfloat16, bias=False, vocab=2000, width=64)
    noise = normal(2000, 64, seed=8, scale=2.0**-9)
    other = teacher(64, torch.bfloat16)._replace(hidden=student.hidden)
    other = other._replace(weight=(student.weight.double() + noise).bfloat16())
    exact = truth("distill", student, other)
    errors = [
        float((evaluate("distill", student, other, logits_dtype=x).gradients[0].double() - exact.gradients[0]).norm())
        for x in (None, torch.bfloat16)
    ]
    assert errors[1] > 4 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_the_weights_gradient_over_chunks_is_no_worse_than_one_product(dtype: torch.dtype, chunks_of: SetRows):
    """Chunks are summed in float32; a running sum of 16 bits would lose the small ones."""
    x, other = operands(512, dtype, bias=False), teacher(512, dtype, ignored=0)
    exact = truth("cross_entropy", x, other).gradients[1]

    def error() -> float:
        return float((evaluate("cross_entropy", x, other).gradients[1].double() - exact).norm() / exact.norm())

    whole = error()
    chunks_of(16)
    assert error() <= 1.5 * whole


def test_kinds_are_all_there():
    """A guard of the tests above."""
    assert set(KINDS) == {"distill", "topk", "cross_entropy", "logprob"}
    assert linear_distillation_loss is pyalign.distill.linear_distillation_loss
