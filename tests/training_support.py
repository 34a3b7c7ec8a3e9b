"""Small models with every loss on top: what the tests of whole training steps, on one rank or more, share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import pyalign

VOCAB, WIDTH, LENGTH, ANSWERS, UNITS = 13, 6, 5, 3, 9


class Batch(NamedTuple):
    """Units, each a prompt with K answers of T tokens."""

    ids: Tensor  # (U, K, T)
    labels: Tensor  # (U, K, T)
    mask: Tensor  # (U,) the pairs that count
    ranks: Tensor  # (U, K)
    teacher_hidden: Tensor  # (U, K, T, H)
    teacher_weight: Tensor  # (V, H)
    reference: Tensor  # (U, K) log-probs of the answers

    def units(self, begin: int, end: int) -> Batch:
        return Batch(*(x if name == "teacher_weight" else x[begin:end] for name, x in self._asdict().items()))

    @property
    def lengths(self) -> Tensor:
        """(U, K) of the answers, 1 at least."""
        return (self.labels != -100).sum(-1).clamp(min=1)

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.T


def batch(dtype: torch.dtype, silent: int = 0, seed: int = 3) -> Batch:
    """Nothing counts in the first ``silent`` units."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, VOCAB, (UNITS, ANSWERS, LENGTH), generator=g)
    labels = torch.randint(0, VOCAB, (UNITS, ANSWERS, LENGTH), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.4] = -100
    labels[:silent] = -100
    mask = torch.arange(UNITS) % 4 != 1
    mask[:silent] = False
    ranks = torch.randint(0, 3, (UNITS, ANSWERS), generator=g)
    ranks[:silent] = -1
    hidden = normal(UNITS, ANSWERS, LENGTH, WIDTH)
    return Batch(ids, labels, mask, ranks, hidden, normal(VOCAB, WIDTH), normal(UNITS, ANSWERS))


def tensors_to(x: Batch, dtype: torch.dtype) -> Batch:
    return Batch(*(y.to(dtype) if y.is_floating_point() else y for y in x))


class Model(nn.Module):
    """A language model without attention, or a reward model. It returns what its losses read."""

    def __init__(self, reads: str, dtype: torch.dtype, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.reads = reads
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head: nn.Linear = pyalign.nn.RewardHead(WIDTH) if reads == "scores" else nn.Linear(WIDTH, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight
        self.double().to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        if self.reads == "hidden":
            return hidden
        if self.reads == "logits":
            return self.head(hidden)
        return self.head(hidden.flatten(0, 1)).view(ids.shape[:-1])


class Loss(NamedTuple):
    reads: str  # of the model: "hidden", "logits" or "scores"
    function: Callable[[Tensor, Any, Batch, Tensor | None], Tensor]  # (output, head, batch, num_items)
    count: Callable[[Batch], Tensor]  # of the items that the mean is over


def counted_tokens(x: Batch) -> Tensor:
    return (x.labels != -100).sum()


def counted_pairs(x: Batch) -> Tensor:
    return x.mask.sum()


def better(x: Batch) -> Tensor:
    """(U, K, K), whether i is ranked above j."""
    return (x.ranks[:, :, None] < x.ranks[:, None, :]) & (x.ranks[:, :, None] >= 0)


def ranked_pairs(x: Batch) -> Tensor:
    return better(x).sum()


def groups(x: Batch) -> Tensor:
    return better(x).any((1, 2)).sum()


def distillation(logits: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    criterion = pyalign.nn.DistillationLoss(divergence="jsd", temperature=2.0)
    return criterion(logits, x.teacher_logits, labels=x.labels, num_items=n)


def topk_distillation(logits: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    stored = pyalign.topk_logprobs(x.teacher_logits, 4)
    return pyalign.topk_distillation_loss(logits, stored, labels=x.labels, num_items=n)


def linear_distillation(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    criterion = pyalign.nn.LinearDistillationLoss(student_softcap=3.0)
    arguments = (hidden, head.weight, x.teacher_hidden, x.teacher_weight)
    return criterion(*arguments, student_bias=head.bias, labels=x.labels, num_items=n)


def linear_topk_distillation(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    stored = pyalign.topk_logprobs(x.teacher_logits, 4)
    return pyalign.linear_topk_distillation_loss(
        hidden, head.weight, stored, student_bias=head.bias, labels=x.labels, num_items=n
    )


def linear_cross_entropy(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    return pyalign.linear_cross_entropy(
        hidden, head.weight, x.labels, bias=head.bias, z_loss=0.1, label_smoothing=0.1, num_items=n
    )


def policy_gradient(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    """Each token's log-prob times its own advantage, with an entropy bonus."""
    advantage = x.teacher_hidden[..., 0]
    logprobs, entropy = pyalign.linear_token_logprobs(
        hidden, head.weight, x.labels, bias=head.bias, return_entropy=True
    )
    return -(logprobs * advantage + 0.1 * entropy).sum() / (counted_tokens(x) if n is None else n)


def imitation(logits: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    return -pyalign.token_logprobs(logits, x.labels).sum() / (counted_tokens(x) if n is None else n)


def pairwise(scores: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    return pyalign.pairwise_preference_loss(scores[:, 0], scores[:, 1], margin=0.2, mask=x.mask, num_items=n)


def ranked(scores: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    return pyalign.ranked_preference_loss(scores, x.ranks, num_items=n)


def plackett_luce(scores: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    return pyalign.ranked_preference_loss(scores, x.ranks, method="plackett_luce", num_items=n)


def sequences(hidden: Tensor, head: Any, x: Batch) -> Tensor:
    """(U, K) log-probs of the answers."""
    logprobs = pyalign.linear_token_logprobs(hidden, head.weight, x.labels, bias=head.bias)
    return pyalign.sequence_logprobs(logprobs.flatten(0, 1)).view(-1, ANSWERS)


def dpo(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    chosen, rejected, _ = sequences(hidden, head, x).unbind(1)
    output = pyalign.dpo_loss(chosen, rejected, x.reference[:, 0], x.reference[:, 1], mask=x.mask, num_items=n)
    return output.loss


def cpo(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    chosen, rejected, other = sequences(hidden, head, x).unbind(1)
    output = pyalign.cpo_loss(chosen, rejected, chosen_nll=-other, nll_weight=0.2, mask=x.mask, num_items=n)
    return output.loss


def simpo(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    chosen, rejected, _ = sequences(hidden, head, x).unbind(1)
    lengths = {"chosen_lengths": x.lengths[:, 0], "rejected_lengths": x.lengths[:, 1]}
    return pyalign.simpo_loss(chosen, rejected, **lengths, mask=x.mask, num_items=n).loss


def orpo(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    chosen, rejected, _ = sequences(hidden, head, x).unbind(1)
    lengths = {"chosen_lengths": x.lengths[:, 0], "rejected_lengths": x.lengths[:, 1]}
    return pyalign.orpo_loss(chosen, rejected, **lengths, lambda_=0.5, mask=x.mask, num_items=n).loss


def kto(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    kl = torch.full((), 0.25, dtype=hidden.dtype, device=hidden.device)
    policy = sequences(hidden, head, x)[:, 0]
    return pyalign.kto_loss(policy, x.reference[:, 0], x.ids[:, 0, 0] > 5, kl, mask=x.mask, num_items=n).loss


def discrimination(scores: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    return pyalign.binary_discrimination_loss(scores[:, 0], x.ids[:, 0, 0] > 5, mask=x.mask, num_items=n)


def win_rates(scores: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    """Of the first answer, from the matrix and from its means."""
    first = pyalign.win_probabilities(scores)[:, 0].sum(1) + pyalign.expected_win_rates(scores)[:, 0]
    return -torch.where(x.mask, first, 0.0).sum() / (counted_pairs(x) if n is None else n)


LOSSES = {
    "distillation": Loss("logits", distillation, counted_tokens),
    "topk_distillation": Loss("logits", topk_distillation, counted_tokens),
    "linear_distillation": Loss("hidden", linear_distillation, counted_tokens),
    "linear_topk_distillation": Loss("hidden", linear_topk_distillation, counted_tokens),
    "linear_cross_entropy": Loss("hidden", linear_cross_entropy, counted_tokens),
    "policy_gradient": Loss("hidden", policy_gradient, counted_tokens),
    "imitation": Loss("logits", imitation, counted_tokens),
    "pairwise": Loss("scores", pairwise, counted_pairs),
    "ranked": Loss("scores", ranked, ranked_pairs),
    "plackett_luce": Loss("scores", plackett_luce, groups),
    "discrimination": Loss("scores", discrimination, counted_pairs),
    "win_rates": Loss("scores", win_rates, counted_pairs),
    "dpo": Loss("hidden", dpo, counted_pairs),
    "cpo": Loss("hidden", cpo, counted_pairs),
    "simpo": Loss("hidden", simpo, counted_pairs),
    "orpo": Loss("hidden", orpo, counted_pairs),
    "kto": Loss("hidden", kto, counted_pairs),
}


class Step(nn.Module):
    """Model and loss as one module, so that the wrapper's own hooks see the head."""

    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.model, self.loss = model, LOSSES[name].function

    def forward(self, x: Batch, n: Tensor | None) -> Tensor:
        return self.loss(self.model(x.ids), self.model.head, x, n)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of parameters by name, whole."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found
