"""Preference losses in plain torch: closed forms over pairs, labelled scores and groups."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign._types import PairOptions, PairTensors, RankOptions, RankTensors, accumulation_dtype, pair_options


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), which torch's own rounds to x above 20."""
    return -F.logsigmoid(-x)


def margin_form(z: Tensor, options: PairOptions) -> Tensor | None:
    """The losses that depend on z = scale * (chosen - rejected) - margin alone; None for the others."""
    e, kind = options.label_smoothing, options.form
    if kind == "logistic":
        return (1 - e) * softplus(-z) + e * softplus(z) if e else softplus(-z)
    if kind == "hinge":
        return torch.relu(1 - z)
    if kind == "exponential":
        return torch.exp(-z)
    if kind == "robust":
        return ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e) if e else softplus(-z)
    if kind == "exo_pair":
        q, other = torch.sigmoid(z), torch.sigmoid(-z)
        return q * (F.logsigmoid(z) - math.log1p(-e)) + other * (F.logsigmoid(-z) - math.log(e))
    if kind == "discopop":
        mix = z / options.tau
        return softplus(-z) * torch.sigmoid(-mix) + torch.exp(F.logsigmoid(mix) - z)
    return None


def item_form(first: Tensor, second: Tensor | None, margin: Tensor | float, options: PairOptions) -> Tensor:
    """The loss of each item (N,); ``second`` holds the labels of the forms that take one score."""
    scale, kind = options.scale, options.form
    assert second is not None
    if kind == "binary":
        return softplus(torch.where(second > 0, -scale, scale) * first)
    if kind == "kto":
        u = scale * (first - margin)
        desirable = options.positive_weight * torch.sigmoid(-u)
        return torch.where(second > 0, desirable, options.negative_weight * torch.sigmoid(u))
    by_margin = margin_form(scale * (first - second) - margin, options)
    if by_margin is not None:
        return by_margin
    u, v = scale * first, scale * second
    if kind == "ipo":
        return (first - second - margin - 1 / (2 * scale)).square()
    if kind == "nca_pair":
        return softplus(-u) + 0.5 * softplus(u) + 0.5 * softplus(v)
    if kind == "bco_pair":
        return softplus(options.delta - u) + softplus(v - options.delta)
    if kind == "sppo_hard":
        return (first - 0.5 / scale).square() + (second + 0.5 / scale).square()
    if kind == "apo_zero":
        return torch.sigmoid(-u) + torch.sigmoid(v)
    if kind == "apo_down":
        return torch.sigmoid(u) + torch.sigmoid(v - u)
    assert kind == "odds_ratio"
    return scale * softplus(log_odds(second) - log_odds(first))


def log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^x, where x counts as at most -2^-24 and keeps the derivative it has there."""
    x = x + (x.clamp(max=-(2.0**-24)) - x).detach()
    return x - torch.log(-torch.expm1(x))


def reduce(losses: Tensor, counted: Tensor, reduction: str, num_items: Tensor | None) -> Tensor:
    """Losses (N,) of what counts; ``counted`` (N,) is what each adds to the denominator. The mean of nothing is 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    denominator = counted.to(total.dtype).sum() if num_items is None else num_items
    return torch.where(denominator == 0, total * 0.0, total / torch.where(denominator == 0, 1.0, denominator))


def pair_loss(
    first: Tensor, second: Tensor | None, tensors: PairTensors, options: PairOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of N items, and scale * (score - reference) of both sides, detached.

    first (N,); second (N,), or None with ``tensors.labels``.
    """
    dtype = accumulation_dtype(first.dtype)
    counted = torch.ones_like(first, dtype=torch.bool) if tensors.mask is None else tensors.mask

    def side(x: Tensor, reference: Tensor | None) -> Tensor:
        return x.to(dtype) if reference is None else x.to(dtype) - reference.to(dtype)

    first = side(first, tensors.first_reference)
    other = None if second is None else side(second, tensors.second_reference)
    rewards = options.scale * first.detach(), None if other is None else options.scale * other.detach()
    first = torch.where(counted, first, 0.0)
    if other is None:
        assert tensors.labels is not None
        other = tensors.labels.to(dtype)
    else:
        other = torch.where(counted, other, 0.0)
    margin = options.margin if tensors.margin is None else tensors.margin
    losses = item_form(first, other, margin, options)
    if options.center:
        losses = losses + options.center * (first + other).square()
    if tensors.weight is not None:
        losses = losses * tensors.weight
    losses = torch.where(counted, losses, 0.0)
    return reduce(losses, counted, options.reduction, tensors.num_items), *rewards


def padded(scores: Tensor, ranks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed groups as (G, K) with the largest K, which is read on the host; ranks of the padding are -1."""
    sizes = offsets.diff()
    if offsets.device.type == "cpu":
        check_offsets(offsets, scores.shape[0])
    widest = int(sizes.max()) if sizes.numel() else 0
    place = torch.arange(widest, device=scores.device)
    inside = place < sizes[:, None]
    index = torch.where(inside, offsets[:-1, None] + place, 0)
    if scores.shape[0] == 0:
        return scores.sum() + scores.new_zeros(index.shape), torch.full_like(index, -1)  # with a graph
    return torch.where(inside, scores[index], 0.0), torch.where(inside, ranks[index], -1)


def check_offsets(
    offsets: Tensor, count: int, name: str = "group_offsets", of_what: str = "the number of scores"
) -> None:
    """The message is that of csrc/cpu/offsets.h."""
    if int(offsets[0]) != 0:
        raise ValueError(f"{name}: entry 0 is {int(offsets[0])}; wanted 0")
    falls = offsets.diff() < 0
    if bool(falls.any()):
        g = int(falls.nonzero()[0, 0])
        wanted = f"no less than the one before it, {int(offsets[g])}"
        raise ValueError(f"{name}: entry {g + 1} is {int(offsets[g + 1])}; wanted {wanted}")
    if int(offsets[-1]) != count:
        last = offsets.shape[0] - 1
        raise ValueError(f"{name}: entry {last} is {int(offsets[-1])}; wanted {count}, {of_what}")


def ranked_loss(scores: Tensor, tensors: RankTensors, options: RankOptions) -> Tensor:
    """The loss of G groups of scores (G, K) or, with offsets, (N,); it holds (G, K, K) numbers."""
    dtype = accumulation_dtype(scores.dtype)
    x, ranks = scores.to(dtype), tensors.ranks
    if tensors.group_offsets is not None:
        x, ranks = padded(x, ranks, tensors.group_offsets)
    present = ranks >= 0
    x = torch.where(present, options.scale * x, 0.0)
    both = present[:, :, None] & present[:, None, :]
    wins = both & (ranks[:, :, None] < ranks[:, None, :])  # (G, i, j): i is ranked before j
    pairs = wins.sum((1, 2))
    has_pairs = pairs > 0
    if options.method == "pairwise":
        steps = (ranks[:, None, :] - ranks[:, :, None]).to(dtype)
        gaps = x[:, :, None] - x[:, None, :] - options.margin * steps
        form = pair_options(label_smoothing=options.label_smoothing)
        losses = margin_form(torch.where(wins, gaps, 0.0), form)
        assert losses is not None
        losses = torch.where(wins, losses, 0.0).sum((1, 2))
        if options.over_groups:
            losses = losses / pairs.clamp(min=1)
    else:
        losses = listwise(torch.where(has_pairs[:, None], x, 0.0), present, wins, both, options.method)
        losses = torch.where(has_pairs, losses, 0.0)
    counted = has_pairs if options.over_groups else pairs
    return reduce(losses, counted, options.reduction, tensors.num_items)


def listwise(x: Tensor, present: Tensor, wins: Tensor, both: Tensor, ties: str) -> Tensor:
    """Plackett-Luce per group (G,): entry i costs log(sum_j w_ij e^(s_j - s_i)) over what is not ranked before it.

    w is 1, but for Efron 1 - l/d among d tied entries, for the l-th of them.
    """
    size = x.shape[1]
    tied = both & ~wins & ~wins.transpose(1, 2)
    weights = torch.where(wins | tied, 1.0, 0.0).to(x.dtype)
    if ties == "efron":
        order = torch.arange(size, device=x.device)
        before = (tied & (order[None, :] < order[:, None])).sum(2)
        share = 1 - before.to(x.dtype) / tied.sum(2).clamp(min=1)
        weights = torch.where(tied, share[:, :, None], weights)
    alone = present & ~(wins | (tied & ~torch.eye(size, dtype=torch.bool, device=x.device))).any(2)  # the last: nothing
    counted = present & ~alone
    logits = torch.where(counted[:, :, None], x[:, None, :] + weights.log(), 0.0)
    costs = torch.logsumexp(logits, 2) - x if size else x
    return torch.where(counted, costs, 0.0).sum(1)
