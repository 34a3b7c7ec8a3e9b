"""Scores and what is made of them: reward heads, win probabilities, the best of n, and how good a set of pairs is.

A reward model is a transformer with a scalar head that is read at the last token of a sequence (Askell et al. 2021,
arXiv 2112.00861, section 3); ``sigmoid(score_i - score_j)`` is the probability that i is preferred to j.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyalign import _checks, _dtensor, _ops_scoring
from pyalign._backends import choose_name
from pyalign._bradley_terry import BradleyTerryFit, ConvergenceError, NoMaximumError, bradley_terry
from pyalign._types import STATISTICS, MetricOptions, MetricTensors, accumulation_dtype
from pyalign.reference import scoring as _reference
from pyalign.reference.ranking import check_offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BradleyTerryFit",
    "CalibrationBins",
    "ConvergenceError",
    "NoMaximumError",
    "PairScorer",
    "PreferenceEvaluation",
    "best_of_n",
    "bradley_terry",
    "expected_win_rates",
    "preference_metrics",
    "reward_scores",
    "win_probabilities",
]


# ---- Reward heads ----


def reward_scores(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The score of each sequence: a head read at its last token, straight from the hidden states.

        score_bc = sum_h hidden[last(b), h] * head_weight[c, h] + head_bias[c]

    Forward reads one row of hidden states per sequence and gathers none. The kernels are **batch-invariant**: a
    sequence's scores have the same bits whatever else is in the batch, packed or padded, whatever the number of
    threads. (This holds from the hidden states on: the matrix products of the model that computed them are its own
    affair. Plain torch, ``pyalign.backend("reference")``, doesn't promise it.) Gradients are sums in a fixed order;
    that of the hidden states is zero but in the rows that were read. What is frozen gets no gradient computed, and with
    a frozen head the hidden states aren't kept for backward.

    Args:
        hidden: (T, H) packed, with ``offsets``, or (B, S, H) padded; float32, bfloat16, float16 or float64.
        head_weight: (H,), or (C, H) for several heads; any of these dtypes, float64 with float64 hidden states alone.
            The product runs in float32 whatever the dtypes are, under autocast too. A DTensor is gathered, and its
            gradient averaged over its mesh, as FSDP2 does.
        head_bias: () for one head (H,), else (C,).
        offsets: (B + 1,) int32 or int64, from 0 to T, never falling: sequence b is [offsets[b], offsets[b + 1]).
        mask: (B, S) bool or integer; the last token is where a sequence's mask is last nonzero, so that left and right
            padding both work. None: the last of S. Rows that aren't read may hold anything.

    Returns:
        (B,) or, for (C, H), (B, C); float32 (float64 for float64 hidden states). A sequence without a token is NaN, and
        its gradient zero.

    On the CPU, offsets that don't cut the tokens into sequences raise; on a GPU they make scores NaN.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    head_weight, head_bias = _dtensor.whole("head_weight", head_weight), _dtensor.whole("head_bias", head_bias)
    _checks.floating("hidden", hidden, 2)
    if hidden.dim() != (3 if offsets is None else 2):
        wanted = "(B, S, H), or (T, H) with offsets=" if offsets is None else "(T, H), because offsets are given"
        _checks.refuse("hidden", f"shape {tuple(hidden.shape)}", wanted)
    head, bias, single = _check_head(hidden, head_weight, head_bias)
    if mask is not None:
        if offsets is not None:
            _checks.refuse("mask", "a tensor", "None, because offsets say where sequences end")
        _check_beside("mask", mask, tuple(hidden.shape[:2]), hidden)
        if mask.dtype != torch.bool:
            _checks.integer_dtype("mask", mask)
            mask = mask != 0
    if offsets is not None:
        if isinstance(offsets, Tensor):
            _check_beside("offsets", offsets, tuple(offsets.shape), hidden)
        offsets = _check_offsets("offsets", offsets, "B + 1", hidden)
    backend = choose_name(hidden.device, hidden.dtype)
    if backend == "reference":
        scores = _reference.reward_scores(hidden, head, bias, offsets, mask)
    else:
        scores = _ops_scoring.reward_scores(hidden, head, bias, offsets, mask, backend)
    return scores.squeeze(1) if single else scores


def _check_beside(name: str, x: Tensor, shape: tuple[int, ...], hidden: Tensor) -> None:
    if not isinstance(x, Tensor):
        _checks.refuse(name, type(x).__name__, "a tensor", TypeError)
    if tuple(x.shape) != shape:
        _checks.refuse(name, f"shape {tuple(x.shape)}", f"{shape} (nothing is broadcast)")
    if x.device != hidden.device:
        _checks.refuse(name, f"a tensor on {x.device}", f"one on {hidden.device}, where the hidden states are")


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """(C, H) and (C,) in accumulation dtype, and whether the head is a single one without a dimension of its own."""
    dtype, width = accumulation_dtype(hidden.dtype), hidden.shape[-1]
    _checks.floating("head_weight", weight, 1)
    if weight.dim() > 2 or weight.shape[-1] != width or 0 in weight.shape:
        _checks.refuse(
            "head_weight", f"shape {tuple(weight.shape)}", f"({width},), as long as hidden's, or (C, {width})"
        )
    single = weight.dim() == 1
    given = [("head_weight", weight)]
    if bias is not None:
        _checks.floating("head_bias", bias, 0)
        wanted = tuple(weight.shape[:-1])
        if tuple(bias.shape) != wanted:
            _checks.refuse("head_bias", f"shape {tuple(bias.shape)}", f"{wanted}, one per head")
        given.append(("head_bias", bias))
    for name, x in given:
        if x.device != hidden.device:
            _checks.refuse(name, f"a tensor on {x.device}", f"one on {hidden.device}, where the hidden states are")
        if x.dtype == torch.float64 and dtype != torch.float64:
            _checks.refuse(name, x.dtype, f"a narrower dtype, because hidden is {hidden.dtype}", TypeError)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if single:
        weight, bias = weight[None], None if bias is None else bias[None]
    return weight, bias, single


def _check_offsets(name: str, offsets: Tensor, size: str, like: Tensor) -> Tensor:
    """(B + 1,) as int64."""
    if isinstance(offsets, Tensor) and (offsets.dim() != 1 or offsets.shape[0] == 0):
        _checks.refuse(name, f"shape {tuple(offsets.shape)}", f"({size},)")
    shape = tuple(offsets.shape) if isinstance(offsets, Tensor) else ()
    return _checks.group_integers(name, offsets, shape, like)


# ---- Groups of scores ----


def _check_groups(scores: Tensor, group_offsets: Tensor | None) -> Tensor | None:
    _checks.floating("scores", scores, 1)
    wanted_dim = 2 if group_offsets is None else 1
    if scores.dim() != wanted_dim:
        wanted = "(G, K), or (N,) with group_offsets=" if wanted_dim == 2 else "(N,), because group_offsets are given"
        _checks.refuse("scores", f"shape {tuple(scores.shape)}", wanted)
    return None if group_offsets is None else _check_offsets("group_offsets", group_offsets, "G + 1", scores)


def win_probabilities(scores: Tensor, group_offsets: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """The probability that each entry of a group is preferred to each other: p_ij = sigmoid(scale * (s_i - s_j)).

    The matrix of a Bradley-Terry model whose log-strengths are scale * s: p_ij + p_ji = 1, p_ii = 1/2. Differentiable:
    d p_ij / d s_i = scale * p_ij * p_ji = -d p_ij / d s_j, from both probabilities, so that nothing cancels where one
    is near 1. :func:`expected_win_rates` gives the means of its rows without storing it.

    Args:
        scores: (G, K), or packed (N,) with ``group_offsets``; float32, bfloat16, float16 or float64.
        group_offsets: (G + 1,) integers from 0 to N, never falling: group g is scores[offsets[g]:offsets[g + 1]], of
            any size, 0 and 1 among them.
        scale: > 0; log(10) / 400 for scores in Elo points.

    Returns:
        (G, K, K), or of packed groups their matrices one after the other, each by rows, ``sum(K_g ** 2)`` numbers:
        ``torch.split(wins, (group_offsets.diff() ** 2).tolist())`` cuts them apart. float32 (float64 for float64).

    A NaN score makes NaN of its row and column but the diagonal, and so do infinite scores of one sign among each
    other.
    The size of a packed result is data: with ``group_offsets`` the host reads it, and waits for a GPU. Offsets that
    don't cut the scores into groups raise.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    group_offsets = _check_groups(scores, group_offsets)
    scale = _checks.positive("scale", scale)
    if group_offsets is not None:
        check_offsets(group_offsets, scores.shape[0])
    backend = choose_name(scores.device, scores.dtype)
    if backend == "reference":
        return _reference.win_probabilities(scores, group_offsets, scale)
    blocks, total = None, 0
    if group_offsets is not None:
        blocks = torch.nn.functional.pad(group_offsets.diff().square().cumsum(0), (1, 0))
        total = int(blocks[-1])
    call = _ops_scoring.GroupCall("win_probabilities", total, scale, backend)
    return _ops_scoring.groups(call, scores, group_offsets, blocks)


def expected_win_rates(scores: Tensor, group_offsets: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """The mean probability of each entry to be preferred to another of its group.

        rate_i = 1 / (K - 1) sum_{j != i} sigmoid(scale * (s_i - s_j))

    Nothing of size K x K is stored, in backward neither. Differentiable; the rates of a group have mean 1/2.

    Args:
        scores, group_offsets, scale: as in :func:`win_probabilities`.

    Returns:
        Rates of the shape of ``scores``, float32 (float64 for float64). Who has no opponent gets 1/2, and gradient 0.

    A NaN score makes its group NaN. Nothing waits for a GPU, but packed groups in plain torch. On the CPU, offsets that
    don't cut the scores into groups raise; on a GPU they make the rates NaN.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve; a second derivative is asked of a kernel.
    """
    group_offsets = _check_groups(scores, group_offsets)
    scale = _checks.positive("scale", scale)
    backend = choose_name(scores.device, scores.dtype)
    if backend == "reference":
        return _reference.expected_win_rates(scores, group_offsets, scale)
    call = _ops_scoring.GroupCall("expected_win_rates", 0, scale, backend)
    return _ops_scoring.groups(call, scores, group_offsets)


def best_of_n(scores: Tensor, group_offsets: Tensor | None = None) -> Tensor:
    """Which entry of each group has the highest score; among equals the first.

    Args:
        scores, group_offsets: as in :func:`win_probabilities`.

    Returns:
        (G,) int64, indices into the last dimension of ``scores``: of a dense group into its row, of a packed one into
        all N (subtract ``group_offsets[:-1]`` for the place in the group). -1 for a group without a score.

    NaN is no score, and never chosen. Nothing waits for a GPU, but packed groups in plain torch. On the CPU, offsets
    that don't cut the scores into groups raise; on a GPU they give -1.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the forced backend can't serve.
    """
    group_offsets = _check_groups(scores, group_offsets)
    backend = choose_name(scores.device, scores.dtype)
    if backend == "reference":
        return _reference.best_of_n(scores, group_offsets)
    return _ops_scoring.groups(_ops_scoring.GroupCall("best_of_n", 0, 1.0, backend), scores, group_offsets)


# ---- Metrics of pairs ----


@dataclasses.dataclass(frozen=True)
class CalibrationBins:
    """How often predictions of about the same confidence are right: the points of a calibration plot.

    The confidence of a pair is max(p, 1 - p), p = sigmoid(z), so that bins cut [1/2, 1] into equal parts. float64, on
    the scores' device.
    """

    edges: Tensor
    """(bins + 1,) from 1/2 to 1; a bin holds its lower edge."""
    weight: Tensor
    """(bins,) total weight of the pairs in each bin: without weights, their number."""
    confidence: Tensor
    """(bins,) mean confidence; NaN for an empty bin."""
    accuracy: Tensor
    """(bins,) share of pairs that are right, a tie counting a half; NaN for an empty bin."""


@dataclasses.dataclass(frozen=True)
class PreferenceEvaluation:
    """What :func:`preference_metrics` says of a set of pairs: 0-dim float64 tensors on the scores' device.

    NaN where no pair counts.
    """

    pairs: Tensor
    """How many pairs count."""
    accuracy: Tensor
    """Share of pairs with z > 0; a tie counts one half."""
    standard_error: Tensor
    """Of the accuracy, over draws of independent pairs."""
    ties: Tensor
    """Share of pairs with z = 0."""
    log_loss: Tensor
    """Mean of -log p = softplus(-z)."""
    brier: Tensor
    """Mean of (1 - p)^2."""
    ece: Tensor
    """Expected calibration error: the mean distance of accuracy and confidence over bins, weighted by their pairs."""
    calibration: CalibrationBins
    slices: Mapping[Hashable, PreferenceEvaluation] = dataclasses.field(default_factory=dict)
    """The same for each category: integers ascending, others in order of appearance; empty without categories."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, for JSON; NaN becomes None. It waits for a GPU."""
        plain: dict[str, Any] = {name: _plain(getattr(self, name)) for name in _FIGURES}
        plain["pairs"] = int(self.pairs)
        bins = self.calibration
        plain["calibration"] = {field.name: _plain(getattr(bins, field.name)) for field in dataclasses.fields(bins)}
        if self.slices:
            plain["slices"] = {str(name): part.to_dict() for name, part in self.slices.items()}
        return plain


_FIGURES = ("pairs", "accuracy", "standard_error", "ties", "log_loss", "brier", "ece")


def _plain(x: Tensor) -> Any:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    values = x.tolist()
    return [number(value) for value in values] if isinstance(values, list) else number(values)


def preference_metrics(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    bins: int = 10,
    scale: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    category: Tensor | NDArray[Any] | Sequence[Hashable] | None = None,
) -> PreferenceEvaluation:
    """How well scores tell chosen from rejected, and how well their differences serve as probabilities.

    With z = scale * (chosen - rejected) - margin, as in :func:`pyalign.ranking.pairwise_preference_loss`, and
    p = sigmoid(z), the probability that the model gives to what was preferred:

    - accuracy: mean of [z > 0] + 1/2 [z = 0], with its standard error; ties: mean of [z = 0]
    - log-loss: mean of -log p = softplus(-z), which keeps its digits where p is tiny or near 1
    - Brier score: mean of (1 - p)^2
    - calibration: pairs in bins of equal width by their confidence max(p, 1 - p), which runs from 1/2 to 1; the
      expected calibration error is sum_b w_b / w |accuracy_b - confidence_b| (Naeini et al. 2015; Guo et al. 2017,
      arXiv 1706.04599)

    One pass over the pairs, sums in float64, in a fixed order.

    Args:
        chosen, rejected: (P,) float32, bfloat16, float16 or float64.
        margin: a number or exactly (P,): a pair is right where the scaled gap exceeds it.
        bins: how many, >= 1.
        scale: > 0; what makes log-odds of a difference of scores.
        weight: (P,) floating, how much each pair counts, in every mean's numerator and denominator.
        mask: (P,) bool or integer; a pair counts where it is nonzero.
        category: one per pair, an integer tensor (P,), or an array or a sequence of anything hashable: adds ``slices``,
            the same metrics per category. Categories of a tensor on a GPU are read on the host; otherwise nothing
            waits.

    Returns:
        A :class:`PreferenceEvaluation`, detached. A counted pair that is NaN makes its means NaN, and is in no bin of
        the calibration; z = -inf has log-loss +inf.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; nothing is broadcast.
        RuntimeError: the forced backend can't serve.
    """
    _checks.scores("chosen", chosen)
    _checks.scores("rejected", rejected, chosen)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        _checks.refuse("bins", repr(bins), "an int >= 1")
    scale = _checks.positive("scale", scale)
    wide = torch.promote_types(chosen.dtype, rejected.dtype)
    dtype = accumulation_dtype(wide)
    fixed = 0.0 if margin is None or isinstance(margin, Tensor) else _checks.finite("margin", margin)
    codes, names = _categories(category, chosen)
    tensors = MetricTensors(
        margin=_checks.constant("margin", margin, chosen, dtype) if isinstance(margin, Tensor) else None,
        weight=None if weight is None else _checks.constant("weight", weight, chosen, dtype),
        mask=_checks.item_mask("mask", mask, chosen),
        category=codes,
    )
    options = MetricOptions(max(len(names), 1), bins, scale, fixed)
    chosen, rejected = chosen.detach().to(wide), rejected.detach().to(wide)
    backend = choose_name(chosen.device, wide)
    if backend == "reference":
        table = _reference.preference_metrics(chosen, rejected, tensors, options)
    else:
        table = _ops_scoring.preference_metrics(chosen, rejected, tensors, options, backend)
    if codes is None:
        return _evaluations(table)[0]
    return dataclasses.replace(
        _evaluations(table.sum(0, keepdim=True))[0], slices=dict(zip(names, _evaluations(table), strict=False))
    )


def _categories(category: Any, pairs: Tensor) -> tuple[Tensor | None, list[Hashable]]:
    """(P,) codes from 0 and what each stands for: integers ascending, others in order of appearance."""
    if category is None:
        return None, []
    if isinstance(category, Tensor):
        _checks.per_item("category", category, pairs)
        if category.dtype != torch.bool:
            _checks.integer_dtype("category", category)
        return _integer_categories(category)
    if hasattr(category, "tolist"):  # numpy's array
        category = category.tolist()
    if isinstance(category, (str, bytes)) or not isinstance(category, Sequence):
        _checks.refuse("category", type(category).__name__, "an integer tensor or a sequence, one per pair", TypeError)
    if len(category) != pairs.shape[0]:
        _checks.refuse("category", f"{len(category)} entries", f"{pairs.shape[0]}, one per pair")
    places: dict[Hashable, int] = {}
    numbers = [places.setdefault(name, len(places)) for name in category]
    return torch.tensor(numbers, dtype=torch.int64, device=pairs.device), list(places)


def _integer_categories(category: Tensor) -> tuple[Tensor, list[Hashable]]:
    if category.numel() == 0 or category.dtype == torch.bool:
        values, codes = category.unique(return_inverse=True)
        return codes, values.tolist()
    low, high = (int(x) for x in category.aminmax())
    if high - low > max(category.numel(), 1 << 16):
        values, codes = category.unique(return_inverse=True)
        return codes, values.tolist()
    place = category.to(torch.int64) - low  # a tenth of the time of unique(), which sorts
    present = torch.zeros(high - low + 1, dtype=torch.bool, device=category.device)
    present[place] = True
    return (present.cumsum(0) - 1)[place], (present.nonzero().squeeze(1) + low).tolist()


def _evaluations(table: Tensor) -> list[PreferenceEvaluation]:
    """One per category, of (categories, bins + 1, 8) sums; the last bin is that of the NaN pairs."""
    totals = dict(zip(STATISTICS, table.sum(1).unbind(1), strict=True))
    cells = dict(zip(STATISTICS, table.unbind(2), strict=True))
    weight, bins = totals["weight"], table.shape[1] - 1
    accuracy, ties = totals["right"] / weight, totals["tied"] / weight
    variance = (accuracy - ties / 4 - accuracy.square()).clamp(min=0)  # the mean of squares is accuracy - ties / 4
    distance = (cells["right"] - cells["confidence"]).abs().sum(1)
    figures = (
        totals["pairs"],
        accuracy,
        (variance * totals["squared_weight"]).sqrt() / weight,
        ties,
        totals["log_loss"] / weight,
        totals["brier"] / weight,
        distance / weight,
    )
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=torch.float64, device=table.device)
    inside = cells["weight"][:, :bins]
    means = ((cells[name][:, :bins] / inside).unbind(0) for name in ("confidence", "right"))
    points = zip(inside.unbind(0), *means, strict=True)
    return [
        PreferenceEvaluation(*numbers, calibration=CalibrationBins(edges, *point))
        for *numbers, point in zip(*(x.unbind(0) for x in figures), points, strict=True)
    ]


from pyalign.pair_scorer import PairScorer  # noqa: E402  # it reads its heads through reward_scores
