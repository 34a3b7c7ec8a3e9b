"""Log-probabilities of tokens and of sequences, and the entropy of the distribution that they come from.

Preference optimisation (DPO, KTO, ORPO) takes them from a policy and a reference model, reinforcement learning with its
entropy bonus from the policy, imitation learning (Askell et al. 2021, arXiv 2112.00861) as its loss.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyalign import _checks, _ops_linear, _ops_logprob, _ops_split, _shards, _vocabulary
from pyalign._backends import choose_name
from pyalign._linear import Projection, Settings
from pyalign._ops import unwatched
from pyalign._types import REDUCTIONS, LogprobResults, accumulation_dtype
from pyalign.reference import linear as _linear_reference
from pyalign.reference import logprob as _reference

__all__ = ["linear_cross_entropy", "linear_token_logprobs", "sequence_logprobs", "token_logprobs"]


@overload
def token_logprobs(
    logits: Tensor, targets: Tensor, *, return_entropy: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor, targets: Tensor, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(  # pyright: ignore[reportInconsistentOverload]  # **options stands for the list below
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it is drawn from.

    With z = softcap(logits) / T, softcap(x) = c tanh(x / c), and q = softmax(z):

        logprob = log q_target = z_target - logsumexp(z),    entropy = -sum q log q

    Forward is one read of the logits, backward one read and one write of the gradient:

        d logprob / dz_i = [i = target] - q_i,    d entropy / dz_i = -q_i (log q_i + entropy)

    There is no label shift: position i of the logits is matched with position i of the targets.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64.
        targets: (...) integer.
        ignore_index: the target of tokens that don't count: log-prob, entropy and gradient are 0, the row isn't read.
        temperature: T > 0.
        softcap: c > 0, or None; applied before the temperature.
        return_entropy: also return the entropies, in nats, differentiable.
        process_group: the vocabulary is split over the ranks of this group, each of which gives its slice of the
            logits, in the order of the ranks (see :func:`pyalign.distill.distillation_loss`); targets are of the whole
            vocabulary. Log-probs are the same on all ranks, the gradient is that of the rank's slice. Forward takes one
            collective of 4 numbers per token, backward none.

    Returns:
        (...) log-probs, float32 (float64 for float64 logits), or a pair with the entropies; both take an upstream
        gradient per token.

    A logit of -inf has probability 0 and contributes nothing; a target of probability 0 has log-prob -inf. A row that
    is all -inf, or holds +inf or NaN, gives NaN for that row alone. (A softcap makes infinities -c and c.) An
    out-of-range target raises on the CPU and gives NaN for its row on a GPU.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    logits, shards = _vocabulary.local("logits", logits, process_group)
    if shards is not None:
        (targets,) = _vocabulary.constants(targets=targets)
    if logits.shape[-1] == 0 and shards is None:
        _checks.refuse("logits", f"shape {tuple(logits.shape)}", "a vocabulary of at least 1")
    shape = logits.shape[:-1]
    targets = _checks.integers("targets", targets, shape, logits)
    temperature = _checks.temperature("temperature", temperature)
    softcap = _checks.softcap("softcap", softcap)
    backend = choose_name(logits.device, logits.dtype, split=shards is not None)
    if shards is not None and backend == "reference":
        logits, shards = _shards.whole_vocabulary(logits, shards), None
    if shards is not None:
        results = _ops_split.logprobs(
            logits, targets, ignore_index, temperature, softcap, bool(return_entropy), shards, backend
        )
    elif backend == "reference":
        results = _reference.logprob(logits, targets, ignore_index, temperature, softcap, return_entropy)
    else:
        call = _ops_logprob.Call(ignore_index, temperature, softcap, bool(return_entropy), backend)
        results = _ops_logprob.logprobs(call, logits, targets)
    if not return_entropy:
        return results.logprob.view(shape)
    assert results.entropy is not None
    return results.logprob.view(shape), results.entropy.view(shape)


def _may_look(x: Tensor) -> bool:
    """Whether values may be looked at: not on a GPU, where that would mean to wait, nor where somebody traces."""
    return unwatched(x) and x.device.type == "cpu"


def _check_offsets(offsets: Tensor, tokens: Tensor) -> Tensor:
    """``offsets`` as int64, refused where they don't cut the tokens into sequences and values may be looked at."""
    if not isinstance(offsets, Tensor):
        _checks.refuse("offsets", type(offsets).__name__, "a tensor", TypeError)
    if offsets.dtype not in (torch.int64, torch.int32):
        _checks.refuse("offsets", offsets.dtype, "int32 or int64", TypeError)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        _checks.refuse("offsets", f"shape {tuple(offsets.shape)}", "(B + 1,)")
    if offsets.device != tokens.device:
        _checks.refuse("offsets", f"a tensor on {offsets.device}", f"one on {tokens.device}, where the log-probs are")
    if _may_look(offsets):
        count = tokens.shape[0]
        if int(offsets[0]) != 0 or int(offsets[-1]) != count:
            given = f"first and last entries {int(offsets[0])} and {int(offsets[-1])}"
            _checks.refuse("offsets", given, f"0 and {count}, the number of tokens")
        if bool((offsets[1:] < offsets[:-1]).any()):
            place = int((offsets[1:] < offsets[:-1]).nonzero()[0, 0]) + 1
            _checks.refuse(
                "offsets", f"{int(offsets[place])} at {place}", f"no less than the one before it, {offsets[place - 1]}"
            )
    return offsets.to(torch.int64)


def _segment_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """(B,) float64 sums of x (T,) over the segments, each added up in order. On a GPU, where nobody waits for the
    values of the offsets, those that don't cut x give NaN, and nothing is read through them."""
    count = x.shape[0]
    if count == 0:  # by which torch's kernels for a GPU divide
        return x.double().sum().repeat(offsets.shape[0] - 1)
    inside = offsets.clamp(0, count).cummax(0).values
    sums = torch.segment_reduce(x.double(), "sum", offsets=inside, axis=0, initial=0, unsafe=True)
    if _may_look(offsets):
        return sums
    cut = (inside == offsets).all() & (offsets[0] == 0) & (offsets[-1] == count)
    return torch.where(cut, sums, float("nan"))


def sequence_logprobs(
    token_logprobs: Tensor, *, offsets: Tensor | None = None, mask: Tensor | None = None, average: bool = False
) -> Tensor:
    """Sum (or mean) of the log-probs of each sequence's tokens.

        result_b = sum_{t in b} logprob_t,  with ``average`` divided by the number of tokens counted

    Sums run in float64: of a thousand tokens, float32 would lose the digits that a log-ratio is made of.

    Args:
        token_logprobs: (B, S) padded, or (T,) packed, with ``offsets``; any floating dtype.
        offsets: (B + 1,) int32 or int64, from 0 to T, never decreasing: sequence b is [offsets[b], offsets[b + 1]).
        mask: bool or integer of the shape of ``token_logprobs``; a token counts where it is nonzero. What doesn't count
            may be NaN or infinite. (:func:`token_logprobs` has zeros at ignored targets: they add nothing to a sum, but
            a mean counts them, unless they are masked.)
        average: divide by the number of tokens that count.

    Returns:
        (B,) float32 (float64 for float64), differentiable. The sum, and the mean, of no token is 0.

    On the CPU, offsets that don't cut the tokens into sequences raise; on a GPU they make the result NaN.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
    """
    _checks.floating("token_logprobs", token_logprobs, 1)
    shape = token_logprobs.shape
    if len(shape) != (2 if offsets is None else 1):
        wanted = "(B, S), or (T,) with offsets=" if offsets is None else "(T,) with offsets="
        _checks.refuse("token_logprobs", f"shape {tuple(shape)}", wanted)
    if mask is not None:
        _checks.per_token("mask", mask, shape, token_logprobs)
        if mask.dtype != torch.bool:
            _checks.integer_dtype("mask", mask)
            mask = mask != 0
    x = token_logprobs if mask is None else torch.where(mask, token_logprobs, 0.0)
    if offsets is not None:
        offsets = _check_offsets(offsets, token_logprobs)
        sums = _segment_sums(x, offsets)
    else:
        sums = x.sum(-1, dtype=torch.float64)
    if average:
        if mask is None:
            counts = shape[1] if offsets is None else offsets[1:] - offsets[:-1]
        else:
            counts = mask.sum(-1) if offsets is None else _segment_sums(mask, offsets)
        sums = sums / (counts.clamp(min=1) if isinstance(counts, Tensor) else max(counts, 1))
    return sums.to(accumulation_dtype(token_logprobs.dtype))


# Straight from hidden states


@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprobs(  # pyright: ignore[reportInconsistentOverload]  # **options stands for the list below
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    num_valid: int | None = None,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`token_logprobs` straight from hidden states: no logits of tokens x vocabulary are ever held.

    With z = softcap(hidden @ weight.T + bias) / T in this order, softcap(x) = c tanh(x / c), and q = softmax(z):

        logprob = log q_target,    entropy = -sum q log q

    Logits exist for a chunk of tokens at a time. Both results take an upstream gradient per token, so backward computes
    the chunk's logits again, writes the gradient, and multiplies it into those of hidden states and weight.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64.
        weight: (V, H), the head, in the dtype of the hidden states (under autocast in any); a DTensor is gathered once.
        targets: (...) integer.
        bias: (V,).
        ignore_index: the target of tokens that don't count: log-prob, entropy and gradient are 0.
        temperature: T > 0.
        softcap: c > 0, or None.
        return_entropy: also return the entropies, in nats, differentiable.
        logits_dtype, workspace_bytes, num_valid, process_group: as in
            :func:`pyalign.distill.linear_distillation_loss`, which also says what memory is taken.

    Returns:
        (...) log-probs, float32 (float64 for float64), or a pair with the entropies.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; a workspace too small for the
            smallest chunk. An out-of-range target raises on the CPU and gives NaN for its row on a GPU.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    head, targets, settings = _linear_arguments(
        hidden, weight, bias, softcap, targets, logits_dtype, workspace_bytes, num_valid, process_group
    )
    temperature = _checks.temperature("temperature", temperature)
    backend = choose_name(hidden.device, settings.logits_dtype, split=settings.group is not None)
    want_entropy = bool(return_entropy)
    if backend == "reference":
        results = _linear_reference.linear_logprob(head, targets, ignore_index, temperature, want_entropy, settings)
    else:
        upstreams = _ops_linear.LOGPROB_AND_ENTROPY_UPSTREAMS if want_entropy else _ops_linear.LOGPROB_UPSTREAMS
        arguments = (head.softcap, targets, None, None, ignore_index, temperature, *settings)
        call = _ops_linear.Call("linear_logprob", arguments, upstreams, False, want_entropy, backend)
        logprob, *entropy = _ops_linear.loss(call, *head[:3])
        results = LogprobResults(logprob, entropy[0] if entropy else None, None)
    shape = hidden.shape[:-1]
    if not want_entropy:
        return results.logprob.view(shape)
    assert results.entropy is not None
    return results.logprob.view(shape), results.entropy.view(shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    num_valid: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """Cross-entropy straight from hidden states: no logits of tokens x vocabulary are ever held.

    With y = softcap(hidden @ weight.T + bias), softcap(x) = c tanh(x / c), q = softmax(y), e = label_smoothing, per
    token

        loss = -(1 - e) log q_target - e mean(log q) + z_loss * logsumexp(y)^2

    (label smoothing as torch defines it; the z-loss of PaLM, Chowdhery et al. 2022, arXiv 2204.02311). "mean" and "sum"
    compute the gradients of hidden, weight and bias in the forward pass, from three matrix products in all; float16 and
    "none" project again in the backward pass, and so does a second backward over a retained graph. An operand that
    needs no gradient costs none.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64.
        weight: (V, H), the head, in the dtype of the hidden states (under autocast in any); a DTensor is gathered once.
        targets: (...) integer.
        bias: (V,).
        ignore_index: the target of tokens that don't count.
        label_smoothing: 0 <= e < 1.
        z_loss: its coefficient, >= 0.
        softcap: c > 0, or None.
        num_items: int or 0-dim tensor that replaces the number of counted tokens as the denominator of "mean".
        reduction: "mean" over counted tokens (the mean of nothing is a differentiable 0), "sum", or "none": (...).
        logits_dtype, workspace_bytes, num_valid, process_group: as in
            :func:`pyalign.distill.linear_distillation_loss`, which also says what memory is taken.

    Returns:
        The loss, float32 (float64 for float64): () or, for "none", (...).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; a workspace too small for the
            smallest chunk. An out-of-range target raises on the CPU and gives NaN for its row on a GPU.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    head, targets, settings = _linear_arguments(
        hidden, weight, bias, softcap, targets, logits_dtype, workspace_bytes, num_valid, process_group
    )
    smoothing = _checks.number("label_smoothing", label_smoothing, "0 <= label_smoothing < 1", lambda x: 0 <= x < 1)
    z_loss = _checks.number("z_loss", z_loss, "a finite number >= 0", lambda x: x >= 0)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    divisor = _checks.denominator(num_items, reduction, accumulation_dtype(hidden.dtype), hidden)
    backend = choose_name(hidden.device, settings.logits_dtype, split=settings.group is not None)
    if backend == "reference":
        loss = _linear_reference.linear_cross_entropy(
            head, targets, divisor, ignore_index, smoothing, z_loss, reduction, settings
        )
    else:
        stores = reduction != "none" and hidden.dtype != torch.float16
        arguments = (
            head.softcap, targets, divisor, None, ignore_index, smoothing, z_loss, reduction, *settings
        )  # fmt: skip
        upstreams = _ops_linear.CROSS_ENTROPY_UPSTREAMS
        call = _ops_linear.Call("linear_cross_entropy", arguments, upstreams, stores, False, backend)
        (loss,) = _ops_linear.loss(call, *head[:3])
    return loss.view(hidden.shape[:-1]) if reduction == "none" else loss


def _linear_arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    targets: Tensor,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int | None,
    num_valid: int | None,
    process_group: object,
) -> tuple[Projection, Tensor, Settings]:
    """The head over flat hidden states, flat targets, and how logits are computed."""
    hidden, weight, bias, shards = _vocabulary.head("", hidden, weight, bias, process_group)
    if shards is not None:
        (targets,) = _vocabulary.constants(targets=targets)
    gemm_dtype = _checks.autocast_dtype(hidden)
    _checks.projection("", hidden, weight, bias, softcap, gemm_dtype is not None, shards is not None)
    targets = _checks.integers("targets", targets, hidden.shape[:-1], hidden)
    settings = _checks.linear_settings(workspace_bytes, num_valid, logits_dtype, gemm_dtype, shards, hidden)
    return Projection(_checks.flat_rows(hidden), weight, bias, softcap), targets, settings
