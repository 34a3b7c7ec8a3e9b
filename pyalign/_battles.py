"""Battles from CSV, JSONL and Parquet files, by columns; malformed rows are reported with their lines.

Whole blocks go through Arrow. What it cannot read is read line by line, to say where the trouble is.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyalign._optional import require

FORMATS = ("csv", "jsonl", "parquet")
_BLOCK = 32 << 20  # bytes of a file that are read at once
_FIRST = frozenset({"model_a", "a", "player_a", "first"})
_SECOND = frozenset({"model_b", "b", "player_b", "second"})
_TIE = frozenset({"tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "draw"})
_YES, _NO = frozenset({"true", "1", "yes", "tie"}), frozenset({"false", "0", "no", ""})


class BattlesError(ValueError):
    """A file that can't be read, or lacks a column, or has malformed rows where none are allowed."""


class Columns(NamedTuple):
    """Names of columns. With ``a`` and ``b``, ``winner`` says which of them won, or names the winner."""

    a: str = "model_a"
    b: str = "model_b"
    winner: str = "winner"
    loser: str = "loser"
    tie: str = "tie"
    weight: str | None = None
    count: str | None = None
    category: str | None = None
    covariates: tuple[str, ...] = ()


class Problem(NamedTuple):
    path: Path
    row: str
    """"line 7", or of Parquet "row 7", counted from 1."""
    what: str

    def __str__(self) -> str:
        return f"{self.path}, {self.row}: {self.what}"


@dataclass
class Battles:
    """M battles as arrays; for a tie, ``winners`` holds the player named first."""

    players: list[str]
    winners: NDArray[np.int64]  # (M,)
    losers: NDArray[np.int64]  # (M,)
    ties: NDArray[np.bool_]  # (M,)
    weight: NDArray[np.float64] | None  # (M,)
    counts: NDArray[np.int64] | None  # (M,)
    category: NDArray[np.str_] | None  # (M,)
    covariates: NDArray[np.float64] | None  # (M, F) winner minus loser
    problems: list[Problem]

    def pick(self, chosen: NDArray[np.bool_]) -> Battles:
        """Some of the rows; the players stay as they are."""
        arrays = {name: x[chosen] for name, x in vars(self).items() if isinstance(x, np.ndarray)}
        return dataclasses.replace(self, **arrays)


@dataclass
class _Layout:
    """How the columns of one file are read."""

    columns: Columns
    names: list[str]
    pairs: bool = field(init=False)  # a, b and winner; else winner and loser
    tie: str | None = field(init=False)
    covariates: list[tuple[str, str | None]] = field(init=False)  # a column, or a's and b's to subtract

    def __post_init__(self) -> None:
        c, there, usual = self.columns, set(self.names), Columns()
        self.pairs = {c.a, c.b, c.winner} <= there and (c.loser, c.tie) == (usual.loser, usual.tie)
        if not self.pairs and not {c.winner, c.loser} <= there:
            raise BattlesError(
                f"got the columns {', '.join(self.names) or '(none)'}; wanted {c.a}, {c.b} and {c.winner}, or "
                f"{c.winner} and {c.loser}; options name other columns"
            )
        self.tie = c.tie if not self.pairs and c.tie in there else None
        for name in (c.weight, c.count, c.category, None if c.tie == usual.tie else c.tie):
            if name is not None and name not in there:
                raise BattlesError(f"got the columns {', '.join(self.names)}; wanted {name}")
        self.covariates = []
        for name in c.covariates:
            if name in there:
                self.covariates.append((name, None))
            elif self.pairs and {f"{name}_a", f"{name}_b"} <= there:
                self.covariates.append((f"{name}_a", f"{name}_b"))
            else:
                either = f"{name}, or {name}_a and {name}_b" if self.pairs else name
                raise BattlesError(f"got the columns {', '.join(self.names)}; wanted {either}")

    @property
    def texts(self) -> list[str]:
        c = self.columns
        names = [c.a, c.b, c.winner] if self.pairs else [c.winner, c.loser]
        return names + ([c.category] if c.category is not None else [])

    @property
    def numbers(self) -> list[str]:
        c = self.columns
        names = [name for name in (c.weight, c.count) if name is not None]
        return names + [name for pair in self.covariates for name in pair if name is not None]

    @property
    def wanted(self) -> list[str]:
        return list(dict.fromkeys(self.texts + self.numbers + ([self.tie] if self.tie else [])))


def read_battles(paths: Sequence[Path], columns: Columns, *, file_format: str | None = None) -> Battles:
    """Read all battles of the files, in order, leaving malformed rows out.

    CSV (with a header) and JSONL may be compressed (gzip and what else Arrow knows by its suffix).

    Args:
        paths: files; the suffixes .csv, .jsonl (.json, .ndjson) and .parquet tell what they are.
        columns: what their columns are called.
        file_format: one of FORMATS, whatever the suffixes say.

    Raises:
        BattlesError: a file is missing, unreadable or lacks a column.
    """
    collector = _Collector(columns)
    for path in paths:
        if not path.is_file():
            raise BattlesError(f"{path} is not a file")
        kind = file_format or _format(path)
        try:
            {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}[kind](path, columns, collector)
        except BattlesError as error:
            raise BattlesError(f"{path}: {error}") from None
        except UnicodeDecodeError as error:
            raise BattlesError(f"{path}: byte {error.object[error.start]:#04x} is not UTF-8") from None
        except OSError as error:  # of compressed streams too
            raise BattlesError(f"{path}: {error}") from None
    return collector.result()


def _format(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    known = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    for suffix in reversed(suffixes):
        if suffix in known:
            return known[suffix]
    raise BattlesError(
        f"{path}: got the suffix {path.suffix or '(none)'}; wanted .csv, .jsonl or .parquet, or --format"
    )


# ---- Collecting blocks ----


class _Collector:
    def __init__(self, columns: Columns):
        self.columns = columns
        self.numbers: dict[str, int] = {}  # of the players
        self.parts: list[tuple[Any, ...]] = []
        self.problems: list[Problem] = []

    def add(self, table: Any, layout: _Layout, path: Path, row_names: Callable[[NDArray[np.int64]], list[str]]) -> None:
        """Take a table of the wanted columns; ``row_names`` tells where in the file rows of it are."""
        if not table.num_rows:
            return
        c, reasons = self.columns, _Reasons(table.num_rows)
        text = {name: _Text(table.column(name)) for name in layout.texts}
        for name in dict.fromkeys(layout.texts):
            reasons.note(text[name].missing, lambda row, name=name: f"no {name}")
        ties = np.zeros(table.num_rows, bool)
        if layout.pairs:
            first, second = self._players(text[c.a]), self._players(text[c.b])
            outcome = _outcomes(text[c.winner], text[c.a], text[c.b])
            said = text[c.winner]
            wanted = "model_a, model_b, tie, or one of the two players"
            reasons.note(outcome < 0, lambda row: f"{c.winner}: got {said.value(row)!r}; wanted {wanted}")
            swapped, ties = outcome == 1, outcome == 2
            winners, losers = np.where(swapped, second, first), np.where(swapped, first, second)
        else:
            winners, losers = self._players(text[c.winner]), self._players(text[c.loser])
            swapped = np.zeros(table.num_rows, bool)
            if layout.tie is not None:
                ties, bad = _flags(table.column(layout.tie))
                column = table.column(layout.tie)
                reasons.note(bad, lambda row: f"{c.tie}: got {column[row].as_py()!r}; wanted true or false")
        reasons.note((winners == losers) & (winners >= 0), lambda row: "a player against itself")
        numbers: dict[str, NDArray[np.float64]] = {}
        for name in layout.numbers:
            column = table.column(name)
            numbers[name] = _numbers(column)
            bad = ~np.isfinite(numbers[name])
            wanted = "a number"
            if name in (c.weight, c.count):
                bad |= numbers[name] < 0
                wanted = "a number >= 0"
            if name == c.count:
                bad |= (numbers[name] != np.floor(numbers[name])) | (numbers[name] > 2.0**53)
                wanted = "a whole number >= 0"
            reasons.note(
                bad,
                lambda row, column=column, name=name, wanted=wanted: (
                    f"{name}: got {column[row].as_py()!r}; wanted {wanted}"
                ),
            )
        differences = [
            numbers[first] if second is None else numbers[first] - numbers[second]
            for first, second in layout.covariates
        ]
        z = np.stack(differences, 1) if differences else None
        if z is not None and layout.pairs:
            z[swapped] *= -1
        bad_rows = np.flatnonzero(reasons.bad)
        self.problems += [
            Problem(path, where, reasons.why[row])
            for row, where in zip(bad_rows.tolist(), row_names(bad_rows), strict=True)
        ]
        good = ~reasons.bad
        part = (
            winners,
            losers,
            ties,
            numbers[c.weight] if c.weight is not None else None,
            numbers[c.count] if c.count is not None else None,
            text[c.category].array() if c.category is not None else None,
            z,
        )
        self.parts.append(part if not len(bad_rows) else tuple(None if x is None else x[good] for x in part))

    def _players(self, text: _Text) -> NDArray[np.int64]:
        """Numbers of the players, -1 where there is none."""
        known = np.array([self.numbers.setdefault(name, len(self.numbers)) for name in text.values] + [-1], np.int64)
        return known[text.codes]

    def result(self) -> Battles:
        winners, losers, ties, weight, counts, category, z = (
            None if not column or column[0] is None else np.concatenate(column)
            for column in (zip(*self.parts, strict=True) if self.parts else [[]] * 7)
        )
        none = np.zeros(0, np.int64)
        winners, losers = none if winners is None else winners, none if losers is None else losers
        # Players of malformed rows alone are not there; the others are numbered in the order of their names.
        seen = np.zeros(len(self.numbers), bool)
        seen[winners] = seen[losers] = True
        names = [name for name, there in zip(self.numbers, seen.tolist(), strict=True) if there]
        order = sorted(names)
        place = {name: i for i, name in enumerate(order)}
        renumbered = np.array([place.get(name, -1) for name in self.numbers] or [-1], np.int64)
        return Battles(
            order,
            renumbered[winners],
            renumbered[losers],
            np.zeros(0, bool) if ties is None else ties,
            weight,
            None if counts is None else counts.astype(np.int64),
            category,
            z,
            self.problems,
        )


class _Reasons:
    """What is the matter with the rows of a block: the first thing that was noted."""

    def __init__(self, count: int):
        self.bad = np.zeros(count, bool)
        self.why: dict[int, str] = {}

    def note(self, rows: NDArray[np.bool_], say: Callable[[int], str]) -> None:
        for row in np.flatnonzero(rows & ~self.bad).tolist():
            self.why[row] = say(row)
        self.bad |= rows


class _Text:
    """A column of strings as numbers of its distinct values; a null or an empty one is missing (-1)."""

    def __init__(self, column: Any):
        pa = require("pyarrow")
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if not pa.types.is_dictionary(column.type):
            if not pa.types.is_string(column.type):
                column = column.cast(pa.string())
            column = column.dictionary_encode()
        elif not pa.types.is_string(column.type.value_type):
            column = column.cast(pa.string()).dictionary_encode()
        values: list[str | None] = column.dictionary.to_pylist()
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        blank = np.array([value is None or not value.strip() for value in values] + [True])
        self.codes: NDArray[np.int64] = np.where(blank[codes], -1, codes)
        self.values = ["" if value is None else value for value in values]
        self.missing: NDArray[np.bool_] = self.codes < 0

    def value(self, row: int) -> str:
        return self.values[self.codes[row]]

    def array(self) -> NDArray[np.str_]:
        return np.array([*self.values, ""], np.str_)[self.codes]


def _outcomes(said: _Text, first: _Text, second: _Text) -> NDArray[np.int64]:
    """0 where the first player won, 1 where the second did, 2 for a tie, -1 where the winner is neither."""

    def meaning(value: str) -> int:
        value = value.strip().lower()
        return 0 if value in _FIRST else 1 if value in _SECOND else 2 if value in _TIE else -1

    outcome = np.array([*map(meaning, said.values), -1], np.int64)[said.codes]
    unknown = np.flatnonzero((outcome < 0) & ~said.missing)
    if len(unknown):  # the winner by its name
        numbers = {value: i for i, value in enumerate(said.values)}
        for code, text in ((0, first), (1, second)):
            same = np.array([*(numbers.get(value, -2) for value in text.values), -2], np.int64)
            outcome[unknown[same[text.codes[unknown]] == said.codes[unknown]]] = code
    return outcome


def _numbers(column: Any) -> NDArray[np.float64]:
    """NaN for nulls and what is no number."""
    pa, compute = require("pyarrow"), require("pyarrow.compute")
    try:
        numbers = column.cast(pa.float64()) if not pa.types.is_string(column.type) else _parsed(column, compute, pa)
        return numbers.fill_null(math.nan).to_numpy().astype(np.float64)
    except pa.ArrowInvalid:
        return np.array([_number(value) for value in column.to_pylist()], np.float64)
    except pa.ArrowNotImplementedError:
        return np.full(len(column), math.nan)


def _parsed(column: Any, compute: Any, pa: Any) -> Any:
    return compute.utf8_trim_whitespace(column).cast(pa.float64())


def _number(value: object) -> float:
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return math.nan


def _flags(column: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Booleans, and where there is none. A null is False."""
    pa = require("pyarrow")
    if pa.types.is_boolean(column.type):
        return column.fill_null(False).to_numpy().astype(bool), np.zeros(len(column), bool)
    text = _Text(column)
    words = [value.strip().lower() for value in text.values] + [""]
    yes = np.array([word in _YES for word in words])
    return yes[text.codes], ~(yes | np.array([word in _NO for word in words]))[text.codes]


# ---- CSV ----


def _read_csv(path: Path, columns: Columns, collector: _Collector) -> None:
    pa, arrow = require("pyarrow"), require("pyarrow.csv")
    with _text(path) as file:
        names = next(csv.reader(file), [])
    repeated = {name for name in names if names.count(name) > 1}
    layout = _Layout(columns, names)
    if repeated & set(layout.wanted):
        raise BattlesError(f"got two columns {', '.join(sorted(repeated))}; wanted one of each name")
    invalid = 0

    def skip(row: Any) -> str:
        nonlocal invalid
        invalid += 1
        return "skip"

    wanted = layout.wanted
    kinds = {name: pa.string() if name in layout.numbers else pa.dictionary(pa.int32(), pa.string()) for name in wanted}
    rows = 0  # in the blocks before
    bad: list[tuple[int, int]] = []  # row of the file, number of the problem
    begin = len(collector.problems)

    def later(chosen: NDArray[np.int64]) -> list[str]:
        bad.extend((rows + row, len(collector.problems) + i) for i, row in enumerate(chosen.tolist()))
        return [""] * len(chosen)

    try:
        with (
            pa.input_stream(str(path)) as stream,
            arrow.open_csv(
                stream,
                read_options=arrow.ReadOptions(block_size=_BLOCK),
                parse_options=arrow.ParseOptions(invalid_row_handler=skip, newlines_in_values=True),
                convert_options=arrow.ConvertOptions(
                    include_columns=wanted, column_types=kinds, null_values=[], strings_can_be_null=False
                ),
            ) as batches,
        ):
            for batch in batches:
                collector.add(pa.Table.from_batches([batch]), layout, path, later)
                rows += batch.num_rows
    except pa.ArrowInvalid as error:
        with _text(path) as file:
            for _ in file:  # raises the error of bytes that are no text, with the byte
                pass
        raise BattlesError(str(error)) from None
    if bad or invalid:
        _locate_csv(path, len(names), dict(bad), collector.problems, begin)


def _locate_csv(path: Path, width: int, bad: dict[int, int], problems: list[Problem], begin: int) -> None:
    """Gives the problems from ``begin`` on their lines, and adds those of rows of another width."""
    row = 0
    with _text(path) as file:
        reader, line = csv.reader(file), 1
        next(reader)
        for fields in _until_error(reader):
            line, start = reader.line_num, line + 1
            if not fields:
                continue
            if len(fields) != width:
                problems.append(Problem(path, f"line {start}", f"got {len(fields)} columns; wanted {width}"))
                continue
            if row in bad:
                problems[bad[row]] = problems[bad[row]]._replace(row=f"line {start}")
            row += 1
    problems[begin:] = sorted(problems[begin:], key=lambda problem: int(problem.row.rpartition(" ")[2] or 0))


def _until_error(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise BattlesError(str(error)) from None


def _text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(require("pyarrow").input_stream(str(path)), encoding="utf-8-sig", newline="")


# ---- JSONL ----


def _read_jsonl(path: Path, columns: Columns, collector: _Collector) -> None:
    pa = require("pyarrow")
    layout = kind = None
    with pa.input_stream(str(path)) as stream:
        for first_line, block in _line_blocks(stream):
            if layout is None:
                if not block.strip():
                    continue
                sample = _json_sample(block)
                layout = _Layout(columns, list(sample))
                if not layout.pairs:
                    layout.tie = columns.tie  # a row without it is no tie
                category = sample.get(columns.category) if columns.category is not None else None
                kind = pa.bool_() if isinstance(category, bool) else pa.int64() if isinstance(category, int) else None
            _add_json_block(block, first_line, layout, kind, path, collector)
    if layout is None:
        raise BattlesError("got an empty file; wanted battles")


def _line_blocks(stream: Any) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines, and the number of the first line of each."""
    line, rest = 1, b""
    while True:
        chunk = stream.read(_BLOCK)
        end = chunk.rfind(b"\n") + 1
        block = rest + chunk[:end] if chunk else rest
        if block and (end or not chunk):
            yield line, block
            line += block.count(b"\n")
            rest = chunk[end:]
        else:
            rest += chunk
        if not chunk:
            return


def _json_rows(block: bytes, first_line: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Lines that hold something, parsed; a string says what is wrong with one that can't be."""
    for line, text in enumerate(block.split(b"\n"), first_line):
        if not text.strip():
            continue
        row: Any
        try:
            row = json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            row = f"byte {text[error.start]:#04x} is not UTF-8"
        except (ValueError, RecursionError) as error:
            row = f"not JSON ({error})"
        else:
            if not isinstance(row, dict):
                row = f"got {type(row).__name__}; wanted a JSON object"
        yield line, row


def _json_sample(block: bytes) -> dict[str, Any]:
    """The fields of the first thousand rows, each with a value that it has."""
    rows = [row for _, row in itertools.islice(_json_rows(block, 1), 1000) if isinstance(row, dict)]
    if not rows:
        raise BattlesError("got no line that is a JSON object")
    sample: dict[str, Any] = {}
    for row in rows:
        sample.update({name: value for name, value in row.items() if sample.get(name) is None})
    return sample


def _add_json_block(
    block: bytes, first_line: int, layout: _Layout, category: Any, path: Path, collector: _Collector
) -> None:
    pa, arrow = require("pyarrow"), require("pyarrow.json")
    kinds = dict.fromkeys(layout.texts, pa.string()) | dict.fromkeys(layout.numbers, pa.float64())
    if layout.columns.category is not None and category is not None:
        kinds[layout.columns.category] = category
    if layout.tie is not None:
        kinds[layout.tie] = pa.bool_()
    schema = pa.schema(list(kinds.items()))
    lines: list[int] = []
    begin = len(collector.problems)
    try:
        table = arrow.read_json(
            pa.BufferReader(block),
            read_options=arrow.ReadOptions(block_size=min(max(len(block), 1), _BLOCK)),
            parse_options=arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        table, lines = _json_table(block, first_line, layout, path, collector)

    def names(chosen: NDArray[np.int64]) -> list[str]:
        if len(chosen) and not lines:
            lines.extend(n for n, text in enumerate(block.split(b"\n"), first_line) if text.strip())
        return [f"line {lines[row]}" for row in chosen.tolist()]

    collector.add(table, layout, path, names)
    collector.problems[begin:] = sorted(collector.problems[begin:], key=lambda p: int(p.row.split()[1]))


def _json_table(
    block: bytes, first_line: int, layout: _Layout, path: Path, collector: _Collector
) -> tuple[Any, list[int]]:
    """The block line by line: its rows as text and numbers, and their lines; the others become problems."""
    pa = require("pyarrow")
    lines: list[int] = []
    values: dict[str, list[Any]] = {name: [] for name in layout.wanted}
    for line, row in _json_rows(block, first_line):
        if not isinstance(row, str) and (problem := _json_problem(row, layout)) is not None:
            row = problem
        if isinstance(row, str):
            collector.problems.append(Problem(path, f"line {line}", row))
            continue
        lines.append(line)
        for name, column in values.items():
            value = row.get(name)
            as_text = name not in layout.numbers and value is not None
            column.append(
                str(value).lower() if as_text and isinstance(value, bool) else str(value) if as_text else value
            )
    kinds = {name: pa.float64() if name in layout.numbers else pa.string() for name in values}
    return pa.table({name: pa.array(column, kinds[name]) for name, column in values.items()}), lines


def _json_problem(row: dict[str, Any], layout: _Layout) -> str | None:
    for name in layout.texts:
        value = row.get(name)
        allowed = (str, int) if name == layout.columns.category else (str,)
        if value is not None and not isinstance(value, allowed):
            return f"{name}: got {value!r}; wanted a string"
    for name in layout.numbers:
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"{name}: got {value!r}; wanted a number"
    if layout.tie is not None and not isinstance(row.get(layout.tie), (bool, int, str, type(None))):
        return f"{layout.tie}: got {row[layout.tie]!r}; wanted true or false"
    return None


# ---- Parquet ----


def _read_parquet(path: Path, columns: Columns, collector: _Collector) -> None:
    pa, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            layout = _Layout(columns, file.schema_arrow.names)
            rows = 0
            for batch in file.iter_batches(batch_size=1 << 20, columns=layout.wanted):

                def names(chosen: NDArray[np.int64], rows: int = rows) -> list[str]:
                    return [f"row {rows + row + 1}" for row in chosen.tolist()]

                collector.add(pa.Table.from_batches([batch]), layout, path, names)
                rows += batch.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BattlesError(str(error)) from None


def summary(problems: Sequence[Problem], most: int = 10) -> str:
    """The first problems, one a line, and how many more there are."""
    lines = [str(problem) for problem in itertools.islice(problems, most)]
    return "\n".join(lines + ([f"... and {len(problems) - most} more"] if len(problems) > most else []))
