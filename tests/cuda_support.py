"""The CUDA kernels as the compiler leaves them: its reports, and the SASS of its objects."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


class Limit(NamedTuple):
    """What a kernel may use: 65,536 registers a multiprocessor are shared by ``threads`` x ``blocks`` threads."""

    instances: int
    threads: int
    blocks: int
    static_shared: int = 0  # bytes
    # Bytes asked for at launch where that number is fixed; else runtime.cu and clusters.cu plan (test_cluster_plan).
    dynamic_shared: int = 0

    @property
    def registers(self) -> int:
        return min(65536 // (self.threads * self.blocks), 255)


def asserted(file: str, name: str) -> int:
    """A constant of a file of ``csrc/cuda``, as its compiler was made to agree."""
    source = (ROOT / "csrc" / "cuda" / file).read_text()
    (value,) = re.findall(rf"static_assert\({re.escape(name)} == (\d+)\)", source)
    return int(value)


TYPES, DIVERGENCES = 3, 4
GRADIENTS = TYPES + 2  # of logits and gradient: the same or, for float32 logits, one of 16 bits
LIMITS = {
    "distill_rows": Limit(GRADIENTS * DIVERGENCES, threads=512, blocks=1),
    "distill_clusters": Limit(GRADIENTS * DIVERGENCES, threads=256, blocks=2),
    "topk_rows": Limit(TYPES, threads=512, blocks=2, dynamic_shared=asserted("topk.cu", "kMostShared")),
    "topk_distill_rows": Limit(GRADIENTS, threads=512, blocks=1),
    "topk_distill_clusters": Limit(GRADIENTS, threads=256, blocks=2),
    "logprob_rows": Limit(2 * GRADIENTS, threads=1024, blocks=1),
    "scale_rows": Limit(TYPES, threads=256, blocks=4),
    "pair_items": Limit(TYPES, threads=512, blocks=2, static_shared=320),
    "rank_pairs": Limit(2 * TYPES, threads=256, blocks=5, static_shared=320),
    "rank_stages": Limit(TYPES, threads=256, blocks=3, static_shared=1024),
    "scale_scores": Limit(TYPES, threads=256, blocks=8),
    "reward_heads": Limit(TYPES, threads=256, blocks=4, static_shared=512),
    "reward_rows": Limit(TYPES, threads=256, blocks=4),
    "reward_columns": Limit(TYPES, threads=256, blocks=4, static_shared=2048),
    "reward_bias": Limit(1, threads=256, blocks=4, static_shared=256),
    "win_matrix": Limit(TYPES, threads=256, blocks=4),
    "win_sums": Limit(3 * TYPES, threads=256, blocks=4),  # rates, their gradient, the matrix's
    "best_scores": Limit(TYPES, threads=256, blocks=4),
    "pair_metrics": Limit(TYPES, threads=256, blocks=4, static_shared=24576),
    "count_tokens": Limit(1, threads=1024, blocks=1, static_shared=256),
    "sum_losses": Limit(1, threads=1024, blocks=1, static_shared=256),
}


class Usage(NamedTuple):
    """One kernel's line of the report of ``ptxas -v``."""

    kernel: str
    symbol: str
    registers: int
    stack: int
    spills: int
    static_shared: int


class Built(NamedTuple):
    """One source compiled: where the object is, and what ptxas said of the target."""

    source: Path
    target: str
    object: Path
    report: list[Usage]


def kernel_of(symbol: str) -> str:
    """The function's name: the last of a mangled symbol's length-prefixed names that we know."""
    return next((name for name in LIMITS if re.search(rf"\d{name}[IE]", symbol)), symbol)


def parse(report: str, target: str) -> list[Usage]:
    found = re.finditer(
        rf"entry function '(\S+)' for 'sm_{target}'\n"
        r"(?:.*Function properties.*\n)?"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(.*)\n",
        report,
    )
    usages: list[Usage] = []
    for symbol, stack, stores, loads, registers, rest in (match.groups() for match in found):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        static = int(shared[1]) if shared else 0
        usages.append(Usage(kernel_of(symbol), symbol, int(registers), int(stack), spills, static))
    return usages


def compiles_for(source: Path, target: str) -> bool:
    return int(target) >= 90 or not source.stem.endswith("_sm90")


def up_to_date(source: Path, target: str) -> Built | None:
    """The build's own object and report, if they are newer than all they were made of and hold the target."""
    made = ROOT / "build" / "native" / source.relative_to(ROOT)
    compiled, log = made.with_suffix(".cu.o"), made.with_suffix(".ptxas.log")
    if not (compiled.exists() and log.exists()):
        return None
    inputs = [source, *(ROOT / "csrc").glob("common/*.h"), *(ROOT / "csrc").glob("cuda/*.*h")]
    if min(compiled.stat().st_mtime, log.stat().st_mtime) < max(path.stat().st_mtime for path in inputs):
        return None
    text = log.read_text()
    if "Compiling entry function" in text and f"for 'sm_{target}'" not in text:
        return None
    return Built(source, target, compiled, parse(text, target))


def compile_source(source: Path, target: str, folder: Path) -> Built:
    compiled = folder / f"{source.stem}.{target}.o"
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "-DPYALIGN_HAVE_SM90", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-fPIC,-Wall", f"-gencode=arch=compute_{target},code=sm_{target}"]
    command += ["-c", str(source), "-o", str(compiled)]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{' '.join(command)}\n{output}"
    assert "warning" not in output, output
    return Built(source, target, compiled, parse(output, target))


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    guard: str = ""  # @!P0: it may not run


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by symbol."""
    kernels: dict[str, list[Instruction]] = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", part)
        kernels[part.split("\n", 1)[0].strip()] = [
            Instruction(int(at, 16), opcode, operands, guard.strip()) for at, guard, opcode, operands in found
        ]
    return kernels


def cuobjdump() -> str:
    """CUDA's or Triton's; skips the test where there is neither."""
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(bundled) if bundled.exists() else None
    if tool is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's: SASS can't be read")
    return tool


def sass(built: Built) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by symbol."""
    dump = [cuobjdump(), "-sass", "-arch", f"sm_{built.target}", str(built.object)]
    return parse_sass(subprocess.run(dump, capture_output=True, text=True, check=True).stdout)
