"""Leaderboards from Bradley-Terry fits: rows, JSON, a plot."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pyalign._battles import Battles
from pyalign._bradley_terry import BradleyTerryFit
from pyalign._files import atomic_file, write_text
from pyalign._optional import require

MOST_PLAYERS, MOST_BOARDS = 100, 12  # of a plot


class Scale(NamedTuple):
    """Ratings base + unit * strength."""

    name: str
    unit: float
    base: float
    digits: int

    @staticmethod
    def elo(points: float = 400.0, base: float = 1000.0) -> Scale:
        return Scale("Elo", points / math.log(10), base, 1)

    @staticmethod
    def natural() -> Scale:
        return Scale("strength", 1.0, 0.0, 3)


@dataclass(frozen=True)
class Row:
    """A player of a leaderboard; ratings and their errors on its scale."""

    name: str
    rank: int
    best_rank: int
    worst_rank: int
    rating: float
    lower: float
    upper: float
    standard_error: float | None  # None with more players than have standard errors
    strength: float
    battles: int
    wins: int
    losses: int
    ties: int

    @property
    def win_rate(self) -> float:
        """Ties are half wins."""
        return (self.wins + 0.5 * self.ties) / self.battles if self.battles else math.nan


@dataclass(frozen=True)
class Coefficient:
    """Of a covariate, in log-odds per unit of it."""

    name: str
    coefficient: float
    lower: float
    upper: float
    standard_error: float


@dataclass(frozen=True)
class Board:
    title: str
    scale: Scale
    level: float
    method: str  # of the intervals
    rows: list[Row]  # best first
    covariates: list[Coefficient]
    fit: BradleyTerryFit

    def as_json(self) -> dict[str, Any]:
        fit, bootstrap = self.fit, self.fit.bootstrap
        return {
            "title": self.title,
            "scale": self.scale.name,
            "interval": {"level": self.level, "method": self.method},
            "battles": fit.num_battles,
            "log_likelihood": fit.log_likelihood,
            "iterations": fit.iterations,
            "gradient_norm": fit.gradient_norm,
            "tie_parameter": fit.tie_parameter,
            "bootstrap": None
            if bootstrap is None
            else {"replicates": bootstrap.requested, "without_maximum": bootstrap.without_maximum},
            "players": [_finite(vars(row)) for row in self.rows],
            "covariates": [_finite(vars(row)) for row in self.covariates],
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


def make_board(
    title: str,
    battles: Battles,
    fit: BradleyTerryFit,
    scale: Scale,
    level: float,
    names: Sequence[str],
    *,
    errors: bool,
) -> Board:
    """The leaderboard of a fit to ``battles``; players without a battle are left out.

    Args:
        names: of the covariates.
        errors: whether standard errors are affordable.
    """
    players = len(battles.players)
    counts = np.ones(len(battles.winners), np.int64) if battles.counts is None else battles.counts

    def tally(who: Any, chosen: Any) -> list[int]:
        total = np.zeros(players, np.int64)
        np.add.at(total, who[chosen], counts[chosen])
        return total.tolist()

    won, lost = tally(battles.winners, ~battles.ties), tally(battles.losers, ~battles.ties)
    tied = np.add(tally(battles.winners, battles.ties), tally(battles.losers, battles.ties)).tolist()
    interval, ranks = fit.intervals_at(level), fit.ranks(level)
    rating, lower, upper = (_list(scale.base + scale.unit * x) for x in (fit.strengths, interval.lower, interval.upper))
    error = _list(scale.unit * fit.standard_errors) if errors else [None] * players
    places = [x.tolist() for x in ranks]
    rows: list[Row] = []
    for i in range(players):
        fought = won[i] + lost[i] + tied[i]
        if fought:
            figures = rating[i], lower[i], upper[i], error[i], float(fit.strengths[i])
            place, best, worst = (p[i] for p in places)
            rows.append(Row(battles.players[i], place, best, worst, *figures, fought, won[i], lost[i], tied[i]))
    rows.sort(key=lambda row: (-row.rating, row.name))
    covariates: list[Coefficient] = []
    if names:
        limits = fit.coefficient_intervals(level)
        deviation = fit.coefficient_standard_errors if errors else None
        covariates = [
            Coefficient(
                name,
                float(fit.coefficients[i]),
                float(limits.lower[i]),
                float(limits.upper[i]),
                math.nan if deviation is None else float(deviation[i]),
            )
            for i, name in enumerate(names)
        ]
    return Board(title, scale, level, interval.method, rows, covariates, fit)


def _list(x: Tensor) -> list[float]:
    return x.tolist()


def table(board: Board, limit: int | None) -> Any:
    """A rich table."""
    rich: Any = require("rich.table")
    escape = require("rich.markup").escape
    shown = rich.Table(title=escape(board.title), title_justify="left", title_style="bold")
    level = f"{100 * board.level:g} %"
    for head, justify in (
        ("rank", "right"), ("player", "left"), (board.scale.name, "right"), (level, "right"), ("ranks", "right"),
        ("battles", "right"), ("wins", "right"),
    ):  # fmt: skip
        shown.add_column(head, justify=justify, overflow="fold", no_wrap=head != "player")
    digits = board.scale.digits
    for row in board.rows[:limit]:
        shown.add_row(
            str(row.rank),
            escape(row.name),
            f"{row.rating:.{digits}f}",
            f"{row.upper - row.rating:+.{digits}f} {row.lower - row.rating:+.{digits}f}",
            f"{row.best_rank}-{row.worst_rank}",
            f"{row.battles:,}",
            f"{row.win_rate:.1%}",
        )
    return shown


def write_json(path: Path, boards: Sequence[Board], settings: dict[str, Any]) -> None:
    """The first board is that of all battles; those after it are the categories', by their titles."""
    overall, *rest = boards
    content = {
        "settings": settings,
        **overall.as_json(),
        "categories": {board.title: board.as_json() for board in rest},
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def draw(path: Path, boards: Sequence[Board]) -> None:
    """Ratings and intervals, best on top, a panel for every board."""
    boards = boards[:MOST_BOARDS]
    tallest = max(min(len(board.rows), MOST_PLAYERS) for board in boards)
    size = (6.0 * len(boards), 1.2 + 0.26 * max(tallest, 4))
    figure = require("matplotlib.figure").Figure(figsize=size, dpi=120, layout="constrained")
    for axes, board in zip(figure.subplots(1, len(boards), squeeze=False)[0], boards, strict=True):
        rows = board.rows[:MOST_PLAYERS]
        rating = [row.rating for row in rows]
        below = [max(row.rating - row.lower, 0) for row in rows]  # a percentile interval may leave its estimate out
        above = [max(row.upper - row.rating, 0) for row in rows]
        places = range(len(rows))
        axes.errorbar(rating, places, xerr=[below, above], fmt="o", ms=4, color="#246", ecolor="#8ab", capsize=2)
        axes.set_yticks(places, [row.name.replace("$", r"\$") for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        left_out = f", first {len(rows)} of {len(board.rows)}" if len(rows) < len(board.rows) else ""
        axes.set_title(f"{board.title}{left_out}".replace("$", r"\$"), fontsize=10)
        axes.set_xlabel(f"{board.scale.name}, {100 * board.level:g} % intervals ({board.method})")
        axes.grid(axis="x", alpha=0.3)
    with atomic_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a script that the font lacks: drawn as boxes
        figure.savefig(temporary, format="png")
