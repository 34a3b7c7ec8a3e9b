"""Logs of a job, one JSON object a line: whole lines only, whenever their writer is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyalign._files import write_text


class Log:
    """A log that grows by synced lines; on opening, what a killed writer left half-written is removed.

    Args:
        path: the file, made if need be.
        keep: which of the entries that are there still hold; the others are removed.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda entry: True):
        self._path = path
        self.entries = [entry for entry in read_log(path) if keep(entry)]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, none if there is no file; the last may be cut where the writer was killed."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
