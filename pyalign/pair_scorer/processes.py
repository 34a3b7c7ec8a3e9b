"""The processes of one job, as torchrun starts them, on one or several machines."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pyalign._files import atomic_file
from pyalign._options import JobError

T = TypeVar("T")


class Processes:
    """This process among ``count``; by itself alone."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    def agree(self, first: Callable[[], T], description: Any) -> T:
        """What ``first`` returns on the first process, everywhere; what it raises is raised everywhere.

        Raises:
            JobError: a process has another ``description``; ``first`` failed on the first process.
        """
        if self.count == 1:
            return first()
        result: list[Any] = [None, None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                result = [first(), description, None]
            except Exception as error:  # raised again below, after the others know
                failure, result = error, [None, None, str(error)]
        dist.broadcast_object_list(result, 0)
        if failure is not None:
            raise failure
        value, wanted, problem = result
        if problem is not None:
            raise JobError(problem)
        if wanted != description:
            raise JobError(f"process {self.rank} has other data or options than process 0; wanted the same on all")
        return value

    def collect(self, directory: Path, names: Sequence[str]) -> None:
        """Wait for all processes; then ``names`` are in the first one's ``directory``, sent by those that have them.

        Machines that share the directory send nothing.

        Raises:
            JobError: no process has one of them.
        """
        if self.count == 1:
            return
        self.wait()
        wanted: list[Any] = [[name for name in names if not (directory / name).exists()]] if self.rank == 0 else [None]
        dist.broadcast_object_list(wanted, 0)
        mine = [name for name in wanted[0] if self.rank and (directory / name).exists()]
        theirs: list[Any] = [None] * self.count
        dist.all_gather_object(theirs, mine)
        for name in wanted[0]:
            owner = next((rank for rank, found in enumerate(theirs) if name in found), None)
            if owner is None:
                raise JobError(f"{name} is on no process: it was removed while the job ran")
            if self.rank == owner:
                content = torch.frombuffer(bytearray((directory / name).read_bytes()), dtype=torch.uint8)
                dist.send(torch.tensor([content.numel()]), 0)
                dist.send(content, 0)
            elif self.rank == 0:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, owner)
                content = torch.zeros(int(size), dtype=torch.uint8)
                dist.recv(content, owner)
                with atomic_file(directory / name) as temporary:
                    temporary.write_bytes(content.numpy().tobytes())

    def wait(self) -> None:
        """For all processes to come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined() -> Generator[Processes]:
    """The processes that torchrun has started with this one (by its environment variables); without it, one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    # A process may wait for another as long as the whole job takes.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
