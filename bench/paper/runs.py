"""Units of work: a training run each, kept as a JSON file under its configuration's key, so that a killed run goes on.

Tiny models gain nothing from a second thread: units run in worker processes of one thread each, which also gives the
same bits on every number of cores.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalign._files import atomic_file, write_text
from pyalign._optional import require


@dataclasses.dataclass(frozen=True)
class Unit:
    """One training run.

    ``config`` is JSON that settles the result, seed, sizes and device included. Units of one ``group`` run one after
    the other. ``seconds`` is what one is expected to take on one core, ``label`` what the progress bar calls it.
    """

    experiment: str
    config: Mapping[str, Any]
    label: str
    group: str
    seconds: float

    @property
    def key(self) -> str:
        return key_of(self.experiment, self.config)


def key_of(kind: str, config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([kind, config], sort_keys=True).encode()).hexdigest()[:24]


class Store:
    """Results and trained states under a directory; files are whole or absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("units", "states"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def result(self, unit: Unit) -> dict[str, Any] | None:
        """What the unit's run returned, None if it hasn't been finished."""
        path = self._path(unit)
        return json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else None

    def seconds(self, unit: Unit) -> float:
        """How long a finished unit took."""
        return json.loads(self._path(unit).read_text(encoding="utf-8"))["seconds"]

    def _path(self, unit: Unit) -> Path:
        return self.directory / "units" / f"{unit.key}.json"

    def keep(self, unit: Unit, result: Mapping[str, Any], seconds: float) -> None:
        whole = {"experiment": unit.experiment, "config": unit.config, "seconds": round(seconds, 2), "result": result}
        write_text(self._path(unit), json.dumps(whole, indent=1, sort_keys=True) + "\n")

    def state(
        self, kind: str, config: Mapping[str, Any], train: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors that ``train`` returned for this configuration, now or before; another worker that is training
        them is waited for."""
        path = self.directory / "states" / f"{key_of(kind, config)}.pt"
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                state = {name: x.detach().cpu() for name, x in train().items()}
                with atomic_file(path) as temporary:
                    torch.save(state, temporary)
        return torch.load(path, weights_only=True)


def run_unit(unit: Unit, directory: Path) -> None:
    """Runs a unit and keeps what it returns."""
    from bench.paper.experiment import find

    store = Store(directory)
    begin = time.perf_counter()
    result = find(unit.experiment).run(unit, store)
    store.keep(unit, result, time.perf_counter() - begin)


def set_up_process() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # a GPU's TF32; a CPU knows no such thing


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: what runs is finished and kept
    set_up_process()


def missing(units: Sequence[Unit], store: Store) -> list[Unit]:
    return [unit for unit in units if store.result(unit) is None]


def estimate(units: Sequence[Unit], workers: int) -> float:
    """Expected seconds: no shorter than the longest group, which one worker takes."""
    groups: dict[str, float] = {}
    for unit in units:
        groups[unit.group] = groups.get(unit.group, 0.0) + unit.seconds
    return max(sum(groups.values()) / workers, max(groups.values(), default=0.0))


def run_all(units: Sequence[Unit], store: Store, workers: int, console: Any = None) -> None:
    """Runs what isn't finished, in ``workers`` processes, or in this one for 0, with a progress bar on ``console``."""
    todo = missing(units, store)
    rich: Any = require("rich.progress", extra="bench")
    columns = (
        rich.BarColumn(), rich.TextColumn("{task.fields[done]}/{task.fields[units]} runs"), rich.TimeElapsedColumn(),
        rich.TextColumn("left:"), rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with rich.Progress(*columns, console=console, disable=console is None) as progress:
        total = sum(unit.seconds for unit in todo)
        task = progress.add_task("", total=total, done=len(units) - len(todo), units=len(units), note="")
        done = len(units) - len(todo)

        def finished(unit: Unit) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=unit.seconds, done=done, note=unit.label)

        if workers == 0:
            for unit in todo:
                run_unit(unit, store.directory)
                finished(unit)
        else:
            _run_in_processes(todo, store.directory, workers, finished)


def _run_in_processes(
    todo: Sequence[Unit], directory: Path, workers: int, finished: Callable[[Unit], None]
) -> None:  # fmt: skip
    groups: dict[str, list[Unit]] = {}
    for unit in todo:
        groups.setdefault(unit.group, []).append(unit)
    # The longest first, so that none is left for the end alone.
    queues = sorted(groups.values(), key=lambda queue: -sum(unit.seconds for unit in queue))
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    running: dict[concurrent.futures.Future[None], list[Unit]] = {}

    def submit(queue: list[Unit]) -> None:
        running[pool.submit(run_unit, queue[0], directory)] = queue

    try:
        for queue in queues[:workers]:
            submit(queue)
        waiting = queues[workers:]
        while running:
            ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                queue = running.pop(future)
                future.result()
                finished(queue[0])
                if len(queue) > 1:
                    submit(queue[1:])
                elif waiting:
                    submit(waiting.pop(0))
    finally:
        pool.shutdown(cancel_futures=True)
