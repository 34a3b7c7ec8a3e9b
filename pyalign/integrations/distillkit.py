"""DistillKit's divergences from dense and sparse teachers, under their names and signatures.

Fits ``distillkit/lossfuncs`` (version 1.0.0, commit a61c2e7): the functions ``sparse_kl_div``, ``sparse_js_div``,
``sparse_tvd`` and the loss classes ``KLDLoss``, ``JSDLoss``, ``TVDLoss`` that its trainer makes from a configuration::

    from pyalign.integrations import distillkit

    distillkit.install()  # before DistillationTrainer is made: function: kl, jsd and tvd are ours now

- **Layout.** Student logits (B, T, V), teacher ids and values (B, T, K), mask (B, T) or (B, T, 1), bool or integer.
- **Label shift.** Nobody shifts: DistillKit matches position t of the student with position t of the teacher.
- **Reduction.** The functions return the sum over tokens. The classes divide by ``num_items_in_batch``, by default the
  number of tokens that the mask counts, and multiply by temperature^2; a batch without such tokens is 0 (theirs NaN).
- **Missing probability.** ``zero``: the teacher's k entries are renormalised, the student keeps its whole vocabulary,
  and what it puts outside costs what the divergence says. ``symmetric_uniform``: everything outside is one category on
  both sides, ``tail="bucket"`` of :func:`pyalign.topk_distillation_loss`. DistillKit takes the masses outside as 1
  minus a sum, clamped by ``eps``; in float32 that rounds to nothing for a peaked teacher, and the loss is NaN. Ours
  needs no ``eps``. At another temperature than the teacher's, DistillKit tempers the mass outside as if it were one
  token, and so does this; the student's is tempered token by token, so that the minimum is no longer the teacher.
- **Refused.** An ``eps`` other than the default, a floating mask, ``symmetric_uniform`` for teacher logits, an id twice
  in one row (an error on a CPU, NaN on a GPU). Hinge, ranking and hidden-state losses stay DistillKit's own.
"""

from __future__ import annotations

import enum
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyalign import TopKLogprobs, _checks, distillation_loss, topk_distillation_loss
from pyalign._types import accumulation_dtype
from pyalign.integrations._projects import imported
from pyalign.reference.distill import log1mexp

__all__ = [
    "JSDLoss",
    "KLDLoss",
    "MissingProbabilityHandling",
    "TVDLoss",
    "install",
    "sparse_js_div",
    "sparse_kl_div",
    "sparse_tvd",
]


class MissingProbabilityHandling(enum.Enum):
    """What becomes of the probability outside the teacher's entries. DistillKit's own enum, or its values, will do."""

    ZERO = "zero"
    SYMMETRIC_UNIFORM = "symmetric_uniform"


def _handling(name: str, missing: Any) -> MissingProbabilityHandling:
    value = getattr(missing, "value", missing)
    _checks.one_of(name, value, tuple(x.value for x in MissingProbabilityHandling))
    return MissingProbabilityHandling(value)


def _stored_teacher(
    target_ids: Tensor,
    target_values: Tensor,
    missing: MissingProbabilityHandling,
    log_target: bool,
    temperature: float,
    target_generation_temperature: float,
    student_generation_temperature: float,
) -> TopKLogprobs:
    """The k entries (and the rest) at the distillation temperature."""
    distillation = _checks.temperature("temperature", temperature)
    of_target = _checks.temperature("target_generation_temperature", target_generation_temperature)
    of_student = _checks.temperature("student_generation_temperature", student_generation_temperature)
    _checks.floating("target_values", target_values, 1)
    if target_ids.shape != target_values.shape:
        wanted = f"{tuple(target_values.shape)}, that of target_values"
        _checks.refuse("target_ids", f"shape {tuple(target_ids.shape)}", wanted)
    alpha = of_target / distillation
    values = target_values.detach().to(accumulation_dtype(target_values.dtype))
    values = torch.where(target_ids == -1, -math.inf, values)
    tempered = values * alpha if not math.isclose(alpha, 1.0) else values
    student_temperature = distillation / of_student
    if missing is MissingProbabilityHandling.ZERO:
        nothing = torch.full_like(tempered[..., 0], -math.inf)
        return TopKLogprobs(torch.log_softmax(tempered, -1), target_ids, nothing, student_temperature)
    if not log_target:
        wanted = "zero for teacher logits (log_target=False): the mass outside them is not known"
        _checks.refuse("missing", missing.value, wanted)
    if tempered is values:
        return TopKLogprobs(values, target_ids, None, student_temperature)
    rest = alpha * log1mexp(torch.logsumexp(values, -1))
    total = torch.logaddexp(torch.logsumexp(tempered, -1), rest)
    return TopKLogprobs(tempered - total[..., None], target_ids, rest - total, student_temperature)


def _flat_mask(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """DistillKit's trainer passes (B, T, 1)."""
    if isinstance(mask, Tensor) and mask.dim() == logits.dim():
        if mask.shape[-1] != 1:
            _checks.refuse("mask", f"shape {tuple(mask.shape)}", "(B, T) or (B, T, 1)")
        return mask.squeeze(-1)
    return mask


def _sparse(
    divergence: str,
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None,
    eps: float,
    missing: Any,
    log_target: bool,
    temperature: float,
    target_generation_temperature: float,
    student_generation_temperature: float,
    chunk_length: int | None,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    if eps != 1e-8:
        _checks.refuse("eps", eps, "1e-8, the default: nothing is clamped here, so there is nothing that it would do")
    if chunk_length is not None and (not isinstance(chunk_length, int) or chunk_length < 1):
        _checks.refuse("chunk_length", repr(chunk_length), "None or an int >= 1")
    _checks.floating("logits", logits, 1)
    teacher = _stored_teacher(
        target_ids,
        target_values,
        _handling("missing", missing),
        log_target,
        temperature,
        target_generation_temperature,
        student_generation_temperature,
    )
    mask = _flat_mask(mask, logits)
    return topk_distillation_loss(
        logits, teacher, divergence=divergence, tail="bucket", mask=mask, num_items=num_items, reduction=reduction
    )


def sparse_kl_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: Any = MissingProbabilityHandling.ZERO,
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """KL(teacher || student), summed over tokens, from a teacher known by its k entries per token.

    Args:
        logits: (B, T, V) of the student.
        target_ids: (B, T, K) int32 or int64; -1 for a missing entry.
        target_values: (B, T, K) log-probs of the teacher, or logits with ``log_target=False``.
        mask: (B, T) or (B, T, 1), bool or integer; a token counts where it is nonzero.
        eps: 1e-8 alone: nothing is clamped.
        missing: see above.
        log_target: whether the values are log-probs.
        temperature: of the divergence; the result isn't multiplied by its square.
        target_generation_temperature, student_generation_temperature: already applied to the values and the logits.
        chunk_length: tokens of a row at a time. No buffer of the size of the logits is made here, so that it changes
            nothing.

    Returns:
        (), float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or value.
    """
    return _sparse(
        "forward_kl", logits, target_ids, target_values, mask, eps, missing, log_target, temperature,
        target_generation_temperature, student_generation_temperature, chunk_length, "sum", None,
    )  # fmt: skip


def sparse_js_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: Any = MissingProbabilityHandling.ZERO,
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Jensen-Shannon divergence, summed over tokens: 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2.

    Arguments, result and errors are those of :func:`sparse_kl_div`.
    """
    return _sparse(
        "jsd", logits, target_ids, target_values, mask, eps, missing, log_target, temperature,
        target_generation_temperature, student_generation_temperature, chunk_length, "sum", None,
    )  # fmt: skip


def sparse_tvd(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: Any = MissingProbabilityHandling.ZERO,
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Total variation distance, summed over tokens: 1/2 sum abs(p - q).

    Arguments, result and errors are those of :func:`sparse_kl_div`.
    """
    return _sparse(
        "tvd", logits, target_ids, target_values, mask, eps, missing, log_target, temperature,
        target_generation_temperature, student_generation_temperature, chunk_length, "sum", None,
    )  # fmt: skip


class _Loss:
    """One of DistillKit's loss functions: made from a configuration, called with a batch's outputs and signal."""

    divergence: ClassVar[str]

    def __init__(
        self,
        temperature: float,
        missing_probability_handling: Any = MissingProbabilityHandling.ZERO,
        sparse_chunk_length: int | None = None,
    ) -> None:
        self.temperature = _checks.temperature("temperature", temperature)
        self.missing = _handling("missing_probability_handling", missing_probability_handling)
        self.chunk_length = sparse_chunk_length

    def requires_hidden_states(self) -> bool:
        return False

    def __call__(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Tensor | None = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss, ().

        Args:
            student_outputs: an object with ``logits`` (B, T, V).
            signal: DistillKit's ``DenseSignal`` (``logits``) or ``SparseSignal`` (``sparse_ids``, ``sparse_values``,
                ``log_values``, ``generation_temperature``).
            mask: (B, T) or (B, T, 1), bool or integer; a token counts where it is nonzero.
            hidden_state_mapping: for losses over hidden states; the trainer passes it to all, and it isn't read here.
            num_items_in_batch: int or 0-dim tensor that replaces the number of counted tokens.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or value.
        """
        logits: Tensor = student_outputs.logits
        if hasattr(signal, "sparse_ids"):
            loss = _sparse(
                self.divergence, logits, signal.sparse_ids, signal.sparse_values, mask, 1e-8, self.missing,
                signal.log_values, self.temperature, signal.generation_temperature, 1.0, self.chunk_length, "mean",
                num_items_in_batch,
            )  # fmt: skip
            return loss * self.temperature**2
        if not hasattr(signal, "logits"):
            _checks.refuse("signal", type(signal).__name__, "a DenseSignal or a SparseSignal", TypeError)
        return distillation_loss(
            logits,
            signal.logits,
            divergence=self.divergence,
            mask=_flat_mask(mask, logits),
            temperature=self.temperature,
            temperature_squared=True,
            num_items=num_items_in_batch,
        )


class KLDLoss(_Loss):
    """KL(teacher || student) * temperature^2, the mean over tokens; ``function: kl``."""

    divergence = "forward_kl"

    @classmethod
    def name(cls) -> str:
        return "kl"


class JSDLoss(_Loss):
    """Jensen-Shannon divergence * temperature^2, the mean over tokens; ``function: jsd``."""

    divergence = "jsd"

    @classmethod
    def name(cls) -> str:
        return "jsd"


class TVDLoss(_Loss):
    """Total variation distance * temperature^2, the mean over tokens; ``function: tvd``."""

    divergence = "tvd"

    @classmethod
    def name(cls) -> str:
        return "tvd"


def install() -> None:
    """Makes DistillKit's trainer use these classes for ``kl``, ``jsd`` and ``tvd``, in this process.

    Raises:
        ModuleNotFoundError: DistillKit is missing.
        RuntimeError: its list of losses has no class of one of these names.
    """
    classes: list[Any] = imported("distillkit.lossfuncs", "DistillKit (arcee-ai/distillkit)").ALL_LOSS_CLASSES
    ours = {loss.name(): loss for loss in (KLDLoss, JSDLoss, TVDLoss)}
    missing = ours.keys() - {loss.name() for loss in classes}
    if missing:
        raise RuntimeError(f"distillkit.lossfuncs.ALL_LOSS_CLASSES has no {', '.join(sorted(missing))}")
    classes[:] = [ours.get(loss.name(), loss) for loss in classes]
