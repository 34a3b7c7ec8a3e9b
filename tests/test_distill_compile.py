"""Under torch.compile without a graph break, checkpointing and autocast, losses and gradients are the eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distill_support import (
    DIVERGENCES,
    ENGINES,
    KERNELS,
    TAILS,
    Engine,
    Outcome,
    assert_close,
    every_engine,
    every_kernel,
    logits,
    name_of,
    over,
    quick_engine,
    student_and_teacher,
    truth,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import pyalign
from pyalign import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs
from pyalign._types import Options, Tokens

pytestmark = [
    pytest.mark.usefixtures("unpoisoned"),
    # torch.compile's own, of torch 2.13.
    pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
quick_kernel = over(tuple(engine for engine in KERNELS if not engine.slow))
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The function as one graph, and what counts how often it is compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def step(function: Callable[..., Any], student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Loss, gradient and metrics; the upstream gradients are no powers of 2, so that all of them round."""
    student = student.detach().requires_grad_()
    result = function(student, *arguments)
    loss, metrics = result if isinstance(result, tuple) else (result, ())
    loss.backward((torch.arange(loss.numel(), device=loss.device, dtype=loss.dtype) + 0.3).view(loss.shape))
    assert student.grad is not None
    return loss.detach(), student.grad, *metrics


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """The same bits, but that a compiled graph may round a 16-bit gradient times its upstream once more."""
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if i == 1 and x.dtype in (torch.bfloat16, torch.float16):
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-7)
        else:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def pair(engine: Engine, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return student_and_teacher(*shape, dtype=dtype, device=engine.device)


# torch.library's checks


def raw_arguments(
    engine: Engine, student: Tensor, *teacher: Any, reduction: str = "mean", divergence: str = "forward_kl",
    flags: tuple[bool, bool, bool] = (True, True, True), **tokens: Any,
) -> tuple[Any, ...]:  # fmt: skip
    options = Options(student.shape[-1], divergence)
    return (student, *teacher, *Tokens(reduction=reduction, **tokens), *options, *flags, engine.name)


def raw_calls(engine: Engine) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.pyalign
    count, vocab = 6, 31
    student, teacher = pair(engine, count, vocab)
    device = {"device": engine.device}
    tokens = {
        "mask": torch.arange(count, **device) > 1,
        "labels": torch.arange(count, **device) - 100,
        "weight": torch.arange(count, **device) / 2,
        "num_items": torch.tensor(3.0, **device),
    }
    upstream = torch.arange(count, **device) / 4
    for divergence in DIVERGENCES[:: 3 if engine.slow else 1]:
        yield ops.distill, raw_arguments(engine, student, teacher, divergence=divergence)
    for flags in ((True, False, False), (False, True, False), (True, True, True)):
        each = {"flags": flags, "reduction": "none", "upstream": upstream}
        yield ops.distill, raw_arguments(engine, student, teacher, **each)
    yield ops.distill, raw_arguments(engine, student, teacher, **tokens)
    yield ops.distill, raw_arguments(engine, student.bfloat16().view(2, 3, vocab)[:, 1:], teacher[2:].half())
    logprobs, indices, residual, _ = topk_logprobs(teacher, 5)
    for tail in TAILS[:: 2 if engine.slow else 1]:
        yield ops.topk_distill, raw_arguments(engine, student, logprobs, indices, residual, tail, **tokens)
    yield ops.topk_distill, raw_arguments(engine, student, logprobs.half(), indices.int(), None, "bucket")
    yield ops.topk, (teacher, 5, 1.5, engine.name)
    yield ops.topk, (teacher.bfloat16().view(2, 3, vocab)[:, 1:], 1, 1.0, engine.name)
    yield ops.scale_, (student.clone(), torch.tensor(0.3, **device), engine.name)
    yield ops.scale_, (student.bfloat16(), torch.tensor(0.3, **device), engine.name)


@every_kernel
def test_raw_ops_keep_to_their_schema_and_their_fake_results_have_the_real_ones_shape(engine: Engine):
    """Nothing is written but what the schema says, no output is an input; fake shapes, strides and dtypes are real."""
    with engine():
        for op, arguments in raw_calls(engine):
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(op, arguments, test_utils=checks[: 2 if engine.slow else 3])


@every_kernel
def test_in_place_raw_ops_write_the_student_as_their_schema_says(engine: Engine):
    """(torch can't functionalise an op that writes and returns fresh results too: compiled code has no use of it.)"""
    checks = ("test_schema", "test_faketensor")
    student, teacher = pair(engine, 6, 31)
    logprobs, indices, residual, _ = topk_logprobs(teacher.cpu(), 5)
    assert residual is not None
    stored = (logprobs.to(engine.device), indices.to(engine.device), residual.to(engine.device), "bucket")
    for metrics in (False, True):
        for op, other in ((torch.ops.pyalign.distill_, (teacher,)), (torch.ops.pyalign.topk_distill_, stored)):
            *head, _, _, _, name = raw_arguments(engine, student.clone(), *other)
            torch.library.opcheck(op, (*head, metrics, name), test_utils=checks)


# Compiled steps


def steps() -> Iterator[Any]:
    """Every divergence with every reduction on compiled kernels, with one of them where torch compiles plain torch."""
    for engine in ENGINES:
        for i, divergence in enumerate(DIVERGENCES):
            for j, reduction in enumerate(("mean", "sum", "none")):
                if not engine.slow and (engine.name != "reference" or (i + j) % 3 == 0):
                    yield pytest.param(
                        engine, divergence, reduction, TAILS[(i + 2 * j) % 3],
                        id=f"{engine.name}-{divergence}-{reduction}",
                    )  # fmt: skip


every_step = pytest.mark.parametrize(("engine", "divergence", "reduction", "tail"), list(steps()))


@every_step
def test_a_compiled_step_is_the_eager_one(engine: Engine, divergence: str, reduction: str, tail: str):
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return distillation_loss(student, teacher, divergence=divergence, reduction=reduction)

    with engine():
        both = pair(engine, 2, 3, 31)
        function, counter = compiled(loss)
        assert_same(step(function, *both), step(loss, *both))
    assert counter.frame_count == 1


@every_step
def test_a_compiled_topk_step_is_the_eager_one(engine: Engine, divergence: str, reduction: str, tail: str):
    """The teacher's extraction in the same graph."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        stored = topk_logprobs(teacher, 5, temperature=1.5)
        return topk_distillation_loss(student, stored, divergence=divergence, tail=tail, reduction=reduction)

    with engine():
        both = pair(engine, 2, 3, 31)
        function, counter = compiled(loss)
        assert_same(step(function, *both), step(loss, *both))
    assert counter.frame_count == 1


@quick_kernel
@every_dtype
@every_reduction
def test_a_compiled_step_of_every_dtype_is_within_the_eager_bounds(engine: Engine, dtype: torch.dtype, reduction: str):
    """float16 recomputes its gradient from the upstream; bfloat16 scales the stored one by it."""
    student, teacher = pair(engine, 4, 31, dtype=dtype)
    upstream = torch.tensor(0.37) if reduction != "none" else torch.tensor([0.37, 1.7, 0.0, -2.3])
    exact = truth(student, teacher, upstream, reduction=reduction)
    with engine():
        function, _ = compiled(lambda s, t: distillation_loss(s, t, reduction=reduction))
        leaf = student.requires_grad_()
        loss = function(leaf, teacher)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss))
    assert_close(Outcome(loss.detach(), gradient), exact, dtype)


@quick_engine
def test_a_compiled_backward_scales_by_the_upstream_itself_not_by_its_rounding(engine: Engine):
    """0.37 is off by 0.23 % in bfloat16, and so would be every gradient; one's own rounding averages out."""
    student, teacher = pair(engine, 64, 31, dtype=torch.bfloat16)
    upstream = torch.tensor(0.37, device=engine.device)
    exact = truth(student, teacher, upstream).gradient
    leaf = student.requires_grad_()
    with engine():
        function, _ = compiled(lambda s, t: distillation_loss(s, t))
        (gradient,) = torch.autograd.grad(function(leaf, teacher), leaf, upstream)
    slope = float((gradient.cpu().double() * exact).sum() / exact.square().sum())
    assert slope == pytest.approx(1.0, abs=5e-4)


@every_engine
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_a_compiled_step_with_every_option_and_metrics_is_the_eager_one(engine: Engine, kind: str):
    tokens = (2, 3)
    numbers = torch.arange(6, device=engine.device).view(tokens)
    given = {
        "mask": numbers != 1, "labels": numbers - 100, "teacher_rows": (numbers + 2) % 6 - (numbers == 3) * 9,
        "weight": numbers / 3, "targets": numbers + 20, "num_items": torch.tensor(3, device=engine.device),
    }  # fmt: skip
    options = {"hard_weight": 0.25, "temperature_squared": True, "return_metrics": True, "vocab_size": 30}

    def loss(student: Tensor, teacher: Tensor, given: dict[str, Tensor]) -> Any:
        if kind == "dense":
            return distillation_loss(student, teacher, temperature=1.5, **given, **options)
        # As a store has them: int32 and bfloat16, no residual, a missing entry.
        logprobs, indices, _, temperature = topk_logprobs(teacher[..., :30], 5, temperature=1.5)
        stored = TopKLogprobs(logprobs.bfloat16(), indices.int(), None, temperature)
        return topk_distillation_loss(student, stored, tail="bucket", **given, **options)

    with engine():
        student, teacher = pair(engine, *tokens, 31)
        function, counter = compiled(loss)
        assert_same(step(function, student, teacher, given), step(loss, student, teacher, given))
    assert counter.frame_count == 1


@every_engine
def test_compiled_topk_logprobs_are_the_eager_ones(engine: Engine):
    with engine():
        teacher = pair(engine, 2, 3, 31)[1]
        function, counter = compiled(lambda x: topk_logprobs(x, 7, temperature=2.0))
        ours, theirs = function(teacher), topk_logprobs(teacher, 7, temperature=2.0)
    assert isinstance(ours, TopKLogprobs)
    assert ours.temperature == 2.0
    for x, y in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(x, y)
    assert counter.frame_count == 1


@quick_engine
def test_a_compiled_module_without_gradients_is_the_eager_one(engine: Engine):
    criterion = pyalign.nn.DistillationLoss(divergence="jsd", beta=0.3)
    with engine(), torch.no_grad():
        both = pair(engine, 5, 31)
        function, _ = compiled(criterion)
        torch.testing.assert_close(function(*both), criterion(*both))


def shifted_step(weight: Tensor, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What a trainer compiles: head, shift, loss, and a factor of its own."""
    student = hidden @ weight.T
    return 0.7 * distillation_loss(student[:, :-1], teacher[:, :-1], labels=labels[:, 1:], divergence="jsd")


def stored_step(weight: Tensor, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    stored = topk_logprobs(teacher, 5)
    student = (hidden @ weight.T).bfloat16()
    each = topk_distillation_loss(student, stored, labels=labels, reduction="none")
    return (each * each.detach()).sum()


@pytest.mark.parametrize("train", [shifted_step, stored_step], ids=lambda train: train.__name__)
def test_inductor_compiles_head_and_loss_as_one_graph(train: Callable[..., Tensor]):
    weight, hidden = logits(31, 8, seed=3, scale=0.5), logits(2, 6, 8, seed=4)
    teacher, labels = logits(2, 6, 31, seed=2), torch.arange(12).view(2, 6) % 5 - 100
    with torch._inductor.config.patch(compile_threads=1):
        ours = step(torch.compile(train, fullgraph=True), weight, hidden, teacher, labels)
    theirs = step(train, weight, hidden, teacher, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # its matrix product is another


# Recompilation


@quick_engine
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_batch_of_the_same_shape_is_not_compiled_again(engine: Engine, reduction: str):
    with engine():
        function, counter = compiled(
            lambda s, t, m: distillation_loss(s, t, mask=m, reduction=reduction, return_metrics=True)
        )
        for seed in range(3):
            student, teacher = (logits(4, 31, seed=2 * seed + i, device=engine.device) for i in range(2))
            mask = torch.arange(4, device=engine.device) > seed  # how many tokens count is no shape
            step(function, student, teacher, mask)
    assert counter.frame_count == 1


def dense_loss(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return distillation_loss(student[:, :-1], teacher[:, 1:], reduction=reduction)


def topk_loss(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return topk_distillation_loss(student, topk_logprobs(teacher, 5), reduction=reduction)


@quick_kernel
@pytest.mark.parametrize("loss", [dense_loss, topk_loss], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_of_any_number_of_tokens_share_one_graph(engine: Engine, loss: Callable[..., Tensor], reduction: str):
    """Tokens marked as dynamic: a packed batch has another number of them at every step."""
    with engine():
        function, counter = compiled(lambda s, t: loss(s, t, reduction))
        for batch, length in ((2, 5), (3, 7), (5, 4)):
            student, teacher = pair(engine, batch, length, 31)
            for x in (student, teacher):
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 1)
            leaf = student.requires_grad_()
            value = function(leaf, teacher)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            expected = step_of_sum(loss, student, teacher, reduction)
            assert_same((value.detach(), gradient), expected)
    assert counter.frame_count == 1


def step_of_sum(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, reduction: str) -> tuple[Tensor, ...]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher, reduction)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@quick_kernel
@pytest.mark.parametrize("loss", [dense_loss, topk_loss], ids=lambda loss: loss.__name__)
def test_dynamic_shapes_of_all_dimensions_give_the_eager_result(engine: Engine, loss: Callable[..., Tensor]):
    """``dynamic=True``: the vocabulary may be compiled anew, the number of tokens not."""
    with engine():
        function, counter = compiled(lambda s, t: loss(s, t, "mean"), dynamic=True)
        for vocab in (31, 40):
            counts = []
            for tokens in ((2, 5), (3, 7), (5, 4)):
                both = pair(engine, *tokens, vocab)
                assert_same(step(function, *both), step(lambda s, t: loss(s, t, "mean"), *both))
                counts.append(counter.frame_count)
            assert len(set(counts)) == 1


@quick_engine
def test_more_batch_sizes_than_torch_recompiles_for(engine: Engine):
    """Without a word about dynamic shapes: the second size makes them dynamic, and no limit is run into."""
    with engine():
        function, counter = compiled(lambda s, t: distillation_loss(s, t))
        for count in range(2, torch._dynamo.config.recompile_limit + 4):
            both = pair(engine, count, 31)
            assert_same(step(function, *both), step(lambda s, t: distillation_loss(s, t), *both))
    assert counter.frame_count == 2


# What tracing can't serve


def test_in_place_under_torch_compile_is_refused_by_name():
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return distillation_loss(student * 1, teacher, inplace=True)

    student, teacher = student_and_teacher(4, 31)
    with pytest.raises(Exception, match="inplace: not available under"):
        compiled(loss)[0](student.requires_grad_(), teacher)


def test_a_second_derivative_of_a_compiled_step_raises():
    student, teacher = student_and_teacher(4, 31)
    function, _ = compiled(lambda s, t: distillation_loss(s, t, reduction="none").square().sum())
    loss = function(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


# Checkpointing


@every_engine
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_a_checkpointed_loss_is_the_plain_one(engine: Engine, reentrant: bool, reduction: str, kind: str):
    """Recomputing the forward pass in the backward pass, head included, changes no bit."""
    if engine.slow and reentrant != (reduction == "none"):
        pytest.skip("as the others, in Triton's interpreter")
    weight, hidden = logits(31, 8, seed=3, scale=0.5), logits(5, 8, seed=4)
    weight, hidden, teacher = (x.to(engine.device) for x in (weight, hidden, logits(5, 31, seed=2)))
    other = teacher if kind == "dense" else topk_logprobs(teacher, 5)
    function = distillation_loss if kind == "dense" else topk_distillation_loss

    def loss(weight: Tensor, hidden: Tensor) -> Tensor:
        return function(hidden @ weight.T, other, reduction=reduction)

    with engine():
        theirs = step(loss, weight, hidden)
        ours = step(lambda w, h: checkpoint(loss, w, h, use_reentrant=reentrant), weight, hidden)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


@quick_engine
def test_two_backwards_through_a_checkpoint_are_both_right(engine: Engine):
    student, teacher = pair(engine, 5, 31)
    leaf = student.requires_grad_()
    with engine():
        (expected,) = torch.autograd.grad(distillation_loss(leaf * 1, teacher), leaf)
        loss = checkpoint(lambda s: distillation_loss(s * 1, teacher), leaf, use_reentrant=False)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            torch.testing.assert_close(gradient, expected)


# Autocast


@every_engine
@every_dtype
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_autocast_changes_nothing(engine: Engine, dtype: torch.dtype, kind: str):
    """Losses accumulate in float32 whatever it asks for, and gradients come in the dtype of the logits."""
    if engine.slow and dtype != torch.bfloat16:
        pytest.skip("as bfloat16, in Triton's interpreter")
    student, teacher = pair(engine, 5, 31, dtype=dtype)
    targets = torch.arange(5, device=engine.device)
    with engine():
        other = teacher if kind == "dense" else topk_logprobs(teacher, 5)
        function = distillation_loss if kind == "dense" else topk_distillation_loss
        for options in ({"temperature": 1.0}, {"reduction": "none", "targets": targets, "hard_weight": 0.5}):
            theirs = step(lambda s, options=options: function(s, other, **options), student)
            with torch.autocast(engine.device, dtype=torch.bfloat16):
                ours = step(lambda s, options=options: function(s, other, **options), student)
            for x, y in zip(ours, theirs, strict=True):
                assert x.dtype == y.dtype
                assert torch.equal(x, y)


@quick_engine
def test_the_loss_of_a_head_under_autocast_is_that_of_its_16_bit_logits(engine: Engine):
    weight, hidden = logits(31, 8, seed=3, scale=0.5).to(engine.device), logits(5, 8, seed=4).to(engine.device)
    teacher = logits(5, 31, seed=2, device=engine.device)
    with engine(), torch.autocast(engine.device, dtype=torch.bfloat16):
        student = torch.nn.functional.linear(hidden, weight)
        assert student.dtype == torch.bfloat16
        loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu().double(), truth(student, teacher).loss, rtol=1e-5, atol=1e-6)


def test_the_engines_of_this_file_are_there():
    """A guard of the tests above: the kernels on the CPU are among what they run."""
    assert {"cpu", "reference"} <= {engine.name for engine in ENGINES}
