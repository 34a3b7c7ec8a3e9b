"""Whole training steps, model and loss, in the ways that trainers run them; gradients are those of an eager step."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distill_support import name_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training_support import LOSSES, UNITS, Batch, Model, Step, batch, gradients, tensors_to

import pyalign

every_loss = pytest.mark.parametrize("name", LOSSES)
pytestmark = pytest.mark.usefixtures("single_thread")


def step_of(name: str, dtype: torch.dtype = torch.float32) -> Step:
    return Step(Model(LOSSES[name].reads, dtype), name)


def backward(step: Callable[..., Tensor], module: torch.nn.Module, x: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    module.zero_grad()
    loss = step(x, None)
    loss.backward()
    return loss.detach(), gradients(module)


def truth(name: str, x: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, in plain torch."""
    step = step_of(name, torch.float64)
    with pyalign.backend("reference"):
        return backward(step, step, tensors_to(x, torch.float64))


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    """Each within ``bound`` of the largest gradient of its parameter."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name].double(), x.double(), rtol=0, atol=bound * float(x.abs().max()), msg=name)


# Compiled

compiles = [
    pytest.mark.usefixtures("unpoisoned", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


def compiled_test(test: Any) -> Any:
    for mark in compiles:
        test = mark(test)
    return test


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def not_again(number: int) -> Any:
    """From the second call on, to compile is an error."""
    return torch.compiler.set_stance("fail_on_recompile") if number else contextlib.nullcontext()


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no backward")
@every_loss
@compiled_test
def test_model_loss_and_backward_are_one_graph_that_is_compiled_once(name: str):
    step, twin = step_of(name), step_of(name)

    def train(x: Batch) -> Tensor:
        loss = step(x, None)
        loss.backward()
        return loss.detach()

    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (step, twin)]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
        for number in range(3):
            x = batch(torch.float32, seed=number)
            with not_again(number):
                ours = compiled(x)
            theirs, expected = backward(twin, twin, x)
            torch.testing.assert_close(ours, theirs)
            assert_near(gradients(step), expected, 1e-5)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def train_over_sizes(name: str, compiler: Callable[[Step], Any], compiles_update: bool = False) -> None:
    """Compiled for the first two sizes and for no other."""
    step, twin = step_of(name), step_of(name)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (step, twin)]
    compiled = compiler(step)
    update = torch.compile(optimizers[0].step) if compiles_update else optimizers[0].step
    for number, units in enumerate((5, UNITS, 4, 7)):
        x = batch(torch.float32, seed=number).units(0, units)
        with not_again(max(0, number - 1)):
            ours, found = backward(compiled, step, x)
            update()
        theirs, expected = backward(twin, twin, x)
        optimizers[1].step()
        torch.testing.assert_close(ours, theirs)
        assert_near(found, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imitation", "policy_gradient", "pairwise", "win_rates", "dpo", "simpo", "kto"])
@compiled_test
def test_batches_of_any_size_share_one_graph(name: str):
    train_over_sizes(name, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distillation", "linear_distillation", "ranked", "dpo"])
@compiled_test
def test_inductor_trains_like_eager(name: str):
    with torch._inductor.config.patch(compile_threads=1):
        train_over_sizes(
            name, lambda step: torch.compile(step, fullgraph=True, dynamic=True), compiles_update=name == "dpo"
        )


# Checkpointed


@every_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_model_and_loss_changes_nothing(name: str, reentrant: bool):
    step, x = step_of(name), batch(torch.float32)
    theirs, expected = backward(step, step, x)
    needed = torch.zeros((), requires_grad=True)  # a reentrant checkpoint wants an input with a gradient

    def run(_: Tensor) -> Tensor:
        return step(x, None)

    ours, found = backward(lambda x, n: checkpoint(run, needed, use_reentrant=reentrant), step, x)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# 16 bits


@every_loss
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bfloat16", "float16"]
)
def test_autocast_over_model_and_loss(name: str, dtype: torch.dtype, bound: float):
    """float32 parameters, a model that works in 16 bits: the loss is float32 and so are the gradients."""
    step, x = step_of(name), batch(torch.float32)
    exact, expected = truth(name, x)

    def run(x: Batch, n: Tensor | None) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return step(x, n)

    loss, found = backward(run, step, x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=bound / 4, atol=bound / 100)
    assert all(y.dtype == torch.float32 for y in found.values())
    assert_near(found, expected, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_a_linear_loss_under_autocast_is_that_of_torchs_linear_layer_or_nearer_to_the_truth(dtype: torch.dtype):
    """Both round hidden states and weight; torch rounds the logits too."""
    step, x = step_of("linear_cross_entropy"), batch(torch.float32)
    head, targets = step.model.head, x.labels.flatten()
    hidden = step.model(x.ids).detach().flatten(0, -2)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            loss = function(leaf)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, (leaf, head.weight, head.bias))
        assert all(y.dtype == torch.float32 for y in found)
        return loss.detach(), *found

    def torchs(h: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(head(h), targets)

    ours = run(lambda h: pyalign.linear_cross_entropy(h, head.weight, targets, bias=head.bias))
    theirs = run(torchs)
    exact_head = copy.deepcopy(head).double()
    leaf = hidden.double().requires_grad_()
    exact_loss = torch.nn.functional.cross_entropy(exact_head(leaf), targets)
    exact = (exact_loss.detach(), *torch.autograd.grad(exact_loss, (leaf, exact_head.weight, exact_head.bias)))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert float((a - c).norm()) <= 1.05 * float((b - c).norm()) + 1e-6


def scaled_backward(name: str, scale: float, factor: float) -> tuple[Step, Any, Any]:
    """A step under float16 autocast of ``factor`` times the loss; its gradients are still scaled."""
    step = step_of(name)
    optimizer, scaler = torch.optim.SGD(step.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = factor * step(batch(torch.float32), None)
    scaler.scale(loss).backward()
    return step, optimizer, scaler


@every_loss
def test_a_gradient_scaler_saves_what_float16_would_flush_to_zero(name: str):
    factor = 2.0**-15  # as if the mean were over 30,000 times as many
    _, expected = truth(name, batch(torch.float32))
    step, optimizer, scaler = scaled_backward(name, 2.0**16, factor)
    scaler.unscale_(optimizer)
    assert_near({key: y.double() / factor for key, y in gradients(step).items()}, expected, 0.02)


@every_loss
def test_a_step_whose_scaled_gradients_overflow_is_skipped(name: str):
    step, optimizer, scaler = scaled_backward(name, 2.0**40, 1.0)  # float16 ends below 2^16
    before = copy.deepcopy(step.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(y, before[key]) for key, y in step.state_dict().items())


# torch.func


def functional(step: Step, x: Batch) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    parameters = {key: y.detach() for key, y in step.named_parameters()}
    return lambda p: torch.func.functional_call(step, p, (x, None)), parameters


@every_loss
def test_functional_calls_have_the_gradients_of_the_module(name: str):
    step, x = step_of(name), batch(torch.float32)
    loss, expected = backward(step, step, x)
    function, parameters = functional(step, x)
    found, value = torch.func.grad_and_value(function)(parameters)
    again, pull_back = torch.func.vjp(function, parameters)
    (pulled,) = pull_back(torch.tensor(2.0))  # after vjp's transform is over
    assert torch.equal(value, loss)
    assert torch.equal(again, loss)
    for key, y in expected.items():
        torch.testing.assert_close(found[key], y)
        torch.testing.assert_close(pulled[key], 2 * y)


@every_loss
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's own, before it raises
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch's forward-mode formulas
def test_transforms_that_the_kernels_have_no_rule_for_raise(name: str):
    function, parameters = functional(step_of(name), batch(torch.float32))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, (parameters,), (parameters,))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda p: sum(y.square().sum() for y in torch.func.grad(function)(p).values()))(parameters)
    with pytest.raises(RuntimeError, match=r"does not have vmap support|Batching rule not implemented for pyalign"):
        torch.func.hessian(function)(parameters)
    both = {key: torch.stack([y, y]) for key, y in parameters.items()}
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.func.vmap(torch.func.grad(function))(both)


# Modes and graphs


@every_loss
def test_a_step_without_gradients_has_the_same_loss(name: str):
    step, x = step_of(name), batch(torch.float32)
    loss, _ = backward(step, step, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = step.eval()(x, None)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss, rtol=1e-6, atol=0)
    frozen = copy.deepcopy(step).requires_grad_(False)
    assert not frozen(x, None).requires_grad


@every_loss
def test_micro_batches_add_up(name: str):
    """With num_items the count of them all."""
    step, x = step_of(name, torch.float64), batch(torch.float64)
    _, expected = backward(step, step, x)
    step.zero_grad()
    items = LOSSES[name].count(x)
    for begin, end in itertools.pairwise((0, 2, 3, UNITS)):
        step(x.units(begin, end), items).backward()
    assert_near(gradients(step), expected, 1e-12)


@every_loss
def test_two_backwards_over_a_retained_graph(name: str):
    step, x = step_of(name), batch(torch.float32)
    _, expected = backward(step, step, x)
    step.zero_grad()
    loss = step(x, None)
    loss.backward(retain_graph=True)
    first = {key: y.clone() for key, y in gradients(step).items()}
    assert_near(first, expected, 1e-6)
    (3 * loss).backward()
    assert_near(gradients(step), {key: 4 * y for key, y in first.items()}, 1e-5)


@pytest.mark.parametrize("reads", ["logits", "hidden", "scores"])
def test_losses_that_share_their_input_add_up(reads: str):
    """In one backward, and each in a backward of its own."""
    x = batch(torch.float32)
    names = [name for name, loss in LOSSES.items() if loss.reads == reads]
    model = Model(reads, torch.float32)
    expected: dict[str, Tensor] = {}
    for name in names:
        single = Step(model, name)
        for key, y in backward(single, model, x)[1].items():
            expected[key] = expected.get(key, 0) + y

    def losses() -> list[Tensor]:
        model.zero_grad()
        output = model(x.ids)
        return [LOSSES[name].function(output, model.head, x, None) for name in names]

    sum(losses()).backward()
    assert_near(gradients(model), expected, 1e-5)
    apart = losses()
    for number, loss in enumerate(apart):
        loss.backward(retain_graph=number + 1 < len(apart))
    assert_near(gradients(model), expected, 1e-5)
