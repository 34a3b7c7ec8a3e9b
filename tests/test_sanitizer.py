"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer: smoke tests pass, an overrun is caught."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")

pytestmark = [pytest.mark.sanitizer, pytest.mark.skipif(CXX is None, reason="no g++")]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with pyalign built under the sanitizers."""
    library = tmp_path_factory.mktemp("sanitized")
    command = [sys.executable, "setup.py", "build", "--build-lib", str(library)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYALIGN_SANITIZE": "1", "PYALIGN_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return library


def python(sanitized: Path, *arguments: str, timeout: int = 1200) -> subprocess.CompletedProcess[str]:
    # Python is not instrumented, so the runtimes must be there first; libstdc++ for the exceptions they wrap.
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    libraries = [
        subprocess.run([str(CXX), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in names
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(library.strip() for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(sanitized),
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=sanitized,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


OVERRUN = """
import pyalign, torch
assert pyalign._C.__file__.startswith({library!r}), pyalign._C.__file__
x, two = torch.ones(100), torch.tensor(2.0)
pyalign._C.cpu.scale((x.data_ptr(), 0, 1, 0, 0), 1, {count}, two.data_ptr(), 1)
print("survived")
"""


def test_the_sanitizers_are_on_and_catch_an_overrun(sanitized: Path):
    inside, over = (
        python(sanitized, "-c", "import pyalign._C\n" + OVERRUN.format(library=str(sanitized), count=count))
        for count in (100, 101)
    )
    assert "survived" in inside.stdout, inside.stderr
    assert over.returncode != 0
    assert "heap-buffer-overflow" in over.stderr


def test_smoke_tests_pass(sanitized: Path):
    result = python(
        sanitized, "-m", "pytest", "-q", "-s", "-m", "smoke", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
        "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
