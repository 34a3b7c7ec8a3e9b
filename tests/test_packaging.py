"""The native build explains its failures; wheels, sdists and editable installs hold what they should."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from pyalign._version import __version__

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++") or shutil.which("c++") or ""
BUILD_EXT = (sys.executable, "setup.py", "build_ext")
LEFT_OUT = (".git", ".venv", ".*cache", ".hyp*", "build", "dist", "runs", "quick", "__pycache__", "*.egg-info")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYALIGN_", "CUDA_HOME", "CXX"))}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def succeed(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: pyalign: ") == 1
    return result.stderr


# The native build, where it can't succeed


def nvcc(directory: Path, release: str = "13.0") -> str:
    """A stand-in that knows two targets; the path to search for it."""
    script = directory / "nvcc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo release {release} || echo compute_80 compute_90\n')
    script.chmod(0o755)
    return str(directory)


def test_missing_compiler(tmp_path: Path):
    error = one_error(run(*BUILD_EXT, PATH=str(tmp_path)))
    assert "no C++ compiler: looked for g++, c++, clang++; install one or set CXX" in error
    assert "looked for icpc-13;" in one_error(run(*BUILD_EXT, PATH=str(tmp_path), CXX="icpc-13"))


def test_cuda_demanded_without_nvcc(tmp_path: Path):
    error = one_error(run(*BUILD_EXT, PATH=str(tmp_path), CXX=CXX, PYALIGN_CUDA="1"))
    assert "PYALIGN_CUDA=1, but there is no nvcc: not in $CUDA_HOME/bin, not on PATH" in error


def test_sanitizers_and_cuda_exclude_each_other(tmp_path: Path):
    error = one_error(run(*BUILD_EXT, PATH=nvcc(tmp_path), CXX=CXX, PYALIGN_CUDA="1", PYALIGN_SANITIZE="1"))
    assert "PYALIGN_CUDA=1 and PYALIGN_SANITIZE=1: the sanitizers build for the CPU alone" in error


def test_nvcc_too_old(tmp_path: Path):
    error = one_error(run(*BUILD_EXT, PATH=nvcc(tmp_path, release="11.8"), CXX=CXX))
    assert f"`{tmp_path}/nvcc --version` says 11.8, and pyalign needs 12.0 or newer" in error


def test_native_targets_demanded_without_gpu(tmp_path: Path):
    path = nvcc(tmp_path)
    error = one_error(run(*BUILD_EXT, PATH=path, CXX=CXX, PYALIGN_CUDA="1", PYALIGN_CUDA_ARCHS="native"))
    assert "nvidia-smi reports no GPU to build for" in error


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("8.0", 'want targets such as "80;90", or "native"'),
        ("80;sm_90", 'want targets such as "80;90", or "native"'),
        ("80;89", "nvcc and pyalign know [80, 90]"),
        ("75", "nvcc and pyalign know [80, 90]"),
        ("75;90a", "nvcc and pyalign know [80, 90]"),  # 90a comes with 90, where a kernel needs it
    ],
)
def test_bad_targets(tmp_path: Path, archs: str, message: str):
    error = one_error(run(*BUILD_EXT, PATH=nvcc(tmp_path), CXX=CXX, PYALIGN_CUDA_ARCHS=archs))
    assert f"PYALIGN_CUDA_ARCHS='{archs}'" in error
    assert message in error


def test_bad_switch():
    assert "PYALIGN_CUDA='yes': want 0 or 1, or leave it unset" in one_error(run(*BUILD_EXT, PYALIGN_CUDA="yes"))


# The native build, where it succeeds


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout and its compiled objects; ninja goes by their times, so it compiles little."""
    copy = tmp_path_factory.mktemp("checkout") / "pyalign"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    if (ROOT / "build/native").exists():
        shutil.copytree(ROOT / "build/native", copy / "build/native")
    return copy


def venv_with_our_packages(directory: Path) -> Path:
    """A fresh environment that sees this one's packages, torch above all, but not its editable pyalign."""
    succeed(sys.executable, "-m", "venv", "--without-pip", str(directory))
    python = directory / "bin" / "python"
    purelib = succeed(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(purelib, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *arguments: str, **environment: str) -> None:
    succeed(sys.executable, "-m", "pip", "--python", str(python), *arguments, **environment)


USE = """
import pyalign, pyalign.kernels, pyalign._C, torch
student = torch.randn(4, 9, requires_grad=True)
loss = pyalign.distillation_loss(student, torch.randn(4, 9))
loss.backward()
assert loss > 0 and student.grad.sum(-1).abs().max() < 1e-6
print(pyalign.__file__, pyalign.kernels.__file__, pyalign._C.__file__, sep="\\n")
"""


def check_works(python: Path, cwd: Path) -> list[Path]:
    """Trains one step there; the files of pyalign, pyalign.kernels and pyalign._C."""
    succeed(str(python), "-m", "pyalign.cli", "info", cwd=cwd)
    return [Path(line) for line in succeed(str(python), "-c", USE, cwd=cwd).splitlines()]


@pytest.mark.packaging
def test_failed_compile_is_one_error_with_its_command(checkout: Path, tmp_path: Path):
    copy = tmp_path / "broken"
    shutil.copytree(checkout, copy)
    source = copy / "csrc/bindings.cpp"
    source.write_text(source.read_text() + "\n#error broken on purpose\n")
    error = one_error(run(*BUILD_EXT, cwd=copy, PYALIGN_CUDA="0"))
    assert f"this command failed:\n{CXX} " in error
    assert " -c csrc/bindings.cpp -o " in error
    assert "broken on purpose" in error


@pytest.mark.packaging
def test_second_build_compiles_only_what_changed(checkout: Path):
    succeed(*BUILD_EXT, cwd=checkout, PYALIGN_CUDA="0")
    assert "ninja: no work to do." in succeed(*BUILD_EXT, cwd=checkout, PYALIGN_CUDA="0")
    os.utime(checkout / "csrc/bindings.cpp")
    again = succeed(*BUILD_EXT, cwd=checkout, PYALIGN_CUDA="0")
    assert "[2/2] link" in again


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it under build isolation."""
    out = tmp_path_factory.mktemp("dist")
    succeed(sys.executable, "-m", "build", "--outdir", str(out), str(checkout), PYALIGN_CUDA="0")
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.packaging
def test_sdist_holds_all_sources(distributions: tuple[Path, Path]):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    sources = {"csrc/bindings.cpp", "kernels/__init__.py", "pyalign/_C.pyi", "LICENSE", *tracked.split()}
    assert sources - {".gitignore"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.packaging
def test_wheel_holds_pyalign_and_nothing_else(distributions: tuple[Path, Path]):
    archive = zipfile.ZipFile(distributions[1])
    names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {"pyalign", f"pyalign-{__version__}.dist-info"}
    assert {"pyalign/py.typed", "pyalign/_C.pyi", "pyalign/kernels/__init__.py"} <= set(names)
    tables = {f"pyalign/kernel_tables/{path.name}" for path in (ROOT / "pyalign/kernel_tables").iterdir()}
    assert tables <= set(names)
    metadata = archive.read(f"pyalign-{__version__}.dist-info/METADATA").decode()
    requirements = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE)
    assert requirements == ["torch>=2.8", "numpy"]
    native = [name for name in names if ".so" in name]
    assert native == [f"pyalign/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]


def check_linked(module: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    with module.open("rb") as file:
        elf = elffile.ELFFile(file)
        tags = list(elf.get_section_by_name(".dynamic").iter_tags())
        needed = {tag.needed.partition(".so")[0] for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        paths = [tag.entry.d_tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        exported = {symbol.name for symbol in symbols if symbol.entry.st_shndx != "SHN_UNDEF"}
    assert "libgomp" in needed
    system = {"libgomp", "libstdc++", "libgcc_s", "libm", "libc", "libdl", "librt", "libpthread"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= system
    assert not paths
    assert "PyInit__C" in exported
    assert not {name for name in exported if name.startswith(("cuda", "__cuda"))}


def test_the_module_is_linked_to_the_system_alone():
    from pyalign import _C

    check_linked(Path(_C.__file__))


@pytest.mark.packaging
def test_wheel_works_outside_the_checkout(distributions: tuple[Path, Path], tmp_path: Path):
    python = venv_with_our_packages(tmp_path / "venv")
    pip(python, "install", "--no-deps", "--no-index", str(distributions[1]))
    files = check_works(python, tmp_path)
    assert all(tmp_path in file.parents for file in files)
    check_linked(files[-1])


@pytest.mark.packaging
def test_editable_install_works_inside_and_outside_the_checkout(checkout: Path, tmp_path: Path):
    python = venv_with_our_packages(tmp_path / "venv")
    pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(checkout), PYALIGN_CUDA="0")
    for cwd in (tmp_path, checkout):
        package, kernels, _ = check_works(python, cwd)
        assert package == checkout / "pyalign/__init__.py"
        assert kernels == checkout / "kernels/__init__.py"
