"""Checks of the job's options: every refusal names the option, what was given and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any


class JobError(ValueError):
    """The job can't go on as asked; the message says why and what to do."""


class OptionError(JobError):
    """An option that can't be followed: its name, and what is the matter with it."""

    def __init__(self, option: str, problem: str):
        super().__init__(f"{option}: {problem}")
        self.option, self.problem = option, problem


def at_least(option: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise OptionError(option, f"got {value}; wanted at least {least}")


def positive(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise OptionError(option, f"got {value}; wanted a positive number")


def one_of(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise OptionError(option, f"got {value!r}; wanted one of {', '.join(choices)}")


def whole_text(option: str, text: str, where: str = "") -> None:
    """Refuse halves of characters (lone surrogates): JSON and bad bytes on a command line make them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = ascii(text[error.start : error.start + 1])
        raise OptionError(option, f"{where}got half a character ({got} at {error.start}); wanted UTF-8") from error


def read_text(option: str, path: Path) -> str:
    """The text of the file that the option names."""
    if not path.is_file():
        raise OptionError(option, f"{path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(option, not_utf8(path, error)) from error


def not_utf8(where: Path | str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where} is not UTF-8 (byte {byte:#04x} at {error.start}); wanted text in UTF-8"


def differences(found: dict[str, Any], wanted: dict[str, Any], what: str = "") -> list[str]:
    """In words, every entry of ``wanted`` that was another in ``found``."""
    return [
        f"{what}{k} was {found.get(k)!r} and is {v!r} now" for k, v in wanted.items() if k not in found or found[k] != v
    ]
