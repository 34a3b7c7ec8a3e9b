"""The torch.library ops of scoring and their autograd.

A reward head keeps for backward which rows it read and, of hidden states and head, what the gradients asked for need.
Win probabilities and their means keep the scores alone, and compute probabilities again.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyalign._ops import FirstOrderOnly, define, functorch_is_active, refuse_forward_mode, saved_tensors, unwatched
from pyalign._types import STATISTICS, MetricOptions, MetricTensors, accumulation_dtype


@functools.cache
def engine(name: str) -> Any:
    """The object with the engine functions (reward_scores, reward_gradient, score_groups, preference_metrics)."""
    if name == "triton":
        return importlib.import_module("pyalign.kernels.scoring")
    return getattr(importlib.import_module("pyalign._native_scoring"), name)()


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _cut(offsets: Tensor | None, count: int, backend: str) -> Tensor | None:
    """The offsets, or zeros if they don't cut ``count`` entries into parts: the GPU kernels read without a look at
    them. (The C++ engine raises.)"""
    if offsets is None:
        return None
    offsets = offsets.contiguous()
    if backend == "cpu":
        return offsets
    whole = (offsets[0] == 0) & (offsets[-1] == count) & (offsets[1:] >= offsets[:-1]).all()
    return torch.where(whole, offsets, 0)


# Raw ops


def _reward_scores(
    hidden: Tensor, head: Tensor, bias: Tensor | None, offsets: Tensor | None, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(B, C) scores and (B,) the rows that were read, -1 for none."""
    head, bias, mask = _contiguous(head, bias, mask)  # pyright: ignore[reportAssignmentType]
    return engine(backend).reward_scores(hidden, head, bias, _cut(offsets, hidden.shape[0], backend), mask)


def _reward_scores_fake(
    hidden: Tensor, head: Tensor, bias: Tensor | None, offsets: Tensor | None, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    sequences = hidden.shape[0] if offsets is None else offsets.shape[0] - 1
    scores = head.new_empty((sequences, head.shape[0]))
    return scores, hidden.new_empty(sequences, dtype=torch.int64)


def _reward_gradient(
    upstream: Tensor,
    last: Tensor,
    hidden: Tensor | None,
    head: Tensor | None,
    count: int,
    dtype: torch.dtype,
    want_bias: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of ``count`` hidden states if the head is given, of the head if they are, and of the bias if wanted."""
    upstream, head = _contiguous(upstream, head)  # pyright: ignore[reportAssignmentType]
    gradients = engine(backend).reward_gradient(upstream, last, hidden, head, count, dtype, want_bias)
    return [x for x in gradients if x is not None]


def _reward_gradient_fake(
    upstream: Tensor,
    last: Tensor,
    hidden: Tensor | None,
    head: Tensor | None,
    count: int,
    dtype: torch.dtype,
    want_bias: bool,
    backend: str,
) -> list[Tensor]:
    gradients = [] if head is None else [head.new_empty((count, head.shape[1]), dtype=dtype)]
    if hidden is not None:
        gradients.append(upstream.new_empty((upstream.shape[1], hidden.shape[-1])))
    return gradients + ([upstream.new_empty(upstream.shape[1])] if want_bias else [])


def _group_result(op: str, scores: Tensor, offsets: Tensor | None, total: int) -> tuple[Any, torch.dtype]:
    """The shape and dtype of what an op of groups returns."""
    if op == "best_of_n":
        return (scores.shape[0] if offsets is None else offsets.shape[0] - 1,), torch.int64
    if op.endswith("_gradient"):
        return scores.shape, scores.dtype
    dtype = accumulation_dtype(scores.dtype)
    if op == "expected_win_rates":
        return scores.shape, dtype
    return ((*scores.shape, scores.shape[1]) if offsets is None else (total,)), dtype


def _score_groups(
    scores: Tensor,
    offsets: Tensor | None,
    blocks: Tensor | None,
    upstream: Tensor | None,
    op: str,
    total: int,
    scale: float,
    backend: str,
) -> Tensor:
    shape, dtype = _group_result(op, scores, offsets, total)
    scores, blocks, upstream = _contiguous(scores, blocks, upstream)  # pyright: ignore[reportAssignmentType]
    if offsets is not None and backend != "cpu" and dtype.is_floating_point:
        result = torch.full(shape, math.nan, dtype=dtype, device=scores.device)  # what no group holds
    else:
        result = torch.empty(shape, dtype=dtype, device=scores.device)
    offsets = _cut(offsets, scores.shape[0], backend)
    engine(backend).score_groups(op, scores, offsets, blocks, upstream, scale, result)
    return result


def _score_groups_fake(
    scores: Tensor,
    offsets: Tensor | None,
    blocks: Tensor | None,
    upstream: Tensor | None,
    op: str,
    total: int,
    scale: float,
    backend: str,
) -> Tensor:
    shape, dtype = _group_result(op, scores, offsets, total)
    return scores.new_empty(shape, dtype=dtype)


def _preference_metrics(chosen: Tensor, rejected: Tensor, *arguments: Any) -> Tensor:
    n = len(MetricTensors._fields)
    tensors, options = MetricTensors._make(_contiguous(*arguments[:n])), MetricOptions(*arguments[n:-1])
    return engine(arguments[-1]).preference_metrics(chosen.contiguous(), rejected.contiguous(), tensors, options)


def _preference_metrics_fake(chosen: Tensor, rejected: Tensor, *arguments: Any) -> Tensor:
    options = MetricOptions(*arguments[len(MetricTensors._fields) : -1])
    return chosen.new_empty((options.categories, options.bins + 1, len(STATISTICS)), dtype=torch.float64)


define(
    "reward_scores(Tensor hidden, Tensor head, Tensor? bias, Tensor? offsets, Tensor? mask, str backend)"
    " -> (Tensor, Tensor)",
    _reward_scores,
    _reward_scores_fake,
)
define(
    "reward_gradient(Tensor upstream, Tensor last, Tensor? hidden, Tensor? head, SymInt count, ScalarType dtype,"
    " bool want_bias, str backend) -> Tensor[]",
    _reward_gradient,
    _reward_gradient_fake,
)
define(
    "score_groups(Tensor scores, Tensor? offsets, Tensor? blocks, Tensor? upstream, str op, SymInt total, float scale,"
    " str backend) -> Tensor",
    _score_groups,
    _score_groups_fake,
)
define(
    "preference_metrics(Tensor chosen, Tensor rejected, Tensor? margin, Tensor? weight, Tensor? mask, Tensor? category,"
    " int categories, int bins, float scale, float constant_margin, str backend) -> Tensor",
    _preference_metrics,
    _preference_metrics_fake,
)


# Reward heads


class RewardCall(NamedTuple):
    """A reward head, ready to run; what needs a gradient was decided before."""

    by_hidden: bool
    by_head: bool
    by_bias: bool
    backend: str

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden, head, bias, offsets, mask -> scores, rows."""
        run: Any = _reward_scores if unwatched(*tensors) else torch.ops.pyalign.reward_scores
        return run(*tensors, self.backend)

    def kept(self, hidden: Tensor, head: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return hidden if self.by_head else None, head if self.by_hidden else None

    def gradients(
        self, upstream: Tensor, last: Tensor, hidden: Tensor | None, head: Tensor | None, shape: Any, dtype: torch.dtype
    ) -> list[Tensor | None]:
        """Of hidden, head and bias; None for what is frozen."""
        run = _reward_gradient if unwatched(upstream, hidden, head) else torch.ops.pyalign.reward_gradient
        given = iter(run(upstream, last, hidden, head, math.prod(shape[:-1]), dtype, self.by_bias, self.backend))
        wanted = (self.by_hidden, self.by_head, self.by_bias)
        by_hidden, by_head, by_bias = (next(given) if want else None for want in wanted)
        return [None if by_hidden is None else by_hidden.view(shape), by_head, by_bias]


def _first_order(gradients: list[Tensor | None], upstream: Tensor, *others: Tensor | None) -> list[Any]:
    """Of each gradient and what else it depends on."""
    return [
        None if x is None else FirstOrderOnly.apply(x, upstream if other is None else other, upstream)
        for x, other in zip(gradients, others, strict=True)
    ]


class _RewardScores(torch.autograd.Function):
    """Scores, differentiable in hidden states, head and bias. The classic form: half the overhead of the other."""

    @staticmethod
    def forward(ctx: Any, call: RewardCall, hidden: Tensor, head: Tensor, *rest: Tensor | None) -> Tensor:
        scores, last = call.forward(hidden, head, *rest)
        ctx.call, ctx.shape, ctx.dtype = call, hidden.shape, hidden.dtype
        ctx.save_for_backward(last, *call.kept(hidden, head))
        ctx.set_materialize_grads(False)
        return scores

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        last, hidden, head = ctx.saved_tensors
        gradients = ctx.call.gradients(upstream, last, hidden, head, ctx.shape, ctx.dtype)
        if torch.is_grad_enabled():
            gradients = _first_order(gradients, upstream, head, hidden, None)
        return None, *gradients, None, None


class _RewardScoresTraced(torch.autograd.Function):
    """(scores, rows) for torch.compile and torch.func: no state but the saved tensors."""

    @staticmethod
    def forward(call: RewardCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return call.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        call, hidden, head, *_ = inputs
        ctx.call, ctx.shape, ctx.dtype = call, hidden.shape, hidden.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *call.kept(hidden, head))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        last, hidden, head = saved_tensors(ctx)
        gradients = ctx.call.gradients(upstream, last, hidden, head, ctx.shape, ctx.dtype)
        return None, *_first_order(gradients, upstream, head, hidden, None), None, None


def reward_scores(
    hidden: Tensor, head: Tensor, bias: Tensor | None, offsets: Tensor | None, mask: Tensor | None, backend: str
) -> Tensor:
    """(B, C), with a graph if hidden states, head or bias need one."""
    given = (hidden, head, bias)
    for x in given:
        if x is not None:
            refuse_forward_mode(x)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in given]
    call = RewardCall(needs[0], needs[1], needs[2], backend)
    if not any(needs):
        return call.forward(*(None if x is None else x.detach() for x in given), offsets, mask)[0]
    if torch.compiler.is_compiling() or functorch_is_active():
        return _RewardScoresTraced.apply(call, hidden, head, bias, offsets, mask)[0]
    return _RewardScores.apply(call, hidden, head, bias, offsets, mask)  # pyright: ignore[reportReturnType]


# Groups


class GroupCall(NamedTuple):
    """An op of groups, ready to run on scores."""

    op: str
    total: int  # of the matrices of packed groups
    scale: float
    backend: str

    def run(
        self, scores: Tensor, offsets: Tensor | None, blocks: Tensor | None, upstream: Tensor | None = None
    ) -> Tensor:
        run = _score_groups if unwatched(scores, offsets, blocks, upstream) else torch.ops.pyalign.score_groups
        op = self.op if upstream is None else f"{self.op}_gradient"
        return run(scores, offsets, blocks, upstream, op, self.total, self.scale, self.backend)


class _Groups(torch.autograd.Function):
    """The result, differentiable in the scores. The classic form: half the overhead of the other."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, offsets: Tensor | None, blocks: Tensor | None, call: GroupCall) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(scores, offsets, blocks)
        ctx.set_materialize_grads(False)
        return call.run(scores, offsets, blocks)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if upstream is None:
            return None, None, None, None
        scores, offsets, blocks = ctx.saved_tensors
        gradient = ctx.call.run(scores, offsets, blocks, upstream)
        if torch.is_grad_enabled():
            gradient = FirstOrderOnly.apply(gradient, scores, upstream)
        return gradient, None, None, None  # pyright: ignore[reportReturnType]


class _GroupsTraced(torch.autograd.Function):
    """The same for torch.compile and torch.func."""

    @staticmethod
    def forward(scores: Tensor, offsets: Tensor | None, blocks: Tensor | None, call: GroupCall) -> Tensor:
        return call.run(scores, offsets, blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, offsets, blocks, ctx.call = inputs
        ctx.save_for_backward(scores, offsets, blocks)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, None, None, None]:
        scores, offsets, blocks = saved_tensors(ctx)
        gradient = ctx.call.run(scores, offsets, blocks, upstream)
        return FirstOrderOnly.apply(gradient, scores, upstream), None, None, None


def groups(call: GroupCall, scores: Tensor, offsets: Tensor | None, blocks: Tensor | None = None) -> Tensor:
    """The op's result, with a graph if the scores need one."""
    refuse_forward_mode(scores)
    if not (torch.is_grad_enabled() and scores.requires_grad) or call.op == "best_of_n":
        return call.run(scores.detach(), offsets, blocks)
    traced = torch.compiler.is_compiling() or functorch_is_active()
    return (_GroupsTraced if traced else _Groups).apply(scores, offsets, blocks, call)  # pyright: ignore[reportReturnType]


def preference_metrics(
    chosen: Tensor, rejected: Tensor, tensors: MetricTensors, options: MetricOptions, backend: str
) -> Tensor:
    """(categories, bins + 1, 8) float64 sums of ``STATISTICS``."""
    run = _preference_metrics if unwatched(chosen, rejected, *tensors) else torch.ops.pyalign.preference_metrics
    return run(chosen, rejected, *tensors, *options, backend)
