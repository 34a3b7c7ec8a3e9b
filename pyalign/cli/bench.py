"""``pyalign bench``: every op beside plain torch, torch.compile and the packages that compute the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pyalign._backends import BACKENDS
from pyalign._optional import require
from pyalign._options import OptionError, one_of, positive
from pyalign.benchmark import compare, measure, plots, report, results
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import SYSTEMS, all_cases
from pyalign.cli._session import refusals

QUICK_SECONDS = 90.0


def bench(
    system: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SYSTEMS)}. Repeat for more. Default: all.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Cases whose name contains this text (see --list). Repeat for more.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"Of pyalign: {', '.join(BACKENDS)}. Repeat for more. Default: those of the device."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: cuda where there is one.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Small cases, two minutes at most on a CPU: one backend, no torch.compile.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="For the rounds of a case. Default: 3; 0.5 with --quick.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="With torch.compile. Default: but for --quick.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="With the other packages that are installed.")] = True,
    fresh_memory: Annotated[
        bool,
        typer.Option("--fresh-memory", help="On a CPU, every tensor in fresh pages, as a script without an allocator."),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Where to write all figures, the machine and versions.")] = None,
    plot_dir: Annotated[
        Path | None, typer.Option("--plots", help="Directory for roofline.png and speedups.png.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--compare", help="What --json wrote earlier on this machine: exit code 1 if pyalign got worse."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Of --compare: smaller changes don't count.")] = 0.1,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
) -> None:
    """Measure every op beside plain torch, torch.compile and the installed packages that compute the same.

    Everybody takes turns in one run. Per case: medians and their spread, bytes and FLOPs that the work needs, the share
    that is of this machine's copies and matrix products, peak memory, errors against float64; on a GPU also launches
    and times in a CUDA graph. Who fails is shown with the error.
    """
    with refusals("pyalign bench", {"against": "compare"}, memory="--case"):
        where = _device(device)
        chosen = _chosen(where, system or [], case or [], quick)
        for name in backend or []:
            one_of("backend", name, BACKENDS)
        positive("tolerance", tolerance)
        if seconds is not None:
            positive("seconds", seconds)
        if list_cases:
            print("\n".join(x.name for x in chosen))
            return
        old: results.Run | None = None
        if against is not None:  # read before --json may write to the same file
            old = compare.load(against, "compare", results.machine(where)[0], keep_memory=not fresh_memory)
        settings = measure.Settings(
            seconds=seconds or (0.5 if quick else 3.0),
            backends=tuple(backend or (measure.default_backends(where)[:1] if quick else ())),
            compiled=not quick if compiled is None else compiled,
            peers=peers,
            keep_memory=not fresh_memory,
            check_compiled=not quick,
        )
        run = _measure(chosen, where, settings, quick, json)
        if plot_dir is not None:
            plots.draw(run, plot_dir)
        worse = _show(run, old, tolerance)
    if worse:
        raise typer.Exit(1)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise OptionError("device", f"got {name!r}; wanted auto, cpu, or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise OptionError("device", f"got {name!r}; wanted auto, cpu, or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError("device", f"got {name!r}; torch sees {torch.cuda.device_count()} GPUs")
    return found


def _chosen(device: torch.device, systems: list[str], texts: list[str], quick: bool) -> list[Case]:
    for name in systems:
        one_of("system", name, SYSTEMS)
    found = [x for x in all_cases(device) if not systems or x.system in systems]
    if quick:
        found = [x.at(x.quick) for x in found if x.quick is not None]
    unknown = [text for text in texts if not any(text in x.name for x in found)]
    if unknown:
        raise OptionError("case", f"got {unknown[0]!r}, which is in no case's name; --list prints them")
    return [x for x in found if not texts or any(text in x.name for text in texts)]


def _measure(
    chosen: list[Case], device: torch.device, settings: measure.Settings, quick: bool, json: Path | None
) -> results.Run:
    errors = require("rich.console").Console(stderr=True)
    begin = time.perf_counter()

    def time_is_up() -> bool:
        return quick and time.perf_counter() - begin > QUICK_SECONDS

    def keep(run: results.Run) -> None:
        """What was measured is not lost with a run that is stopped."""
        run.took = time.perf_counter() - begin
        if json is not None:
            results.save(run, json)

    with errors.status("") as status:

        def tell(case: Case) -> None:
            status.update(f"{1 + chosen.index(case)} of {len(chosen)}: {case.name}")

        run = measure.run_all(chosen, device, settings, quick=quick, deadline=time_is_up, tell=tell, done=keep)
    keep(run)
    return run


def _show(run: results.Run, old: results.Run | None, tolerance: float) -> bool:
    """Prints all there is; whether the comparison found that we got worse."""
    console: Any = require("rich.console").Console()
    if not console.is_terminal:
        console = require("rich.console").Console(width=160)
    for line in report.heading(run):
        console.print(line, markup=False, highlight=False)
    console.print()
    for table in report.tables(run):
        console.print(table)
    for line in report.closing(run):
        console.print(line, markup=False, highlight=False, style="yellow", soft_wrap=True)
    console.print(f"{len(run.cases())} cases in {run.took:.0f} s", highlight=False)
    if old is None:
        return False
    verdicts = compare.compare(old, run, tolerance=tolerance)
    console.print(report.comparison(verdicts, tolerance))
    return any(x.verdict in compare.WORSE for x in verdicts)
