"""Measures which layout of a kernel is the fastest on this GPU, and writes the table that pyalign chooses by.

    python bench/choose_kernels.py --out table.json       90 seconds at most, on a GPU; bench/gpu_check.sh runs it
    PYALIGN_KERNEL_TABLE=table.json python train.py       uses it; in pyalign/kernel_tables it is everybody's

The distillation kernels, dense and top-k: every layout that fits, at vocabularies of real models. Losses from hidden
states: chunks in turn, and a chunk's row loss beside the products of the next. All that can be chosen takes turns, and
has to give what the rule's choice gives; what doesn't is left out of the table, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pyalign import _backends, _tables
from pyalign._types import DIVERGENCES, Options, Tokens
from pyalign.benchmark import interleaved
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import linear
from pyalign.benchmark.measure import Upstream, step

VOCABULARIES = (128256, 151936, 32000, 50304, 262144)
DTYPES = (torch.bfloat16, torch.float32)
TOP_K = 50
LAUNCH_BYTES = 4 << 30  # of both sides' logits and the gradient: more than a millisecond of any GPU
SHAPES = (
    {"tokens": 8192, "hidden": 4096, "vocab": 128256},
    {"tokens": 8192, "hidden": 2048, "vocab": 50304},
    {"tokens": 8192, "hidden": 1024, "vocab": 32000},
)
LINEAR = {  # ops as they are called, and as the table names them
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_token_logprobs": "linear_logprob",
    "linear_distillation_loss": "linear_distill",
    "linear_topk_distillation_loss": "linear_topk_distill",
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of gradients, over the largest: orders of summation differ

Results = list[Tensor]
Candidate = Callable[[], Results]


def choose(
    candidates: dict[str, Candidate], rule: str, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of those that give what the rule's choice gives, and which don't."""
    expected = [x.clone() for x in candidates[rule]()]
    wrong = [name for name, run in candidates.items() if not agree(run(), expected, dtype)]
    del expected
    right = {name: run for name, run in candidates.items() if name not in wrong}
    times = interleaved(dict(right), device, rounds=rounds)
    return {name: 1e3 * seconds for name, seconds in times.items()}, wrong


def agree(found: Results, expected: Results, dtype: torch.dtype) -> bool:
    for x, y in zip(found, expected, strict=True):
        limit = TOLERANCE[dtype if x.dim() else torch.float32] * float(y.abs().amax())
        if not float((x - y).abs().amax()) <= limit:  # NaN is wrong too
            return False
    return True


# ---- The distillation kernels ----


def distill_entries(
    engine: Any, vocab: int, dtype: torch.dtype, rows: int, device: torch.device, rounds: int
) -> Iterator[tuple[_tables.Entry, list[str]]]:
    """Loss and gradient of ``rows`` rows by every layout that fits, dense and top-k, and which of them are wrong."""
    student, teacher = (torch.randn(rows, vocab, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    stored = engine.topk(teacher, min(TOP_K, vocab - 1), 1.0)
    gradient = torch.empty_like(student)
    wanted = {"gradient": gradient, "want_loss": True, "want_metrics": False}
    index = device.index or 0

    def dense(options: Options) -> Tensor:
        return engine.distill(student, teacher, Tokens(), options, **wanted).loss

    def top_k(options: Options) -> Tensor:
        return engine.topk_distill(student, *stored, "bucket", Tokens(), options, **wanted).loss

    def run(layout: str, loss: Callable[[Options], Tensor], options: Options) -> Results:
        with _tables.use(distill=layout):
            return [loss(options), gradient]

    def measured(
        op: str, divergence: str, layouts: list[_tables.Layout], loss: Callable[[Options], Tensor]
    ) -> tuple[_tables.Entry, list[str]]:
        names = [_tables.layout_name(x) for x in layouts]
        options = Options(vocab, divergence or "forward_kl")
        candidates = {name: functools.partial(run, name, loss, options) for name in names}
        times, wrong = choose(candidates, names[0], dtype, device, rounds)
        about = {"op": op, "dtype": short(dtype), "divergence": divergence, "rows": rows, "vocab": vocab}
        return entry(about, 0, names[0], times), wrong

    for divergence in DIVERGENCES:
        yield measured(_tables.DISTILL, divergence, engine.distill_layouts(vocab, dtype, divergence, index), dense)
    yield measured(_tables.TOPK_DISTILL, "", engine.topk_distill_layouts(vocab, dtype, index), top_k)


def entry(about: dict[str, Any], hidden: int, rule: str, times: dict[str, float]) -> _tables.Entry:
    milliseconds = {name: float(f"{time:.5g}") for name, time in times.items()}
    return _tables.Entry(
        **about, hidden=hidden, choice=_tables.chosen(milliseconds, rule), rule=rule, milliseconds=milliseconds
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Losses from hidden states ----


def linear_cases(device: torch.device) -> list[tuple[Case, str]]:
    """Cases of the benchmark, and the divergence of each."""
    kinds = {"forward_kl": "forward_kl", "jsd": "jsd"}
    found = [(case, kinds[case.variant]) for case in linear.distillations(device)]
    found += [(case, "") for case in (*linear.cross_entropies(device), *linear.logprobs(device))]
    found += [(case, "forward_kl") for case in linear.topk_losses(device)]
    return [(case, divergence) for case, divergence in found if case.dtype == torch.bfloat16]


def linear_entry(case: Case, divergence: str, device: torch.device, rounds: int) -> tuple[_tables.Entry, list[str]]:
    """Forward and backward, chunks in turn and overlapped."""
    training = step(case, case.ours, case.inputs(device, 0), Upstream())

    def run(how: str) -> Results:
        with _tables.use(linear=how):
            outputs, gradients = training()
        return [x.detach() for x in (*outputs, *gradients)]

    rule = _tables.IN_TURN
    candidates = {name: functools.partial(run, name) for name in _tables.LINEAR_CHOICES}
    times, wrong = choose(candidates, rule, case.dtype, device, rounds)
    sizes = {"rows": case.shape["tokens"], "vocab": case.shape["vocab"]}
    about = {"op": LINEAR[case.op], "dtype": short(case.dtype), "divergence": divergence, **sizes}
    return entry(about, case.shape["hidden"], rule, times), wrong


# ---- The table ----


def said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def table(entries: list[_tables.Entry], gpu: str, index: int) -> _tables.Table:
    query = ("--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}")
    return _tables.Table(
        gpu=gpu,
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        driver=said("nvidia-smi", *query),
        commit=said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+changes"),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        entries=entries,
    )


def measured(engine: Any, gpu: str, device: torch.device, seconds: float) -> Iterator[tuple[_tables.Entry, list[str]]]:
    """All that ``seconds`` suffice for; a quarter of them is kept for losses from hidden states."""
    entries: list[_tables.Entry] = []
    begin = time.monotonic()
    for dtype, vocab in itertools.product(DTYPES, VOCABULARIES):
        if time.monotonic() - begin > 0.75 * seconds:
            print(f"left out for want of time: distillation, {short(dtype)}, rows of {vocab}")
            continue
        rows = LAUNCH_BYTES // (3 * vocab * dtype.itemsize)
        for found in distill_entries(engine, vocab, dtype, rows, device, rounds=7):
            entries.append(found[0])
            yield found
    # The row losses of chunks are laid out by what was just measured.
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ):
        partial = Path(directory, "table.json")
        table(entries, gpu, device.index or 0).save(partial)
        os.environ[_tables.VARIABLE] = str(partial)
        for shape in SHAPES:
            for case, divergence in linear_cases(device):
                if time.monotonic() - begin > seconds:
                    print(f"left out for want of time: {case.at(shape)}")
                    continue
                yield linear_entry(case.at(shape), divergence, device, rounds=5)


def line(x: _tables.Entry, wrong: list[str]) -> str:
    shape = f"{x.rows} x {x.hidden} -> {x.vocab}" if x.hidden else f"{x.rows} x {x.vocab}"
    times = ", ".join(f"{name} {time:.3f}" for name, time in sorted(x.milliseconds.items(), key=lambda pair: pair[1]))
    bad = f"; WRONG, left out: {', '.join(wrong)}" if wrong else ""
    what = f"{x.op} {x.divergence} {x.dtype} {shape}"
    return f"{what:<58} {x.choice}, {x.gain:.2f}x faster than the rule's ({times} ms){bad}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: the name of the GPU's table, in the current directory")
    parser.add_argument("--seconds", type=float, default=90.0, help="what these don't suffice for is left out (90)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch sees: a table is measured on the GPU that it is for")
    device = torch.device("cuda", torch.cuda.current_device())
    refusal = _backends.refusal("cuda", device, torch.bfloat16)
    if refusal:
        sys.exit(f"the CUDA kernels can't run here: {refusal}")

    gpu = torch.cuda.get_device_name(device)
    out = options.out or Path(_tables.file_name(gpu))
    out.parent.mkdir(parents=True, exist_ok=True)
    entries: list[_tables.Entry] = []
    failed = False
    for found, wrong in measured(_backends.engine("cuda"), gpu, device, options.seconds):
        failed |= bool(wrong)
        entries.append(found)
        print(line(found, wrong), flush=True)
    table(entries, gpu, device.index).save(out)
    print(f"{len(entries)} entries for {gpu}: {out}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
