"""Bradley-Terry fits: closed forms, choix and scipy as oracles, invariances, errors of the estimates, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pyalign import _bradley_terry_solver as solver
from pyalign import bradley_terry
from pyalign.scoring import NoMaximumError

Battles = tuple[NDArray[np.int64], NDArray[np.int64]]


def simulate(
    players: int, count: int, seed: int = 0, spread: float = 1.0, strengths: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Winners and losers of battles between random pairs, and the strengths that decided them."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=players) * spread if strengths is None else strengths
    first = rng.integers(0, players, count)
    second = (first + rng.integers(1, players, count)) % players
    won = rng.random(count) < 1 / (1 + np.exp(theta[second] - theta[first]))
    return np.where(won, first, second), np.where(won, second, first), theta - theta.mean()


def simulate_ties(players: int, count: int, nu: float, seed: int = 0) -> tuple[Any, Any, NDArray[np.bool_]]:
    """Davidson's model: winners, losers, ties."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=players)
    first = rng.integers(0, players, count)
    second = (first + rng.integers(1, players, count)) % players
    u = theta[first] - theta[second]
    weights = np.stack([np.exp(u / 2), np.exp(-u / 2), np.full(count, nu)])
    drawn = rng.random(count) * weights.sum(0)
    outcome = (drawn > weights[0]).astype(int) + (drawn > weights[:2].sum(0))
    return np.where(outcome == 1, second, first), np.where(outcome == 1, first, second), outcome == 2


def battle_terms(parameters: torch.Tensor, winners: Any, losers: Any, players: int, **options: Any) -> torch.Tensor:
    """The log-likelihood straight from its definition, battle by battle, each times its weight."""
    theta, gamma = parameters[:players], parameters[players:]
    u = theta[torch.as_tensor(winners)] - theta[torch.as_tensor(losers)]
    davidson = options.get("tie_model") == "davidson"
    if "covariates" in options:
        z = torch.as_tensor(options["covariates"], dtype=torch.float64)
        u = u + z @ gamma[: z.shape[1]]
    ties = torch.as_tensor(options.get("ties", np.zeros(len(u), bool)))
    if davidson:
        d = torch.logaddexp(torch.logaddexp(u / 2, -u / 2), parameters[-1])
        terms = torch.where(ties, parameters[-1] - d, u / 2 - d)
    else:
        win, loss = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
        terms = torch.where(ties, (win + loss) / 2, win)
    weight = torch.as_tensor(options.get("weight", np.ones(len(u))), dtype=torch.float64)
    return weight * terms


def objective(parameters: torch.Tensor, winners: Any, losers: Any, players: int, **options: Any) -> torch.Tensor:
    """The penalised log-likelihood."""
    penalised = parameters[:-1] if options.get("tie_model") == "davidson" else parameters
    ridge = options.get("prior", 0.0) / 2 * penalised.square().sum()
    return battle_terms(parameters, winners, losers, players, **options).sum() - ridge


def parameters_of(fit: Any) -> torch.Tensor:
    nu = [] if fit.tie_parameter is None else [torch.tensor([math.log(fit.tie_parameter)], dtype=torch.float64)]
    return torch.cat([fit.strengths, fit.coefficients, *nu])


def close(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
    )


COVARIATES = np.random.default_rng(5).normal(size=(400, 2))
W, L, _ = simulate(6, 400, seed=1)
TIES = np.random.default_rng(2).random(400) < 0.2
WEIGHT = np.random.default_rng(3).choice([0.5, 1.0, 2.0], 400)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "ties": {"ties": TIES},
    "davidson": {"ties": TIES, "tie_model": "davidson"},
    "covariates": {"covariates": COVARIATES},
    "prior": {"prior": 0.7},
    "all half": {"weight": WEIGHT, "ties": TIES, "covariates": COVARIATES, "prior": 2.0},
    "all davidson": {
        "weight": WEIGHT, "ties": TIES, "tie_model": "davidson", "covariates": COVARIATES, "prior": 0.01,
    },
}  # fmt: skip
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


# ---- Golden values ----


@pytest.mark.smoke
def test_two_players_have_a_closed_form():
    """7 wins to 3: log-odds log(7/3) with standard error sqrt(1/7 + 1/3)."""
    fit = bradley_terry([0] * 7 + [1] * 3, [1] * 7 + [0] * 3, num_players=2)
    gap, error = math.log(7 / 3), math.sqrt(1 / 7 + 1 / 3)
    close(fit.strengths, torch.tensor([gap / 2, -gap / 2], dtype=torch.float64))
    close(fit.difference_standard_errors()[0, 1], error, rtol=1e-9)
    close(fit.standard_errors, torch.full((2,), error / 2, dtype=torch.float64))
    close(fit.sandwich, fit.standard_errors)  # the model has a parameter for every frequency: it can't be wrong
    assert fit.log_likelihood == pytest.approx(7 * math.log(0.7) + 3 * math.log(0.3), rel=1e-12)
    assert fit.num_battles == 10
    assert fit.gradient_norm < 1e-9
    anchored = bradley_terry([0] * 7 + [1] * 3, [1] * 7 + [0] * 3, num_players=2, anchor=(1, 0.25))
    close(anchored.strengths, torch.tensor([gap + 0.25, 0.25], dtype=torch.float64))
    close(anchored.standard_errors, torch.tensor([error, 0.0], dtype=torch.float64))
    close(anchored.win_probabilities(), torch.tensor([[0.5, 0.7], [0.3, 0.5]], dtype=torch.float64))


@pytest.mark.smoke
def test_two_players_that_tie_have_a_closed_form():
    """Davidson: w, l, t fix p_win : p_loss : p_tie, and nu = t / sqrt(w l)."""
    winners, losers = [0] * 6 + [1] * 2 + [0] * 4, [1] * 6 + [0] * 2 + [1] * 4
    ties = [False] * 8 + [True] * 4
    fit = bradley_terry(winners, losers, num_players=2, ties=ties, tie_model="davidson")
    close(fit.strengths[0] - fit.strengths[1], math.log(3))
    assert fit.tie_parameter == pytest.approx(4 / math.sqrt(12), rel=1e-9)
    close(fit.win_probabilities()[0, 1], 0.5)
    close(fit.tie_probabilities()[0, 1], 1 / 3)
    half = bradley_terry(winners, losers, num_players=2, ties=ties)
    close(half.strengths[0] - half.strengths[1], math.log(8 / 4))


def test_elo_scale():
    """400 points are odds of ten to one; a natural log unit is 173.718 points."""
    fit = bradley_terry([0] * 10 + [1], [1] * 10 + [0], num_players=2, anchor=1)
    elo = fit.to_elo()
    close(elo.ratings, torch.tensor([1400.0, 1000.0], dtype=torch.float64))
    unit = 173.71779276130073
    close(elo.lower, 1000 + unit * fit.intervals.lower, rtol=1e-12)
    close(elo.upper, 1000 + unit * fit.intervals.upper, rtol=1e-12)
    close(elo.standard_errors, unit * fit.standard_errors, rtol=1e-12)
    assert (elo.method, elo.level) == ("normal", 0.95)
    close(fit.to_elo(scale=1.0, base=0).ratings[0], 1.0)


# ---- Oracles ----


@pytest.mark.parametrize(("players", "count", "seed"), [(5, 300, 0), (40, 4000, 1), (100, 100_000, 2)])
def test_agrees_with_choix(players: int, count: int, seed: int):
    choix = pytest.importorskip("choix")
    winners, losers, _ = simulate(players, count, seed)
    fit = bradley_terry(torch.from_numpy(winners), torch.from_numpy(losers), num_players=players)
    data = list(zip(winners.tolist(), losers.tolist(), strict=True))
    theirs = choix.ilsr_pairwise(players, data, tol=1e-11)
    close(fit.strengths, theirs - theirs.mean(), atol=1e-6, rtol=0)
    assert fit.log_likelihood == pytest.approx(choix.log_likelihood_pairwise(data, theirs), rel=1e-12)


def test_the_prior_is_that_of_choix():
    choix = pytest.importorskip("choix")
    winners, losers, _ = simulate(8, 40, seed=3)
    fit = bradley_terry(winners, losers, num_players=9, prior=0.3)
    theirs = choix.opt_pairwise(9, list(zip(winners.tolist(), losers.tolist(), strict=True)), alpha=0.15, tol=1e-12)
    close(fit.strengths, theirs - theirs.mean(), atol=1e-6, rtol=0)


@every_case
def test_agrees_with_direct_optimisation(options: dict[str, Any]):
    optimize = pytest.importorskip("scipy.optimize")
    fit = bradley_terry(W, L, num_players=6, **options)

    def negative(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        leaf = torch.from_numpy(x.copy()).requires_grad_()
        value = -objective(leaf, W, L, 6, **options)
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.numpy()

    start = np.zeros(len(parameters_of(fit)))
    best = optimize.minimize(negative, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    theirs = best.x.copy()
    theirs[:6] -= theirs[:6].mean()
    close(parameters_of(fit), theirs, atol=1e-6, rtol=0)


@every_case
def test_the_gradient_at_the_maximum_is_zero(options: dict[str, Any]):
    fit = bradley_terry(W, L, num_players=6, **options)
    leaf = parameters_of(fit).requires_grad_()
    objective(leaf, W, L, 6, **options).backward()
    assert leaf.grad is not None
    assert float(leaf.grad.norm()) < 1e-8
    assert fit.gradient_norm < 1e-8
    unpenalised = objective(parameters_of(fit), W, L, 6, **{**options, "prior": 0.0})
    assert fit.log_likelihood == pytest.approx(float(unpenalised), rel=1e-12)


# ---- Standard errors ----


@every_case
def test_standard_errors_are_those_of_the_numerical_hessian(options: dict[str, Any]):
    fit = bradley_terry(W, L, num_players=6, **options)
    x = parameters_of(fit)
    hessian = -torch.autograd.functional.hessian(lambda p: objective(p, W, L, 6, **options), x)
    scores = torch.autograd.functional.jacobian(lambda p: battle_terms(p, W, L, 6, **options), x, vectorize=True)
    shift = torch.zeros(len(x), dtype=torch.float64)
    shift[:6] = 1
    inverse = torch.linalg.inv(hessian + torch.outer(shift, shift))
    for anchor in (None, 2):
        anchored = bradley_terry(W, L, num_players=6, anchor=anchor, **options)
        gauge = torch.eye(len(x), dtype=torch.float64)
        gauge -= torch.outer(shift, shift / 6 if anchor is None else torch.eye(len(x), dtype=torch.float64)[anchor])
        covariance = gauge @ inverse @ gauge.T
        sandwich = gauge @ inverse @ scores.T @ scores @ inverse @ gauge.T
        close(anchored.covariance, covariance[:6, :6], atol=1e-8, rtol=1e-6)
        close(anchored.robust_covariance, sandwich[:6, :6], atol=1e-8, rtol=1e-6)
        close(anchored.standard_errors, covariance.diagonal()[:6].clamp(min=0).sqrt(), atol=1e-7, rtol=1e-6)
        count = len(fit.coefficients)
        close(anchored.coefficient_standard_errors, covariance.diagonal()[6 : 6 + count].sqrt(), rtol=1e-6)
        close(anchored.robust_coefficient_standard_errors, sandwich.diagonal()[6 : 6 + count].sqrt(), rtol=1e-6)
        close(
            anchored.difference_standard_errors()[1, 4],
            (covariance[1, 1] + covariance[4, 4] - 2 * covariance[1, 4]).sqrt(),
            rtol=1e-6,
        )
        if fit.tie_parameter is not None:
            assert anchored.tie_parameter_standard_error == pytest.approx(
                fit.tie_parameter * float(covariance[-1, -1].sqrt()), rel=1e-6
            )


@pytest.mark.parametrize("draws_per_unit", [0, 10**9], ids=["binomials", "draws"])
@pytest.mark.parametrize("name", ["plain", "davidson", "covariates", "weight"])
def test_robust_standard_errors_are_those_of_the_bootstrap(
    name: str, draws_per_unit: int, monkeypatch: pytest.MonkeyPatch
):
    """To its own error, 1 / sqrt(2 * 2000) = 1.6 %, four times over, on 4,000 battles, by either sampler."""
    monkeypatch.setattr(solver, "DRAWS_PER_UNIT", draws_per_unit)
    winners, losers, ties = simulate_ties(6, 4000, nu=0.6, seed=9)
    options: dict[str, Any] = {
        "plain": {"ties": ties},
        "davidson": {"ties": ties, "tie_model": "davidson"},
        "covariates": {"ties": ties, "covariates": np.random.default_rng(1).integers(-1, 2, (4000, 1))},
        "weight": {"weight": np.random.default_rng(3).choice([0.5, 1.0, 3.0], 4000)},
    }[name]
    fit = bradley_terry(winners, losers, num_players=6, bootstrap=2000, **options)
    assert fit.bootstrap is not None
    assert fit.bootstrap.strengths.shape == (2000, 6)
    close(fit.bootstrap.strengths.std(0) / fit.sandwich, torch.ones(6), atol=0.065, rtol=0)
    close(fit.bootstrap.strengths.mean(0), fit.strengths, atol=0.01, rtol=0)
    if name == "covariates":
        ratio = fit.bootstrap.coefficients.std(0) / fit.robust_coefficient_standard_errors
        close(ratio, torch.ones(1), atol=0.065, rtol=0)
    if name != "davidson":  # whose likelihood has its ties right
        assert float((fit.sandwich / fit.standard_errors - 1).abs().max()) > 0.1


@pytest.mark.parametrize("bootstrap", [0, 200])
def test_intervals_cover_the_truth(bootstrap: int):
    """95 % intervals in 60 simulations of 8 players: 480 looks, of which 456 +- 14 (3 standard errors) should hit."""
    truth = np.linspace(-1, 1, 8)
    hits = 0
    for seed in range(60):
        winners, losers, _ = simulate(8, 600, seed, strengths=truth)
        lower, upper, level, method = bradley_terry(winners, losers, num_players=8, bootstrap=bootstrap).intervals
        assert (level, method) == (0.95, "percentile" if bootstrap else "normal")
        hits += int(((lower.numpy() <= truth) & (truth <= upper.numpy())).sum())
    assert 438 <= hits <= 475


def test_an_anchor_moves_no_difference():
    free, anchored = (bradley_terry(W, L, num_players=6, bootstrap=20, anchor=a) for a in (None, (3, 1.5)))
    assert float(anchored.strengths[3]) == 1.5
    assert float(anchored.standard_errors[3]) == 0
    close(anchored.strengths - anchored.strengths[0], free.strengths - free.strengths[0])
    close(anchored.difference_standard_errors(), free.difference_standard_errors(), atol=1e-8)
    close(free.strengths.mean(), 0.0)
    close(free.covariance.sum(1), torch.zeros(6, dtype=torch.float64))
    assert anchored.bootstrap is not None
    assert bool((anchored.bootstrap.strengths[:, 3] == 1.5).all())
    assert float(anchored.intervals.lower[3]) == float(anchored.intervals.upper[3]) == 1.5


# ---- Invariances ----


@st.composite
def connected(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Battles in which a circle of wins joins all players."""
    players = draw(st.integers(2, 7))
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, players - 1), st.integers(1, players - 1)).map(
                lambda t: (t[0], (t[0] + t[1]) % players)
            ),
            max_size=30,
        )
    )
    circle = [(i, (i + 1) % players) for i in range(players)]
    winners, losers = zip(*circle, *pairs, strict=True)
    return players, list(winners), list(losers)


@hypothesis.given(case=connected(), data=st.data())
def test_relabelling_players_relabels_strengths(case: tuple[int, list[int], list[int]], data: st.DataObject):
    players, winners, losers = case
    names = data.draw(st.permutations(range(players)))
    fit = bradley_terry(winners, losers, num_players=players)
    other = bradley_terry([names[i] for i in winners], [names[i] for i in losers], num_players=players)
    close(other.strengths[list(names)], fit.strengths, atol=1e-8)
    close(other.standard_errors[list(names)], fit.standard_errors, atol=1e-8)


@hypothesis.given(case=connected(), data=st.data())
def test_order_splits_and_counts_change_nothing(case: tuple[int, list[int], list[int]], data: st.DataObject):
    """A battle of weight w is two of weights v and w - v; n equal battles are one row counted n times."""
    players, winners, losers = case
    size = len(winners)
    counts = data.draw(st.lists(st.integers(1, 3), min_size=size, max_size=size))
    order = data.draw(st.permutations([i for i in range(size) for _ in range(counts[i])]))
    once = bradley_terry(winners, losers, num_players=players, counts=counts)
    many = bradley_terry([winners[i] for i in order], [losers[i] for i in order], num_players=players)
    weighed = bradley_terry(winners, losers, num_players=players, weight=counts)
    split = bradley_terry(
        winners * 2, losers * 2, num_players=players, weight=[0.25 * c for c in counts] + [0.75 * c for c in counts]
    )
    assert torch.equal(once.strengths, many.strengths)
    close(once.sandwich, many.sandwich, rtol=1e-12, atol=1e-12)
    for fit in (weighed, split):
        close(fit.strengths, once.strengths, atol=1e-8)
        close(fit.standard_errors, once.standard_errors, atol=1e-8)
        assert fit.log_likelihood == pytest.approx(once.log_likelihood, rel=1e-9)


def test_a_battle_of_weight_two_is_one_battle_to_the_sandwich():
    double = bradley_terry(W, L, num_players=6, weight=np.full(400, 2.0))
    plain = bradley_terry(W, L, num_players=6)
    close(double.sandwich, plain.sandwich, rtol=1e-6)
    close(double.standard_errors, plain.standard_errors / math.sqrt(2), rtol=1e-6)


def test_a_tie_of_the_half_model_is_two_battles_of_half_the_weight():
    fit = bradley_terry(W, L, num_players=6, ties=TIES)
    weight = np.where(TIES, 0.5, 1.0)
    split = bradley_terry(
        np.concatenate([W, L[TIES]]), np.concatenate([L, W[TIES]]), num_players=6,
        weight=np.concatenate([weight, weight[TIES]]),
    )  # fmt: skip
    close(fit.strengths, split.strengths, atol=1e-8)
    close(fit.standard_errors, split.standard_errors, atol=1e-8)


def test_rows_without_weight_are_not_there():
    winners, losers = np.append(W, 6), np.append(L, 0)
    for name in ("weight", "counts"):
        value = np.append(np.ones(400, np.int64), 0)
        with pytest.raises(NoMaximumError, match="player 6 in no battle"):
            bradley_terry(winners, losers, num_players=7, **{name: value})
        fit = bradley_terry(np.append(W, 5), np.append(L, 0), num_players=6, **{name: value})
        assert torch.equal(fit.strengths, bradley_terry(W, L, num_players=6).strengths)


def test_a_covariate_of_zeros():
    zeros = np.zeros((400, 1))
    with pytest.raises(NoMaximumError, match=r"covariates: got columns \[0\]"):
        bradley_terry(W, L, num_players=6, covariates=zeros)
    fit = bradley_terry(W, L, num_players=6, covariates=zeros, prior=0.5)
    assert float(fit.coefficients[0]) == 0
    close(fit.strengths, bradley_terry(W, L, num_players=6, prior=0.5).strengths, atol=1e-8)


def test_a_covariate_that_is_a_players_own():
    """Not told from the strengths, whatever its values."""
    own = np.random.default_rng(0).normal(size=6)
    with pytest.raises(NoMaximumError, match=r"columns \[1\]"):
        bradley_terry(W, L, num_players=6, covariates=np.stack([COVARIATES[:, 0], own[W] - own[L]], 1))
    with pytest.raises(NoMaximumError, match=r"columns \[0, 1\]"):
        bradley_terry(W, L, num_players=6, covariates=np.stack([COVARIATES[:, 0], 2 * COVARIATES[:, 0]], 1))


def test_a_covariate_that_tells_all_outcomes_apart():
    for options in ({}, {"ties": TIES, "tie_model": "davidson"}):
        z = np.where(TIES, 0.0, 1.0)[:, None] if options else np.ones((400, 1))
        with pytest.raises(NoMaximumError, match=r"covariates: .*tell all outcomes apart"):
            bradley_terry(W, L, num_players=6, covariates=z, **options)
        assert float(bradley_terry(W, L, num_players=6, covariates=z, prior=1.0, **options).coefficients[0]) > 1


def test_an_order_effect_is_found():
    rng = np.random.default_rng(4)
    first, second, _ = simulate(5, 5000, seed=4)
    won = rng.random(5000) < 1 / (1 + math.exp(-0.6))
    winners, losers = np.where(won, first, second), np.where(won, second, first)
    fit = bradley_terry(winners, losers, num_players=5, covariates=np.where(won, 1.0, -1.0)[:, None])
    assert abs(float(fit.coefficients[0]) - 0.6) < 3 * float(fit.coefficient_standard_errors[0])
    # Whose features are subtracted from whose turns the coefficient, and which player is written first does not.
    other = bradley_terry(winners, losers, num_players=5, covariates=np.where(won, -1.0, 1.0)[:, None])
    close(other.coefficients, -fit.coefficients)
    lower, upper, _, method = fit.coefficient_intervals()
    assert method == "normal"
    assert float(lower[0]) < 0.6 < float(upper[0])


def test_a_tie_takes_its_covariates_from_the_first_named():
    z = COVARIATES[:, :1]
    fit = bradley_terry(W, L, num_players=6, ties=TIES, covariates=z)
    turned = bradley_terry(
        np.where(TIES, L, W), np.where(TIES, W, L), num_players=6, ties=TIES, covariates=np.where(TIES[:, None], -z, z)
    )
    close(turned.coefficients, fit.coefficients)
    close(turned.strengths, fit.strengths)


# ---- No maximum ----


@pytest.mark.parametrize(
    ("battles", "players", "message", "group"),
    [
        ([(0, 1), (1, 0), (2, 0)], 3, "player 2 won every battle", [2]),
        ([(0, 1), (1, 0), (0, 2), (1, 2)], 3, "player 2 lost every battle", [2]),
        ([(0, 1), (1, 0), (2, 3), (3, 2)], 4, r"2 groups of players that never met: \[0, 1\]; \[2, 3\]", [2, 3]),
        ([(0, 1), (1, 0), (2, 3), (3, 2), (0, 2)], 4, r"players \[0, 1\] won every battle with the others", [0, 1]),
        ([(0, 1), (1, 0)], 4, r"players \[2, 3\] in no battle", [2, 3]),
        ([], 2, r"players \[0, 1\] in no battle", [0, 1]),
    ],
)
def test_players_without_a_maximum_are_named(
    battles: list[tuple[int, int]], players: int, message: str, group: list[int]
):
    winners, losers = [w for w, _ in battles], [b for _, b in battles]
    with pytest.raises(NoMaximumError, match=message) as error:
        bradley_terry(winners, losers, num_players=players)
    assert group in error.value.groups
    assert "prior=0.1" in str(error.value)
    fit = bradley_terry(winners, losers, num_players=players, prior=0.1)
    assert bool(fit.strengths.isfinite().all())
    assert bool(fit.standard_errors.isfinite().all())
    assert abs(float(fit.strengths.sum())) < 1e-9


def test_a_tie_connects_both_ways():
    fit = bradley_terry([0, 1], [1, 2], num_players=3, ties=[True, True])
    close(fit.strengths, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("battles", "ties", "exists"),
    [
        ([(0, 1), (1, 0), (0, 1)], [False, False, True], True),
        ([(0, 1), (0, 1)], [False, True], False),  # gaps and nu grow together
        ([(0, 1), (1, 2), (2, 0), (0, 1)], [False, False, False, True], True),
        ([(0, 1), (1, 2), (2, 0)], [False, False, True], True),  # a circle of two wins and a tie
        ([(0, 1), (1, 2), (2, 0)], [False, True, True], False),
        ([(0, 1), (1, 0)], [False, False], False),
        ([(0, 1), (1, 0)], [True, True], False),
    ],
)
@pytest.mark.smoke
def test_when_davidsons_maximum_exists(battles: list[tuple[int, int]], ties: list[bool], exists: bool):
    winners, losers = [w for w, _ in battles], [b for _, b in battles]
    players = max(winners + losers) + 1

    def fit(**options: Any) -> Any:
        return bradley_terry(winners, losers, num_players=players, ties=ties, tie_model="davidson", **options)

    if exists:
        assert bool(fit().strengths.isfinite().all())
        assert float(fit().strengths.abs().max()) < 5
    else:
        with pytest.raises(NoMaximumError, match="tie_model: got 'davidson'"):
            fit()
    if any(ties) and not all(ties):
        assert bool(fit(prior=0.1).strengths.isfinite().all())


def separates(winners: Any, losers: Any, ties: Any, covariates: Any, players: int, davidson: bool) -> bool:
    """Whether some direction lets no observed outcome lose, or leaves all as they are, by linear programming."""
    optimize = pytest.importorskip("scipy.optimize")
    count, features = covariates.shape
    x = np.zeros((count, players + features + davidson))
    x[np.arange(count), winners] = 1
    x[np.arange(count), losers] = -1
    x[:, players : players + features] = covariates
    log_nu = np.zeros(x.shape[1])
    log_nu[-1] = davidson
    margins: list[Any] = []  # of the observed outcome's logit over those of the others
    for u, tie in zip(x, ties, strict=True):
        if davidson:
            margins += [log_nu - u / 2, log_nu + u / 2] if tie else [u, u / 2 - log_nu]
        else:
            margins += [u, -u] if tie else [u]
    a = np.array(margins)[:, 1:]  # the first player stays where it is
    best = optimize.linprog(-a.sum(0), A_ub=-a, b_ub=np.zeros(len(a)), bounds=[(-1, 1)] * a.shape[1])
    return -best.fun > 1e-7 or np.linalg.matrix_rank(a) < a.shape[1]


def test_a_maximum_exists_where_linear_programming_has_it():
    rng = np.random.default_rng(0)
    found = {False: 0, True: 0}
    for _ in range(250):
        players, count, features = int(rng.integers(2, 6)), int(rng.integers(3, 25)), int(rng.integers(0, 3))
        winners = rng.integers(0, players, count)
        losers = (winners + rng.integers(1, players, count)) % players
        ties = rng.random(count) < rng.choice([0.0, 0.3])
        z = rng.normal(size=(count, features)) if rng.random() < 0.5 else rng.integers(-1, 2, (count, features)) * 1.0
        davidson = bool(rng.integers(0, 2))
        try:
            fit = bradley_terry(
                winners, losers, num_players=players, ties=ties, covariates=z if features else None,
                tie_model="davidson" if davidson else "half",
            )  # fmt: skip
            assert fit.gradient_norm < 1e-6
            exists = True
        except NoMaximumError:
            exists = False
        assert exists is not separates(winners, losers, ties, z, players, davidson)
        found[exists] += 1
    assert min(found.values()) > 80


# ---- The bootstrap ----


def test_the_bootstrap_is_determined_by_its_seed(threads: Callable[[int], None]):
    threads(1)
    one = bradley_terry(W, L, num_players=6, bootstrap=70, seed=3)
    threads(2)
    two, other, fewer = (
        bradley_terry(W, L, num_players=6, bootstrap=b, seed=s) for b, s in ((70, 3), (70, 4), (40, 3))
    )
    for fit in (one, two, other, fewer):
        assert fit.bootstrap is not None
    assert torch.equal(one.bootstrap.strengths, two.bootstrap.strengths)
    assert not torch.equal(one.bootstrap.strengths, other.bootstrap.strengths)
    close(fewer.bootstrap.strengths, one.bootstrap.strengths[:40], atol=1e-7)


@every_case
@pytest.mark.smoke
def test_replicates_are_fits_to_resampled_battles(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Every replicate against an ordinary fit to the battles that were drawn."""
    drawn: list[Any] = []
    solve = solver._solve

    def spy(*args: Any, **rest: Any) -> Any:
        drawn.append((args[0], args[1], rest["counts"]))
        return solve(*args, **rest)

    monkeypatch.setattr(solver, "DRAWS_PER_UNIT", 0)  # draw in Python, where it can be seen
    monkeypatch.setattr(solver, "_solve", spy)
    fit = bradley_terry(W, L, num_players=6, bootstrap=3, **options)
    design, units, counts = drawn[-1]
    assert fit.bootstrap is not None
    assert fit.bootstrap.strengths.shape == (3, 6)
    assert counts.sum(1).tolist() == [400] * 3
    assert not np.array_equal(counts[0], counts[1])
    monkeypatch.undo()
    first, second = design.first[units.edge], design.second[units.edge]
    swapped = units.outcome == 1
    again = dict(options)
    if "covariates" in options:
        z = design.covariates[units.edge]
        again["covariates"] = np.where(swapped[:, None], -z, z)
    if "ties" in options:
        again["ties"] = units.outcome == 2
    for k in range(3):
        again["weight"] = counts[k] * units.weight
        other = bradley_terry(
            np.where(swapped, second, first), np.where(swapped, first, second), num_players=6, **again
        )
        close(fit.bootstrap.strengths[k], other.strengths, atol=1e-7)
        close(fit.bootstrap.coefficients[k], other.coefficients, atol=1e-7)
        if other.tie_parameter is not None:
            assert float(fit.bootstrap.tie_parameter[k]) == pytest.approx(other.tie_parameter, rel=1e-6)


@pytest.mark.smoke
def test_replicates_without_a_maximum_are_counted():
    """Player 2 loses its only win in (1 - 1/21)^21 = 36 % of the samples."""
    winners, losers = [0] * 5 + [1] * 5 + [0] * 5 + [2] + [1] * 5, [1] * 5 + [0] * 5 + [2] * 5 + [1] + [2] * 5
    fit = bradley_terry(winners, losers, num_players=3, bootstrap=400)
    assert fit.bootstrap is not None
    missing = fit.bootstrap.without_maximum
    assert 400 * 0.36 - 40 < missing < 400 * 0.36 + 60
    assert fit.bootstrap.strengths.shape == (400 - missing, 3)
    assert bool(fit.bootstrap.strengths.isfinite().all())
    held = bradley_terry(winners, losers, num_players=3, bootstrap=400, prior=0.1)
    assert held.bootstrap is not None
    assert held.bootstrap.without_maximum == 0


@pytest.mark.smoke
def test_a_replicate_that_a_covariate_separates_is_counted():
    """The covariate is right but for two battles, one won by either player: 1 - (1 - 1/e)^2 = 60 % lack one of them."""
    winners = np.arange(40) % 2
    z = np.where(np.arange(40) < 38, 1.0, -1.0)[:, None]
    fit = bradley_terry(winners, 1 - winners, num_players=2, covariates=z, bootstrap=200)
    assert fit.bootstrap is not None
    assert 0.45 * 200 < fit.bootstrap.without_maximum < 0.75 * 200
    assert float(fit.bootstrap.coefficients.abs().max()) < 10


def test_both_samplers_draw_the_same_distribution(monkeypatch: pytest.MonkeyPatch):
    """Battle by battle, and by binomials per unit (many battles per unit)."""
    few = bradley_terry([0, 1, 0], [1, 0, 1], num_players=2, counts=[300, 200, 100], bootstrap=1000)
    many = bradley_terry([0, 1, 0], [1, 0, 1], num_players=2, counts=[3, 2, 1], bootstrap=1000, prior=1e-6)
    for fit in (few, many):
        assert fit.bootstrap is not None
    gap = few.bootstrap.strengths[:, 0] - few.bootstrap.strengths[:, 1]
    assert float(gap.std()) == pytest.approx(math.sqrt(1 / 400 + 1 / 200), rel=0.08)
    assert float(gap.mean()) == pytest.approx(math.log(2), abs=0.02)
    drawn = torch.sigmoid(many.bootstrap.strengths[:, 0] - many.bootstrap.strengths[:, 1]) * 6
    share = (drawn - 4).abs() < 1e-3
    assert float(share.double().mean()) == pytest.approx(15 * (2 / 3) ** 4 * (1 / 3) ** 2, abs=0.06)


# ---- Categories ----


def test_every_category_is_a_fit_of_its_own():
    names = np.where(np.arange(400) % 3 == 0, "code", "chat")
    fit = bradley_terry(W, L, num_players=6, ties=TIES, category=names.tolist(), bootstrap=30)
    assert fit.categories is not None
    assert list(fit.categories) == ["chat", "code"]
    assert torch.equal(fit.strengths, bradley_terry(W, L, num_players=6, ties=TIES).strengths)
    for name, part in fit.categories.items():
        mine = names == name
        alone = bradley_terry(W[mine], L[mine], num_players=6, ties=TIES[mine], bootstrap=30)
        assert part.bootstrap is not None
        assert alone.bootstrap is not None
        assert torch.equal(part.strengths, alone.strengths)
        assert torch.equal(part.bootstrap.strengths, alone.bootstrap.strengths)
        assert part.num_battles == int(mine.sum())
    numbers = bradley_terry(W, L, num_players=6, category=torch.arange(400) % 2)
    assert numbers.categories is not None
    assert list(numbers.categories) == [0, 1]


def test_players_that_a_category_lacks_are_nan_there():
    winners, losers = [0, 1, 2, 0, 1, 0, 3, 1], [1, 2, 0, 3, 0, 1, 0, 0]
    category = [0, 0, 0, 1, 1, 1, 1, 1]
    fit = bradley_terry(winners, losers, num_players=4, category=category, anchor=0)
    assert fit.categories is not None
    part = fit.categories[1]
    assert part.strengths.isnan().tolist() == [False, False, True, False]
    assert part.standard_errors.isnan().tolist() == [False, False, True, False]
    assert float(part.strengths[0]) == 0
    assert int(part.ranks().rank[2]) == 0
    assert bool(part.win_probabilities()[2].isnan().all())
    assert sorted(part.ranks().rank.tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="category 0: anchor: got player 3"):
        bradley_terry(winners, losers, num_players=4, category=category, anchor=3)
    held = bradley_terry(winners, losers, num_players=4, category=category, prior=1.0)
    assert held.categories is not None
    assert bool(held.categories[1].strengths.isfinite().all())


def test_a_category_without_a_maximum_is_named():
    winners, losers, category = np.append(W, [4, 3]), np.append(L, [2, 2]), ["a"] * 400 + ["b"] * 2
    with pytest.raises(NoMaximumError, match=r"category 'b': players \[3, 4\] won every battle; player 2 lost every"):
        bradley_terry(winners, losers, num_players=6, category=category)


# ---- Ranks, probabilities ----


def test_ranks_by_overlap_of_intervals():
    winners, losers, _ = simulate(7, 900, seed=8)
    fit = bradley_terry(winners, losers, num_players=7, bootstrap=100)
    lower, upper, *_ = fit.intervals
    rank, best, worst = fit.ranks()
    for i in range(7):
        assert int(rank[i]) == 1 + int((fit.strengths > fit.strengths[i]).sum())
        assert int(best[i]) == 1 + int((lower > upper[i]).sum())
        assert int(worst[i]) == 7 - int((upper < lower[i]).sum())
    assert bool((best <= rank).all())
    assert bool((rank <= worst).all())
    assert bool((best < worst).any())
    narrow = fit.ranks(level=0.01)
    assert int((narrow.worst - narrow.best).sum()) < int((worst - best).sum())


def test_probabilities_of_outcomes_sum_to_one():
    for name in ("plain", "davidson"):
        fit = bradley_terry(W, L, num_players=6, **CASES[name])
        win, tie = fit.win_probabilities(), fit.tie_probabilities()
        close(win + win.T + tie, torch.ones(6, 6, dtype=torch.float64))
        assert (float(tie.max()) > 0) == (name == "davidson")


# ---- Extremes ----


def test_huge_counts_and_tiny_probabilities():
    fit = bradley_terry([0, 1, 1, 2], [1, 0, 2, 1], num_players=3, counts=[2**60, 1, 1, 2**59], bootstrap=5)
    assert fit.num_battles == 2**60 + 2**59 + 2
    close(fit.strengths[0] - fit.strengths[1], 60 * math.log(2), rtol=1e-9)
    close(fit.strengths[1] - fit.strengths[2], -59 * math.log(2), rtol=1e-9)
    assert fit.bootstrap is not None
    with pytest.raises(ValueError, match=r"counts: got .* wanted fewer than"):
        bradley_terry([0, 1], [1, 0], num_players=2, counts=[2**62, 2**62])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_weights_of_any_size(scale: float):
    fit = bradley_terry(W, L, num_players=6, weight=WEIGHT * scale)
    close(fit.strengths, bradley_terry(W, L, num_players=6, weight=WEIGHT).strengths, atol=1e-8)


@pytest.mark.smoke
def test_a_ladder_of_players_that_beat_only_their_neighbours():
    """Gaps of log 9 between neighbours, 44 in all: closed form, and nothing near it at the start."""
    below = np.arange(20)
    winners, losers = np.concatenate([below + 1, below]), np.concatenate([below, below + 1])
    fit = bradley_terry(winners, losers, num_players=21, counts=np.repeat([9, 1], 20))
    close(fit.strengths.diff(), torch.full((20,), math.log(9), dtype=torch.float64))


def test_many_players_go_without_dense_matrices(monkeypatch: pytest.MonkeyPatch):
    winners, losers, _ = simulate(300, 6000, seed=11)
    z = np.random.default_rng(1).normal(size=(6000, 1))
    options: dict[str, Any] = {"num_players": 300, "covariates": z, "bootstrap": 3, "prior": 0.1}
    dense = bradley_terry(winners, losers, **options)
    monkeypatch.setattr(solver, "DENSE_PARAMETERS", 10)
    monkeypatch.setattr("pyalign._bradley_terry.MAX_COVARIANCE_PLAYERS", 200)
    sparse = bradley_terry(winners, losers, **options)
    close(sparse.strengths, dense.strengths, atol=1e-8)
    close(sparse.coefficients, dense.coefficients, atol=1e-8)
    assert sparse.bootstrap is not None
    assert dense.bootstrap is not None
    close(sparse.bootstrap.strengths, dense.bootstrap.strengths, atol=1e-6)
    assert bool(sparse.intervals.lower.isfinite().all())
    with pytest.raises(ValueError, match="num_players: got 300; standard errors want at most 200"):
        _ = sparse.standard_errors


def test_one_player():
    fit = bradley_terry([], [], num_players=1, prior=1.0)
    assert fit.strengths.tolist() == [0.0]
    empty = bradley_terry([], [], num_players=3, prior=2.0, bootstrap=2)
    assert empty.strengths.tolist() == [0.0] * 3
    assert empty.bootstrap is not None
    assert empty.bootstrap.strengths.tolist() == [[0.0] * 3] * 2
    close(empty.standard_errors, np.full(3, math.sqrt((1 - 1 / 3) / 2)))


def test_integers_of_any_kind_and_categories_without_weight():
    fit = bradley_terry(
        torch.from_numpy(W).to(torch.uint8), L.astype(np.int16), num_players=np.int64(6), anchor=np.int32(2)
    )
    close(fit.strengths, bradley_terry(W.tolist(), L.tolist(), num_players=6, anchor=2).strengths)
    last = np.arange(400) >= 390
    with pytest.raises(NoMaximumError, match="category 1: no battle has a weight"):
        bradley_terry(W, L, num_players=6, weight=np.where(last, 0, 1), category=last.astype(int))


@pytest.mark.smoke
@pytest.mark.parametrize("size", [1, 2, 33, 256, 257])
def test_inverses(size: int):
    a = np.random.default_rng(size).normal(size=(size, size))
    a = a @ a.T + np.eye(size)
    close(solver.inverse(a) @ a, np.eye(size))
    assert np.array_equal(solver.inverse(a), solver.inverse(a))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_players": 0}, ValueError, "num_players: got 0; wanted an int >= 1"),
        ({"num_players": 5}, ValueError, r"(winners|losers): got 5 at \d+; wanted players in \[0, 5\)"),
        ({"winners": W - 1}, ValueError, r"winners: got -1 at \d+"),
        ({"winners": W.astype(float)}, TypeError, "winners: got dtype float64; wanted integers"),
        ({"winners": [[0, 1], [2]]}, TypeError, "winners: got a ragged sequence"),
        ({"winners": W[:, None]}, ValueError, r"winners: got shape \(400, 1\)"),
        ({"losers": L[:-1]}, ValueError, r"losers: got shape \(399,\); wanted \(400,\)"),
        ({"losers": W}, ValueError, r"losers: got player \d against itself at 0"),
        ({"weight": -WEIGHT}, ValueError, r"weight: got -\d.* at 0; wanted finite numbers >= 0"),
        ({"weight": np.full(400, np.nan)}, ValueError, "weight: got nan at 0"),
        ({"weight": np.full(400, 1e200)}, ValueError, "weight: got up to 1e\\+200"),
        ({"weight": WEIGHT[1:]}, ValueError, r"weight: got shape \(399,\); wanted \(400,\)"),
        ({"weight": TIES}, TypeError, "weight: got dtype bool"),
        ({"weight": torch.ones(400, requires_grad=True)}, ValueError, "weight: got a tensor that requires grad"),
        ({"counts": WEIGHT}, TypeError, "counts: got dtype float64; wanted integers"),
        ({"counts": -np.ones(400, int)}, ValueError, "counts: got -1 at 0"),
        ({"ties": TIES.astype(int)}, TypeError, "ties: got dtype int64; wanted bool"),
        ({"tie_model": "rao"}, ValueError, "tie_model: got 'rao'; wanted one of 'half', 'davidson'"),
        ({"prior": 0.0}, ValueError, "prior: got 0.0; wanted None or a finite number > 0"),
        ({"prior": math.inf}, ValueError, "prior: got inf"),
        ({"covariates": COVARIATES[:, 0]}, ValueError, r"covariates: got shape \(400,\); wanted \(400, F\)"),
        ({"covariates": np.full((400, 1), np.inf)}, ValueError, r"covariates: got inf at \(0, 0\)"),
        ({"anchor": 6}, ValueError, r"anchor: got 6; wanted a player in \[0, 6\)"),
        ({"anchor": (1, math.nan)}, ValueError, "anchor: got nan"),
        ({"anchor": "a"}, ValueError, "anchor: got 'a'"),
        ({"category": ["a"]}, ValueError, r"category: got shape \(1,\); wanted \(400,\)"),
        ({"category": np.ones(400)}, TypeError, "category: got dtype float64"),
        ({"bootstrap": -1}, ValueError, "bootstrap: got -1; wanted an int >= 0"),
        ({"bootstrap": 1.5}, ValueError, "bootstrap: got 1.5"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_refusals_name_argument_given_and_wanted(change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        bradley_terry(**{"winners": W, "losers": L, "num_players": 6, **change})


def test_refusals_of_results():
    fit = bradley_terry(W, L, num_players=6)
    with pytest.raises(ValueError, match="level: got 95; wanted 0 < level < 1"):
        fit.intervals_at(95)
    with pytest.raises(ValueError, match="scale: got 0"):
        fit.to_elo(scale=0)
