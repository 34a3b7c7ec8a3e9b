"""One case measured: everybody takes turns, so that drift hits all of them alike.

A way that fails is a row that says so. Inputs are rotated, so that no cache holds what a call is about to read; a copy
or a matrix product of the case's size takes turns too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyalign
from pyalign.benchmark import results, timing
from pyalign.benchmark.case import Case, Function, Inputs, Outputs, Way, Work, in_float64
from pyalign.benchmark.results import Row, Run, machine

ROTATED_BYTES = 512 << 20
SMALL_BYTES = 16 << 20  # of inputs: such calls are launched as CUDA graphs too
LARGEST_KEPT = 8 << 30

Step = Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Settings:
    seconds: float = 3.0
    """For the rounds of a case."""
    warmup: float = 0.1
    """Seconds that each way runs before."""
    fewest_rounds: int = 5
    most_rounds: int = 301
    most_sets: int = 16
    """Of inputs, which are rotated."""
    backends: tuple[str, ...] = ()
    """Of ours; none: those that the device has."""
    compiled: bool = True
    """With torch.compile, peers' own uses of it included."""
    peers: bool = True
    keep_memory: bool = True
    """On a CPU, whether freed memory stays with the process, as on a GPU (``kept_memory``)."""
    memory: bool = True
    errors: bool = True
    check_compiled: bool = True
    """Whether torch.compile's errors are measured: it compiles for another shape then."""
    timer: Callable[[Callable[[], object], torch.device], float] = timing.seconds

    def plain(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "timer"}


class _Missing(Exception):
    """A package that isn't installed."""


@contextlib.contextmanager
def _unheard() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class _Runner:
    way: Way
    row: Row
    function: Function
    steps: list[Step]
    run: Callable[[], object]
    """The steps in turn."""
    backend: str | None

    @contextlib.contextmanager
    def around(self) -> Generator[None]:
        """What must hold while it runs, and is not to be timed: the backend of ours; others' warnings are theirs."""
        with contextlib.ExitStack() as stack:
            if self.way.kind == "pyalign":
                stack.enter_context(pyalign.backend(self.backend))
            else:
                stack.enter_context(_unheard())
            yield


# ---- Steps ----


class Upstream:
    """Gradients of the outputs, the same for every way and every set of inputs."""

    def __init__(self) -> None:
        self._drawn: dict[Any, list[Tensor]] = {}

    def __call__(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        key = tuple((x.shape, x.dtype) for x in outputs)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(1)
            drawn = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
            self._drawn[key] = drawn
        return self._drawn[key]


def step(case: Case, function: Function, inputs: Inputs, upstream: Upstream) -> Step:
    """Forward and, where the case has leaves, backward: the outputs and the gradients, which are given up each time."""
    leaves = [inputs[name] for name in case.leaves]

    def run() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = _tuple(function(inputs))
        if not leaves:
            return outputs, ()
        if len(outputs) == 1 and outputs[0].dim() == 0:
            return outputs, torch.autograd.grad(outputs, leaves)
        return outputs, torch.autograd.grad(outputs, leaves, upstream(outputs))

    return run


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def rotated(steps: list[Step]) -> Callable[[], object]:
    turns = itertools.cycle(steps)
    return lambda: next(turns)()


def input_sets(case: Case, device: torch.device, most: int) -> list[Inputs]:
    """As many as it takes to be more than a cache holds."""
    first = case.inputs(device, 0)
    size = sum(x.nbytes for x in first.values())
    count = min(most, max(1, -(-ROTATED_BYTES // max(size, 1))))
    return [first, *(case.inputs(device, seed) for seed in range(1, count))]


# ---- Ways ----


def default_backends(device: torch.device) -> tuple[str, ...]:
    """The default of the device first."""
    return {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}.get(device.type, ("reference",))


def ways(case: Case, device: torch.device, settings: Settings) -> list[tuple[Way, str | None]]:
    """All ways to the case's result, ours first, with the backend of ours."""
    backends = settings.backends or default_backends(device)
    found: list[tuple[Way, str | None]] = [
        (Way(f"pyalign ({backend})", "pyalign", lambda: case.ours), backend) for backend in backends
    ]
    found += [(Way(name, "torch", functools.partial(_same, f)), None) for name, f in case.eager.items()]
    if settings.compiled and case.compiled:
        for name, function in case.eager.items():
            name = name.replace("eager", "compile")
            found.append((Way(name, "torch", functools.partial(_compiled, function), compiles=True), None))
    for way in case.others:
        if (settings.compiled or not way.compiles) and (settings.peers or way.kind != "peer"):
            found.append((way, backends[0] if way.kind == "pyalign" else None))
    return found


def _same(function: Function) -> Function:
    return function


def _compiled(function: Function) -> Function:
    def run(x: Inputs) -> Outputs:
        return function(x)

    return torch.compile(run, dynamic=False)


def _loaded(way: Way) -> Function:
    try:
        return way.load()
    except ModuleNotFoundError as error:
        if way.package and results.version(way.package) is None:
            raise _Missing(f"{way.package} is not installed ({error})") from error
        raise


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---- Errors ----


def truth(case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients in float64, by the first of torch's ways, from the inputs as their dtype rounds them."""
    oracle = next(iter(case.eager.values()))
    outputs, gradients = step(case, oracle, in_float64(case.inputs(device, 0)), Upstream())()
    return tuple(x.detach() for x in outputs), gradients


def errors(
    found: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], exact: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
) -> tuple[float, float | None]:
    """Of the values the largest difference over the largest value; of the gradients the norm of the difference."""
    (outputs, gradients), (values, exact_gradients) = found, exact
    shapes, wanted = [tuple(x.shape) for x in outputs], [tuple(x.shape) for x in values]
    if shapes != wanted:
        raise ValueError(f"its results have shapes {shapes}, not {wanted}")
    pairs = list(zip(outputs, values, strict=True))
    value_error = max((_relative(a, b, float("inf")) for a, b in pairs), default=0.0)
    if not gradients:
        return value_error, None
    joined = [torch.cat([x.detach().double().flatten() for x in side]) for side in (gradients, exact_gradients)]
    return value_error, _relative(joined[0], joined[1], 2)


def _relative(found: Tensor, exact: Tensor, order: float) -> float:
    difference = (found.detach().double() - exact.double()).flatten()
    if difference.numel() == 0:
        return 0.0
    size = float(torch.linalg.vector_norm(exact.double().flatten(), order))
    distance = float(torch.linalg.vector_norm(difference, order))
    return distance if size == 0 else distance / size


# ---- Measuring ----


def measure(
    case: Case, device: torch.device, settings: Settings, rates: dict[str, float] | None = None
) -> tuple[list[Row], dict[str, str]]:
    """The rows of a case, ours first, and which packages are missing. ``rates`` are the machine's (``Run.rates``)."""
    if settings.compiled:
        torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]  # past 8 shapes of a function it would run eagerly
    sets = input_sets(case, device, settings.most_sets)
    rows, runners, missing = _prepared(case, device, settings, sets)
    if settings.errors:
        _check(case, device, settings, runners)
    runners = [x for x in runners if x.row.failure is None]
    if settings.memory:
        for runner in runners:
            with runner.around():
                runner.row.peak_bytes = _peak(runner.run, device)
    yardsticks = _yardsticks(case, device)
    with _memory(case, device, settings, runners):
        _time(case, device, settings, runners, yardsticks)
    if device.type == "cuda":
        small = sum(x.nbytes for x in sets[0].values()) <= SMALL_BYTES
        _gpu_figures(device, settings, [x for x in runners if x.row.failure is None], small)
    rows += [row for row, _ in yardsticks]
    _shares(rows, rates or {})
    return rows, missing


def _row(case: Case, name: str, kind: str, work: Work) -> Row:
    dtype = str(case.dtype).removeprefix("torch.")
    described = (case.name, case.system, case.op, case.variant, dict(case.shape), dtype, bool(case.leaves))
    return Row(*described, name, kind, work.bytes, work.flops)


def _prepared(
    case: Case, device: torch.device, settings: Settings, sets: list[Inputs]
) -> tuple[list[Row], list[_Runner], dict[str, str]]:
    """A row for every way that there is, and what runs it where its first call succeeded."""
    rows: list[Row] = []
    runners: list[_Runner] = []
    missing: dict[str, str] = {}
    upstream = Upstream()
    for way, backend in ways(case, device, settings):
        row = _row(case, way.name, way.kind, case.work(case))
        try:
            with _unheard():
                function = _loaded(way)
            whole = case if way.kind != "bare" else case.replaced(leaves=())
            steps = [step(whole, function, inputs, upstream) for inputs in sets]
            runner = _Runner(way, row, function, steps, rotated(steps), backend)
            with runner.around():
                runner.run()
                _synchronize(device)
            runners.append(runner)
        except _Missing as error:
            missing[way.package] = str(error)
            continue
        except Exception as error:  # whatever it is, it is what is reported of this way
            row.failure = said(error)
        rows.append(row)
    return rows, runners, missing


def _check(case: Case, device: torch.device, settings: Settings, runners: list[_Runner]) -> None:
    small = case.at(case.checked_at)
    exact = truth(small, device)
    for runner in runners:
        if runner.way.kind == "bare" or (runner.way.compiles and not settings.check_compiled):
            continue
        try:
            with runner.around():
                found = step(small, runner.function, small.inputs(device, 0), Upstream())()
            runner.row.value_error, runner.row.gradient_error = errors(found, exact)
        except Exception as error:
            runner.row.failure = said(error)


def _peak(run: Callable[[], object], device: torch.device) -> int | None:
    try:
        return timing.peak_extra_memory(run, device)
    except OSError:
        return None


def _memory(
    case: Case, device: torch.device, settings: Settings, runners: list[_Runner]
) -> contextlib.AbstractContextManager[object]:
    """On a CPU as much kept memory as the hungriest way takes."""
    if device.type != "cpu" or not settings.keep_memory:
        return contextlib.nullcontext()
    peaks = [x.row.peak_bytes for x in runners]
    known = [x for x in peaks if x is not None]
    size = max(known) * 5 // 4 + (64 << 20) if known else case.kept_bytes or (64 << 20)
    return timing.kept_memory(min(size, LARGEST_KEPT))


def _yardsticks(case: Case, device: torch.device) -> list[tuple[Row, Callable[[], object]]]:
    if case.bound == "memory":
        size = min(max(case.work(case).bytes // 3, 32 << 20), 512 << 20)
        run, moved = timing.copy_function(torch.empty(size // 4, device=device))
        return [(_row(case, "copy", "yardstick", Work(moved, 0)), run)]
    if case.product is not None:
        run, flops = timing.product_function(*case.product(case.shape), case.dtype, device)
        return [(_row(case, "product", "yardstick", Work(0, flops)), run)]
    return []


def _time(
    case: Case,
    device: torch.device,
    settings: Settings,
    runners: list[_Runner],
    yardsticks: list[tuple[Row, Callable[[], object]]],
) -> None:
    """Warms everybody up by time, then rounds in which each has its turn, from another one on each time."""
    everybody = [(x.row, x.run, x.around) for x in runners]
    everybody += [(row, run, contextlib.nullcontext) for row, run in yardsticks]

    def once(row: Row, run: Callable[[], object], around: Callable[[], Any]) -> float | None:
        try:
            with around():
                return settings.timer(run, device)
        except Exception as error:
            row.failure, row.seconds = said(error), []
            return None

    for entry in everybody:
        spent = 0.0
        while spent < settings.warmup and (taken := once(*entry)) is not None:
            spent += taken
    spent = 0.0
    for turn in range(settings.most_rounds):
        if turn >= settings.fewest_rounds and spent >= settings.seconds:
            break
        begin = turn % max(len(everybody), 1)
        for entry in everybody[begin:] + everybody[:begin]:
            row = entry[0]
            if row.failure is None and (taken := once(*entry)) is not None:
                row.seconds.append(taken)
                spent += taken


def _shares(rows: list[Row], rates: dict[str, float]) -> None:
    """Of the yardstick that took turns, else of the machine's rate in this run."""
    bare = {row.way: row for row in rows if row.kind == "yardstick" and row.seconds}
    for row in rows:
        if row.kind == "yardstick" or not row.seconds:
            continue
        copy = bare["copy"].bytes / bare["copy"].median / 1e9 if "copy" in bare else rates.get("copy_GB_per_s")
        key = f"{row.dtype}_GFLOP_per_s"
        product = bare["product"].flops / bare["product"].median / 1e9 if "product" in bare else rates.get(key)
        row.share_of_copy = row.bytes / row.median / 1e9 / copy if copy else None
        row.share_of_products = row.flops / row.median / 1e9 / product if product else None


def machine_rates(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """What this machine copies (GB/s, read and written) and multiplies (GFLOP/s of square matrices) now."""
    large = device.type == "cuda"
    size = (2 << 30) if large else (64 << 20) if quick else (256 << 20)
    width = 8192 if large else 1024 if quick else 2048
    copy, moved = timing.copy_function(torch.empty(size // 4, device=device))
    functions: dict[str, Callable[[], object]] = {"copy": copy}
    flops = 0
    for dtype in (torch.float32, torch.bfloat16):
        functions[str(dtype).removeprefix("torch.")], flops = timing.product_function(
            width, width, width, dtype, device
        )
    times = timing.interleaved(functions, device, rounds=5)
    rates = {f"{name}_GFLOP_per_s": flops / taken / 1e9 for name, taken in times.items() if name != "copy"}
    return {"copy_GB_per_s": moved / times["copy"] / 1e9, **rates}


# ---- On a GPU ----


def _synchronize(device: torch.device) -> None:
    """A kernel's error shows where it is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpu_figures(device: torch.device, settings: Settings, runners: list[_Runner], small: bool) -> None:
    for runner in runners:
        with runner.around():
            runner.row.launches = _launches(runner.run, device)
            if small:
                try:
                    runner.row.graph_seconds = _graph_seconds(runner.steps, device, settings)
                except Exception as error:
                    runner.row.graph_failure = said(error)


def _launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that one call starts."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize(device)
    return sum(event.count for event in profiler.key_averages() if event.device_type == torch.profiler.DeviceType.CUDA)


def _graph_seconds(steps: list[Step], device: torch.device, settings: Settings) -> float:
    """The median of replays, a graph for each set of inputs."""
    graphs: list[torch.cuda.CUDAGraph] = []
    for one in steps:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            one()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        graphs.append(graph)
    turns = itertools.cycle(graphs)
    times = [settings.timer(lambda: next(turns).replay(), device) for _ in range(10 * len(graphs))]
    return statistics.median(times[len(graphs) :])


# ---- A run ----


def run_all(
    cases: list[Case],
    device: torch.device,
    settings: Settings,
    *,
    quick: bool = False,
    deadline: Callable[[], bool] = lambda: False,
    tell: Callable[[Case], None] = lambda case: None,
    done: Callable[[Run], None] = lambda run: None,
) -> Run:
    """All ``cases`` one after the other; those that come after ``deadline()`` is true are left out, and named.

    ``tell`` hears of every case before it begins, ``done`` of the run as it is after it.
    """
    described, versions = machine(device)
    rates = machine_rates(device, quick=quick)
    run = Run(described, versions, {**settings.plain(), "backends": list(settings.backends), "quick": quick}, rates)
    for case in cases:
        if deadline():
            run.left_out.append(case.name)
            continue
        tell(case)
        rows, missing = measure(case, device, settings, rates)
        run.rows += rows
        run.not_installed |= missing
        done(run)
    return run
