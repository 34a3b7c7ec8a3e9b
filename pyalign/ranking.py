"""Preference losses over scores: pairs, K-wise rankings, Plackett-Luce, labelled scores, and the DPO family.

Ranked preference modelling and binary discrimination follow Askell et al. 2021 (arXiv 2112.00861), section 3: the loss
of a pair is ``softplus(rejected - chosen)``, its Eq. 3.1. Every loss is one kernel forward (loss and gradient) and one
backward; none waits for the host, but where packed groups run on the reference backend.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyalign import _checks, _ops_ranking
from pyalign._backends import choose_name
from pyalign._types import (
    NO_PAIR_TENSORS,
    REDUCTIONS,
    PairOptions,
    PairTensors,
    RankOptions,
    RankTensors,
    accumulation_dtype,
    pair_options,
)
from pyalign.reference import ranking as _reference

__all__ = [
    "LabelledOutput",
    "PreferenceMetrics",
    "PreferenceOutput",
    "binarised_pairs",
    "binary_discrimination_loss",
    "cpo_loss",
    "discrimination_pairs",
    "dpo_loss",
    "kto_loss",
    "margin_metrics",
    "orpo_loss",
    "pairs_of_ranks",
    "pairwise_preference_loss",
    "ranked_preference_loss",
    "simpo_loss",
]

PAIRWISE_LOSSES = ("logistic", "hinge", "exponential", "ipo")
DPO_LOSSES = {
    "sigmoid": "logistic", "robust": "robust", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo_pair",
    "nca_pair": "nca_pair", "bco_pair": "bco_pair", "sppo_hard": "sppo_hard", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "discopop": "discopop",
}  # fmt: skip


# ---- Metrics ----


class PreferenceMetrics(NamedTuple):
    """Figures of a batch of pairs as 0-dim tensors on its device, detached; NaN for no pairs."""

    accuracy: Tensor
    """Share of pairs with chosen > rejected; a tie counts one half."""
    margin: Tensor
    """Mean of chosen - rejected."""
    chosen: Tensor
    """Mean of chosen."""
    rejected: Tensor
    """Mean of rejected."""


def margin_metrics(chosen: Tensor, rejected: Tensor, *, mask: Tensor | None = None) -> PreferenceMetrics:
    """Accuracy (ties count a half), mean margin and mean scores of pairs, without waiting for the device.

    Args:
        chosen, rejected: (P,) scores or rewards.
        mask: (P,) bool or integer; the pairs that count.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device.
    """
    _checks.scores("chosen", chosen)
    _checks.scores("rejected", rejected, chosen)
    mask = _checks.item_mask("mask", mask, chosen)
    counted = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask
    dtype = accumulation_dtype(torch.promote_types(chosen.dtype, rejected.dtype))
    up, down = (torch.where(counted, x.detach().to(dtype), 0.0) for x in (chosen, rejected))
    count = counted.sum()
    right = torch.where(counted, (up > down) + 0.5 * (up == down), 0.0)
    return PreferenceMetrics(*(x.sum() / count for x in (right, up - down, up, down)))


class PreferenceOutput(NamedTuple):
    """A loss over pairs, and the implicit rewards, detached: beta * (policy - reference)."""

    loss: Tensor
    """() or, for reduction "none", (P,)."""
    chosen_rewards: Tensor
    """(P,) accumulation dtype."""
    rejected_rewards: Tensor
    """(P,) accumulation dtype."""

    def metrics(self, mask: Tensor | None = None) -> PreferenceMetrics:
        """:func:`margin_metrics` of the rewards."""
        return margin_metrics(self.chosen_rewards, self.rejected_rewards, mask=mask)


class LabelledOutput(NamedTuple):
    """A loss over labelled samples, and their implicit rewards, detached: beta * (policy - reference)."""

    loss: Tensor
    """() or, for reduction "none", (N,)."""
    rewards: Tensor
    """(N,) accumulation dtype."""


# ---- Running an op ----


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = None
    for x in tensors:
        if x is not None and x.dtype != dtype:
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    assert dtype is not None
    return dtype


def _run_pairs(
    first: Tensor, second: Tensor | None, tensors: PairTensors, options: PairOptions, want_rewards: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and both sides' rewards, from the backend that serves the scores."""
    dtype = first.dtype
    if (second is not None and second.dtype is not dtype) or tensors.first_reference is not None:
        dtype = _common_dtype(first, second, tensors.first_reference, tensors.second_reference)
    if first.dtype != dtype:
        first = first.to(dtype)
    if second is not None and second.dtype != dtype:
        second = second.to(dtype)
    if tensors.first_reference is not None:
        references = (tensors.first_reference, tensors.second_reference)
        first_reference, second_reference = (None if x is None else x.detach().to(dtype) for x in references)
        tensors = tensors._replace(first_reference=first_reference, second_reference=second_reference)
    backend = choose_name(first.device, dtype)
    if backend == "reference":
        loss, *rewards = _reference.pair_loss(first, second, tensors, options)
        return loss, rewards[0], rewards[1]
    call = _ops_ranking.PairCall(tensors, options, want_rewards, backend)
    if second is None:
        loss, rewards = _ops_ranking.loss(call, first)
        return loss, None if rewards is None else rewards[0], None
    loss, rewards = _ops_ranking.loss(call, first, second)
    return (loss, None, None) if rewards is None else (loss, rewards[0], rewards[1])


def _smoothing(value: object, loss_type: str) -> float:
    """A label smoothing that the loss type has a use for."""
    if loss_type == "exo_pair":
        return _checks.number("label_smoothing", value, "0 < label_smoothing < 1 for 'exo_pair'", lambda x: 0 < x < 1)
    if loss_type == "robust":
        wanted = "0 <= label_smoothing < 0.5 for 'robust'"
        return _checks.number("label_smoothing", value, wanted, lambda x: 0 <= x < 0.5)
    if loss_type in ("logistic", "sigmoid"):
        return _checks.number("label_smoothing", value, "0 <= label_smoothing < 1", lambda x: 0 <= x < 1)
    return _checks.number("label_smoothing", value, f"0 with loss_type {loss_type!r}, which has none", lambda x: x == 0)


# ---- Pairs of scores ----


def pairwise_preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    loss_type: str = "logistic",
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of pairs of scores, of which the first should be the higher.

    With z = scale * (chosen - rejected) - margin, per pair:

    - ``"logistic"``: (1 - e) softplus(-z) + e softplus(z), e = label_smoothing; at e = 0 Askell et al. 2021
      (arXiv 2112.00861), Eq. 3.1, the negative log-likelihood of a Bradley-Terry model
    - ``"hinge"``: max(0, 1 - z)
    - ``"exponential"``: exp(-z), which is +inf where float32 has no number for it
    - ``"ipo"``: (chosen - rejected - margin - 1 / (2 scale))^2, Azar et al. 2023 (arXiv 2310.12036)

    plus center_coefficient * (chosen + rejected)^2 (Eisenstein et al. 2023, arXiv 2312.09244), all times weight.

    Args:
        chosen, rejected: (P,) float32, bfloat16, float16 or float64; a head's output (2P, 1) is cut by the caller.
        margin: a number or exactly (P,).
        weight: (P,) floating, multiplies each pair's loss; not part of the denominator.
        mask: (P,) bool or integer; a pair counts where it is nonzero.
        scale: > 0.
        label_smoothing: 0 <= e < 1, for "logistic" alone.
        center_coefficient: >= 0, keeps the scores near 0.
        loss_type: see above.
        num_items: int or 0-dim tensor that replaces the number of counted pairs as the denominator of "mean".
        reduction: "mean" over counted pairs (the mean of nothing is a differentiable 0), "sum", or "none": (P,), 0 at
            pairs that don't count.

    Returns:
        The loss, float32 (float64 for float64 scores): () or, for "none", (P,).

    A pair whose scores are NaN, or infinite of one sign, is NaN; (-inf, finite) costs +inf, (finite, -inf) nothing.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; nothing is broadcast.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    _checks.score_pairs("chosen", chosen, "rejected", rejected)
    fixed = 0.0 if margin is None or isinstance(margin, Tensor) else margin
    given = loss_type, scale, fixed, label_smoothing, center_coefficient, reduction
    options = _checked(given)
    tensors = NO_PAIR_TENSORS
    if not (weight is None and mask is None and num_items is None and (margin is None or fixed is margin)):
        dtype = accumulation_dtype(_common_dtype(chosen, rejected))
        tensors = PairTensors(
            margin=_checks.constant("margin", margin, chosen, dtype) if isinstance(margin, Tensor) else None,
            weight=None if weight is None else _checks.constant("weight", weight, chosen, dtype),
            mask=_checks.item_mask("mask", mask, chosen),
            num_items=_checks.denominator(num_items, reduction, dtype, chosen),
        )
    return _run_pairs(chosen, rejected, tensors, options, False)[0]


def _pairwise_options(
    loss_type: str, scale: float, margin: float, label_smoothing: float, center_coefficient: float, reduction: str
) -> PairOptions:
    _checks.one_of("loss_type", loss_type, PAIRWISE_LOSSES)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    center = _checks.number("center_coefficient", center_coefficient, "a finite number >= 0", lambda x: x >= 0)
    return pair_options(
        form=loss_type,
        scale=_checks.positive("scale", scale),
        margin=_checks.finite("margin", margin),
        label_smoothing=_smoothing(label_smoothing, loss_type),
        center=center,
        reduction=reduction,
    )


_checked_before = functools.lru_cache(typed=True)(_pairwise_options)  # a training loop's options don't change


def _checked(given: tuple[Any, ...]) -> PairOptions:
    if torch.compiler.is_compiling():
        return _pairwise_options(*given)
    try:
        return _checked_before(*given)
    except TypeError:  # of the checks, or because the cache can't hold it
        return _pairwise_options(*given)


def binary_discrimination_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Pointwise discrimination: softplus(-score) for a positive label, softplus(score) for a negative one.

    The paper's binary discrimination is :func:`pairwise_preference_loss` over the pairs ``C:right > C:wrong`` (see
    :func:`discrimination_pairs`); this one is for samples that come alone, and is torch's
    ``binary_cross_entropy_with_logits``.

    Args:
        scores: (N,) float32, bfloat16, float16 or float64.
        labels: (N,) bool or integer; positive where nonzero.
        weight, mask, num_items, reduction: as in :func:`pairwise_preference_loss`.

    Returns:
        The loss, float32 (float64 for float64 scores): () or, for "none", (N,).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    _checks.scores("scores", scores)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    dtype = accumulation_dtype(scores.dtype)
    tensors = PairTensors(
        labels=_checks.item_mask("labels", labels, scores),
        weight=None if weight is None else _checks.constant("weight", weight, scores, dtype),
        mask=_checks.item_mask("mask", mask, scores),
        num_items=_checks.denominator(num_items, reduction, dtype, scores),
    )
    return _run_pairs(scores, None, tensors, pair_options(form="binary", reduction=reduction), False)[0]


# ---- Groups of scores ----


def ranked_preference_loss(
    scores: Tensor,
    ranks: Tensor,
    group_offsets: Tensor | None = None,
    *,
    method: str = "pairwise",
    margin: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ties: str = "breslow",
    group_reduction: str | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of ranked groups of scores: over all pairs of a group, or by the Plackett-Luce model.

    - ``"pairwise"``: every pair with rank_i < rank_j costs (1 - e) softplus(-z) + e softplus(z) with
      z = scale * (score_i - score_j) - margin * (rank_j - rank_i), e = label_smoothing. Nothing of size K x K is
      stored.
    - ``"plackett_luce"``: sum over the stages of log(sum of e^s over what is left) - s_best, s = scale * score
      (Plackett 1975). d entries that tie for a stage, with R the sum of e^s over them and what comes after and T over
      them alone, cost d log R - sum s by Breslow's rule and sum_l log(R - l/d T) - sum s, l < d, by Efron's (as in
      the partial likelihood of Cox' model). For two entries it is the pairwise loss.

    Args:
        scores: (G, K), or packed (N,) with ``group_offsets``; float32, bfloat16, float16 or float64.
        ranks: integers of the same shape: 0 is best, equal ranks tie (and make no pair), a negative one marks an
            absent entry, whose score is not read.
        group_offsets: (G + 1,) integers from 0 to N, never falling: group g is scores[offsets[g]:offsets[g + 1]], of
            any size from 0.
        method: see above.
        margin: the gap asked for per step of rank; for "pairwise" alone.
        scale: > 0.
        label_smoothing: 0 <= e < 1, for "pairwise" alone.
        ties: "breslow" or "efron", for "plackett_luce" alone.
        group_reduction: what a "mean" is over. "pairs": all pairs of all groups (the default of "pairwise");
            "groups": the mean within a group, then over groups (Open-Assistant's convention); for "plackett_luce" the
            mean over groups of the sum of their stages, the only one it has. Groups without a pair cost nothing and
            don't count.
        num_items: int or 0-dim tensor that replaces the number of pairs (or groups) as the denominator of "mean".
        reduction: "mean" (of nothing it is a differentiable 0), "sum", or "none": (G,), each group's sum, for
            "groups" of "pairwise" its mean.

    Returns:
        The loss, float32 (float64 for float64 scores): () or, for "none", (G,).

    NaN or +inf in a present score makes its group NaN. A pairwise loss takes O(K^2) time, Plackett-Luce O(K log K) on
    the CPU, O(K log^2 K) in CUDA C++, O(K^2) in Triton; all take O(K) memory (the reference backend takes O(K^2), and
    reads the largest size of packed groups on the host). Offsets that don't cut the scores raise on the CPU; on a GPU
    entries outside are not read, and the result is NaN.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    _checks.floating("scores", scores, 1)
    _checks.one_of("method", method, ("pairwise", "plackett_luce"))
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _checks.one_of("ties", ties, ("breslow", "efron"))
    wanted_dim = 2 if group_offsets is None else 1
    if scores.dim() != wanted_dim:
        wanted = "(G, K), or (N,) with group_offsets=" if wanted_dim == 2 else "(N,), because group_offsets are given"
        _checks.refuse("scores", f"shape {tuple(scores.shape)}", wanted)
    ranks = _checks.group_integers("ranks", ranks, tuple(scores.shape), scores)
    if group_offsets is not None:
        if isinstance(group_offsets, Tensor) and (group_offsets.dim() != 1 or group_offsets.shape[0] == 0):
            _checks.refuse("group_offsets", f"shape {tuple(group_offsets.shape)}", "(G + 1,)")
        shape = tuple(group_offsets.shape) if isinstance(group_offsets, Tensor) else ()
        group_offsets = _checks.group_integers("group_offsets", group_offsets, shape, scores)
    pairwise = method == "pairwise"
    step = 0.0 if margin is None else _checks.finite("margin", margin)
    if not pairwise and margin is not None:
        _checks.refuse("margin", margin, "None with method 'plackett_luce', which has none")
    if not pairwise and label_smoothing != 0:
        _checks.refuse("label_smoothing", label_smoothing, "0 with method 'plackett_luce', which has none")
    if pairwise and ties != "breslow":
        _checks.refuse("ties", repr(ties), "the default with method 'pairwise', where ties make no pair")
    if group_reduction is None:
        group_reduction = "pairs" if pairwise else "groups"
    _checks.one_of("group_reduction", group_reduction, ("pairs", "groups") if pairwise else ("groups",))
    dtype = accumulation_dtype(scores.dtype)
    tensors = RankTensors(ranks, group_offsets, _checks.denominator(num_items, reduction, dtype, scores))
    options = RankOptions(
        method="pairwise" if pairwise else ties,
        scale=_checks.positive("scale", scale),
        margin=step,
        label_smoothing=_smoothing(label_smoothing, "logistic"),
        over_groups=group_reduction == "groups",
        reduction=reduction,
    )
    backend = choose_name(scores.device, scores.dtype)
    if backend == "reference":
        return _reference.ranked_loss(scores, tensors, options)
    size = scores.shape[1] if group_offsets is None else 0
    call = _ops_ranking.RankCall(tensors, options, size, backend)
    return _ops_ranking.loss(call, scores)[0]


# ---- The DPO family: sequence log-probs ----


def _preference(
    first: Tensor, second: Tensor, tensors: PairTensors, options: PairOptions, mask: Tensor | None,
    num_items: int | Tensor | None, nll: Tensor | None = None, nll_weight: float = 1.0,
) -> PreferenceOutput:  # fmt: skip
    """A loss of the DPO family, plus nll_weight * nll per pair."""
    _checks.one_of("reduction", options.reduction, REDUCTIONS)
    dtype = accumulation_dtype(_common_dtype(first, second, tensors.first_reference, tensors.second_reference))
    mask = _checks.item_mask("mask", mask, first)
    denominator = _checks.denominator(num_items, options.reduction, dtype, first)
    loss, up, down = _run_pairs(first, second, tensors._replace(mask=mask, num_items=denominator), options, True)
    assert up is not None
    assert down is not None
    if nll is not None:
        _checks.scores("chosen_nll", nll, first)
        counted = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask
        cost = torch.where(counted, nll.to(dtype), 0.0)
        loss = loss + nll_weight * _reference.reduce(cost, counted, options.reduction, denominator)
    return PreferenceOutput(loss, up, down)


def _nll_weight(nll_weight: float, nll: Tensor | None) -> float:
    if nll is None and nll_weight != 1.0:
        _checks.refuse("nll_weight", nll_weight, "1.0, the default, without chosen_nll")
    return _checks.finite("nll_weight", nll_weight)


def _unless_default(name: str, value: float, default: float, of: str, loss_type: str) -> None:
    if loss_type != of and value != default:
        _checks.refuse(name, value, f"{default}, the default, with loss_type {loss_type!r}: it belongs to {of!r}")


def _check_sides(chosen: Tensor, rejected: Tensor) -> None:
    _checks.scores("policy_chosen", chosen)
    _checks.scores("policy_rejected", rejected, chosen)


def _average(name: str, logprobs: Tensor, lengths: Tensor | None) -> Tensor:
    """Sums of token log-probs over the lengths, if there are any."""
    if lengths is None:
        return logprobs
    _checks.per_item(name, lengths, logprobs)
    return logprobs.to(accumulation_dtype(logprobs.dtype)) / lengths


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    bco_delta: float = 0.0,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """Direct preference optimisation over sequence log-probs, and its kin.

    With c = policy_chosen - reference_chosen, r likewise, u = beta c, v = beta r, z = u - v, e = label_smoothing, and
    sigma the sigmoid, per pair:

    - ``"sigmoid"``: (1 - e) softplus(-z) + e softplus(z). Rafailov et al. 2023 (arXiv 2305.18290); e > 0 is Mitchell's
      conservative DPO
    - ``"robust"``: ((1 - e) softplus(-z) - e softplus(z)) / (1 - 2e), e < 0.5. Chowdhury et al. 2024 (2403.00409)
    - ``"hinge"``: max(0, 1 - z). SLiC, Zhao et al. 2023 (2305.10425)
    - ``"ipo"``: (c - r - 1 / (2 beta))^2; feed it length averages, as its authors do. Azar et al. 2023 (2310.12036)
    - ``"exo_pair"``: KL((sigma(z), sigma(-z)) || (1 - e, e)), e > 0. Ji et al. 2024 (2402.00856)
    - ``"nca_pair"``: softplus(-u) + softplus(u) / 2 + softplus(v) / 2. Chen et al. 2024 (2402.05369)
    - ``"bco_pair"``: softplus(-(u - delta)) + softplus(v - delta), delta = bco_delta. Jung et al. 2024 (2404.04656)
    - ``"sppo_hard"``: (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2. Wu et al. 2024 (2405.00675)
    - ``"apo_zero"``: sigma(-u) + sigma(v). D'Oosterlinck et al. 2024 (2408.06266)
    - ``"apo_down"``: sigma(u) + sigma(v - u). The same
    - ``"discopop"``: softplus(-z) (1 - m) + e^-z m, m = sigma(z / discopop_tau). Lu et al. 2024 (2406.08414)

    Args:
        policy_chosen, policy_rejected: (P,) log-probs of the responses; float32, bfloat16, float16 or float64.
        reference_chosen, reference_rejected: (P,) the same under the reference model, constants; None for both: 0.
        beta: > 0.
        loss_type, label_smoothing, discopop_tau, bco_delta: see above; refused where the loss has no use for them.
        mask, num_items, reduction: as in :func:`pairwise_preference_loss`.

    Returns:
        :class:`PreferenceOutput`: the loss, and the rewards beta * (policy - reference), detached.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    _check_sides(policy_chosen, policy_rejected)
    _checks.one_of("loss_type", loss_type, tuple(DPO_LOSSES))
    if (reference_chosen is None) != (reference_rejected is None):
        missing = "reference_chosen" if reference_chosen is None else "reference_rejected"
        _checks.refuse(missing, None, "reference log-probs of both sides, or of neither")
    if reference_chosen is not None and reference_rejected is not None:
        _checks.scores("reference_chosen", reference_chosen, policy_chosen)
        _checks.scores("reference_rejected", reference_rejected, policy_chosen)
    _unless_default("discopop_tau", discopop_tau, 0.05, "discopop", loss_type)
    _unless_default("bco_delta", bco_delta, 0.0, "bco_pair", loss_type)
    options = pair_options(
        form=DPO_LOSSES[loss_type],
        scale=_checks.positive("beta", beta),
        label_smoothing=_smoothing(label_smoothing, loss_type),
        tau=_checks.positive("discopop_tau", discopop_tau),
        delta=_checks.finite("bco_delta", bco_delta),
        reduction=reduction,
    )
    tensors = PairTensors(first_reference=reference_chosen, second_reference=reference_rejected)
    return _preference(policy_chosen, policy_rejected, tensors, options, mask, num_items)


def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_nll: Tensor | None = None,
    nll_weight: float = 1.0,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """Contrastive preference optimisation, Xu et al. 2024 (arXiv 2401.08417): DPO with a uniform reference, plus NLL.

    Per pair, f(policy_chosen - policy_rejected) + nll_weight * chosen_nll with f as in :func:`dpo_loss`.

    Args:
        policy_chosen, policy_rejected: (P,) log-probs of the responses.
        beta: > 0.
        loss_type: "sigmoid" (the paper's), "hinge" or "ipo".
        label_smoothing: 0 <= e < 1, for "sigmoid" alone.
        chosen_nll: (P,) negative log-likelihood of the chosen responses, differentiable; None leaves the term out.
        nll_weight: what it is multiplied by.
        mask, num_items, reduction: as in :func:`pairwise_preference_loss`; the NLL term follows them.

    Returns:
        :class:`PreferenceOutput`: the loss, and the rewards beta * policy, detached.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dpo_loss`.
    """
    _check_sides(policy_chosen, policy_rejected)
    _checks.one_of("loss_type", loss_type, ("sigmoid", "hinge", "ipo"))
    options = pair_options(
        form=DPO_LOSSES[loss_type],
        scale=_checks.positive("beta", beta),
        label_smoothing=_smoothing(label_smoothing, loss_type),
        reduction=reduction,
    )
    weight = _nll_weight(nll_weight, chosen_nll)
    return _preference(
        policy_chosen, policy_rejected, PairTensors(), options, mask, num_items, chosen_nll, weight
    )  # fmt: skip


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 0.5,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_nll: Tensor | None = None,
    nll_weight: float = 1.0,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """SimPO, Meng et al. 2024 (arXiv 2405.14734): f(beta * (mean chosen - mean rejected) - gamma), without a reference.

    f is softplus(-z), smoothed as in :func:`dpo_loss`, or ("hinge") max(0, 1 - z).

    Args:
        policy_chosen, policy_rejected: (P,) mean log-probs per token, or sums with lengths.
        chosen_lengths, rejected_lengths: (P,) the tokens of each response; its log-prob is divided by them.
        beta: > 0.
        gamma: the margin asked for.
        loss_type: "sigmoid" (the paper's) or "hinge".
        label_smoothing: 0 <= e < 1, for "sigmoid" alone.
        chosen_nll, nll_weight, mask, num_items, reduction: as in :func:`cpo_loss` (CPO-SimPO adds the NLL).

    Returns:
        :class:`PreferenceOutput`: the loss, and the rewards beta * mean log-prob, detached.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dpo_loss`.
    """
    _check_sides(policy_chosen, policy_rejected)
    _checks.one_of("loss_type", loss_type, ("sigmoid", "hinge"))
    options = pair_options(
        form=DPO_LOSSES[loss_type],
        scale=_checks.positive("beta", beta),
        margin=_checks.finite("gamma", gamma),
        label_smoothing=_smoothing(label_smoothing, loss_type),
        reduction=reduction,
    )
    first = _average("chosen_lengths", policy_chosen, chosen_lengths)
    second = _average("rejected_lengths", policy_rejected, rejected_lengths)
    weight = _nll_weight(nll_weight, chosen_nll)
    return _preference(first, second, PairTensors(), options, mask, num_items, chosen_nll, weight)


def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    lambda_: float = 0.1,
    chosen_nll: Tensor | None = None,
    nll_weight: float = 1.0,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """ORPO, Hong et al. 2024 (arXiv 2403.07691): nll_weight * chosen_nll + lambda * softplus(o(rejected) - o(chosen)).

    o(x) = x - log(1 - e^x) is the log-odds of a mean log-prob x. Where p = e^x is 1 its odds are infinite: x counts as
    at most -2^-24, and both loss and gradient stay finite.

    Args:
        policy_chosen, policy_rejected: (P,) mean log-probs per token, <= 0, or sums with lengths.
        chosen_lengths, rejected_lengths: (P,) the tokens of each response; its log-prob is divided by them.
        lambda_: > 0, the weight of the odds ratio.
        chosen_nll, nll_weight, mask, num_items, reduction: as in :func:`cpo_loss`.

    Returns:
        :class:`PreferenceOutput`: the loss, and the rewards lambda * mean log-prob, detached.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dpo_loss`.
    """
    _check_sides(policy_chosen, policy_rejected)
    options = pair_options(form="odds_ratio", scale=_checks.positive("lambda_", lambda_), reduction=reduction)
    first = _average("chosen_lengths", policy_chosen, chosen_lengths)
    second = _average("rejected_lengths", policy_rejected, rejected_lengths)
    weight = _nll_weight(nll_weight, chosen_nll)
    return _preference(first, second, PairTensors(), options, mask, num_items, chosen_nll, weight)


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    labels: Tensor,
    kl: float | Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
) -> LabelledOutput:
    """Kahneman-Tversky optimisation, Ethayarajh et al. 2024 (arXiv 2402.01306), over single labelled responses.

    With h = policy_logps - reference_logps: desirable_weight * (1 - sigma(beta (h - kl))) where the label is positive,
    undesirable_weight * (1 - sigma(beta (kl - h))) elsewhere.

    Args:
        policy_logps: (N,) log-probs of the responses.
        reference_logps: (N,) under the reference model, a constant; None: 0.
        labels: (N,) bool or integer; desirable where nonzero.
        kl: a number or 0-dim tensor, a constant: the batch's estimate of KL(policy || reference), which trainers
            clamp at 0.
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0.
        mask, num_items, reduction: as in :func:`pairwise_preference_loss`.

    Returns:
        :class:`LabelledOutput`: the loss, and the rewards beta * h, detached.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dpo_loss`.
    """
    _checks.scores("policy_logps", policy_logps)
    if reference_logps is not None:
        _checks.scores("reference_logps", reference_logps, policy_logps)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    dtype = accumulation_dtype(_common_dtype(policy_logps, reference_logps))
    shared = None
    if isinstance(kl, Tensor):
        if kl.dim() != 0:
            _checks.refuse("kl", f"shape {tuple(kl.shape)}", "a number or a 0-dim tensor")
        _checks.same_device("kl", kl, policy_logps)
        shared = kl.detach().to(dtype)
    weights = [
        _checks.number(name, value, "a finite number >= 0", lambda x: x >= 0)
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight))
    ]
    tensors = PairTensors(
        first_reference=reference_logps,
        margin=shared,
        labels=_checks.item_mask("labels", labels, policy_logps),
        mask=_checks.item_mask("mask", mask, policy_logps),
        num_items=_checks.denominator(num_items, reduction, dtype, policy_logps),
    )
    options = pair_options(
        form="kto",
        scale=_checks.positive("beta", beta),
        margin=0.0 if isinstance(kl, Tensor) else _checks.finite("kl", kl),
        positive_weight=weights[0],
        negative_weight=weights[1],
        reduction=reduction,
    )
    loss, rewards, _ = _run_pairs(policy_logps, None, tensors, options, True)
    assert rewards is not None
    return LabelledOutput(loss, rewards)


# ---- Pairs from data ----


def pairs_of_ranks(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs (better, worse) of indices that a ranking makes: 0 is best, ties make none, negative is absent.

    >>> pairs_of_ranks([1, 0, 0, -1])
    [(1, 0), (2, 0)]
    """
    present = [i for i, rank in enumerate(ranks) if rank >= 0]
    return [(i, j) for i, j in itertools.permutations(present, 2) if ranks[i] < ranks[j]]


def discrimination_pairs(contexts: Iterable[str], right: Iterable[str], wrong: Iterable[str]) -> list[tuple[str, str]]:
    """The paper's binary discrimination as pairs of texts, the preferred one first: ``C:right > C:wrong``.

    >>> discrimination_pairs(["2 + 2 = 4? "], ["Yes"], ["No"])
    [('2 + 2 = 4? Yes', '2 + 2 = 4? No')]
    """
    return [(context + good, context + bad) for context, good, bad in _together(contexts, right, wrong)]


def binarised_pairs(
    better: Iterable[str], worse: Iterable[str], *, good: str = "GOOD:", bad: str = "BAD:"
) -> list[tuple[str, str]]:
    """Binarised pre-training: every ranked pair A > B becomes ``GOOD:A > BAD:A`` and ``BAD:B > GOOD:B``.

    Askell et al. 2021, section 4.

    >>> binarised_pairs(["A"], ["B"])
    [('GOOD:A', 'BAD:A'), ('BAD:B', 'GOOD:B')]
    """
    return [pair for a, b in _together(better, worse) for pair in ((good + a, bad + a), (bad + b, good + b))]


def _together(*columns: Iterable[str]) -> list[tuple[str, ...]]:
    lists = [list(column) for column in columns]
    if len({len(x) for x in lists}) > 1:
        raise ValueError(f"got {', '.join(str(len(x)) for x in lists)} texts; wanted as many of each")
    return list(zip(*lists, strict=True))
