"""Questions with choices, from files: their own format, BIG-bench tasks, preference pairs, and plain text's last words.

A question is a row of JSONL (also gzipped), Parquet or a JSON list:

    {"context": "Q: 2 + 2 = ?\\nA:", "choices": ["3", "4"], "label": 1, "subset": "sums"}

===============  ==========================================================================================
``context``      text that the choices follow; ``question`` is another name of it
``choices``      list of two or more texts
``label``        index of the right choice from 0, or a list of several; ``answer`` is another name of it
``subset``       optional: the group of which figures are given beside the overall ones
===============  ==========================================================================================
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyalign import _checks
from pyalign._options import OptionError, not_utf8
from pyalign.evaluation.results import OVERALL
from pyalign.pair_scorer.records import (
    FORMATS,
    PAIR,
    RawRow,
    RecordOptions,
    Source,
    check_files,
    parse_row,
    read_rows,
    whole,
)

_WANTED = "context (or question), choices, label (or answer)"
_SHOWN = 20  # malformed rows that are listed
TURN = RecordOptions.turn


@dataclass(frozen=True)
class Question:
    """A context, the choices that may follow it, and which of them are right.

    Raises:
        ValueError: fewer than two choices or not as many targets; none of the choices is right, or all are.
    """

    context: str
    """Text in front of a choice, as the model reads it."""
    choices: tuple[str, ...]
    """The texts themselves, whose characters count."""
    targets: tuple[bool, ...]
    """Which of them are right."""
    subset: str | None = None
    """The group of which figures are given beside the overall ones."""
    continuations: tuple[str, ...] = ()
    """What follows the context, choice by choice. Default: the choices, joined to the context by a space where neither
    has whitespace there."""

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            _checks.refuse("choices", len(self.choices), "two or more")
        if len(self.targets) != len(self.choices):
            _checks.refuse("targets", len(self.targets), f"{len(self.choices)}, one per choice")
        if not any(self.targets) or all(self.targets):
            _checks.refuse("targets", f"{sum(self.targets)} right choices of {len(self.targets)}", "some, not all")
        if not self.continuations:
            object.__setattr__(self, "continuations", tuple(joined(self.context, choice) for choice in self.choices))
        elif len(self.continuations) != len(self.choices):
            _checks.refuse("continuations", len(self.continuations), f"{len(self.choices)}, one per choice")

    @property
    def identity(self) -> str:
        """sha256 of context and choices in hexadecimal, 16 digits: the same item in another run."""
        text = json.dumps([self.context, *self.continuations]).encode()
        return hashlib.sha256(text).hexdigest()[:16]


@dataclass(frozen=True)
class Formats:
    """How a question's text becomes the context, and a choice what follows it.

    Args:
        question: "{question}" in it is replaced by the text, for example ``"Human: {question}\\n\\nAssistant:"``. None:
            the text as it is in the file, and around a BIG-bench example what its task puts there (``task_prefix``,
            ``example_input_prefix``, the choices where ``append_choices_to_input`` asks for them, in alphabetical
            order, ``example_output_prefix``).
        choice: "{choice}" in it is replaced by the choice. None: the choice, joined by a space where neither it nor the
            context has whitespace there.

    Raises:
        ValueError: a format without its placeholder.
    """

    question: str | None = None
    choice: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("question", self.question), ("choice", self.choice)):
            if value is not None and f"{{{name}}}" not in value:
                raise OptionError(f"{name}_format", f"got {value!r}; wanted a text with {{{name}}} in it")

    def make(
        self, text: str, choices: Sequence[str], targets: Sequence[bool], subset: str | None, context: str | None = None
    ) -> Question:
        """The question ``text``; without a format its context is ``context``, if that is given."""
        if self.question is not None:
            context = self.question.replace("{question}", text)
        elif context is None:
            context = text
        after = () if self.choice is None else tuple(self.choice.replace("{choice}", choice) for choice in choices)
        return Question(context, tuple(choices), tuple(targets), subset, after)


def joined(context: str, choice: str) -> str:
    """``choice`` as it follows ``context``: behind a space, unless one of them has whitespace there."""
    apart = not context or context[-1].isspace() or choice[:1].isspace()
    return choice if apart else " " + choice


def read_multiple_choice(
    paths: str | Path | Sequence[str | Path],
    *,
    question_format: str | None = None,
    choice_format: str | None = None,
    subset: str | None = None,
) -> list[Question]:
    """Questions with choices from files: ``*.jsonl``, ``*.jsonl.gz``, ``*.parquet``, ``*.json`` (a list, or a BIG-bench
    task whose ``examples`` have ``input`` and ``target_scores``, of which those above 0 are right).

    Args:
        paths: one or more files.
        question_format, choice_format: see :class:`Formats`.
        subset: the field that holds the subset. Default: ``subset``, where a row has it; of several files, or a
            BIG-bench task, else the file's name.

    Raises:
        OptionError: a file can't be read, or rows are malformed; it lists them.
    """
    files = _paths(paths)
    formats = Formats(question_format, choice_format)
    check_files(files)
    questions: list[Question] = []
    malformed: list[str] = []
    for path in files:
        default = path.name.partition(".")[0] if len(files) > 1 else None
        for raw in read_rows([path], _Example):
            try:
                questions.append(_question(raw, formats, subset, raw.category or default))
            except ValueError as error:
                malformed.append(f"{raw.where}: {error}")
    return _checked(questions, malformed, files)


def read_pairs(
    paths: str | Path | Sequence[str | Path],
    *,
    question_format: str | None = None,
    choice_format: str | None = None,
    subset: str | None = None,
    turn: str = TURN,
) -> list[Question]:
    """Preference pairs as questions of two choices, of which the first, ``chosen``, is right.

    Rows hold ``prompt``, ``chosen``, ``rejected``; or, as hh-rlhf's do, ``chosen`` and ``rejected`` with all that they
    share up to the last common ``turn`` as the context. Files as in :func:`read_multiple_choice`.

    Raises:
        OptionError: a file can't be read; rows are malformed, or hold messages (``pyalign score`` reads conversations).
    """
    files = _paths(paths)
    formats = Formats(question_format, choice_format)
    source = Source(files, RecordOptions(category=subset, turn=turn))
    scan = source.scan()
    malformed = [str(x) for x in scan.malformed.values()]
    questions: list[Question] = []
    chunks = () if scan.kind != PAIR else source.chunks(scan, scan.records, [0])
    if scan.kind != PAIR:
        malformed.append("got rows with prompt, responses; wanted chosen and rejected")
    for _, records in chunks:
        for record in records:
            prompt, responses = record.texts
            texts = [x for x in responses if isinstance(x, str)]
            if not isinstance(prompt, str) or len(texts) != 2:
                malformed.append(f"row {record.index}: got messages; wanted texts (pyalign score reads conversations)")
                continue
            # What the file cuts apart is joined again as it was.
            formatted = formats if formats.choice is not None else Formats(formats.question, "{choice}")
            questions.append(formatted.make(prompt, texts, (True, False), _subset({}, None, record.category)))
    return _checked(questions, malformed, files)


# ---- Last words ----


@dataclass(frozen=True)
class LastWord:
    """A text without its last word, and that word: Lambada's form (Paperno et al. 2016, arXiv 1606.06031)."""

    context: str
    """Text up to the last word, without the whitespace in front of it."""
    target: str
    """That whitespace and the word."""
    subset: str | None = None

    @property
    def identity(self) -> str:
        """sha256 of the text and where it is cut, in hexadecimal, 16 digits: the same item in another run."""
        return hashlib.sha256(json.dumps([self.context, self.target]).encode()).hexdigest()[:16]


def last_word_examples(
    texts: str | Iterable[str],
    *,
    min_context_words: int = 1,
    max_context_words: int | None = None,
    separator: str | None = None,
    word: str = r"\w+(?:['\u2019-]\w+)*",
    limit: int | None = None,
    subset: str | None = None,
) -> list[LastWord]:
    """Each text as its context and its last word.

    Closing punctuation and whitespace are left out, as in Lambada, so that a text ends with its last word. The word
    follows its context in the text's own whitespace.

    Args:
        texts: one text or several.
        min_context_words: a text with fewer words in front of its last one gives no example.
        max_context_words: of a longer context the last ones are kept. None: all.
        separator: cut each text into several at this string first, blank lines (``"\\n\\n"``) for instance. None: it is
            one.
        word: regular expression of a word.
        limit: at most so many, from the first on. None: all.
        subset: of all of them.

    Raises:
        ValueError: an argument out of range.
    """
    for name, value, least in (
        ("min_context_words", min_context_words, 1),
        ("max_context_words", max_context_words, min_context_words),
        ("limit", limit, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            _checks.refuse(name, repr(value), f"an int >= {least}")
    if separator == "":
        _checks.refuse("separator", "''", "None or a text to cut at")
    found: list[LastWord] = []
    pattern = re.compile(word)
    for text in (texts,) if isinstance(texts, str) else texts:
        for piece in (text,) if separator is None else text.split(separator):
            if limit is not None and len(found) == limit:
                return found
            words = list(pattern.finditer(piece))
            if len(words) <= min_context_words:
                continue
            last = words[-1]
            context = piece[: last.start()].rstrip()
            begin = 0
            if max_context_words is not None and len(words) - 1 > max_context_words:
                begin = words[-1 - max_context_words].start()
            found.append(LastWord(context[begin:].lstrip(), piece[len(context) : last.end()], subset))
    return found


def read_last_words(
    paths: str | Path | Sequence[str | Path],
    *,
    min_context_words: int = 1,
    max_context_words: int | None = None,
    separator: str | None = None,
    limit: int | None = None,
) -> list[LastWord]:
    """:func:`last_word_examples` of files: ``*.txt`` or another plain text (whole, or cut at ``separator``), and
    ``*.jsonl`` or ``*.jsonl.gz`` with a ``text`` in each row, as Lambada comes. Of several files each is a subset.

    Raises:
        OptionError: a file can't be read, rows are malformed, or no text has a last word behind enough others.
    """
    files = _paths(paths)
    found: list[LastWord] = []
    for path in files:
        if not path.is_file():
            raise OptionError("data", f"{path} is not a file")
        found += last_word_examples(
            _texts(path),
            min_context_words=min_context_words,
            max_context_words=max_context_words,
            separator=separator,
            limit=None if limit is None else limit - len(found),
            subset=path.stem if len(files) > 1 else None,
        )
        if limit is not None and len(found) == limit:
            break
    if not found:
        names = ", ".join(map(str, files))
        wanted = f"texts whose last word stands behind {min_context_words} or more others"
        raise OptionError("data", f"{names}: got none; wanted {wanted}")
    return found


def _texts(path: Path) -> Iterator[str]:
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        yield read_plain(path)
        return
    for raw in read_rows([path], lambda task, example: example):
        try:
            row = parse_row(raw, "text")
            if not isinstance(row.get("text"), str):
                raise ValueError(f"got the fields {', '.join(map(str, row)):.80}; wanted text")
            whole("text", row["text"])
        except ValueError as error:
            raise OptionError("data", f"{raw.where}: {error}") from error
        yield row["text"]


def read_plain(path: Path) -> str:
    """The text of a file, which may be gzipped."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError("data", not_utf8(path, error)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise OptionError("data", f"{path} can't be read ({error})") from error


# ---- Rows ----


class _Example(NamedTuple):
    """A BIG-bench task and one of its examples, not yet checked."""

    task: Mapping[str, Any]
    example: Any


def _question(raw: RawRow, formats: Formats, subset: str | None, default: str | None) -> Question:
    if isinstance(raw.content, _Example):
        return _big_bench(*raw.content, formats, subset, default)
    row = parse_row(raw, _WANTED)
    text = next((row[k] for k in ("context", "question") if row.get(k) is not None), None)
    choices = row.get("choices")
    label = next((row[k] for k in ("label", "answer") if row.get(k) is not None), None)
    if text is None or choices is None or label is None:
        raise ValueError(f"got the fields {', '.join(map(str, row)) or 'none':.120}; wanted {_WANTED}")
    if not isinstance(choices, list):
        raise ValueError(f"choices: got {choices!r:.60}; wanted a list of texts")
    if not isinstance(text, str):
        raise ValueError(f"context: got {text!r:.60}; wanted a text")
    whole("context", text)
    labels: list[Any] = label if isinstance(label, list) else [label]  # pyright: ignore[reportUnknownVariableType]
    for x in labels:
        if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < len(choices):  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"label: got {x!r:.40}; wanted an index from 0 to {len(choices) - 1}, or a list of them")  # pyright: ignore[reportUnknownArgumentType]
    targets = [i in labels for i in range(len(choices))]  # pyright: ignore[reportUnknownArgumentType]
    return formats.make(text, _choices(choices), targets, _subset(row, subset, default))  # pyright: ignore[reportUnknownArgumentType]


def _big_bench(
    task: Mapping[str, Any], example: Any, formats: Formats, subset: str | None, default: str | None
) -> Question:
    scores = example.get("target_scores") if isinstance(example, Mapping) else None
    if not isinstance(scores, Mapping) or not isinstance(example.get("input"), str):
        raise ValueError("got an example without input and target_scores; wanted those of a multiple-choice task")
    whole("input", example["input"])
    for text, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise ValueError(f"target_scores: got {score!r:.40} for {text!r:.40}; wanted a number")
    choices = _choices(list(scores))
    listed = ""
    if task.get("append_choices_to_input", True):
        before = task.get("choice_prefix", "\n  choice: ")
        listed = "".join(before + choice for choice in sorted(choices))
    context = "".join(
        (
            task.get("task_prefix", ""),
            task.get("example_input_prefix", "\nQ: "),
            example["input"],
            listed,
            task.get("example_output_prefix", "\nA: "),
        )
    )
    targets = [score > 0 for score in scores.values()]
    return formats.make(example["input"], choices, targets, _subset(example, subset, default), context)  # pyright: ignore[reportUnknownArgumentType]


def _choices(values: Sequence[Any]) -> list[str]:
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value:
            raise ValueError(f"choices[{i}]: got {value!r:.60}; wanted a text")
        whole(f"choices[{i}]", value)
    if len(set(values)) < len(values):
        raise ValueError("choices: got the same text twice; wanted different ones")
    return list(values)


def _subset(row: Mapping[str, Any], field: str | None, default: str | None) -> str | None:
    value = row.get(field or "subset")
    if value is None and field is not None:
        raise ValueError(f"it has no {field!r}; wanted the subset of each row")
    name = default if value is None else str(value)
    if name == OVERALL:
        raise ValueError(f"subset: got {name!r}, which stands for all items; wanted another name")
    return name


def _paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]


def _checked(questions: list[Question], malformed: list[str], files: Sequence[Path]) -> list[Question]:
    if malformed:
        count = f"{len(malformed)} of {len(malformed) + len(questions)} rows are malformed:"
        more = [f"  and {len(malformed) - _SHOWN} more"] if len(malformed) > _SHOWN else []
        raise OptionError("data", "\n".join([count, *(f"  {x}" for x in malformed[:_SHOWN]), *more]))
    if not questions:
        raise OptionError("data", f"{', '.join(map(str, files))}: no row in it; wanted {FORMATS}")
    return questions
