#!/usr/bin/env bash
# Everything there is to check on a GPU machine: builds for its GPU, runs all tests on it, compute-sanitizer over the
# smoke tests, measures which layouts of kernels are the fastest (choices), and the benchmarks, with these, beside the
# device's own copy bandwidth and GEMM rate. Needs no network where torch, pytest, pytest-benchmark, hypothesis, pybind11
# and ninja are installed.
#
#   bench/gpu_check.sh [build] [tests] [sanitizer] [choices] [bench] [predictions]     (all of them by default)
#   OUT=DIR         where <GPU>.json (figures, machine, versions, commit), the logs and what choices measured,
#                   kernel_table.json, go (bench/results)
#   PYTHON=python3  which Python, with torch in it (.venv's, else python3)
#
# Without a GPU it compiles every .cu for every target, checks the compilers' reports and the ahead-of-time Triton
# builds, runs the benchmarks on the CPU, and says what it left out. A stage that fails does not stop the next one.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-bench/results}")
mkdir -p "$out"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc and compute-sanitizer, where they aren't on PATH
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
wanted=${*:-build tests sanitizer choices bench predictions}
table=$out/kernel_table.json
stages=$out/.stages
: >"$stages"

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
if [ -n "$gpu" ]; then
    echo "GPU: $gpu"
    export PYALIGN_CUDA=1 PYALIGN_CUDA_ARCHS=native
else
    echo "no GPU that torch sees: nothing will run on one"
    command -v nvcc >/dev/null && export PYALIGN_CUDA=1 PYALIGN_CUDA_ARCHS=
fi

stage() { # name, command...
    local name=$1 started=$SECONDS result=passed
    shift
    [[ " $wanted " == *" $name "* ]] || return 0
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee "$out/$name.log" || result=FAILED
    printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - started))" >>"$stages"
}

left_out() { # name, what
    [[ " $wanted " == *" $1 "* ]] && printf '%s\tnot done: %s\t0\n' "$1" "$2" >>"$stages"
}

build() { "$python" -m pip install --no-build-isolation --no-deps --editable . && "$python" -m pyalign.cli info; }

sanitizer() {
    local tool result=0
    for tool in memcheck racecheck synccheck; do
        echo "-- $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 600 \
            "$python" -m pytest -q -m smoke -k "cuda or triton" || result=1
    done
    return $result
}

bench() { "$python" -m pytest -q bench --benchmark-json "$out/bench.json" && device; }

device() { # the yardsticks, in the same run as what they measure
    "$python" - "$out/device.json" <<'PYTHON'
import json, sys, torch
from pyalign.benchmark.measure import machine_rates

rates = machine_rates(torch.device("cuda")) if torch.cuda.is_available() else {}
with open(sys.argv[1], "w") as file:
    json.dump(rates, file)
PYTHON
}

stage build build
if [ -n "$gpu" ]; then
    stage tests "$python" -m pytest -q -m "not packaging and not sanitizer"
    if command -v compute-sanitizer >/dev/null; then
        stage sanitizer sanitizer
    else
        left_out sanitizer "no compute-sanitizer on PATH"
    fi
    stage choices "$python" bench/choose_kernels.py --out "$table"
    [ -f "$table" ] && export PYALIGN_KERNEL_TABLE=$table # also what an earlier run has found
    stage bench bench
    stage predictions "$python" bench/predictions.py measure # beside bench/PREDICTIONS.md
else
    stage tests "$python" -m pytest -q tests/test_cuda_build.py tests/test_triton_aot.py
    left_out tests "no GPU: no kernel ran on one"
    left_out sanitizer "no GPU: no compute-sanitizer"
    left_out choices "no GPU: no layout was measured"
    stage bench bench
    left_out bench "no GPU: the figures are the CPU's"
    left_out predictions "no GPU: they are of an H100"
fi

"$python" - "$out" "$gpu" <<'PYTHON'
import json, os, pathlib, platform, re, shutil, subprocess, sys, torch

out, gpu = pathlib.Path(sys.argv[1]), sys.argv[2]
rows = [line.split("\t") for line in (out / ".stages").read_text().splitlines()]
stages = [{"stage": name, "result": result, "seconds": int(seconds)} for name, result, seconds in rows]
load = lambda name: json.loads((out / name).read_text()) if (out / name).exists() else {}
device = load("device.json")
cases = [
    {"name": case["name"], "median_s": case["stats"]["median"], **case["extra_info"]}
    for case in load("bench.json").get("benchmarks", [])
]
def said(*command):
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None

commit = said("git", "rev-parse", "HEAD")
nvcc = re.search(r"release ([\d.]+)", said("nvcc", "--version") or "")
report = {
    "gpu": gpu or None,
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
    "machine": platform.machine(),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": {"torch": torch.version.cuda, "nvcc": nvcc and nvcc[1]},
    "commit": commit and commit + ("+changes" if said("git", "status", "--porcelain", "--untracked-files=no") else ""),
    "kernel_table": os.environ.get("PYALIGN_KERNEL_TABLE"),
    "device": device,
    "stages": stages,
    "benchmarks": cases,
}
written = out / f"{re.sub(r'[^a-z0-9]+', '-', (gpu or 'no GPU').lower())}.json"
written.write_text(json.dumps(report, indent=2) + "\n")
for name in (".stages", "device.json", "bench.json"):
    (out / name).unlink(missing_ok=True)

print(f"\n{gpu or 'no GPU'}, torch {torch.__version__}; commit {report['commit']}; written to {written}")
for name, value in device.items():
    print(f"{name:<40} {value:12.1f}")
for case in cases:
    rest = "  ".join(f"{key} {value:.4g}" for key, value in case.items() if isinstance(value, float) and key != "median_s")
    print(f"{case['name']:<60} {case['median_s'] * 1e3:10.3f} ms  {rest}")
for row in stages:
    print(f"{row['stage']:<12} {row['result']}" + (f" in {row['seconds']} s" if row["seconds"] else ""))
sys.exit(any(row["result"] == "FAILED" for row in stages))
PYTHON
