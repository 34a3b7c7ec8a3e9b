# ruff: noqa: E501 (a line per case)
"""Bad arguments of losses from hidden states one by one: each error names the argument, what was given and what is
wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distill_support import Engine, quick_engine
from linear_support import operands, teacher

from pyalign import (
    linear_cross_entropy,
    linear_distillation_loss,
    linear_token_logprobs,
    linear_topk_distillation_loss,
    topk_logprobs,
)

X, OTHER = operands(6, vocab=7, width=4), teacher(6, vocab=7, ignored=0)
H, W, B = X.hidden.view(2, 3, 4), X.weight, X.bias
TH, TW = OTHER.hidden.view(2, 3, 6), OTHER.weight
ROWS = torch.zeros(2, 3, dtype=torch.int64)
TOP = topk_logprobs(TH @ TW.T, 4)


def dense(hidden: Any = H, weight: Any = W, of: Any = TH, by: Any = TW, **options: Any) -> Callable[[], Any]:
    return lambda: linear_distillation_loss(hidden, weight, of, by, **options)


def top(hidden: Any = H, weight: Any = W, stored: Any = TOP, **options: Any) -> Callable[[], Any]:
    return lambda: linear_topk_distillation_loss(hidden, weight, stored, **options)


def entropy(hidden: Any = H, weight: Any = W, targets: Any = ROWS, **options: Any) -> Callable[[], Any]:
    return lambda: linear_cross_entropy(hidden, weight, targets, **options)


def logprobs(hidden: Any = H, weight: Any = W, targets: Any = ROWS, **options: Any) -> Callable[[], Any]:
    return lambda: linear_token_logprobs(hidden, weight, targets, **options)


WRONG = [
    # Hidden states, heads, biases, soft caps
    (dense(hidden=[[1.0]]), TypeError, "student_hidden: got list; wanted a tensor"),
    (dense(of=None), TypeError, "teacher_hidden: got NoneType; wanted a tensor"),
    (entropy(hidden=None), TypeError, "hidden: got NoneType; wanted a tensor"),
    (top(hidden=H.long()), TypeError, "student_hidden: got torch.int64; wanted float32, bfloat16, float16 or float64"),
    (dense(of=TH.bool()), TypeError, "teacher_hidden: got torch.bool; wanted float32"),
    (dense(hidden=torch.tensor(1.0)), ValueError, "student_hidden: got 0 dimensions; wanted at least 1"),
    (dense(weight=[1.0]), TypeError, "student_weight: got list; wanted a tensor"),
    (dense(weight=W.T), ValueError, "student_weight: got shape (4, 7); wanted (V, 4), a row for each of V > 0 entries, as long as student_hidden's"),
    (dense(by=TW[:, :5]), ValueError, "teacher_weight: got shape (7, 5); wanted (V, 6)"),
    (entropy(weight=W[0]), ValueError, "weight: got shape (4,); wanted (V, 4)"),
    (logprobs(weight=W[:0]), ValueError, "weight: got shape (0, 4); wanted (V, 4), a row for each of V > 0 entries"),
    (entropy(hidden=H[..., :0], weight=W[:, :0]), ValueError, "weight: got shape (7, 0); wanted (V, 0)"),
    (dense(weight=W.bfloat16()), TypeError, "student_weight: got torch.bfloat16; wanted torch.float32, that of student_hidden (or autocast)"),
    (dense(by=TW.double()), TypeError, "teacher_weight: got torch.float64; wanted torch.float32, that of teacher_hidden (or autocast)"),
    (dense(weight=W.to("meta")), ValueError, "student_weight: got a tensor on meta; wanted one on cpu, where student_hidden is"),
    (dense(of=TH.to("meta"), by=TW.to("meta")), ValueError, "teacher_hidden: got a tensor on meta; wanted one on cpu"),
    (dense(of=TH[:1]), ValueError, "teacher_hidden: got leading shape (1, 3); wanted the student's (2, 3), or teacher_rows="),
    (dense(by=TW[:5]), ValueError, "teacher_weight: got a vocabulary of 5; wanted the student's 7, or vocab_size= for both"),
    (dense(student_bias=B[:3]), ValueError, "student_bias: got shape (3,); wanted (7,), one per row of student_weight"),
    (dense(teacher_bias=B.long()), TypeError, "teacher_bias: got torch.int64; wanted float32"),
    (entropy(bias=B.to("meta")), ValueError, "bias: got a tensor on meta; wanted one on cpu, where hidden is"),
    (dense(student_softcap=0.0), ValueError, "student_softcap: got 0.0; wanted None or a finite number > 0"),
    (dense(teacher_softcap=-1), ValueError, "teacher_softcap: got -1; wanted None or a finite number > 0"),
    (logprobs(softcap="3"), ValueError, "softcap: got '3'; wanted None or a finite number > 0"),
    # How logits are computed
    (dense(workspace_bytes=0), ValueError, "workspace_bytes: got 0; wanted an int >= 1, or None"),
    (entropy(workspace_bytes=1e9), ValueError, "workspace_bytes: got 1000000000.0; wanted an int >= 1, or None"),
    (logprobs(workspace_bytes=True), ValueError, "workspace_bytes: got True; wanted an int >= 1, or None"),
    (top(num_valid=-1), ValueError, "num_valid: got -1; wanted an int >= 0, or None"),
    (entropy(num_valid=torch.tensor(3)), ValueError, "num_valid: got tensor(3); wanted an int >= 0, or None"),
    (dense(logits_dtype=torch.bfloat16), ValueError, "logits_dtype: got torch.bfloat16; wanted torch.float32, or the 16-bit dtype of all products (here torch.float32)"),
    (dense(hidden=H.half(), weight=W.half(), logits_dtype=torch.float16), ValueError, "logits_dtype: got torch.float16; wanted torch.float32, or the 16-bit dtype of all products (here torch.float16 and torch.float32)"),
    (entropy(logits_dtype=torch.float64), ValueError, "logits_dtype: got torch.float64; wanted torch.float32"),
    (entropy(workspace_bytes=3), ValueError, "workspace_bytes: got 3; wanted at least 192, the smallest chunk: 6 tokens at a time"),
    # Options of the loss
    (dense(vocab_size=8), ValueError, "vocab_size: got 8; wanted an int with 0 < vocab_size <= 7, the smaller head"),
    (top(vocab_size=0), ValueError, "vocab_size: got 0; wanted an int with 0 < vocab_size <= 7"),
    (dense(divergence="kl"), ValueError, "divergence: got 'kl'; wanted one of"),
    (dense(divergence="jsd", beta=1.0), ValueError, "beta: got 1.0; wanted 0 < beta < 1"),
    (dense(temperature=0), ValueError, "temperature: got 0; wanted a finite number > 0"),
    (logprobs(temperature=-1.0), ValueError, "temperature: got -1.0; wanted a finite number > 0"),
    (top(temperature=2.0), ValueError, "temperature: got 2.0; wanted the teacher's stored 1.0"),
    (top(tail="none"), ValueError, "tail: got 'none'; wanted one of 'bucket'"),
    (top(stored=TH), TypeError, "teacher: got Tensor; wanted a TopKLogprobs"),
    (top(stored=TOP._replace(logprobs=TOP.logprobs[:1], indices=TOP.indices[:1])), ValueError, "teacher.logprobs: got leading shape (1, 3); wanted the student's (2, 3)"),
    (dense(reduction="avg"), ValueError, "reduction: got 'avg'; wanted one of 'none', 'sum', 'mean'"),
    (entropy(reduction="avg"), ValueError, "reduction: got 'avg'; wanted one of 'none', 'sum', 'mean'"),
    (entropy(label_smoothing=1.0), ValueError, "label_smoothing: got 1.0; wanted 0 <= label_smoothing < 1"),
    (entropy(z_loss=-0.1), ValueError, "z_loss: got -0.1; wanted a finite number >= 0"),
    (entropy(num_items=2, reduction="sum"), ValueError, "num_items: got 2; wanted None with reduction 'sum'"),
    (dense(num_items=-1), ValueError, "num_items: got -1; wanted an int >= 0 or a 0-dim tensor"),
    (dense(hard_weight=0.5), ValueError, "targets: got None; wanted token ids, because hard_weight is 0.5"),
    # Tensors with one entry per token
    (dense(mask=ROWS[0] > 0), ValueError, "mask: got shape (3,); wanted (2, 3), one per token"),
    (dense(labels=ROWS.double()), TypeError, "labels: got torch.float64; wanted an integer dtype"),
    (dense(teacher_rows=ROWS.flatten()), ValueError, "teacher_rows: got shape (6,); wanted (2, 3), one per token"),
    (top(weight=W, mask=torch.ones(2, 3)), TypeError, "mask: got torch.float32; wanted bool or an integer dtype"),
    (entropy(targets=ROWS[:1]), ValueError, "targets: got shape (1, 3); wanted (2, 3), one per token"),
    (logprobs(targets=ROWS.float()), TypeError, "targets: got torch.float32; wanted an integer dtype"),
    (entropy(targets=[0]), TypeError, "targets: got list; wanted a tensor"),
    # What is not there
    (dense(process_group=object()), TypeError, "process_group: got object; wanted a torch.distributed process group"),
    (top(process_group=object()), TypeError, "process_group: got object; wanted a torch.distributed process group"),
    (entropy(process_group=object()), TypeError, "process_group: got object; wanted a torch.distributed process group"),
    (logprobs(process_group=object()), TypeError, "process_group: got object; wanted a torch.distributed process group"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message.split(";")[0] for *_, message in WRONG])
def test_wrong_argument(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


@quick_engine
def test_the_arguments_that_the_cases_start_from_are_right(engine: Engine):
    with engine():
        for call in (dense(), top(), entropy(), logprobs()):
            call()


def test_a_token_weight_is_not_the_head():
    """``weight`` is one number per token, as in the loss from logits; the heads are named by their side."""
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 1.0]])
    each = linear_distillation_loss(H, W, TH, TW, reduction="none")
    torch.testing.assert_close(linear_distillation_loss(H, W, TH, TW, weight=weights, reduction="none"), weights * each)
