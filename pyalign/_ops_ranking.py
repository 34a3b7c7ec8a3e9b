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

from pyalign._ops import FirstOrderOnly, define, functorch_is_active, refuse_forward_mode, unwatched
from pyalign._types import (
    NO_PAIR_TENSORS,
    PairOptions,
    PairResults,
    PairTensors,
    RankOptions,
    RankResults,
    RankTensors,
    accumulation_dtype,
)


@functools.cache
def engine(name: str) -> Any:
    """The object with the engine functions (pair_loss, ranked_loss, score_gradient) of a kernel backend."""
    if name == "triton":
        return importlib.import_module("pyalign.kernels.ranking")
    return getattr(importlib.import_module("pyalign._native_ranking"), name)()


def _contiguous(tensors: Any) -> Any:
    if tensors is NO_PAIR_TENSORS:
        return tensors
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
    return engine(backend).pair_loss(
        first.contiguous(), None if second is None else second.contiguous(), _contiguous(tensors), options,
        want_gradient=want_gradient, want_rewards=want_rewards,
    )  # fmt: skip


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
    sides = (1 if second is None else 2, count)
    results = [first.new_empty((count,) if options.reduction == "none" else (), dtype=dtype)]
    results.append(first.new_empty((), dtype=dtype))
    return results + [first.new_empty(sides, dtype=dtype) for wanted in (want_gradient, want_rewards) if wanted]


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
    backend: str,
) -> Tensor:
    if upstream.dtype != gradient.dtype or upstream.dim():  # autograd expands a sum's
        upstream = upstream.to(gradient.dtype).contiguous()
    return engine(backend).score_gradient(gradient, upstream, denominator, group_offsets, size, dtype)


def _score_gradient_fake(
    gradient: Tensor,
    upstream: Tensor,
    denominator: Tensor,
    group_offsets: Tensor | None,
    size: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


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
    " ScalarType dtype, str backend) -> Tensor",
    _score_gradient,
    _score_gradient_fake,
)


class Call(NamedTuple):
    """A loss, ready to run on scores."""

    tensors: PairTensors | RankTensors
    options: PairOptions | RankOptions
    size: int  # scores per group, for an upstream gradient per group
    want_rewards: bool
    backend: str

    def run(self, scores: tuple[Tensor, ...], want_gradient: bool) -> PairResults | RankResults | list[Tensor]:
        """(loss, denominator, gradient, rewards): what was not asked for is None, or left out."""
        tensors, options = self.tensors, self.options
        constants = () if tensors is NO_PAIR_TENSORS else tensors
        if not unwatched(*scores, *constants):
            return self.forward(scores, want_gradient)
        if isinstance(tensors, PairTensors):
            second = scores[1] if len(scores) == 2 else None
            return _run_pairs(scores[0], second, tensors, options, want_gradient, self.want_rewards, self.backend)  # pyright: ignore[reportArgumentType]
        return _run_groups(scores[0], tensors, options, want_gradient, self.backend)  # pyright: ignore[reportArgumentType]

    def forward(self, scores: tuple[Tensor, ...], want_gradient: bool) -> list[Tensor]:
        """[loss, denominator, gradient and rewards if wanted] by the torch.library op."""
        wanted = (want_gradient, self.want_rewards, self.backend)
        if isinstance(self.tensors, PairTensors):
            first, second = scores if len(scores) == 2 else (scores[0], None)
            return torch.ops.pyalign.pair_loss(first, second, *self.tensors, *self.options, *wanted)
        return torch.ops.pyalign.ranked_loss(scores[0], *self.tensors, *self.options, want_gradient, self.backend)

    def group_offsets(self) -> Tensor | None:
        return self.tensors.group_offsets if isinstance(self.tensors, RankTensors) else None

    def gradients(
        self,
        gradient: Tensor,
        denominator: Tensor,
        group_offsets: Tensor | None,
        upstream: Tensor,
        scores: tuple[Tensor, ...],
    ) -> Sequence[Tensor]:
        """d result / d scores, times ``upstream``: () or, for "none", one per item or group."""
        groups = gradient.dim() == 1
        score_gradient = _score_gradient if unwatched(gradient, upstream) else torch.ops.pyalign.score_gradient
        result = score_gradient(
            gradient[None] if groups else gradient, upstream, denominator, group_offsets, self.size, scores[0].dtype,
            self.backend,
        )  # fmt: skip
        return [result.view(scores[0].shape)] if groups else result.unbind()

    def given(self) -> list[Tensor]:
        return [x for x in self.tensors if x is not None]

    def with_tensors(self, given: tuple[Tensor, ...]) -> Call:
        """This call with its tensors replaced by those that autograd passed on."""
        kept = iter(given)
        return self._replace(tensors=self.tensors._make([None if x is None else next(kept) for x in self.tensors]))


def _first_order(gradients: Sequence[Tensor], scores: tuple[Tensor, ...], upstream: Tensor) -> list[Any]:
    return [FirstOrderOnly.apply(gradient, x, upstream) for gradient, x in zip(gradients, scores, strict=True)]


class _ScoreLoss(torch.autograd.Function):
    """(loss, rewards if wanted), differentiable in the scores. The classic form: half the overhead of the other."""

    @staticmethod
    def forward(ctx: Any, call: Call, *scores: Tensor) -> Any:
        loss, denominator, gradient, *rewards = call.run(scores, True)
        ctx.call, ctx.scores = call, scores  # backward reads no score: they may change
        ctx.save_for_backward(gradient, denominator, call.group_offsets())
        ctx.set_materialize_grads(False)
        if not call.want_rewards:
            return loss
        ctx.mark_non_differentiable(*rewards)
        return loss, *rewards

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (1 + len(ctx.scores))
        gradient, denominator, group_offsets = ctx.saved_tensors
        scores = ctx.scores
        gradients = ctx.call.gradients(gradient, denominator, group_offsets, upstream, scores)
        if torch.is_grad_enabled():
            gradients = _first_order(gradients, scores, upstream)
        return None, *gradients


class _ScoreLossTraced(torch.autograd.Function):
    """(loss, denominator, gradient, rewards if wanted) for torch.compile and torch.func: no state but saved tensors."""

    @staticmethod
    def forward(call: Call, sides: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.with_tensors(tensors[sides:]).forward(tensors[:sides], True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, sides, *tensors = inputs
        ctx.sides, ctx.constants = sides, len(tensors) - sides
        scores, offsets = tensors[:sides], call.with_tensors(tuple(tensors[sides:])).group_offsets()
        ctx.packed = offsets is not None
        ctx.call = call._replace(tensors=PairTensors())  # backward has no use for them, and must not keep them alive
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*scores, output[2], output[1], *([offsets] if ctx.packed else []))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        group_offsets = saved.pop() if ctx.packed else None
        *scores, gradient, denominator = saved
        scores = tuple(scores)
        gradients = ctx.call.gradients(gradient, denominator, group_offsets, upstream, scores)
        return (None, None, *_first_order(gradients, scores, upstream), *(None for _ in range(ctx.constants)))


def loss(call: Call, *scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """The loss and, if wanted, rewards; with a graph if any of the scores needs one."""
    needs_gradient = torch.is_grad_enabled() and (scores[0].requires_grad or scores[-1].requires_grad)
    for x in scores:
        refuse_forward_mode(x)
    rewards: Any
    if not needs_gradient:
        results = call.run(tuple(x.detach() if x.requires_grad else x for x in scores), False)
        value, rewards = results[0], results[-1:]
    elif torch.compiler.is_compiling() or functorch_is_active():
        value, _, _, *rewards = _ScoreLossTraced.apply(call, len(scores), *scores, *call.given())
    else:
        results = _ScoreLoss.apply(call, *scores)
        value, *rewards = results if call.want_rewards else (results,)
    return value, rewards[0] if call.want_rewards else None
