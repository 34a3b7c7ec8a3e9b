"""Files of prompts and responses: JSONL, Parquet, BIG-bench tasks. Malformed rows are found before a model runs."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyalign._optional import require
from pyalign._options import OptionError, not_utf8
from pyalign.pair_scorer.tokens import Message, ResponseSet, Text, shared_length

FORMATS = "*.jsonl, *.jsonl.gz, *.parquet, or *.json (a list of rows, or a BIG-bench task)"
PAIR, RESPONSES = "pair", "responses"


@dataclass(frozen=True)
class RecordOptions:
    """Which fields there are besides prompt, chosen, rejected and responses, and what may stand in them."""

    category: str | None = None  # the field that pairs are grouped by in the summary
    keep: tuple[str, ...] = ()  # fields copied to the output
    turn: str = (
        "\n\nAssistant:"  # behind its last common occurrence chosen and rejected differ, where there is no prompt
    )
    needs_response: bool = True  # an empty one can't be scored
    needs_prompt: bool = True  # without one, chosen and rejected have to share a turn


class Record(NamedTuple):
    index: int  # its place in the data, from 0
    kind: str  # "pair": responses are chosen and rejected
    texts: ResponseSet
    category: str | None
    kept: dict[str, Any]

    @property
    def lengths(self) -> list[int]:
        """Characters of the responses."""
        return [
            len(r) if isinstance(r, str) else sum(len(message["content"]) for message in r)
            for r in self.texts.responses
        ]


class Malformed(NamedTuple):
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class Scan(NamedTuple):
    """What one reading of all data has found."""

    digest: str  # of the files' names and bytes
    records: int  # malformed ones included
    kind: str
    malformed: dict[int, Malformed]  # by index


class RawRow(NamedTuple):
    """A row of a file, not yet checked."""

    where: str
    content: Any  # a row, or the bytes of a line
    category: str | None = None


class Source:
    """The rows of files, one after the other.

    Raises:
        OptionError: a file is missing or of no known format.
    """

    def __init__(self, paths: Sequence[Path], options: RecordOptions):
        self._paths, self._options = list(paths), options
        check_files(self._paths)

    def scan(self) -> Scan:
        """Read everything once: what is malformed, which kind of rows there are, and which data it is.

        Raises:
            OptionError: a file can't be read, or holds no row.
        """
        digest = files_digest(self._paths)
        malformed: dict[int, Malformed] = {}
        kind, count = "", 0
        for index, raw in enumerate(self._raw()):
            count = index + 1
            try:
                found = self._parse(index, raw).kind
                if kind and found != kind:
                    raise ValueError(f"got a row with {_fields(found)}; wanted {_fields(kind)} as in the rows before")
                kind = found
            except ValueError as error:
                malformed[index] = Malformed(raw.where, str(error))
        if count == 0:
            raise OptionError("data", f"{', '.join(map(str, self._paths))}: no row in it; wanted {FORMATS}")
        return Scan(digest, count, kind, malformed)

    def chunks(self, scan: Scan, size: int, wanted: Sequence[int]) -> Iterator[tuple[int, list[Record]]]:
        """(c, the well-formed records from index c * size up to (c + 1) * size) of ``wanted`` chunks, ascending."""
        left = iter(wanted)
        chunk = next(left, None)
        records: list[Record] = []
        for index, raw in enumerate(self._raw()):
            if chunk is None:
                return
            if index // size == chunk and index not in scan.malformed:
                records.append(self._parse(index, raw))
            if index + 1 == min((chunk + 1) * size, scan.records):
                yield chunk, records
                chunk, records = next(left, None), []

    def _parse(self, index: int, raw: RawRow) -> Record:
        row = parse_row(raw, f"{_fields(PAIR)} or {_fields(RESPONSES)}")
        return _record(index, row, raw.category, self._options)

    def _raw(self) -> Iterator[RawRow]:
        return read_rows(self._paths, _comparison)


def check_files(paths: Sequence[Path]) -> None:
    """Refuse what is missing, or of no known format.

    Raises:
        OptionError: naming the file.
    """
    for path in paths:
        if not path.is_file():
            raise OptionError("data", f"{path} is not a file")
        if _format(path) is None:
            raise OptionError("data", f"got {path}; wanted {FORMATS}")


def files_digest(paths: Sequence[Path]) -> str:
    """sha256 of the files' names and bytes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n".encode())
        with open(path, "rb") as file:
            digest.update(_sha256(file))
    return digest.hexdigest()


def read_rows(paths: Sequence[Path], example: Callable[[Mapping[str, Any], Any], Any]) -> Iterator[RawRow]:
    """The rows of files, one after the other; ``example(task, example)`` makes them of a BIG-bench task's examples.

    Raises:
        OptionError: a file can't be read.
    """
    for path in paths:
        try:
            if path.suffix == ".json":
                yield from _json(path, example)
            else:
                yield from _READERS[_format(path) or ""](path)
        except (OSError, EOFError, zlib.error) as error:
            raise OptionError("data", f"{path} can't be read ({error})") from error


def parse_row(raw: RawRow, wanted: str) -> Mapping[str, Any]:
    """The object in a row; ``wanted`` names its fields in errors.

    Raises:
        ValueError: there is none.
    """
    row = raw.content
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8("it", error)) from error
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(row, Mapping):
        raise ValueError(f"got {row!r:.80}; wanted an object with {wanted}")
    return row  # pyright: ignore[reportUnknownVariableType]


def _sha256(file: Any) -> bytes:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def _fields(kind: str) -> str:
    return "prompt, chosen, rejected" if kind == PAIR else "prompt, responses"


# ---- Files ----


def _format(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix == ".jsonl" or (suffix in (".parquet", ".json") and name == path.name) else None


def _json_lines(path: Path) -> Iterator[RawRow]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield RawRow(f"{path}:{number}", line)


def _parquet(path: Path) -> Iterator[RawRow]:
    parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield RawRow(f"{path}, row {number}", row)
                number += 1
    except arrow.ArrowInvalid as error:
        raise OptionError("data", f"{path} is not Parquet ({error})") from error


def _json(path: Path, make: Callable[[Mapping[str, Any], Any], Any]) -> Iterator[RawRow]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise OptionError("data", not_utf8(path, error)) from error
    except ValueError as error:
        raise OptionError("data", f"{path} is not JSON ({error})") from error
    if isinstance(content, list):
        for i, row in enumerate(content):  # pyright: ignore[reportUnknownArgumentType]
            yield RawRow(f"{path}, row {i}", row)
        return
    if not isinstance(content, dict) or not isinstance(content.get("examples"), list):
        raise OptionError("data", f"{path} holds neither a list nor a BIG-bench task with examples; wanted {FORMATS}")
    for i, example in enumerate(content["examples"]):  # pyright: ignore[reportUnknownArgumentType]
        yield RawRow(f"{path}, example {i}", make(content, example), path.stem)  # pyright: ignore[reportUnknownArgumentType]


_READERS = {".jsonl": _json_lines, ".parquet": _parquet}


def _comparison(task: Mapping[str, Any], example: Any) -> Any:
    """An example of a BIG-bench multiple-choice task with one right and one wrong answer as a pair."""
    targets = example.get("target_scores") if isinstance(example, Mapping) else None
    if not isinstance(targets, Mapping) or not isinstance(example.get("input"), str):
        return example
    right = [text for text, score in targets.items() if score > 0]
    wrong = [text for text, score in targets.items() if score <= 0]
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA:")
    if len(right) != 1 or len(wrong) != 1:
        return {"chosen": right, "rejected": wrong}
    space = "" if after[-1:].isspace() else " "
    prompt = f"{before}{example['input']}{after}"
    return {**example, "prompt": prompt, "chosen": space + right[0], "rejected": space + wrong[0]}


# ---- Rows ----


def _record(index: int, row: Mapping[str, Any], category: str | None, options: RecordOptions) -> Record:
    """The row as a record.

    Raises:
        ValueError: its fields aren't what is wanted.
    """
    if options.category is not None:
        if row.get(options.category) is None:
            raise ValueError(f"it has no {options.category!r}; wanted the category of each row")
        category = str(row[options.category])
    missing = [name for name in options.keep if name not in row]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}; wanted the fields to keep in each row")
    kept = {name: row[name] for name in options.keep}
    prompt = None if row.get("prompt") is None else _text("prompt", row["prompt"])
    if row.get("responses") is not None:
        responses = row["responses"]
        if not isinstance(responses, list) or not responses:
            raise ValueError(f"responses: got {responses!r:.60}; wanted a list of one or more")
        texts = [_text(f"responses[{i}]", r) for i, r in enumerate(responses)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if prompt is None:
            raise ValueError("it has no prompt; wanted prompt, responses")
        kind, found = RESPONSES, ResponseSet(prompt, texts)
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        kind = PAIR
        found = _pair(prompt, _text("chosen", row["chosen"]), _text("rejected", row["rejected"]), options)
    else:
        names = ", ".join(map(str, row)) or "none"
        raise ValueError(f"got the fields {names:.120}; wanted {_fields(PAIR)}, or {_fields(RESPONSES)}")
    names = ("chosen", "rejected") if kind == PAIR else [f"responses[{i}]" for i in range(len(found.responses))]
    for name, response in zip(names, found.responses, strict=True):
        if options.needs_response and isinstance(response, str) and not response:
            raise ValueError(f"{name} is empty behind the prompt; wanted a text to score")
    return Record(index, kind, found, category, kept)


def _text(name: str, value: Any) -> Text:
    if isinstance(value, str):
        whole(name, value)
        return value
    if isinstance(value, list) and value:
        for message in value:  # pyright: ignore[reportUnknownVariableType]
            role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
            if not isinstance(role, str) or not isinstance(content, str):
                raise ValueError(f"{name}: got the message {message!r:.60}; wanted role and content, both text")
            whole(name, content)
        return value  # pyright: ignore[reportUnknownVariableType]
    raise ValueError(f"{name}: got {value!r:.60}; wanted text or a list of messages")


def whole(name: str, text: str) -> None:
    """Refuse halves of characters.

    Raises:
        ValueError: ``text`` holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: got half a character at {error.start}; wanted UTF-8") from error


def _pair(prompt: Text | None, chosen: Text, rejected: Text, options: RecordOptions) -> ResponseSet:
    """Chosen and rejected behind the prompt; where they hold it themselves, it is what they share."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return ResponseSet(prompt, (chosen, rejected))
        shared = chosen[: shared_length((chosen, rejected))]
        at = shared.rfind(options.turn)
        cut = at + len(options.turn) if at >= 0 else 0
        if at < 0 and options.needs_prompt:
            raise ValueError(
                f"it has no prompt, and chosen and rejected share no {options.turn!r} behind which they differ; wanted "
                "either"
            )
        return ResponseSet(chosen[:cut], (chosen[cut:], rejected[cut:]))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("got text and messages; wanted chosen and rejected of one kind")
    if chosen[0]["role"] == "assistant" or rejected[0]["role"] == "assistant":
        if prompt is None:
            raise ValueError("chosen and rejected begin with the assistant; wanted a prompt")
        return ResponseSet(prompt, (chosen, rejected))
    before = _shared_messages(chosen, rejected)
    if before == 0:
        raise ValueError("chosen and rejected share no message; wanted conversations with one prompt")
    return ResponseSet(chosen[:before], (chosen[before:], rejected[before:]))


def _shared_messages(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages both begin with, so that each has one left."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)
