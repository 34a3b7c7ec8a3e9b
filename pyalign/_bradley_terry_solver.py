"""What Bradley-Terry fits need around the C++ solver: the design, Hessians and scores, identifiability, the bootstrap.

Parameters are n numbers: strengths (P,), covariate coefficients (F,), with Davidson's ties log nu. An edge is a pair of
players (with covariates: and a row of them) that met; its outcome depends on u = theta_i - theta_j + z gamma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyalign._backends import native
from pyalign._bradley_terry_graph import Bools, Ints

Floats = NDArray[np.float64]

SMALL_MATRIX = 256  # up to here one thread inverts faster than a BLAS gathers its own on a busy machine
DENSE_PARAMETERS = 2048  # up to here Hessians may be factorised
MAX_ITERATIONS = 200
DRAWS_PER_UNIT = 20  # with fewer battles than this per unit, drawing them one by one costs less than binomials
CONVERGED, NO_MAXIMUM, NOT_CONVERGED = range(3)  # FitStatus in csrc/common/bradley_terry_args.h
_COUNTS_BYTES = 64 << 20


def _cpu() -> Any:
    """The compiled engine; there is no other."""
    module, why_not = native()
    if module is None:
        raise RuntimeError(f"bradley_terry has no other solver than the compiled one: {why_not}")
    return module.cpu


# ---- The battles ----


class Units(NamedTuple):
    """Battles that are alike: same edge, outcome and weight. Sorted by edge, then outcome."""

    edge: Ints  # (U,)
    outcome: NDArray[np.int8]  # (U,) 0 where the edge's first player won, 1 its second, 2 a tie
    weight: Floats  # (U,) of one battle
    count: Ints  # (U,) how many there are


@dataclass(frozen=True)
class Design:
    """The edges: which players meet, with which covariates."""

    num_players: int
    first: Ints  # (E,)
    second: Ints  # (E,)
    covariates: Floats  # (E, F) of the first player minus the second's
    davidson: bool

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return self.num_players + self.covariates.shape[1] + self.davidson

    def log_odds(self, parameters: Floats) -> Floats:
        """u of every edge, (n,) -> (E,)."""
        u = parameters[self.first] - parameters[self.second]
        return u + self.covariates @ parameters[self.num_players : self.num_players + self.covariates.shape[1]]

    def assemble(self, weights: Curvature) -> Floats:
        """X^T diag(weights) X, (n, n), X being the Jacobian of u and log nu."""
        players, features = self.num_players, self.covariates.shape[1]
        matrix = np.zeros((self.size, self.size))
        square = matrix[:players, :players]
        if players * players <= 4 * len(self.first) + 65536:
            pair = self.first * players + self.second
            square -= np.bincount(pair, weights.uu, players * players).reshape(players, players)
        else:
            np.subtract.at(square, (self.first, self.second), weights.uu)
        square += square.T
        square[np.diag_indices(players)] -= square.sum(1)
        borders = [(players + f, self.covariates[:, f]) for f in range(features)]
        if features:
            block = self.covariates.T @ (weights.uu[:, None] * self.covariates)
            matrix[players : players + features, players : players + features] = block
        for row, z in borders:
            matrix[row, :players] = self.incidence(weights.uu * z)
        if weights.ut is not None:
            matrix[-1, :players] = self.incidence(weights.ut)
            for row, z in borders:
                matrix[-1, row] = matrix[row, -1] = float(weights.ut @ z)
            matrix[-1, -1] = weights.tt
        matrix[:players, players:] = matrix[players:, :players].T
        return matrix

    def incidence(self, q: Floats) -> Floats:
        """Sums over a player's edges, (E,) -> (P,): those that it is first in minus those that it is second in."""
        return _sums(self.first, q, self.num_players) - _sums(self.second, q, self.num_players)


def _sums(ends: Ints, q: Floats, count: int) -> Floats:
    return np.bincount(ends, q, count).astype(np.float64, copy=False)  # of no edges integers


class Battles(NamedTuple):
    """Summed weights of the outcomes of every edge, (E,) each. Half ties are half a win on either side."""

    wins: Floats  # of the edge's first player
    losses: Floats
    ties: Floats | None  # Davidson's

    @property
    def total(self) -> Floats:
        return self.wins + self.losses if self.ties is None else self.wins + self.losses + self.ties


class Curvature(NamedTuple):
    """Second derivatives, negated: in u, in u and log nu, and in log nu summed over edges."""

    uu: Floats  # (E,)
    ut: Floats | None  # (E,)
    tt: float


def battles(design: Design, units: Units, sums: Floats) -> Battles:
    """(U,) summed weights of units -> those of the edges' outcomes."""
    edges = len(design.first)
    slots = np.bincount(3 * units.edge + units.outcome, sums, 3 * edges).reshape(edges, 3)
    wins, losses, ties = slots.T.copy()
    return Battles(wins, losses, ties) if design.davidson else Battles(wins + 0.5 * ties, losses + 0.5 * ties, None)


class Probabilities(NamedTuple):
    """Of the outcomes of edges; without Davidson's ties the first two sum to 1. Each is exact however small."""

    win: Floats
    loss: Floats
    tie: Floats | None


def probabilities(u: Floats, log_nu: float | None) -> Probabilities:
    """Of log-odds ``u`` of any shape."""
    if log_nu is None:
        x = np.exp(-np.abs(u))
        large, small = 1 / (1 + x), x / (1 + x)
        return Probabilities(np.where(u < 0, small, large), np.where(u < 0, large, small), None)
    half = 0.5 * u
    top = np.maximum(np.abs(half), log_nu)
    win, loss, tie = np.exp(half - top), np.exp(-half - top), np.exp(log_nu - top)
    total = win + loss + tie
    return Probabilities(win / total, loss / total, tie / total)


def curvature(p: Probabilities, data: Battles) -> Curvature:
    if p.tie is None:
        return Curvature(data.total * p.win * p.loss, None, 0.0)
    decided, total = p.win + p.loss, data.total
    uu = total * (p.win * p.loss + 0.25 * p.tie * decided)
    return Curvature(uu, -0.5 * total * (p.win - p.loss) * p.tie, float(total @ (p.tie * decided)))


def log_likelihood(design: Design, parameters: Floats, data: Battles) -> float:
    u = design.log_odds(parameters)
    if data.ties is None:
        return -float(data.wins @ np.logaddexp(0, -u) + data.losses @ np.logaddexp(0, u))
    log_nu = parameters[-1]
    normaliser = np.logaddexp(np.logaddexp(0.5 * u, -0.5 * u), log_nu)
    win, loss, tie = 0.5 * u - normaliser, -0.5 * u - normaliser, log_nu - normaliser
    return float(data.wins @ win + data.losses @ loss + data.ties @ tie)


def hessian(design: Design, weights: Curvature, prior: float) -> Floats:
    """The negated Hessian of the penalised log-likelihood, (n, n)."""
    matrix = design.assemble(weights)
    penalised = np.arange(design.size - design.davidson)
    matrix[penalised, penalised] += prior
    return matrix


def score_variance(design: Design, p: Probabilities, squares: Battles, half_ties: Floats) -> Floats:
    """Sum over battles of the outer products of their scores, (n, n).

    Args:
        squares: summed squares of weights of the outcomes, half ties not among them.
        half_ties: (E,) those of ties that count as half a win on either side.
    """
    if p.tie is None or squares.ties is None:
        even = 0.5 * (p.loss - p.win)
        uu = squares.wins * p.loss**2 + squares.losses * p.win**2 + half_ties * even**2
        return design.assemble(Curvature(uu, None, 0.0))
    mean = 0.5 * (p.win - p.loss)
    uu, ut, tt = np.zeros_like(mean), np.zeros_like(mean), 0.0
    for w, of_u, of_tie in (
        (squares.wins, p.loss + 0.5 * p.tie, -p.tie),
        (squares.losses, -(p.win + 0.5 * p.tie), -p.tie),
        (squares.ties, -mean, p.win + p.loss),
    ):
        uu += w * of_u**2
        ut += w * of_u * of_tie
        tt += float(w @ of_tie**2)
    return design.assemble(Curvature(uu, ut, tt))


def fix_gauge(matrix: Floats, num_players: int) -> Floats:
    """``matrix`` plus curvature along a shift of all strengths, to which everything else is orthogonal."""
    scale = float(np.trace(matrix[:num_players, :num_players])) / num_players**2
    fixed = matrix.copy()
    fixed[:num_players, :num_players] += scale or 1.0
    return fixed


def inverse(matrix: Floats) -> Floats:
    """Of a symmetric positive definite matrix."""
    if len(matrix) <= SMALL_MATRIX:
        out = np.ascontiguousarray(matrix).copy()
        if _cpu().invert(out.ctypes.data, len(out)):
            return out
    return np.linalg.inv(matrix).astype(np.float64, copy=False)


# ---- Whether the covariates can be told from the players ----


def unidentified(design: Design, total: Floats) -> list[int]:
    """Covariates of which a combination is zero, or a difference of players' numbers, wherever there is a battle.

    Their least squares residuals on the players, weighted by (E,) ``total``, are then linearly dependent.
    """
    z = design.covariates
    norms = np.sqrt(total @ z**2)
    if np.any(norms == 0):
        return np.flatnonzero(norms == 0).tolist()
    z = z / norms
    weighted = total[:, None] * z
    right = np.stack([design.incidence(column) for column in weighted.T], 1)
    plain = Design(design.num_players, design.first, design.second, z[:, :0], False)
    values, vectors = np.linalg.eigh(z.T @ weighted - right.T @ _solve_laplacian(plain, total, right))
    return np.flatnonzero(np.any(np.abs(vectors[:, values < 1e-9]) > 1e-3, axis=1)).tolist()


def _solve_laplacian(design: Design, c: Floats, right: Floats) -> Floats:
    """X with L X = right, L = sum over edges of c (e_i - e_j) (e_i - e_j)^T; the columns of right sum to 0."""
    if design.size <= DENSE_PARAMETERS:
        matrix = fix_gauge(design.assemble(Curvature(c, None, 0.0)), design.size)
        return np.linalg.solve(matrix, right).astype(np.float64, copy=False)
    degrees = _sums(design.first, c, design.size) + _sums(design.second, c, design.size)
    columns: list[Floats] = []
    for residual in right.T.copy():
        x, direction = np.zeros_like(residual), residual / degrees
        size = goal = float(residual @ direction)
        for _ in range(10 * design.size):
            if size <= 1e-18 * goal:
                break
            moved = design.incidence(c * design.log_odds(direction))
            rate = size / float(direction @ moved)
            x += rate * direction
            residual -= rate * moved
            z = residual / degrees
            before, size = size, float(residual @ z)
            direction = z + size / before * direction
        columns.append(x)
    return np.stack(columns, 1)


# ---- Fits ----


class Fits(NamedTuple):
    """Maxima of S samples; where the status is not CONVERGED, the numbers mean nothing."""

    parameters: Floats  # (S, n), strengths centred
    status: NDArray[np.int8]  # (S,)
    iterations: NDArray[np.int32]  # (S,)
    gradient: Floats  # (S, n) of the penalised log-likelihood; (0, n) for replicates


def fit(design: Design, units: Units, prior: float) -> Fits:
    """The fit to the battles as they are, from equal strengths. Whether there is a maximum is not looked into."""
    start = np.zeros(design.size)
    return _solve(design, units, prior, start, counts=units.count[None], tolerance=1e-10, check=False)


def replicates(design: Design, units: Units, prior: float, start: Floats, count: int, seed: int) -> Fits:
    """Fits to ``count`` resamples of the battles, each with its own stream of random numbers."""
    battles, number = int(units.count.sum()), len(units.edge)
    # A step of 1e-5, taken with the tolerance that it then has, leaves errors of some 1e-9.
    settings: dict[str, Any] = {"prior": prior, "start": start, "tolerance": 1e-5, "check": True}
    if battles <= DRAWS_PER_UNIT * number and battles < 2**32:
        unit_of = np.repeat(np.arange(number, dtype=np.int32), units.count)
        return _solve(design, units, samples=count, unit_of=unit_of, seed=seed, **settings)
    share, parts = units.count / battles, list[Fits]()
    block = max(1, _COUNTS_BYTES // (8 * number))
    for begin in range(0, count, block):
        counts = np.empty((min(block, count - begin), number), np.int64)
        for row in range(len(counts)):
            sequence = np.random.SeedSequence(seed, spawn_key=(begin + row,))
            counts[row] = np.random.Generator(np.random.PCG64(sequence)).multinomial(battles, share)
        parts.append(_solve(design, units, counts=counts, **settings))
    return Fits(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _solve(
    design: Design,
    units: Units,
    prior: float,
    start: Floats,
    *,
    tolerance: float,
    check: bool,
    counts: Ints | None = None,
    samples: int | None = None,
    unit_of: NDArray[np.int32] | None = None,
    seed: int = 0,
) -> Fits:
    """Fits to samples with (S, U) ``counts`` of the units, or to ``samples`` that are drawn from ``unit_of``."""
    size = len(counts) if counts is not None else samples or 0
    out = Fits(
        np.empty((size, design.size)),
        np.empty(size, np.int8),
        np.empty(size, np.int32),
        np.empty((0 if check else size, design.size)),
    )
    arrays = design.first, design.second, np.ascontiguousarray(design.covariates), units.edge, units.outcome
    first, second, covariates, edge, outcome = (x.ctypes.data for x in arrays)
    weight, start = np.ascontiguousarray(units.weight), np.ascontiguousarray(start)
    battles = 0 if unit_of is None else len(unit_of)
    _cpu().bradley_terry(
        (design.num_players, len(design.first), first, second, covariates, design.covariates.shape[1], design.davidson),
        (len(units.edge), edge, outcome, weight.ctypes.data),
        (_address(counts), _address(unit_of), battles, seed, 0),
        (prior, tolerance, DENSE_PARAMETERS, start.ctypes.data, check),
        (size, *(_address(x) if len(x) else 0 for x in (out.parameters, out.gradient, out.status, out.iterations))),
        torch.get_num_threads(),
    )
    return out


def _address(x: NDArray[Any] | None) -> int:
    return 0 if x is None else x.ctypes.data


def davidson_edges(design: Design, up: Bools, down: Bools, tied: Bools) -> tuple[Ints, Ints, tuple[Ints, Ints]]:
    """Winners, losers, and the pairs that tied, both ways."""
    winners = np.concatenate((design.first[up], design.second[down]))
    losers = np.concatenate((design.second[up], design.first[down]))
    one, other = design.first[tied], design.second[tied]
    return winners, losers, (np.concatenate((one, other)), np.concatenate((other, one)))
