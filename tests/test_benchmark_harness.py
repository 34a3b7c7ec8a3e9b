"""The harness of `pyalign bench`: turns, failures, errors, JSON, verdicts, the command. No timing is asserted."""

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalign._options import OptionError
from pyalign.benchmark import compare, fixture, plots, report, results
from pyalign.benchmark.case import Case, Draw, Inputs, Shape, Way, Work, way
from pyalign.benchmark.cases import SYSTEMS, all_cases, distill, linear, ranking
from pyalign.benchmark.measure import Settings, measure, run_all
from pyalign.benchmark.peers import peer
from pyalign.benchmark.results import Row, Run

CPU = torch.device("cpu")


def make(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    return {"x": draw.normal(shape["n"], dtype=dtype)}


def square(inputs: Inputs) -> Tensor:
    return inputs["x"].square().sum()


def fails(inputs: Inputs) -> Tensor:
    raise RuntimeError("no driver\nand a second line")


def case_of(*others: Way, **changes: object) -> Case:
    """The sum of squares: ours, plain torch and others."""
    case = Case(
        system="distill", op="square", variant="", shape={"n": 64}, dtype=torch.float32, leaves=("x",), make=make,
        ours=square, eager={"eager": lambda x: (x["x"] * x["x"]).sum()}, others=others,
        work=lambda case: Work(8 * case.elements(), 3 * case.elements()), checked_at={}, tiny={}, compiled=False,
        bound="calls", quick={},
    )  # fmt: skip
    return case.replaced(**changes)


class Clock:
    """A timer that runs the function and says what it was told to, by the order of the calls."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, function: Callable[[], object], device: torch.device) -> float:
        function()
        self.calls += 1
        return self.seconds[(self.calls - 1) % len(self.seconds)]


def settings(**changes: object) -> Settings:
    defaults = Settings(
        seconds=0.0, warmup=0.0, fewest_rounds=3, backends=("cpu",), compiled=False, keep_memory=False, memory=False,
        timer=Clock(0.5),
    )  # fmt: skip
    return dataclasses.replace(defaults, **changes)


def by_way(rows: list[Row]) -> dict[str, Row]:
    return {row.way: row for row in rows}


# ---- Measuring ----


def test_everybody_takes_turns_from_another_one_on_each_round():
    calls: list[str] = []

    def heard(name: str) -> Way:
        def run(inputs: Inputs) -> Tensor:
            calls.append(name)
            return square(inputs)

        return way(name, "peer", run)

    case = case_of(heard("a"), heard("b"), eager={"eager": heard("eager").load()}, ours=heard("ours").load())
    rows, _ = measure(case, CPU, settings(errors=False))
    first_calls, rounds = calls[:4], calls[4:]
    assert first_calls == ["ours", "eager", "a", "b"]
    assert rounds == ["ours", "eager", "a", "b", "eager", "a", "b", "ours", "a", "b", "ours", "eager"]
    assert [len(row.seconds) for row in rows] == [3, 3, 3, 3]


def test_rounds_go_on_until_the_time_is_spent():
    rows, _ = measure(case_of(), CPU, settings(seconds=10.0, timer=Clock(0.5)))
    assert len(rows[0].seconds) == 10  # rounds of two ways at half a second
    rows, _ = measure(case_of(), CPU, settings(seconds=10.0, most_rounds=4))
    assert len(rows[0].seconds) == 4


def test_each_way_warms_up_by_time():
    clock = Clock(0.25)
    measure(case_of(), CPU, settings(warmup=1.0, timer=clock))
    assert clock.calls == 2 * 4 + 2 * 3


def test_a_way_that_fails_is_a_row_with_its_error():
    rows, missing = measure(case_of(way("broken", "peer", fails)), CPU, settings())
    found = by_way(rows)
    assert found["broken"].failure == "RuntimeError: no driver"
    assert found["broken"].seconds == []
    assert not missing
    assert found["pyalign (cpu)"].failure is None
    assert len(found["pyalign (cpu)"].seconds) == 3


def test_a_way_that_fails_later_is_a_failure_without_figures():
    calls = iter(range(100))

    def breaks(inputs: Inputs) -> Tensor:
        return square(inputs) if next(calls) < 2 else fails(inputs)

    row = by_way(measure(case_of(way("breaks", "peer", breaks)), CPU, settings(errors=False))[0])["breaks"]
    assert row.failure == "RuntimeError: no driver"
    assert row.seconds == []


def test_a_package_that_is_not_installed_is_named_and_left_out():
    absent = peer("absent", "absent-package", "pyalign_has_no_such_module", lambda module: square)
    rows, missing = measure(case_of(absent), CPU, settings())
    assert "absent" not in by_way(rows)
    assert "absent-package is not installed" in missing["absent-package"]


def test_an_installed_package_that_lacks_one_of_its_own_is_a_failure():
    lame = peer("lame", "torch", "pyalign_has_no_such_module", lambda module: square)
    rows, missing = measure(case_of(lame), CPU, settings())
    assert by_way(rows)["lame"].failure == "ModuleNotFoundError: No module named 'pyalign_has_no_such_module'"
    assert not missing


def test_a_package_that_fails_to_import_otherwise_is_a_failure():
    def load() -> Callable[[Inputs], Tensor]:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    rows, missing = measure(case_of(Way("broken", "peer", load, "broken-package")), CPU, settings())
    assert by_way(rows)["broken"].failure == "ImportError: libcuda.so.1: cannot open shared object file"
    assert not missing


def test_a_backend_that_cannot_serve_says_so():
    row = measure(distill.call_overhead(CPU)[0], CPU, settings(backends=("cuda",), peers=False))[0][0]
    assert row.way == "pyalign (cuda)"
    assert "can't serve this call: the tensors are on cpu" in (row.failure or "")


def test_errors_are_those_of_values_and_gradients():
    def biased(inputs: Inputs) -> Tensor:
        return 1.5 * square(inputs)

    def blind(inputs: Inputs) -> Tensor:
        return square(inputs) * float("nan")

    found = by_way(measure(case_of(way("biased", "peer", biased), way("blind", "peer", blind)), CPU, settings())[0])
    assert found["biased"].value_error == pytest.approx(0.5)
    assert found["biased"].gradient_error == pytest.approx(0.5)
    assert math.isnan(found["blind"].value_error or 0.0)
    assert 0 <= (found["pyalign (cpu)"].value_error or 0.0) < 1e-6


def test_a_result_of_another_shape_is_a_failure():
    rows, _ = measure(case_of(way("vector", "peer", lambda x: x["x"].square().sum()[None])), CPU, settings())
    assert by_way(rows)["vector"].failure == "ValueError: its results have shapes [(1,)], not [()]"


def test_a_bare_part_of_the_work_has_no_errors_and_needs_no_gradient():
    row = by_way(measure(case_of(way("part", "bare", lambda x: x["x"].detach() * 2)), CPU, settings())[0])["part"]
    assert row.failure is None
    assert row.value_error is None
    assert len(row.seconds) == 3


def test_shares_are_of_the_yardstick_that_took_turns():
    rows, _ = measure(case_of(bound="memory"), CPU, settings(timer=Clock(1.0)))
    found = by_way(rows)
    assert found["copy"].kind == "yardstick"
    assert found["pyalign (cpu)"].share_of_copy == pytest.approx(8 * 64 / found["copy"].bytes)
    rates = {"copy_GB_per_s": 2.0, "float32_GFLOP_per_s": 4.0}
    row = measure(case_of(), CPU, settings(timer=Clock(1.0)), rates)[0][0]
    assert row.share_of_copy == pytest.approx(8 * 64 / 2e9)
    assert row.share_of_products == pytest.approx(3 * 64 / 4e9)


def test_a_product_takes_turns_with_what_products_bound():
    case = linear.cross_entropies(CPU)[0]
    rows, _ = measure(case.at(case.tiny), CPU, settings(peers=False, timer=Clock(1.0)))
    found = by_way(rows)
    assert found["product"].flops == 2 * 8 * 16 * 100
    assert found["pyalign (cpu)"].share_of_products == pytest.approx(3)  # three products in the time of one
    assert found["bare products of 512"].failure is None


def test_inputs_are_rotated():
    seen: list[float] = []

    def ours(inputs: Inputs) -> Tensor:
        seen.append(float(inputs["x"].detach()[0]))
        return square(inputs)

    measure(case_of(ours=ours), CPU, settings(errors=False, fewest_rounds=4, most_sets=3))
    assert len(set(seen)) == 3
    assert seen[:2] == seen[3:]


def test_cases_after_the_deadline_are_named():
    times, kept = iter([False, True]), list[int]()
    two = [case_of(), case_of(op="cube")]
    run = run_all(
        two, CPU, settings(), quick=True, deadline=lambda: next(times), done=lambda run: kept.append(len(run.rows))
    )
    assert kept == [2]
    assert list(run.cases()) == ["square/64/float32/backward"]
    assert run.left_out == ["cube/64/float32/backward"]


def test_under_pytest_benchmark_a_case_leaves_its_figures():
    class Benchmark:
        disabled, extra_info, timed = False, dict[str, Any](), 0

        def pedantic(self, function: Callable[[], object], *, rounds: int, warmup_rounds: int) -> None:
            function()
            self.timed += 1

    benchmark = Benchmark()
    case = case_of(way("broken", "peer", fails))
    fixture.run(benchmark, case, CPU, **{**settings().plain(), "timer": Clock(0.5, 1.0)})
    info = benchmark.extra_info
    assert benchmark.timed == 1
    assert info["broken_failed"] == "RuntimeError: no driver"
    assert info["over_eager"] == info["eager_ms"] / info["pyalign_(cpu)_ms"]
    assert (info["bytes"], info["flops"]) == (512, 192)


# ---- The cases ----


def test_names_are_unique():
    names = [case.name for case in all_cases(CPU)]
    assert len(set(names)) == len(names)
    assert {case.system for case in all_cases(CPU)} == set(SYSTEMS)


@pytest.mark.parametrize("case", all_cases(CPU), ids=str)
def test_ours_and_torch_compute_what_float64_does(case: Case):
    fixture.check(case, CPU)


def test_a_wrong_way_is_found():
    with pytest.raises(AssertionError, match=r"pyalign \(cpu\): error 1.0e\+00; wanted at most 0.0001"):
        fixture.check(case_of(ours=lambda x: 2 * square(x)), CPU)
    with pytest.raises(AssertionError, match="RuntimeError: no driver"):
        fixture.check(case_of(ours=fails), CPU)


def test_work_is_what_any_implementation_must_do():
    kl = distill.kl(CPU)[0]
    assert kl.work(kl).bytes == 3 * 1024 * 32000 * 4
    forward, backward = (case.work(case) for case in (SYSTEMS["logprob"](CPU)[0], SYSTEMS["logprob"](CPU)[3]))
    assert (forward.bytes, backward.bytes) == (1024 * 32000 * 4, 3 * 1024 * 32000 * 4)
    products = [case.work(case).flops for case in (linear.cross_entropies(CPU)[0], linear.distillations(CPU)[0])]
    assert products == [3 * 2 * 1024 * 576 * 49152, 4 * 2 * 1024 * 576 * 49152]
    group = ranking.one_large_group()[0]
    assert group.work(group).bytes == 4096 * (4 + 8 + 4)


@pytest.mark.slow
def test_peers_compute_the_same_or_say_why_not():
    """trl's ways run on a CPU; Triton kernels of peers that are installed do in its interpreter, as far as it goes."""
    pytest.importorskip("trl")
    with_trl = 0
    for case in all_cases(CPU):
        if case.dtype != torch.float32 or all(other.kind != "peer" for other in case.others):
            continue
        alone = case.at(case.tiny).replaced(checked_at={}, bound="calls", product=None)
        for found in measure(alone, CPU, settings(most_sets=1))[0]:
            if found.kind == "peer" and found.failure is None:
                assert (found.value_error or 0.0) < 1e-5, found
                assert (found.gradient_error or 0.0) < 1e-5, found
                with_trl += found.way == "trl"
            elif found.way == "trl":
                pytest.fail(f"{found.case}: {found.failure}")
    assert with_trl == 9


# ---- Results ----


def row(way: str, kind: str, seconds: list[float], case: str = "square", **changes: object) -> Row:
    described = (case, "distill", "square", "", {"n": 64}, "float32", True)
    return dataclasses.replace(Row(*described, way, kind, 512, 192, seconds=seconds), **changes)


def run_of(*rows: Row, **machine: object) -> Run:
    described = {"device": "cpu", "cpu": "Abacus 5", "gpu": None, "threads": 2, "huge_pages_for_tensors": False}
    rates = {"copy_GB_per_s": 20.0, "float32_GFLOP_per_s": 300.0, "bfloat16_GFLOP_per_s": 900.0}
    return Run({**described, **machine}, {"pyalign": "1", "torch": "2.13.0"}, {"quick": True}, rates, list(rows))


def around(median: float, spread: float = 0.01, count: int = 31) -> list[float]:
    return [median * (1 + spread * (i - count // 2) / (count // 2)) for i in range(count)]


def test_median_and_spread():
    timed = row("pyalign (cpu)", "pyalign", [1.0, 2.0, 3.0, 4.0, 5.0])
    assert timed.median == 3.0
    assert timed.spread == pytest.approx(1 / 3)
    assert row("pyalign (cpu)", "pyalign", [1.0]).spread == 0.0


def test_json_gives_back_what_it_was_given(tmp_path: Path):
    timed = row("pyalign (cpu)", "pyalign", [1.0, 2.0], value_error=float("nan"), gradient_error=1e-7, peak_bytes=7)
    run = run_of(timed, row("liger", "peer", [], failure="RuntimeError: no driver"))
    run.not_installed, run.left_out, run.took = {"a": "b"}, ["cube"], 3.0
    results.save(run, tmp_path / "run.json")
    assert "NaN" not in (tmp_path / "run.json").read_text()
    again = results.load(tmp_path / "run.json", "compare")
    assert math.isnan(again.rows[0].value_error or 0.0)
    again.rows[0].value_error = run.rows[0].value_error = None
    assert again == run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; wanted what --json wrote"),
        ("{", "is not what --json wrote"),
        ('{"format": 99}', "is of another format; wanted format 1"),
        ('{"format": 1}', "is not what --json wrote"),
        ("[]", "is not what --json wrote"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(OptionError, match=f"compare: .*{message}"):
        results.load(tmp_path / "run.json", "compare")


# ---- Verdicts ----


def verdict(old: list[Row], new: list[Row], **options: float) -> compare.Verdict:
    return compare.compare(run_of(*old), run_of(*new), **options)[0]


def pair(ours: list[float], eager: list[float]) -> list[Row]:
    return [row("pyalign (cpu)", "pyalign", ours), row("eager", "torch", eager)]


def test_a_change_beyond_the_noise_is_a_verdict():
    before = pair(around(1.0), around(4.0))
    slower = verdict(before, pair(around(1.3), around(4.0)))
    assert slower.verdict == "slower"
    assert slower.ratio == pytest.approx(1.3)
    assert slower.low is not None
    assert slower.high is not None
    assert slower.low < 1.3 < slower.high
    assert verdict(before, pair(around(0.7), around(4.0))).verdict == "faster"
    assert verdict(before, pair(around(1.02), around(4.0))).verdict == "same"


def test_a_change_within_the_noise_is_none():
    before = pair(around(1.0, 0.8, 5), around(4.0))
    assert verdict(before, pair(around(1.3, 0.8, 5), around(4.0))).verdict == "unclear"


def test_a_small_change_counts_where_the_tolerance_is_small():
    before, after = pair(around(1.0, 0.001), around(4.0, 0.001)), pair(around(1.05, 0.001), around(4.0, 0.001))
    assert verdict(before, after, tolerance=0.1).verdict == "same"
    assert verdict(before, after, tolerance=0.01).verdict == "slower"


def test_a_slower_machine_is_no_slower_pyalign():
    found = verdict(pair(around(1.0), around(4.0)), pair(around(2.0), around(8.0)))
    assert found.verdict == "same"
    assert found.drift == pytest.approx(2.0)
    alone = verdict(pair(around(1.0), around(4.0)), pair(around(1.0), around(2.0)))
    assert alone.verdict == "unclear"  # the others got faster; is it the machine?


def test_another_torch_tells_nothing_of_the_machine():
    old, new = run_of(*pair(around(1.0), around(4.0))), run_of(*pair(around(2.0), around(8.0)))
    new.versions["torch"] = "2.14.0"
    assert compare.compare(old, new)[0].verdict == "slower"
    copies = [row("copy", "yardstick", around(x)) for x in (1.0, 2.0)]
    old.rows.append(copies[0])
    new.rows.append(copies[1])
    assert compare.compare(old, new)[0].verdict == "same"


def test_failures_and_cases_that_come_and_go():
    works, broken = row("pyalign (cpu)", "pyalign", around(1.0)), row("pyalign (cpu)", "pyalign", [], failure="E: x")
    assert verdict([works], [broken]).verdict == "fails now"
    assert verdict([broken], [works]).verdict == "works now"
    assert verdict([broken], [broken]).verdict == "fails still"
    assert verdict([], [works]).verdict == "new"
    assert verdict([works], []).verdict == "gone"
    late = run_of()
    late.left_out = ["square"]
    assert compare.compare(run_of(works), late)[0].verdict == "not run"
    assert set(compare.WORSE) == {"slower", "less accurate", "fails now"}


@pytest.mark.parametrize("name", ["value_error", "gradient_error"])
def test_a_larger_error_is_worse_however_fast(name: str):
    before, faster = row("pyalign (cpu)", "pyalign", around(1.0)), row("pyalign (cpu)", "pyalign", around(0.5))
    assert verdict([dataclasses.replace(before, **{name: 1e-7})], [faster]).verdict == "faster"
    for error, wanted in ((1.5e-7, "faster"), (1e-3, "less accurate"), (float("nan"), "less accurate")):
        old, new = (dataclasses.replace(x, **{name: e}) for x, e in ((before, 1e-7), (faster, error)))
        assert verdict([old], [new]).verdict == wanted


def test_runs_of_two_machines_are_not_compared(tmp_path: Path):
    old, new = run_of(row("pyalign (cpu)", "pyalign", around(1.0)), threads=8), run_of()
    old.settings["keep_memory"] = True
    path = tmp_path / "old.json"
    results.save(old, path)
    with pytest.raises(OptionError, match=r"compare: .*old.json was measured with threads 8, this run with 2"):
        compare.load(path, "compare", new.machine, keep_memory=True)
    with pytest.raises(
        OptionError, match=r"compare: .*old.json was measured with keep_memory True, this run with False"
    ):
        compare.load(path, "compare", old.machine, keep_memory=False)
    assert compare.load(path, "compare", old.machine, keep_memory=True) == old


# ---- What is shown ----


def shown(*things: object) -> str:
    console = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())
    for thing in things:
        console.print(thing)
    return console.export_text()


def failing_run() -> Run:
    return run_of(
        row("pyalign (cpu)", "pyalign", [0.002, 0.002], value_error=1e-7, peak_bytes=1 << 21, share_of_copy=0.5),
        row("eager", "torch", [0.006, 0.006]),
        row("liger", "peer", [], failure="RuntimeError: 0 active drivers ([])."),
    )


def test_the_table_shows_figures_and_failures():
    text = shown(*report.tables(failing_run()))
    ours, eager, failed = (next(x for x in text.splitlines() if x.startswith(y)) for y in ("pyalign", "eager", "liger"))
    assert all(x in ours for x in ("2 ms", "1.00 x", "50 %", "2 MiB", "1.0e-07"))
    assert "3.00 x" in eager
    assert failed.strip() == "liger  failed: RuntimeError: 0 active drivers ([])."


def test_what_was_left_out_is_said():
    run = failing_run()
    run.not_installed, run.left_out = {"quack": "quack can't be imported"}, ["cube"]
    assert report.closing(run) == [
        "left out: quack can't be imported",
        "not run, because the time was up: cube",
    ]
    assert "Abacus 5, 2 threads" in report.heading(run)[0]


def test_pictures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    written = plots.draw(failing_run(), tmp_path / "plots")
    assert [x.name for x in written] == ["roofline.png", "speedups.png"]
    assert all(x.read_bytes().startswith(b"\x89PNG") for x in written)
    texts = [x.get_text() for x in plots.speedups(failing_run()).axes[0].texts]
    assert "failed" in texts
    assert "3.00 x ± 0 %" in texts
    assert plots.draw(run_of(), tmp_path / "none") == []


# ---- The command ----

TINY_CASE = "distillation_loss/forward_kl/8x32/float32/backward"


def invoke(*arguments: str) -> tuple[int, str]:
    """The exit code and all output."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from pyalign.cli import build_app

    result = CliRunner().invoke(build_app(), ["bench", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.usefixtures("unpoisoned")
def test_quick_run_of_one_case_and_a_comparison_with_it(tmp_path: Path):
    pytest.importorskip("matplotlib")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    options = ("--quick", "--device", "cpu", "--case", TINY_CASE, "--no-peers", "--seconds", "0.01")
    code, output = invoke(*options, "--json", str(old), "--plots", str(tmp_path / "plots"))
    assert code == 0, output
    assert TINY_CASE in output
    assert "1 cases in" in output
    assert (tmp_path / "plots" / "speedups.png").is_file()
    run = results.load(old, "compare")
    assert [x.way for x in run.rows] == ["pyalign (cpu)", "eager"]
    assert run.settings["quick"] is True
    assert run.versions["torch"] == torch.__version__

    content = json.loads(old.read_text())
    for measured in content["rows"]:
        if measured["kind"] == "pyalign":  # a thousandth of the time then, and torch as it was
            measured["seconds"] = [x / 1000 for x in measured["seconds"]]
    new.write_text(json.dumps(content))
    code, output = invoke(*options, "--compare", str(new))
    assert code == 1, output
    assert "slower" in output


def test_list_names_the_cases_and_measures_nothing():
    code, output = invoke("--list", "--device", "cpu")
    assert code == 0
    assert output.splitlines() == [case.name for case in all_cases(CPU)]
    quick = invoke("--list", "--device", "cpu", "--quick", "--system", "ranking")[1].splitlines()
    assert "ranked_preference_loss/ragged/1000/float32/backward" in quick
    ranking = {case.op for case in all_cases(CPU) if case.system == "ranking"}
    assert {name.partition("/")[0] for name in quick} == ranking


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--system", "chess"), "--system: got 'chess'; wanted one of distill, logprob, linear, ranking, scoring"),
        (("--case", "chess"), "--case: got 'chess', which is in no case's name; --list prints them"),
        (("--backend", "chess"), "--backend: got 'chess'; wanted one of cpu, cuda, triton, reference"),
        (("--device", "chess"), "--device: got 'chess'; wanted auto, cpu, or cuda"),
        (("--seconds", "0"), "--seconds: got 0.0; wanted a positive number"),
        (("--tolerance", "-1"), "--tolerance: got -1.0; wanted a positive number"),
        (("--compare", "absent.json"), "--compare: absent.json is not a file; wanted what --json wrote"),
    ],
)
def test_refusals_name_the_option(arguments: tuple[str, ...], message: str):
    code, output = invoke(*arguments)
    assert code == 1
    assert output.strip() == f"pyalign bench: {message}"
