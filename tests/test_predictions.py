"""bench/PREDICTIONS.md: that it is what its formulas say now, and that every case runs."""

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def predictions():
    spec = importlib.util.spec_from_file_location("predictions", BENCH / "predictions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(predictions):
    written = (BENCH / "PREDICTIONS.md").read_text()
    assert written == predictions.page(predictions.cases()), "run python bench/predictions.py"


def test_floors_are_those_of_the_issue(predictions):
    """KL + gradient at 8192 x 128256: 2.10 ms; linear KL at hidden 4096: 43.0 ms; top-k: 0.70 ms."""
    floors = {case.name: case.floor * 1e3 for case in predictions.cases()}
    assert floors["forward_kl loss + gradient, 8192 x 128256"] == pytest.approx(2.10, abs=0.01)
    assert floors["linear_distillation_loss forward + backward, 8192 x 4096 -> 128256"] == pytest.approx(43.0, abs=0.1)
    assert floors["topk_logprobs k = 50, bfloat16, 8192 x 128256"] == pytest.approx(0.70, abs=0.01)


def test_nothing_is_expected_below_its_floor(predictions):
    for case in predictions.cases():
        assert case.expected > case.floor, case.name


def test_verdicts(predictions):
    case = predictions.cases()[0]
    assert predictions.verdict(case, case.expected) == "as expected"
    assert predictions.verdict(case, 2 * case.expected) == "REFUTED"
    assert predictions.verdict(case, 0.5 * case.floor).startswith("FASTER")


def test_every_case_runs_and_is_printed(predictions, monkeypatch, capsys, threads):
    threads(1)
    monkeypatch.setattr(predictions, "SMALL", True)
    found = predictions.cases()
    predictions.measure(found)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(found)
    assert all(case.name in printed for case in found)
