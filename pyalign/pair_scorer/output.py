"""The output of a job: a file of rows that is whole or absent, with its summary, and one writer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyalign._files import exclusive, write_text
from pyalign._optional import require
from pyalign._options import JobError, OptionError, differences


class Output:
    """Settings of a job that writes a file of rows, with what stands beside it."""

    out: Path
    overwrite: bool

    def check_out(self) -> None:
        """Refuse a name that is no file of rows.

        Raises:
            OptionError: naming it.
        """
        if self.out.suffix not in (".jsonl", ".parquet"):
            raise OptionError("out", f"got {self.out}; wanted a name that ends in .jsonl or .parquet")
        if self.out.is_dir():
            raise OptionError("out", f"{self.out} is a directory; wanted a file")

    @property
    def parts(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    @property
    def summary(self) -> Path:
        return self.out.with_name(self.out.name + ".summary.json")


def begin(settings: Output, description: dict[str, Any], stack: ExitStack) -> bool:
    """Take hold of the output; whether it is finished already.

    Raises:
        OptionError, JobError: it is that of another job, or is being written.
    """
    out, parts = settings.out, settings.parts
    if settings.overwrite:
        stack.enter_context(exclusive(parts))
        for path in (settings.summary, out):
            path.unlink(missing_ok=True)
        for path in parts.glob("*"):
            if path.name != ".lock":
                path.unlink()
    elif settings.summary.exists() and out.exists():
        _check_same(json.loads(settings.summary.read_text(encoding="utf-8"))["job"], description, out)
        return True
    elif out.exists() and not (parts / "job.json").exists():
        raise OptionError("out", f"{out} exists and is not of this job; wanted another name, or --overwrite")
    else:
        stack.enter_context(exclusive(parts))
    job = parts / "job.json"
    if job.exists():
        _check_same(json.loads(job.read_text(encoding="utf-8")), description, out)
    else:
        write_text(job, json.dumps(description, indent=2) + "\n")
    return False


def _check_same(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    changed = differences(found, wanted)
    if changed:
        raise JobError(
            f"{out} is of a job with other settings: {'; '.join(changed)}. Give another --out, or --overwrite"
        )


def read_output(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a finished output."""
    if path.suffix == ".parquet":
        for batch in require("pyarrow.parquet").ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
