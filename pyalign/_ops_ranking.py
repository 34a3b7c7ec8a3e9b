"""The torch.library ops of the preference losses and their autograd: one Function for pairs, labels and groups.

A forward pass also computes the gradient, in accumulation dtype and not yet divided by the denominator, which it
returns beside it. Backward is one kernel that divides, multiplies by the upstream gradient and rounds to the scores'
dtype, as often as it is asked.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead  # pyright: ignore[reportMissingModuleSource]

from pyalign._ops import FirstOrderOnly, define, functorch_is_active, refuse_forward_mode, saved_tensors, unwatched
from pyalign._types import (
    NO_PAIR_TENSORS,
    PairOptions,
    PairResults,
    PairTensors,
    RankOptions,
    RankResults,
    RankTensors,
    accumulation_dtype,
    stores_both,
)


@functools.cache
def engine(name: str) -> Any:
    """The object with the engine functions (pair_loss, ranked_loss, score_gradient) of a kernel backend."""
    if name == "triton":
        return importlib.import_module("pyalign.kernels.ranking")
    return getattr(importlib.import_module("pyalign._native_ranking"), name)()


def _contiguous(tensors: Any) -> Any:
    return tensors._make([None if x is None else x.contiguous() for x in tensors])


# Raw ops: scores, what is constant about them, options, what is wanted. They return [loss, denominator, gradient,
# rewards], of the last two what was asked for.

_PAIR_TENSORS = (
    "Tensor? first_reference, Tensor? second_reference, Tensor? margin, Tensor? labels, Tensor? weight, Tensor? mask, "
    "Tensor? num_items"
)
_PAIR_OPTIONS = (
    "str form, float scale, float constant_margin, float label_smoothing, float center, float tau, float delta, "
    "float positive_weight, float negative_weight, str reduction"
)
_RANK_TENSORS = "Tensor ranks, Tensor? group_offsets, Tensor? num_items"
_RANK_OPTIONS = "str method, float scale, float margin, float label_smoothing, bool over_groups, str reduction"


def _run_pairs(
    first: Tensor, second: Tensor | None, tensors: PairTensors, options: PairOptions, want_gradient: bool,
    want_rewards: bool, backend: str,
) -> PairResults:  # fmt: skip
    if tensors is not NO_PAIR_TENSORS:
        tensors = _contiguous(tensors)
    if second is not None:
        second = second.contiguous()
    return engine(backend).pair_loss(
        first.contiguous(), second, tensors, options, want_gradient=want_gradient, want_rewards=want_rewards
    )


def _run_groups(
    scores: Tensor, tensors: RankTensors, options: RankOptions, want_gradient: bool, backend: str
) -> RankResults:
    return engine(backend).ranked_loss(scores.contiguous(), _contiguous(tensors), options, want_gradient=want_gradient)


def _pair_loss(first: Tensor, second: Tensor | None, *arguments: Any) -> list[Tensor]:
    tensors, options, wanted = _split(arguments, PairTensors, PairOptions)
    return [x for x in _run_pairs(first, second, tensors, options, *wanted) if x is not None]


def _ranked_loss(scores: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, options, wanted = _split(arguments, RankTensors, RankOptions)
    return [x for x in _run_groups(scores, tensors, options, *wanted) if x is not None]


def _split(arguments: tuple[Any, ...], tensors: Any, options: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    n = len(tensors._fields)
    m = n + len(options._fields)
    return tensors(*arguments[:n]), options(*arguments[n:m]), arguments[m:]


def _pair_loss_fake(first: Tensor, second: Tensor | None, *arguments: Any) -> list[Tensor]:
    _, options, (want_gradient, want_rewards, _) = _split(arguments, PairTensors, PairOptions)
    dtype, count = accumulation_dtype(first.dtype), first.shape[0]
    sides, both = 1 if second is None else 2, stores_both(options)
    results = [first.new_empty((count,) if options.reduction == "none" else (), dtype=dtype)]
    results.append(first.new_empty((), dtype=dtype))
    shapes = [(2, count) if both else (count,)] * want_gradient + [(sides, count)] * want_rewards
    return results + [first.new_empty(shape, dtype=dtype) for shape in shapes]


def _ranked_loss_fake(scores: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, options, (want_gradient, _) = _split(arguments, RankTensors, RankOptions)
    dtype, offsets = accumulation_dtype(scores.dtype), tensors.group_offsets
    groups = scores.shape[0] if offsets is None else offsets.shape[0] - 1
    results = [scores.new_empty((groups,) if options.reduction == "none" else (), dtype=dtype)]
    results.append(scores.new_empty((), dtype=dtype))
    return results + ([scores.new_empty(scores.numel(), dtype=dtype)] if want_gradient else [])


def _score_gradient(
    gradient: Tensor,
    upstream: Tensor,
    denominator: Tensor,
    group_offsets: Tensor | None,
    size: int,
    dtype: torch.dtype,
    sides: int,
    backend: str,
) -> list[Tensor]:
    if upstream.dtype != gradient.dtype or upstream.dim():  # autograd expands a sum's
        upstream = upstream.to(gradient.dtype).contiguous()
    return engine(backend).score_gradient(gradient, upstream, denominator, group_offsets, size, dtype, sides)


def _score_gradient_fake(
    gradient: Tensor,
    upstream: Tensor,
    denominator: Tensor,
    group_offsets: Tensor | None,
    size: int,
    dtype: torch.dtype,
    sides: int,
    backend: str,
) -> list[Tensor]:
    return [gradient.new_empty(gradient.shape[-1:], dtype=dtype) for _ in range(sides)]


define(
    f"pair_loss(Tensor first, Tensor? second, {_PAIR_TENSORS}, {_PAIR_OPTIONS}, bool want_gradient, bool want_rewards,"
    " str backend) -> Tensor[]",
    _pair_loss,
    _pair_loss_fake,
)
define(
    f"ranked_loss(Tensor scores, {_RANK_TENSORS}, {_RANK_OPTIONS}, bool want_gradient, str backend) -> Tensor[]",
    _ranked_loss,
    _ranked_loss_fake,
)
define(
    "score_gradient(Tensor gradient, Tensor upstream, Tensor denominator, Tensor? group_offsets, int size,"
    " ScalarType dtype, int sides, str backend) -> Tensor[]",
    _score_gradient,
    _score_gradient_fake,
)


class PairCall(NamedTuple):
    """A loss over items, ready to run on their scores."""

    tensors: PairTensors
    options: PairOptions
    want_rewards: bool
    backend: str
    size = 1  # scores per element of an upstream gradient for "none"
    group_offsets = None

    def run(self, scores: tuple[Tensor, ...], want_gradient: bool) -> PairResults:
        """(loss, denominator, gradient, rewards), None for what was not asked for."""
        tensors, options, want_rewards, backend = self
        second = scores[1] if len(scores) == 2 else None
        return _run_pairs(scores[0], second, tensors, options, want_gradient, want_rewards, backend)

    def run_op(self, scores: tuple[Tensor, ...], want_gradient: bool) -> list[Tensor]:
        """[loss, denominator, gradient and rewards if wanted] by the torch.library op."""
        first, second = scores if len(scores) == 2 else (scores[0], None)
        wanted = (want_gradient, self.want_rewards, self.backend)
        return torch.ops.pyalign.pair_loss(first, second, *self.tensors, *self.options, *wanted)


class RankCall(NamedTuple):
    """A loss over groups, ready to run on their scores."""

    tensors: RankTensors
    options: RankOptions
    size: int  # scores per group
    backend: str
    want_rewards = False

    @property
    def group_offsets(self) -> Tensor | None:
        return self.tensors.group_offsets

    def run(self, scores: tuple[Tensor, ...], want_gradient: bool) -> RankResults:
        """(loss, denominator, gradient), None for what was not asked for."""
        return _run_groups(scores[0], self.tensors, self.options, want_gradient, self.backend)

    def run_op(self, scores: tuple[Tensor, ...], want_gradient: bool) -> list[Tensor]:
        """[loss, denominator, gradient if wanted] by the torch.library op."""
        return torch.ops.pyalign.ranked_loss(scores[0], *self.tensors, *self.options, want_gradient, self.backend)


Call = PairCall | RankCall


def _given(call: Call) -> list[Tensor]:
    return [x for x in call.tensors if x is not None]


def _with_tensors(call: Any, given: tuple[Tensor, ...]) -> Any:
    """The call with its tensors replaced by those that autograd passed on."""
    kept = iter(given)
    return call._replace(tensors=call.tensors._make([None if x is None else next(kept) for x in call.tensors]))


def _gradients(
    call: Call,
    gradient: Tensor,
    denominator: Tensor,
    group_offsets: Tensor | None,
    scores: tuple[Tensor, ...],
    upstream: Tensor,
) -> list[Tensor]:
    """d result / d scores, times ``upstream``: () or, for "none", one per item or group."""
    score_gradient = _score_gradient if unwatched(gradient, upstream) else torch.ops.pyalign.score_gradient
    results = score_gradient(
        gradient, upstream, denominator, group_offsets, call.size, scores[0].dtype, len(scores), call.backend
    )
    return [results[0].view(scores[0].shape)] if scores[0].dim() > 1 else results


def _first_order(gradients: Sequence[Tensor], scores: tuple[Tensor, ...], upstream: Tensor) -> list[Any]:
    return [FirstOrderOnly.apply(gradient, x, upstream) for gradient, x in zip(gradients, scores, strict=True)]


class _ScoreLoss(torch.autograd.Function):
    """(loss, rewards if wanted), differentiable in the scores. The classic form: half the overhead of the other."""

    @staticmethod
    def forward(ctx: Any, call: Call, plain: bool, *scores: Tensor) -> Any:
        loss, denominator, gradient, *rewards = (call.run if plain else call.run_op)(scores, True)
        # An attribute takes half the time of save_for_backward. Backward reads no score: they may change.
        ctx.kept = call, gradient, denominator, call.group_offsets, scores
        if not call.want_rewards:
            return loss
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rewards)
        return loss, *rewards

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        call, gradient, denominator, group_offsets, scores = ctx.kept
        if upstream is None:
            return (None,) * (2 + len(scores))
        gradients = _gradients(call, gradient, denominator, group_offsets, scores, upstream)
        if torch.is_grad_enabled():
            gradients = _first_order(gradients, scores, upstream)
        return None, None, *gradients


# Without what torch's apply does in Python before it calls this one, for torch.func and setup_context: that takes as
# long as a kernel does for a small batch. The part of it that counts, unwrap_if_dead, takes off what a finished
# transform leaves around a tensor that escaped from it.
_apply_score_loss: Any = super(torch.autograd.Function, _ScoreLoss).apply  # pyright: ignore[reportAttributeAccessIssue]


class _ScoreLossTraced(torch.autograd.Function):
    """(loss, denominator, gradient, rewards if wanted) for torch.compile and torch.func: no state but saved tensors."""

    @staticmethod
    def forward(call: Call, sides: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_with_tensors(call, tensors[sides:]).run_op(tensors[:sides], True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, sides, *tensors = inputs
        ctx.sides, ctx.constants = sides, len(tensors) - sides
        scores, offsets = tensors[:sides], _with_tensors(call, tuple(tensors[sides:])).group_offsets
        ctx.packed = offsets is not None
        ctx.call = call._replace(
            tensors=type(call.tensors)(*(None,) * len(call.tensors))
        )  # backward has no use for them, and must not keep them alive
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*scores, output[2], output[1], *([offsets] if ctx.packed else []))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = list(saved_tensors(ctx))
        group_offsets = saved.pop() if ctx.packed else None
        *scores, gradient, denominator = saved
        scores = tuple(scores)
        gradients = _gradients(ctx.call, gradient, denominator, group_offsets, scores, upstream)
        return (None, None, *_first_order(gradients, scores, upstream), *(None for _ in range(ctx.constants)))


def loss(call: Call, *scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """The loss and, if wanted, rewards; with a graph if any of the scores needs one."""
    for x in scores:
        refuse_forward_mode(x)
    constants = () if call.tensors is NO_PAIR_TENSORS else call.tensors
    plain = unwatched(*scores, *constants)
    rewards: Any
    if not (torch.is_grad_enabled() and (scores[0].requires_grad or scores[-1].requires_grad)):
        scores = tuple(unwrap_if_dead(x.detach() if x.requires_grad else x) for x in scores)
        results = (call.run if plain else call.run_op)(scores, False)
        return results[0], results[-1] if call.want_rewards else None
    if not plain and (torch.compiler.is_compiling() or functorch_is_active()):
        value, _, _, *rewards = _ScoreLossTraced.apply(call, len(scores), *scores, *_given(call))
        return value, rewards[0] if call.want_rewards else None
    results = _apply_score_loss(call, plain, *map(unwrap_if_dead, scores))
    return results if call.want_rewards else (results, None)
