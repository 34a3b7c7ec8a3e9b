"""Registers, shared memory, occupancy and SASS of the GPU kernels, compared with committed baselines; needs no GPU.

The objects that ``build/native`` holds are read (``PYALIGN_CUDA=1 PYALIGN_CUDA_ARCHS= make build`` compiles every
target); Triton's kernels are compiled here for sm_80, sm_90 and gfx942. Run as a program, this file rewrites the
baselines and prints what changed:

    python tests/test_budgets_gpu.py [cuda] [triton]
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from budgets_support import check, rewrite, section_of
from cuda_support import (
    LIMITS,
    NVCC,
    SOURCES,
    Built,
    Instruction,
    compiles_for,
    parse_sass,
    sass,
    up_to_date,
)
from gpu_limits import LIMITS_OF, blocks_per_processor

TARGETS = ("80", "86", "89", "90", "100", "120")
TRITON_TARGETS = ("sm_80", "sm_90", "gfx942")
COMMAND = "python tests/test_budgets_gpu.py"
ROWS = {
    "distill_rows", "distill_clusters", "logprob_rows", "topk_rows", "topk_distill_rows", "topk_distill_clusters",
    "scale_rows",
}  # fmt: skip

pytestmark = pytest.mark.budgets


# ---- CUDA ----


def made_with() -> dict[str, str]:
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    return {"nvcc": re.findall(r"V([\d.]+)", version)[0]}


@functools.cache
def readable(symbol: str) -> str:
    """Such as ``distill_rows<bfloat16, bfloat16, ForwardKL>``."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void |\(anonymous namespace\)::|pyalign::(cuda::|generic::)?|__nv_", "", name)
    name = re.sub(r"<float, true>", "", name.replace("__half", "float16").replace(" >", ">"))
    name = re.sub(r"\((\w*::)?GroupOp\)", "op ", name)
    depth = 0
    for i, letter in enumerate(name):  # up to the parameters
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def innermost_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The loops that hold no other: from a branch's target to the branch that goes back there."""
    loops: set[tuple[int, int]] = set()
    for one in code:
        target = re.search(r"\b0x([0-9a-f]+)\b", one.operands)
        if one.opcode.startswith("BRA") and target and int(target[1], 16) < one.address:
            loops.add((int(target[1], 16), one.address))
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [[one for one in code if begin <= one.address <= end] for begin, end in sorted(inner)]


def holds(code: Sequence[Instruction], pattern: str) -> int:
    return sum(bool(re.match(pattern, one.opcode)) for one in code)


def hot_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Innermost loops with 16-byte loads or, where there are none, with loads of global memory."""
    loops = innermost_loops(code)
    wide = [loop for loop in loops if holds(loop, r"(LDG|LDS)\b.*\.128")]
    return wide or [loop for loop in loops if holds(loop, r"LDG\b")]


def unrolled_passes(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Outside of the innermost loops, from 16 bytes of shared memory to where what they held was used: the vectors that
    a thread keeps numbers of."""
    loops = {one.address for loop in innermost_loops(code) for one in loop}
    found: list[list[Instruction]] = []
    open_pass: list[Instruction] = []
    for one in code:
        if one.address in loops:
            open_pass = []
        elif open_pass or re.match(r"LDS\b.*\.128", one.opcode):
            open_pass.append(one)
            if holds(open_pass, "MUFU") and re.match(r"BSYNC|BRA|STG.*\.128", one.opcode):
                found.append(open_pass)
                open_pass = []
    return found


def way_round(loop: Sequence[Instruction]) -> int:
    """The fewest instructions of a round that takes all its exponentials or, without any, all its maxima: one that
    skips what a row's target, its alignment or a candidate would need."""
    place = {one.address: i for i, one in enumerate(loop)}
    stops = [i for i, one in enumerate(loop) if one.opcode.startswith("MUFU.EX2")]
    stops = stops or [i for i, one in enumerate(loop) if re.match(r"V?[FH]MNMX", one.opcode)]
    total = 1
    for begin, end in itertools.pairwise([0, *stops, len(loop) - 1]):
        steps = {begin: 0}
        for i in range(begin, end):
            if i not in steps:
                continue
            target = re.search(r"\b0x([0-9a-f]+)\b", loop[i].operands)
            jumps = loop[i].opcode.startswith("BRA") and target is not None
            stays = not jumps or bool(loop[i].guard) or ".DIV" in loop[i].opcode or "P" in loop[i].operands
            ahead = [i + 1] if stays else []
            if jumps and target and place.get(int(target[1], 16), -1) > i:
                ahead.append(place[int(target[1], 16)])
            for to in ahead:
                steps[to] = min(steps.get(to, len(loop)), steps[i] + 1)
        if end not in steps:  # exponentials that exclude each other
            return len(loop)
        total += steps[end]
    return total


def figures(built: Built) -> dict[str, dict[str, Any]]:
    """By readable name, of the kernels of one object."""
    if not built.report:
        return {}
    code_of = sass(built)
    found: dict[str, dict[str, Any]] = {}
    for usage in built.report:
        code, limit = code_of[usage.symbol], LIMITS[usage.kernel]
        shared = usage.static_shared + limit.dynamic_shared
        found[readable(usage.symbol)] = {
            "registers": usage.registers,
            "spills": usage.spills,
            "shared": shared,
            "blocks per processor": blocks_per_processor(
                LIMITS_OF[built.target], limit.threads, usage.registers, shared
            ),
            "instructions": sum(one.opcode != "NOP" for one in code),
            "16-byte loads": holds(code, r"(LDG|LDS)\b.*\.128|UBLKCP"),
            "16-byte stores": holds(code, r"STG\b.*\.128"),
            "local memory": holds(code, r"(LDL|STL)\b"),
            "double arithmetic": holds(code, r"D(ADD|MUL|FMA|SETP)\b"),
            "matrix products": holds(code, r"([HWU]GMMA|UTC\w*MMA|[DHIQ]MMA)\b"),
            "hot loops": [len(loop) for loop in hot_loops(code)],
            "ways round": [way_round(loop) for loop in hot_loops(code)],
            "exponentials": [holds(loop, r"MUFU\.EX2") for loop in hot_loops(code)],
            "special functions": [holds(loop, "MUFU") for loop in hot_loops(code)],
        }
        if usage.kernel == "distill_clusters":
            passes = unrolled_passes(code)
            found[readable(usage.symbol)] |= {
                "unrolled passes": [len(one) for one in passes],
                "unrolled special functions": [holds(one, "MUFU") for one in passes],
            }
    return found


def objects(target: str) -> list[Built]:
    """Those of the build, or the test is skipped."""
    if NVCC is None:
        pytest.skip("no nvcc: the CUDA kernels can't be compiled here")
    sources = [source for source in SOURCES if compiles_for(source, target)]
    found = [up_to_date(source, target) for source in sources]
    if missing := [x.stem for x, built in zip(sources, found, strict=True) if built is None]:
        wanted = "PYALIGN_CUDA=1 PYALIGN_CUDA_ARCHS= make build"
        pytest.skip(f"build/native has no objects of sm_{target} for {', '.join(missing)}: {wanted}")
    return [built for built in found if built is not None]


@functools.cache
def cuda_figures(target: str) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(figures, objects(target)))
    found = {name: entry for part in parts for name, entry in part.items()}
    assert len(found) == sum(map(len, parts)), "two kernels of one name"
    return dict(sorted(found.items()))


@pytest.mark.parametrize("target", TARGETS)
def test_cuda_kernels_keep_to_their_budgets(target: str):
    check(cuda_figures(target), section_of("cuda", target, made_with()), f"{COMMAND} cuda")


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_fit_as_the_kernels_say(target: str):
    """__launch_bounds__ and the launches count on it."""
    for name, entry in cuda_figures(target).items():
        limit, device = LIMITS[name.split("<")[0]], LIMITS_OF[target]
        possible = min(limit.blocks, device.warps * 32 // limit.threads)
        assert entry["blocks per processor"] >= possible, name


@pytest.mark.parametrize("target", TARGETS)
def test_row_kernels_move_16_bytes_take_exponentials_from_hardware_and_do_no_double_arithmetic(target: str):
    """Double precision runs at half of float32's rate on sm_80, 90 and 100, at 1/64 on the others. Matrix products are
    the vendor library's: where a kernel of ours multiplies, its instructions are to be looked after here."""
    for name, entry in cuda_figures(target).items():
        assert entry["local memory"] == entry["spills"] == entry["matrix products"] == 0, name
        kernel = name.split("<")[0]
        if kernel not in ROWS:
            continue
        assert entry["double arithmetic"] == 0, name
        assert entry["16-byte loads"] > 0, name
        assert kernel == "topk_rows" or entry["16-byte stores"] > 0, name
        assert kernel == "scale_rows" or sum(entry["exponentials"]) > 0, name


@pytest.mark.parametrize(
    ("divergence", "loops", "unrolled", "most"),
    [
        ("ForwardKL", {"fold": (1, 8, 2 * 8 + 2), "map": (9, 8, 2 * 8)}, {}, 210),
        ("ReverseKL", {"fold": (1, 8, 2 * 8 + 2), "map": (9, 8, 8)}, {}, 210),
        ("TotalVariation", {"fold": (1, 8, 2 * 8 + 2)}, {"sum": (0, 2 * 8), "map": (8, 8)}, 310),
        ("JensenShannon", {"fold": (1, 8, 2 * 8 + 2)}, {"sum": (0, 3 * 8), "map": (8, 8)}, 370),
    ],
)
def test_a_row_far_from_its_teacher_costs_so_many_instructions(
    divergence: str, loops: dict[str, tuple[int, int, int]], unrolled: dict[str, tuple[int, int]], most: int
):
    """Per 8 pairs of bfloat16 in aligned rows without targets, over all passes. A pass is given by its loop, the pairs
    of a round, and its special functions (the fold's are of both rows, and a rescaling each), or by the first of its
    unrolled vectors: where the map needs sums first, it finds the pulls in registers and takes one exponential a pair.
    """
    entry = cuda_figures("90")[f"distill_clusters<bfloat16, bfloat16, {divergence}>"]
    for name, (loop, _, special) in loops.items():
        assert entry["special functions"][loop] == special, name
    for name, (first, special) in unrolled.items():
        assert entry["unrolled special functions"][first : first + 4] == [special] * 4, name
    by_loops = sum(entry["hot loops"][loop] * 8 / pairs for loop, pairs, _ in loops.values())
    assert by_loops + sum(max(entry["unrolled passes"][first : first + 4]) for first, _ in unrolled.values()) <= most


# ---- Triton ----


def triton_made_with() -> dict[str, str]:
    return {"triton": importlib.metadata.version("triton")}


@functools.cache
def triton_figures() -> dict[str, dict[str, Any]]:
    """What test_triton_aot compiles, by target, then case and kernel; in a process of its own, without the
    interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("test_triton_aot.py")
    process = subprocess.run([sys.executable, str(program), "code"], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    sections: dict[str, dict[str, Any]] = {target: {} for target in TRITON_TARGETS}
    for one in json.loads(process.stdout):
        more: dict[str, Any] = {}
        if one["sass"]:
            limits = LIMITS_OF[one["target"].removeprefix("sm_")]
            blocks = blocks_per_processor(limits, one["warps"] * 32, one["registers"], one["shared"])
            (kernel,) = parse_sass(one["sass"]).values()
            more = {"blocks per processor": blocks, "hot loops": [len(loop) for loop in hot_loops(kernel)]}
        sections[one["target"]][f"{one['case']}: {one['kernel']}"] = {
            "registers": one["registers"],
            "spills": one["spilled"],
            "shared": one["shared"],
            "instructions": one["instructions"],
            "16-byte loads": one["wide ld"],
            "16-byte stores": one["wide st"],
            **more,
        }
    return sections


@pytest.mark.parametrize("target", TRITON_TARGETS)
def test_triton_kernels_keep_to_their_budgets(target: str):
    pytest.importorskip("triton")
    check(triton_figures()[target], section_of("triton", target, triton_made_with()), f"{COMMAND} triton")


def test_no_triton_kernel_multiplies_matrices():
    """Were there one, its instructions (HGMMA on sm_90) and their rate would have to be looked after here."""
    sources = Path(__file__).resolve().parents[1] / "kernels"
    assert [path.name for path in sources.glob("*.py") if "tl.dot" in path.read_text()] == []


# ---- Limits ----


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # 64 warps of 8 a block
        (1024, 64, 0, 1),  # all registers
        (256, 65, 0, 3),  # 72 registers a thread are taken: 28 warps, by 4
        (256, 32, 100_000, 2),
        (32, 16, 0, 32),  # the limit of blocks
    ],
)
def test_occupancy_on_hopper(threads: int, registers: int, shared: int, blocks: int):
    assert blocks_per_processor(LIMITS_OF["90"], threads, registers, shared) == blocks


def main() -> None:
    wanted = sys.argv[1:] or ["cuda", "triton"]
    try:
        if "cuda" in wanted:
            rewrite("cuda", made_with(), {target: cuda_figures(target) for target in TARGETS})
        if "triton" in wanted:
            rewrite("triton", triton_made_with(), triton_figures())
    except pytest.skip.Exception as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
