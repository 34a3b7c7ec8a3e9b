"""Files that are whole or absent, whenever the process dies, and directories with one writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file or a directory entry."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # One writer per directory (see exclusive), so one name is enough and a leftover is simply overwritten.
    return path.with_name(path.name + ".tmp")


def _usual_mode(path: Path) -> int:
    """The permissions that the process's umask gives a new file, by making ``path`` one."""
    path.unlink(missing_ok=True)
    path.touch()
    return path.stat().st_mode & 0o777


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield a temporary path to write to; on leaving, it is synced and renamed to ``path`` in one move."""
    temporary = _temporary(path)
    mode = _usual_mode(temporary)
    yield temporary
    temporary.chmod(mode)  # safetensors makes files that their owner alone can read
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """As ``atomic_file``, for a directory of files that must not exist yet."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    mode = _usual_mode(temporary / ".mode")
    (temporary / ".mode").unlink()
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(mode)
        sync(file)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class DirectoryInUseError(RuntimeError):
    """Another process is writing to the directory."""


@contextmanager
def exclusive(directory: Path) -> Generator[None]:
    """Hold ``directory`` (made if need be) for writing; a process that dies in any way lets go of it."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUseError(
                f"{directory} is being written by another process; wait for it or stop it"
            ) from None
        yield
