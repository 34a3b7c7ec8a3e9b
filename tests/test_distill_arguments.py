# ruff: noqa: E501 (a line per case)
"""Bad arguments one by one: each error names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distill_support import GPU, Engine, every_engine, logits, over, quick_engine

import pyalign
from pyalign import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs
from pyalign.nn import DistillationLoss, TopKDistillationLoss

S, T = logits(2, 3, 7, seed=1), logits(2, 3, 7, seed=2)
ROWS = torch.zeros(2, 3, dtype=torch.int64)
TOP = topk_logprobs(T, 4)


def dense(student: Any = S, teacher: Any = T, **options: Any) -> Callable[[], Any]:
    return lambda: distillation_loss(student, teacher, **options)


def top(student: Any = S, teacher: Any = TOP, **options: Any) -> Callable[[], Any]:
    return lambda: topk_distillation_loss(student, teacher, **options)


def extract(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: topk_logprobs(*arguments, **options)


def stored(**parts: Any) -> TopKLogprobs:
    return TOP._replace(**parts)


META = torch.empty(2, 3, 7, device="meta")
WRONG = [
    # What logits are
    (dense(student=[[1.0]]), TypeError, "student_logits: got list; wanted a tensor"),
    (dense(teacher=None), TypeError, "teacher_logits: got NoneType; wanted a tensor"),
    (dense(student=S.long()), TypeError, "student_logits: got torch.int64; wanted float32, bfloat16, float16 or float64"),
    (dense(teacher=T.bool()), TypeError, "teacher_logits: got torch.bool; wanted float32"),
    (dense(student=S.to(torch.float8_e4m3fn)), TypeError, "student_logits: got torch.float8_e4m3fn; wanted float32"),
    (dense(student=S.to(torch.complex64)), TypeError, "student_logits: got torch.complex64; wanted float32"),
    (dense(student=torch.tensor(1.0)), ValueError, "student_logits: got 0 dimensions; wanted at least 1"),
    (dense(teacher=torch.tensor(1.0)), ValueError, "teacher_logits: got 0 dimensions; wanted at least 1"),
    (dense(teacher=META), ValueError, "teacher_logits: got a tensor on meta; wanted one on cpu, where the logits are"),
    (dense(teacher=T[:1]), ValueError, "teacher_logits: got leading shape (1, 3); wanted the student's (2, 3), or teacher_rows="),
    (dense(teacher=T.flatten(0, 1)), ValueError, "teacher_logits: got leading shape (6,); wanted the student's (2, 3)"),
    (dense(teacher=T[..., :5]), ValueError, "teacher_logits: got a vocabulary of 5; wanted the student's 7, or vocab_size="),
    (dense(S[..., :0], T[..., :0]), ValueError, "student_logits: got shape (2, 3, 0); wanted a vocabulary of at least 1"),
    # vocab_size
    (dense(vocab_size=8), ValueError, "vocab_size: got 8; wanted an int with 0 < vocab_size <= 7, the smaller logits"),
    (dense(teacher=T[..., :5], vocab_size=6), ValueError, "vocab_size: got 6; wanted an int with 0 < vocab_size <= 5"),
    (dense(vocab_size=0), ValueError, "vocab_size: got 0; wanted an int with 0 < vocab_size <= 7"),
    (dense(vocab_size=3.0), ValueError, "vocab_size: got 3.0; wanted an int"),
    (top(vocab_size=-1), ValueError, "vocab_size: got -1; wanted an int with 0 < vocab_size <= 7"),
    # Options
    (dense(divergence="kl"), ValueError, "divergence: got 'kl'; wanted one of 'forward_kl', 'reverse_kl', 'jsd', 'tvd'"),
    (top(divergence=None), ValueError, "divergence: got None; wanted one of 'forward_kl'"),
    (dense(divergence="jsd", beta=0.0), ValueError, "beta: got 0.0; wanted 0 < beta < 1 (at 0 and 1 the divergence is 0"),
    (dense(divergence="jsd", beta=1), ValueError, "beta: got 1; wanted 0 < beta < 1"),
    (top(divergence="jsd", beta=math.nan), ValueError, "beta: got nan; wanted 0 < beta < 1"),
    (dense(temperature=0.0), ValueError, "temperature: got 0.0; wanted a finite number > 0"),
    (dense(temperature=-1), ValueError, "temperature: got -1; wanted a finite number > 0"),
    (dense(temperature=math.inf), ValueError, "temperature: got inf; wanted a finite number > 0"),
    (dense(temperature=math.nan), ValueError, "temperature: got nan; wanted a finite number > 0"),
    (dense(temperature="2"), ValueError, "temperature: got '2'; wanted a finite number > 0"),
    (top(temperature=2.0), ValueError, "temperature: got 2.0; wanted the teacher's stored 1.0: its tail can't be re-tempered"),
    (dense(reduction="batchmean"), ValueError, "reduction: got 'batchmean'; wanted one of 'none', 'sum', 'mean'"),
    (dense(hard_weight=-0.1), ValueError, "hard_weight: got -0.1; wanted 0 <= hard_weight <= 1"),
    (dense(hard_weight=1.1), ValueError, "hard_weight: got 1.1; wanted 0 <= hard_weight <= 1"),
    (dense(hard_weight=math.nan), ValueError, "hard_weight: got nan; wanted 0 <= hard_weight <= 1"),
    (dense(hard_weight=0.5), ValueError, "targets: got None; wanted token ids, because hard_weight is 0.5"),
    (dense(process_group=object()), TypeError, "process_group: got object; wanted a torch.distributed process group"),
    (top(process_group=object()), TypeError, "process_group: got object; wanted a torch.distributed process group"),
    # Tensors with one entry per token
    (dense(mask=[True]), TypeError, "mask: got list; wanted a tensor"),
    (dense(mask=ROWS[0] > 0), ValueError, "mask: got shape (3,); wanted (2, 3), one per token (nothing is broadcast)"),
    (dense(mask=torch.ones(2, 3)), TypeError, "mask: got torch.float32; wanted bool or an integer dtype (use weight="),
    (dense(mask=ROWS.to("meta") > 0), ValueError, "mask: got a tensor on meta; wanted one on cpu"),
    (dense(labels=ROWS[:, :2]), ValueError, "labels: got shape (2, 2); wanted (2, 3), one per token"),
    (dense(labels=ROWS.double()), TypeError, "labels: got torch.float64; wanted an integer dtype"),
    (dense(labels=ROWS > 0), TypeError, "labels: got torch.bool; wanted an integer dtype"),
    (dense(labels=0), TypeError, "labels: got int; wanted a tensor"),
    (dense(teacher_rows=ROWS.flatten()), ValueError, "teacher_rows: got shape (6,); wanted (2, 3), one per token"),
    (dense(teacher_rows=ROWS.float()), TypeError, "teacher_rows: got torch.float32; wanted an integer dtype"),
    (dense(weight=torch.ones(2, 1)), ValueError, "weight: got shape (2, 1); wanted (2, 3), one per token"),
    (dense(weight=ROWS), TypeError, "weight: got torch.int64; wanted a floating dtype"),
    (dense(weight=0.5), TypeError, "weight: got float; wanted a tensor"),
    (dense(weight=torch.ones(2, 3, requires_grad=True)), ValueError, "weight: got a tensor that requires grad; wanted a constant"),
    (dense(targets=ROWS[..., None], hard_weight=1.0), ValueError, "targets: got shape (2, 3, 1); wanted (2, 3), one per token"),
    (dense(targets=ROWS.half(), hard_weight=1.0), TypeError, "targets: got torch.float16; wanted an integer dtype"),
    # num_items
    (dense(num_items=3, reduction="sum"), ValueError, "num_items: got 3; wanted None with reduction 'sum'"),
    (dense(num_items=3, reduction="none"), ValueError, "num_items: got 3; wanted None with reduction 'none'"),
    (dense(num_items=-1), ValueError, "num_items: got -1; wanted an int >= 0 or a 0-dim tensor"),
    (dense(num_items=2.5), ValueError, "num_items: got 2.5; wanted an int >= 0 or a 0-dim tensor"),
    (dense(num_items=torch.tensor([3])), ValueError, "num_items: got shape (1,); wanted an int or a 0-dim tensor"),
    (dense(num_items=torch.tensor(3, device="meta")), ValueError, "num_items: got a tensor on meta; wanted one on cpu"),
    # The stored teacher
    (top(teacher=(1, 2)), TypeError, "teacher: got tuple; wanted a TopKLogprobs"),
    (top(teacher=T), TypeError, "teacher: got Tensor; wanted a TopKLogprobs"),
    (top(tail="clamp"), ValueError, "tail: got 'clamp'; wanted one of 'bucket', 'renormalize', 'drop'"),
    (top(teacher=stored(logprobs=TOP.indices)), TypeError, "teacher.logprobs: got torch.int64; wanted float32"),
    (top(teacher=stored(logprobs=torch.tensor(0.0))), ValueError, "teacher.logprobs: got 0 dimensions; wanted at least 1"),
    (top(teacher=stored(indices=TOP.indices.short())), TypeError, "teacher.indices: got torch.int16; wanted int32 or int64"),
    (top(teacher=stored(indices=TOP.indices[..., :3])), ValueError, "teacher.indices: got shape (2, 3, 3); wanted that of teacher.logprobs, (2, 3, 4)"),
    (top(teacher=stored(indices=TOP.indices[..., :0], logprobs=TOP.logprobs[..., :0])), ValueError, "teacher.indices: got shape (2, 3, 0); wanted"),
    (top(teacher=topk_logprobs(T[:1], 4)), ValueError, "teacher.logprobs: got leading shape (1, 3); wanted the student's (2, 3), or teacher_rows="),
    (top(teacher=stored(residual=T[..., :1])), ValueError, "teacher.residual: got shape (2, 3, 1); wanted (2, 3)"),
    (top(teacher=stored(residual=ROWS)), TypeError, "teacher.residual: got torch.int64; wanted float32"),
    (top(teacher=stored(residual=T[..., 0].to("meta"))), ValueError, "teacher.residual: got a tensor on meta; wanted one on cpu"),
    (top(teacher=stored(logprobs=TOP.logprobs.to("meta"))), ValueError, "teacher.logprobs: got a tensor on meta; wanted one on cpu"),
    (top(teacher=stored(indices=TOP.indices.to("meta"))), ValueError, "teacher.indices: got a tensor on meta; wanted one on cpu"),
    (top(teacher=stored(temperature=0.0)), ValueError, "teacher.temperature: got 0.0; wanted a finite number > 0"),
    (top(student=S.int()), TypeError, "student_logits: got torch.int32; wanted float32"),
    (top(student=S[..., :0]), ValueError, "student_logits: got shape (2, 3, 0); wanted a vocabulary of at least 1"),
    # Extraction
    (extract(T, 0), ValueError, "k: got 0; wanted an int with 0 < k <= 7, the vocabulary"),
    (extract(T, 8), ValueError, "k: got 8; wanted an int with 0 < k <= 7, the vocabulary"),
    (extract(T, 2.0), ValueError, "k: got 2.0; wanted an int"),
    (extract(T.long(), 2), TypeError, "logits: got torch.int64; wanted float32"),
    (extract(T, 2, temperature=0), ValueError, "temperature: got 0; wanted a finite number > 0"),
    (extract([1.0], 1), TypeError, "logits: got list; wanted a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message.split(";")[0] for *_, message in WRONG])
def test_wrong_argument(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)


# Values that only the engines see, when they read them: on the CPU they raise.


def out_of_range(values: list[int]) -> torch.Tensor:
    return torch.tensor(values).view(2, 3)


@quick_engine
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dense(targets=out_of_range([0, 1, 2, 3, 7, 0]), hard_weight=0.5), "targets: row 4 holds 7; wanted 0 <= targets < 7"),
        (dense(targets=out_of_range([0, 1, -1, 3, 7, 0]), hard_weight=0.5), "targets: row 2 holds -1; wanted 0 <= targets < 7"),
        (dense(targets=out_of_range([0, 1, 2, 3, 5, 0]), hard_weight=0.5, vocab_size=5), "targets: row 4 holds 5; wanted 0 <= targets < 5"),
        (dense(teacher_rows=out_of_range([0, 1, 2, 3, 4, 6])), "teacher_rows: row 5 holds 6; wanted 0 <= teacher_rows < 6"),
        (top(teacher_rows=out_of_range([0, 6, 2, 3, 4, 0])), "teacher_rows: row 1 holds 6; wanted 0 <= teacher_rows < 6"),
        (top(teacher=stored(indices=TOP.indices.where(TOP.logprobs > -9, 7).index_fill(-1, torch.tensor([2]), 7))),
         "teacher.indices: row 0 holds 7; wanted 0 <= teacher.indices < 7"),
        (top(teacher=stored(indices=TOP.indices.index_fill(-1, torch.tensor([1]), -2))), "teacher.indices: row 0 holds -2; wanted"),
        (top(teacher=stored(indices=torch.arange(4).expand(2, 3, 4).contiguous()), vocab_size=3), "teacher.indices: row 0 holds 3; wanted 0 <= teacher.indices < 3"),
        (top(teacher=stored(indices=torch.tensor([1, 2, 3, 1]).expand(2, 3, 4).contiguous())), "teacher.indices: row 0 holds an index twice"),
        (top(teacher=stored(indices=torch.tensor([1, -1, 3, 1]).expand(2, 3, 4).contiguous().int())), "teacher.indices: row 0 holds an index twice"),
    ],
)  # fmt: skip
def test_an_out_of_range_index_raises_on_the_cpu(engine: Engine, call: Callable[[], Any], message: str):
    if engine.device != "cpu":
        pytest.skip("on a GPU its row is NaN")
    with engine(), pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.smoke
@over(tuple(engine for engine in every_engine.args[1] if engine.name in ("triton", "cuda")))
def test_an_out_of_range_index_gives_nan_for_its_row_alone(engine: Engine):
    """What the GPU kernels do, where raising would mean to wait for them; the interpreter runs the same code."""
    s, t = S.to(engine.device).requires_grad_(), T.to(engine.device)
    good = torch.tensor([[0, 1, 2], [3, 4, 5]], device=engine.device)
    bad = torch.tensor([[0, 99, 2], [3, 4, 5]], device=engine.device)
    low = torch.tensor([[0, -1, 2], [3, 4, 5]], device=engine.device)  # not the ignore_index, -100
    teacher = TopKLogprobs(*(x.to(engine.device) for x in TOP[:3]))
    indices = teacher.indices.clone()
    indices[0, 1, 2] = indices[0, 1, 0]
    indices[1, 2, 3] = 7
    with engine():
        for function, other, right, wrong, rows in (
            (distillation_loss, t, {"teacher_rows": good}, {"teacher_rows": bad}, [1]),
            (distillation_loss, t, {"targets": good, "hard_weight": 0.5}, {"targets": bad, "hard_weight": 0.5}, [1]),
            (distillation_loss, t, {"targets": good, "hard_weight": 0.5}, {"targets": low, "hard_weight": 0.5}, [1]),
            (topk_distillation_loss, teacher, {"teacher_rows": good}, {"teacher_rows": bad}, [1]),
            (topk_distillation_loss, teacher, {}, {"teacher": teacher._replace(indices=indices)}, [1, 5]),
        ):
            expected = function(s, other, reduction="none", **right).flatten()
            loss = function(s, wrong.pop("teacher", other), reduction="none", **wrong).flatten()
            (gradient,) = torch.autograd.grad(loss.sum(), s)
            (expected_gradient,) = torch.autograd.grad(expected.sum(), s)
            others = [row for row in range(6) if row not in rows]
            assert loss[rows].isnan().all()
            assert torch.equal(loss[others], expected[others])
            assert gradient.flatten(0, 1)[rows].isnan().all(-1).all()
            assert torch.equal(gradient.flatten(0, 1)[others], expected_gradient.flatten(0, 1)[others])


@quick_engine
def test_an_index_of_an_uncounted_token_is_not_looked_at(engine: Engine):
    mask = torch.tensor([[True, False, True], [True, True, True]], device=engine.device)
    wild = torch.tensor([[0, 10**12, 2], [3, 4, 5]], device=engine.device)
    s, t = S.to(engine.device), T.to(engine.device)
    teacher = TopKLogprobs(*(x.to(engine.device) for x in TOP[:3]))
    indices = teacher.indices.clone()
    indices[0, 1] = 10**12
    with engine():
        assert distillation_loss(s, t, mask=mask, teacher_rows=wild).isfinite()
        assert distillation_loss(s, t, mask=mask, targets=wild, hard_weight=0.5).isfinite()
        assert topk_distillation_loss(s, teacher, mask=mask, teacher_rows=wild).isfinite()
        assert topk_distillation_loss(s, teacher._replace(indices=indices), mask=mask).isfinite()


# Forms of one argument


def test_every_integer_dtype_is_taken():
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        mask = torch.tensor([[1, 0, 2], [0, 0, 1]], dtype=dtype)
        labels = torch.tensor([[3, -100, 2], [-100, -100, 0]], dtype=dtype)
        rows = torch.tensor([[3, -1, 2], [-1, -1, 0]], dtype=dtype)
        expected = distillation_loss(S, T, mask=mask != 0, reduction="none")
        assert torch.equal(distillation_loss(S, T, mask=mask, reduction="none"), expected)
        assert torch.equal(distillation_loss(S, T, labels=labels, reduction="none"), expected)
        targets = torch.tensor([[3, 5, 2], [0, 1, 0]])
        by_row = distillation_loss(S, T, teacher_rows=rows.long(), targets=targets, hard_weight=0.5)
        assert torch.equal(
            distillation_loss(S, T, teacher_rows=rows, targets=targets.to(dtype), hard_weight=0.5), by_row
        )


def test_num_items_as_int_or_tensor_is_the_same():
    expected = distillation_loss(S, T, reduction="sum") / 5
    for num_items in (5, torch.tensor(5), torch.tensor(5.0), torch.tensor(5.0, dtype=torch.float64)):
        torch.testing.assert_close(distillation_loss(S, T, num_items=num_items), expected)


def test_options_without_effect_change_nothing():
    """beta without jsd, targets with a hard weight of 0, the teacher's own temperature."""
    assert torch.equal(distillation_loss(S, T, beta=0.0), distillation_loss(S, T))
    assert torch.equal(distillation_loss(S, T, targets=ROWS + 99), distillation_loss(S, T))
    assert torch.equal(topk_distillation_loss(S, TOP, temperature=1.0), topk_distillation_loss(S, TOP))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match=r"mask: got a tensor on cpu; wanted one on cuda:0"):
        distillation_loss(S.cuda(), T.cuda(), mask=ROWS > 0)


# Modules


def test_modules_are_the_functions_with_their_options_fixed():
    options = {"divergence": "jsd", "beta": 0.3, "temperature_squared": True, "hard_weight": 0.5, "vocab_size": 6,
               "reduction": "sum", "ignore_index": -1}  # fmt: skip
    tensors = {"mask": ROWS == 0, "targets": ROWS - 1, "weight": torch.full((2, 3), 0.5)}
    module = DistillationLoss(temperature=2.0, **options)
    assert torch.equal(module(S, T, **tensors), distillation_loss(S, T, temperature=2.0, **options, **tensors))
    teacher = topk_logprobs(T[..., :6], 4, temperature=2.0)
    module = TopKDistillationLoss(tail="renormalize", **options)
    expected = topk_distillation_loss(S, teacher, tail="renormalize", **options, **tensors)
    assert torch.equal(module(S, teacher, **tensors), expected)
    loss, metrics = DistillationLoss()(S, T, return_metrics=True)
    assert metrics.entropy.shape == metrics.agreement.shape == S.shape[:-1]
    assert torch.equal(loss, distillation_loss(S, T))


def test_modules_have_no_parameters_and_show_their_options():
    for module in (DistillationLoss(divergence="jsd"), TopKDistillationLoss(divergence="jsd", inplace=True)):
        assert not list(module.parameters())
        assert not module.state_dict()
        assert "divergence='jsd'" in repr(module)


def test_every_option_of_the_functions_is_one_of_the_modules_or_of_their_call():
    import inspect

    given = {"mask", "labels", "teacher_rows", "weight", "targets", "num_items", "return_metrics"}
    for function, module in ((distillation_loss, DistillationLoss), (topk_distillation_loss, TopKDistillationLoss)):
        options = {x.name for x in inspect.signature(function).parameters.values() if x.kind is x.KEYWORD_ONLY}
        fixed = set(inspect.signature(module).parameters)
        # A stored teacher brings its temperature along.
        assert options - given - {"temperature"} == fixed - {"temperature"}
    assert {"DistillationLoss", "TopKDistillationLoss"} <= set(pyalign.nn.__all__)
