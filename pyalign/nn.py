"""Modules that hold the options of a loss, for training loops that build their criterion once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyalign import distill, logprob, ranking, scoring
from pyalign.distill import TopKLogprobs
from pyalign.ranking import LabelledOutput, PreferenceOutput

__all__ = [
    "BinaryDiscriminationLoss",
    "CPOLoss",
    "DPOLoss",
    "DistillationLoss",
    "KTOLoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "LinearTokenLogprobs",
    "LinearTopKDistillationLoss",
    "ORPOLoss",
    "PairwisePreferenceLoss",
    "RankedPreferenceLoss",
    "RewardHead",
    "SimPOLoss",
    "TokenLogprobs",
    "TopKDistillationLoss",
]


class _LossModule(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillationLoss(_LossModule):
    """:func:`pyalign.distill.distillation_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = DistillationLoss(divergence="jsd", temperature=2.0)
    >>> loss = criterion(student_logits, teacher_logits, labels=labels)
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            temperature_squared=temperature_squared,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
            inplace=inplace,
            process_group=process_group,
        )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, **tensors: Any) -> Any:
        """The loss; ``tensors`` are mask, labels, teacher_rows, weight, targets, num_items, return_metrics."""
        return distill.distillation_loss(student_logits, teacher_logits, **self.options, **tensors)


class TopKDistillationLoss(_LossModule):
    """:func:`pyalign.distill.topk_distillation_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = TopKDistillationLoss(tail="bucket")
    >>> loss = criterion(student_logits, topk_logprobs(teacher_logits, k=50), mask=mask)
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        tail: str = "bucket",
        beta: float = 0.5,
        temperature_squared: bool = False,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            divergence=divergence,
            tail=tail,
            beta=beta,
            temperature_squared=temperature_squared,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
            inplace=inplace,
            process_group=process_group,
        )

    def forward(self, student_logits: Tensor, teacher: TopKLogprobs, **tensors: Any) -> Any:
        """The loss; ``tensors`` are mask, labels, teacher_rows, weight, targets, num_items, return_metrics."""
        return distill.topk_distillation_loss(student_logits, teacher, **self.options, **tensors)


class TokenLogprobs(_LossModule):
    """:func:`pyalign.logprob.token_logprobs` with its options fixed.

    >>> logprobs_of = TokenLogprobs(temperature=0.7)
    >>> policy, reference = logprobs_of(policy_logits, targets), logprobs_of(reference_logits, targets)
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        return_entropy: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            return_entropy=return_entropy,
            process_group=process_group,
        )

    def forward(self, logits: Tensor, targets: Tensor) -> Any:
        """Log-probs (...) or, with ``return_entropy``, a pair with the entropies."""
        return logprob.token_logprobs(logits, targets, **self.options)


class LinearDistillationLoss(_LossModule):
    """:func:`pyalign.distill.linear_distillation_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = LinearDistillationLoss(divergence="jsd", student_softcap=30.0)
    >>> loss = criterion(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight, labels=labels)
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        logits_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            temperature_squared=temperature_squared,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            process_group=process_group,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        **tensors: Any,
    ) -> Any:
        """The loss; ``tensors`` are student_bias, teacher_bias, mask, labels, teacher_rows, weight, targets, num_items,
        num_valid, return_metrics."""
        return distill.linear_distillation_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **self.options, **tensors
        )


class LinearTopKDistillationLoss(_LossModule):
    """:func:`pyalign.distill.linear_topk_distillation_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = LinearTopKDistillationLoss(tail="bucket")
    >>> loss = criterion(hidden, model.lm_head.weight, stored, mask=mask)
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        tail: str = "bucket",
        beta: float = 0.5,
        temperature_squared: bool = False,
        student_softcap: float | None = None,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        logits_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            divergence=divergence,
            tail=tail,
            beta=beta,
            temperature_squared=temperature_squared,
            student_softcap=student_softcap,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            process_group=process_group,
        )

    def forward(self, student_hidden: Tensor, student_weight: Tensor, teacher: TopKLogprobs, **tensors: Any) -> Any:
        """The loss; ``tensors`` are student_bias, mask, labels, teacher_rows, weight, targets, num_items, num_valid,
        return_metrics."""
        return distill.linear_topk_distillation_loss(student_hidden, student_weight, teacher, **self.options, **tensors)


class LinearCrossEntropyLoss(_LossModule):
    """:func:`pyalign.logprob.linear_cross_entropy` with its options fixed; tensors are given to ``forward``.

    >>> criterion = LinearCrossEntropyLoss(label_smoothing=0.1)
    >>> loss = criterion(hidden, model.lm_head.weight, targets)
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
        logits_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            process_group=process_group,
        )

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **tensors: Any) -> Tensor:
        """The loss; ``tensors`` are bias, num_items, num_valid."""
        return logprob.linear_cross_entropy(hidden, weight, targets, **self.options, **tensors)


class LinearTokenLogprobs(_LossModule):
    """:func:`pyalign.logprob.linear_token_logprobs` with its options fixed; tensors are given to ``forward``.

    >>> logprobs_of = LinearTokenLogprobs()
    >>> policy = sequence_logprobs(logprobs_of(hidden, model.lm_head.weight, targets), mask=targets != -100)
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        return_entropy: bool = False,
        logits_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            return_entropy=return_entropy,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            process_group=process_group,
        )

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **tensors: Any) -> Any:
        """Log-probs (...) or, with ``return_entropy``, a pair with the entropies; ``tensors`` are bias, num_valid."""
        return logprob.linear_token_logprobs(hidden, weight, targets, **self.options, **tensors)


class PairwisePreferenceLoss(_LossModule):
    """:func:`pyalign.ranking.pairwise_preference_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = PairwisePreferenceLoss(center_coefficient=0.01)
    >>> loss = criterion(chosen, rejected, margin=margin)
    """

    def __init__(
        self,
        *,
        loss_type: str = "logistic",
        scale: float = 1.0,
        label_smoothing: float = 0.0,
        center_coefficient: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            loss_type=loss_type,
            scale=scale,
            label_smoothing=label_smoothing,
            center_coefficient=center_coefficient,
            reduction=reduction,
        )

    def forward(self, chosen: Tensor, rejected: Tensor, **tensors: Any) -> Tensor:
        """The loss; ``tensors`` are margin, weight, mask, num_items."""
        return ranking.pairwise_preference_loss(chosen, rejected, **self.options, **tensors)


class RankedPreferenceLoss(_LossModule):
    """:func:`pyalign.ranking.ranked_preference_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = RankedPreferenceLoss(method="plackett_luce")
    >>> loss = criterion(scores, ranks, group_offsets)
    """

    def __init__(
        self,
        *,
        method: str = "pairwise",
        margin: float | None = None,
        scale: float = 1.0,
        label_smoothing: float = 0.0,
        ties: str = "breslow",
        group_reduction: str | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            method=method,
            margin=margin,
            scale=scale,
            label_smoothing=label_smoothing,
            ties=ties,
            group_reduction=group_reduction,
            reduction=reduction,
        )

    def forward(self, scores: Tensor, ranks: Tensor, group_offsets: Tensor | None = None, **tensors: Any) -> Tensor:
        """The loss; ``tensors`` is num_items."""
        return ranking.ranked_preference_loss(scores, ranks, group_offsets, **self.options, **tensors)


class BinaryDiscriminationLoss(_LossModule):
    """:func:`pyalign.ranking.binary_discrimination_loss` with its options fixed; tensors are given to ``forward``.

    >>> loss = BinaryDiscriminationLoss()(scores, labels)
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            reduction=reduction,
        )

    def forward(self, scores: Tensor, labels: Tensor, **tensors: Any) -> Tensor:
        """The loss; ``tensors`` are weight, mask, num_items."""
        return ranking.binary_discrimination_loss(scores, labels, **self.options, **tensors)


class DPOLoss(_LossModule):
    """:func:`pyalign.ranking.dpo_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = DPOLoss(beta=0.1, loss_type="sigmoid")
    >>> loss, chosen_rewards, rejected_rewards = criterion(chosen, rejected, reference_chosen, reference_rejected)
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        bco_delta: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            bco_delta=bco_delta,
            reduction=reduction,
        )

    def forward(
        self, policy_chosen: Tensor, policy_rejected: Tensor, *references: Tensor, **tensors: Any
    ) -> PreferenceOutput:
        """The loss and rewards; ``references`` are both sides' or none, ``tensors`` are mask, num_items."""
        return ranking.dpo_loss(policy_chosen, policy_rejected, *references, **self.options, **tensors)


class CPOLoss(_LossModule):
    """:func:`pyalign.ranking.cpo_loss` with its options fixed; tensors are given to ``forward``.

    >>> loss = CPOLoss(beta=0.1)(policy_chosen, policy_rejected, chosen_nll=nll).loss
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def forward(self, policy_chosen: Tensor, policy_rejected: Tensor, **tensors: Any) -> PreferenceOutput:
        """The loss and rewards; ``tensors`` are chosen_nll, nll_weight, mask, num_items."""
        return ranking.cpo_loss(policy_chosen, policy_rejected, **self.options, **tensors)


class SimPOLoss(_LossModule):
    """:func:`pyalign.ranking.simpo_loss` with its options fixed; tensors are given to ``forward``.

    >>> criterion = SimPOLoss(beta=2.0, gamma=1.0)
    >>> loss = criterion(chosen_sums, rejected_sums, chosen_lengths=n, rejected_lengths=m).loss
    """

    def __init__(
        self,
        *,
        beta: float = 2.0,
        gamma: float = 0.5,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            beta=beta,
            gamma=gamma,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def forward(self, policy_chosen: Tensor, policy_rejected: Tensor, **tensors: Any) -> PreferenceOutput:
        """The loss and rewards; ``tensors`` are the lengths, chosen_nll, nll_weight, mask, num_items."""
        return ranking.simpo_loss(policy_chosen, policy_rejected, **self.options, **tensors)


class ORPOLoss(_LossModule):
    """:func:`pyalign.ranking.orpo_loss` with its options fixed; tensors are given to ``forward``.

    >>> loss = ORPOLoss(lambda_=0.1)(mean_chosen, mean_rejected, chosen_nll=nll).loss
    """

    def __init__(
        self,
        *,
        lambda_: float = 0.1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            lambda_=lambda_,
            reduction=reduction,
        )

    def forward(self, policy_chosen: Tensor, policy_rejected: Tensor, **tensors: Any) -> PreferenceOutput:
        """The loss and rewards; ``tensors`` are the lengths, chosen_nll, nll_weight, mask, num_items."""
        return ranking.orpo_loss(policy_chosen, policy_rejected, **self.options, **tensors)


class KTOLoss(_LossModule):
    """:func:`pyalign.ranking.kto_loss` with its options fixed; tensors are given to ``forward``.

    >>> loss = KTOLoss(undesirable_weight=1.33)(policy_logps, reference_logps, labels, kl).loss
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reduction=reduction,
        )

    def forward(
        self, policy_logps: Tensor, reference_logps: Tensor | None, labels: Tensor, kl: float | Tensor, **tensors: Any
    ) -> LabelledOutput:
        """The loss and rewards; ``tensors`` are mask, num_items."""
        return ranking.kto_loss(policy_logps, reference_logps, labels, kl, **self.options, **tensors)


class RewardHead(nn.Linear):
    """:func:`pyalign.scoring.reward_scores` with a head of its own: the scores of sequences from their hidden states.

    An ``nn.Linear(hidden_size, heads)``, with its initialisation and the names of its parameters, so that the ``score``
    layer of a sequence classifier loads into it.

    >>> head = RewardHead(model.config.hidden_size)
    >>> scores = head(model(input_ids, attention_mask=mask).last_hidden_state, mask=mask)  # (B,)

    Args:
        hidden_size: H.
        heads: how many scores a sequence has; of one head, ``forward`` gives (B,), else (B, heads).
        bias: whether to add one; differences of scores don't depend on it.
        device, dtype: of the parameters; float32 is usual also for hidden states of 16 bits.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int = 1,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, heads, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, *, offsets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Scores of hidden (B, S, H), with a mask or without, or of packed (T, H) with offsets."""
        bias: Tensor | None = self.bias
        scores = scoring.reward_scores(hidden, self.weight, head_bias=bias, offsets=offsets, mask=mask)
        return scores.squeeze(1) if self.out_features == 1 else scores
