"""What the engines of every backend take: the tokens that count, the options of a loss, and rows of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
TAILS = ("bucket", "renormalize", "drop")
REDUCTIONS = ("none", "sum", "mean")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and row states: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tokens(NamedTuple):
    """Which tokens count and how they are reduced; every tensor contiguous, N tokens in the student's order.

    A token counts where ``mask`` AND ``labels != ignore_index`` AND ``teacher_rows >= 0``.
    """

    mask: Tensor | None = None  # (N,) bool
    labels: Tensor | None = None  # (N,) int64
    teacher_rows: Tensor | None = None  # (N,) int64, the flat teacher row of each token
    weight: Tensor | None = None  # (N,) accumulation dtype
    targets: Tensor | None = None  # (N,) int64; ignore_index means no hard term for this token
    num_items: Tensor | None = None  # () accumulation dtype, replaces the count as the denominator of "mean"
    upstream: Tensor | None = None  # () accumulation dtype, or (N,) for "none"; None means 1
    ignore_index: int = -100
    reduction: str = "mean"


class Options(NamedTuple):
    """Options of a distillation loss, per token ``(1 - hard_weight) * divergence + hard_weight * cross_entropy``."""

    vocab: int
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    temperature_squared: bool = False  # multiplies the divergence, not the hard term, by temperature ** 2
    hard_weight: float = 0.0


class Results(NamedTuple):
    """What an engine returns beside the gradient that it writes in place; None for what was not asked for."""

    loss: Tensor | None  # () or, for "none", (N,)
    entropy: Tensor | None  # (N,) entropy of softmax(student / T), 0 at uncounted tokens
    agreement: Tensor | None  # (N,) bool, student and teacher agree on the most likely entry, False if uncounted


class Rows(NamedTuple):
    """A matrix behind two leading strides: row r starts at ``r // inner * outer_stride + r % inner * inner_stride``."""

    tensor: Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows(x: Tensor) -> Rows:
    """View ``x`` (..., V) as rows; ``x`` is copied once if its last stride is not 1 or its leading
    dimensions need more than two strides, as ``logits[:, :-1]`` does not.
    """
    if x.is_contiguous():
        width = x.shape[-1]
        count = x.numel() // width if width else x.shape[:-1].numel()
        return Rows(x, count, max(count, 1), 0, width)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return rows(x.contiguous())
    collapsed: list[tuple[int, int]] = []  # (size, stride) of leading dimensions, adjacent ones joined
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if collapsed and collapsed[-1][1] == size * stride:
            collapsed[-1] = (collapsed[-1][0] * size, stride)
        else:
            collapsed.append((size, stride))
    count = x.shape[:-1].numel()
    if not collapsed:
        return Rows(x, count, 1, 0, 0)
    if len(collapsed) == 1:
        return Rows(x, count, max(count, 1), 0, collapsed[0][1])
    if len(collapsed) == 2:
        return Rows(x, count, collapsed[1][0], collapsed[0][1], collapsed[1][1])
    return rows(x.contiguous())


# Preference losses

PAIR_LOSSES = (
    "logistic", "hinge", "exponential", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "odds_ratio", "binary", "kto",
)  # fmt: skip
_ONE_GRADIENT = frozenset(
    ("logistic", "hinge", "exponential", "ipo", "robust", "exo_pair", "discopop", "binary", "kto")
)
RANK_METHODS = ("pairwise", "breslow", "efron")


class PairTensors(NamedTuple):
    """What is constant about N items; every tensor contiguous. Items are pairs, or single scores with labels."""

    first_reference: Tensor | None = None  # (N,) the scores' dtype, subtracted from the first scores
    second_reference: Tensor | None = None  # (N,)
    margin: Tensor | None = None  # (N,) or () accumulation dtype; replaces the options' margin
    labels: Tensor | None = None  # (N,) bool
    weight: Tensor | None = None  # (N,) accumulation dtype
    mask: Tensor | None = None  # (N,) bool
    num_items: Tensor | None = None  # () accumulation dtype, replaces the count as the denominator of "mean"


NO_PAIR_TENSORS = PairTensors()  # most calls: known by identity, it costs no look at each


class PairOptions(NamedTuple):
    """Options of a loss over items; which of them a form reads is in csrc/common/ranking.h."""

    form: str
    scale: float
    margin: float
    label_smoothing: float
    center: float
    tau: float
    delta: float
    positive_weight: float
    negative_weight: float
    reduction: str


def pair_options(
    form: str = "logistic",
    reduction: str = "mean",
    scale: float | None = None,
    margin: float | None = None,
    label_smoothing: float | None = None,
    center: float | None = None,
    tau: float | None = None,
    delta: float | None = None,
    positive_weight: float | None = None,
    negative_weight: float | None = None,
) -> PairOptions:
    """Options with constants for what is not given. torch.compile(dynamic=True) takes floats that are default values of
    a class for symbols, and fails where two losses share them."""
    return PairOptions(
        form,
        1.0 if scale is None else scale,
        0.0 if margin is None else margin,
        0.0 if label_smoothing is None else label_smoothing,
        0.0 if center is None else center,
        1.0 if tau is None else tau,
        0.0 if delta is None else delta,
        1.0 if positive_weight is None else positive_weight,
        1.0 if negative_weight is None else negative_weight,
        reduction,
    )


class RankTensors(NamedTuple):
    """What is constant about G groups of scores; every tensor contiguous."""

    ranks: Tensor  # (G, K) or (N,) int64
    group_offsets: Tensor | None = None  # (G + 1,) int64
    num_items: Tensor | None = None  # () accumulation dtype


class RankOptions(NamedTuple):
    """Options of a loss over groups: all pairs of a group, or Plackett-Luce by the rule for ties."""

    method: str = "pairwise"
    scale: float = 1.0
    margin: float = 0.0
    label_smoothing: float = 0.0
    over_groups: bool = False  # the mean within a group, then over groups; for Plackett-Luce, over groups
    reduction: str = "mean"


def stores_both(options: PairOptions) -> bool:
    """Whether a loss over items stores two gradients: not for labelled scores, nor where that of the second scores is
    the negative of the first's."""
    return options.form not in _ONE_GRADIENT or options.center != 0


class PairResults(NamedTuple):
    """What a loss over items returns; None for what was not asked for."""

    loss: Tensor  # () or, for "none", (N,)
    denominator: Tensor  # () what the mean divided by
    gradient: Tensor | None  # (N,), or (2, N) of both sides; accumulation dtype, not divided by the denominator
    rewards: Tensor | None  # (2, N) or (1, N) accumulation dtype, scale * (score - reference)


class RankResults(NamedTuple):
    """What a loss over groups returns."""

    loss: Tensor  # () or, for "none", (G,)
    denominator: Tensor  # ()
    gradient: Tensor | None  # (N,) accumulation dtype, not divided by the denominator


# Log-probs


class LogprobResults(NamedTuple):
    """What rows of logits say about their targets; None for what was not asked for. Accumulation dtype."""

    logprob: Tensor  # (N,) of the target, 0 at ignored ones
    entropy: Tensor | None  # (N,) of softmax(softcap(logits) / T), 0 at ignored targets
    state: Tensor | None  # (N, 3) max, sum, entropy (NaN unless wanted): spares a gradient the fold


# Scoring

GROUP_OPS = (
    "win_probabilities", "win_probabilities_gradient", "expected_win_rates", "expected_win_rates_gradient", "best_of_n",
)  # fmt: skip
# What is summed over the pairs of a cell: a category and a bin of confidence, or the bin of the pairs that are NaN.
STATISTICS = ("pairs", "weight", "squared_weight", "right", "tied", "log_loss", "brier", "confidence")


class RewardGradients(NamedTuple):
    """Of a reward head; None for what was not asked for."""

    hidden: Tensor | None  # (T, H) the hidden states' dtype, zero but in the rows that were read
    head: Tensor | None  # (C, H) accumulation dtype
    bias: Tensor | None  # (C,) accumulation dtype


class MetricTensors(NamedTuple):
    """What is constant about P pairs of scores; every tensor contiguous."""

    margin: Tensor | None = None  # (P,) accumulation dtype; replaces the options' margin
    weight: Tensor | None = None  # (P,) accumulation dtype
    mask: Tensor | None = None  # (P,) bool
    category: Tensor | None = None  # (P,) int64, below the options' categories


class MetricOptions(NamedTuple):
    """How pairs are counted."""

    categories: int
    bins: int
    scale: float
    margin: float
