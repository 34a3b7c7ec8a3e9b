"""NeMo-RL's preference, DPO and top-k distillation losses, under their names and signatures.

Fits ``nemo_rl/algorithms/loss/loss_functions.py`` (commit 7ea279a, August 2026): ``PreferenceLossFn`` (reward models),
``DPOLossFn`` and ``DistillationLossFn``, where ``rm.py``, ``dpo.py`` and ``distillation.py`` make them::

    from pyalign.integrations.nemo_rl import DistillationLossFn, DPOLossFn, PreferenceLossFn

- **Layout.** Pairs are interleaved: rows 0, 2, ... are chosen, rows 1, 3, ... rejected. ``data`` holds ``sample_mask``
  (2P,) and ``token_mask`` (2P, S) as NeMo-RL's batches do.
- **Label shift.** ``DPOLossFn`` gets log-probs of the next tokens (2P, S - 1), which ``token_mask[:, 1:]`` masks.
  ``DistillationLossFn`` takes logits (B, S, V), drops their last position, and masks them in the same way. Logits that
  are longer than the teacher's sequence, as packing pads them, lose their end.
- **Reduction.** Sums over this microbatch, divided by ``global_valid_seqs / 2`` pairs or ``global_valid_toks`` tokens;
  no factor for data parallelism. Dividing by 0 gives 0. Masked rows are not read: a NaN in them stays there.
- **sample_mask** weighs a pair; NeMo-RL multiplies by it twice, which is the same for its 0 and 1.
- **Metrics** are Python floats, as its trainers expect, read from the device in one go. ``accuracy`` counts a tie as a
  half (theirs as wrong).
- **DistillationLossFn** asks for logits (``LossInputType.LOGIT``) instead of gathered log-probs, so that one kernel
  reads them. A vocabulary that is split over ranks comes as a DTensor, or as each rank's slice with ``process_group=``;
  sequences must be whole (no context parallelism).
- **Refused.** ``zero_outside_topk`` with a reverse or mixed KL, where theirs takes e^-100 for the teacher's probability
  of every entry outside, a constant that the loss then depends on; an odd number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyalign import TopKLogprobs, _checks, pairwise_preference_loss, sequence_logprobs, topk_distillation_loss
from pyalign._types import accumulation_dtype
from pyalign.integrations._projects import imported

__all__ = ["DPOLossFn", "DistillationLossFn", "PreferenceLossFn"]

_INTERFACES = ("nemo_rl.algorithms.loss.interfaces", "NeMo-RL (NVIDIA-NeMo/RL)")


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Waits for the device once."""
    values = torch.stack([x.detach().double() for x in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def _over(total: Tensor, denominator: Tensor) -> Tensor:
    """total / denominator, 0 where there is nothing to divide by."""
    return torch.where(denominator == 0, total * 0.0, total / torch.where(denominator == 0, 1.0, denominator))


class PreferenceLossFn:
    """softplus(-(chosen - rejected)) of interleaved rewards: :func:`pyalign.pairwise_preference_loss`."""

    @property
    def loss_type(self) -> Any:
        """``LossType.SEQUENCE_LEVEL``."""
        return imported(*_INTERFACES).LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """``LossInputType.LOGIT``."""
        return imported(*_INTERFACES).LossInputType.LOGIT

    def __call__(
        self,
        logits: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, (), and its metrics.

        Args:
            logits: (2P, 1) or (2P,), rewards.
            data: holds ``sample_mask`` (2P,).
            global_valid_seqs: 0-dim, the valid rows (two a pair) of the global batch.
            global_valid_toks: not read by a loss over sequences.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype.
        """
        rewards = logits.squeeze(-1) if logits.dim() == 2 and logits.shape[-1] == 1 else logits
        loss, metrics = _preference(rewards, data["sample_mask"], global_valid_seqs, 1.0)
        values = {"loss": loss, **metrics, "num_valid_samples": data["sample_mask"].sum() / 2}
        return loss, _floats(values)


def _preference(
    rewards: Tensor, sample_mask: Tensor, global_valid_seqs: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """softplus(-beta (chosen - rejected)) over interleaved rewards (2P,), and what is reported of them."""
    _checks.floating("rewards", rewards, 1)
    if rewards.dim() != 1 or rewards.shape[0] % 2:
        _checks.refuse("rewards", f"shape {tuple(rewards.shape)}", "(2P,), chosen and rejected in turn")
    _checks.per_item("sample_mask", sample_mask, rewards)
    dtype = accumulation_dtype(rewards.dtype)
    chosen, rejected = rewards[::2], rewards[1::2]
    weights = sample_mask.to(dtype)
    pairs = global_valid_seqs.to(dtype).reshape(()) / 2
    counted = weights[::2] != 0
    loss = pairwise_preference_loss(
        chosen, rejected, scale=beta, weight=weights[::2], mask=counted, num_items=pairs
    )  # fmt: skip
    with torch.no_grad():
        right = (chosen > rejected).to(dtype) + 0.5 * (chosen == rejected)
        reported = (right, weights[::2]), (chosen, weights[::2]), (rejected, weights[1::2])
        sums = [_over(torch.where(weight != 0, x * weight, 0.0).sum(), pairs) for x, weight in reported]
    return loss, dict(zip(("accuracy", "rewards_chosen_mean", "rewards_rejected_mean"), sums, strict=True))


class DPOLossFn:
    """DPO over interleaved rows of next-token log-probs, and optionally the chosen rows' negative log-likelihood.

    With r the sum over tokens of policy minus reference log-probs (with ``preference_average_log_probs`` their mean)
    and beta = ``reference_policy_kl_penalty``, a pair costs

        preference_loss_weight * softplus(-beta (r_chosen - r_rejected)) + sft_loss_weight * NLL(chosen)

    Args:
        cfg: an object with the attributes of NeMo-RL's ``DPOLossConfig``.
        use_fused_linear_logprobs: read by NeMo-RL, which then computes log-probs in the model's head.
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.reference_policy_kl_penalty = _checks.positive(
            "reference_policy_kl_penalty", cfg.reference_policy_kl_penalty
        )
        self.preference_loss_weight = _checks.finite("preference_loss_weight", cfg.preference_loss_weight)
        self.sft_loss_weight = _checks.number(
            "sft_loss_weight", cfg.sft_loss_weight, "a finite number >= 0", lambda x: x >= 0
        )
        self.preference_average_log_probs = bool(cfg.preference_average_log_probs)
        self.sft_average_log_probs = bool(cfg.sft_average_log_probs)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    @property
    def loss_type(self) -> Any:
        """``LossType.SEQUENCE_LEVEL``."""
        return imported(*_INTERFACES).LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """``LossInputType.LOGPROB``."""
        return imported(*_INTERFACES).LossInputType.LOGPROB

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, (), and its metrics.

        Args:
            next_token_logprobs: (2P, S - 1) log-probs of tokens 1 to S - 1 under the policy.
            data: holds ``reference_policy_logprobs`` and ``token_mask`` (2P, S), ``sample_mask`` (2P,).
            global_valid_seqs: 0-dim, the valid rows (two a pair) of the global batch.
            global_valid_toks: not read by a loss over sequences.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype.
        """
        _checks.floating("next_token_logprobs", next_token_logprobs, 2)
        token_mask, sample_mask = data["token_mask"][:, 1:] != 0, data["sample_mask"]
        reference = data["reference_policy_logprobs"][:, :-1].detach()
        _checks.per_token("token_mask[:, 1:]", token_mask, next_token_logprobs.shape, next_token_logprobs)
        _checks.per_token("reference_policy_logprobs[:, :-1]", reference, token_mask.shape, next_token_logprobs)
        rewards = sequence_logprobs(
            next_token_logprobs - reference, mask=token_mask, average=self.preference_average_log_probs
        )
        preference, metrics = _preference(rewards, sample_mask, global_valid_seqs, self.reference_policy_kl_penalty)
        loss, sft = self.preference_loss_weight * preference, torch.zeros_like(preference)
        if self.sft_loss_weight > 0:
            counted = sample_mask[::2] != 0
            nll = -sequence_logprobs(
                next_token_logprobs[::2], mask=token_mask[::2] & counted[:, None], average=self.sft_average_log_probs
            )
            weighted = nll * sample_mask[::2].to(nll.dtype)
            sft = _over(weighted.sum(), global_valid_seqs.to(nll.dtype).reshape(()) / 2)
            loss = loss + self.sft_loss_weight * sft
        return loss, _floats(
            {
                "loss": loss,
                "sft_loss": sft,
                "preference_loss": preference,
                **metrics,
                "num_valid_samples": sample_mask.sum() / 2,
            }
        )


class DistillationLossFn:
    """Top-k distillation from logits: :func:`pyalign.topk_distillation_loss`.

    Teacher and student are renormalised over the teacher's k entries; with ``zero_outside_topk`` the student keeps its
    whole vocabulary. A mixed KL is ``mixed_kl_weight`` of the forward and the rest of the reverse one, two reads.

    Args:
        cfg: an object with the attributes of NeMo-RL's ``DistillationLossConfig``: ``kl_type`` ("forward", "reverse",
            "mixed"), ``mixed_kl_weight``, ``zero_outside_topk`` (with "forward" alone).
        process_group: over which the vocabulary is split, as in :func:`pyalign.distillation_loss`.
    """

    def __init__(self, cfg: Any, *, process_group: Any = None) -> None:
        _checks.one_of("kl_type", cfg.kl_type, ("forward", "reverse", "mixed"))
        if cfg.zero_outside_topk and cfg.kl_type != "forward":
            _checks.refuse("zero_outside_topk", True, f"False with kl_type {cfg.kl_type!r}")
        wanted = "0 <= mixed_kl_weight <= 1"
        weight = _checks.number("mixed_kl_weight", cfg.mixed_kl_weight, wanted, lambda x: 0 <= x <= 1)
        self.kl_type, self.mixed_kl_weight, self.zero_outside_topk = cfg.kl_type, weight, bool(cfg.zero_outside_topk)
        self.process_group = process_group

    @property
    def loss_type(self) -> Any:
        """``LossType.TOKEN_LEVEL``."""
        return imported(*_INTERFACES).LossType.TOKEN_LEVEL

    @property
    def input_type(self) -> Any:
        """``LossInputType.LOGIT``."""
        return imported(*_INTERFACES).LossInputType.LOGIT

    def __call__(
        self,
        logits: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, (), and its metrics.

        Args:
            logits: (B, S, V) of the student, or this rank's slice of V; S or more positions.
            data: holds ``input_ids`` and ``token_mask`` (B, S), ``sample_mask`` (B,), ``teacher_topk_logits`` and
                ``teacher_topk_indices`` (B, S, k).
            global_valid_seqs: not read by a loss over tokens.
            global_valid_toks: 0-dim, the valid tokens of the global batch.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or kind.
        """
        _checks.floating("logits", logits, 3)
        length = data["teacher_topk_logits"].shape[1]
        if logits.shape[1] < length:
            wanted = f"at least {length} positions, the teacher's (whole sequences)"
            _checks.refuse("logits", f"shape {tuple(logits.shape)}", wanted)
        dtype = accumulation_dtype(logits.dtype)
        values = data["teacher_topk_logits"][:, :-1].to(logits.device, dtype)
        nothing = torch.full_like(values[..., 0], -math.inf) if self.zero_outside_topk else None
        teacher = TopKLogprobs(
            torch.log_softmax(values, -1), data["teacher_topk_indices"][:, :-1].to(logits.device), nothing
        )
        token_mask, sample_mask = data["token_mask"][:, 1:length], data["sample_mask"]
        weight = (token_mask * sample_mask[:, None]).to(dtype)
        options: dict[str, Any] = {
            "tail": "bucket" if self.zero_outside_topk else "renormalize",
            "mask": weight != 0,
            "weight": weight,
            "num_items": global_valid_toks.to(dtype).reshape(()),
            "process_group": self.process_group,
        }
        student, shares = logits[:, : length - 1], self._shares()
        losses = [share * topk_distillation_loss(student, teacher, divergence=x, **options) for x, share in shares]
        loss = losses[0] if len(losses) == 1 else losses[0] + losses[1]
        return loss, {"loss": loss.item(), "num_valid_samples": data["input_ids"].shape[0]}

    def _shares(self) -> list[tuple[str, float]]:
        """The divergences and their weights, without those that weigh nothing."""
        forward = {"forward": 1.0, "reverse": 0.0, "mixed": self.mixed_kl_weight}[self.kl_type]
        shares = [("forward_kl", forward), ("reverse_kl", 1.0 - forward)]
        return [(name, share) for name, share in shares if share > 0]
