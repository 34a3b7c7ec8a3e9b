"""bench/paper on a tiny random model of transformers: the alignment tax and the preference model on files."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
from scorer_support import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # `python -m bench.paper` runs at the root, where bench is a namespace package

from bench.paper import __main__ as command  # noqa: E402
from bench.paper import preference, real, tax  # noqa: E402
from bench.paper.experiment import Absent, Preset, find  # noqa: E402
from bench.paper.runs import Store, run_unit  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpoisoned", "single_thread")

TOPICS = ("tea", "cats", "rain", "bread", "sums", "stars", "trains", "songs", "boats", "shoes", "clocks", "snow")


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """A model and data of the forms that the real ones have."""
    directory = tmp_path_factory.mktemp("real")
    model = directory / "tiny"
    make_model("llama", max_position_embeddings=2048).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    pairs = directory / "pairs.jsonl"
    rows = []
    for topic in TOPICS:
        start = f"\n\nHuman: Tell me about {topic}\n\nAssistant:"
        rows.append({"chosen": f"{start} Gladly. {topic}!", "rejected": f"{start} No, not {topic}."})
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hhh = directory / "hhh"
    hhh.mkdir()
    for subset in tax.SUBSETS:
        examples = [{"input": f"{x}?", "target_scores": {f"{x}.": 1, "What?": 0}} for x in TOPICS[:3]]
        (hhh / f"{subset}.json").write_text(json.dumps({"name": subset, "examples": examples}))
    truthful = directory / "truthful.json"
    examples = [{"input": f"{x}?", "target_scores": {"a": 0, "bb": 1, "ccc": 0}} for x in TOPICS[:3]]
    truthful.write_text(json.dumps({"name": "truthful", "examples": examples}))
    problems = directory / "problems.jsonl"
    problem = {
        "task_id": "t/0", "prompt": "def double(x):\n", "entry_point": "double",
        "canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(3) == 6\n",
    }  # fmt: skip
    problems.write_text(json.dumps(problem) + "\n")
    return Preset(
        "quick", model=model, pairs=pairs, hhh=hhh, truthful_qa=truthful, human_eval=problems
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tax.SETTINGS, "quick", tax.Settings(4, 4, sequences=8, chunk=24, layers=1, problems=1))
    settings = preference.Settings(12, 6, seeds=2, folds=3, sizes=(6,), dialogues=2, answer_tokens=4, max_tokens=48)
    monkeypatch.setitem(preference.SETTINGS, "quick", settings)


# The preference model's head


def planted(n: int, width: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (n, 2, width) whose better response is the one with more along a direction, and the direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(width, generator=generator)
    hidden = torch.randn(n, 2, width, generator=generator)
    gap = (hidden[:, 0] - hidden[:, 1]) @ direction + noise * torch.randn(n, generator=generator)
    return torch.where((gap > 0)[:, None, None], hidden, hidden.flip(1)), direction


def test_a_head_finds_a_planted_direction():
    hidden, direction = planted(2000, 8, 0.5, 0)
    weight = preference.fit(hidden, 0.01)
    assert float(torch.cosine_similarity(weight, direction, 0)) > 0.98


def test_the_fit_is_where_its_gradient_is_zero():
    hidden, _ = planted(200, 5, 2.0, 1)
    hidden = hidden.double()
    ridge = 0.1
    head = preference.fit(hidden, ridge)
    spread = hidden.flatten(0, 1).std(0)
    gaps = (hidden[:, 0] - hidden[:, 1]) / spread
    weight = head * spread
    gradient = -(gaps * torch.sigmoid(-(gaps @ weight))[:, None]).mean(0) + ridge * weight
    assert float(gradient.abs().max()) < 1e-5


def test_cross_validation_learns_what_generalises_and_nothing_from_noise():
    groups = [str(i) for i in range(600)]
    hidden, _ = planted(600, 6, 0.3, 2)
    scores = preference.cross_validated(hidden[:, :, None], groups, 3, 0)
    assert float((scores[:, 0] > scores[:, 1]).double().mean()) > 0.85
    noise = torch.randn(600, 2, 1, 6, generator=torch.Generator().manual_seed(3))
    scores = preference.cross_validated(noise, groups, 3, 0)
    right = float((scores[:, 0] > scores[:, 1]).double().mean())
    assert abs(right - 0.5) < 4 * 0.5 / math.sqrt(600)


def test_a_group_is_in_one_fold():
    groups = [str(i // 3) for i in range(300)]
    folds = preference.folds_of(groups, 5, 0)
    assert torch.equal(folds[0::3], folds[1::3])
    assert torch.equal(folds[0::3], folds[2::3])
    assert sorted(folds.unique().tolist()) == [0, 1, 2, 3, 4]
    assert not torch.equal(folds, preference.folds_of(groups, 5, 1))


def test_an_elo_point_is_the_papers():
    assert pytest.approx(173.718, abs=5e-4) == preference.ELO


# Models


def test_hidden_states_are_those_of_each_text_alone(preset: Preset):
    model = real.model_of(preset)
    texts = ["Human: hello", "a", "Human: what is this, and why?"]
    together = real.hidden_states(model, texts, (0.5, 1.0), 12, "cpu")
    network, tokenizer = real.load(model, "cpu")
    for text, found in zip(texts, together, strict=True):
        ids = [*tokenizer(text)["input_ids"][-12:], tokenizer.eos_token_id]
        with torch.inference_mode():
            states = network(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for at, layer in enumerate((1, 2)):
            expected = states[layer][0].float()
            torch.testing.assert_close(found[0, at], expected[-1], rtol=0.05, atol=0.05)
            torch.testing.assert_close(found[1, at], expected.mean(0), rtol=0.05, atol=0.05)


def test_texts_of_the_last_words_are_whole_paragraphs():
    found = real.last_words(None, 5)
    assert len(found) == 5
    assert all(39 <= len(x.context.split()) <= 130 and x.target.strip() for x in found)


# Experiments


def without_interval(text: str) -> list[str]:
    """The cells of a report's tables that are a bare number."""
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    return [cell for cell in cells if re.fullmatch(r"[+-]?\d*\.\d+|[+-]\d+", cell)]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_tax_of_a_tiny_model(preset: Preset, tmp_path: Path):
    experiment, store = find("tax"), Store(tmp_path)
    units = experiment.units(preset)
    assert len({unit.key for unit in units}) == len(units) == 1 + 3 * 3 + 1
    for unit in units:
        run_unit(unit, tmp_path)
    results = [(unit, store.result(unit)) for unit in units]
    by_label = {unit.label: result for unit, result in results}
    for task in ("hhh", "truthful_qa", "last_word"):
        plain, prompted, distilled = (by_label[f"{task}, {variant}"] for variant in tax.VARIANTS)
        assert plain["ids"] == prompted["ids"] == distilled["ids"]
        assert len(plain["ids"]) == (4 if task != "truthful_qa" else 3)
        assert plain["values"] != prompted["values"]
        assert plain["values"] != distilled["values"]
    assert by_label["HumanEval's harness"] == {"problems": 1, "canonical": [1.0], "broken": [0.0]}
    section = experiment.section(results, tmp_path / "report")
    assert (tmp_path / "report" / "tax.png").stat().st_size > 1000
    assert "passes canonical solutions in 1.0000 (0.2065 to 1.0000, n = 1) of the problems" in section.text
    assert re.search(r"nats a token, over \d+ tokens of \d+ texts\)", section.text)
    assert without_interval(section.text) == []
    assert "| harmless |" in section.text
    assert "tiny" in section.claims[0].size
    assert str(preset.model.parent) not in section.text


@pytest.mark.usefixtures("small")
def test_a_preference_model_on_a_tiny_model(preset: Preset, tmp_path: Path):
    experiment, store = find("preference"), Store(tmp_path)
    units = experiment.units(preset)
    assert [unit.config["job"] for unit in units] == ["states"] * 2 + ["language"] + ["heads"] * 2 + ["answers"] * 2
    for unit in units:
        run_unit(unit, tmp_path)
    results = [(unit, store.result(unit)) for unit in units]
    heads = [result for unit, result in results if unit.config["job"] == "heads"]
    assert all(len(head["last"]) == len(head["mean"]) == 12 for head in heads)
    assert heads[0] != heads[1]
    answers = [result for unit, result in results if unit.config["job"] == "answers"]
    assert len(answers[0]["own"]) == 2
    assert answers[0]["rejected"] == answers[1]["rejected"]  # the same head
    section = experiment.section(results, tmp_path / "report")
    assert {"preference_calibration.png", "preference_curve.png"} <= {x.name for x in (tmp_path / "report").iterdir()}
    assert "| rejected | +0 (+0 to +0, n = 2) | +0 (+0 to +0, n = 2) |" in section.text
    assert without_interval(section.text) == []
    assert "12 pairs of pairs.jsonl, read by tiny" in section.text
    assert str(preset.pairs.parent) not in section.text


def test_what_is_missing_is_said(preset: Preset, tmp_path: Path):
    with pytest.raises(Absent, match="no --hhh"):
        find("tax").units(Preset("quick", model=preset.model))
    with pytest.raises(Absent, match="no --pairs"):
        find("preference").units(Preset("quick", model=preset.model))
    assert command.main(["tax", "--quick", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]) == 1


@pytest.mark.slow
def test_the_quick_preset_on_smollm2_and_real_data(tmp_path: Path):
    data = Path(os.environ.get("PYALIGN_PAPER_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "hhh_alignment").is_dir():
        pytest.skip("set PYALIGN_PAPER_DATA to a directory with hhh_alignment, truthful_qa_mc.json and hh-rlhf's pairs")
    try:
        real.model_of(Preset("quick"))
    except Absent as lack:
        pytest.skip(str(lack))
    files = ["--hhh", data / "hhh_alignment", "--truthful-qa", data / "truthful_qa_mc.json"]
    files += ["--pairs", data / "hh_rlhf_harmless_base_test.jsonl.gz"]
    arguments = ["tax", "preference", "--quick", *files, "--work", tmp_path / "work", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.paper", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    for name in ("tax", "preference"):
        assert f"## {find(name).title}" in report
    assert "48 pairs of hh_rlhf_harmless_base_test.jsonl.gz" in report
    assert "HHH comparisons, mean log-prob" in report
