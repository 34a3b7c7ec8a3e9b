"""Instructions per element of the CPU kernels, counted by callgrind and compared with a committed baseline.

Counts don't depend on what else a machine does: where they rise, somebody made a kernel longer. budgets/driver.cpp
calls the engines of ``build/native`` on fixed inputs, one thread; valgrind knows no AVX-512, so AVX2 and the baseline
instruction set are counted. Run as a program, this file rewrites the baseline and prints what changed:

    python tests/test_budgets_cpu.py
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ninja
import pytest
from budgets_support import FOLDER, MORE, check, complaints, flat, load, rewrite, section_of

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "native" / "csrc" / "cpu"
ISAS = ("avx2", "baseline")
SYSTEMS = {
    "distill": ("distill", "topk_distill", "topk", "outside", "scale", "widen"),
    "logprob": ("logprob",),
    "ranking": ("pair_loss", "ranked_loss", "score_gradient"),
    "scoring": ("reward", "win_", "best_of_n", "preference_metrics"),
    "bradley_terry": ("bradley_terry",),
}
COMMAND = "python tests/test_budgets_cpu.py"


def why_not() -> str:
    """Why nothing can be counted here, or an empty string."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the baselines are of x86-64, and this is {platform.machine()}"
    if shutil.which("valgrind") is None:
        return "no valgrind: instructions can't be counted"
    if shutil.which("g++") is None:
        return "no g++: the driver can't be compiled"
    if not list(OBJECTS.glob("*.o")):
        return f"no objects in {OBJECTS.relative_to(ROOT)}: make build"
    return ""


def made_with() -> dict[str, str]:
    import pyalign._C as native

    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "compiler": native.build_info()["compiler"],
        "valgrind": valgrind.strip().removeprefix("valgrind-"),
        "libc": " ".join(platform.libc_ver()),
    }


def compile_driver(folder: Path) -> Path:
    objects = [str(path.relative_to(ROOT)) for path in sorted(OBJECTS.glob("*.o"))]
    dry_run = [os.path.join(ninja.BIN_DIR, "ninja"), "-n", "-f", "build/native/build.ninja", *objects]
    said = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if "no work to do" not in said:
        pytest.fail(f"the objects in build/native are not of these sources: make build\n{said}", pytrace=False)
    driver = folder / "driver"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-fopenmp", "-Wl,-z,now"]
    command += [str(FOLDER / "driver.cpp"), *objects, "-o", str(driver)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "valgrind/callgrind.h" in result.stderr and "No such file" in result.stderr:
        pytest.skip("no valgrind/callgrind.h: valgrind's headers are not installed")
    assert result.returncode == 0, result.stderr
    return driver


def count(driver: Path, isa: str, folder: Path) -> dict[str, float] | str:
    """Instructions per element by case; or why there is nothing to count."""
    folder.mkdir()
    command = [
        "valgrind",
        "--tool=callgrind",
        "--vgdb=no",
        "--instr-atstart=no",
        f"--callgrind-out-file={folder / 'out'}",
    ]
    # A small environment of the test's own: the stack starts where it always does.
    environment = {"PATH": os.environ["PATH"], "PYALIGN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(driver)], env=environment, capture_output=True, text=True, timeout=600)
    if "PYALIGN_CPU_ISA" in result.stderr:
        return f"this machine, as valgrind shows it, has no {isa}"
    assert result.returncode == 0, result.stderr[-4000:]
    counts: dict[str, float] = {}
    for i, line in enumerate(result.stdout.splitlines(), 1):
        name, elements = line.split("\t")
        dump = (folder / f"out.{i}").read_text()
        assert f"desc: Trigger: Client Request: {name}\n" in dump
        (summary,) = re.findall(r"^summary: (\d+)", dump, re.MULTILINE)
        assert name not in counts
        counts[name] = round(int(summary) / int(elements), 3)
    return counts


def count_all(folder: Path) -> dict[str, dict[str, float] | str]:
    driver = compile_driver(folder)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ISAS, pool.map(lambda isa: count(driver, isa, folder / isa), ISAS), strict=True))


def of(system: str, counts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in counts.items() if name.startswith(SYSTEMS[system])}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float] | str]:
    return count_all(tmp_path_factory.mktemp("callgrind"))


@pytest.mark.budgets
@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_kernels_take_no_more_instructions(counts: dict[str, dict[str, float] | str], system: str, isa: str):
    measured = counts[isa]
    if isinstance(measured, str):
        pytest.skip(measured)
    check(of(system, measured), of(system, section_of("cpu", isa, made_with())), COMMAND)


def test_every_case_belongs_to_one_system():
    for section in load("cpu")["sections"].values():
        found = [name for system in SYSTEMS for name in of(system, section)]
        assert found == list(section)


def test_a_longer_kernel_is_told_from_a_shorter_and_from_noise():
    baseline = {"a": 10.0, "b": 10.0, "c": 10.0, "d": 10.0, "gone": 1.0}
    measured = {"a": 10.0 * (1 + MORE) - 0.01, "b": 10.4, "c": 8.9, "d": 9.1, "new": 1.0}
    assert [line.split(":")[0] for line in complaints(measured, baseline)] == ["b", "c", "gone", "new"]
    assert "MORE" in complaints(measured, baseline)[0]
    with pytest.raises(pytest.fail.Exception, match=r"MORE than 10 x 1\.040"):
        check({"b": 10.4}, {"b": 10.0}, COMMAND)


def test_lists_and_blocks_are_compared_too():
    baseline = flat({"kernel": {"blocks per processor": 2, "hot loops": [100, 50], "spills": 0}})
    assert (
        complaints(flat({"kernel": {"blocks per processor": 2, "hot loops": [102, 50], "spills": 0}}), baseline) == []
    )
    worse = flat({"kernel": {"blocks per processor": 1, "hot loops": [110, 50, 7], "spills": 8}})
    assert len(complaints(worse, baseline)) == 4


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        sections = count_all(Path(folder))
    for section in sections.values():
        if isinstance(section, str):
            sys.exit(section)
    rewrite("cpu", made_with(), sections)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
