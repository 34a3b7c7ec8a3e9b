"""Texts into token sequences: half documents after "Human:", half dialogues, which is the paper's mix."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyalign._optional import require
from pyalign._options import OptionError, at_least, not_utf8, read_text, whole_text

MIN_TOKENS = 8  # a shorter remainder of a document is left out


@dataclass(frozen=True)
class Record:
    """A document (``question`` is None) or a question with its answer."""

    text: str
    question: str | None = None
    group: str | None = None  # records of one group are held out together

    @property
    def key(self) -> str:
        return self.group if self.group is not None else f"{self.question}\n{self.text}"


class TokenSequence(NamedTuple):
    tokens: NDArray[np.int32]  # (n,)
    held_out: bool


def read_records(paths: list[Path]) -> list[Record]:
    """Read text files (one document each), JSONL and Parquet.

    A row of JSONL or Parquet is ``{"text": ...}`` or ``{"question": ..., "answer": ...}``, either with an
    optional ``"group"``: rows of one group are held out together.

    Raises:
        OptionError: a file is missing, empty or not UTF-8, or a row has neither form (it names the line).
    """
    records: list[Record] = []
    for path in paths:
        if not path.is_file():
            raise OptionError("text", f"{path} is not a file")
        if path.suffix == ".jsonl":
            found = [_record(row, f"{path}:{line}") for line, row in _json_lines(path)]
        elif path.suffix == ".parquet":
            found = [_record(row, f"{path}, row {i}") for i, row in enumerate(_parquet_rows(path))]
        else:
            found = [Record(read_text("text", path))]
        if not any(r.text.strip() for r in found):
            raise OptionError("text", f"{path} holds no text")
        records += found
    return records


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                try:
                    yield line, json.loads(text.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise OptionError("text", not_utf8(f"{path}:{line}", error)) from error
                except ValueError as error:
                    raise OptionError("text", f"{path}:{line} is not JSON ({error})") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    table = require("pyarrow.parquet").read_table
    try:
        return table(path).to_pylist()
    except ValueError as error:  # pyarrow.ArrowInvalid is one
        raise OptionError("text", f"{path} is not Parquet ({error})") from error


def _record(row: Any, where: str) -> Record:
    if isinstance(row, dict):
        fields: dict[str, Any] = {str(k): v for k, v in row.items() if v is not None}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        group = None if fields.get("group") is None else str(fields["group"])
        for value in fields.values():
            if isinstance(value, str):
                whole_text("text", value, f"{where}: ")
        if isinstance(fields.get("text"), str):
            return Record(fields["text"], None, group)
        if isinstance(fields.get("question"), str) and isinstance(fields.get("answer"), str):
            return Record(fields["answer"], fields["question"], group)
    raise OptionError("text", f'{where}: wanted {{"text": str}} or {{"question": str, "answer": str}}, got {row!r:.80}')


def is_held_out(key: str, fraction: float, seed: int) -> bool:
    """Whether the record ``key`` is held out: a hash below ``fraction``, whatever other records there are."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def make_sequences(
    records: list[Record],
    encode: Callable[[str], list[int]],
    *,
    chunk_length: int,
    held_out_fraction: float,
    max_sequences: int | None = None,
    text_prefix: str = "Human:",
    bos: int | None = None,
    seed: int = 0,
) -> list[TokenSequence]:
    """Cut records into sequences of at most ``chunk_length`` tokens.

    A document is cut into windows, each after ``text_prefix``. A question and answer becomes "Human:
    ...\\n\\nAssistant: ..." and keeps its first ``chunk_length`` tokens: a continuation without its question
    is no dialogue. Each kind is shuffled, then they alternate, so that ``max_sequences`` takes half of either
    where there is enough of both.

    Raises:
        OptionError: a number out of range, or either split is empty.
    """
    whole_text("text_prefix", text_prefix)
    prefix = ([] if bos is None else [bos]) + (encode(text_prefix) if text_prefix else [])
    window = chunk_length - len(prefix)
    at_least("chunk_length", chunk_length, len(prefix) + MIN_TOKENS)
    if not 0.0 < held_out_fraction < 1.0:
        raise OptionError("held_out", f"got {held_out_fraction}; wanted a fraction between 0 and 1")
    if max_sequences is not None:
        at_least("max_sequences", max_sequences, 2)  # one to train on and one held out

    documents: list[TokenSequence] = []
    dialogues: list[TokenSequence] = []
    for record in records:
        held_out = is_held_out(record.key, held_out_fraction, seed)
        text = record.text.strip()
        if record.question is not None:
            dialogue = encode(f"Human: {record.question.strip()}\n\nAssistant: {text}")
            tokens = ([] if bos is None else [bos]) + dialogue
            dialogues.append(TokenSequence(np.array(tokens[:chunk_length], np.int32), held_out))
            continue
        tokens = encode(" " + text if text_prefix else text)
        for begin in range(0, len(tokens), window):
            piece = tokens[begin : begin + window]
            if len(piece) >= MIN_TOKENS:
                documents.append(TokenSequence(np.array(prefix + piece, np.int32), held_out))

    order = random.Random(seed)
    for kind in (documents, dialogues):
        order.shuffle(kind)
    short, long = sorted((documents, dialogues), key=len)
    sequences = [s for pair in zip(short, long, strict=False) for s in pair] + long[len(short) :]
    sequences = sequences[:max_sequences]
    for held_out, what in ((False, "train on"), (True, "hold out")):
        if not any(s.held_out == held_out for s in sequences):
            raise OptionError(
                "held_out",
                f"with a fraction of {held_out_fraction} none of {len(sequences)} sequences is left to {what}; "
                "wanted more text, another fraction or another seed",
            )
    return sequences


def sequences_digest(sequences: list[TokenSequence]) -> str:
    """sha256 of tokens, lengths and splits, in order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{len(sequence.tokens)} {int(sequence.held_out)}\n".encode())
        digest.update(sequence.tokens.astype("<i4").tobytes())
    return digest.hexdigest()
