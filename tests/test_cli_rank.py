"""``pyalign rank``: every file format, every option, malformed rows, refusals."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner  # noqa: E402

from pyalign import _battles, bradley_terry  # noqa: E402
from pyalign._battles import BattlesError, Columns, read_battles  # noqa: E402
from pyalign.cli import build_app  # noqa: E402

PLAYERS = ["alpaca", "beluga", "claude", "dolly"]
Rows = list[dict[str, Any]]


def make_rows(count: int = 200) -> Rows:
    """Battles as Chatbot Arena publishes them, and columns to choose from."""
    rng = np.random.default_rng(0)
    theta = np.array([0.5, 0.0, 1.0, -0.5])
    rows: Rows = []
    for i in range(count):
        a, b = rng.permutation(4)[:2].tolist()
        long_a, long_b = rng.integers(1, 50, 2).tolist()
        won = rng.random() < 1 / (1 + math.exp(theta[b] - theta[a] + 0.02 * (long_b - long_a)))
        kind = "tie" if i % 10 == 3 else "tie (bothbad)" if i % 10 == 6 else "model_a" if won else "model_b"
        rows.append(
            {
                "model_a": PLAYERS[a],
                "model_b": PLAYERS[b],
                "winner": kind,
                "language": ["English", "Deutsch"][i % 3 == 0],
                "length_a": long_a,
                "length_b": long_b,
                "importance": [1.0, 0.5][i % 4 == 0],
                "times": 1 + i % 3,
            }
        )
    return rows


ROWS = make_rows()


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in path.suffixes:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(build_app(), ["rank", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def ranked(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
    """What the command writes as JSON."""
    run(*arguments, "--json", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def by_name(board: dict[str, Any], key: str = "strength") -> dict[str, float]:
    return {row["name"]: row[key] for row in board["players"]}


def expected(rows: Rows, **options: Any) -> Any:
    """The library's fit to the rows."""
    a, b = ([PLAYERS.index(row[name]) for row in rows] for name in ("model_a", "model_b"))
    second = [row["winner"] == "model_b" for row in rows]
    winners = [j if s else i for i, j, s in zip(a, b, second, strict=True)]
    losers = [i if s else j for i, j, s in zip(a, b, second, strict=True)]
    ties = [row["winner"].startswith("tie") for row in rows]
    return bradley_terry(winners, losers, num_players=4, ties=ties, **options)


def check(board: dict[str, Any], fit: Any, **tolerance: float) -> None:
    assert by_name(board) == pytest.approx(dict(zip(PLAYERS, fit.strengths.tolist(), strict=True)), abs=1e-7)
    assert board["log_likelihood"] == pytest.approx(fit.log_likelihood, rel=1e-9)


# ---- Formats ----


@pytest.mark.parametrize("name", ["b.csv", "b.jsonl", "b.parquet", "b.csv.gz", "b.jsonl.gz", "b.json", "b.ndjson"])
def test_every_format_gives_the_same_board(tmp_path: Path, name: str):
    board = ranked(tmp_path, write(tmp_path / name, ROWS), "--bootstrap", 0)
    fit = expected(ROWS)
    check(board, fit)
    elo = fit.to_elo()
    assert by_name(board, "rating") == pytest.approx(dict(zip(PLAYERS, elo.ratings.tolist(), strict=True)), abs=1e-5)
    assert by_name(board, "upper") == pytest.approx(dict(zip(PLAYERS, elo.upper.tolist(), strict=True)), abs=1e-5)
    assert by_name(board, "standard_error") == pytest.approx(
        dict(zip(PLAYERS, elo.standard_errors.tolist(), strict=True)), abs=1e-5
    )
    assert board["interval"] == {"level": 0.95, "method": "normal"}
    assert [row["rank"] for row in board["players"]] == [1, 2, 3, 4]
    assert board["battles"] == 200
    assert sum(row["battles"] for row in board["players"]) == 400
    assert sum(row["ties"] for row in board["players"]) == 2 * 40
    assert sum(row["wins"] for row in board["players"]) == sum(row["losses"] for row in board["players"]) == 160


def test_files_are_joined_and_formats_can_be_named(tmp_path: Path):
    one = write(tmp_path / "one.csv", ROWS[:80])
    two = write(tmp_path / "two.jsonl", ROWS[80:])
    check(ranked(tmp_path, one, two, "--bootstrap", 0), expected(ROWS))
    odd = one.rename(tmp_path / "one.data")
    assert "wanted .csv, .jsonl or .parquet, or --format" in run(odd, code=1).stderr
    check(ranked(tmp_path, odd, "--format", "csv", "--bootstrap", 0), expected(ROWS[:80]))


def test_small_blocks_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file in many blocks: names get the same numbers, malformed rows their own lines."""
    rows = [*ROWS[:100], {**ROWS[0], "winner": "nobody"}, *ROWS[100:], {**ROWS[0], "winner": "nobody"}]
    for name in ("b.csv", "b.jsonl"):
        path = write(tmp_path / name, rows)
        whole = read_battles([path], Columns())
        monkeypatch.setattr(_battles, "_BLOCK", 1000)
        parts = read_battles([path], Columns())
        monkeypatch.undo()
        assert parts.players == whole.players == PLAYERS
        assert np.array_equal(parts.winners, whole.winners)
        assert parts.problems == whole.problems
        lines = {"b.csv": ["line 102", "line 203"], "b.jsonl": ["line 101", "line 202"]}[name]
        assert [problem.row for problem in parts.problems] == lines


def test_winner_and_loser_with_ties(tmp_path: Path):
    rows: Rows = []
    for row in ROWS:
        order = ("model_b", "model_a") if row["winner"] == "model_b" else ("model_a", "model_b")
        rows.append({"winner": row[order[0]], "loser": row[order[1]], "tie": row["winner"].startswith("tie")})
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        check(ranked(tmp_path, write(tmp_path / name, rows), "--bootstrap", 0), expected(ROWS))
    words = [{**row, "tie": "yes" if row["tie"] else ""} for row in rows]
    for name in ("b.csv", "b.jsonl"):
        check(ranked(tmp_path, write(tmp_path / name, words), "--bootstrap", 0), expected(ROWS))
    renamed = [{"w": row["winner"], "l": row["loser"], "t": int(row["tie"])} for row in rows]
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        path = write(tmp_path / name, renamed)
        options = ("--winner-column", "w", "--loser-column", "l", "--tie-column", "t", "--bootstrap", 0)
        check(ranked(tmp_path, path, *options), expected(ROWS))


def test_columns_that_are_named_are_used(tmp_path: Path):
    """A tie that the first line of a JSONL lacks; --loser-column chooses winner and loser over model_a and model_b."""
    lines = [{"winner": "a", "loser": "b"}, {"winner": "b", "loser": "a"}, {"winner": "b", "loser": "a", "tie": True}]
    board = ranked(tmp_path, write(tmp_path / "t.jsonl", lines), "--bootstrap", 0)
    assert by_name(board, "ties") == {"a": 1, "b": 1}
    late = [{**row, "group": "x"} if i else row for i, row in enumerate(lines)]
    result = run(write(tmp_path / "g.jsonl", late), "--category-column", "group", code=1)
    assert "line 1: no group" in result.stderr
    rows = [{**r, "won": "x" if i % 3 else "y", "lost": "y" if i % 3 else "x"} for i, r in enumerate(ROWS)]
    path = write(tmp_path / "b.csv", rows)
    board = ranked(tmp_path, path, "--winner-column", "won", "--loser-column", "lost", "--bootstrap", 0)
    assert sorted(by_name(board)) == ["x", "y"]
    missing = run(path, "--winner-column", "won", "--loser-column", "lost", "--tie-column", "draw", code=1)
    assert "wanted draw" in missing.stderr


def test_the_winner_may_be_named(tmp_path: Path):
    rows = [{**row, "winner": row.get(row["winner"], "draw")} for row in ROWS]
    check(ranked(tmp_path, write(tmp_path / "b.csv", rows), "--bootstrap", 0), expected(ROWS))
    rows = [{"left": r["model_a"], "right": r["model_b"], "who": r["winner"][-1].upper()} for r in ROWS]
    rows = [{**r, "who": "Tie"} if r["who"] in "E)" else r for r in rows]
    path = write(tmp_path / "c.csv", rows)
    options = ("--a-column", "left", "--b-column", "right", "--winner-column", "who", "--bootstrap", 0)
    check(ranked(tmp_path, path, *options), expected(ROWS))


def test_names_of_any_kind(tmp_path: Path):
    """Quotes, commas, line breaks, markup, dollars, other scripts; a byte order mark in front."""
    names = ['a "quoted", one', "two\nlines", "[bold]three[/bold]", "$fünf_6$ 模型"]
    rows = [{**r, **{k: names[PLAYERS.index(r[k])] for k in ("model_a", "model_b")}} for r in ROWS]
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        path = write(tmp_path / name, rows)
        if name != "b.parquet":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        board = ranked(tmp_path, path, "--bootstrap", 0, "--plot", tmp_path / "p.png")
        assert sorted(by_name(board)) == sorted(names)
        assert "[bold]three[/bold]" in run(path, "--bootstrap", 0).stdout


# ---- Options ----


def test_models_weights_counts(tmp_path: Path):
    path = write(tmp_path / "b.jsonl", ROWS)
    importance, times = [row["importance"] for row in ROWS], [row["times"] for row in ROWS]
    fit = expected(ROWS, tie_model="davidson", prior=0.5, weight=importance, counts=times)
    board = ranked(
        tmp_path, path, "--bootstrap", 0, "--tie-model", "davidson", "--prior", 0.5, "--weight-column", "importance",
        "--count-column", "times",
    )  # fmt: skip
    check(board, fit)
    assert board["tie_parameter"] == pytest.approx(fit.tie_parameter)
    assert board["battles"] == sum(times)
    assert sum(row["battles"] for row in board["players"]) == 2 * sum(times)
    decided = [row for row in ROWS if not row["winner"].startswith("tie")]
    check(ranked(tmp_path, path, "--bootstrap", 0, "--tie-model", "drop"), expected(decided))


def test_covariates_are_differences(tmp_path: Path):
    differences = [row["length_a"] - row["length_b"] for row in ROWS]
    signs = [-1 if row["winner"] == "model_b" else 1 for row in ROWS]
    z = np.array(differences, float)[:, None] * np.array(signs)[:, None]
    fit = expected(ROWS, covariates=z)
    rows = [{**row, "gap": d} for row, d in zip(ROWS, differences, strict=True)]
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        path = write(tmp_path / name, rows)
        for covariate in ("length", "gap"):
            board = ranked(tmp_path, path, "--covariate", covariate, "--bootstrap", 0)
            check(board, fit)
            (row,) = board["covariates"]
            assert row["name"] == covariate
            assert row["coefficient"] == pytest.approx(float(fit.coefficients[0]), abs=1e-8)
            assert row["standard_error"] == pytest.approx(float(fit.coefficient_standard_errors[0]), rel=1e-6)
    assert "length: +0.0" in run(path, "--covariate", "length", "--bootstrap", 0).stdout


def test_bootstrap_intervals_by_seed_and_level(tmp_path: Path):
    path = write(tmp_path / "b.csv", ROWS)
    fit = expected(ROWS, bootstrap=100, seed=5)
    board = ranked(tmp_path, path, "--bootstrap", 100, "--seed", 5, "--level", 0.8)
    lower = fit.to_elo(level=0.8).lower.tolist()
    assert by_name(board, "lower") == pytest.approx(dict(zip(PLAYERS, lower, strict=True)), abs=1e-5)
    assert board["interval"] == {"level": 0.8, "method": "percentile"}
    assert board["bootstrap"] == {"replicates": 100, "without_maximum": 0}
    assert by_name(board, "best_rank") == dict(zip(PLAYERS, fit.ranks(0.8).best.tolist(), strict=True))
    other = ranked(tmp_path, path, "--bootstrap", 100, "--seed", 6, "--level", 0.8)
    assert by_name(other, "lower") != by_name(board, "lower")


def test_scales_and_anchors(tmp_path: Path):
    path = write(tmp_path / "b.csv", ROWS)
    free = by_name(ranked(tmp_path, path, "--bootstrap", 0), "rating")
    assert sum(free.values()) == pytest.approx(4000)
    anchored = by_name(ranked(tmp_path, path, "--bootstrap", 20, "--anchor", "dolly=1114"), "rating")
    assert anchored["dolly"] == pytest.approx(1114)
    assert anchored["claude"] - anchored["dolly"] == pytest.approx(free["claude"] - free["dolly"])
    natural = by_name(ranked(tmp_path, path, "--bootstrap", 0, "--natural", "--anchor", "dolly=-2"), "rating")
    assert natural["dolly"] == pytest.approx(-2)
    assert (natural["claude"] + 2) * 400 / math.log(10) == pytest.approx(free["claude"] - free["dolly"])
    wide = by_name(ranked(tmp_path, path, "--bootstrap", 0, "--elo-scale", 800, "--elo-base", 0), "rating")
    assert wide["claude"] == pytest.approx(2 * (free["claude"] - 1000))


def test_a_board_for_every_category(tmp_path: Path):
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        path = write(tmp_path / name, ROWS)
        board = ranked(tmp_path, path, "--category-column", "language", "--bootstrap", 30)
        assert list(board["categories"]) == ["Deutsch", "English"]
        for language, part in board["categories"].items():
            mine = [row for row in ROWS if row["language"] == language]
            check(part, expected(mine))
            assert part["battles"] == len(mine)
    rows = [{**row, "turn": i % 2, "odd": i % 2 == 1} for i, row in enumerate(ROWS)]
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        path = write(tmp_path / name, rows)
        for column, labels in (("turn", ["0", "1"]), ("odd", ["false", "true"])):
            board = ranked(tmp_path, path, "--category-column", column, "--bootstrap", 0)
            assert [label.lower() for label in board["categories"]] == labels


def test_the_table_and_the_plot(tmp_path: Path):
    path = write(tmp_path / "b.csv", ROWS)
    result = run(path, "--limit", 2, "--plot", tmp_path / "p.png", "--category-column", "language")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))
    assert "claude" in result.stdout
    assert "dolly" not in result.stdout
    assert result.stdout.count("2 more players") == 3
    assert result.stdout.index("all battles") < result.stdout.index("Deutsch") < result.stdout.index("English")
    assert "200 rows, 4 players" in result.stderr
    assert "200 rows" not in result.stdout


def test_replicates_without_a_maximum_are_reported(tmp_path: Path):
    rows = [*ROWS, *[{**ROWS[0], "model_a": "claude", "model_b": "new", "winner": w} for w in ("model_a", "model_b")]]
    result = run(write(tmp_path / "b.csv", rows), "--bootstrap", 100)
    assert "of 100 replicates have no maximum" in result.stderr


# ---- Malformed rows ----

BAD_CSV = """model_a,model_b,winner,n
a,b,model_a,1
a,b,model_b,2
a,b,nobody,1

a,a,model_a,1
"a
b",b,,1
,b,tie,1
a,b
a,b,model_a,x
a,b,model_b,-1
a,b,tie,1
"""
BAD_CSV_PROBLEMS = [
    "line 4: winner: got 'nobody'; wanted model_a, model_b, tie, or one of the two players",
    "line 6: a player against itself",
    "line 7: no winner",
    "line 9: no model_a",
    "line 10: got 2 columns; wanted 4",
    "line 11: n: got 'x'; wanted a number >= 0",
    "line 12: n: got '-1'; wanted a number >= 0",
]
BAD_JSONL = """{"model_a": "a", "model_b": "b", "winner": "model_a", "n": 1}
{"model_a": "a", "model_b": "b", "winner": "model_b", "n": 2}

nonsense
[1, 2]
{"model_a": "a", "winner": "tie", "n": 1}
{"model_a": 3, "model_b": "b", "winner": "tie", "n": 1}
{"model_a": "a", "model_b": "b", "winner": "tie", "n": "many"}
{"model_a": "a", "model_b": "b", "winner": "tie", "n": null}
{"model_a": "a", "model_b": "b", "winner": "tie", "n": 1, "more": {"x": [1]}}
"""
BAD_JSONL_PROBLEMS = [
    "line 4: not JSON",
    "line 5: got list; wanted a JSON object",
    "line 6: no model_b",
    "line 7: model_a: got 3; wanted a string",
    "line 8: n: got 'many'; wanted a number",
    "line 9: n: got None; wanted a number >= 0",
]


@pytest.mark.parametrize(
    ("name", "content", "problems", "kept"),
    [("b.csv", BAD_CSV, BAD_CSV_PROBLEMS, 3), ("b.jsonl", BAD_JSONL, BAD_JSONL_PROBLEMS, 3)],
)
def test_malformed_rows_are_reported_with_their_lines(
    tmp_path: Path, name: str, content: str, problems: Sequence[str], kept: int
):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    stopped = run(path, "--weight-column", "n", "--bootstrap", 0, "--json", tmp_path / "no.json", code=1)
    assert f"{len(problems)} malformed row(s); --on-error skip leaves them out" in stopped.stderr
    assert not (tmp_path / "no.json").exists()
    skipped = run(path, "--weight-column", "n", "--bootstrap", 0, "--on-error", "skip", "--json", tmp_path / "o.json")
    for output in (stopped.stderr, skipped.stderr):
        lines = [line for line in output.splitlines() if line.startswith(f"{path}, ")]
        assert len(lines) == len(problems)
        for line, problem in zip(lines, problems, strict=True):
            assert line.startswith(f"{path}, {problem}")
    board = json.loads((tmp_path / "o.json").read_text())
    assert board["battles"] == kept
    assert board["settings"]["skipped_rows"] == len(problems)
    assert sorted(by_name(board)) == ["a", "b"]


def test_malformed_parquet_rows(tmp_path: Path):
    rows = [*ROWS[:5], {**ROWS[0], "winner": None}, {**ROWS[0], "importance": math.nan}, *ROWS[5:]]
    path = write(tmp_path / "b.parquet", rows)
    result = run(path, "--weight-column", "importance", code=1)
    assert "b.parquet, row 6: no winner" in result.stderr
    assert "b.parquet, row 7: importance: got nan; wanted a number >= 0" in result.stderr
    check(ranked(tmp_path, path, "--weight-column", "importance", "--on-error", "skip", "--bootstrap", 0),
          expected(ROWS, weight=[row["importance"] for row in ROWS]))  # fmt: skip


def test_long_reports_are_cut(tmp_path: Path):
    path = write(tmp_path / "b.csv", [{**row, "winner": "?"} for row in ROWS])
    result = run(path, code=1)
    assert "200 malformed row(s)" in result.stderr
    assert "... and 190 more" in result.stderr
    assert "no battles in" in run(path, "--on-error", "skip", code=1).stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "b.csv",
            b"model_a,model_b\na,b\n",
            "got the columns model_a, model_b; wanted model_a, model_b and winner, or",
        ),
        ("b.csv", b"", "got the columns (none)"),
        ("b.csv", b"model_a,model_b,winner\n\xff,b,tie\n", "byte 0xff is not UTF-8"),
        ("b.csv", b"model_a,model_a,model_b,winner\na,b,c,tie\n", "got two columns model_a"),
        ("b.jsonl", b"", "got an empty file"),
        ("b.jsonl", b"nonsense\n", "got no line that is a JSON object"),
        ("b.jsonl", b'{"a": 1}\n', "got the columns a; wanted model_a"),
        ("b.parquet", b"nonsense", "b.parquet: "),
        ("b.csv.gz", b"nonsense", "b.csv.gz: "),
        ("b.csv", b"model_a,model_b,winner\n", "no battles in"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    assert message in run(tmp_path / name, code=1).stderr


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tie-model", "rao"], "--tie-model: got 'rao'; wanted one of half, davidson, drop"),
        (["--on-error", "ask"], "--on-error: got 'ask'; wanted one of stop, skip"),
        (["--format", "xlsx"], "--format: got 'xlsx'; wanted one of csv, jsonl, parquet"),
        (["--level", "95"], "--level: got 95; wanted a number between 0 and 1"),
        (["--prior", "0"], "--prior: got 0; wanted a number > 0"),
        (["--bootstrap", "-1"], "--bootstrap: got -1; wanted at least 0"),
        (["--limit", "0"], "--limit: got 0; wanted at least 1"),
        (["--elo-scale", "0"], "--elo-scale: got 0"),
        (["--anchor", "claude"], "--anchor: got 'claude'; wanted NAME=RATING"),
        (["--anchor", "gpt=1000"], "--anchor: got 'gpt'; wanted one of the players"),
        (["--weight-column", "w"], "wanted w"),
        (["--covariate", "depth"], "wanted depth, or depth_a and depth_b"),
        (["--json", "/nowhere/board.json"], "--json: /nowhere is not a directory"),
    ],
)
def test_refusals_name_option_given_and_wanted(tmp_path: Path, options: list[str], message: str):
    result = run(write(tmp_path / "b.csv", ROWS), *options, code=1)
    assert message in result.stderr
    assert result.stderr.startswith("pyalign rank: ") or "rows," in result.stderr
    assert "Traceback" not in result.output


def test_players_without_a_maximum_are_called_by_name(tmp_path: Path):
    rows = [*ROWS, {**ROWS[0], "model_a": "newcomer", "model_b": "claude", "winner": "model_a"}]
    path = write(tmp_path / "b.csv", rows)
    result = run(path, code=1)
    assert (
        "player newcomer won every battle. Plain maximum likelihood has no maximum there; --prior 0.1" in result.stderr
    )
    board = ranked(tmp_path, path, "--prior", 0.1, "--bootstrap", 50)
    assert math.isfinite(by_name(board)["newcomer"])
    missing = run(tmp_path / "missing.csv", code=1)
    assert "missing.csv is not a file" in missing.stderr


def test_reading_refuses_what_is_missing(tmp_path: Path):
    with pytest.raises(BattlesError, match="is not a file"):
        read_battles([tmp_path / "nothing.csv"], Columns())


def test_help_shows_columns_options_and_examples():
    text = CliRunner().invoke(build_app(), ["rank", "--help"], env={"COLUMNS": "120", "TERM": "dumb"}).stdout
    for word in ("--tie-model", "--prior", "--anchor", "--on-error", "--category-column", "pyalign rank battles.csv"):
        assert word in text
