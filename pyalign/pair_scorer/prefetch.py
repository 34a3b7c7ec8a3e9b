"""Work prepared in a background thread, a few items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T], ahead: int) -> Generator[T]:
    """``items``, at most ``ahead`` of them made before they are asked for; what making them raises is raised here."""
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:  # raised where the items are asked for
            put(error)

    thread = threading.Thread(target=work, name="pyalign-prefetch", daemon=True)
    thread.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        stopped.set()
        thread.join()
