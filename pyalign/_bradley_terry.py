"""Bradley-Terry models: strengths of players from the outcomes of their battles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyalign import _bradley_terry_graph as _graph
from pyalign import _bradley_terry_solver as _solver
from pyalign import _checks
from pyalign._bradley_terry_graph import Bools, Ints
from pyalign._bradley_terry_solver import Design, Floats, Units

TIE_MODELS = ("half", "davidson")
MAX_COVARIANCE_PLAYERS = 10_000
ELO_SCALE = 400.0
ELO_BASE = 1000.0

Array = Tensor | NDArray[Any] | Sequence[Any]


class NoMaximumError(ValueError):
    """The likelihood rises forever, or has no single maximum; ``groups`` are the players that the message names.

    ``prior_helps`` says whether a prior would give it one.
    """

    def __init__(self, problem: str, groups: list[list[int]], *, prior_helps: bool = True):
        hint = ". Plain maximum likelihood has no maximum there; a prior gives it one: prior=0.1, say"
        super().__init__(problem + (hint if prior_helps else ""))
        self.problem, self.groups, self.prior_helps = problem, groups, prior_helps


class ConvergenceError(RuntimeError):
    """The iterations ended before they found the maximum."""


# ---- Results ----


class Intervals(NamedTuple):
    """Confidence limits, one by one for each number."""

    lower: Tensor
    upper: Tensor
    level: float
    method: str
    """"percentile" of bootstrap replicates, or "normal": estimate +- z standard errors."""


class Ranks(NamedTuple):
    """Ranks of P players, 1 the best; 0 for players without a strength."""

    rank: Tensor
    """(P,) int64: one more than the players with a higher strength."""
    best: Tensor
    """(P,) int64: one more than the players whose interval lies above; Chatbot Arena's "rank (UB)"."""
    worst: Tensor
    """(P,) int64: the last place but for the players whose interval lies below."""


class EloRatings(NamedTuple):
    """Strengths on the scale of Elo ratings, (P,) each; ``level`` and ``method`` as in :class:`Intervals`."""

    ratings: Tensor
    lower: Tensor
    upper: Tensor
    standard_errors: Tensor
    level: float
    method: str


class Bootstrap(NamedTuple):
    """Fits to battles drawn with replacement, K = requested - without_maximum of them, in the gauge of the fit."""

    strengths: Tensor
    """(K, P)"""
    coefficients: Tensor
    """(K, F)"""
    tie_parameter: Tensor | None
    """(K,)"""
    requested: int
    without_maximum: int
    """Replicates whose likelihood has none (a player won everything there, say); they are left out of the rest."""


@dataclass(frozen=True, eq=False)
class BradleyTerryFit:
    """What :func:`bradley_terry` found; tensors are float64 on the CPU, strengths in natural log units.

    P players, F covariates, K bootstrap replicates. Players that a category lacks are NaN there.
    """

    strengths: Tensor
    """(P,) log-odds: their mean is 0, or the anchor's strength is what was asked."""
    coefficients: Tensor
    """(F,) of the covariates, in log-odds per unit."""
    tie_parameter: float | None
    """Davidson's nu."""
    log_likelihood: float
    """Of the battles, in nats, without the prior's term; a half tie counts as half a win on either side."""
    num_battles: int
    """Battles with a weight above 0."""
    iterations: int
    gradient_norm: float
    """Euclidean, of the penalised log-likelihood at the result."""
    bootstrap: Bootstrap | None
    categories: Mapping[Hashable, BradleyTerryFit] | None
    """The fits of the categories, in their order."""
    _model: _Model = field(repr=False)

    @cached_property
    def covariance(self) -> Tensor:
        """(P, P) of the strengths, from the inverse Hessian, in their gauge: rows sum to 0, or the anchor's is 0."""
        return self._strengths_block(self._model.covariance)

    @cached_property
    def robust_covariance(self) -> Tensor:
        """(P, P) sandwich H^-1 (sum of w^2 s s^T) H^-1 with the scores s of the battles (Huber 1967, White 1982).

        It holds where the model or the weights are not those of the battles; also for half ties, which vary less than
        the half wins and losses that the Hessian takes them for.
        """
        return self._strengths_block(self._model.sandwich)

    @property
    def standard_errors(self) -> Tensor:
        """(P,) square roots of the diagonal of ``covariance``."""
        return _root(self.covariance.diagonal())

    @property
    def robust_standard_errors(self) -> Tensor:
        """(P,) square roots of the diagonal of ``robust_covariance``."""
        return _root(self.robust_covariance.diagonal())

    @property
    def sandwich(self) -> Tensor:
        """Another name of ``robust_standard_errors``."""
        return self.robust_standard_errors

    @property
    def coefficient_standard_errors(self) -> Tensor:
        """(F,) of the covariates' coefficients, from the Hessian."""
        return self._coefficient_errors(self._model.covariance)

    @property
    def robust_coefficient_standard_errors(self) -> Tensor:
        """(F,) of the covariates' coefficients, from the sandwich."""
        return self._coefficient_errors(self._model.sandwich)

    @property
    def tie_parameter_standard_error(self) -> float | None:
        """Of Davidson's nu, from the Hessian: nu times the standard error of log nu."""
        if self.tie_parameter is None:
            return None
        return self.tie_parameter * math.sqrt(self._model.covariance[-1, -1])

    def difference_standard_errors(self, *, robust: bool = False) -> Tensor:
        """(P, P) of strength i minus strength j, which no gauge touches."""
        c = self.robust_covariance if robust else self.covariance
        variances = c.diagonal()
        return _root(variances[:, None] + variances - 2 * c)

    @cached_property
    def intervals(self) -> Intervals:
        """95 % intervals of the strengths, see :meth:`intervals_at`."""
        return self.intervals_at(0.95)

    def intervals_at(self, level: float = 0.95, *, robust: bool = False) -> Intervals:
        """Intervals of the strengths: percentiles of the bootstrap where there is one, else normal ones.

        Args:
            level: 0 < level < 1, of each interval by itself.
            robust: normal intervals from the sandwich, also where there is a bootstrap.
        """
        if self.bootstrap is not None and not robust:
            return _percentiles(self.bootstrap.strengths, level)
        return _normal(self.strengths, self.robust_standard_errors if robust else self.standard_errors, level)

    def coefficient_intervals(self, level: float = 0.95) -> Intervals:
        """Intervals of the (F,) coefficients: percentiles of the bootstrap where there is one, else normal ones."""
        if self.bootstrap is not None:
            return _percentiles(self.bootstrap.coefficients, level)
        return _normal(self.coefficients, self.coefficient_standard_errors, level)

    def ranks(self, level: float = 0.95) -> Ranks:
        """Ranks by strength, and the best and worst that the intervals at ``level`` leave open."""
        lower, upper, *_ = self.intervals_at(level)
        known = ~self.strengths.isnan()

        def place(above: Tensor) -> Tensor:
            return torch.where(known, 1 + above, 0)

        def below(x: Tensor, bound: Tensor) -> Tensor:
            """For every player how many of ``x`` are below its bound."""
            return torch.searchsorted(x[known].sort().values, torch.where(known, bound, 0.0))

        count = int(known.sum())
        return Ranks(
            place(below(-self.strengths, -self.strengths)),
            place(below(-lower, -upper)),
            torch.where(known, count - below(upper, lower), 0),
        )

    def win_probabilities(self) -> Tensor:
        """(P, P) probabilities that i beats j where all covariates are 0; half ties are half wins, Davidson's apart.

        exp(s_i) / (exp(s_i) + exp(s_j) + nu exp((s_i + s_j) / 2)), nu = 0 without Davidson's ties.
        """
        return self._outcomes()[0]

    def tie_probabilities(self) -> Tensor:
        """(P, P) probabilities that i and j tie; zeros unless the tie model is Davidson's."""
        return self._outcomes()[1]

    def to_elo(self, *, scale: float = ELO_SCALE, base: float = ELO_BASE, level: float = 0.95) -> EloRatings:
        """Ratings base + scale * log10(e) * strength: 400 points are odds of ten to one, a unit of strength 173.718.

        Args:
            scale: points of a factor of ten in the odds.
            base: the rating of strength 0. A player's rating r is fixed by ``anchor=(player, (r - base) / 173.718)``.
            level: of the intervals, as in :meth:`intervals_at`.

        Standard errors are NaN for more players than have them, where the intervals come from a bootstrap.
        """
        unit = _checks.positive("scale", scale) / math.log(10)
        base = _checks.finite("base", base)
        lower, upper, level, method = self.intervals_at(level)
        ratings, lower, upper = (base + unit * x for x in (self.strengths, lower, upper))
        affordable = self._model.design.num_players <= MAX_COVARIANCE_PLAYERS
        errors = unit * self.standard_errors if affordable else torch.full_like(self.strengths, math.nan)
        return EloRatings(ratings, lower, upper, errors, level, method)

    def _outcomes(self) -> tuple[Tensor, Tensor]:
        s = self.strengths.numpy()
        u = s[:, None] - s
        log_nu = None if self.tie_parameter is None else float(self._model.parameters[-1])
        p = _solver.probabilities(u, log_nu)
        return torch.from_numpy(p.win), torch.from_numpy(np.zeros_like(p.win) if p.tie is None else p.tie)

    def _strengths_block(self, covariance: Floats) -> Tensor:
        present, count = self._model.players, self._model.design.num_players
        whole = np.full((len(self.strengths), len(self.strengths)), np.nan)
        whole[np.ix_(present, present)] = covariance[:count, :count]
        return torch.from_numpy(whole)

    def _coefficient_errors(self, covariance: Floats) -> Tensor:
        first = self._model.design.num_players
        return _root(torch.from_numpy(covariance.diagonal()[first : first + len(self.coefficients)].copy()))


def _root(variances: Tensor) -> Tensor:
    return variances.clamp(min=0).sqrt()  # an anchor's 0, but for rounding


def _percentiles(samples: Tensor, level: float) -> Intervals:
    """Of (K, ...) samples; NaN where there are none."""
    level = _level(level)
    if not len(samples):
        lower, upper = samples.new_full((2, *samples.shape[1:]), math.nan)
    else:
        limits = np.quantile(samples.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
        lower, upper = torch.from_numpy(limits)
    return Intervals(lower, upper, level, "percentile")


def _normal(estimate: Tensor, errors: Tensor, level: float) -> Intervals:
    level = _level(level)
    reach = NormalDist().inv_cdf((1 + level) / 2) * errors
    return Intervals(estimate - reach, estimate + reach, level, "normal")


def _level(level: object) -> float:
    return _checks.number("level", level, "0 < level < 1", lambda x: 0 < x < 1)


# ---- The fitted model, in its own numbering of players ----


@dataclass(frozen=True, eq=False)
class _Model:
    design: Design
    units: Units
    prior: float
    parameters: Floats  # (n,), strengths centred
    players: Ints  # the players that have battles, by their number outside
    anchor: int | None  # in the design's numbering

    @cached_property
    def probabilities(self) -> _solver.Probabilities:
        log_nu = float(self.parameters[-1]) if self.design.davidson else None
        return _solver.probabilities(self.design.log_odds(self.parameters), log_nu)

    @cached_property
    def _inverse(self) -> Floats:
        """Of the Hessian, up to a shift of all strengths."""
        players = self.design.num_players
        if players > MAX_COVARIANCE_PLAYERS:
            gigabytes = 8e-9 * self.design.size**2
            raise ValueError(
                f"num_players: got {players}; standard errors want at most {MAX_COVARIANCE_PLAYERS} players (the "
                f"inverse Hessian alone would be {gigabytes:.1f} GB); bootstrap= gives intervals without them"
            )
        curvature = _solver.curvature(self.probabilities, _sums(self.design, self.units))
        hessian = _solver.hessian(self.design, curvature, self.prior)
        return _solver.inverse(_solver.fix_gauge(hessian, players))

    @cached_property
    def covariance(self) -> Floats:
        """(n, n) in the gauge of the strengths."""
        return self._gauged(self._inverse)

    @cached_property
    def sandwich(self) -> Floats:
        """(n, n) in the gauge of the strengths."""
        squared = self.units.count * self.units.weight**2
        apart = dataclasses.replace(self.design, davidson=True)
        squares = _solver.battles(apart, self.units, squared)
        assert squares.ties is not None
        half_ties = squares.ties
        if not self.design.davidson:
            squares = squares._replace(ties=None)
        meat = _solver.score_variance(self.design, self.probabilities, squares, half_ties)
        return self._gauged(self._inverse @ meat @ self._inverse)

    def _gauged(self, c: Floats) -> Floats:
        """T c T^T, T = I - 1 e_anchor^T or I - 1 1^T / P on the strengths."""
        c, players = c.copy(), self.design.num_players
        c[:players] -= c[:players].mean(0) if self.anchor is None else c[self.anchor]
        c[:, :players] -= c[:, :players].mean(1, keepdims=True) if self.anchor is None else c[:, [self.anchor]]
        return c


def _sums(design: Design, units: Units) -> _solver.Battles:
    return _solver.battles(design, units, units.count * units.weight)


# ---- Fitting ----


class _Rows(NamedTuple):
    """The battles as they were given, checked."""

    winners: Ints  # (M,)
    losers: Ints  # (M,)
    ties: Bools | None
    weight: Floats | None
    counts: Ints | None
    covariates: Floats | None  # (M, F)

    def pick(self, chosen: Bools | Ints) -> _Rows:
        return _Rows._make(None if x is None else x[chosen] for x in self)


class _Settings(NamedTuple):
    num_players: int
    davidson: bool
    prior: float | None
    anchor: tuple[int, float] | None
    bootstrap: int
    seed: int
    names: Sequence[object]  # of the players, in messages


def bradley_terry(
    winners: Array,
    losers: Array,
    *,
    num_players: int,
    weight: Array | None = None,
    ties: Array | None = None,
    tie_model: str = "half",
    prior: float | None = None,
    covariates: Array | None = None,
    anchor: int | tuple[int, float] | None = None,
    category: Array | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    counts: Array | None = None,
) -> BradleyTerryFit:
    """Strengths of players by maximum likelihood from M battles, with standard errors and intervals.

    The model (Zermelo 1929, Bradley and Terry 1952): player i beats j with probability

        p_ij = exp(u) / (exp(u) + 1),  u = theta_i - theta_j + covariates . gamma

    and the fit maximises sum_m w_m log p_m - prior / 2 (|theta|^2 + |gamma|^2) in float64 on the CPU, by Newton's
    method over deduplicated pairs with steps that provably rise. A tie counts as half a win on either side ("half"), or
    is an outcome of its own ("davidson", Davidson 1970): with d = exp(u/2) + exp(-u/2) + nu, a win has probability
    exp(u/2) / d and a tie nu / d.

    Args:
        winners, losers: (M,) integers in [0, num_players), tensors, arrays or sequences. For a tie, its two players.
        num_players: P; players without a battle have no maximum without a prior.
        weight: (M,) numbers >= 0 that multiply the battles' log-likelihoods (importance weights: the sandwich and the
            bootstrap take a battle of weight 2 for one battle). 0 takes a battle out.
        ties: (M,) bool.
        tie_model: see above. Davidson's needs both ties and decided battles.
        prior: None, or the precision > 0 of a normal prior on strengths and coefficients (a ridge), in battles' units.
        covariates: (M, F) finite numbers: the winner's features minus the loser's, as in style control (Chatbot Arena);
            an order effect is +1 where the winner came first and -1 where the loser did. For a tie, those of the player
            in ``winners`` minus those of the one in ``losers``.
        anchor: a player whose strength is fixed at 0, or (player, strength). None: strengths have mean 0. Differences
            of strengths do not depend on it, the standard errors of the strengths do.
        category: (M,) integers or strings: also fits the battles of each category alone, to the players it has (the
            others are NaN there, unless a prior gives them a strength). The fit over all battles comes first.
        bootstrap: replicates B: the M battles drawn B times with replacement and fitted again, in blocks of bounded
            memory, on as many threads as torch has.
        seed: of the bootstrap, >= 0. Replicate k is the same for any number of replicates and threads.
        counts: (M,) integers >= 0: a row stands for so many equal battles, as if it were repeated.

    Returns:
        A :class:`BradleyTerryFit`. Standard errors cost a dense (P, P) inverse, so they are computed when asked for, up
        to 10,000 players; the fit itself stores nothing of that size beyond 2,048.

    Raises:
        NoMaximumError: (a ValueError) without a prior, players won or lost everything, or never met the others (Ford
            1957), and the error names them; a covariate is a combination of others, or tells all outcomes apart;
            Davidson's model has no tie.
        ConvergenceError: no maximum was found within 200 iterations, in the fit or a replicate.
        ValueError, TypeError: an argument of the wrong shape, dtype or value.
    """
    rows, settings = _checked(
        winners, losers, num_players, weight, ties, tie_model, prior, covariates, anchor, bootstrap, seed, counts
    )
    return _fit_all(rows, settings, category)


def fit_named(
    names: Sequence[str], winners: Array, losers: Array, *, category: Array | None = None, **options: Any
) -> BradleyTerryFit:
    """:func:`bradley_terry` whose errors call the players by name."""
    rows, settings = _checked(winners, losers, len(names), **options)
    return _fit_all(rows, settings._replace(names=names), category)


def _fit_all(rows: _Rows, settings: _Settings, category: Array | None) -> BradleyTerryFit:
    labels = None if category is None else _labels(category, len(rows.winners))
    fit = _fit(rows, settings, None)
    if labels is None:
        return fit
    names, of_row = labels
    order = np.argsort(of_row, kind="stable")
    bounds = np.searchsorted(of_row[order], np.arange(len(names) + 1))
    fits: dict[Hashable, BradleyTerryFit] = {}
    for number, name in enumerate(names):
        fits[name] = _fit(rows.pick(order[bounds[number] : bounds[number + 1]]), settings, name)
    return dataclasses.replace(fit, categories=fits)


def _fit(rows: _Rows, settings: _Settings, category: Hashable | None) -> BradleyTerryFit:
    """The fit over ``rows``; over the players of a category alone where no prior holds the others."""
    if rows.weight is not None or rows.counts is not None:
        positive = np.ones(len(rows.winners), bool)
        for x in (rows.weight, rows.counts):
            if x is not None:
                positive &= x > 0
        rows = rows if positive.all() else rows.pick(positive)
    where = "" if category is None else f"category {category!r}: "
    outside, num_players = settings.num_players, settings.num_players
    players, anchor = np.arange(outside), None if settings.anchor is None else settings.anchor[0]
    if category is not None and settings.prior is None:
        seen = np.zeros(outside, bool)
        seen[rows.winners] = seen[rows.losers] = True
        if not seen.any():
            raise NoMaximumError(f"{where}no battle has a weight", [])
        players, number = np.flatnonzero(seen), np.cumsum(seen) - 1
        rows, num_players = rows._replace(winners=number[rows.winners], losers=number[rows.losers]), len(players)
        if anchor is not None:
            if not seen[anchor]:
                raise ValueError(
                    f"{where}anchor: got player {settings.names[anchor]}; wanted one with a battle in every category"
                )
            anchor = int(number[anchor])
    design, units = _deduplicated(rows, num_players, settings.davidson)
    data, prior = _sums(design, units), settings.prior or 0.0
    _require_maximum(design, data, settings, players, where)
    fits = _solver.fit(design, units, prior)
    parameters, norm = fits.parameters[0], float(np.linalg.norm(fits.gradient[0]))
    if fits.status[0] == _solver.NO_MAXIMUM:
        raise NoMaximumError(
            f"{where}covariates: with strengths that suit, they tell all outcomes apart", [players.tolist()]
        )
    if fits.status[0] != _solver.CONVERGED:
        raise ConvergenceError(
            f"{where}no maximum found in {fits.iterations[0]} iterations; the gradient's norm is {norm:.3g}. Weights "
            "or covariates of very different sizes may be the cause; a prior helps"
        )
    model = _Model(design, units, prior, parameters, players, anchor)
    level = 0.0 if settings.anchor is None else settings.anchor[1]
    strengths, coefficients, nu = _outside(fits.parameters, model, outside, level)
    return BradleyTerryFit(
        strengths=strengths[0],
        coefficients=coefficients[0],
        tie_parameter=None if nu is None else float(nu[0]),
        log_likelihood=_solver.log_likelihood(design, parameters, data),
        num_battles=int(units.count.sum()),
        iterations=int(fits.iterations[0]),
        gradient_norm=norm,
        bootstrap=_bootstrap(model, settings, outside, level, where) if settings.bootstrap else None,
        categories=None,
        _model=model,
    )


def _require_maximum(design: Design, data: _solver.Battles, settings: _Settings, players: Ints, where: str) -> None:
    up, down = data.wins > 0, data.losses > 0
    tied = np.zeros_like(up) if data.ties is None else data.ties > 0
    if design.davidson and not (tied.any() and (up | down).any()):
        found = "no tie" if not tied.any() else "nothing but ties"
        problem = f"{where}tie_model: got 'davidson' with {found}; wanted both kinds for its parameter, or 'half'"
        raise NoMaximumError(problem, [], prior_helps=False)
    if settings.prior is not None:
        return
    everyone = players.tolist()
    winners, losers, ties = _solver.davidson_edges(design, up, down, tied)
    ends = np.concatenate((winners, ties[0])), np.concatenate((losers, ties[1]))
    if not _graph.strongly_connected(design.num_players, *ends):
        problem = _graph.explain(design.num_players, *ends, players, settings.names)
        assert problem is not None
        raise NoMaximumError(where + problem[0], problem[1])
    if design.davidson and not (up & down).any() and _graph.ties_dominate(design.num_players, winners, losers, ties):
        raise NoMaximumError(
            f"{where}tie_model: got 'davidson' where no circle of players holds more wins than ties, so that gaps and "
            "tie parameter grow forever",
            [everyone],
        )
    if design.covariates.shape[1]:
        unclear = _solver.unidentified(design, data.total)
        if unclear:
            raise NoMaximumError(
                f"{where}covariates: got columns {unclear} that are zero, or add up to zero or to players' differences",
                [everyone],
            )


def _outside(parameters: Floats, model: _Model, outside: int, level: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(S, n) parameters as strengths (S, P) in the fit's gauge, coefficients (S, F) and nu (S,)."""
    count = model.design.num_players
    inside = parameters[:, :count]
    if model.anchor is not None:
        inside = inside - inside[:, [model.anchor]] + level
    strengths = np.full((len(parameters), outside), np.nan)
    strengths[:, model.players] = inside
    coefficients = parameters[:, count : count + model.design.covariates.shape[1]].copy()
    with np.errstate(over="ignore"):
        nu = torch.from_numpy(np.exp(parameters[:, -1])) if model.design.davidson else None
    return torch.from_numpy(strengths), torch.from_numpy(coefficients), nu


def _bootstrap(model: _Model, settings: _Settings, outside: int, level: float, where: str) -> Bootstrap:
    requested = settings.bootstrap
    fits = _solver.replicates(model.design, model.units, model.prior, model.parameters, requested, settings.seed)
    failed = np.count_nonzero(fits.status == _solver.NOT_CONVERGED)
    if failed:
        raise ConvergenceError(
            f"{where}bootstrap: {failed} of {requested} replicates found no maximum in {_solver.MAX_ITERATIONS} "
            "iterations; a prior helps"
        )
    found = fits.status == _solver.CONVERGED
    results = _outside(fits.parameters[found], model, outside, level)
    return Bootstrap(*results, requested, requested - int(np.count_nonzero(found)))


# ---- Deduplication ----


def _deduplicated(rows: _Rows, num_players: int, davidson: bool) -> tuple[Design, Units]:
    """Edges, the first player's number the lower, and the battles that are alike."""
    swapped = rows.winners > rows.losers
    low, high = np.minimum(rows.winners, rows.losers), np.maximum(rows.winners, rows.losers)
    outcome = swapped.astype(np.int64)
    if rows.ties is not None:
        outcome[rows.ties] = 2
    pair = low * num_players + high
    edge_key, edges, z = pair, num_players * num_players, None
    if rows.covariates is not None:
        z = np.where(swapped[:, None], -rows.covariates, rows.covariates) + 0.0  # no -0.0
        edge_key, edges = _joint_key((pair, *z.T))
    key, span = 3 * edge_key + outcome, 3 * edges
    weights = None
    if rows.weight is not None:
        weights, of_row = np.unique(rows.weight, return_inverse=True)
        if len(weights) > 1:
            key, span = (
                _joint_key((key, of_row))
                if span > 2**62 // len(weights)
                else (key * len(weights) + of_row, span * len(weights))
            )
    representative, count = _counted(key, span, rows.counts)
    unit_edge_key = edge_key[representative]
    new = np.concatenate((np.ones(min(1, len(unit_edge_key)), bool), unit_edge_key[1:] != unit_edge_key[:-1]))
    at = representative[new]
    design = Design(num_players, low[at], high[at], np.zeros((len(at), 0)) if z is None else z[at], davidson)
    weight = np.ones(len(count)) if rows.weight is None else rows.weight[representative]
    return design, Units(np.cumsum(new) - 1, outcome[representative].astype(np.int8), weight, count)


def _joint_key(columns: tuple[NDArray[Any], ...]) -> tuple[Ints, int]:
    """Numbers of the distinct rows of the columns, in their order, and how many there are."""
    key, count = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        distinct, key = np.unique(key * len(values) + inverse, return_inverse=True)
        count = len(distinct)
    return key, count


def _counted(key: Ints, span: int, counts: Ints | None) -> tuple[Ints, Ints]:
    """For every distinct key, in order, a row that has it and the number of battles that do."""
    if counts is None and span <= 4 * len(key) + 65536:  # a table of all keys costs less than sorting
        row = np.zeros(span, np.int64)
        row[key] = np.arange(len(key))
        table = np.bincount(key, minlength=span)
        distinct = np.flatnonzero(table)
        return row[distinct], table[distinct]
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.flatnonzero(np.concatenate((np.ones(min(1, len(key)), bool), key[1:] != key[:-1])))
    if counts is None:
        return order[starts], np.diff(np.append(starts, len(key)))
    return order[starts], np.add.reduceat(counts[order], starts) if len(starts) else np.zeros(0, np.int64)


# ---- Checks ----


def _checked(
    winners: Array,
    losers: Array,
    num_players: int,
    weight: Array | None = None,
    ties: Array | None = None,
    tie_model: str = "half",
    prior: float | None = None,
    covariates: Array | None = None,
    anchor: int | tuple[int, float] | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    counts: Array | None = None,
) -> tuple[_Rows, _Settings]:
    num_players = _integer("num_players", num_players, 1)
    bootstrap, seed = _integer("bootstrap", bootstrap, 0), _integer("seed", seed, 0)
    _checks.one_of("tie_model", tie_model, TIE_MODELS)
    if prior is not None:
        prior = _checks.number("prior", prior, "None or a finite number > 0", lambda x: x > 0)
    first, second = _players("winners", winners, num_players), _players("losers", losers, num_players)
    if first.shape != second.shape:
        _checks.refuse("losers", f"shape {second.shape}", f"{first.shape}, that of winners")
    alone = np.flatnonzero(first == second)
    if len(alone):
        _checks.refuse("losers", f"player {first[alone[0]]} against itself at {alone[0]}", "two players a battle")
    rows = _Rows(
        first,
        second,
        None if ties is None else _per_battle("ties", ties, first, "b", "bool").astype(bool),
        None if weight is None else _nonnegative("weight", weight, first, "fiu").astype(np.float64),
        None if counts is None else _nonnegative("counts", counts, first, "iu").astype(np.int64),
        None if covariates is None else _covariates(covariates, len(first)),
    )
    # Sums, and their squares in the sandwich, stay finite.
    if rows.weight is not None and not rows.weight.max(initial=0) * math.sqrt(len(first)) < 1e150:
        _checks.refuse("weight", f"up to {rows.weight.max():.3g}", "numbers whose squares can be summed")
    if rows.counts is not None and float(rows.counts.astype(np.float64).sum()) >= 2.0**62:
        _checks.refuse("counts", f"{rows.counts.astype(np.float64).sum():.3g} battles", "fewer than 2^62 in all")
    fixed = _anchor(anchor, num_players)
    return rows, _Settings(num_players, tie_model == "davidson", prior, fixed, bootstrap, seed, range(num_players))


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value < 2**63:
        _checks.refuse(name, repr(value), f"an int >= {least}")
    return int(value)


def _array(name: str, x: object, kinds: str, wanted: str) -> NDArray[Any]:
    if isinstance(x, Tensor):
        if x.requires_grad and torch.is_grad_enabled():
            _checks.refuse(name, "a tensor that requires grad", "a constant: bradley_terry has no gradient")
        x = x.detach()
        array = (x.double() if x.dtype == torch.bfloat16 else x).cpu().numpy()
    else:
        try:
            array = np.asarray(x)
        except ValueError as error:
            raise TypeError(f"{name}: got a ragged sequence; wanted {wanted}") from error
    if array.size == 0 and not isinstance(x, (Tensor, np.ndarray)):
        array = array.astype({"b": np.bool_, "i": np.int64, "f": np.float64}[kinds[0]])  # [] has no dtype of its own
    if array.dtype.kind not in kinds:
        _checks.refuse(name, f"dtype {array.dtype}", wanted, TypeError)
    return array


def _per_battle(name: str, x: object, like: Ints, kinds: str, wanted: str) -> NDArray[Any]:
    array = _array(name, x, kinds, wanted)
    if array.shape != like.shape:
        _checks.refuse(name, f"shape {array.shape}", f"{like.shape}, one per battle (nothing is broadcast)")
    return array


def _nonnegative(name: str, x: object, like: Ints, kinds: str) -> NDArray[Any]:
    array = _per_battle(name, x, like, kinds, "integers" if kinds == "iu" else "numbers")
    bad = np.flatnonzero(~((array >= 0) & (array < math.inf)))
    if len(bad):
        _checks.refuse(name, f"{array[bad[0]]} at {bad[0]}", "finite numbers >= 0")
    return array


def _players(name: str, x: object, num_players: int) -> Ints:
    array = _array(name, x, "iu", "integers")
    if array.ndim != 1:
        _checks.refuse(name, f"shape {array.shape}", "(M,), one player per battle")
    if len(array) and not (array.min() >= 0 and array.max() < num_players):
        at = int(np.flatnonzero((array < 0) | (array >= num_players))[0])
        _checks.refuse(name, f"{array[at]} at {at}", f"players in [0, {num_players})")
    return array.astype(np.int64, copy=False)


def _covariates(x: object, count: int) -> Floats:
    array = _array("covariates", x, "fiu", "numbers")
    if array.ndim != 2 or len(array) != count or array.shape[1] == 0:
        _checks.refuse("covariates", f"shape {array.shape}", f"({count}, F), F >= 1 numbers per battle")
    array = array.astype(np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        _checks.refuse("covariates", f"{array[tuple(bad[0])]} at {tuple(bad[0].tolist())}", "finite numbers")
    return array


def _anchor(anchor: object, num_players: int) -> tuple[int, float] | None:
    if anchor is None:
        return None
    player, strength = anchor if isinstance(anchor, tuple) and len(anchor) == 2 else (anchor, 0.0)
    wanted = f"a player in [0, {num_players}), or (player, strength)"
    if isinstance(player, bool) or not isinstance(player, (int, np.integer)) or not 0 <= player < num_players:
        _checks.refuse("anchor", repr(anchor), wanted)
    return int(player), _checks.number("anchor", strength, wanted + " with a finite strength", lambda x: True)


def _labels(category: object, count: int) -> tuple[list[Hashable], Ints]:
    array = _array("category", category, "iubUSO", "integers or strings")
    if array.shape != (count,):
        _checks.refuse("category", f"shape {array.shape}", f"({count},), one per battle")
    try:
        names, of_row = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise TypeError("category: got labels of several types; wanted integers or strings") from error
    return names.tolist(), of_row
