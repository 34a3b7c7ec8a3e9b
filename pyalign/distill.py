"""Distillation from logits: divergences between a teacher's and a student's distribution over the vocabulary.

Context distillation and the 51-category loss follow Askell et al. 2021 (arXiv 2112.00861), section 2.4; the rest is
Hinton et al. 2015 (arXiv 1503.02531) and generalised knowledge distillation, Agarwal et al. 2023 (arXiv 2306.13649).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pyalign import _checks, _ops, _ops_linear, _ops_split, _shards, _vocabulary
from pyalign._backends import TRITON_TOPK_VOCAB, choose_name
from pyalign._collator import ContextDistillationCollator
from pyalign._linear import Projection, Settings
from pyalign._types import DIVERGENCES, TAILS, Options, Results, Tokens, accumulation_dtype
from pyalign.reference import distill as _reference
from pyalign.reference import linear as _linear_reference

__all__ = [
    "ContextDistillationCollator",
    "DistillationMetrics",
    "TopKLogprobs",
    "distillation_loss",
    "linear_distillation_loss",
    "linear_topk_distillation_loss",
    "topk_distillation_loss",
    "topk_logprobs",
]


class DistillationMetrics(NamedTuple):
    """Per-token figures from the pass that computed the loss, detached; 0 and False at tokens that don't count."""

    entropy: Tensor
    """(...) entropy in nats of softmax(student / T), accumulation dtype."""
    agreement: Tensor
    """(...) bool, whether teacher and student have the same most likely entry (the first of equals)."""


class TopKLogprobs(NamedTuple):
    """A teacher's distribution as its k largest log-probabilities per token and the log of all the rest.

    ``logprobs`` (..., k), any floating dtype, natural logs; ``indices`` (..., k), int32 or int64, where -1 (with
    log-prob -inf) marks a missing entry; ``residual`` (...), the log of the mass outside the k entries, or None for
    ``log(1 - sum exp(logprobs))``, and for no mass at all where the entries are the whole vocabulary; ``temperature``,
    at which the log-probs were taken.
    """

    logprobs: Tensor
    indices: Tensor
    residual: Tensor | None = None
    temperature: float = 1.0


def _options(
    vocab: int, divergence: str, beta: float, temperature: float, temperature_squared: bool, hard_weight: float
) -> Options:
    _checks.one_of("divergence", divergence, DIVERGENCES)
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        _checks.refuse("beta", beta, "0 < beta < 1 (at 0 and 1 the divergence is 0: use forward_kl or reverse_kl)")
    return Options(vocab, divergence, float(beta), temperature, bool(temperature_squared), float(hard_weight))


def _used_vocabulary(
    vocab_size: int | None, student: Tensor, teacher_width: int | None, shards: _shards.Shards | None
) -> int:
    width = student.shape[-1]
    if shards is not None:
        if teacher_width is not None and teacher_width != width:
            _checks.refuse("teacher_logits", f"a slice of {teacher_width}", f"the student's {width} entries")
        return _vocabulary.limit(shards, vocab_size)
    if vocab_size is None:
        if teacher_width is not None and teacher_width != width:
            _checks.refuse(
                "teacher_logits", f"a vocabulary of {teacher_width}", f"the student's {width}, or vocab_size= for both"
            )
        if width == 0:
            _checks.refuse("student_logits", f"shape {tuple(student.shape)}", "a vocabulary of at least 1")
        return width
    limit = width if teacher_width is None else min(width, teacher_width)
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= limit:
        _checks.refuse("vocab_size", repr(vocab_size), f"an int with 0 < vocab_size <= {limit}, the smaller logits")
    return vocab_size


def _run(
    raw: _ops.RawLoss, student: Tensor, teacher: tuple[Any, ...], tokens: Tokens, options: Options,
    inplace: bool, return_metrics: bool, shards: _shards.Shards | None,
) -> Any:  # fmt: skip
    """Dispatches a loss to its backend and gives the results their shapes."""
    backend = choose_name(student.device, student.dtype, split=shards is not None)
    if shards is not None and inplace:
        raise ValueError("inplace: not available with process_group, whose gradients the backward pass computes")
    if shards is not None and backend == "reference":
        student = _shards.whole_vocabulary(student, shards)
        if raw is _ops.DISTILL:
            teacher = (_shards.whole_vocabulary(teacher[0], shards),)
        shards = None
    if shards is not None:
        results = _ops_split.loss(raw.name, student, teacher, tokens, options, return_metrics, shards, backend)
    elif backend == "reference":
        if inplace:
            raise ValueError("inplace: the reference backend computes no gradient in place; wanted a kernel backend")
        function = getattr(_reference, raw.name)
        results = function(student, *teacher, tokens, options, want_metrics=return_metrics)
    else:
        call = _ops.Call(raw, (*teacher, *tokens, *options), tokens.reduction, return_metrics, backend)
        results = _ops.loss(call, student, inplace)
    shape = student.shape[:-1]
    results: Results
    assert results.loss is not None
    loss = results.loss if tokens.reduction != "none" or len(shape) == 1 else results.loss.view(shape)
    if not return_metrics:
        return loss
    assert results.entropy is not None
    assert results.agreement is not None
    return loss, DistillationMetrics(results.entropy.view(shape), results.agreement.view(shape))


@overload
def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, return_metrics: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, return_metrics: Literal[True], **options: Any
) -> tuple[Tensor, DistillationMetrics]: ...
def distillation_loss(  # pyright: ignore[reportInconsistentOverload]  # **options stands for the list below
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    teacher_rows: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    targets: Tensor | None = None,
    hard_weight: float = 0.0,
    inplace: bool = False,
    return_metrics: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, DistillationMetrics]:
    """Divergence between the teacher's and the student's distribution over the vocabulary, per token.

    With p = softmax(teacher / T), q = softmax(student / T):

    - ``"forward_kl"``: KL(p || q) = sum p (log p - log q)
    - ``"reverse_kl"``: KL(q || p) = sum q (log q - log p)
    - ``"jsd"``: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    - ``"tvd"``: 1/2 sum abs(p - q)

    The gradient goes to the student alone; the teacher is a constant. Loss and gradient take one read of each logits
    row. There is no label shift: position i of the student is matched with position i of the teacher.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64.
        teacher_logits: (..., V) with the same leading shape (any, with ``teacher_rows``); may differ in dtype.
        mask: (...) bool or integer; a token counts where it is nonzero.
        labels: (...) integer; only a mask: a token counts where it differs from ``ignore_index``.
        ignore_index: the label of tokens that don't count; as a target: of tokens without a hard term.
        teacher_rows: (...) integer, for each student token the row of ``teacher_logits.flatten(0, -2)`` it is matched
            with; -1 for none, and the token doesn't count. Rows are followed in the kernel, not gathered.
        weight: (...) floating, multiplies each token's loss; not part of the denominator.
        temperature: T > 0.
        divergence, beta: see above; 0 < beta < 1.
        temperature_squared: multiply the divergence (and its gradient) by T^2, Hinton's scaling. Not the hard term.
        vocab_size: use the first entries of both sides alone (padded heads); the gradient beyond is 0.
        num_items: int or 0-dim tensor that replaces the number of counted tokens as the denominator of "mean".
        reduction: "mean" over counted tokens (the mean of nothing is a differentiable 0), "sum", or "none": (...),
            0 at tokens that don't count.
        targets, hard_weight: with h = hard_weight in [0, 1] the loss of a token is
            (1 - h) * divergence + h * cross_entropy(student at temperature 1, target), from the same read.
        inplace: write the gradient over the student's logits, which saves their size in memory. The logits' version
            is bumped, so another consumer of them gets torch's error; a second backward raises. Needs "mean" or
            "sum", logits that are no leaf, a dtype other than float16, and no process_group.
        return_metrics: also return :class:`DistillationMetrics`.
        process_group: the vocabulary is split over the ranks of this group, each of which gives its slice of both
            sides' logits, the same entries of both, in the order of the ranks: a ``torch.distributed`` process group, a
            1-D DeviceMesh, or :class:`pyalign.distributed.VocabularyShards`. All else is the same on all ranks; targets
            and ``vocab_size`` are of the whole vocabulary. The loss is the same on all ranks, the gradient is that of
            the rank's slice, and needs no factor. Forward takes one collective of 6 to 10 numbers per token (JSD and
            TVD two), backward none. DTensors that are sharded over the vocabulary need no process_group.

    Returns:
        The loss, float32 (float64 for float64 logits): () or, for "none", (...); with ``return_metrics`` a pair.

    Entries that are -inf on both sides contribute nothing. p > 0 where q = 0 makes a forward KL +inf with the gradient
    q - p; an infinite reverse KL has a NaN gradient. A row that is all -inf, or holds +inf or NaN, gives NaN for that
    row alone. An out-of-range target or teacher row raises on the CPU and gives NaN for its row on a GPU.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    student_logits, shards = _vocabulary.local("student_logits", student_logits, process_group)
    teacher_logits = _vocabulary.like("teacher_logits", teacher_logits, shards, "student_logits")
    if shards is not None:
        mask, labels, teacher_rows, weight, targets, num_items = _vocabulary.constants(
            mask=mask, labels=labels, teacher_rows=teacher_rows, weight=weight, targets=targets, num_items=num_items
        )
    _checks.floating("teacher_logits", teacher_logits, 1)
    _checks.same_device("teacher_logits", teacher_logits, student_logits)
    if teacher_rows is None and teacher_logits.shape[:-1] != student_logits.shape[:-1]:
        _checks.refuse(
            "teacher_logits",
            f"leading shape {tuple(teacher_logits.shape[:-1])}",
            f"the student's {tuple(student_logits.shape[:-1])}, or teacher_rows= to match them",
        )
    vocab = _used_vocabulary(vocab_size, student_logits, teacher_logits.shape[-1], shards)
    tokens = _checks.tokens(
        student_logits, mask=mask, labels=labels, ignore_index=ignore_index, teacher_rows=teacher_rows, weight=weight,
        targets=targets, hard_weight=hard_weight, num_items=num_items, reduction=reduction,
    )  # fmt: skip
    temperature = _checks.temperature("temperature", temperature)
    options = _options(vocab, divergence, beta, temperature, temperature_squared, hard_weight)
    teacher = teacher_logits.detach()
    if (student_logits.dtype == torch.float64) != (teacher.dtype == torch.float64):
        teacher = teacher.to(accumulation_dtype(student_logits.dtype))
    return _run(_ops.DISTILL, student_logits, (teacher,), tokens, options, inplace, return_metrics, shards)


def topk_logprobs(logits: Tensor, k: int = 50, *, temperature: float = 1.0, process_group: Any = None) -> TopKLogprobs:
    """The k largest log-probabilities of softmax(logits / T) per row, and the log of the mass outside them.

    ``residual = logsumexp(logits outside / T) - logsumexp(logits / T)``, summed over the entries outside and not taken
    as 1 minus a sum, so that it is exact however peaked the distribution is.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. The result is detached from them.
        k: 1 <= k <= V.
        temperature: T > 0.
        process_group: as in :func:`distillation_loss`; every rank gets the entries of all, by their number in the whole
            vocabulary.

    Returns:
        :class:`TopKLogprobs` with float32 (float64 for float64) log-probs (..., k), largest first, equals by lowest
        index; int64 indices (..., k); residual (...), -inf for k = V. A row with NaN or +inf gives NaN log-probs.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or value.
    """
    logits, shards = _vocabulary.local("logits", logits, process_group)
    vocab = logits.shape[-1] if shards is None else shards.vocab
    if not isinstance(k, int) or not 0 < k <= vocab:
        _checks.refuse("k", repr(k), f"an int with 0 < k <= {vocab}, the vocabulary")
    temperature = _checks.temperature("temperature", temperature)
    logits = logits.detach()
    wide = True if logits.shape[-1] > TRITON_TOPK_VOCAB else False  # noqa: SIM210  # a constant of a compiled graph
    backend = choose_name(logits.device, logits.dtype, k, wide, shards is not None)
    if shards is not None and backend == "reference":
        logits, shards = _shards.whole_vocabulary(logits, shards), None
    if shards is not None:
        logprobs, indices, residual = _ops_split.topk(logits, k, temperature, shards, backend)
    elif backend == "reference":
        logprobs, indices, residual = _reference.topk(logits, k, temperature)
    else:
        logprobs, indices, residual = torch.ops.pyalign.topk(logits, k, temperature, backend)
    shape = logits.shape[:-1]
    return TopKLogprobs(logprobs.view(*shape, k), indices.view(*shape, k), residual.view(shape), temperature)


def _check_teacher(teacher: TopKLogprobs, student: Tensor, by_row: bool) -> None:
    logprobs, indices, residual, _ = teacher
    _checks.floating("teacher.logprobs", logprobs, 1)
    if indices.dtype not in (torch.int32, torch.int64):
        _checks.refuse("teacher.indices", indices.dtype, "int32 or int64", TypeError)
    if indices.shape != logprobs.shape or indices.shape[-1] == 0:
        wanted = f"that of teacher.logprobs, {tuple(logprobs.shape)}, with k > 0"
        _checks.refuse("teacher.indices", f"shape {tuple(indices.shape)}", wanted)
    if not by_row and logprobs.shape[:-1] != student.shape[:-1]:
        _checks.refuse(
            "teacher.logprobs",
            f"leading shape {tuple(logprobs.shape[:-1])}",
            f"the student's {tuple(student.shape[:-1])}, or teacher_rows= to match them",
        )
    if residual is not None:
        _checks.floating("teacher.residual", residual, 0)
        if residual.shape != logprobs.shape[:-1]:
            _checks.refuse("teacher.residual", f"shape {tuple(residual.shape)}", f"{tuple(logprobs.shape[:-1])}")
        _checks.same_device("teacher.residual", residual, student)
    _checks.same_device("teacher.logprobs", logprobs, student)
    _checks.same_device("teacher.indices", indices, student)


def _check_stored(teacher: TopKLogprobs, tail: str, student: Tensor, by_row: bool, temperature: float | None) -> float:
    """Checks a stored teacher of ``student`` (..., V or H); returns its temperature."""
    _checks.one_of("tail", tail, TAILS)
    if not isinstance(teacher, TopKLogprobs):
        _checks.refuse("teacher", type(teacher).__name__, "a TopKLogprobs", TypeError)
    _check_teacher(teacher, student, by_row)
    stored = _checks.temperature("teacher.temperature", teacher.temperature)
    if temperature is not None and not math.isclose(temperature, stored, rel_tol=1e-6):
        _checks.refuse("temperature", temperature, f"the teacher's stored {stored}: its tail can't be re-tempered")
    return stored


@overload
def topk_distillation_loss(
    student_logits: Tensor, teacher: TopKLogprobs, *, return_metrics: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def topk_distillation_loss(
    student_logits: Tensor, teacher: TopKLogprobs, *, return_metrics: Literal[True], **options: Any
) -> tuple[Tensor, DistillationMetrics]: ...
def topk_distillation_loss(  # pyright: ignore[reportInconsistentOverload]  # **options stands for the list below
    student_logits: Tensor,
    teacher: TopKLogprobs,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    teacher_rows: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float | None = None,
    beta: float = 0.5,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    targets: Tensor | None = None,
    hard_weight: float = 0.0,
    inplace: bool = False,
    return_metrics: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, DistillationMetrics]:
    """Divergence from a teacher that is known by its k most likely entries S per token.

    ``tail`` says what becomes of the other entries:

    - ``"bucket"``: the k entries plus one category for all the rest (Askell et al.'s 51 categories at k = 50). With
      P_R, Q_R the mass outside S, a forward KL is sum_S p (log p - log q) + P_R (log P_R - log Q_R). It is at most the
      full divergence, grows with k, and equals it at k = V - 1. The stored log-probs are renormalised over the k + 1
      categories, so that their rounding can't make it negative.
    - ``"renormalize"``: both sides renormalised over S. Says nothing about the mass that the student puts elsewhere.
    - ``"drop"``: the bare sum over S, the student normalised over the whole vocabulary. Not a divergence: it can be
      negative, and is not minimised by the teacher.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64; divided by ``teacher.temperature``.
        teacher: :class:`TopKLogprobs`, such as :func:`topk_logprobs` returns, with the student's leading shape (any,
            with ``teacher_rows``). Indices of -1 are missing entries.
        temperature: None, or the teacher's own: a stored tail can't be taken to another temperature.
        divergence, beta, mask, labels, ignore_index, teacher_rows, weight, temperature_squared, vocab_size, num_items,
            reduction, targets, hard_weight, inplace, return_metrics, process_group: as in
            :func:`distillation_loss`. ``agreement`` compares with the teacher's most likely stored entry. With a
            process_group the teacher is the same on all ranks, its indices those of the whole vocabulary; the
            collective is of k + 3 to k + 8 numbers per token.

    Returns:
        The loss, float32 (float64 for float64 logits): () or, for "none", (...); with ``return_metrics`` a pair.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value. An index twice in one row, or
            out of range, raises on the CPU and gives NaN for its row on a GPU.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    student_logits, shards = _vocabulary.local("student_logits", student_logits, process_group)
    if shards is not None:
        mask, labels, teacher_rows, weight, targets, num_items = _vocabulary.constants(
            mask=mask, labels=labels, teacher_rows=teacher_rows, weight=weight, targets=targets, num_items=num_items
        )
    stored = _check_stored(teacher, tail, student_logits, teacher_rows is not None, temperature)
    vocab = _used_vocabulary(vocab_size, student_logits, None, shards)
    tokens = _checks.tokens(
        student_logits, mask=mask, labels=labels, ignore_index=ignore_index, teacher_rows=teacher_rows, weight=weight,
        targets=targets, hard_weight=hard_weight, num_items=num_items, reduction=reduction,
    )  # fmt: skip
    options = _options(vocab, divergence, beta, stored, temperature_squared, hard_weight)
    logprobs, residual = teacher.logprobs.detach(), teacher.residual
    inputs = (logprobs, teacher.indices, None if residual is None else residual.detach(), tail)
    return _run(_ops.TOPK_DISTILL, student_logits, inputs, tokens, options, inplace, return_metrics, shards)


def _run_linear(
    name: str, student: Projection, teacher: tuple[Any, ...], tokens: Tokens, options: Options, settings: Settings,
    shape: torch.Size, return_metrics: bool,
) -> Any:  # fmt: skip
    """Dispatches a loss straight from hidden states; ``student.hidden`` is flat, ``shape`` that of its tokens."""
    hidden = student.hidden
    backend = choose_name(hidden.device, settings.logits_dtype, split=settings.group is not None)
    if backend == "reference":
        function = getattr(_linear_reference, name)
        other = Projection(*teacher) if name == "linear_distill" else teacher
        results = tuple(function(student, other, tokens, options, settings, return_metrics))
    else:
        arguments = (student.softcap, *teacher, *tokens, *options, *settings)
        stores = tokens.reduction != "none" and hidden.dtype != torch.float16
        call = _ops_linear.Call(name, arguments, _ops_linear.DISTILL_UPSTREAMS, stores, return_metrics, backend)
        results = _ops_linear.loss(call, *student[:3])
    loss = results[0] if tokens.reduction != "none" else results[0].view(shape)
    if not return_metrics:
        return loss
    return loss, DistillationMetrics(results[1].view(shape), results[2].view(shape))


@overload
def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_metrics: Literal[False] = False, **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_metrics: Literal[True], **options: Any,
) -> tuple[Tensor, DistillationMetrics]: ...  # fmt: skip
def linear_distillation_loss(  # pyright: ignore[reportInconsistentOverload]  # **options stands for the list below
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    teacher_rows: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    targets: Tensor | None = None,
    hard_weight: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    num_valid: int | None = None,
    return_metrics: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, DistillationMetrics]:
    """:func:`distillation_loss` straight from hidden states: no logits of tokens x vocabulary are ever held.

    On both sides logits = softcap(hidden @ weight.T + bias) / T in this order, softcap(x) = c tanh(x / c). They exist
    for a chunk of tokens at a time, in a workspace; our kernel writes the gradient there too, and products of torch
    turn it into the gradients of student_hidden, student_weight and student_bias. An operand that needs no gradient
    costs none. The teacher is a constant. Tokens that don't count cost nothing on a CPU; see ``num_valid`` for a GPU.

    Args:
        student_hidden: (..., H_s) float32, bfloat16, float16 or float64.
        student_weight: (V, H_s), the head, in the dtype of the hidden states (under autocast in any).
        teacher_hidden: (..., H_t) with the same leading shape (any, with ``teacher_rows``, which name rows of
            ``teacher_hidden.flatten(0, -2)``); size and dtype may differ from the student's.
        teacher_weight: (V, H_t).
        student_bias, teacher_bias: (V,).
        student_softcap, teacher_softcap: c > 0, or None for no soft cap.
        mask, labels, ignore_index, teacher_rows, weight, temperature, divergence, beta, temperature_squared,
            vocab_size, num_items, reduction, targets, hard_weight, return_metrics: as in :func:`distillation_loss`;
            the hard term sees the capped logits.
        logits_dtype: of the chunks. None: float32 (float64 for float64), also from 16-bit operands, whose products are
            kept unrounded. A 16-bit dtype, that of the products, more than halves the workspace and saves time, but
            near convergence the rounding of the logits is larger than the difference that is learned from: at a KL of
            3e-4 bfloat16 logits put the gradients off by 40 %, float32 logits by 0.2 %.
        workspace_bytes: what the chunks' buffers take at most. None: up to 512 tokens at a time on a CPU, 4096 on a
            GPU, fewer where that is over a quarter of the available memory; 64 (512) at least, or the products would
            be slow. On a GPU where overlapping them was measured to be faster, two chunks share it. What the products
            take for themselves (the vendor library's own buffers) comes on top.
        num_valid: an int the caller knows, at least as many as the tokens that count. On a GPU it saves the products of
            the others; without it they are computed, because to count them would mean to wait. Fewer than the tokens
            that count raises on a CPU and gives NaN on a GPU.
        process_group: as in :func:`distillation_loss`; the weights and biases are this rank's slices, the hidden states
            are whole and the same on all ranks, and so is their gradient, which takes one all-reduce (in float32, of
            slices' gradients that aren't rounded). Chunks are the same on all ranks, with a collective in each.

    Returns:
        The loss, float32 (float64 for float64 hidden states): () or, for "none", (...); with ``return_metrics`` a pair.

    Products are the vendor library's, our row kernels run between them. (A kernel that folds the logits inside the
    product would save their round trip through memory; none is shipped that no GPU has measured.)

    Memory: the workspace, the gradients, where the weight needs one its sum over chunks in float32 (which is the
    gradient of a float32 weight), and a few numbers per token. Under autocast products are computed in autocast's
    dtype, from operands converted chunk by chunk, and gradients have the dtype of what they are gradients of.

    A weight or bias that is a DTensor, such as FSDP2 keeps between forward passes, is gathered once, before the first
    chunk; its gradient is averaged over the ranks of its mesh, as FSDP2 does, and comes back sharded.

    "mean" and "sum" compute the gradients in the forward pass, from one projection of either side; float16 and "none"
    project again in the backward pass, and so does a second backward over a retained graph.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; a workspace too small for the
            smallest chunk.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    student_hidden, student_weight, student_bias, shards = _vocabulary.head(
        "student_", student_hidden, student_weight, student_bias, process_group
    )
    teacher_hidden, teacher_weight, teacher_bias = _vocabulary.other_head(
        "teacher_", teacher_hidden, teacher_weight, teacher_bias, shards, "student_weight"
    )
    if shards is not None:
        mask, labels, teacher_rows, weight, targets, num_items = _vocabulary.constants(
            mask=mask, labels=labels, teacher_rows=teacher_rows, weight=weight, targets=targets, num_items=num_items
        )
    gemm_dtype = _checks.autocast_dtype(student_hidden)
    autocast, split = gemm_dtype is not None, shards is not None
    _checks.projection("student_", student_hidden, student_weight, student_bias, student_softcap, autocast, split)
    _checks.projection("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, autocast, split)
    _checks.same_device("teacher_hidden", teacher_hidden, student_hidden)
    if teacher_rows is None and teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        _checks.refuse(
            "teacher_hidden",
            f"leading shape {tuple(teacher_hidden.shape[:-1])}",
            f"the student's {tuple(student_hidden.shape[:-1])}, or teacher_rows= to match them",
        )
    vocab = _linear_vocabulary(vocab_size, student_weight, teacher_weight, shards)
    tokens = _checks.tokens(
        student_hidden, mask=mask, labels=labels, ignore_index=ignore_index, teacher_rows=teacher_rows, weight=weight,
        targets=targets, hard_weight=hard_weight, num_items=num_items, reduction=reduction,
    )  # fmt: skip
    temperature = _checks.temperature("temperature", temperature)
    options = _options(vocab, divergence, beta, temperature, temperature_squared, hard_weight)
    settings = _checks.linear_settings(
        workspace_bytes, num_valid, logits_dtype, gemm_dtype, shards, student_hidden, teacher_hidden
    )
    student = Projection(_checks.flat_rows(student_hidden), student_weight, student_bias, student_softcap)
    bias = None if teacher_bias is None else teacher_bias.detach()
    teacher = (_checks.flat_rows(teacher_hidden.detach()), teacher_weight.detach(), bias, teacher_softcap)
    shape = student_hidden.shape[:-1]
    return _run_linear("linear_distill", student, teacher, tokens, options, settings, shape, return_metrics)


def _linear_vocabulary(
    vocab_size: int | None, student_weight: Tensor, teacher_weight: Tensor | None, shards: _shards.Shards | None
) -> int:
    width = student_weight.shape[0]
    if shards is not None:
        if teacher_weight is not None and teacher_weight.shape[0] != width:
            _checks.refuse("teacher_weight", f"a slice of {teacher_weight.shape[0]}", f"the student's {width} entries")
        return _vocabulary.limit(shards, vocab_size)
    if vocab_size is None:
        if teacher_weight is not None and teacher_weight.shape[0] != width:
            wanted = f"the student's {width}, or vocab_size= for both"
            _checks.refuse("teacher_weight", f"a vocabulary of {teacher_weight.shape[0]}", wanted)
        return width
    limit = width if teacher_weight is None else min(width, teacher_weight.shape[0])
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= limit:
        _checks.refuse("vocab_size", repr(vocab_size), f"an int with 0 < vocab_size <= {limit}, the smaller head")
    return vocab_size


@overload
def linear_topk_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher: TopKLogprobs, *,
    return_metrics: Literal[False] = False, **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def linear_topk_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher: TopKLogprobs, *,
    return_metrics: Literal[True], **options: Any,
) -> tuple[Tensor, DistillationMetrics]: ...  # fmt: skip
def linear_topk_distillation_loss(  # pyright: ignore[reportInconsistentOverload]  # **options: the list below
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TopKLogprobs,
    *,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    teacher_rows: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float | None = None,
    beta: float = 0.5,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    targets: Tensor | None = None,
    hard_weight: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    num_valid: int | None = None,
    return_metrics: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, DistillationMetrics]:
    """:func:`topk_distillation_loss` straight from hidden states: no logits of tokens x vocabulary are ever held.

    The student's logits are softcap(student_hidden @ student_weight.T + student_bias) / T at the teacher's stored
    temperature T; chunks, memory, dtypes and when gradients are computed are as in :func:`linear_distillation_loss`.

    Args:
        student_hidden: (..., H) float32, bfloat16, float16 or float64.
        student_weight: (V, H), the head.
        teacher: :class:`TopKLogprobs` with the student's leading shape (any, with ``teacher_rows``).
        student_bias: (V,).
        student_softcap: c > 0, or None for no soft cap.
        divergence, tail, mask, labels, ignore_index, teacher_rows, weight, temperature, beta, temperature_squared,
            vocab_size, num_items, reduction, targets, hard_weight, return_metrics: as in
            :func:`topk_distillation_loss`.
        logits_dtype, workspace_bytes, num_valid, process_group: as in :func:`linear_distillation_loss`.

    Returns:
        The loss, float32 (float64 for float64 hidden states): () or, for "none", (...); with ``return_metrics`` a pair.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; a workspace too small for the
            smallest chunk. An index twice in one row, or out of range, raises on the CPU and gives NaN on a GPU.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    student_hidden, student_weight, student_bias, shards = _vocabulary.head(
        "student_", student_hidden, student_weight, student_bias, process_group
    )
    if shards is not None:
        mask, labels, teacher_rows, weight, targets, num_items = _vocabulary.constants(
            mask=mask, labels=labels, teacher_rows=teacher_rows, weight=weight, targets=targets, num_items=num_items
        )
    gemm_dtype = _checks.autocast_dtype(student_hidden)
    autocast, split = gemm_dtype is not None, shards is not None
    _checks.projection("student_", student_hidden, student_weight, student_bias, student_softcap, autocast, split)
    stored = _check_stored(teacher, tail, student_hidden, teacher_rows is not None, temperature)
    vocab = _linear_vocabulary(vocab_size, student_weight, None, shards)
    tokens = _checks.tokens(
        student_hidden, mask=mask, labels=labels, ignore_index=ignore_index, teacher_rows=teacher_rows, weight=weight,
        targets=targets, hard_weight=hard_weight, num_items=num_items, reduction=reduction,
    )  # fmt: skip
    options = _options(vocab, divergence, beta, stored, temperature_squared, hard_weight)
    settings = _checks.linear_settings(workspace_bytes, num_valid, logits_dtype, gemm_dtype, shards, student_hidden)
    student = Projection(_checks.flat_rows(student_hidden), student_weight, student_bias, student_softcap)
    k, residual = teacher.indices.shape[-1], teacher.residual
    logprobs, indices = teacher.logprobs.detach().reshape(-1, k), teacher.indices.reshape(-1, k)
    inputs = (logprobs, indices, None if residual is None else residual.detach().reshape(-1), tail)
    shape = student_hidden.shape[:-1]
    return _run_linear("linear_topk_distill", student, inputs, tokens, options, settings, shape, return_metrics)
