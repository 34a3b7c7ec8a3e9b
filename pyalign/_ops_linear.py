"""The torch.library ops of losses straight from hidden states, and their autograd: one pair of Functions for all.

A raw op is opaque: the chunk loop of ``_linear`` runs inside, so torch.compile sees one node. Where the upstream
gradient will be one scalar ("mean", "sum") the forward pass, which holds the logits, also computes the gradients of
hidden states, weight and bias, already divided by the denominator; backward multiplies them by the upstream scalar on
the device. float16 and "none" compute the logits again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyalign import _linear, _tables
from pyalign._backends import engine as distill_engine
from pyalign._linear import Buffers, Layout, Products, Projection, Selection, Settings, Wanted, cut
from pyalign._ops import FirstOrderOnly, define, functorch_is_active, refuse_forward_mode
from pyalign._ops_logprob import engine
from pyalign._split import SplitEngine, saved_width
from pyalign._types import Options, Tokens, accumulation_dtype
from pyalign.reference import distill as _reference

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, float? softcap"
_TEACHER_HEAD = "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float? teacher_softcap"
_TEACHER_TOP_K = "Tensor logprobs, Tensor indices, Tensor? residual, str tail"
_TOKENS = (
    "Tensor? mask, Tensor? labels, Tensor? teacher_rows, Tensor? weights, Tensor? targets, Tensor? num_items, "
    "Tensor? upstream, int ignore_index, str reduction"
)
_OPTIONS = "int vocab, str divergence, float beta, float temperature, bool temperature_squared, float hard_weight"
_SETTINGS = (
    "int? workspace_bytes, int? num_valid, ScalarType? gemm_dtype, ScalarType logits_dtype, "
    "str? group, int[]? sizes, Tensor? saved"
)
_WANTED = "bool want_loss, bool want_hidden, bool want_weight, bool want_bias, bool want_extra, str backend"


# Row losses: what happens to a chunk of logits


def _chunk_tokens(tokens: Tokens, part: Selection, factor: Tensor) -> Tokens:
    """The tokens of a chunk, with d result / d loss of each as the upstream of a loss that isn't reduced."""
    count = part.end - part.begin
    upstream = factor.expand(count).contiguous() if factor.dim() == 0 else part.of(factor).contiguous()
    return Tokens(
        mask=part.mask,
        weight=part.maybe(tokens.weight),
        targets=part.maybe(tokens.targets),
        upstream=upstream,
        ignore_index=tokens.ignore_index,
        reduction="none",
    )


class _Distill(NamedTuple):
    """Divergence from a teacher's logits, which are projected chunk by chunk beside the student's."""

    engine: Any
    teacher: Products
    tokens: Tokens
    options: Options
    factor: Tensor  # d result / d loss of a token: () or (N,)
    want_metrics: bool

    def reserve(self, layout: Layout, gathers: bool) -> None:
        self.teacher.reserve(layout, gathers or self.tokens.teacher_rows is not None)

    def project(self, tokens: Selection, buffers: Buffers) -> Tensor:
        at, bad = tokens.maybe(self.tokens.teacher_rows), None
        if at is not None and tokens.mask is not None:  # on a GPU an out-of-range row gives NaN
            limit = self.teacher.hidden.shape[0]
            bad = (at < 0) | (at >= limit)
            at = at.clamp(0, limit - 1)
        rows = self.teacher.rows(tokens, buffers, at)
        if bad is not None:
            rows.masked_fill_(bad[:, None], torch.nan)
        return self.teacher.project(rows, buffers)

    def run(
        self, logits: Tensor, other: Tensor | None, tokens: Selection, gradient: Tensor | None, want_loss: bool
    ) -> tuple[Tensor | None, ...]:
        return self.engine.distill(
            logits, other, _chunk_tokens(self.tokens, tokens, self.factor), self.options,
            gradient=gradient, want_loss=want_loss, want_metrics=self.want_metrics,
        )  # fmt: skip


class _TopKDistill(NamedTuple):
    """Divergence from a teacher's stored entries, found by row in the kernel."""

    engine: Any
    teacher: tuple[Tensor, Tensor, Tensor | None, str]
    tokens: Tokens
    options: Options
    factor: Tensor
    want_metrics: bool

    def reserve(self, layout: Layout, gathers: bool) -> None:
        pass

    def project(self, tokens: Selection, buffers: Buffers) -> None:
        pass

    def run(
        self, logits: Tensor, other: Tensor | None, tokens: Selection, gradient: Tensor | None, want_loss: bool
    ) -> tuple[Tensor | None, ...]:
        at = tokens.maybe(self.tokens.teacher_rows)
        logprobs, indices, residual, tail = self.teacher
        if at is None and tokens.index is None:
            logprobs, indices, residual = tokens.of(logprobs), tokens.of(indices), tokens.maybe(residual)
        elif at is None:
            at = tokens.index
        each = _chunk_tokens(self.tokens, tokens, self.factor)._replace(teacher_rows=at)
        return self.engine.topk_distill(
            logits, logprobs, indices, residual, tail, each, self.options,
            gradient=gradient, want_loss=want_loss, want_metrics=self.want_metrics,
        )  # fmt: skip


class _CrossEntropy(NamedTuple):
    """Cross-entropy of targets, with label smoothing and a z-loss; the soft cap is the kernel's."""

    engine: Any
    targets: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    factor: Tensor  # d result / d loss of a token: () or (N,)

    def reserve(self, layout: Layout, gathers: bool) -> None:
        pass

    def project(self, tokens: Selection, buffers: Buffers) -> None:
        pass

    def run(
        self, logits: Tensor, other: Tensor | None, tokens: Selection, gradient: Tensor | None, want_loss: bool
    ) -> tuple[Tensor | None, ...]:
        per_token = self.factor.dim() == 1
        loss = self.engine.cross_entropy(
            logits, tokens.of(self.targets), self.ignore_index, self.label_smoothing, self.z_loss, self.softcap,
            None if per_token else self.factor, gradient,
        )  # fmt: skip
        if per_token and gradient is not None:  # not rounded yet
            gradient.mul_(tokens.of(self.factor)[:, None])
        return (loss,)


class _Logprob(NamedTuple):
    """Log-probs and entropies, or the gradient of both; the soft cap is the kernel's."""

    engine: Any
    targets: Tensor
    ignore_index: int
    temperature: float
    softcap: float | None
    upstreams: tuple[Tensor | None, Tensor | None]  # (N,) of the log-probs and of the entropies
    want_entropy: bool

    def reserve(self, layout: Layout, gathers: bool) -> None:
        pass

    def project(self, tokens: Selection, buffers: Buffers) -> None:
        pass

    def run(
        self, logits: Tensor, other: Tensor | None, tokens: Selection, gradient: Tensor | None, want_loss: bool
    ) -> tuple[Tensor | None, ...]:
        options = (self.ignore_index, self.temperature, self.softcap)
        targets = tokens.of(self.targets)
        if gradient is None:
            logprob, entropy, _ = self.engine.logprob(logits, targets, *options, self.want_entropy, False)
            return logprob, entropy
        upstreams = [tokens.maybe(x) for x in self.upstreams]
        self.engine.logprob_gradient(logits, targets, *options, None, *upstreams, gradient)
        return None, None


# Raw ops: (hidden, weight, bias, softcap, *what the loss needs, *settings, want_loss, want_hidden, want_weight,
# want_bias, want_extra, backend). They return what was asked for, of [loss, d hidden, d weight, d bias, *extra].


def _is_anything_skipped(tokens: Tokens) -> bool:
    return any(x is not None for x in (tokens.mask, tokens.labels, tokens.teacher_rows))


def _denominator(tokens: Tokens, counted: Tensor | None, hidden: Tensor) -> Tensor | None:
    """() what the mean divides by; None for the other reductions."""
    if tokens.reduction != "mean":
        return None
    if tokens.num_items is not None:
        return tokens.num_items
    dtype = accumulation_dtype(hidden.dtype)
    if counted is None:
        return torch.full((), hidden.shape[0], dtype=dtype, device=hidden.device)
    return counted.sum().to(dtype)


def _factor(upstream: Tensor | None, denominator: Tensor | None, hidden: Tensor) -> Tensor:
    """d result / d loss of a token, before its weight: () or, for "none", (N,)."""
    factor = torch.ones((), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    if denominator is not None:
        factor = torch.where(denominator == 0, 0.0, 1.0 / denominator)
    return factor if upstream is None else factor * upstream


def _reduce(row_loss: Tensor, reduction: str, denominator: Tensor | None) -> Tensor:
    """Summed in the tokens' order, whatever the chunks were."""
    if reduction == "none":
        return row_loss
    total = row_loss.sum(dtype=torch.float64 if row_loss.device.type == "cpu" else row_loss.dtype)
    if denominator is not None:
        total = torch.where(denominator == 0, 0.0, total / denominator)
    return total.to(row_loss.dtype)


def _check_indices(tokens: Tokens, counted: Tensor | None, options: Options, teacher_count: int) -> None:
    """On a CPU an out-of-range teacher row or target raises, under its number among all tokens."""
    given = next((x for x in (tokens.teacher_rows, tokens.targets) if x is not None), None)
    if given is None or given.device.type != "cpu":
        return
    if tokens.teacher_rows is not None:
        assert counted is not None
        _reference.checked_index("teacher_rows", tokens.teacher_rows, teacher_count, counted)
    if tokens.targets is not None:
        relevant = tokens.targets != tokens.ignore_index
        relevant = relevant if counted is None else relevant & counted
        _reference.checked_index("targets", tokens.targets, options.vocab, relevant)


def _check_entries(indices: Tensor, tokens: Tokens, counted: Tensor | None, vocab: int) -> None:
    """On a CPU an entry that is out of range, or there twice, raises."""
    if indices.device.type != "cpu":
        return
    if tokens.teacher_rows is not None:
        indices = indices[tokens.teacher_rows.clamp(min=0)] if indices.shape[0] else indices[:0]
    present = indices != -1
    if counted is not None and indices.shape[0]:
        present = present & counted[:, None]
    index, _ = _reference.checked_index("teacher.indices", indices.long(), vocab, present)
    _reference.duplicates(index, present, vocab)


def _widen(backend: str) -> _linear.Widen | None:
    return distill_engine(backend).widen if backend == "cpu" else None


class _Parsed(NamedTuple):
    head: Projection
    loss: tuple[Any, ...]
    settings: Settings
    wanted: Wanted
    want_extra: bool
    backend: str

    def record(self, width: int) -> Tensor | None:
        """Where a forward pass over a vocabulary that is split leaves what its gradient will need."""
        if self.settings.group is None or not self.wanted.loss:
            return None
        hidden = self.head.hidden
        return hidden.new_zeros((hidden.shape[0], width), dtype=torch.float64)

    def engine(self, whole: Callable[[str], Any], record: Tensor | None) -> Any:
        """The backend's, or over rows that are split the one that asks the other ranks."""
        shards = self.settings.shards
        if shards is None:
            return whole(self.backend)
        return SplitEngine(self.backend, shards, record=record, saved=self.settings.saved)

    def cut(self, vocab: int) -> int:
        """Of the first ``vocab`` entries those of this rank."""
        shards = self.settings.shards
        return vocab if shards is None else shards.cut(vocab).sizes[shards.rank]

    def overlaps(self, op: str, divergence: str = "") -> bool:
        """Whether row losses run beside products: on GPUs where that was measured, with logits of 32 bits."""
        hidden, settings = self.head.hidden, self.settings
        if self.backend != "cuda" or settings.group is not None or settings.logits_dtype != torch.float32:
            return False
        tokens, width = hidden.shape
        tokens = tokens if settings.num_valid is None else min(tokens, settings.num_valid)
        dtype, vocab = settings.gemm_dtype or hidden.dtype, self.head.weight.shape[0]
        return _tables.overlaps(op, hidden.device, dtype, divergence, tokens, width, vocab)

    def vocab(self) -> int:
        shards = self.settings.shards
        return self.head.weight.shape[0] if shards is None else shards.vocab


def _parse(arguments: tuple[Any, ...]) -> _Parsed:
    head, rest = Projection(*arguments[:4]), arguments[4:]
    *loss, want_extra, backend = rest
    loss, wanted = loss[: -len(Wanted._fields)], Wanted(*loss[-len(Wanted._fields) :])
    loss, settings = loss[: -len(Settings._fields)], Settings(*loss[-len(Settings._fields) :])
    return _Parsed(head, tuple(loss), settings, wanted, want_extra, backend)


def _outputs(
    parsed: _Parsed, loss: Tensor | None, outcome: _linear.Outcome, extras: list[Tensor], record: Tensor | None
) -> list[Tensor]:
    head = parsed.head
    gradients = (
        outcome.hidden,
        _linear.finish_gradient(outcome.weight, head.weight),
        None if head.bias is None else _linear.finish_gradient(outcome.bias, head.bias),
    )
    return [x for x in (loss, *gradients, *extras, record) if x is not None]


def _fake_gradients(parsed: _Parsed) -> list[Tensor]:
    operands = zip(parsed.head[:3], parsed.wanted[1:], strict=True)
    return [x.new_empty(x.shape) for x, wanted in operands if wanted and x is not None]


def _distillation_width(parsed: _Parsed, top_k: bool) -> int:
    """Numbers per token in ``record``."""
    hard_weight = parsed.loss[-1]
    return saved_width("topk_distill", parsed.loss[1].shape[-1], hard_weight > 0) if top_k else saved_width("distill")


def _distillation(arguments: tuple[Any, ...], top_k: bool) -> list[Tensor]:
    parsed = _parse(arguments)
    head, teacher, rest = parsed.head, parsed.loss[:4], parsed.loss[4:]
    tokens, options = Tokens(*rest[: len(Tokens._fields)]), Options(*rest[len(Tokens._fields) :])
    hidden, count = head.hidden, head.hidden.shape[0]
    counted = None
    if _is_anything_skipped(tokens):
        counted = _reference.counted_tokens(tokens, count, hidden.device)
    denominator = _denominator(tokens, counted, hidden)
    factor = _factor(tokens.upstream, denominator, hidden)
    _check_indices(tokens, counted, options, teacher[0].shape[0])
    record = parsed.record(_distillation_width(parsed, top_k))
    engine = parsed.engine(distill_engine, record)
    loss: _Distill | _TopKDistill
    shared = (tokens, options, factor, parsed.want_extra)
    if top_k:
        logprobs, indices, residual, tail = teacher
        _check_entries(indices, tokens, counted, options.vocab)
        residual = None if residual is None else residual.contiguous()
        stored = (logprobs.contiguous(), indices.contiguous(), residual, tail)
        loss = _TopKDistill(engine, stored, *shared)
    else:
        side = cut(Projection(*teacher), parsed.cut(options.vocab))
        if side.hidden.shape[0] == 0:  # no row can be matched
            side = side._replace(hidden=side.hidden.new_zeros(1, side.hidden.shape[1]))
        loss = _Distill(
            engine,
            Products(side, parsed.settings, "teacher_", None, _widen(parsed.backend)),
            *shared,
        )
    dtype = accumulation_dtype(parsed.settings.logits_dtype)
    outcome = _linear.run(
        cut(head, parsed.cut(options.vocab)),
        loss,
        counted,
        parsed.settings,
        parsed.wanted,
        [dtype, dtype, torch.bool],
        _widen(parsed.backend),
        overlap=parsed.overlaps("linear_topk_distill" if top_k else "linear_distill", options.divergence),
    )
    row_loss, entropy, agreement = outcome.results
    total = _reduce(row_loss, tokens.reduction, denominator) if parsed.wanted.loss else None
    return _outputs(parsed, total, outcome, [entropy, agreement] if parsed.want_extra else [], record)


def _distillation_fake(arguments: tuple[Any, ...], top_k: bool) -> list[Tensor]:
    parsed = _parse(arguments)
    hidden, dtype = parsed.head.hidden, accumulation_dtype(parsed.settings.logits_dtype)
    reduction = parsed.loss[4 + len(Tokens._fields) - 1]
    count = hidden.shape[0]
    results = [hidden.new_empty((count,) if reduction == "none" else (), dtype=dtype)] if parsed.wanted.loss else []
    results += _fake_gradients(parsed)
    if parsed.want_extra:
        results += [hidden.new_empty(count, dtype=dtype), hidden.new_empty(count, dtype=torch.bool)]
    return results + _fake_record(parsed, _distillation_width(parsed, top_k))


def _fake_record(parsed: _Parsed, width: int) -> list[Tensor]:
    record = parsed.record(width)
    return [] if record is None else [record]


def _cross_entropy(arguments: tuple[Any, ...]) -> list[Tensor]:
    parsed = _parse(arguments)
    head = parsed.head
    targets, num_items, upstream, ignore_index, label_smoothing, z_loss, reduction = parsed.loss
    counted = targets != ignore_index
    if targets.device.type == "cpu":
        _reference.checked_index("targets", targets, parsed.vocab(), counted)
    denominator = _denominator(Tokens(num_items=num_items, reduction=reduction), counted, head.hidden)
    factor = _factor(upstream, denominator, head.hidden)
    record = parsed.record(saved_width("logprob"))
    rows = parsed.engine(engine, record)
    loss = _CrossEntropy(rows, targets, ignore_index, label_smoothing, z_loss, head.softcap, factor)
    dtype = accumulation_dtype(parsed.settings.logits_dtype)
    bare = head._replace(softcap=None)
    outcome = _linear.run(
        bare, loss, counted, parsed.settings, parsed.wanted, [dtype], _widen(parsed.backend),
        rounds=factor.dim() == 0, overlap=parsed.overlaps("linear_cross_entropy"),
    )  # fmt: skip
    total = _reduce(outcome.results[0], reduction, denominator) if parsed.wanted.loss else None
    return _outputs(parsed, total, outcome, [], record)


def _cross_entropy_fake(arguments: tuple[Any, ...]) -> list[Tensor]:
    parsed = _parse(arguments)
    hidden, dtype = parsed.head.hidden, accumulation_dtype(parsed.settings.logits_dtype)
    shape = (hidden.shape[0],) if parsed.loss[-1] == "none" else ()
    loss = [hidden.new_empty(shape, dtype=dtype)] if parsed.wanted.loss else []
    return loss + _fake_gradients(parsed) + _fake_record(parsed, saved_width("logprob"))


def _logprobs(arguments: tuple[Any, ...]) -> list[Tensor]:
    parsed = _parse(arguments)
    head = parsed.head
    targets, upstream_logprob, upstream_entropy, ignore_index, temperature = parsed.loss
    counted = targets != ignore_index
    if targets.device.type == "cpu":
        _reference.checked_index("targets", targets, parsed.vocab(), counted)
    upstreams = (upstream_logprob, upstream_entropy)
    record = parsed.record(saved_width("logprob"))
    rows = parsed.engine(engine, record)
    loss = _Logprob(rows, targets, ignore_index, temperature, head.softcap, upstreams, parsed.want_extra)
    dtype = accumulation_dtype(parsed.settings.logits_dtype)
    bare = head._replace(softcap=None)
    outcome = _linear.run(
        bare, loss, counted, parsed.settings, parsed.wanted, [dtype, dtype], _widen(parsed.backend),
        overlap=parsed.overlaps("linear_logprob"),
    )  # fmt: skip
    logprob, entropy = outcome.results
    extra = [entropy] if parsed.want_extra else []
    return _outputs(parsed, logprob if parsed.wanted.loss else None, outcome, extra, record)


def _logprobs_fake(arguments: tuple[Any, ...]) -> list[Tensor]:
    parsed = _parse(arguments)
    hidden, dtype = parsed.head.hidden, accumulation_dtype(parsed.settings.logits_dtype)
    logprob, entropy = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
    loss = [logprob] if parsed.wanted.loss else []
    extra = [entropy] if parsed.want_extra else []
    return loss + _fake_gradients(parsed) + extra + _fake_record(parsed, saved_width("logprob"))


_Body = Callable[[tuple[Any, ...]], list[Tensor]]


def _define(signature: str, body: _Body, fake: _Body) -> None:
    """Defines a raw op. No autocast and no graph inside: it decides its dtypes, and has its own derivative."""

    def run(*arguments: Any) -> list[Tensor]:
        detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        with torch.autocast(arguments[0].device.type, enabled=False), torch.no_grad():
            return body(detached)

    define(signature, run, lambda *arguments: fake(arguments))


_define(
    f"linear_distill({_HEAD}, {_TEACHER_HEAD}, {_TOKENS}, {_OPTIONS}, {_SETTINGS}, {_WANTED}) -> Tensor[]",
    lambda arguments: _distillation(arguments, top_k=False),
    lambda arguments: _distillation_fake(arguments, top_k=False),
)
_define(
    f"linear_topk_distill({_HEAD}, {_TEACHER_TOP_K}, {_TOKENS}, {_OPTIONS}, {_SETTINGS}, {_WANTED}) -> Tensor[]",
    lambda arguments: _distillation(arguments, top_k=True),
    lambda arguments: _distillation_fake(arguments, top_k=True),
)
_define(
    f"linear_cross_entropy({_HEAD}, Tensor targets, Tensor? num_items, Tensor? upstream, int ignore_index, "
    f"float label_smoothing, float z_loss, str reduction, {_SETTINGS}, {_WANTED}) -> Tensor[]",
    _cross_entropy,
    _cross_entropy_fake,
)
_define(
    f"linear_logprob({_HEAD}, Tensor targets, Tensor? upstream_logprob, Tensor? upstream_entropy, int ignore_index, "
    f"float temperature, {_SETTINGS}, {_WANTED}) -> Tensor[]",
    _logprobs,
    _logprobs_fake,
)


# Autograd


class Call(NamedTuple):
    """A loss, ready to run on hidden states, weight and bias; ``arguments`` are the raw op's from the softcap to the
    settings."""

    name: str
    arguments: tuple[Any, ...]
    upstreams: tuple[int, ...]  # places in ``arguments`` of the upstream gradients of what is differentiable
    stores: bool  # the gradients are computed in the forward pass
    want_extra: bool
    backend: str

    def _op(self, operands: tuple[Tensor | None, ...], arguments: tuple[Any, ...], *wanted: bool) -> list[Tensor]:
        op = getattr(torch.ops.pyalign, self.name)
        return op(*operands, *arguments, *wanted, self.backend)

    @property
    def split(self) -> bool:
        """Whether a forward pass returns, last, what the gradients need of the other ranks."""
        return self.arguments[-3] is not None

    def with_record(self, record: Tensor) -> Call:
        return self._replace(arguments=(*self.arguments[:-1], record))

    def forward(self, operands: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> list[Tensor]:
        """[loss, *gradients of what needs one, *extra, *record if split]"""
        return self._op(operands, self.arguments, True, *needs, self.want_extra)

    def gradients(
        self, operands: tuple[Tensor | None, ...], needs: tuple[bool, ...], upstreams: tuple[Tensor | None, ...]
    ) -> list[Tensor]:
        """d result / d operand, times the upstreams, of the operands that need it."""
        arguments, hidden = list(self.arguments), operands[0]
        assert hidden is not None
        for place, upstream in zip(self.upstreams, upstreams, strict=True):
            dtype = accumulation_dtype(hidden.dtype)
            arguments[place] = None if upstream is None else upstream.to(dtype).contiguous()
        return self._op(operands, tuple(arguments), False, *needs, False)

    def tensors(self) -> list[Tensor]:
        return [x for x in self.arguments if isinstance(x, Tensor)]

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Call:
        """This call with its tensors replaced by those that autograd kept (and whose versions it checked)."""
        kept = iter(tensors)
        return self._replace(arguments=tuple(next(kept) if isinstance(x, Tensor) else x for x in self.arguments))


def _in_place_of(gradients: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    given = iter(gradients)
    return [next(given) if needed else None for needed in needs]


def _first_order(
    gradients: list[Tensor], operands: tuple[Tensor | None, ...], needs: tuple[bool, ...], upstream: Tensor
) -> list[Any]:
    wanted = [x for x, needed in zip(operands, needs, strict=True) if needed]
    return [FirstOrderOnly.apply(gradient, x, upstream) for gradient, x in zip(gradients, wanted, strict=True)]


class _LinearLoss(torch.autograd.Function):
    """(loss, *extra), differentiable in hidden states, weight and bias. The classic form."""

    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Tensor | None) -> Any:
        ctx.needs, ctx.gradients = ctx.needs_input_grad[1:], None
        stored = ctx.needs if call.stores else (False, False, False)
        loss, *rest = call.forward(operands, stored)
        if call.split:
            call = call.with_record(rest.pop())
        ctx.call = call
        ctx.save_for_backward(*operands, *call.tensors())
        ctx.set_materialize_grads(False)
        ctx.outputs = len(call.upstreams)
        if call.stores:
            ctx.gradients, rest = rest[: sum(ctx.needs)], rest[sum(ctx.needs) :]
        if not rest:
            return loss
        if ctx.outputs == 1:
            ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstreams = upstreams[: ctx.outputs]
        upstream = next((x for x in upstreams if x is not None), None)
        if upstream is None:
            return None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            for gradient in gradients:
                torch.ops.pyalign.scale_(gradient, upstream, ctx.call.backend)
        else:
            hidden, weight, bias, *tensors = ctx.saved_tensors
            call = ctx.call.with_tensors(tuple(tensors))
            gradients = call.gradients((hidden, weight, bias), ctx.needs, upstreams)
        if torch.is_grad_enabled():
            gradients = _first_order(gradients, ctx.saved_tensors[:3], ctx.needs, upstream)
        return None, *_in_place_of(gradients, ctx.needs)


class _LinearLossTraced(torch.autograd.Function):
    """(loss, *gradients if stored, *extra) for torch.compile and torch.func: no state but the saved tensors."""

    @staticmethod
    def forward(
        call: Call, needs: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        stored = needs if call.stores else (False, False, False)
        return tuple(call.with_tensors(tensors).forward((hidden, weight, bias), stored))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, needs, hidden, weight, bias, *tensors = inputs
        if call.split:
            call, tensors = call.with_record(output[-1]), [*tensors, output[-1]]
        ctx.places = tuple(i for i, x in enumerate(call.arguments) if isinstance(x, Tensor))
        ctx.call = call._replace(arguments=tuple(None if isinstance(x, Tensor) else x for x in call.arguments))
        ctx.needs, ctx.has_bias, ctx.constants, ctx.inputs = needs, bias is not None, len(tensors), len(inputs)
        ctx.mark_non_differentiable(*output[len(call.upstreams) :])
        stored = output[1 : 1 + sum(needs)] if call.stores else ()
        operands = (hidden, weight) if bias is None else (hidden, weight, bias)
        ctx.save_for_backward(*operands, *tensors, *stored)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        call: Call = ctx.call
        operands = (saved.pop(0), saved.pop(0), saved.pop(0) if ctx.has_bias else None)
        tensors, stored = saved[: ctx.constants], saved[ctx.constants :]
        upstreams = upstreams[: len(call.upstreams)]
        if call.stores:
            dtype = accumulation_dtype(operands[0].dtype)
            gradients = [(x.to(dtype) * upstreams[0].to(dtype)).to(x.dtype) for x in stored]
        else:
            arguments = list(call.arguments)
            for place, tensor in zip(ctx.places, tensors, strict=True):
                arguments[place] = tensor
            gradients = call._replace(arguments=tuple(arguments)).gradients(operands, ctx.needs, upstreams)
        gradients = _first_order(gradients, operands, ctx.needs, upstreams[0])
        return (None, None, *_in_place_of(gradients, ctx.needs), *[None] * (ctx.inputs - 5))


def loss(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Runs a loss, with a graph if an operand needs one: (loss, *extra)."""
    operands = (hidden, weight, bias)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands)
    for x in operands:
        if x is not None:
            refuse_forward_mode(x)
    if not any(needs):
        results = call.forward(operands, (False, False, False))
        return tuple(results[:-1] if call.split else results)
    if torch.compiler.is_compiling() or functorch_is_active():
        value, *rest = _LinearLossTraced.apply(call, needs, hidden, weight, bias, *call.tensors())
        if call.split:
            rest.pop()
        return value, *(rest[sum(needs) :] if call.stores else rest)
    results = _LinearLoss.apply(call, *operands)
    return results if call.want_extra else (results,)


# Places in Call.arguments, which begin with the softcap, of upstream gradients.
DISTILL_UPSTREAMS = (1 + 4 + Tokens._fields.index("upstream"),)
CROSS_ENTROPY_UPSTREAMS = (3,)
LOGPROB_UPSTREAMS = (2,)
LOGPROB_AND_ENTROPY_UPSTREAMS = (2, 3)
