"""Pools of gloo processes, in which the tests of more than one rank run their functions.

    def gathered(value: int) -> list[int]: ...  # at the top level of a test module; runs on every rank

    def test_every_rank_sees_all(pool: Callable[[int], Pool]):
        assert pool(2).run(gathered, 7) == [[7, 8], [7, 8]]

Workers are forked from a server that has imported torch, once per world size, and keep their process group from one
run to the next. A rank that raises, dies or doesn't answer in time is an error of the run; if others may be waiting for
it, all are ended, and the next run starts new ones.

Whole programs are started by :func:`torchrun`.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

SECONDS = 60.0  # that a run may take
_GRACE = 2.0  # seconds for the other ranks to answer, once one has failed
T = TypeVar("T")


class WorkerError(RuntimeError):
    """What went wrong on the ranks of a run, with their tracebacks."""


def _module(name: str, path: str) -> Any:
    """The test module that pytest imported under ``name``."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pickle looks for classes there
        spec.loader.exec_module(module)
    return sys.modules[name]


def _serve(connection: Connection, rank: int, size: int, store: str, stacks: str) -> None:
    """A worker: answers (name, path, function, arguments) with (ok, result or traceback) until its pool is closed."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
        )
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                break
            try:
                module, path, qualified_name, arguments = pickle.loads(request)
                function: Any = _module(module, path)
                for part in qualified_name.split("."):
                    function = getattr(function, part)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    answer = pickle.dumps((True, function(*pickle.loads(arguments))))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
        dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


class Pool:
    """``size`` processes with a gloo process group; started by the first run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor", "pyalign", "pytest"])
        self._directory = tempfile.TemporaryDirectory(prefix="pyalign-pool-")
        store = str(Path(self._directory.name, "store"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, store, self._stacks(rank))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def _stacks(self, rank: int) -> str:
        assert self._directory is not None
        return str(Path(self._directory.name, f"stack-{rank}"))

    def run(self, function: Callable[..., T], *arguments: Any, timeout: float = SECONDS) -> list[T]:
        """``function(*arguments)`` on every rank: the results by rank.

        ``function`` is at the top level of a module (or of a class there). Arguments and results are pickled.

        Raises:
            WorkerError: a rank raised (its traceback), died, or didn't answer within ``timeout`` seconds (its stack).
        """
        if not self._processes:
            self._start()
        module, path = function.__module__, inspect.getfile(function)
        request = pickle.dumps((module, path, function.__qualname__, pickle.dumps(arguments)))
        for connection in self._connections:
            connection.send_bytes(request)
        results, errors = self._collect(time.monotonic() + timeout)
        missing = [rank for rank in range(self.size) if rank not in results and rank not in errors]
        if missing:
            failed = bool(errors)
            for rank in missing:
                reason = "was waiting when another rank had failed" if failed else f"gave no answer in {timeout:g} s"
                errors[rank] = f"{reason}\n{self._stack(rank)}"
            self.close(grace=0.0)
        elif any(not process.is_alive() for process in self._processes):
            self.close()
        if errors:
            where = f"{module}.{function.__qualname__} on {self.size} ranks"
            raise WorkerError("\n".join([where, *(f"rank {rank}: {errors[rank]}" for rank in sorted(errors))]))
        return [results[rank] for rank in range(self.size)]

    def _collect(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        """What the ranks answered, and how they failed; those in neither didn't answer."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(_GRACE)
                    ok, value = False, f"died, exit code {self._processes[rank].exitcode}"
                if ok:
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return results, errors

    def _stack(self, rank: int) -> str:
        """Where a rank is that doesn't answer."""
        process = self._processes[rank]
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return Path(self._stacks(rank)).read_text()

    def close(self, grace: float = _GRACE) -> None:
        """Ends the workers: those that wait for a run by themselves, the others, after ``grace`` seconds, by force."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(grace)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._connections, self._processes, self._directory = [], [], None


class Pools:
    """A :class:`Pool` for every world size asked for: the fixture ``pool`` of conftest.py."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        return self._pools.setdefault(size, Pool(size))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def torchrun(script: Path, *arguments: object, size: int, timeout: float = 300.0, **environment: str) -> str:
    """What ``size`` processes of ``script`` print, each with one thread and ``environment`` added to its own."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"),
        *(Path(__file__).with_name("torchrun_main.py"), script, *arguments),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [str(part) for part in command], env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
