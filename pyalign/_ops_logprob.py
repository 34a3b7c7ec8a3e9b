"""The torch.library ops of log-probs and their autograd.

A forward pass that needs a graph keeps the logits and a state of three numbers a row, from which backward maps the row
into its gradient: one read, one write. The upstream gradients come per token and meet a slope before it is rounded, so
that float16 is safe too.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyalign._ops import FirstOrderOnly, define, functorch_is_active, refuse_forward_mode, saved_tensors, unwatched
from pyalign._types import LogprobResults, accumulation_dtype


@functools.cache
def engine(name: str) -> Any:
    """The object with the engine functions (logprob, logprob_gradient, cross_entropy) of a backend."""
    if name == "triton":
        return importlib.import_module("pyalign.kernels.logprob")
    if name == "reference":
        return importlib.import_module("pyalign.reference.logprob")
    return getattr(importlib.import_module("pyalign._native_logprob"), name)()


# Raw ops: (logits, targets, *options, what is wanted or given, backend).

_OPTIONS = "int ignore_index, float temperature, float? softcap"


def _logprob(logits: Tensor, targets: Tensor, *arguments: Any) -> list[Tensor]:
    """[logprob, entropy, state], of the last two what was asked for."""
    *rest, backend = arguments
    return [x for x in engine(backend).logprob(logits, targets.contiguous(), *rest) if x is not None]


def _logprob_fake(logits: Tensor, targets: Tensor, *arguments: Any) -> list[Tensor]:
    *_, want_entropy, want_state, _ = arguments
    dtype, count = accumulation_dtype(logits.dtype), math.prod(logits.shape[:-1])
    shapes = [(count,), *([(count,)] if want_entropy else []), *([(count, 3)] if want_state else [])]
    return [logits.new_empty(shape, dtype=dtype) for shape in shapes]


def _logprob_gradient(logits: Tensor, targets: Tensor, *arguments: Any) -> Tensor:
    *options, state, upstream_logprob, upstream_entropy, backend = arguments
    dtype = accumulation_dtype(logits.dtype)
    upstreams = [None if x is None else x.to(dtype).contiguous() for x in (upstream_logprob, upstream_entropy)]
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    engine(backend).logprob_gradient(logits, targets.contiguous(), *options, state.contiguous(), *upstreams, out)
    return out


def _logprob_gradient_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


define(
    f"logprob(Tensor logits, Tensor targets, {_OPTIONS}, bool want_entropy, bool want_state, str backend) -> Tensor[]",
    _logprob,
    _logprob_fake,
)
define(
    f"logprob_gradient(Tensor logits, Tensor targets, {_OPTIONS}, Tensor state, Tensor? upstream_logprob,"
    " Tensor? upstream_entropy, str backend) -> Tensor",
    _logprob_gradient,
    _logprob_gradient_fake,
)


class Call(NamedTuple):
    """Log-probs, ready to be taken of logits."""

    ignore_index: int
    temperature: float
    softcap: float | None
    want_entropy: bool
    backend: str

    def forward(self, logits: Tensor, targets: Tensor, want_state: bool) -> list[Tensor]:
        *options, want_entropy, backend = self
        run = _logprob if unwatched(logits, targets) else torch.ops.pyalign.logprob
        return run(logits, targets, *options, want_entropy, want_state, backend)

    def gradient(self, logits: Tensor, targets: Tensor, state: Tensor, upstreams: tuple[Tensor | None, ...]) -> Tensor:
        """d result / d logits, given d result / d log-probs and d entropies, (N,) each, or None for none."""
        *options, _, backend = self
        upstream_logprob, upstream_entropy = (*upstreams, None)[:2]
        plain = unwatched(logits, targets, state, upstream_logprob, upstream_entropy)
        run = _logprob_gradient if plain else torch.ops.pyalign.logprob_gradient
        return run(logits, targets, *options, state, upstream_logprob, upstream_entropy, backend)


def _first_order(gradient: Tensor, logits: Tensor, upstreams: tuple[Tensor | None, ...]) -> Any:
    for upstream in upstreams:
        if upstream is not None:
            gradient = FirstOrderOnly.apply(gradient, logits, upstream)
    return gradient


class _Logprobs(torch.autograd.Function):
    """(log-probs, entropies if wanted), differentiable in the logits. The classic form: half the other's overhead."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, call: Call) -> Any:
        *results, state = call.forward(logits, targets, True)
        ctx.call = call
        ctx.save_for_backward(logits, targets, state)
        ctx.set_materialize_grads(False)
        return tuple(results) if call.want_entropy else results[0]

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, None, None]:
        if all(upstream is None for upstream in upstreams):
            return None, None, None
        logits, targets, state = ctx.saved_tensors
        gradient = ctx.call.gradient(logits, targets, state, upstreams)
        if torch.is_grad_enabled():
            gradient = _first_order(gradient, logits, upstreams)
        return gradient, None, None


class _LogprobsTraced(torch.autograd.Function):
    """(log-probs, entropies if wanted, states) for torch.compile and torch.func: no state but the saved tensors."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, call: Call) -> tuple[Tensor, ...]:
        return tuple(call.forward(logits, targets, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, targets, ctx.call = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(logits, targets, output[-1])

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, None, None]:
        logits, targets, state = saved_tensors(ctx)
        upstreams = upstreams[:-1]
        gradient = ctx.call.gradient(logits, targets, state, upstreams)
        return _first_order(gradient, logits, upstreams), None, None


def logprobs(call: Call, logits: Tensor, targets: Tensor) -> LogprobResults:
    """Log-probs and, if wanted, entropies (N,), with a graph if the logits need one."""
    refuse_forward_mode(logits)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        results = call.forward(logits.detach(), targets, False)
    elif torch.compiler.is_compiling() or functorch_is_active():
        results = _LogprobsTraced.apply(logits, targets, call)[:-1]
    else:
        results = _Logprobs.apply(logits, targets, call)
        results = results if call.want_entropy else (results,)
    logprob, *entropy = results
    return LogprobResults(logprob, entropy[0] if entropy else None, None)
