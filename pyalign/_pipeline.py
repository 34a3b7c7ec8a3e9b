"""The order in which chunks take their three steps: in turn, or a chunk's row loss beside the next one's products.

    in turn      products 0, loss 0, gradients 0, products 1, loss 1, gradients 1, ...

    overlapped   products 0, products 1, gradients 0, products 2, gradients 1, ...     on the current stream
                             loss 0,     loss 1,                  loss 2, ...          on a stream beside it

A loss waits for all that is queued before it, and a chunk's gradients wait for its loss. A chunk has the buffers of the
one before the last: its products overwrite them behind that one's gradients, which have waited for the loss that read
them. So two sets of buffers do, sums over chunks keep their order, and once the last gradients are queued nothing runs
beside the current stream any more. Streams wait for events and the host for nothing: a CUDA graph captures it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch


class Chunk(Protocol):
    """Holds on to the tensors that its steps share: freed memory is reused in the order of the current stream alone."""

    def products(self) -> None: ...
    def row_loss(self) -> None: ...
    def gradients(self) -> None: ...


class Beside(Protocol):
    """Where row losses run."""

    def start(self, work: Callable[[], None]) -> Any:
        """Queues ``work`` behind what the current stream holds by now; gives what ``wait`` takes."""
        ...

    def wait(self, started: Any) -> None:
        """What the current stream is given from now on comes after that work."""
        ...

    def join(self) -> None:
        """The same for all work."""
        ...


class Inline:
    """No streams: at once."""

    def start(self, work: Callable[[], None]) -> None:
        work()

    def wait(self, started: None) -> None:
        pass

    def join(self) -> None:
        pass


class SideStream:
    def __init__(self, current: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
        self._current, self._side = current, side

    def start(self, work: Callable[[], None]) -> torch.cuda.Event:
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record(self._current)
        self._side.wait_event(ready)
        with torch.cuda.stream(self._side):
            work()
        done.record(self._side)
        return done

    def wait(self, started: torch.cuda.Event) -> None:
        self._current.wait_event(started)

    def join(self) -> None:
        self._current.wait_stream(self._side)


@functools.cache
def _side_of(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """Each stream has its own: a graph that captures one must not meet another thread's work."""
    return torch.cuda.Stream(current.device)


def beside(device: torch.device) -> Beside:
    """The current stream's neighbour on a GPU."""
    if device.type != "cuda":
        return Inline()
    current = torch.cuda.current_stream(device)
    return SideStream(current, _side_of(current))


def in_turn(chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        chunk.products()
        chunk.row_loss()
        chunk.gradients()


def overlapped(chunks: Iterable[Chunk], where: Beside) -> None:
    """Chunk i and chunk i + 2 may have the same buffers."""
    before: tuple[Chunk, Any] | None = None

    def finish(chunk: Chunk, started: Any) -> None:
        where.wait(started)
        chunk.gradients()

    try:
        for chunk in chunks:
            chunk.products()
            started = where.start(chunk.row_loss)
            if before is not None:
                finish(*before)
            before = chunk, started
        if before is not None:
            finish(*before)
    except BaseException:
        where.join()  # the buffers are about to be freed
        raise
