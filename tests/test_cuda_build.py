"""The CUDA kernels as the compiler leaves them, checked without a GPU: they compile for every target, keep to stated
limits of registers and shared memory, spill nothing, and hold the instructions that they were written for.

The reports of an up-to-date build in ``build/native`` are read where they are; otherwise the sources are compiled here,
by default for sm_90 alone, with ``-m slow`` for every target.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_support import LIMITS, NVCC, ROOT, SOURCES, Built, compile_source, compiles_for, kernel_of, sass, up_to_date

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: the CUDA kernels can't be compiled here")

DEFAULT_TARGET = "90"
SLOW_TARGETS = ("80", "86", "89", "100", "120")
TARGETS = (DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.slow) for target in SLOW_TARGETS))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Built]]:
    @functools.cache
    def built(target: str) -> list[Built]:
        folder = tmp_path_factory.mktemp(f"sm_{target}")
        sources = [source for source in SOURCES if compiles_for(source, target)]
        # the sources that take longest first
        sources.sort(key=lambda source: not source.stem.startswith("distill"))
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda x: up_to_date(x, target) or compile_source(x, target, folder), sources))

    return built


def instructions(built: Built) -> dict[str, Counter[str]]:
    """How often each SASS opcode stands in each kernel, by symbol."""
    return {symbol: Counter(one.opcode for one in code) for symbol, code in sass(built).items()}


def count(opcodes: Counter[str], pattern: str) -> int:
    return sum(times for opcode, times in opcodes.items() if re.match(pattern, opcode))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_keep_to_their_registers_and_spill_nothing(build: Callable[[str], list[Built]], target: str) -> None:
    usages = [usage for built in build(target) for usage in built.report]
    for usage in usages:
        limit = LIMITS[usage.kernel]
        assert usage.registers <= limit.registers, usage
        assert usage.stack == 0, usage
        assert usage.spills == 0, usage
        assert usage.static_shared <= limit.static_shared, usage


@pytest.mark.parametrize("target", TARGETS)
def test_template_instances_are_as_few_as_stated(build: Callable[[str], list[Built]], target: str) -> None:
    found = Counter(usage.kernel for built in build(target) for usage in built.report)
    clusters = int(target) >= 90
    assert found == {name: limit.instances for name, limit in LIMITS.items() if clusters or "clusters" not in name}


@pytest.mark.parametrize("target", TARGETS)
def test_rows_move_in_16_bytes_and_nothing_goes_to_local_memory(
    build: Callable[[str], list[Built]], target: str
) -> None:
    loads = {"distill_rows", "logprob_rows", "topk_rows", "topk_distill_rows", "scale_rows", "reward_heads"}
    stores = {"distill_rows", "distill_clusters", "topk_distill_rows", "topk_distill_clusters", "scale_rows"}
    for built in build(target):
        if not built.report:
            continue  # host code alone
        for symbol, opcodes in instructions(built).items():
            name = kernel_of(symbol)
            assert count(opcodes, r"(LDL|STL)\b") == 0, symbol
            assert name not in loads or count(opcodes, r"LDG\.E(\.\w+)*\.128") > 0, symbol
            assert name not in stores or count(opcodes, r"STG\.E(\.\w+)*\.128") > 0, symbol


def test_clusters_use_bulk_copies_and_distributed_shared_memory(build: Callable[[str], list[Built]]) -> None:
    held = [built for built in build(DEFAULT_TARGET) if built.source.stem.endswith("_sm90")]
    assert {built.source.stem for built in held} == {"distill_sm90", "topk_distill_sm90"}
    for symbol, opcodes in (one for built in held for one in instructions(built).items()):
        assert count(opcodes, r"UBLKCP") > 0, symbol  # cp.async.bulk
        assert count(opcodes, r"SYNCS") > 0, symbol  # mbarrier
        assert count(opcodes, r"UCGABAR_ARV") > 0, symbol  # cluster barrier
        assert count(opcodes, r"ST\.E") > 0, symbol  # into other blocks' shared memory
        assert count(opcodes, r"LDS\.128") > 0, symbol
        assert count(opcodes, r"LDG\.E(\.\w+)*\.128") == 0, symbol  # rows come by copy alone


@pytest.mark.slow
def test_ptx_of_the_newest_target_compiles(tmp_path: Path) -> None:
    assert NVCC is not None
    for source in SOURCES:
        command = [NVCC, "-std=c++17", "-O3", "-DPYALIGN_HAVE_SM90", f"-I{ROOT / 'csrc'}"]
        command += [f"-gencode=arch=compute_{SLOW_TARGETS[-1]},code=compute_{SLOW_TARGETS[-1]}"]
        command += ["-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
