"""Benchmarks of Bradley-Terry fits beside choix: `pytest bench/bradley_terry.py`.

Whatever is compared takes turns in one run; `over_x` says how many times as long x takes, and `choix_fits` how many
fits choix makes in the time of all bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyalign import bradley_terry
from pyalign._battles import Columns, read_battles
from pyalign.benchmark import interleaved

CPU = torch.device("cpu")


def battles(players: int, count: int) -> tuple[Tensor, Tensor]:
    """Winners and losers of random pairs of players whose strengths have standard deviation 1."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=players)
    first = rng.integers(0, players, count)
    second = (first + rng.integers(1, players, count)) % players
    won = rng.random(count) < 1 / (1 + np.exp(theta[second] - theta[first]))
    return torch.from_numpy(np.where(won, first, second)), torch.from_numpy(np.where(won, second, first))


def measure(benchmark: Any, functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each (the first is ours), taking turns; all of them once where benchmarks are disabled."""
    ours = next(iter(functions.values()))
    times: dict[str, float] = {}
    if benchmark.disabled:
        for function in functions.values():
            function()
    else:
        times = interleaved(functions, CPU, rounds=rounds, warmup=1)
        benchmark.extra_info.update({f"{name}_ms": 1e3 * seconds for name, seconds in times.items()})
    benchmark.pedantic(ours, rounds=1)
    return times


def choix_fit(winners: Tensor, losers: Tensor, players: int) -> Callable[[], object]:
    choix = pytest.importorskip("choix")
    pairs = list(zip(winners.tolist(), losers.tolist(), strict=True))
    return lambda: choix.ilsr_pairwise(players, pairs)


def test_bradley_terry_fit(benchmark: Any) -> None:
    """100 players, 100,000 battles."""
    players, count = (10, 500) if benchmark.disabled else (100, 100_000)
    winners, losers = battles(players, count)
    functions: dict[str, Callable[[], object]] = {
        "fit": lambda: bradley_terry(winners, losers, num_players=players),
        "fit_and_standard_errors": lambda: bradley_terry(winners, losers, num_players=players).standard_errors,
        "choix": choix_fit(winners, losers, players),
    }
    times = measure(benchmark, functions, rounds=9)
    if times:
        benchmark.extra_info["over_choix"] = times["choix"] / times["fit"]
        benchmark.extra_info["errors_over_choix"] = times["choix"] / times["fit_and_standard_errors"]


def test_bradley_terry_bootstrap(benchmark: Any) -> None:
    """The same with 1,000 replicates."""
    players, count, replicates = (10, 500, 5) if benchmark.disabled else (100, 100_000, 1000)
    winners, losers = battles(players, count)
    functions: dict[str, Callable[[], object]] = {
        "bootstrap": lambda: bradley_terry(winners, losers, num_players=players, bootstrap=replicates),
        "choix": choix_fit(winners, losers, players),
    }
    times = measure(benchmark, functions, rounds=7)
    if times:
        benchmark.extra_info["choix_fits"] = times["bootstrap"] / times["choix"]


def test_bradley_terry_many_players(benchmark: Any) -> None:
    """10,000 players, 1,000,000 battles: no matrix of players by players."""
    players, count = (30, 1000) if benchmark.disabled else (10_000, 1_000_000)
    winners, losers = battles(players, count)
    functions: dict[str, Callable[[], object]] = {
        "fit": lambda: bradley_terry(winners, losers, num_players=players, prior=0.1),
        "bootstrap_of_10": lambda: bradley_terry(winners, losers, num_players=players, prior=0.1, bootstrap=10),
    }
    measure(benchmark, functions, rounds=1)


def test_battles_from_csv(benchmark: Any, tmp_path: Path) -> None:
    """2,000,000 rows of model_a, model_b, winner."""
    csv = pytest.importorskip("pyarrow.csv")
    pyarrow = pytest.importorskip("pyarrow")
    count = 1000 if benchmark.disabled else 2_000_000
    winners, losers = (x.numpy() for x in battles(100, count))
    names = np.array([f"model-{i:03d}" for i in range(100)])
    kinds = np.array(["model_a", "tie", "tie (bothbad)"])[np.arange(count) % 20 // 18]
    columns = {"model_a": names[winners], "model_b": names[losers], "winner": kinds}
    csv.write_csv(pyarrow.table(columns), tmp_path / "battles.csv")
    measure(benchmark, {"read": lambda: read_battles([tmp_path / "battles.csv"], Columns())}, rounds=3)


def test_bradley_terry_covariates(benchmark: Any) -> None:
    """100,000 battles with two style covariates, no two rows alike: nothing to deduplicate."""
    players, count = (10, 500) if benchmark.disabled else (100, 100_000)
    winners, losers = battles(players, count)
    covariates = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    functions: dict[str, Callable[[], object]] = {
        "fit": lambda: bradley_terry(winners, losers, num_players=players, covariates=covariates),
        "bootstrap_of_100": lambda: bradley_terry(
            winners, losers, num_players=players, covariates=covariates, bootstrap=100
        ),
    }
    measure(benchmark, functions, rounds=1)
