"""The yardsticks: times of calls that take turns, memory, and the machine's copy bandwidth and rate of products.

Ratios mean something on a noisy machine, absolute times little: so whatever is compared takes turns, and bandwidth is
given as a share of the copy bandwidth measured between the same turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call, to the end of the work that it starts on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, *, rounds: int = 7, warmup: int = 2
) -> dict[str, float]:
    """The median time in seconds of each function, over rounds in which every one of them has its turn."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def kept_memory(size: int) -> Generator[bool]:
    """Within it, ``size`` bytes stay with the process when they are freed, as a GPU's caching allocator keeps them.

    The C library hands large blocks back to the system at once, and a fresh page costs more than the work on it: on a
    CPU, every tensor expression would be timed by its allocations. Yields whether it works here: glibc is needed.
    Afterwards the C library may go on reusing what it kept: whatever needs fresh memory is to be measured before.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield False
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    mmap_max, trim_threshold = -4, -1  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    block = libc.malloc(size)
    ctypes.memset(block, 0, size)
    libc.free(block)
    try:
        yield True
    finally:
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.malloc_trim(0)


def copy_function(like: torch.Tensor) -> tuple[Callable[[], object], int]:
    """A copy of ``like`` into memory that is in use already, and the bytes that it reads and writes."""
    source, target = torch.randn_like(like), torch.zeros_like(like)
    return (lambda: target.copy_(source)), 2 * like.numel() * like.element_size()


def product_function(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], int]:
    """A bare matrix product (rows, inner) @ (inner, columns) into memory that is in use already, and its FLOPs."""
    left, right = (
        torch.randn(rows, inner, device=device).to(dtype),
        torch.randn(columns, inner, device=device).to(dtype),
    )
    result = torch.zeros(rows, columns, dtype=dtype, device=device)
    return (lambda: torch.mm(left, right.t(), out=result)), 2 * rows * inner * columns


def figures(times: Mapping[str, float], moved: int, copy_bytes: int) -> dict[str, float]:
    """What a case reports of the ``times`` of competitors, ours the first, and of a "copy" of ``copy_bytes``.

    The bytes that the work must move, what ours moves and the copy in GB/s, and the share that it is of the copy's;
    everybody's milliseconds, and how many times ours the others take.
    """
    ours = next(iter(times))
    rate, copy_rate = moved / times[ours] / 1e9, copy_bytes / times["copy"] / 1e9
    found = {"bytes": moved, "GB_per_s": rate, "copy_GB_per_s": copy_rate, "share_of_copy": rate / copy_rate}
    for name, time_taken in times.items():
        if name != "copy":
            found[f"{name}_ms"] = time_taken * 1e3
        if name not in ("copy", ours):
            found[f"over_{name}"] = time_taken / times[ours]
    return found


def peak_extra_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its peak beyond what was held before it: the allocator's on a GPU, else resident.

    Raises:
        OSError: the system tells no peak of the resident set (Linux does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)  # the kernel counts pages by thread, and adds them up late


def _give_back() -> None:
    """Free memory that the C library keeps goes back to the system: a call that reused it would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
