"""Data-parallel training: whatever the ranks' share of the batch, their gradients are those of one process.

Each rank takes W * mean(..., num_items=N) of its own tokens (pairs, groups), N counted over the W ranks; DDP and FSDP2
average gradients over ranks. What is compared with is the plain mean over the whole batch, in one process, in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from distributed_support import Pool, WorkerError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import pyalign
from pyalign import _linear
from pyalign.distributed import global_num_items

GetPool = Callable[[int], Pool]
VOCAB, WIDTH, LENGTH, ANSWERS, UNITS = 13, 6, 5, 3, 9
SHARES = {2: (2, 7), 3: (1, 5, 3)}  # of the units, by rank


class Batch(NamedTuple):
    """Units that ranks share out: each a prompt with K answers of T tokens."""

    ids: Tensor  # (U, K, T)
    labels: Tensor  # (U, K, T)
    mask: Tensor  # (U,) the pairs that count
    ranks: Tensor  # (U, K)
    teacher_hidden: Tensor  # (U, K, T, H)
    teacher_weight: Tensor  # (V, H)
    reference: Tensor  # (U, K) log-probs of the answers

    def units(self, begin: int, end: int) -> Batch:
        return Batch(*(x if name == "teacher_weight" else x[begin:end] for name, x in self._asdict().items()))

    def of_rank(self) -> Batch:
        shares, rank = SHARES[dist.get_world_size()], dist.get_rank()
        begin = sum(shares[:rank])
        return self.units(begin, begin + shares[rank])

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.T


def batch(dtype: torch.dtype, silent: int = 0) -> Batch:
    """Nothing counts in the first ``silent`` units."""
    g = torch.Generator().manual_seed(3)

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


def ranked_pairs(x: Batch) -> Tensor:
    better = (x.ranks[:, :, None] < x.ranks[:, None, :]) & (x.ranks[:, :, None] >= 0)
    return better.sum()


def groups(x: Batch) -> Tensor:
    return (x.ranks[:, :, None] < x.ranks[:, None, :]).any((1, 2)).sum()


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


def dpo(hidden: Tensor, head: Any, x: Batch, n: Tensor | None) -> Tensor:
    logprobs = pyalign.linear_token_logprobs(hidden, head.weight, x.labels, bias=head.bias)
    chosen, rejected = pyalign.sequence_logprobs(logprobs[:, :2].flatten(0, 1)).view(-1, 2).unbind(1)
    output = pyalign.dpo_loss(chosen, rejected, x.reference[:, 0], x.reference[:, 1], mask=x.mask, num_items=n)
    return output.loss


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
    "dpo": Loss("hidden", dpo, counted_pairs),
}
LINEAR = tuple(name for name, loss in LOSSES.items() if loss.reads == "hidden")
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6}


class Step(nn.Module):
    """Model and loss as one module, so that the wrapper's own hooks see the head."""

    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.model, self.loss = model, LOSSES[name].function

    def forward(self, x: Batch, n: Tensor | None) -> Tensor:
        return self.loss(self.model(x.ids), self.model.head, x, n)


def outside(model: Any, head: Callable[[], Any], name: str) -> Callable[[Batch, Tensor | None], Tensor]:
    """The step of a loss that is called after the model's forward, on the head that it then has."""

    def step(x: Batch, n: Tensor | None) -> Tensor:
        output = model(x.ids)
        return LOSSES[name].function(output, head(), x, n)

    return step


def shard(model: Model) -> Model:
    """FSDP2 with the embedding and the head apart, as trainers do it."""
    if model.embedding.weight is model.head.weight:
        fully_shard([model.embedding, model.head])
    else:
        fully_shard(model.embedding)
        fully_shard(model.head)
    return fully_shard(model)


def wrap(wrapper: str, model: Model, name: str) -> Callable[[Batch, Tensor | None], Tensor]:
    if wrapper == "ddp":
        return outside(DistributedDataParallel(model), lambda: model.head, name)
    if wrapper == "ddp, loss inside":
        return DistributedDataParallel(Step(model, name))
    if wrapper == "fsdp":
        return outside(shard(model), lambda: model.head, name)
    if wrapper == "fsdp, head of the root":
        return outside(fully_shard(model), lambda: model.head, name)
    if wrapper == "fsdp, loss inside":
        step = Step(model, name)
        return fully_shard(step)
    raise ValueError(wrapper)


WRAPPERS = ("ddp", "ddp, loss inside", "fsdp", "fsdp, head of the root", "fsdp, loss inside")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of parameters by name, whole."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def rank_gradients(wrapper: str, name: str, dtype: torch.dtype, tied: bool, silent: int) -> Any:
    """The mean loss over ranks, and the gradients that this rank ends up with."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # as nn.Linear does
    x = batch(dtype, silent).of_rank()
    model = Model(LOSSES[name].reads, dtype, tied)
    step = wrap(wrapper, model, name)
    size = dist.get_world_size()
    loss = size * step(x, global_num_items(LOSSES[name].count(x)))
    loss.backward()
    total = loss.detach() / size
    dist.all_reduce(total)
    return total, gradients(model)


def one_process(name: str, tied: bool = False, silent: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the whole batch, in float64 and plain torch."""
    model = Model(LOSSES[name].reads, torch.float64, tied)
    with pyalign.backend("reference"):
        loss = Step(model, name)(batch(torch.float64, silent), None)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name].double(), x, rtol=0, atol=bound * float(x.abs().max()), msg=name)


def compare(pool: Pool, wrapper: str, name: str, tied: bool = False, silent: int = 0) -> None:
    expected, theirs = one_process(name, tied, silent)
    assert float(expected) != 0
    for dtype, bound in DTYPES.items():
        for loss, ours in pool.run(rank_gradients, wrapper, name, dtype, tied, silent):
            torch.testing.assert_close(loss.double(), expected, rtol=bound, atol=0)
            assert_same(ours, theirs, 8 * bound)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_ragged_ranks_are_those_of_one_process(pool: GetPool, wrapper: str, name: str, size: int):
    compare(pool(size), wrapper, name)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_rank_on_which_nothing_counts_takes_part(pool: GetPool, wrapper: str, name: str):
    compare(pool(2), wrapper, name, silent=SHARES[2][0])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_tied_embeddings_get_both_gradients(pool: GetPool, wrapper: str):
    compare(pool(2), wrapper, "linear_cross_entropy", tied=True)
