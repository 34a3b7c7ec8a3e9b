"""The yardsticks measure what they say."""

import gc
import platform
import resource
import time

import pytest
import torch

from pyalign.benchmark import copy_function, figures, interleaved, kept_memory, peak_extra_memory

CPU = torch.device("cpu")
MEGABYTES_64 = 1 << 26


def test_interleaved_calls_take_turns_and_report_their_medians():
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    times = interleaved({"slow": slow, "fast": lambda: calls.append("fast")}, CPU, rounds=3, warmup=1)
    assert calls == ["slow", "fast", *["slow", "fast"] * 3]
    assert times["slow"] >= 0.02 > times["fast"]


def test_figures_of_a_case():
    found = figures({"pyalign": 0.002, "eager": 0.006, "copy": 0.001}, moved=10**6, copy_bytes=10**6)
    wanted = {
        "GB_per_s": 0.5,
        "copy_GB_per_s": 1.0,
        "share_of_copy": 0.5,
        "pyalign_ms": 2,
        "eager_ms": 6,
        "over_eager": 3,
    }
    assert found == pytest.approx({"bytes": 10**6, **wanted})


def test_a_copy_moves_the_bytes_that_it_states():
    like = torch.empty(1000, dtype=torch.bfloat16)
    copy, bytes_moved = copy_function(like)
    copy()
    assert bytes_moved == 2 * 2 * 1000


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
@pytest.mark.usefixtures("unpoisoned")
def test_peak_memory_counts_what_a_call_gave_back_before_it_returned():
    def run() -> None:
        torch.zeros(MEGABYTES_64 // 4).add_(1)

    assert peak_extra_memory(run, CPU) == pytest.approx(MEGABYTES_64, rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.usefixtures("unpoisoned")
def test_kept_memory_needs_no_fresh_pages():
    def pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(MEGABYTES_64 // 4).zero_()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    gc.collect()
    with kept_memory(4 * MEGABYTES_64) as kept:
        assert kept
        assert min(pages() for _ in range(3)) < 100
