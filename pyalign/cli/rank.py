"""``pyalign rank``: battles to a leaderboard."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pyalign._battles import FORMATS, Battles, BattlesError, Columns, read_battles, summary
from pyalign._bradley_terry import (
    ELO_BASE,
    ELO_SCALE,
    MAX_COVARIANCE_PLAYERS,
    TIE_MODELS,
    BradleyTerryFit,
    ConvergenceError,
    NoMaximumError,
    fit_named,
)
from pyalign._leaderboard import Board, Scale, draw, make_board, table, write_json
from pyalign._optional import require

ON_ERROR = ("stop", "skip")
TIES = (*TIE_MODELS, "drop")


def rank(
    files: Annotated[list[Path], typer.Argument(help="CSV (with a header), JSONL or Parquet; several are joined.")],
    file_format: Annotated[
        str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}. Default: by the files' suffixes.")
    ] = None,
    a_column: Annotated[str, typer.Option(help="The player shown first.")] = "model_a",
    b_column: Annotated[str, typer.Option(help="The player shown second.")] = "model_b",
    winner_column: Annotated[
        str, typer.Option(help="model_a, model_b, tie or tie (bothbad); or the winner's name.")
    ] = "winner",
    loser_column: Annotated[
        str, typer.Option(help="The loser's name, in files without the columns of both players.")
    ] = "loser",
    tie_column: Annotated[
        str, typer.Option(help="In files of winner and loser, if it is there: true where they tied.")
    ] = "tie",
    weight_column: Annotated[str | None, typer.Option(help="Weight of a battle, >= 0.")] = None,
    count_column: Annotated[
        str | None, typer.Option(help="How many equal battles a row stands for; the bootstrap draws each.")
    ] = None,
    category_column: Annotated[str | None, typer.Option(help="Also a leaderboard for every category.")] = None,
    covariate: Annotated[
        list[str] | None,
        typer.Option(
            help="Control for a number that differs between the players (style): a column NAME of first minus second "
            "(winner minus loser), or the columns NAME_a and NAME_b. Repeat for more."
        ),
    ] = None,
    tie_model: Annotated[
        str,
        typer.Option(help="half: a tie is half a win on either side; davidson: an outcome with a parameter; drop."),
    ] = "half",
    prior: Annotated[
        float | None,
        typer.Option(
            help="Precision of a normal prior on strengths in natural log units (0.1, say): for players who won or "
            "lost everything. Default: plain maximum likelihood."
        ),
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Replicates for percentile intervals; 0: normal intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    anchor: Annotated[
        str | None, typer.Option(help="NAME=RATING: this player's rating is fixed, on the scale of the output.")
    ] = None,
    elo_scale: Annotated[float, typer.Option(help="Points of a factor of ten in the odds.")] = ELO_SCALE,
    elo_base: Annotated[float, typer.Option(help="Mean rating, where there is no anchor.")] = ELO_BASE,
    natural: Annotated[bool, typer.Option("--natural", help="Log-odds with mean 0 instead of Elo ratings.")] = False,
    on_error: Annotated[
        str, typer.Option(help="stop at malformed rows, or skip them; either way their lines are reported.")
    ] = "stop",
    limit: Annotated[int | None, typer.Option(help="Players of a table. Default: all.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw ratings and intervals to this PNG.")] = None,
) -> None:
    """Rank players (models) by their battles: Bradley-Terry ratings with intervals.

    A battle is a row with model_a, model_b and winner, as Chatbot Arena publishes them, or with winner
    and loser (and tie). The table's "ranks" are those that the intervals leave open.

    \b
    Examples:
      pyalign rank battles.csv
      pyalign rank battles.jsonl --category-column language \\
        --anchor gpt-4=1250 --json board.json --plot board.png
      pyalign rank battles.parquet --tie-model davidson --prior 0.1 \\
        --covariate length --on-error skip
    """
    one_of("format", file_format, (None, *FORMATS))
    one_of("on-error", on_error, ON_ERROR)
    one_of("tie-model", tie_model, TIES)
    if not 0 < level < 1:
        _refuse(f"--level: got {level:g}; wanted a number between 0 and 1")
    if not elo_scale > 0:
        _refuse(f"--elo-scale: got {elo_scale:g}; wanted a number > 0")
    for name, value, least in (("bootstrap", bootstrap, 0), ("seed", seed, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            _refuse(f"--{name}: got {value}; wanted at least {least}")
    if prior is not None and not 0 < prior < float("inf"):
        _refuse(f"--prior: got {prior:g}; wanted a number > 0")
    for name, path in (("json", json_path), ("plot", plot_path)):
        if path is not None and not path.parent.is_dir():
            _refuse(f"--{name}: {path.parent} is not a directory")
    if plot_path is not None:
        require("matplotlib.figure")
    rich: Any = require("rich.console")
    console, progress = rich.Console(soft_wrap=False), rich.Console(stderr=True)
    scale = Scale.natural() if natural else Scale.elo(elo_scale, elo_base)
    columns = Columns(
        a_column, b_column, winner_column, loser_column, tie_column, weight_column, count_column, category_column,
        tuple(covariate or ()),
    )  # fmt: skip

    def say(text: str, **style: Any) -> None:
        progress.print(text, markup=False, highlight=False, soft_wrap=True, **style)

    begin = time.perf_counter()
    battles = _read(files, columns, file_format, on_error, say)
    if tie_model == "drop":
        battles = battles.pick(~battles.ties)
    if not len(battles.winners):
        _refuse("no battles in " + ", ".join(map(str, files)))
    say(f"{len(battles.winners):,} rows, {len(battles.players):,} players read in {time.perf_counter() - begin:.1f} s")
    begin = time.perf_counter()
    fit = _fit(battles, tie_model, prior, bootstrap, seed, _anchor(anchor, battles, scale))
    boards = _boards(battles, fit, scale, level, columns)
    say(f"{len(boards)} fit(s) of {bootstrap} replicates in {time.perf_counter() - begin:.1f} s")
    for board in boards:
        _show(board, limit, console, say)
    settings = {
        "files": [str(path) for path in files],
        "skipped_rows": len(battles.problems),
        "tie_model": tie_model,
        "prior": prior,
        "seed": seed,
        "anchor": anchor,
        "elo_scale": None if natural else elo_scale,
        "elo_base": None if natural else elo_base,
    }
    if json_path is not None:
        write_json(json_path, boards, settings)
    if plot_path is not None:
        draw(plot_path, boards)


def one_of(option: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        _refuse(f"--{option}: got {value!r}; wanted one of {', '.join(str(x) for x in choices if x is not None)}")


def _refuse(message: str) -> NoReturn:
    print(f"pyalign rank: {message}", file=sys.stderr)
    raise typer.Exit(1) from None


def _read(files: list[Path], columns: Columns, file_format: str | None, on_error: str, say: Any) -> Battles:
    try:
        battles = read_battles(files, columns, file_format=file_format)
    except BattlesError as error:
        _refuse(str(error))
    if battles.problems:
        rows = f"{len(battles.problems):,} malformed row(s)"
        if on_error == "stop":
            _refuse(f"{rows}; --on-error skip leaves them out\n{summary(battles.problems)}")
        say(f"skipped {rows}\n{summary(battles.problems)}", style="yellow")
    return battles


def _anchor(anchor: str | None, battles: Battles, scale: Scale) -> tuple[int, float] | None:
    if anchor is None:
        return None
    name, equals, rating = anchor.rpartition("=")
    try:
        strength = (float(rating) - scale.base) / scale.unit
    except ValueError:
        strength = float("nan")
    if not equals or strength != strength or abs(strength) == float("inf"):
        _refuse(f"--anchor: got {anchor!r}; wanted NAME=RATING")
    if name not in battles.players:
        _refuse(f"--anchor: got {name!r}; wanted one of the players, such as {battles.players[0]!r}")
    return battles.players.index(name), strength


def _fit(
    battles: Battles, tie_model: str, prior: float | None, bootstrap: int, seed: int, anchor: tuple[int, float] | None
) -> BradleyTerryFit:
    try:
        return fit_named(
            battles.players,
            battles.winners,
            battles.losers,
            weight=battles.weight,
            counts=battles.counts,
            ties=battles.ties,
            tie_model="half" if tie_model == "drop" else tie_model,
            prior=prior,
            covariates=battles.covariates,
            category=battles.category,
            anchor=anchor,
            bootstrap=bootstrap,
            seed=seed,
        )
    except NoMaximumError as error:
        hint = ". Plain maximum likelihood has no maximum there; --prior 0.1, say, gives it one"
        _refuse(error.problem + (hint if error.prior_helps else ""))
    except (ConvergenceError, ValueError) as error:
        _refuse(str(error))


def _boards(battles: Battles, fit: BradleyTerryFit, scale: Scale, level: float, columns: Columns) -> list[Board]:
    errors = len(battles.players) <= MAX_COVARIANCE_PLAYERS
    if not errors and fit.bootstrap is None:
        wanted = f"replicates with more than {MAX_COVARIANCE_PLAYERS} players, for whom normal intervals cost too much"
        _refuse(f"--bootstrap: got 0; wanted {wanted}")
    boards = [make_board("all battles", battles, fit, scale, level, columns.covariates, errors=errors)]
    for name, part in (fit.categories or {}).items():
        mine = battles.pick(battles.category == name)
        boards.append(make_board(str(name), mine, part, scale, level, columns.covariates, errors=errors))
    return boards


def _show(board: Board, limit: int | None, console: Any, say: Any) -> None:
    console.print(table(board, limit))
    if limit is not None and limit < len(board.rows):
        console.print(f"{len(board.rows) - limit} more players", highlight=False)
    if board.fit.tie_parameter is not None:
        console.print(f"tie parameter {board.fit.tie_parameter:.3f}", highlight=False)
    for row in board.covariates:
        text = f"{row.name}: {row.coefficient:+.4g} log-odds per unit, {row.lower:+.4g} to {row.upper:+.4g}"
        console.print(text, markup=False, highlight=False)
    bootstrap = board.fit.bootstrap
    if bootstrap is not None and bootstrap.without_maximum:
        say(
            f"{board.title}: {bootstrap.without_maximum} of {bootstrap.requested} replicates have no maximum and are "
            "left out of the intervals, which are too narrow then; --prior holds them",
            style="yellow",
        )
