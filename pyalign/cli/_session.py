"""What the commands share: stages with a progress bar, and refusals in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import typer

from pyalign._files import DirectoryInUseError
from pyalign._optional import require
from pyalign._options import JobError, OptionError
from pyalign.teacher_store import StoreError


class Session:
    """Stages of a job, with progress on standard error and results on standard output."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = require("rich.console").Console
        self.console = console(stderr=True, quiet=quiet)
        self.result = console(soft_wrap=True, quiet=quiet)

    @contextmanager
    def stage(self, name: str) -> Generator[Callable[[str], None]]:
        """Yields a function that prints what the stage came to, with its time."""
        begin = time.perf_counter()
        self.console.print(f"[bold]{name}[/bold]")

        def say(text: str) -> None:
            self.result.print(f"{name} ({time.perf_counter() - begin:.0f} s): {text}", markup=False, highlight=False)

        yield say

    @contextmanager
    def bar(self, unit: str) -> Generator[tuple[Callable[[float, int], None], Callable[..., None]]]:
        """A progress bar: yields start(done, total) and advance(count, note)."""
        rich: Any = require("rich.progress")
        columns = (
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn(unit + " {task.fields[note]}"),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=None, note="")

            def start(done: float, total: int) -> None:
                progress.update(task, completed=done, total=total)

            def advance(count: float, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            yield start, advance


@contextmanager
def refusals(command: str, options: Mapping[str, str], memory: str) -> Generator[None]:
    """Turns refusals into one line and exit code 1; what is a bug keeps its traceback.

    Args:
        options: settings whose option is called otherwise.
        memory: the options that make batches smaller.
    """
    try:
        yield
    except OptionError as error:
        name = options.get(error.option, error.option).replace("_", "-")
        _refuse(command, f"--{name}: {error.problem}")
    except (StoreError, JobError, DirectoryInUseError, PermissionError, FileExistsError, NotADirectoryError) as error:
        _refuse(command, str(error))
    except torch.OutOfMemoryError as error:
        _refuse(command, f"{str(error).partition('. ')[0]}; a smaller {memory} needs less")


def _refuse(command: str, message: str) -> NoReturn:
    print(f"{command}: {message}", file=sys.stderr)
    raise typer.Exit(1) from None


def quiet_transformers() -> None:
    """Silence what transformers says while it loads."""
    logging = require("transformers").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
