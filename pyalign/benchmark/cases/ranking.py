"""Preference losses over pairs and groups of scores: bound by calls, or by arithmetic."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import binary_discrimination_loss, dpo_loss, pairwise_preference_loss, ranked_preference_loss
from pyalign.benchmark.case import Case, Draw, Inputs, Shape, Work, widened


def cases(device: torch.device) -> list[Case]:
    return [*pairs(), *binary(), *dpo(), *all_pairs(), *one_large_group(), *ragged_groups()]


# ---- Pairs ----


def _make_pairs(names: tuple[str, ...], shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    return {name: draw.normal(shape["pairs"], dtype=dtype) for name in names}


def torch_pairs(x: Inputs) -> Tensor:
    return -F.logsigmoid(widened(x["chosen"]) - widened(x["rejected"])).mean()


def _our_pairs(x: Inputs) -> Tensor:
    return pairwise_preference_loss(x["chosen"], x["rejected"])


def _pair_work(case: Case) -> Work:
    """Both scores read, both gradients written; a difference, exp, log and the sigmoid of the gradient."""
    return Work(4 * case.elements() * case.dtype.itemsize, 8 * case.elements())


def pairs() -> list[Case]:
    """A few thousand pairs are mostly the overhead of calls: one Python Function against four of torch's own."""
    return [
        Case(
            system="ranking", op="pairwise_preference_loss", variant="", shape={"pairs": count}, dtype=dtype,
            leaves=("chosen", "rejected"), make=functools.partial(_make_pairs, ("chosen", "rejected")),
            ours=_our_pairs, eager={"eager": torch_pairs}, work=_pair_work, checked_at={}, tiny={"pairs": 64},
            bound="calls", quick={} if dtype == torch.float32 else None,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for count in (4096, 65536)
    ]  # fmt: skip


def _make_labelled(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    return {"scores": draw.normal(shape["samples"], dtype=dtype), "labels": draw.integers(0, 2, shape["samples"])}


def torch_binary(x: Inputs) -> Tensor:
    scores = widened(x["scores"])
    return F.binary_cross_entropy_with_logits(scores, x["labels"].to(scores.dtype))


def _our_binary(x: Inputs) -> Tensor:
    return binary_discrimination_loss(x["scores"], x["labels"])


def binary() -> list[Case]:
    return [
        Case(
            system="ranking", op="binary_discrimination_loss", variant="", shape={"samples": 4096},
            dtype=torch.float32, leaves=("scores",), make=_make_labelled, ours=_our_binary,
            eager={"eager": torch_binary},
            # scores and labels read, the gradient written
            work=lambda case: Work(case.elements() * (2 * case.dtype.itemsize + 8), 8 * case.elements()),
            checked_at={}, tiny={"samples": 64}, bound="calls", quick={},
        )
    ]  # fmt: skip


POLICY = ("policy_chosen", "policy_rejected")
REFERENCE = ("reference_chosen", "reference_rejected")


def torch_dpo(x: Inputs) -> Tensor:
    chosen, rejected = (widened(x[p]) - widened(x[r]) for p, r in zip(POLICY, REFERENCE, strict=True))
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _our_dpo(x: Inputs) -> Tensor:
    return dpo_loss(*(x[name] for name in (*POLICY, *REFERENCE)), beta=0.1).loss


def dpo() -> list[Case]:
    return [
        Case(
            system="ranking", op="dpo_loss", variant="", shape={"pairs": 4096}, dtype=torch.float32, leaves=POLICY,
            make=functools.partial(_make_pairs, (*POLICY, *REFERENCE)), ours=_our_dpo, eager={"eager": torch_dpo},
            # four log-probs read, two gradients and two rewards written
            work=lambda case: Work(8 * case.elements() * case.dtype.itemsize, 12 * case.elements()),
            checked_at={}, tiny={"pairs": 64}, bound="calls", quick={},
        )
    ]  # fmt: skip


# ---- Groups of one size ----


def _make_groups(shuffled: bool, shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    """Ranks, and both of torch's ways to all pairs: the K x K matrix under a mask, and the pairs picked by index."""
    groups, size = shape["groups"], shape["size"]
    order = draw.normal(size).argsort() if shuffled else torch.arange(size, device=draw.device)
    ranks = order.expand(groups, size).contiguous()
    made = {"scores": draw.normal(groups, size, dtype=dtype), "ranks": ranks}
    made["wins"] = order[:, None] < order[None, :]
    if not shuffled:
        made["winners"], made["losers"] = torch.triu_indices(size, size, 1, device=draw.device)
    return made


def full_matrix(x: Inputs) -> Tensor:
    scores = widened(x["scores"])
    gaps = scores[:, :, None] - scores[:, None, :]
    return (F.softplus(-gaps) * x["wins"]).sum() / (x["wins"].sum() * scores.shape[0])


def picked_pairs(x: Inputs) -> Tensor:
    scores = widened(x["scores"])
    return F.softplus(scores[:, x["losers"]] - scores[:, x["winners"]]).mean()


def sorted_plackett_luce(x: Inputs) -> Tensor:
    """A running log-sum-exp over each group from its last entry to its first."""
    scores = widened(x["scores"]).gather(1, x["ranks"].argsort(1)).flip(1)
    return (torch.logcumsumexp(scores, 1) - scores)[:, 1:].sum(1).mean()


def _our_ranking(method: str, x: Inputs) -> Tensor:
    return ranked_preference_loss(x["scores"], x["ranks"], method=method)


def _group_work(case: Case) -> Work:
    """Scores and ranks read, the gradient written; of every pair a difference, exp, log and two sums of gradients."""
    item, size = case.dtype.itemsize, case.shape["size"]
    terms = case.shape["groups"] * (size * (size - 1) // 2 if case.variant == "pairwise" else size)
    return Work(case.elements() * (2 * item + 8), 8 * terms)


def all_pairs() -> list[Case]:
    return [
        Case(
            system="ranking", op="ranked_preference_loss", variant="pairwise", shape={"groups": 4096, "size": 16},
            dtype=torch.float32, leaves=("scores",), make=functools.partial(_make_groups, False),
            ours=functools.partial(_our_ranking, "pairwise"),
            eager={"eager full matrix": full_matrix, "eager picked pairs": picked_pairs}, work=_group_work,
            checked_at={}, tiny={"groups": 16}, bound="calls", quick={},
        )
    ]  # fmt: skip


def one_large_group() -> list[Case]:
    """K = 4096: the K x K matrix would be 64 MB in float32, several times over in torch."""
    return [
        Case(
            system="ranking", op="ranked_preference_loss", variant=method, shape={"groups": 1, "size": 4096},
            dtype=torch.float32, leaves=("scores",), make=functools.partial(_make_groups, True),
            ours=functools.partial(_our_ranking, method), eager={"eager": eager}, work=_group_work,
            checked_at={"size": 512}, tiny={"size": 64}, bound="calls", quick={"size": 1024},
        )
        for method, eager in (("pairwise", full_matrix), ("plackett_luce", sorted_plackett_luce))
    ]  # fmt: skip


# ---- Ragged groups ----


def _make_ragged(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    sizes = draw.integers(2, 17, shape["groups"])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    count = int(offsets[-1])
    ranks = torch.arange(count, device=draw.device) - offsets[:-1].repeat_interleave(sizes)
    return {"scores": draw.normal(count, dtype=dtype), "ranks": ranks, "offsets": offsets}


def python_loop(x: Inputs) -> Tensor:
    """Ranks ascend within each group."""
    scores = widened(x["scores"])
    total, count = scores.new_zeros(()), 0
    for begin, end in itertools.pairwise(x["offsets"].tolist()):
        group = scores[begin:end]
        gaps = group[:, None] - group
        pairs = torch.triu(torch.ones_like(gaps), 1)
        total, count = total + (F.softplus(-gaps) * pairs).sum(), count + gaps.numel() - group.numel()
    return total / (count / 2)


def _our_ragged(x: Inputs) -> Tensor:
    return ranked_preference_loss(x["scores"], x["ranks"], x["offsets"])


def ragged_groups() -> list[Case]:
    """Groups of 2 to 16."""
    return [
        Case(
            system="ranking", op="ranked_preference_loss", variant="ragged", shape={"groups": 10_000},
            dtype=torch.float32, leaves=("scores",), make=_make_ragged, ours=_our_ragged,
            eager={"python loop": python_loop},
            # a group holds 9 scores and 45 pairs on average
            work=lambda case: Work(case.elements() * (9 * (2 * case.dtype.itemsize + 8) + 8), 8 * 45 * case.elements()),
            checked_at={"groups": 50}, tiny={"groups": 50}, bound="calls", quick={"groups": 1000}, compiled=False,
        )
    ]  # fmt: skip
