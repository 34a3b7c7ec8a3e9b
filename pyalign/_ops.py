"""The torch.library ops and their autograd: one pair of Functions serves every loss that stores its gradient.

The raw ops (``torch.ops.pyalign.*``) are private: they have no autograd formula. ``loss`` is what public functions
call. In the forward pass a loss whose upstream gradient will be one scalar ("mean", "sum") computes its gradient
while the row is on chip, already divided by the denominator; backward multiplies it by the upstream scalar on the
device. float16 (whose 1/N gradients would flush to zero before a GradScaler can save them) and "none" recompute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead  # pyright: ignore[reportMissingModuleSource]
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from pyalign._backends import choose, engine
from pyalign._types import Options, Results, Tokens, accumulation_dtype, rows

OPS = (
    "distillation_loss",
    "topk_distillation_loss",
    "topk_logprobs",
    "linear_distillation_loss",
    "linear_topk_distillation_loss",
    "linear_token_logprobs",
    "linear_cross_entropy",
    "token_logprobs",
    "pairwise_preference_loss",
    "ranked_preference_loss",
    "binary_discrimination_loss",
    "dpo_loss",
    "reward_scores",
    "win_probabilities",
    "expected_win_rates",
    "best_of_n",
    "preference_metrics",
)

_library = torch.library.Library("pyalign", "DEF")
_DEVICES = ("CPU", "CUDA", "XPU")

_TOKENS = (
    "Tensor? mask, Tensor? labels, Tensor? teacher_rows, Tensor? weight, Tensor? targets, Tensor? num_items, "
    "Tensor? upstream, int ignore_index, str reduction"
)
_OPTIONS = "int vocab, str divergence, float beta, float temperature, bool temperature_squared, float hard_weight"
_TOP_K = "Tensor logprobs, Tensor indices, Tensor? residual, str tail"


def explain(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend that would run ``op`` on this kind of device, and why."""
    if op not in OPS:
        raise ValueError(f"op: got {op!r}; wanted one of {', '.join(OPS)}")
    choice = choose(torch.device(device_type), dtype)
    return choice.backend, choice.reason


# Raw ops: (student, *teacher, *tokens, *options, want_loss, want_gradient, want_metrics, backend). They return what was
# asked for, of [loss, gradient, entropy, agreement]. The variant with a trailing underscore writes the gradient over
# the student.


class RawLoss(NamedTuple):
    """One loss as raw ops: the engine function's name, and how many arguments describe the teacher."""

    name: str
    teacher_arguments: int

    def run(self, student: Tensor, arguments: tuple[Any, ...], gradient: Tensor | None) -> Results:
        teacher, rest = arguments[: self.teacher_arguments], arguments[self.teacher_arguments :]
        n_tokens, n_options = len(Tokens._fields), len(Options._fields)
        tokens, options = Tokens(*rest[:n_tokens]), Options(*rest[n_tokens : n_tokens + n_options])
        want_loss, want_metrics, backend = rest[n_tokens + n_options :]
        return getattr(engine(backend), self.name)(
            student, *teacher, tokens, options, gradient=gradient, want_loss=want_loss, want_metrics=want_metrics
        )

    def functional(self, student: Tensor, *arguments: Any) -> list[Tensor]:
        *head, want_loss, want_gradient, want_metrics, backend = arguments
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if want_gradient else None
        loss, *metrics = self.run(student, (*head, want_loss, want_metrics, backend), gradient)
        return [x for x in (loss, gradient, *metrics) if x is not None]

    def in_place(self, student: Tensor, *arguments: Any) -> list[Tensor]:
        *head, want_metrics, backend = arguments
        results = self.run(student, (*head, True, want_metrics, backend), student)
        return [x for x in results if x is not None]

    def fake(self, student: Tensor, *arguments: Any) -> list[Tensor]:
        *head, want_loss, want_gradient, want_metrics, _ = arguments
        reduction = head[self.teacher_arguments + len(Tokens._fields) - 1]
        dtype, count = accumulation_dtype(student.dtype), math.prod(student.shape[:-1])
        results: list[Tensor] = []
        if want_loss:
            results.append(student.new_empty((count,) if reduction == "none" else (), dtype=dtype))
        if want_gradient:
            results.append(torch.empty_like(student, memory_format=torch.contiguous_format))
        if want_metrics:
            results += [student.new_empty(count, dtype=dtype), student.new_empty(count, dtype=torch.bool)]
        return results

    def fake_in_place(self, student: Tensor, *arguments: Any) -> list[Tensor]:
        *head, want_metrics, backend = arguments
        return self.fake(student, *head, True, False, want_metrics, backend)


def define(signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = signature.partition("(")[0]
    _library.define(signature)
    for device in _DEVICES:
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"pyalign::{name}", fake, lib=_library)


def _define_loss(name: str, teacher: str) -> RawLoss:
    raw = RawLoss(name, teacher.count(",") + 1)
    inputs = f"{teacher}, {_TOKENS}, {_OPTIONS}"
    define(
        f"{name}(Tensor student, {inputs}, bool want_loss, bool want_gradient, bool want_metrics, str backend)"
        " -> Tensor[]",
        raw.functional,
        raw.fake,
    )
    define(
        f"{name}_(Tensor(a!) student, {inputs}, bool want_metrics, str backend) -> Tensor[]",
        raw.in_place,
        raw.fake_in_place,
    )
    return raw


DISTILL = _define_loss("distill", "Tensor teacher")
TOPK_DISTILL = _define_loss("topk_distill", _TOP_K)


def _topk(logits: Tensor, k: int, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return engine(backend).topk(logits, k, temperature)


def _topk_fake(logits: Tensor, k: int, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype = math.prod(logits.shape[:-1]), accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((count, k), dtype=dtype),
        logits.new_empty((count, k), dtype=torch.int64),
        logits.new_empty(count, dtype=dtype),
    )


def _scale(x: Tensor, factor: Tensor, backend: str) -> None:
    engine(backend).scale(x, factor.to(accumulation_dtype(x.dtype)))


def _scale_fake(x: Tensor, factor: Tensor, backend: str) -> None:
    pass


define("topk(Tensor logits, int k, float temperature, str backend) -> (Tensor, Tensor, Tensor)", _topk, _topk_fake)
define("scale_(Tensor(a!) x, Tensor factor, str backend) -> ()", _scale, _scale_fake)


class Call(NamedTuple):
    """A loss, ready to run on a student: ``arguments`` are those of the raw op up to the options."""

    raw: RawLoss
    arguments: tuple[Any, ...]
    reduction: str
    want_metrics: bool
    backend: str

    def stores_gradient(self, student: Tensor) -> bool:
        return self.reduction != "none" and student.dtype != torch.float16

    def forward(self, student: Tensor, want_gradient: bool) -> list[Tensor]:
        op = getattr(torch.ops.pyalign, self.raw.name)
        return op(student, *self.arguments, True, want_gradient, self.want_metrics, self.backend)

    def forward_in_place(self, student: Tensor) -> list[Tensor]:
        op = getattr(torch.ops.pyalign, self.raw.name + "_")
        return op(student, *self.arguments, self.want_metrics, self.backend)

    def gradient(self, student: Tensor, upstream: Tensor) -> Tensor:
        """d result / d student, times ``upstream``: () or, for "none", (N,)."""
        at = self.raw.teacher_arguments + Tokens._fields.index("upstream")
        upstream = upstream.to(accumulation_dtype(student.dtype)).contiguous()  # autograd expands a sum's
        arguments = (*self.arguments[:at], upstream, *self.arguments[at + 1 :])
        op = getattr(torch.ops.pyalign, self.raw.name)
        return op(student, *arguments, False, True, False, self.backend)[0]

    def tensors(self) -> list[Tensor]:
        return [x for x in self.arguments if isinstance(x, Tensor)]

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Call:
        """This call with its tensors replaced by those that autograd kept (and whose versions it checked)."""
        kept = iter(tensors)
        return self._replace(arguments=tuple(next(kept) if isinstance(x, Tensor) else x for x in self.arguments))


class FirstOrderOnly(torch.autograd.Function):
    """The identity on a gradient whose own derivative raises, instead of silently leaving a term out."""

    @staticmethod
    def forward(gradient: Tensor, student: Tensor, upstream: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "pyalign's kernels have no second derivative; for create_graph=True force the plain torch implementation"
            ' with pyalign.backend("reference")'
        )


class _Loss(torch.autograd.Function):
    """(loss, *metrics), differentiable in the student. The classic form: half the overhead of the other."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call, in_place: bool) -> Any:
        ctx.call, ctx.in_place, ctx.gradient = call, in_place, None
        if in_place:
            loss, *metrics = call.forward_in_place(student)
            increment_version(student)
            ctx.gradient, ctx.version = student.detach(), student._version
        else:
            stored = call.stores_gradient(student)
            loss, *metrics = call.forward(student, stored)
            if stored:
                ctx.gradient, *metrics = metrics
            ctx.save_for_backward(student, *call.tensors())
        ctx.set_materialize_grads(False)
        if not metrics:
            return loss
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        if upstream is None:
            return None, None, None
        call: Call = ctx.call
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:
            if ctx.in_place and gradient._version != ctx.version:
                raise RuntimeError(
                    "inplace=True: the logits, which hold the gradient since the loss was computed, have been modified"
                    f" by an inplace operation: they are at version {gradient._version}; expected {ctx.version}"
                )
            torch.ops.pyalign.scale_(gradient, upstream, call.backend)
        elif ctx.in_place:
            raise RuntimeError(
                "inplace=True: a second backward needs the student's logits, which the gradient has replaced"
            )
        else:
            student, *tensors = ctx.saved_tensors
            gradient = call.with_tensors(tuple(tensors)).gradient(student, upstream)
        if torch.is_grad_enabled():
            student = gradient if ctx.in_place else ctx.saved_tensors[0]
            gradient = FirstOrderOnly.apply(gradient, student, upstream)
        return gradient, None, None


class _LossTraced(torch.autograd.Function):
    """(loss, *gradient if stored, *metrics) for torch.compile and torch.func: no state but the saved tensors."""

    @staticmethod
    def forward(student: Tensor, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.with_tensors(tensors).forward(student, call.stores_gradient(student)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, call, *tensors = inputs
        ctx.places = tuple(i for i, x in enumerate(call.arguments) if isinstance(x, Tensor))
        ctx.call = call._replace(arguments=tuple(None if isinstance(x, Tensor) else x for x in call.arguments))
        ctx.mark_non_differentiable(*output[1:])
        stored = output[1:2] if call.stores_gradient(student) else ()
        ctx.save_for_backward(student, *tensors, *stored)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        student, *tensors = ctx.saved_tensors
        call: Call = ctx.call
        if call.stores_gradient(student):
            dtype = accumulation_dtype(student.dtype)
            gradient = (tensors.pop().to(dtype) * upstream.to(dtype)).to(student.dtype)
        else:
            arguments = list(call.arguments)
            for place, tensor in zip(ctx.places, tensors, strict=True):
                arguments[place] = tensor
            gradient = call._replace(arguments=tuple(arguments)).gradient(student, upstream)
        return (FirstOrderOnly.apply(gradient, student, upstream), None, *(None for _ in tensors))


def functorch_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]  # torch offers no other way


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody watches the ops that these tensors meet: then a raw op may be called without torch's dispatcher,
    which costs as much as a kernel does for a small batch."""
    if torch.compiler.is_compiling() or functorch_is_active():
        return False
    if torch._C._len_torch_dispatch_stack():  # pyright: ignore[reportPrivateUsage]  # torch offers no other way
        return False
    for x in tensors:  # noqa: SIM110  # half the time of all()
        if type(x) not in _PLAIN:
            return False
    return True


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What a traced forward saved, without the wrappers that a finished transform of torch.func leaves around tensors.
    The function that vjp returns runs then, and a kernel called without torch's dispatcher would meet them."""
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    return tuple(None if x is None else unwrap_if_dead(x) for x in ctx.saved_tensors)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def refuse_forward_mode(x: Tensor) -> None:
    """Raises for a tensor with a tangent: the kernels would drop it."""
    level: int = forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
    if level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            "pyalign's kernels have no forward-mode derivative; for jvp force the plain torch implementation with"
            ' pyalign.backend("reference")'
        )


def loss(call: Call, student: Tensor, in_place: bool) -> Results:
    """Runs a loss, with a graph if the student needs one."""
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    refuse_forward_mode(student)
    if in_place and not needs_gradient:
        in_place = False  # nothing to write over the logits
    base = student._base  # pyright: ignore[reportPrivateUsage]
    if in_place and (student.is_leaf or (base is not None and base.is_leaf and base.requires_grad)):
        raise ValueError(
            f"inplace: student_logits is a {'leaf' if student.is_leaf else 'view of a leaf'} that requires grad; wanted"
            " logits computed by a model"
        )
    if in_place and (rows(student).tensor is not student or 0 in student.stride()):
        raise ValueError(
            f"inplace: got student_logits of shape {tuple(student.shape)} and strides {student.stride()}; wanted a last"
            " stride of 1, no stride of 0, and leading dimensions of at most two strides"
        )
    if in_place and not call.stores_gradient(student):
        raise ValueError(
            f"inplace: got reduction {call.reduction!r} and {student.dtype}; wanted 'mean' or 'sum' and a dtype"
            " other than float16, whose gradients are computed in the backward pass"
        )
    if not needs_gradient:
        value, *metrics = call.forward(student.detach(), False)
    elif torch.compiler.is_compiling() or functorch_is_active():
        if in_place:
            raise ValueError("inplace: not available under torch.compile and torch.func")
        value, *metrics = _LossTraced.apply(student, call, *call.tensors())
        metrics = metrics[call.stores_gradient(student) :]
    else:
        results = _Loss.apply(student, call, in_place)
        value, *metrics = results if call.want_metrics else (results,)
    return Results(value, *metrics) if call.want_metrics else Results(value, None, None)
