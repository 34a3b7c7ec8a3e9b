"""Losses from hidden states: finite differences, what is computed when, several backward passes, transforms, compiled
steps, checkpointing, autocast, tied weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distill_support import KERNELS as ALL_KERNELS
from distill_support import Engine, every_divergence, name_of, over, quick_engine
from linear_support import (
    COUNT,
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
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import pyalign
from pyalign import _linear, linear_cross_entropy, linear_distillation_loss

__all__ = ["chunks_of"]  # a fixture
quick_kernel = over(tuple(engine for engine in ALL_KERNELS if not engine.slow))
SetRows = Callable[[int], None]


def pair(engine: Engine, dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Operands, Teacher]:
    options: dict[str, Any] = {"dtype": dtype, "device": engine.device, **sizes}
    return operands(**options), teacher(**options)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


# Finite differences


@pytest.mark.parametrize("name", ["cpu", "reference"])
@every_divergence
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.7, "student_softcap": 2.0, "teacher_softcap": 1.5, "reduction": "none"},
        {"targets": torch.tensor([1, -100, 3, 0, 2]), "hard_weight": 0.4, "mask": torch.arange(5) != 1},
    ],
    ids=["plain", "softcap", "targets"],
)
def test_gradient_by_finite_differences(name: str, divergence: str, options: dict[str, Any], chunks_of: SetRows):
    x, other = operands(5, torch.float64, vocab=7, width=3), teacher(5, torch.float64, vocab=7)
    chunks_of(2)
    with pyalign.backend(name):
        assert torch.autograd.gradcheck(
            lambda *leaves: call("distill", Operands(*leaves), other, divergence=divergence, **options),
            x.leaves()[:],
        )


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("topk", {"reduction": "none"}),
        ("topk", {"student_softcap": 2.0, "tail": "renormalize"}),
        ("cross_entropy", {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}),
        ("cross_entropy", {"reduction": "none"}),
        ("logprob", {"return_entropy": True, "temperature": 1.3, "softcap": 2.0}),
    ],
)
def test_gradient_of_other_kinds_by_finite_differences(
    name: str, kind: str, options: dict[str, Any], chunks_of: SetRows
):
    x, other = operands(5, torch.float64, vocab=7, width=3), teacher(5, torch.float64, vocab=7)
    chunks_of(2)
    with pyalign.backend(name):
        assert torch.autograd.gradcheck(lambda *leaves: call(kind, Operands(*leaves), other, **options), x.leaves()[:])


# What is computed, and when


class Spy:
    """Counts the chunks projected and the products that add to a gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.projected = self.added = 0
        project, add = _linear.Products.project, _linear.Products._add

        def watched_project(products: Any, *arguments: Any) -> Tensor:
            self.projected += 1
            return project(products, *arguments)

        def watched_add(products: Any, *arguments: Any) -> None:
            self.added += 1
            add(products, *arguments)

        monkeypatch.setattr(_linear.Products, "project", watched_project)
        monkeypatch.setattr(_linear.Products, "_add", watched_add)

    def take(self) -> tuple[int, int]:
        counts, self.projected, self.added = (self.projected, self.added), 0, 0
        return counts


@quick_kernel
@every_kind
def test_nothing_is_computed_for_what_needs_no_gradient(engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch):
    x, other = pair(engine)
    other.weight.requires_grad_()  # the teacher is a constant, even so
    spy, sides = Spy(monkeypatch), 2 if kind == "distill" else 1
    with engine():
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert not first(call(kind, x.leaves(), other)).requires_grad
        assert not first(call(kind, x, other)).requires_grad
        assert spy.take() == (3 * sides, 0)
        for frozen, products in ((("hidden",), 1), (("weight",), 1), ((), 2)):
            result = call(kind, x.leaves(*frozen), other)
            forward = spy.take()
            result.sum().backward()
            backward = spy.take()
            if kind == "logprob":  # its upstream is known in backward
                assert (forward, backward) == ((1, 0), (1, products))
            else:
                assert (forward, backward) == ((sides, products), (0, 0))
        call(kind, x.leaves("hidden", "weight"), other).sum().backward()  # the bias alone
        assert spy.take()[1] == 0


@every_kind
def test_what_is_frozen_takes_no_memory(kind: str, monkeypatch: pytest.MonkeyPatch):
    x, other = operands(), teacher()
    allocated: list[torch.Size] = []
    real = torch.empty

    def watch(*arguments: Any, **options: Any) -> Tensor:
        y = real(*arguments, **options)
        allocated.append(y.shape)
        return y

    monkeypatch.setattr(torch, "empty", watch)
    for name, place in (("hidden", 0), ("weight", 1)):
        call(kind, x.leaves(name), other).sum().backward()
        assert x[place].shape not in allocated
        assert x[1 - place].shape in allocated
        allocated.clear()
    with torch.no_grad():
        call(kind, x.leaves(), other)
    assert not {x[0].shape, x[1].shape} & set(allocated)


@quick_engine
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_gradients_of_what_is_not_frozen(
    engine: Engine, kind: str, dtype: torch.dtype, frozen: tuple[str, ...], chunks_of: SetRows
):
    x, other = pair(engine, dtype)
    chunks_of(8)
    with engine():
        ours = evaluate(kind, x, other, frozen)
    assert_close(ours, truth(kind, x, other, frozen), dtype)


@quick_kernel
@pytest.mark.parametrize("kind", ["distill", "topk", "cross_entropy"])
def test_float16_and_per_token_upstreams_project_again_in_backward(
    engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch
):
    spy, sides = Spy(monkeypatch), 2 if kind == "distill" else 1
    for dtype, reduction in ((torch.float16, "mean"), (torch.float32, "none")):
        x, other = pair(engine, dtype)
        with engine():
            result = call(kind, x.leaves(), other, reduction=reduction)
            assert spy.take() == (sides, 0)
            result.sum().backward()
            assert spy.take() == (sides, 2)


@quick_engine
@pytest.mark.parametrize("kind", ["distill", "topk", "cross_entropy"])
def test_a_gradient_scaler_saves_float16(engine: Engine, kind: str):
    """1 / N of a gradient is lost in float16, but not 2^16 / N: it is recomputed with the upstream."""
    x, other = pair(engine, torch.float16)
    scale = torch.tensor(2.0**16, device=engine.device)
    options = {"num_items": 1 << 24}
    leaves = x.leaves()
    with engine():
        gradients = torch.autograd.grad(call(kind, leaves, other, **options), leaves, scale)
    with pyalign.backend("reference"):
        wide = Operands(*(y.double() for y in x if y is not None)).leaves()
        exact = torch.autograd.grad(
            call(kind, wide, other._replace(hidden=other.hidden.double(), weight=other.weight.double()), **options),
            wide,
            scale.double(),
        )
    for y, z in zip(gradients, exact, strict=True):
        assert y.any()
        assert float((y.double() - z).abs().max() / z.abs().max()) < 5e-3


# Backward twice


@quick_kernel
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_backwards_over_a_retained_graph_are_all_right(engine: Engine, kind: str, dtype: torch.dtype):
    """The first scales the stored gradients in place; later ones must not scale them again, nor return their memory."""
    x, other = pair(engine, dtype)
    leaves = x.leaves()
    with engine():
        result = call(kind, leaves, other)
        upstream = torch.full_like(result, 3.0)
        passes = [torch.autograd.grad(result, leaves, upstream, retain_graph=True) for _ in range(3)]
    for one, two, three in zip(*passes, strict=True):
        torch.testing.assert_close(
            one, two, rtol=0.02, atol=2e-2 * float(two.abs().max()) if dtype != torch.float32 else 1e-6
        )
        assert torch.equal(two, three)
        assert len({y.data_ptr() for y in (one, two, three)}) == 3


@quick_kernel
@every_kind
def test_changing_an_input_before_a_second_backward_raises(engine: Engine, kind: str):
    for place in range(3):
        x, other = pair(engine)
        leaves = x.leaves()
        inputs = Operands(*(y * 1 for y in leaves if y is not None))
        with engine():
            loss = call(kind, inputs, other).sum()
            loss.backward(retain_graph=True)
            changed = inputs[place]
            assert changed is not None
            changed.detach().zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@quick_kernel
@every_kind
def test_a_freed_graph_raises_as_torch_does(engine: Engine, kind: str):
    x, other = pair(engine)
    with engine():
        loss = call(kind, x.leaves(), other).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@quick_engine
def test_tied_embeddings_get_both_gradients(engine: Engine):
    """The head is the embedding: one weight, two uses."""
    weight = normal(VOCAB, 8, seed=1, device=engine.device).requires_grad_()
    ids = torch.arange(COUNT, device=engine.device)

    def loss(head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return head(torch.nn.functional.embedding(ids, weight).tanh(), weight)

    with engine():
        ours = loss(lambda hidden, w: linear_cross_entropy(hidden, w, ids + 1))
        expected = loss(lambda hidden, w: torch.nn.functional.cross_entropy(hidden @ w.T, ids + 1))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, weight), torch.autograd.grad(expected, weight))


# Second derivatives and function transforms


@quick_kernel
@every_kind
def test_a_second_derivative_raises(engine: Engine, kind: str):
    x, other = pair(engine)
    leaves = x.leaves()
    with engine():
        result = call(kind, leaves, other).sum()
        gradients = torch.autograd.grad(result, leaves, create_graph=True)
        for gradient in gradients:
            assert gradient.requires_grad
            with pytest.raises(RuntimeError, match="no second derivative"):
                gradient.square().sum().backward(retain_graph=True)


@every_kind
@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias")], ids="-".join)
def test_a_second_derivative_of_what_is_not_frozen_raises(kind: str, frozen: tuple[str, ...]):
    """Even with a constant upstream gradient, where the penalty would vanish silently."""
    leaves, other = operands().leaves(*frozen), teacher()
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    for gradient in torch.autograd.grad(call(kind, leaves, other).sum(), wanted, create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward(retain_graph=True)


@every_kind
def test_the_reference_has_second_derivatives(kind: str):
    x, other = operands(3, torch.float64, vocab=7, width=2), teacher(3, torch.float64, vocab=7)
    with pyalign.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *leaves: call(kind, Operands(*leaves), other).sum(), x.leaves()[:])


@quick_kernel
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_torch_func_grad(engine: Engine, kind: str, dtype: torch.dtype):
    x, other = pair(engine, dtype)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return call(kind, Operands(hidden, weight, bias), other).sum()

    with engine():
        leaves = x.leaves()
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*x), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(torch.func.grad(loss)(*x), expected[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own formulas
def test_vmap_and_forward_mode_raise():
    x, other = operands(), teacher()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for pyalign"):
        torch.func.vmap(lambda h: linear_cross_entropy(h, x.weight, other.targets))(x.hidden.expand(2, -1, -1))
    for place in range(2):
        tangents = [torch.zeros_like(y) for y in x[:2]]

        def loss(y: Tensor, place: int = place) -> Tensor:
            given = [x.hidden, x.weight]
            given[place] = y
            return linear_cross_entropy(*given, other.targets)

        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(loss, (x[place],), (tangents[place],))


# Compiled, checkpointed, under autocast


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiles = [
    pytest.mark.usefixtures("unpoisoned", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


def compiled_test(test: Any) -> Any:
    for mark in compiles:
        test = mark(test)
    return test


@compiled_test
@quick_kernel
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_a_compiled_step_is_the_eager_one(engine: Engine, kind: str, dtype: torch.dtype):
    x, other = pair(engine, dtype)
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 0.7 * call(kind, Operands(hidden, weight, bias), other).sum()

    function = torch.compile(step, fullgraph=True, backend=counter)
    with engine():
        for _ in range(2):
            leaves = x.leaves()
            ours, theirs = function(*leaves), step(*leaves)
            torch.testing.assert_close(ours, theirs)
            for y, z in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
                unit = torch.finfo(dtype).eps
                torch.testing.assert_close(y, z, rtol=4 * unit, atol=2 * unit * float(z.abs().max()))
    assert counter.frame_count == 1


@compiled_test
@quick_kernel
def test_compiled_steps_with_every_option_and_any_number_of_tokens_share_one_graph(engine: Engine):
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Operands, other: Teacher, mask: Tensor) -> Any:
        options: dict[str, Any] = {"mask": mask, "student_softcap": 5.0, "return_metrics": True}
        loss, metrics = call("distill", x, other, divergence="jsd", workspace_bytes=1 << 20, **options)
        stored = call("topk", x, other, mask=mask, reduction="none")
        logprob, entropy = call("logprob", x, other, return_entropy=True)
        return loss + stored.sum() + (logprob * entropy.detach()).sum() + entropy.sum(), metrics.entropy

    function = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compiled: list[int] = []
    with engine():
        for count in (21, 30, 13):
            x, other = pair(engine, count=count)
            mask = torch.arange(count, device=engine.device) % 3 != 0
            leaves = x.leaves()
            (ours, entropy), (theirs, expected) = function(leaves, other, mask), step(leaves, other, mask)
            torch.testing.assert_close((ours, entropy), (theirs, expected))
            torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves))
            compiled.append(counter.frame_count)
    assert len(set(compiled)) == 1  # dynamo itself starts over once, to make constants of floats


@compiled_test
def test_inductor_compiles_body_and_loss_as_one_graph():
    def step(body: Tensor, weight: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(torch.tanh(x @ body), weight, targets)

    x, targets = normal(12, 8, seed=1), torch.arange(12) % 5
    body, weight = normal(8, 8, seed=2).requires_grad_(), normal(31, 8, seed=3).requires_grad_()
    with torch._inductor.config.patch(compile_threads=1):
        ours = torch.compile(step, fullgraph=True)(body, weight, x, targets)
    theirs = step(body, weight, x, targets)
    torch.testing.assert_close(ours, theirs)
    for y, z in zip(
        torch.autograd.grad(ours, (body, weight)), torch.autograd.grad(theirs, (body, weight)), strict=True
    ):
        torch.testing.assert_close(y, z)


@compiled_test
@quick_kernel
@every_kind
def test_raw_ops_keep_to_their_schema_and_fakes(engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Nothing is written but what the schema says; fake shapes, strides and dtypes are real."""
    from pyalign import _ops_linear

    seen: list[tuple[Any, tuple[Any, ...]]] = []
    real = _ops_linear.Call._op

    def watch(self: Any, given: Any, arguments: Any, *wanted: bool) -> list[Tensor]:
        seen.append((getattr(torch.ops.pyalign, self.name), (*given, *arguments, *wanted, self.backend)))
        return real(self, given, arguments, *wanted)

    monkeypatch.setattr(_ops_linear.Call, "_op", watch)
    x, other = pair(engine)
    with engine():
        plain = call(kind, x.leaves(), other, workspace_bytes=1 << 20)
        plain.sum().backward()
        if kind != "logprob":
            call(kind, x.leaves("weight"), other, reduction="none").sum().backward()
        else:
            call(kind, x._replace(bias=None).leaves(), other, return_entropy=True)[1].sum().backward()
        if kind in ("distill", "topk"):
            call(kind, x, other, return_metrics=True, num_valid=COUNT, student_softcap=2.0)
        assert len(seen) >= 3
        for op, arguments in seen:
            arguments = tuple(y.detach() if isinstance(y, Tensor) else y for y in arguments)
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(op, arguments, test_utils=checks)


@quick_engine
@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss_is_the_plain_one(engine: Engine, kind: str, reentrant: bool):
    x, other = pair(engine)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return call(kind, Operands(hidden.tanh(), weight, bias), other).sum()

    leaves = x.leaves()
    with engine():
        theirs, ours = loss(*leaves), checkpoint(loss, *leaves, use_reentrant=reentrant)
        ours.backward()
        for leaf, gradient in zip(leaves, torch.autograd.grad(theirs, leaves), strict=True):
            assert leaf is not None
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, gradient)
    assert torch.equal(ours, theirs)


@quick_engine
@every_kind
def test_under_autocast_products_are_in_its_dtype_and_gradients_in_their_operands(
    engine: Engine, kind: str, chunks_of: SetRows
):
    """As if the operands were rounded first; the gradient of a float32 weight is never rounded to 16 bits."""
    x, other = pair(engine)
    chunks_of(8)
    rounded = Operands(*(y.bfloat16().float() for y in x[:2]), x.bias)
    also = other._replace(hidden=other.hidden.bfloat16().float(), weight=other.weight.bfloat16().float())
    with engine(), torch.autocast(engine.device, dtype=torch.bfloat16):
        ours = evaluate(kind, x, other)
        mixed = evaluate(kind, x._replace(hidden=x.hidden.bfloat16()), other)
    exact = truth(kind, rounded, also)
    for outcome in (ours, mixed):
        for y, z in zip(outcome.results, exact.results, strict=True):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.double().cpu(), z, rtol=1e-4, atol=1e-4)
        for y, z in zip(outcome.gradients, exact.gradients, strict=True):
            torch.testing.assert_close(y.double().cpu(), z, rtol=2e-2, atol=1e-2 * float(z.abs().max()))
    assert [y.dtype for y in ours.gradients] == [torch.float32] * 3
    assert [y.dtype for y in mixed.gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_leaves_float64_alone():
    x, other = operands(dtype=torch.float64), teacher(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = evaluate("distill", x, other)
    assert_close(ours, truth("distill", x, other), torch.float64)


def test_a_float64_student_of_a_float32_teacher():
    x, other = operands(dtype=torch.float64), teacher()
    assert_close(evaluate("distill", x, other), truth("distill", x, other), torch.float64)
    single = operands()
    wide = other._replace(hidden=other.hidden.double(), weight=other.weight.double())
    assert_close(evaluate("distill", single, wide), truth("distill", single, wide), torch.float32)


def test_student_and_teacher_of_two_16_bit_dtypes():
    x, other = operands(dtype=torch.bfloat16), teacher(dtype=torch.float16)
    assert_close(evaluate("distill", x, other), truth("distill", x, other), torch.bfloat16)


def test_modules_are_the_functions():
    x, other = operands(), teacher()
    args = (x.hidden, x.weight)
    assert torch.equal(
        pyalign.nn.LinearDistillationLoss(divergence="jsd", student_softcap=3.0)(*args, other.hidden, other.weight),
        linear_distillation_loss(*args, other.hidden, other.weight, divergence="jsd", student_softcap=3.0),
    )
    assert torch.equal(
        pyalign.nn.LinearTopKDistillationLoss(tail="drop")(*args, other.stored, mask=other.targets > 0),
        pyalign.linear_topk_distillation_loss(*args, other.stored, tail="drop", mask=other.targets > 0),
    )
    assert torch.equal(
        pyalign.nn.LinearCrossEntropyLoss(label_smoothing=0.1)(*args, other.targets, bias=x.bias),
        linear_cross_entropy(*args, other.targets, bias=x.bias, label_smoothing=0.1),
    )
    module = pyalign.nn.LinearTokenLogprobs(temperature=0.7, softcap=3.0, return_entropy=True)
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 3.0, "return_entropy": True}
    expected = pyalign.linear_token_logprobs(*args, other.targets, bias=x.bias, **options)
    assert all(map(torch.equal, module(*args, other.targets, bias=x.bias), expected))


def test_a_dpo_step_from_hidden_states_is_that_from_logits():
    """The losses' pieces together: per-token log-probs, their sums per sequence, the preference loss over them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 7, 8, generator=generator, dtype=torch.float64, requires_grad=True)  # 2 chosen, 2 rejected
    head = torch.randn(31, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 31, (4, 7), generator=generator)
    targets[:, 5:] = -100

    def step(logprobs: torch.Tensor) -> list[torch.Tensor]:
        policy = pyalign.sequence_logprobs(logprobs, mask=targets != -100)
        output = pyalign.dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=0.3)
        return [output.loss, *torch.autograd.grad(output.loss, (hidden, head))]

    ours = step(pyalign.linear_token_logprobs(hidden, head, targets))
    picked = torch.log_softmax(hidden @ head.T, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    exact = step(torch.where(targets == -100, 0.0, picked))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)
