"""OpenRLHF's losses over rewards, sequence log-probs and logits, under their names and signatures.

Fits ``openrlhf/models/loss.py`` of release 0.11.0 (commit 3c3be62): ``PairWiseLoss``, ``LogExpLoss``, ``DPOLoss``; and
of 0.9 (commit 0489850), before 0.10 dropped them, ``KDLoss`` and ``KTOLoss``. Trainers import them by name, so that
replacing the import is all::

    from pyalign.integrations.openrlhf import DPOLoss, LogExpLoss, PairWiseLoss  # instead of openrlhf.models

- **Layout.** Chosen and rejected come as two tensors of the same shape, one reward or log-prob per pair. Logits are
  (B, T, V) with labels (B, T).
- **Label shift.** Nobody shifts here, and OpenRLHF's KD trainer doesn't either: position t of the logits counts where
  label t is not -100.
- **Reduction.** Every loss is the mean over its pairs, samples or counted tokens; the mean of nothing is a
  differentiable 0, where theirs is NaN. Losses come back in float32 (float64 for float64).
- **Refused.** A margin for ``LogExpLoss``, label smoothing with ``ipo`` (OpenRLHF ignores both), tensors of differing
  shapes (OpenRLHF broadcasts them). ``VanillaKTOLoss`` is not here: it differentiates through its KL estimates, which
  :func:`pyalign.kto_loss` takes as a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyalign import _checks, distillation_loss, dpo_loss, kto_loss, pairwise_preference_loss, token_logprobs
from pyalign._types import accumulation_dtype
from pyalign.ranking import PreferenceOutput

__all__ = ["DPOLoss", "KDLoss", "KTOLoss", "LogExpLoss", "PairWiseLoss"]


def _rewards(chosen: Tensor, reject: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides as (P,)."""
    _checks.floating("chosen_reward", chosen, 0)
    _checks.floating("reject_reward", reject, 0)
    _checks.per_item("reject_reward", reject, chosen)
    return chosen.reshape(-1), reject.reshape(-1)


class PairWiseLoss(nn.Module):
    """softplus(-(chosen - reject - margin)), the mean over pairs: :func:`pyalign.pairwise_preference_loss`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | float | None = None) -> Tensor:
        """The loss, ().

        Args:
            chosen_reward, reject_reward: one reward per pair, of the same shape.
            margin: None, a number, or a tensor of that shape, floating or integer (as their dataset makes it).

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype; nothing is broadcast.
        """
        chosen, reject = _rewards(chosen_reward, reject_reward)
        if isinstance(margin, Tensor):
            _checks.per_item("margin", margin, chosen_reward)
            margin = margin.reshape(-1).to(accumulation_dtype(chosen.dtype))
        return pairwise_preference_loss(chosen, reject, margin=margin)


class LogExpLoss(nn.Module):
    """log(1 + e^(reject - chosen)), the mean over pairs, which doesn't overflow where theirs does.

    The same function as :class:`PairWiseLoss` without a margin.
    """

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: None = None) -> Tensor:
        """The loss, (); ``margin`` must be None: OpenRLHF's ``LogExpLoss`` has no use for one."""
        if margin is not None:
            _checks.refuse("margin", type(margin).__name__, "None: this loss has no margin, PairWiseLoss has")
        return pairwise_preference_loss(*_rewards(chosen_reward, reject_reward))


class DPOLoss(nn.Module):
    """DPO, conservative DPO (``label_smoothing``) or IPO over sequence log-probs: :func:`pyalign.dpo_loss`.

    Args:
        beta: > 0.
        label_smoothing: 0 <= e < 1; with ``ipo`` it must be 0.
        ipo: (h - 1 / (2 beta))^2 instead, h the difference of log-ratios.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        if ipo and label_smoothing != 0.0:
            _checks.refuse("label_smoothing", label_smoothing, "0 with ipo=True, which has none")
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> PreferenceOutput:
        """(loss, chosen_rewards, rejected_rewards) from four tensors (P,); the rewards are detached."""
        return dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            loss_type="ipo" if self.ipo else "sigmoid",
            label_smoothing=self.label_smoothing,
        )


class KTOLoss(nn.Module):
    """KTO for uneven sampling: :func:`pyalign.kto_loss` over chosen and rejected responses together.

    The KL estimate is the mean of ``policy_KL_logps - reference_KL_logps``, over processes too, and at least 0.

    Args:
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0, of the chosen and of the rejected.
        world_size: the processes whose estimates are averaged; torch.distributed must have as many. 1: nothing is
            communicated.
        device: where the average over processes is computed.
    """

    def __init__(
        self, beta: float, desirable_weight: float, undesirable_weight: float, world_size: int, device: torch.device
    ) -> None:
        super().__init__()
        if world_size != 1 and (not dist.is_initialized() or dist.get_world_size() != world_size):
            processes = dist.get_world_size() if dist.is_initialized() else "none, not initialised"
            _checks.refuse("world_size", world_size, f"1, or torch.distributed's processes ({processes})")
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight
        self.world_size, self.device = world_size, device

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        policy_KL_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_KL_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, chosen_rewards, rejected_rewards, KL): (), (C,), (R,), (). C or R may be 0.

        Raises:
            ValueError, TypeError: tensors of the wrong shape or dtype; nothing is broadcast.
        """
        _checks.scores("policy_KL_logps", policy_KL_logps)
        _checks.scores("reference_KL_logps", reference_KL_logps, policy_KL_logps)
        sides = (
            ("policy_chosen_logps", policy_chosen_logps, "reference_chosen_logps", reference_chosen_logps),
            ("policy_rejected_logps", policy_rejected_logps, "reference_rejected_logps", reference_rejected_logps),
        )
        for policy_name, policy, reference_name, reference in sides:
            _checks.scores(policy_name, policy)
            _checks.scores(reference_name, reference, policy)
        kl = (policy_KL_logps - reference_KL_logps).detach().mean().to(self.device)
        if self.world_size > 1:
            dist.all_reduce(kl, op=dist.ReduceOp.SUM)
        kl = (kl / self.world_size).clamp(min=0)
        policy = torch.cat([policy_chosen_logps, policy_rejected_logps])
        reference = torch.cat([reference_chosen_logps, reference_rejected_logps])
        chosen = policy_chosen_logps.shape[0]
        labels = torch.arange(policy.shape[0], device=policy.device) < chosen
        loss, rewards = kto_loss(
            policy,
            reference,
            labels,
            kl.to(policy.device),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return loss, rewards[:chosen], rewards[chosen:], kl


class KDLoss(nn.Module):
    """Cross-entropy between teacher and student, -sum p log q, the mean over tokens whose label is not -100.

    It is the forward KL plus the teacher's entropy, a constant: the gradient is that of
    :func:`pyalign.distillation_loss`. Where p > 0 meets q = 0 it is +inf (theirs leaves such entries out).

    Args:
        teacher_entropy: add the teacher's entropy, which takes one more read of its logits. False: the bare KL, with
            the same gradient.
    """

    def __init__(self, *, teacher_entropy: bool = True) -> None:
        super().__init__()
        self.IGNORE_INDEX = -100
        self.teacher_entropy = teacher_entropy

    def forward(self, logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Tensor:
        """The loss, (), from logits and teacher_logits (..., V) and labels (...), which are not shifted.

        Raises:
            ValueError, TypeError: tensors of the wrong shape or dtype.
        """
        options: dict[str, Any] = {"ignore_index": self.IGNORE_INDEX}
        loss = distillation_loss(logits, teacher_logits, labels=label, **options)
        if not self.teacher_entropy:
            return loss
        counted = label != self.IGNORE_INDEX
        first = torch.where(counted, 0, self.IGNORE_INDEX)  # any entry will do: the entropy alone is read
        _, entropy = token_logprobs(teacher_logits.detach(), first, return_entropy=True, **options)
        return loss + (entropy.sum() / counted.sum().clamp(min=1)).to(loss.dtype)
