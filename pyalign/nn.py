"""Modules that hold the options of a loss, for training loops that build their criterion once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyalign import distill
from pyalign.distill import TopKLogprobs

__all__ = ["DistillationLoss", "TopKDistillationLoss"]


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
        )

    def forward(self, student_logits: Tensor, teacher: TopKLogprobs, **tensors: Any) -> Any:
        """The loss; ``tensors`` are mask, labels, teacher_rows, weight, targets, num_items, return_metrics."""
        return distill.topk_distillation_loss(student_logits, teacher, **self.options, **tensors)
