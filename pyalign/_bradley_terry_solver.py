"""Bradley-Terry by Newton's method over deduplicated pairs, for many samples of the battles at once.

Parameters are columns of (n, B): strengths (P,), covariate coefficients (F,), with Davidson's ties log nu. An edge is a
pair of players (with covariates: and a row of them) that met; the outcome depends on u = theta_i - theta_j + z gamma.

The log-likelihood is concave and its third derivative along a step is at most R times the second, R being how far the
step moves the log-odds of an edge. So a Newton step always rises by a fixed share of what its slope promises if it is
shortened to log(1 + R) / R, or taken whole where R <= 1 (Bach 2010, Sun and Tran-Dinh 2019): convergence needs no line
search and no values of the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyalign._bradley_terry_graph import Bools, Ints, Segments, segments, strongly_connected, ties_dominate

Floats = NDArray[np.float64]

DENSE_PARAMETERS = 2048  # up to here Hessians are factorised; beyond, conjugate gradients
MAX_ITERATIONS = 200
_BLOCK = 1 << 17  # numbers in an array of edges times samples: a few of these stay in a core's cache


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

    @cached_property
    def _at_first(self) -> Segments:
        return segments(self.first)

    @cached_property
    def _at_second(self) -> Segments:
        return segments(self.second)

    def log_odds(self, parameters: Floats, space: Space | None = None) -> Floats:
        """u of every edge, (n, B) -> (E, B)."""
        u, other = (None, None) if space is None else space[:2]
        u = np.take(parameters, self.first, axis=0, out=u, mode="clip")
        u -= np.take(parameters, self.second, axis=0, out=other, mode="clip")
        if self.covariates.shape[1]:
            u += self.covariates @ parameters[self.num_players : self.num_players + self.covariates.shape[1]]
        return u

    def adjoint(self, q: Floats, of_ties: Floats | None, space: Space | None = None) -> Floats:
        """The transpose of (log_odds, log nu): (E, B) and (B,) -> (n, B); ``space[0]`` may be ``q``."""
        out = np.zeros((self.size, q.shape[1]))
        for ends, add in ((self._at_first, np.add), (self._at_second, np.subtract)):
            sorted_q = q
            if ends.order is not None:
                sorted_q = np.take(q, ends.order, axis=0, out=None if space is None else space[1], mode="clip")
            if len(ends.starts):
                out[ends.players] = add(out[ends.players], np.add.reduceat(sorted_q, ends.starts, axis=0))
        players, features = self.num_players, self.covariates.shape[1]
        if features:
            out[players : players + features] = self.covariates.T @ q
        if of_ties is not None:
            out[-1] = of_ties
        return out

    def degrees(self, c: Floats) -> Floats:
        """Sums over each player's edges, (E, B) -> (P, B)."""
        out = np.zeros((self.num_players, c.shape[1]))
        for ends in (self._at_first, self._at_second):
            if len(ends.starts):
                sorted_c = c if ends.order is None else np.take(c, ends.order, axis=0)
                out[ends.players] += np.add.reduceat(sorted_c, ends.starts, axis=0)
        return out

    def assemble(self, weights: Curvature) -> Floats:
        """X^T diag(weights) X for one sample, (n, n)."""
        players, features = self.num_players, self.covariates.shape[1]
        matrix = np.zeros((self.size, self.size))
        c = weights.uu[:, 0]
        pair = self.first * players + self.second
        square = matrix[:players, :players]
        if players * players <= 4 * len(pair) + 65536:
            square -= np.bincount(pair, c, players * players).reshape(players, players)
        else:
            np.subtract.at(square, (self.first, self.second), c)
        square += square.T
        square[np.diag_indices(players)] -= square.sum(1)
        borders = [(players + f, self.covariates[:, f]) for f in range(features)]
        if features:
            block = self.covariates.T @ (c[:, None] * self.covariates)
            matrix[players : players + features, players : players + features] = block
        for row, z in borders:
            matrix[row, :players] = self._incidence(c * z)
        if weights.ut is not None and weights.tt is not None:
            mixed = weights.ut[:, 0]
            matrix[-1, :players] = self._incidence(mixed)
            for row, z in borders:
                matrix[-1, row] = matrix[row, -1] = float(mixed @ z)
            matrix[-1, -1] = weights.tt[0]
        matrix[:players, players:] = matrix[players:, :players].T
        return matrix

    def _incidence(self, q: Floats) -> Floats:
        return np.bincount(self.first, q, self.num_players) - np.bincount(self.second, q, self.num_players)


class Battles(NamedTuple):
    """Summed weights of the outcomes of every edge in B samples. Half ties are half a win on either side."""

    wins: Floats  # (E, B) of the edge's first player
    losses: Floats  # (E, B)
    ties: Floats | None  # (E, B) Davidson's

    @property
    def total(self) -> Floats:
        return self.wins + self.losses if self.ties is None else self.wins + self.losses + self.ties


class Curvature(NamedTuple):
    """Second derivatives, negated: in u, in u and log nu, and in log nu summed over edges."""

    uu: Floats  # (E, B)
    ut: Floats | None  # (E, B)
    tt: Floats | None  # (B,)


def battles(design: Design, units: Units, sums: Floats) -> Battles:
    """(U, B) summed weights of units -> those of the edges' outcomes."""
    slot = 3 * units.edge + units.outcome
    starts = np.flatnonzero(np.concatenate(([True], slot[1:] != slot[:-1])))
    if len(starts) < len(slot):
        sums, slot = np.add.reduceat(sums, starts, axis=0), slot[starts]
    by_outcome: list[Floats] = []
    for outcome in range(2 + (design.davidson or bool(np.any(units.outcome == 2)))):
        mine = slot % 3 == outcome
        target = np.zeros((len(design.first), sums.shape[1]))
        target[slot[mine] // 3] = sums[mine]
        by_outcome.append(target)
    wins, losses, *ties = by_outcome
    if ties and not design.davidson:
        half = 0.5 * ties[0]
        wins += half
        losses += half
    return Battles(wins, losses, ties[0] if design.davidson else None)


# Arrays (E, B) to work in: fresh memory of this size costs more than the arithmetic, the more so in several threads.
Space = tuple[Floats, Floats, Floats, Floats, Floats]


class Probabilities(NamedTuple):
    """Of the outcomes of edges; without Davidson's ties the first two sum to 1. Each is exact however small."""

    win: Floats
    loss: Floats
    tie: Floats | None


def probabilities(u: Floats, log_nu: Floats | None, out: Floats | None = None) -> Probabilities:
    """(E, B) log-odds and (B,) log nu -> the probabilities of the outcomes. ``u`` may be overwritten."""
    if log_nu is None:
        odds = np.exp(np.negative(np.clip(u, -700, 700, out=u), out=u), out=u)
        win = np.add(odds, 1, out=out)
        np.reciprocal(win, out=win)
        return Probabilities(win, np.multiply(odds, win, out=odds), None)
    half = 0.5 * u
    top = np.maximum(np.abs(half), log_nu)
    win, loss, tie = np.exp(half - top), np.exp(-half - top), np.exp(log_nu - top)
    total = win + loss + tie
    return Probabilities(win / total, loss / total, tie / total)


def derivatives(
    design: Design, p: Probabilities, data: Battles, space: Space | None = None
) -> tuple[Floats, Curvature]:
    """The gradient, (n, B), and the curvature of the log-likelihood; ``p`` lies in ``space[3]`` and ``space[4]``."""
    if p.tie is None or data.ties is None:
        slope, other, curve = (None, None, None) if space is None else space[:3]
        slope = np.multiply(data.wins, p.loss, out=slope)
        slope -= np.multiply(data.losses, p.win, out=other)
        curve = np.add(data.wins, data.losses, out=curve)
        curve *= p.win
        curve *= p.loss
        return design.adjoint(slope, None, space), Curvature(curve, None, None)
    total, gap = data.total, p.win - p.loss
    # dl/du = (wins - losses - total (p_win - p_loss)) / 2, written so that nothing cancels.
    slope = data.wins * (p.loss + 0.5 * p.tie) - data.losses * (p.win + 0.5 * p.tie) - 0.5 * data.ties * gap
    of_ties = data.ties * (p.win + p.loss) - (data.wins + data.losses) * p.tie
    uu = total * (p.win * p.loss + 0.25 * p.tie * (p.win + p.loss))
    tt = total * p.tie * (p.win + p.loss)
    return design.adjoint(slope, of_ties.sum(0)), Curvature(uu, -0.5 * total * gap * p.tie, tt.sum(0))


def log_likelihood(design: Design, parameters: Floats, data: Battles) -> float:
    """Of one sample; a half tie is half a win on either side."""
    u = design.log_odds(parameters)[:, 0]
    wins, losses = data.wins[:, 0], data.losses[:, 0]
    if data.ties is None:
        return -float(wins @ np.logaddexp(0, -u) + losses @ np.logaddexp(0, u))
    log_nu = parameters[-1, 0]
    normaliser = np.logaddexp(np.logaddexp(0.5 * u, -0.5 * u), log_nu)
    return float(
        wins @ (0.5 * u - normaliser) - losses @ (0.5 * u + normaliser) + data.ties[:, 0] @ (log_nu - normaliser)
    )


def score_variance(design: Design, p: Probabilities, squares: Battles, half_ties: Floats) -> Floats:
    """Sum over battles of the outer products of their scores, (n, n).

    Args:
        squares: summed squares of weights of the outcomes, ties apart.
        half_ties: (E, 1) those of ties that count as half a win on either side.
    """
    if p.tie is None or squares.ties is None:
        even = 0.5 * (p.loss - p.win)
        uu = squares.wins * p.loss**2 + squares.losses * p.win**2 + half_ties * even**2
        return design.assemble(Curvature(uu, None, None))
    mean = 0.5 * (p.win - p.loss)
    uu, ut, tt = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(mean)
    for w, of_u, of_tie in (
        (squares.wins, p.loss + 0.5 * p.tie, -p.tie),
        (squares.losses, -(p.win + 0.5 * p.tie), -p.tie),
        (squares.ties, -mean, p.win + p.loss),
    ):
        uu += w * of_u**2
        ut += w * of_u * of_tie
        tt += w * of_tie**2
    return design.assemble(Curvature(uu, ut, tt.sum(0)))


# ---- Newton's method ----


class Solution(NamedTuple):
    parameters: Floats  # (n, B)
    converged: Bools  # (B,)
    recedes: Bools  # (B,) proven to have no maximum
    iterations: int
    gradient: Floats  # (n, B) of the penalised log-likelihood


Apply = Callable[[Floats], Floats]


def hessian(design: Design, curvature: Curvature, prior: float) -> Floats:
    """The negated Hessian of the penalised log-likelihood, (n, n), of one sample."""
    matrix = design.assemble(curvature)
    penalised = design.size - design.davidson
    matrix[np.arange(penalised), np.arange(penalised)] += prior
    return matrix


def fix_gauge(matrix: Floats, num_players: int) -> Floats:
    """``matrix`` plus curvature along a shift of all strengths, to which everything else is orthogonal."""
    scale = float(np.trace(matrix[:num_players, :num_players])) / num_players**2
    fixed = matrix.copy()
    fixed[:num_players, :num_players] += scale or 1.0
    return fixed


def newton(
    design: Design,
    data: Battles,
    prior: float,
    start: Floats,
    precondition: Apply | None = None,
    tolerance: float = 1e-10,
) -> Solution:
    """The maximum of the log-likelihood minus prior / 2 (|theta|^2 + |gamma|^2), in each of B samples.

    Args:
        start: (n, B), its strengths centred.
        precondition: an approximate inverse Hessian for conjugate gradients. None: a Hessian (B = 1) is factorised, or,
            where it is too large, preconditioned by its diagonal.
        tolerance: on the largest entry of a step, in natural log units.
    """
    parameters = start.copy()
    count, penalised = start.shape[1], design.size - design.davidson
    space: Space = tuple(np.empty((len(design.first), count)) for _ in range(5))  # pyright: ignore[reportAssignmentType]
    first, second, curve, third, fourth = space
    converged, recedes = np.zeros(count, bool), np.zeros(count, bool)
    gradient, previous, first_decrement = parameters, np.full(count, np.inf), np.ones(count)
    iteration = 0
    for iteration in range(1, MAX_ITERATIONS + 1):
        u = design.log_odds(parameters, (third, fourth, curve, first, second))
        p = probabilities(u, parameters[-1] if design.davidson else None, fourth)
        gradient, curvature = derivatives(design, p, data, space)
        if prior:
            gradient[:penalised] -= prior * parameters[:penalised]
        if precondition is None and design.size <= DENSE_PARAMETERS:
            matrix = fix_gauge(hessian(design, curvature, prior), design.num_players)
            try:
                step = np.linalg.solve(matrix, gradient)
            except np.linalg.LinAlgError:
                break
        else:
            apply = precondition or _inverse_diagonal(design, curvature, prior)
            z = apply(gradient)
            decrement = (z * gradient).sum(0)
            if iteration == 1:
                first_decrement = np.where(decrement > 0, decrement, 1.0)
            # Tighter as the maximum comes near, so that convergence stays faster than linear.
            relative = np.clip(np.sqrt(np.maximum(decrement, 0) / first_decrement), 1e-5, 0.1)
            step = _conjugate_gradients(design, curvature, prior, apply, gradient, z, relative, space)
        if not np.isfinite(step).all():
            break
        moved = design.log_odds(step, space)
        reach = np.abs(moved, out=second).max(0, initial=0)
        if design.davidson:
            reach = np.maximum(reach, 0.5 * reach + np.abs(step[-1]))
        length = np.where(reach > 1, np.log1p(reach) / np.maximum(reach, 1), 1)
        parameters += np.where(converged | recedes, 0, length) * step
        largest = np.abs(step).max(0, initial=0)
        floor = (largest < 1e-6) & (largest > 0.5 * previous)  # of rounding
        converged |= (largest <= tolerance) | floor
        previous = largest
        if prior == 0 and design.size > design.num_players and iteration >= 10:
            recedes |= ~converged & (reach > 0.1) & _recedes(moved, step[-1] if design.davidson else None, reach, data)
        if np.all(converged | recedes):
            break
    parameters[: design.num_players] -= parameters[: design.num_players].mean(0)
    return Solution(parameters, converged, recedes, iteration, gradient)


def _recedes(moved: Floats, of_ties: Floats | None, reach: Floats, data: Battles) -> Bools:
    """Whether the log-likelihood rises, or stays, however far one goes in a direction: no observed outcome loses."""
    slack = 1e-6 * reach
    if of_ties is None or data.ties is None:
        return ~np.any(((data.wins > 0) & (moved < -slack)) | ((data.losses > 0) & (moved > slack)), axis=0)
    half = 0.5 * moved
    top = np.maximum(np.abs(half), of_ties) - slack
    outcomes = ((data.wins, half), (data.losses, -half), (data.ties, np.broadcast_to(of_ties, half.shape)))
    return ~np.any([np.any((weight > 0) & (logit < top), axis=0) for weight, logit in outcomes], axis=0)


def _conjugate_gradients(
    design: Design,
    curvature: Curvature,
    prior: float,
    precondition: Apply,
    gradient: Floats,
    z: Floats,
    relative: Floats,
    space: Space | None = None,
) -> Floats:
    """Steps that solve Hessian @ step = gradient to a relative error in the preconditioner's norm."""
    penalised = design.size - design.davidson

    def product(p: Floats) -> Floats:
        u = design.log_odds(p, space)
        of_ties = None
        if curvature.ut is None or curvature.tt is None:
            u *= curvature.uu
        else:
            of_ties = (curvature.ut * u).sum(0) + curvature.tt * p[-1]
            u = curvature.uu * u + curvature.ut * p[-1]
        out = design.adjoint(u, of_ties, space)
        if prior:
            out[:penalised] += prior * p[:penalised]
        return out

    step, residual, direction = np.zeros_like(gradient), gradient.copy(), z
    size = (residual * z).sum(0)
    goal = relative**2 * size
    for _ in range(10 * design.size + 100):
        active = size > goal
        if not active.any():
            break
        moved = product(direction)
        along = (direction * moved).sum(0)
        rate = np.where(active & (along > 0), size / np.where(along > 0, along, 1.0), 0.0)
        step += rate * direction
        residual -= rate * moved
        z = precondition(residual)
        size, before = (residual * z).sum(0), size
        direction = z + np.where(active, size / np.where(before > 0, before, 1.0), 0.0) * direction
    return step


def inverse_hessian(design: Design, curvature: Curvature, prior: float) -> Apply:
    """A preconditioner: the inverse of one sample's Hessian."""
    inverse = np.linalg.inv(fix_gauge(hessian(design, curvature, prior), design.num_players))
    return lambda x: inverse @ x


def _inverse_diagonal(design: Design, curvature: Curvature, prior: float) -> Apply:
    """A preconditioner for Hessians too large to factorise: each sample's own diagonal."""
    players, penalised = design.num_players, design.size - design.davidson
    diagonal = np.empty((design.size, curvature.uu.shape[1]))
    diagonal[:players] = design.degrees(curvature.uu)
    diagonal[players:penalised] = (design.covariates**2).T @ curvature.uu
    if curvature.tt is not None:
        diagonal[-1] = curvature.tt
    diagonal[:penalised] += prior
    diagonal[diagonal <= 0] = 1

    def apply(x: Floats) -> Floats:
        x = x / diagonal
        x[:players] -= x[:players].mean(0)
        return x

    return apply


def unidentified(design: Design, total: Floats) -> list[int]:
    """Covariates of which a combination is zero, or a difference of players' numbers, wherever there is a battle.

    Their least squares residuals on the players, weighted by (E, 1) ``total``, are then linearly dependent.
    """
    z, players = design.covariates, design.num_players
    norms = np.sqrt((total * z**2).sum(0))
    if np.any(norms == 0):
        return np.flatnonzero(norms == 0).tolist()
    z = z / norms
    plain = Design(players, design.first, design.second, z[:, :0], False)
    curvature = Curvature(total, None, None)
    right = plain.adjoint(total * z, None)
    if players <= DENSE_PARAMETERS:
        left = np.linalg.solve(fix_gauge(plain.assemble(curvature), players), right)
    else:
        precondition = _inverse_diagonal(plain, curvature, 0.0)
        tight = np.full(z.shape[1], 1e-8)
        left = _conjugate_gradients(plain, curvature, 0.0, precondition, right, precondition(right), tight)
    values, vectors = np.linalg.eigh(z.T @ (total * z) - right.T @ left)
    return np.flatnonzero(np.any(np.abs(vectors[:, values < 1e-9]) > 1e-3, axis=1)).tolist()


# ---- The bootstrap ----


class Replicates(NamedTuple):
    parameters: Floats  # (n, B)
    has_maximum: Bools  # (B,)
    converged: Bools  # (B,)


def block_size(design: Design, units: Units) -> int:
    """Replicates that are solved at once."""
    return max(1, min(32, _BLOCK // max(len(design.first), len(units.edge), 1)))


def replicates(
    design: Design,
    units: Units,
    prior: float,
    start: Floats,
    precondition: Apply | None,
    seed: int,
    begin: int,
    end: int,
) -> Replicates:
    """Fits to resamples ``begin`` to ``end`` of the battles, each with its own stream of random numbers."""
    counts = np.empty((end - begin, len(units.edge)))
    total = int(units.count.sum())
    # Drawing battles one by one is a few times faster per draw than a binomial per unit.
    each = np.repeat(np.arange(len(units.edge), dtype=np.int32), units.count) if total <= 20 * len(units.edge) else None
    share = units.count / max(total, 1)
    for row, number in enumerate(range(begin, end)):
        stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(number,))))
        if each is not None:
            counts[row] = np.bincount(each.take(stream.integers(0, max(total, 1), total)), minlength=len(units.edge))
        else:
            counts[row] = stream.multinomial(total, share)
    data = battles(design, units, counts.T * units.weight[:, None])
    exists = np.ones(end - begin, bool)
    if prior == 0:
        exists = _maximum_exists(design, data)
    elif data.ties is not None:
        exists = data.ties.any(0) & (data.wins + data.losses).any(0)
    chosen = np.flatnonzero(exists)
    parameters, converged = np.full((design.size, end - begin), np.nan), np.ones(end - begin, bool)
    if len(chosen):
        if len(chosen) < end - begin:
            data = Battles._make(None if x is None else np.ascontiguousarray(x[:, chosen]) for x in data)
        beginning = np.repeat(start, len(chosen), axis=1)
        solution = newton(design, data, prior, beginning, precondition, tolerance=1e-5)
        parameters[:, chosen] = solution.parameters
        converged[chosen] = solution.converged
        exists[chosen[solution.recedes]] = False
        converged[chosen[solution.recedes]] = True
    return Replicates(parameters, exists, converged)


def _maximum_exists(design: Design, data: Battles) -> Bools:
    """Necessary, and without covariates sufficient."""
    up, down = data.wins > 0, data.losses > 0
    covered = np.all((design.covariates != 0).T.astype(np.float64) @ data.total > 0, axis=0)
    if data.ties is None:
        return covered & strongly_connected(design.num_players, design.first, design.second, up, down)
    tied = data.ties > 0
    exists = strongly_connected(design.num_players, design.first, design.second, up | tied, down | tied)
    exists &= tied.any(0) & (up | down).any(0) & covered
    # A pair that each won of is a circle without ties, so most samples are settled by that.
    for sample in np.flatnonzero(exists & ~(up & down).any(0)):
        exists[sample] = not ties_dominate(
            design.num_players, *davidson_edges(design, up[:, sample], down[:, sample], tied[:, sample])
        )
    return exists


def davidson_edges(design: Design, up: Bools, down: Bools, tied: Bools) -> tuple[Ints, Ints, tuple[Ints, Ints]]:
    """Winners, losers, and the pairs that tied."""
    winners = np.concatenate((design.first[up], design.second[down]))
    losers = np.concatenate((design.second[up], design.first[down]))
    ties = (
        np.concatenate((design.first[tied], design.second[tied])),
        np.concatenate((design.second[tied], design.first[tied])),
    )
    return winners, losers, ties
