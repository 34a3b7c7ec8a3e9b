"""Builds `pyalign._C`: writes a build.ninja, runs ninja, hands the module to setuptools. Needs no torch.

    csrc/bindings.cpp, csrc/cpu/*.cpp   once
    csrc/cpu/*_kernels.cpp              once per instruction set (-DPYALIGN_ISA=avx2, ...), chosen at run time
    csrc/cuda/*.cu                      for every CUDA target; *_sm90.cu for those with thread-block clusters
                                        (90 and up), *_sm90a.cu for 90a alone

Environment:
    PYALIGN_CUDA        0: never build CUDA; 1: an error without nvcc; unset: CUDA where nvcc is
    PYALIGN_CUDA_ARCHS  targets such as "80;90", or "native" for the GPU in this machine (none: a CPU build);
                        PTX of the newest is always added
    PYALIGN_SANITIZE    1: AddressSanitizer and UndefinedBehaviorSanitizer, CPU only
    CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, MAX_JOBS: as everywhere
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import ninja
import pybind11
from ninja.ninja_syntax import Writer, escape
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
CUDA_OLDEST = (12, 0)
ISA_FLAGS = {
    "baseline": [],
    "neon": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


def fail(message: str) -> NoReturn:
    raise CompileError(f"pyalign: {message}")


def say(message: str) -> None:
    print(f"pyalign: {message}", flush=True)


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        fail(f"this command failed:\n  {shlex.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def flag(name: str) -> bool | None:
    """An environment switch: "0", "1", or None where it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        fail(f"{name}={value!r}: want 0 or 1, or leave it unset")
    return {"": None, "0": False, "1": True}[value]


# ---- C++ ----


@dataclass
class Cxx:
    """The C++ compiler, its flags, and the instruction sets it can compile for (baseline first)."""

    path: str
    flags: list[str]
    link_flags: list[str]
    isas: list[str]


def find_cxx(sanitize: bool) -> Cxx:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        fail(f"no C++ compiler: looked for {', '.join(names)}; install one or set CXX")

    flags = shlex.split("-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc")
    flags += shlex.split("-fno-math-errno -fno-trapping-math -ffp-contract=fast")
    if sys.platform == "darwin":
        link_flags = ["-bundle", "-undefined", "dynamic_lookup"]
    else:
        flags.append("-fopenmp")
        # Static libraries (cudart) keep their symbols to themselves: torch loads a cudart of its own.
        link_flags = ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL"]
    if sanitize:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += [*sanitizers, "-O1", "-g", "-fno-omit-frame-pointer"]
        link_flags += sanitizers
    else:
        flags += ["-O3", "-DNDEBUG"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link_flags += shlex.split(os.environ.get("LDFLAGS", ""))

    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        wanted = ["baseline", "avx2", "avx512"]
    else:
        wanted = ["neon" if machine in ("aarch64", "arm64") else "baseline"]
    isas = [isa for isa in wanted if takes_flags(path, ISA_FLAGS[isa])]
    for isa in sorted(set(wanted) - set(isas)):
        say(f"{path} does not take {shlex.join(ISA_FLAGS[isa])}: building without {isa} kernels")
    return Cxx(path, flags, link_flags, isas)


def takes_flags(cxx: str, flags: list[str]) -> bool:
    command = [cxx, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return not flags or subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


# ---- CUDA ----


@dataclass
class Cuda:
    """nvcc, where its headers and libraries are, and the targets to compile for (ascending)."""

    nvcc: str
    version: tuple[int, int]
    include_flags: list[str]
    link_flags: list[str]
    archs: list[int]

    def targets(self, source: Path) -> list[str]:
        """The targets of one source file, such as 90, 90a, 120+PTX; empty if none of its own is wanted."""
        if source.stem.endswith("_sm90a"):
            return ["90a"] if 90 in self.archs else []
        archs = [arch for arch in self.archs if arch >= 90 or not source.stem.endswith("_sm90")]
        return [str(arch) for arch in archs] + [f"{arch}+PTX" for arch in archs[-1:]]

    def defines(self) -> list[str]:
        """What the sources may ask: which of the files for special targets were compiled at all."""
        have = {"PYALIGN_HAVE_SM90": self.archs[-1] >= 90, "PYALIGN_HAVE_SM90A": 90 in self.archs}
        return [f"-D{name}" for name, compiled in have.items() if compiled]


def find_cuda(sanitize: bool) -> Cuda | None:
    wanted = flag("PYALIGN_CUDA")
    if sanitize and wanted:
        fail("PYALIGN_CUDA=1 and PYALIGN_SANITIZE=1: the sanitizers build for the CPU alone")
    if wanted is False or sanitize:
        say("CPU build, as asked")
        return None

    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
    if nvcc is None:
        if wanted:
            fail("PYALIGN_CUDA=1, but there is no nvcc: not in $CUDA_HOME/bin, not on PATH")
        say("no nvcc in $CUDA_HOME/bin or on PATH: CPU build, without CUDA kernels")
        return None
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < CUDA_OLDEST:
        oldest, found = ("{}.{}".format(*v) for v in (CUDA_OLDEST, version))
        fail(
            f"`{nvcc} --version` says {found}, and pyalign needs {oldest} or newer; "
            "set CUDA_HOME to a newer one, or PYALIGN_CUDA=0 to build for the CPU alone"
        )

    archs = cuda_archs(nvcc)
    if not archs:
        if wanted:
            fail("PYALIGN_CUDA=1 and PYALIGN_CUDA_ARCHS=native, but nvidia-smi reports no GPU to build for")
        say("PYALIGN_CUDA_ARCHS=native and no GPU to build for: CPU build, without CUDA kernels")
        return None
    include_flags, library_flags = nvcc_paths(nvcc)
    link_flags = [*library_flags, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return Cuda(nvcc, version, include_flags, link_flags, archs)


def cuda_archs(nvcc: str) -> list[int]:
    """PYALIGN_CUDA_ARCHS or the default, as far as nvcc and our kernels go; empty: native and no GPU."""
    value = os.environ.get("PYALIGN_CUDA_ARCHS", "").strip()
    listed = map(int, re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch")))
    known = {arch for arch in listed if arch >= min(CUDA_ARCHS)}
    if value in ("", "native"):
        archs = native_archs() if value else set(CUDA_ARCHS)
        if unknown := archs - known:
            say(f"targets {sorted(unknown)} left out: {nvcc} and pyalign know {sorted(known)}")
        return sorted(archs & known)

    parts = ["90" if part == "90a" else part for part in value.replace(",", ";").split(";")]
    if not all(re.fullmatch(r"[1-9]\d{1,2}", part) for part in parts):
        fail(f'PYALIGN_CUDA_ARCHS={value!r}: want targets such as "80;90", or "native"')
    archs = set(map(int, parts))
    if archs - known:
        fail(f"PYALIGN_CUDA_ARCHS={value!r}: {nvcc} and pyalign know {sorted(known)}")
    return sorted(archs)


def native_archs() -> set[int]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return set()
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    reply = subprocess.run(command, capture_output=True, text=True).stdout
    return {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", reply, re.MULTILINE)}


def nvcc_paths(nvcc: str) -> tuple[list[str], list[str]]:
    """-I and -L flags for CUDA, by nvcc's own word: nvcc may be a wrapper that lies elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:  # a dry run leaves files behind all the same
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        environment = {**os.environ, "TMPDIR": scratch}
        dryrun = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True).stderr
    flags = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", dryrun, re.MULTILINE))
    if len(flags) != 2:
        fail(f"this command does not name CUDA's headers and libraries:\n  {shlex.join(command)}\n{dryrun}")
    return shlex.split(flags["INCLUDES"]), shlex.split(flags["LIBRARIES"])


# ---- ninja ----


def shell(words: list[str]) -> str:
    return escape(shlex.join(words))


def write_ninja(build: Path, module: Path, cxx: Cxx, cuda: Cuda | None, version: str) -> None:
    """`build` and `module` are relative to ROOT, where ninja runs, and so are all paths in the file."""
    with (ROOT / build / "build.ninja").open("w") as file:
        n = Writer(file, width=10_000)
        n.variable("builddir", str(build))
        n.rule(
            "cxx",
            f"{shell([cxx.path])} -MD -MF $out.d $flags -c $in -o $out",
            "C++  $out",
            "$out.d",
            deps="gcc",
        )
        n.rule("link", f"{shell([cxx.path])} -o $out $in $flags", "link $out")
        objects: list[str] = []

        def compile_cxx(source: Path, flags: list[str], suffix: str = "") -> None:
            objects.append(str(build / source.with_suffix(f"{suffix}.o")))
            n.build(objects[-1], "cxx", str(source), variables={"flags": shell([*cxx.flags, *flags])})

        binding_flags = [
            *("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()),
            f'-DPYALIGN_VERSION="{version}"',
        ]
        if cuda is not None:
            targets = sorted(
                {target for source in cuda_sources() for target in cuda.targets(source)},
                key=lambda target: (int(re.sub(r"\D", "", target)), target),
            )
            binding_flags += [
                *("-DPYALIGN_WITH_CUDA", *cuda.include_flags, *cuda.defines()),
                '-DPYALIGN_CUDA_VERSION="{}.{}"'.format(*cuda.version),
                f'-DPYALIGN_CUDA_ARCHS="{";".join(targets)}"',
            ]
        compile_cxx(Path("csrc/bindings.cpp"), binding_flags, f".{sys.implementation.cache_tag}")

        # The linker keeps the first copy of an inline function that several objects define. Objects for the
        # least instruction set come first, so that no such copy needs instructions the machine may lack.
        sources = [path.relative_to(ROOT) for path in sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
        kernels = [source for source in sources if source.stem.endswith("_kernels")]
        have = [f"-DPYALIGN_HAVE_{isa.upper()}" for isa in cxx.isas]
        for source in sources:
            if source not in kernels:
                compile_cxx(source, have)
        for isa in cxx.isas:
            for source in kernels:
                compile_cxx(source, [f"-DPYALIGN_ISA={isa}", *ISA_FLAGS[isa]], f".{isa}")

        if cuda is not None:
            objects += write_ninja_cuda(n, build, cxx, cuda)
        link_flags = cxx.link_flags + (cuda.link_flags if cuda is not None else [])
        n.build(str(module), "link", objects, variables={"flags": shell(link_flags)})


def write_ninja_cuda(n: Writer, build: Path, cxx: Cxx, cuda: Cuda) -> list[str]:
    # ptxas reports registers, spills and shared memory of every kernel in $log, for tests to read.
    to_log = f"{shell([cuda.nvcc, '-ccbin', cxx.path])} -MD -MF $out.d $flags -c $in -o $out > $log 2>&1"
    n.rule("nvcc", f"{to_log} || {{ cat $log; exit 1; }}", "CUDA $out", "$out.d", deps="gcc")
    flags = shlex.split("-std=c++17 -O3 -DNDEBUG -lineinfo -cudart static -Icsrc -Xptxas -v")
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *cuda.defines()]
    objects: list[str] = []
    for source in cuda_sources():
        targets = cuda.targets(source)
        if not targets:
            continue
        objects.append(str(build / source.with_suffix(".cu.o")))
        log = str(build / source.with_suffix(".ptxas.log"))
        variables = {"flags": shell([*flags, *map(gencode, targets)]), "log": log}
        n.build(objects[-1], "nvcc", str(source), implicit_outputs=log, variables=variables)
    return objects


def cuda_sources() -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]


def gencode(target: str) -> str:
    arch, _, ptx = target.partition("+")
    return f"-gencode=arch=compute_{arch},code={'compute' if ptx else 'sm'}_{arch}"


def run_ninja(build: Path) -> None:
    """Passes ninja's progress on; the first command that fails becomes the error."""
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(build / "build.ninja"), "-j", jobs]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    failure: list[str] = []
    failed = False
    for line in process.stdout:
        if line.startswith("FAILED:"):
            failed = not failure
        elif re.match(r"\[\d+/\d+\]|ninja: build stopped", line):
            failed = False
        if failed:
            failure.append(line)
        else:
            print(line, end="", flush=True)
    if process.wait():
        fail(f"this command failed:\n{''.join(failure[1:]) or shlex.join(command)}")


class BuildNative(build_ext):
    """setuptools' build_ext with ninja for a compiler driver; objects stay in build/ between runs."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            fail("Windows is not supported: nobody has tested it; WSL 2 is Linux")
        sanitize = bool(flag("PYALIGN_SANITIZE"))
        cxx, cuda = find_cxx(sanitize), find_cuda(sanitize)
        say(f"C++ compiler {cxx.path}, instruction sets {', '.join(cxx.isas)}")
        if cuda is not None:
            say(f"CUDA compiler {cuda.nvcc}, targets {', '.join(map(str, cuda.archs))} and PTX")

        build = Path("build", "sanitize" if sanitize else "native")
        module = build / Path(self.get_ext_filename(ext.name)).name
        (ROOT / build).mkdir(parents=True, exist_ok=True)
        write_ninja(build, module, cxx, cuda, self.distribution.get_version())
        run_ninja(build)

        destination = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(destination))
        self.copy_file(str(ROOT / module), destination)


setup(
    # kernels/ is pyalign.kernels: no top-level package of that name is installed.
    packages=[
        *find_packages(str(ROOT), include=["pyalign", "pyalign.*"]),
        *(f"pyalign.{name}" for name in find_packages(str(ROOT), include=["kernels", "kernels.*"])),
    ],
    package_dir={"pyalign": "pyalign", "pyalign.kernels": "kernels"},
    package_data={"pyalign": ["py.typed", "*.pyi", "kernel_tables/*"]},
    ext_modules=[Extension("pyalign._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
