"""bench/choose_kernels.py: what it keeps of what it measured, here of the CPU's engine under names of layouts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyalign import _native, _tables
from pyalign._types import DIVERGENCES

PROGRAM = Path(__file__).resolve().parents[1] / "bench" / "choose_kernels.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("choose_kernels", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """The CPU's, with three layouts, of which ``bad`` is wrong."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad

    def distill_layouts(self, vocab: int, dtype: torch.dtype, divergence: str, device: int) -> list[Any]:
        return [(8, 2), (4, 1), _tables.ONE_BLOCK]

    def topk_distill_layouts(self, vocab: int, dtype: torch.dtype, device: int) -> list[Any]:
        return self.distill_layouts(vocab, dtype, "", device)

    def topk(self, *arguments: Any) -> Any:
        return _native.cpu().topk(*arguments)

    def distill(self, *arguments: Any, gradient: torch.Tensor, **options: Any) -> Any:
        return self._with(_native.cpu().distill, *arguments, gradient=gradient, **options)

    def topk_distill(self, *arguments: Any, gradient: torch.Tensor, **options: Any) -> Any:
        return self._with(_native.cpu().topk_distill, *arguments, gradient=gradient, **options)

    def _with(self, loss: Any, *arguments: Any, gradient: torch.Tensor, **options: Any) -> Any:
        results = loss(*arguments, gradient=gradient, **options)
        if _tables._used["distill"] == self.bad:
            gradient[-1].neg_()
        return results


def test_every_layout_of_every_divergence_is_measured(program: Any, tmp_path: Path):
    found = list(program.distill_entries(Engine(), 64, torch.bfloat16, 5, CPU, rounds=3))
    assert [(x.op, x.divergence) for x, _ in found] == [*(("distill", d) for d in DIVERGENCES), ("topk_distill", "")]
    for x, wrong in found:
        assert not wrong
        assert (x.dtype, x.rows, x.vocab, x.rule) == ("bfloat16", 5, 64, "cluster of 8, 2 stages")
        assert set(x.milliseconds) == {"cluster of 8, 2 stages", "cluster of 4, 1 stage", "one block"}
        assert x.choice in program.line(x, wrong)
    assert not _tables._used
    written = program.table([x for x, _ in found], "A GPU", 0)
    written.save(tmp_path / "table.json")
    assert _tables.load(tmp_path / "table.json") == written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layout_with_other_results_is_left_out(program: Any, dtype: torch.dtype):
    for x, wrong in program.distill_entries(Engine("one block"), 64, dtype, 5, CPU, rounds=1):
        assert wrong == ["one block"]
        assert "one block" not in x.milliseconds
        assert "WRONG, left out: one block" in program.line(x, wrong)


def test_chunks_in_turn_and_overlapped_are_measured(program: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program.linear, "_dtypes", lambda device: [torch.bfloat16])  # a GPU's
    small = {"tokens": 4, "hidden": 8, "vocab": 60}
    cases = program.linear_cases(CPU)
    assert {program.LINEAR[case.op] for case, _ in cases} == set(_tables.LINEAR_OPS)
    for case, divergence in cases:
        x, wrong = program.linear_entry(case.at(small), divergence, CPU, rounds=1)
        assert not wrong
        assert (x.rows, x.hidden, x.vocab, x.rule) == (4, 8, 60, "in turn")
        assert set(x.milliseconds) == set(_tables.LINEAR_CHOICES)


@pytest.fixture
def small(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape at a size that a CPU runs in a moment, in a GPU's dtype."""
    monkeypatch.setattr(program, "VOCABULARIES", (64, 100))
    monkeypatch.setattr(program, "LAUNCH_BYTES", 10_000)
    monkeypatch.setattr(program, "SHAPES", ({"tokens": 4, "hidden": 8, "vocab": 60},))
    monkeypatch.setattr(program.linear, "_dtypes", lambda device: [torch.bfloat16])


@pytest.mark.usefixtures("small")
def test_a_whole_run(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(_tables.VARIABLE, raising=False)
    found = list(program.measured(Engine(), "A GPU", CPU, 90.0))
    assert len(found) == 2 * 2 * (len(DIVERGENCES) + 1) + len(program.linear_cases(CPU))
    assert os.environ.get(_tables.VARIABLE) is None
    written = program.table([x for x, _ in found], "A GPU", 0)
    written.save(tmp_path / "table.json")
    assert _tables.load(tmp_path / "table.json") == written


@pytest.mark.usefixtures("small")
def test_what_there_is_no_time_for_is_named(program: Any, capsys: pytest.CaptureFixture[str]):
    assert not list(program.measured(Engine(), "A GPU", CPU, -1.0))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 2 + len(program.linear_cases(CPU))
    assert printed[0] == "left out for want of time: distillation, bfloat16, rows of 64"


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "--out", str(tmp_path / "table.json")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip() == "no GPU that torch sees: a table is measured on the GPU that it is for"
    assert not (tmp_path / "table.json").exists()
