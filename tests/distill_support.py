"""What the distillation tests share: engines, random logits, the float64 truth and how far from it is allowed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pyalign
from pyalign import TopKLogprobs, _backends
from pyalign._types import accumulation_dtype

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
TAILS = ("bucket", "renormalize", "drop")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU = torch.cuda.is_available()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Plain torch on small tensors is waiting for its threads, mostly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Engine(NamedTuple):
    """A backend and the device that the tests run it on."""

    name: str
    device: str

    @property
    def slow(self) -> bool:
        """Triton's interpreter takes a tenth of a second per call."""
        return self.name == "triton" and self.device == "cpu"

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with pyalign.backend(self.name), one_thread() if self.name == "reference" else contextlib.nullcontext():
            yield

    def serves(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float64 or self.name in ("cpu", "reference")


def _engines() -> Iterator[Engine]:
    yield Engine("cpu", "cpu")
    yield Engine("reference", "cpu")
    if GPU or os.environ.get("TRITON_INTERPRET") == "1":
        yield Engine("triton", "cuda" if GPU else "cpu")
    if GPU and not _backends.refusal("cuda", torch.device("cuda", 0), torch.float32):
        yield Engine("cuda", "cuda")


ENGINES = tuple(_engines())
KERNELS = tuple(engine for engine in ENGINES if engine.name != "reference")
ON_GPU = tuple(engine for engine in ENGINES if engine.device == "cuda")


def name_of(x: object) -> str | None:
    """A test id for what pytest has none for."""
    if isinstance(x, Engine):
        return x.name
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    if isinstance(x, tuple):
        return "x".join(map(str, x)) or "scalar"
    return None


def over(engines: tuple[Engine, ...]) -> pytest.MarkDecorator:
    """A test for each of these engines."""
    return pytest.mark.parametrize("engine", engines, ids=name_of)


every_engine = over(ENGINES)
every_kernel = over(KERNELS)
quick_engine = over(tuple(engine for engine in ENGINES if not engine.slow))
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_tail = pytest.mark.parametrize("tail", TAILS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 2.0
) -> Tensor:
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype).to(device)


def student_and_teacher(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return logits(*shape, seed=1, dtype=dtype, device=device), logits(*shape, seed=2, dtype=dtype, device=device)


def to_float64(x: Any) -> Any:
    """Tensors on the CPU and, where they are floating, in float64; whatever holds them is kept."""
    if isinstance(x, Tensor):
        return x.detach().cpu().double() if x.is_floating_point() else x.cpu()
    if isinstance(x, TopKLogprobs):
        return TopKLogprobs(*map(to_float64, x))
    if isinstance(x, dict):
        return {key: to_float64(value) for key, value in x.items()}
    return x


def to_device(x: Any, device: str) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, TopKLogprobs):
        return TopKLogprobs(*(to_device(y, device) for y in x))
    if isinstance(x, dict):
        return {key: to_device(value, device) for key, value in x.items()}
    return x


class Outcome(NamedTuple):
    loss: Tensor
    gradient: Tensor
    metrics: tuple[Tensor, ...] = ()


def evaluate(
    student: Tensor, teacher: Tensor | TopKLogprobs, upstream: Tensor | None = None, **options: Any
) -> Outcome:
    """Loss and gradient of ``distillation_loss`` or, for a :class:`TopKLogprobs`, ``topk_distillation_loss``."""
    function = pyalign.topk_distillation_loss if isinstance(teacher, TopKLogprobs) else pyalign.distillation_loss
    student = student.detach().requires_grad_()
    result = function(student, teacher, **options)
    loss, metrics = result if isinstance(result, tuple) and options.get("return_metrics") else (result, ())
    (gradient,) = torch.autograd.grad(loss, student, torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return Outcome(loss.detach(), gradient, tuple(metrics))


def truth(student: Tensor, teacher: Tensor | TopKLogprobs, upstream: Tensor | None = None, **options: Any) -> Outcome:
    """The same in float64, in plain torch, on the CPU."""
    with pyalign.backend("reference"), one_thread():
        return evaluate(
            to_float64(student),
            to_float64(teacher),
            None if upstream is None else to_float64(upstream),
            **to_float64(options),
        )


# Half the distance between neighbouring numbers, relative; and, for float16, that of its subnormals.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float16: 2.0**-25}


def assert_close(ours: Outcome, exact: Outcome, dtype: torch.dtype, slack: float = 1.0) -> None:
    """The loss within 8 roundings of the accumulation dtype of the losses' size, each gradient within two roundings of
    its dtype of its own size plus 64 of the accumulation dtype of the largest of its row, or of 0.1."""
    accumulation = accumulation_dtype(dtype)
    assert ours.loss.dtype == accumulation
    assert ours.gradient.dtype == dtype
    assert ours.loss.shape == exact.loss.shape
    assert ours.gradient.shape == exact.gradient.shape
    unit = (2.0**-24 if accumulation == torch.float32 else 2.0**-50) * slack  # the truth is float64 too
    loss_bound = 8 * unit * exact.loss.abs() + 8 * unit
    within("loss", ours.loss, exact.loss, loss_bound)
    largest = exact.gradient.abs().amax(-1, keepdim=True) if exact.gradient.numel() else exact.gradient
    bound = 2 * ROUNDING[dtype] * exact.gradient.abs() + SMALLEST.get(dtype, 0.0) + 64 * unit * (largest + 0.1)
    within("gradient", ours.gradient, exact.gradient, bound)
    if exact.metrics:
        entropy, agreement = ours.metrics
        within("entropy", entropy, exact.metrics[0], 16 * unit * (1 + exact.metrics[0].abs()))
        assert torch.equal(agreement.cpu(), exact.metrics[1])


def within(name: str, ours: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """NaN and infinities where the truth has them; elsewhere no further from it than ``bound``."""
    ours = to_float64(ours)
    finite = exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: NaN at {ours.isnan().nonzero().tolist()[:5]}"
    assert torch.equal(ours[exact.isinf()], exact[exact.isinf()]), name
    excess = ((ours - exact).abs() / bound)[finite]
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 1.0, f"{name}: {worst:.2f} times as far from float64 as allowed"
