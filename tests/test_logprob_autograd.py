"""Log-probs under autograd, torch.compile, torch.func and autocast, and when what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distill_support import (
    DTYPES,
    KERNELS,
    ON_GPU,
    Engine,
    every_engine,
    every_kernel,
    logits,
    name_of,
    over,
    quick_engine,
)
from logprob_support import IGNORED, assert_close, assert_gradient_close, evaluate, targets, truth
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyalign
from pyalign import _ops, _ops_logprob, sequence_logprobs, token_logprobs
from pyalign.nn import TokenLogprobs

quick_kernel = over(tuple(engine for engine in KERNELS if not engine.slow))
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
OPTIONS = [{}, {"temperature": 1.7}, {"softcap": 3.0}, {"softcap": 3.0, "temperature": 0.6}]


def leaf_and_targets(engine: Engine, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = logits(6, 31, dtype=dtype, device=engine.device)
    return x.requires_grad_(), targets(6, vocab=31).to(engine.device)


def both(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    """A loss that takes log-probs and entropies."""
    logprob, entropy = token_logprobs(x, target, return_entropy=True, **options)
    return (0.3 * entropy - logprob).mean()


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_by_finite_differences(name: str, options: dict[str, Any]):
    x, target = logits(3, 7, dtype=torch.float64).requires_grad_(), torch.tensor([6, IGNORED, 0])
    with pyalign.backend(name):
        assert torch.autograd.gradcheck(lambda y: token_logprobs(y, target, return_entropy=True, **options), x)
        assert torch.autograd.gradcheck(lambda y: token_logprobs(y, target, **options), x)


# ---- When what is computed ----


class Spy:
    """What the engine functions are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.calls: list[tuple[Any, ...]] = []
        real = _ops_logprob.engine(engine.name)

        class Watched:
            def logprob(watched, *arguments: Any) -> Any:
                self.calls.append(("logprob", *arguments[-2:]))  # wants an entropy, wants a state
                return real.logprob(*arguments)

            def logprob_gradient(watched, *arguments: Any) -> Any:
                self.calls.append(("logprob_gradient", *(x is not None for x in arguments[-4:-1])))
                return real.logprob_gradient(*arguments)

        monkeypatch.setattr(_ops_logprob, "engine", lambda name: Watched())

    def take(self) -> list[tuple[Any, ...]]:
        calls, self.calls = self.calls, []
        return calls


@every_kernel
@pytest.mark.smoke
def test_a_state_is_kept_and_a_gradient_computed_where_they_are_needed(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    x, target = leaf_and_targets(engine)
    spy = Spy(monkeypatch, engine)
    with engine():
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not token_logprobs(x, target).requires_grad
        assert not token_logprobs(x.detach(), target).requires_grad
        assert spy.take() == [("logprob", False, False)] * 3
        logprob, entropy = token_logprobs(x, target, return_entropy=True)
        assert spy.take() == [("logprob", True, True)]
        logprob.sum().backward(retain_graph=True)
        entropy.sum().backward(retain_graph=True)
        (logprob + entropy).sum().backward()
    state_and_upstreams = [(True, True, False), (True, False, True), (True, True, True)]
    assert spy.take() == [("logprob_gradient", *given) for given in state_and_upstreams]


@quick_kernel
def test_the_extra_memory_is_one_gradient_and_a_few_numbers_per_token(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    x = logits(64, 5000, device=engine.device).requires_grad_()
    target = targets(64, vocab=5000).to(engine.device)
    sizes: list[int] = []

    def watched(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **options: Any) -> Tensor:
            sizes.append((allocated := allocate(*arguments, **options)).nbytes)
            return allocated

        return run

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    with engine():
        both(x, target).backward()
    assert sizes.count(x.nbytes) == 1
    assert sum(sizes) - x.nbytes <= 64 * 4 * 10


# ---- Backward ----


@every_engine
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_two_backwards_over_a_retained_graph_are_both_right(engine: Engine, dtype: torch.dtype):
    x, target = leaf_and_targets(engine, dtype)
    exact = truth(x, target).gradient
    with engine():
        total = sum(y.sum() for y in token_logprobs(x, target, return_entropy=True))
        first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
        x.grad = None
        total.backward(retain_graph=True)
        total.backward()
    assert_gradient_close(first, exact, dtype)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * first)


@quick_engine
def test_upstream_gradients_of_stride_0_and_of_one_result_alone(engine: Engine):
    x, target = leaf_and_targets(engine)
    with engine():
        logprob, entropy = token_logprobs(x, target, return_entropy=True)
        parts = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (logprob, entropy)]
        whole = torch.autograd.grad(logprob.sum() + entropy.sum(), x)[0]
        alone = torch.autograd.grad(token_logprobs(x, target).sum(), x)[0]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, parts[0], rtol=1e-5, atol=1e-6)


@every_engine
@pytest.mark.smoke
def test_float16_gradients_of_many_tokens_do_not_flush_to_zero_before_a_scaler_can_save_them(engine: Engine):
    x, target = leaf_and_targets(engine, torch.float16)
    count, scale = 10.0**6, 65536.0
    with engine():
        logprob, entropy = token_logprobs(x, target, return_entropy=True)
        ((logprob + entropy).sum() / count * scale).backward()
    weight = torch.full((6,), scale / count, dtype=torch.float64)
    assert x.grad is not None
    assert x.grad.any()
    assert_gradient_close(x.grad, truth(x, target, (weight, weight)).gradient, torch.float16)


@quick_kernel
@pytest.mark.parametrize("changed", ["logits", "targets"])
def test_changing_an_input_before_backward_raises(engine: Engine, changed: str):
    leaf, target = leaf_and_targets(engine)
    x = leaf * 1
    with engine():
        total = token_logprobs(x, target).sum()
        total.backward(retain_graph=True)
        (x.detach() if changed == "logits" else target).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@every_kernel
@pytest.mark.smoke
@pytest.mark.parametrize("which", ["logprob", "entropy", "both"])
def test_a_second_derivative_raises(engine: Engine, which: str):
    x, target = leaf_and_targets(engine)
    with engine():
        logprob, entropy = token_logprobs(x, target, return_entropy=True)
        total = {"logprob": logprob, "entropy": entropy, "both": logprob + entropy}[which].sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()


def test_the_reference_has_second_derivatives():
    x, target = logits(3, 5, dtype=torch.float64).requires_grad_(), torch.tensor([4, IGNORED, 0])
    with pyalign.backend("reference"):
        for options in OPTIONS:
            assert torch.autograd.gradgradcheck(lambda y, o=options: both(y, target, **o), x)


@quick_engine
def test_gradients_flow_through_views_of_the_logits(engine: Engine):
    leaf = logits(2, 6, 40, device=engine.device).requires_grad_()
    target = targets(2, 5, vocab=31).to(engine.device)
    with engine():
        (ours,) = torch.autograd.grad(both(leaf[:, 1:, 4:35].bfloat16(), target), leaf)
    assert not ours[:, 0].any()
    assert not ours[..., :4].any()
    assert ours[:, 1:, 4:35].any()


@quick_engine
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_the_plain_one(engine: Engine, reentrant: bool):
    x, target = leaf_and_targets(engine)
    with engine():
        expected = torch.autograd.grad(both(x, target), x)[0]
        checkpoint(both, x, target, use_reentrant=reentrant).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@every_engine
def test_autocast_changes_nothing(engine: Engine):
    for dtype in DTYPES[: 1 if engine.slow else 3]:
        x, target = leaf_and_targets(engine, dtype)
        with engine():
            expected = evaluate(x, target)
            with torch.autocast(engine.device, dtype=torch.bfloat16):
                ours = evaluate(x, target)
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# ---- torch.func ----


@quick_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_torch_func_grad(engine: Engine, dtype: torch.dtype):
    x, target = leaf_and_targets(engine, dtype)
    with engine():
        expected = torch.autograd.grad(both(x, target), x)[0]
        gradient, value = torch.func.grad_and_value(lambda y: both(y, target))(x.detach())
        assert torch.equal(gradient, expected)
        assert torch.equal(value, both(x, target))
        alone = torch.func.grad(lambda y: token_logprobs(y, target).sum())(x.detach())
        assert torch.equal(alone, torch.autograd.grad(token_logprobs(x, target).sum(), x)[0])


@quiet
@quick_kernel
def test_forward_mode_and_vmap_raise(engine: Engine):
    x, target = leaf_and_targets(engine)
    x = x.detach()
    with engine():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda y: token_logprobs(y, target), (x,), (x,))
        with pytest.raises(RuntimeError, match="Batching rule not implemented for pyalign"):
            torch.func.vmap(token_logprobs)(x, target)


# ---- torch.compile ----


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiles = pytest.mark.usefixtures("unpoisoned", "fresh_compiler")


def step(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, *arguments)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def sequences(x: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
    """What a preference loss is fed with, packed and padded."""
    logprob, entropy = token_logprobs(x[:, :-1], target[:, 1:], return_entropy=True, softcap=30.0, temperature=0.7)
    padded = sequence_logprobs(logprob, mask=target[:, 1:] != IGNORED, average=True)
    return padded.sum() + 2 * sequence_logprobs(logprob.flatten(), offsets=offsets).sum() + entropy.mean()


@compiles
@quiet
@quick_engine
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(engine: Engine, backend: str):
    if backend == "inductor" and engine.name == "reference":
        pytest.skip("torch's own affair")
    function = torch.compile(sequences, fullgraph=True, backend=backend)
    offsets = torch.tensor([0, 3, 3, 10], device=engine.device)
    for dtype in (torch.float32, torch.float16) if backend == "aot_eager" else (torch.float32,):
        x = logits(2, 6, 31, dtype=dtype, device=engine.device)
        target = targets(2, 6, vocab=31).to(engine.device)
        with engine():
            for a, b in zip(step(function, x, target, offsets), step(sequences, x, target, offsets), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-6)


@compiles
@quiet
@quick_kernel
def test_batches_of_any_size_share_one_graph(engine: Engine):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(sequences, fullgraph=True, backend=counter)
    with engine():
        for batch, length in ((2, 6), (3, 9), (5, 4), (7, 12)):
            x = logits(batch, length, 31, device=engine.device)
            target = targets(batch, length, vocab=31).to(engine.device)
            offsets = torch.tensor([0, 3, batch * (length - 1)], device=engine.device)
            ours, expected = step(function, x, target, offsets), step(sequences, x, target, offsets)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@compiles
@quiet
@quick_kernel
def test_a_second_derivative_of_a_compiled_step_raises(engine: Engine):
    x, target = leaf_and_targets(engine)
    with engine():
        total = torch.compile(both, fullgraph=True, backend="aot_eager")(x, target)
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()


@every_kernel
@pytest.mark.usefixtures("unpoisoned")
def test_raw_ops_keep_to_their_schema_and_their_fake_results_have_the_real_ones_shape(engine: Engine):
    ops = torch.ops.pyalign
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 2 if engine.slow else 3]
    x, target = leaf_and_targets(engine)
    x = x.detach()
    given = torch.linspace(-1, 1, 6, device=engine.device)
    shifted = x.bfloat16().view(2, 3, 31)[:, 1:]
    with engine():
        _, _, state = ops.logprob(x, target, IGNORED, 1.0, None, True, True, engine.name)
        for matrix, of, wanted in (
            (x, target, (False, False)),
            (x, target, (True, True)),
            (shifted, target[2:], (True, False)),
        ):
            arguments = (matrix, of, IGNORED, 0.7, 5.0, *wanted, engine.name)
            torch.library.opcheck(ops.logprob, arguments, test_utils=checks)
        for upstream in ((given, given), (None, given), (given, None)):
            arguments = (x, target, IGNORED, 1.0, None, state, *upstream, engine.name)
            torch.library.opcheck(ops.logprob_gradient, arguments, test_utils=checks)


# ---- Where it runs ----


@every_kernel
def test_a_backward_runs_on_the_backend_of_its_forward(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    used: list[str] = []
    real = _ops_logprob.engine
    monkeypatch.setattr(_ops_logprob, "engine", lambda name: used.append(name) or real(name))
    x, target = leaf_and_targets(engine)
    with pyalign.backend(engine.name):
        total = both(x, target)
    with pyalign.backend("reference"):
        total.backward()
    assert used == [engine.name, engine.name]


@over(ON_GPU)
def test_a_cuda_graph_holds_the_log_probs_and_their_gradients(engine: Engine):
    """Nothing waits for the host, offsets of packed sequences included."""
    x, target = logits(2, 6, 31, device=engine.device).requires_grad_(), targets(2, 6, vocab=31).to(engine.device)
    offsets = torch.tensor([0, 3, 3, 10], device=engine.device)
    with engine():
        (expected,) = torch.autograd.grad(sequences(x, target, offsets), x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (gradient,) = torch.autograd.grad(sequences(x, target, offsets), x)
        for _ in range(3):
            graph.replay()
            assert torch.equal(gradient, expected)


def test_info_lists_the_op():
    assert "token_logprobs" in _ops.OPS
    assert _ops.explain("token_logprobs", "cpu")[0] == "cpu"


def test_the_module_is_the_function_with_its_options_fixed():
    x, target = logits(4, 31), targets(4, vocab=31)
    module = TokenLogprobs(temperature=0.7, softcap=5.0, ignore_index=-1)
    target = target.where(target != IGNORED, -1)
    options = {"temperature": 0.7, "softcap": 5.0, "ignore_index": -1}
    assert torch.equal(module(x, target), token_logprobs(x, target, **options))
    with_entropy = TokenLogprobs(return_entropy=True, **options)
    for a, b in zip(with_entropy(x, target), token_logprobs(x, target, return_entropy=True, **options), strict=True):
        assert torch.equal(a, b)
    assert not list(module.parameters())
    assert "temperature=0.7" in repr(module)


@quick_kernel
@pytest.mark.large
def test_more_than_2_31_elements(engine: Engine):
    """Offsets of 64 bits: the last rows are the first ones again."""
    rows, vocab = 70_000, 32768
    x = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=engine.device)
    x[:2] = x[-2:] = logits(2, vocab, dtype=torch.bfloat16, device=engine.device)
    target = torch.zeros(rows, dtype=torch.int64, device=engine.device)
    with engine():
        logprob, entropy = token_logprobs(x, target, return_entropy=True)
        assert torch.equal(logprob[:2], logprob[-2:])
        assert torch.equal(entropy[:2], entropy[-2:])
        upstream = torch.ones(rows, device=engine.device)
        _ops_logprob.engine(engine.name).logprob_gradient(x, target, IGNORED, 1.0, None, None, upstream, None, x)
    assert torch.equal(x[:2], x[-2:])
    assert x[0].any()
    assert_close(evaluate(logits(2, vocab), target[:2].cpu()), truth(logits(2, vocab), target[:2].cpu()), torch.float32)
