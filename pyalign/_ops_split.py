"""The torch.library ops of losses over logits that are split over ranks, and their autograd.

A raw op is opaque: its collectives run inside, so torch.compile sees one node. The forward op returns per-token results
and what the gradient op needs, which meets no other rank; reductions are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyalign._ops import FirstOrderOnly, define, refuse_forward_mode
from pyalign._shards import Shards, of_group
from pyalign._split import SplitEngine, saved_width
from pyalign._types import LogprobResults, Options, Results, Tokens, accumulation_dtype
from pyalign.reference import distill as _reference

_TOKENS = "Tensor? mask, Tensor? labels, Tensor? teacher_rows, Tensor? targets, int ignore_index"
_OPTIONS = "int vocab, str divergence, float beta, float temperature, bool temperature_squared, float hard_weight"
_GROUP = "str group, int[] sizes, str backend"
_TEACHERS = {"distill": "Tensor teacher", "topk_distill": "Tensor logprobs, Tensor indices, Tensor? residual, str tail"}
_LOGPROB = "Tensor targets, int ignore_index, float temperature, float? softcap"


def _shards(group: str, sizes: list[int]) -> Shards:
    return of_group(group, tuple(sizes))


def _gradient_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Distillation(NamedTuple):
    """One loss as raw ops: (student, *teacher, *tokens, *options, ...)."""

    name: str

    def parse(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tokens, Options]:
        n = _TEACHERS[self.name].count(",") + 1
        mask, labels, teacher_rows, targets, ignore_index = arguments[n : n + 5]
        tokens = Tokens(mask, labels, teacher_rows, None, targets, None, None, ignore_index, "none")
        vocab, divergence, beta, temperature, temperature_squared, hard_weight = arguments[n + 5 :]
        options = Options(vocab, divergence, beta, temperature, temperature_squared, hard_weight)
        return arguments[:n], tokens, options

    def width(self, arguments: tuple[Any, ...]) -> int:
        teacher, _, options = self.parse(arguments)
        k = teacher[1].shape[-1] if self.name == "topk_distill" else 0
        return saved_width(self.name, k, options.hard_weight > 0)

    def forward(self, student: Tensor, *arguments: Any) -> list[Tensor]:
        """[row losses, saved, *metrics]"""
        *head, want_metrics, group, sizes, backend = arguments
        count = student.shape[:-1].numel()
        saved = student.new_empty((count, self.width(tuple(head))), dtype=torch.float64)
        engine = SplitEngine(backend, _shards(group, sizes), record=saved)
        teacher, tokens, options = self.parse(tuple(head))
        results: Results = getattr(engine, self.name)(
            student, *teacher, tokens, options, gradient=None, want_loss=True, want_metrics=want_metrics
        )
        return [x for x in (results.loss, saved, results.entropy, results.agreement) if x is not None]

    def fake_forward(self, student: Tensor, *arguments: Any) -> list[Tensor]:
        *head, want_metrics, _, _, _ = arguments
        count, dtype = math.prod(student.shape[:-1]), accumulation_dtype(student.dtype)
        saved = student.new_empty((count, self.width(tuple(head))), dtype=torch.float64)
        results = [student.new_empty(count, dtype=dtype), saved]
        if want_metrics:
            results += [student.new_empty(count, dtype=dtype), student.new_empty(count, dtype=torch.bool)]
        return results

    def gradient(self, student: Tensor, *arguments: Any) -> Tensor:
        *head, saved, upstream, group, sizes, backend = arguments
        engine = SplitEngine(backend, _shards(group, sizes), saved=saved)
        teacher, tokens, options = self.parse(tuple(head))
        tokens = tokens._replace(upstream=upstream.to(accumulation_dtype(student.dtype)).contiguous())
        out = _gradient_like(student)
        getattr(engine, self.name)(
            student, *teacher, tokens, options, gradient=out, want_loss=False, want_metrics=False
        )
        return out


def _logprob(logits: Tensor, targets: Tensor, *arguments: Any) -> list[Tensor]:
    """[log-probs, saved, entropies if wanted]"""
    ignore_index, temperature, softcap, want_entropy, group, sizes, backend = arguments
    saved = logits.new_empty((targets.shape[0], saved_width("logprob")), dtype=torch.float64)
    engine = SplitEngine(backend, _shards(group, sizes), record=saved)
    results = engine.logprob(logits, targets, ignore_index, temperature, softcap, want_entropy, True)
    return [x for x in (results.logprob, saved, results.entropy) if x is not None]


def _logprob_fake(logits: Tensor, targets: Tensor, *arguments: Any) -> list[Tensor]:
    *_, want_entropy, _, _, _ = arguments
    count, dtype = targets.shape[0], accumulation_dtype(logits.dtype)
    saved = logits.new_empty((count, saved_width("logprob")), dtype=torch.float64)
    return [logits.new_empty(count, dtype=dtype), saved, *([logits.new_empty(count, dtype=dtype)] * want_entropy)]


def _logprob_gradient(logits: Tensor, targets: Tensor, *arguments: Any) -> Tensor:
    ignore_index, temperature, softcap, saved, upstream_logprob, upstream_entropy, group, sizes, backend = arguments
    engine, dtype = SplitEngine(backend, _shards(group, sizes), saved=saved), accumulation_dtype(logits.dtype)
    of_logprob, of_entropy = (
        None if x is None else x.to(dtype).contiguous() for x in (upstream_logprob, upstream_entropy)
    )
    out = _gradient_like(logits)
    engine.logprob_gradient(logits, targets, ignore_index, temperature, softcap, None, of_logprob, of_entropy, out)
    return out


def _fake_gradient(x: Tensor, *_: Any) -> Tensor:
    return _gradient_like(x)


_Body = Callable[..., Any]
for _name, _teacher in _TEACHERS.items():
    _loss = _Distillation(_name)
    _inputs = f"Tensor student, {_teacher}, {_TOKENS}, {_OPTIONS}"
    define(f"split_{_name}({_inputs}, bool want_metrics, {_GROUP}) -> Tensor[]", _loss.forward, _loss.fake_forward)
    define(
        f"split_{_name}_gradient({_inputs}, Tensor saved, Tensor upstream, {_GROUP}) -> Tensor",
        _loss.gradient,
        _fake_gradient,
    )
define(f"split_logprob(Tensor logits, {_LOGPROB}, bool want_entropy, {_GROUP}) -> Tensor[]", _logprob, _logprob_fake)
define(
    f"split_logprob_gradient(Tensor logits, {_LOGPROB}, Tensor saved, Tensor? upstream_logprob, "
    f"Tensor? upstream_entropy, {_GROUP}) -> Tensor",
    _logprob_gradient,
    _fake_gradient,
)


def _topk(logits: Tensor, k: int, temperature: float, group: str, sizes: list[int], backend: str) -> list[Tensor]:
    return list(SplitEngine(backend, _shards(group, sizes)).topk(logits, k, temperature))


def _topk_fake(logits: Tensor, k: int, *_: Any) -> list[Tensor]:
    count, dtype = math.prod(logits.shape[:-1]), accumulation_dtype(logits.dtype)
    indices = logits.new_empty((count, k), dtype=torch.int64)
    return [logits.new_empty((count, k), dtype=dtype), indices, logits.new_empty(count, dtype=dtype)]


define(f"split_topk(Tensor logits, int k, float temperature, {_GROUP}) -> Tensor[]", _topk, _topk_fake)


# Autograd


class Call(NamedTuple):
    """Per-token results of logits that are split; ``arguments`` are those of both raw ops."""

    name: str
    arguments: tuple[Any, ...]
    outputs: int  # how many of the results are differentiable
    want_extra: bool  # metrics, or the entropies
    group: tuple[str, tuple[int, ...], str]  # name, sizes, backend

    def forward(self, x: Tensor) -> list[Tensor]:
        """[result, saved, *extra]"""
        return getattr(torch.ops.pyalign, "split_" + self.name)(x, *self.arguments, self.want_extra, *self.group)

    def gradient(self, x: Tensor, saved: Tensor, upstreams: tuple[Tensor | None, ...]) -> Tensor:
        op = getattr(torch.ops.pyalign, f"split_{self.name}_gradient")
        return op(x, *self.arguments, saved, *upstreams, *self.group)

    def without_tensors(self) -> Call:
        return self._replace(arguments=tuple(None if isinstance(x, Tensor) else x for x in self.arguments))

    def with_tensors(self, tensors: tuple[Tensor, ...], places: tuple[int, ...]) -> Call:
        arguments = list(self.arguments)
        for place, tensor in zip(places, tensors, strict=True):
            arguments[place] = tensor
        return self._replace(arguments=tuple(arguments))


def _places(call: Call) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(call.arguments) if isinstance(x, Tensor))


class _Split(torch.autograd.Function):
    """(result, saved, *extra), differentiable in the logits of this rank's slice."""

    @staticmethod
    def forward(x: Tensor, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.with_tensors(tensors, _places(call)).forward(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, call, *tensors = inputs
        ctx.places, ctx.call = _places(call), call.without_tensors()
        results = (output[0], *output[2:])
        ctx.mark_non_differentiable(output[1], *results[call.outputs :])
        ctx.save_for_backward(x, output[1], *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, saved, *tensors = ctx.saved_tensors
        call = ctx.call.with_tensors(tuple(tensors), ctx.places)
        upstreams = (gradients[0], *gradients[2:])[: call.outputs]
        nothing = (None, *(None for _ in tensors))
        if all(upstream is None for upstream in upstreams):
            return None, *nothing
        if call.name == "logprob":
            upstreams = (*upstreams, None)[:2]
        gradient = call.gradient(x, saved, upstreams)
        for upstream in upstreams:
            if upstream is not None:
                gradient = FirstOrderOnly.apply(gradient, x, upstream)
        return gradient, *nothing


def _run(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    """(result, *extra)"""
    refuse_forward_mode(x)
    if torch.is_grad_enabled() and x.requires_grad:
        result, _, *extra = _Split.apply(x, call, *(y for y in call.arguments if isinstance(y, Tensor)))
    else:
        result, _, *extra = call.forward(x.detach())
    return result, *extra


def loss(
    name: str, student: Tensor, teacher: tuple[Any, ...], tokens: Tokens, options: Options, want_metrics: bool,
    shards: Shards, backend: str,
) -> Results:  # fmt: skip
    """A distillation loss over this rank's slice of the logits, with a graph if they need one."""
    arguments = (
        *teacher, tokens.mask, tokens.labels, tokens.teacher_rows, tokens.targets, tokens.ignore_index, *options
    )  # fmt: skip
    call = Call(name, arguments, 1, want_metrics, (shards.group, shards.sizes, backend))
    row_loss, *metrics = _run(call, student)
    counted = _reference.counted_tokens(tokens, math.prod(student.shape[:-1]), student.device)
    return Results(_reference.reduce(row_loss, counted, tokens), *(metrics or (None, None)))


def logprobs(
    logits: Tensor, targets: Tensor, ignore_index: int, temperature: float, softcap: float | None, want_entropy: bool,
    shards: Shards, backend: str,
) -> LogprobResults:  # fmt: skip
    """Log-probs and, if wanted, entropies (N,) of this rank's slice of the logits, with a graph if they need one."""
    arguments = (targets, ignore_index, temperature, softcap)
    call = Call("logprob", arguments, 1 + want_entropy, want_entropy, (shards.group, shards.sizes, backend))
    logprob, *entropy = _run(call, logits)
    return LogprobResults(logprob, entropy[0] if entropy else None, None)


def topk(logits: Tensor, k: int, temperature: float, shards: Shards, backend: str) -> list[Tensor]:
    """[log-probs (N, k), indices, residual (N,)] of rows of which this rank holds a slice."""
    return torch.ops.pyalign.split_topk(logits, k, temperature, shards.group, shards.sizes, backend)
