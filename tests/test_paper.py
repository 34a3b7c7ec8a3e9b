"""bench/paper: sources and tasks, statistics, resuming, the report, and a micro run of each experiment."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # `python -m bench.paper` runs at the root, where bench is a namespace package

from bench.paper import __main__ as command  # noqa: E402
from bench.paper import context, objectives, pmp, runs, statistics, tasks, training  # noqa: E402
from bench.paper.experiment import PRESETS, Preset, find  # noqa: E402
from bench.paper.model import _rotate  # noqa: E402
from bench.paper.report import Claim, Section, assemble  # noqa: E402
from bench.paper.runs import Store, Unit  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpoisoned", "single_thread")

MINIATURES = ("objectives", "pmp", "context")  # those with a real model: test_paper_real.py
SOURCE = {"kind": "bigram", "vocab": 8, "spread": 1.3}
MICRO = Preset("quick")
MICRO_SETTINGS = {
    objectives: objectives.Settings(
        ((8, 1, 1), (16, 1, 1)), seeds=2, steps=2, batch=8, length=8, test=50, tasks=("tokens", "sort"), vocab=8
    ),
    pmp: pmp.Settings(
        (16, 1, 1), seeds=2, length=8, pretraining_steps=10, pretraining_batch=16, pmp_steps=100, pmp_batch=32,
        counts=(64,), factors=(0.01, 0.3), test=400, validation=100, vocab=8, rate=1e-2, pmp_factor=1.0,
    ),
    context: context.Settings((16, 1, 1), 2, 2, 4, 2, 6, 5, 8, steps=4, test=20, vocab=8, batch=4),
}  # fmt: skip


@pytest.fixture
def micro(monkeypatch):
    for module, settings in MICRO_SETTINGS.items():
        monkeypatch.setitem(module.SETTINGS, "quick", settings)


def run(names, tmp_path, out="out"):
    return command.run(names, MICRO, Store(tmp_path / "work"), tmp_path / out, 0)


# Sources and tasks


def test_probabilities_of_a_source_sum_to_one_over_all_sequences():
    source = tasks.BigramSource(4, 1.3, seed=0)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    assert float(source.logprob(every).exp().sum()) == pytest.approx(1.0, rel=1e-12)


def test_draws_follow_the_probabilities():
    source = tasks.BigramSource(4, 1.3, seed=0)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    x = source.draw(100_000, 3, tasks.generator(0))
    share = torch.bincount(x @ torch.tensor([16, 4, 1]), minlength=64).double() / len(x)
    p = source.logprob(every).exp()
    assert float(((share - p) / (p * (1 - p) / len(x)).sqrt()).abs().max()) < 4.5


def test_seeds_give_other_sources_and_the_same_seed_the_same():
    draws = [tasks.BigramSource(8, 1.3, seed).draw(4, 6, tasks.generator(1)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_text_is_held_out_and_a_changed_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 90_000 + b"b" * 10_000)
    source = tasks.make_source(tasks.text_config(path), 0)
    assert set(source.draw(100, 8, tasks.generator(0)).unique().tolist()) == {ord("a")}
    assert set(source.draw(100, 8, tasks.generator(0), held_out=True).unique().tolist()) == {ord("b")}
    assert float(source.logprob(torch.tensor([[97, 97, 97]]))) == pytest.approx(0.0, abs=1e-3)
    config = tasks.text_config(path)
    path.write_bytes(b"c" * 100_000)
    with pytest.raises(ValueError, match="isn't that of the configuration"):
        tasks.TextSource(Path(config["path"]), config["digest"])


def test_text_that_is_missing_or_short_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text: got .*; wanted a file, or a directory"):
        tasks.text_config(tmp_path / "absent")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=r"text: got 5 bytes in .*; wanted 65536"):
        tasks.text_config(tmp_path)


@pytest.mark.parametrize("task", tasks.RANKED)
def test_quality_is_standardised_and_independent_of_likelihood(task):
    source = tasks.make_source(SOURCE, 0)
    quality = tasks.Quality(source, task, 10, 0)
    x = source.draw(40_000, 10, tasks.generator(99))
    q = quality(x)
    assert float(q.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(q.std()) == pytest.approx(1.0, abs=0.03)
    assert float(torch.corrcoef(torch.stack((q, source.logprob(x))))[0, 1]) == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("task", tasks.RANKED)
def test_the_true_quality_orders_every_pair(task):
    source = tasks.make_source(SOURCE, 0)
    quality = tasks.Quality(source, task, 10, 0)
    better, worse = tasks.ranked_pairs(source, quality, 1000, 10, tasks.generator(1))
    assert bool((quality(better) >= quality(worse)).all())
    assert float((quality(better) > quality(worse)).double().mean()) > 0.99
    assert training.measured(quality(better), quality(worse))["accuracy"] > 0.99


@pytest.mark.parametrize("rule", tasks.BINARY)
def test_the_rule_tells_every_right_completion_from_the_wrong_one(rule):
    source = tasks.make_source(SOURCE, 0)
    contexts, right, wrong = tasks.binary_pairs(source, rule, 500, 6, tasks.generator(1))
    for context_row, right_row, wrong_row in zip(contexts.tolist(), right.tolist(), wrong.tolist(), strict=True):
        assert right_row == (sorted(context_row) if rule == "sort" else context_row[::-1])
        assert sum(a != b for a, b in zip(right_row, wrong_row, strict=True)) == 1
    assert int(wrong.max()) < source.vocab


def test_ideal_imitation_has_the_values_derived():
    given = {1: 0.7138, 2: 0.6277, 3: 0.5895, 5: 0.5554, 10: 0.5281}
    assert {s: round(tasks.ideal_accuracy(float(s)), 4) for s in given} == given
    assert tasks.ideal_accuracy(4.9999999) == pytest.approx(tasks.ideal_accuracy(5.0), abs=2e-6)
    assert tasks.ideal_accuracy(0.0) == 1.0


@pytest.mark.parametrize("deviation", [0.5, 1.5, 4.0])
def test_ideal_imitation_against_monte_carlo(deviation):
    rng = np.random.default_rng(0)
    share, logprob = rng.random((2, 1_000_000)), deviation * rng.standard_normal((2, 1_000_000))
    imitator = np.log(share) + logprob  # of winners' density 2 F(q) p0
    right = float(((imitator[0] > imitator[1]) == (share[0] > share[1])).mean())
    assert tasks.ideal_accuracy(deviation) == pytest.approx(right, abs=0.0025)


def test_ideal_imitation_of_a_source_is_near_the_closed_form():
    source = tasks.BigramSource(32, 1.3, 0)
    ideal = tasks.ideal_imitation(source, tasks.Quality(source, "tokens", 14, 0), 14, 0)
    assert ideal.deviation == pytest.approx(
        float(source.logprob(source.draw(20_000, 14, tasks.generator(7))).std()), rel=0.03
    )
    assert ideal.sampled == pytest.approx(ideal.closed_form, abs=0.03)
    assert 0.5 < ideal.closed_form < 0.6


# Model and training


def test_the_model_is_causal_and_rotations_know_distances_alone():
    model = training.build((16, 2, 2), 10, 0, "cpu")
    x = torch.randint(10, (3, 8), generator=tasks.generator(0))
    changed = x.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 10
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])

    a, b = torch.randn(2, 8, generator=tasks.generator(1), dtype=torch.float64)
    angles = torch.arange(20)[:, None] * model.frequencies.double()
    cosine, sine = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    turned = [_rotate(v.expand(20, 8), cosine, sine) for v in (a, b)]
    assert torch.allclose(turned[0][3] @ turned[1][1], turned[0][17] @ turned[1][15])


def test_models_of_one_seed_are_equal_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    first = training.build((16, 1, 1), 10, 0, "cpu")
    assert float(torch.rand(())) == float(torch.manual_seed(5) and torch.rand(()))
    second, other = (training.build((16, 1, 1), 10, seed, "cpu") for seed in (0, 1))
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_imitation_counts_completion_tokens_alone_and_sums_over_each_sequence():
    model = training.build((16, 1, 1), 10, 0, "cpu")
    tokens = torch.randint(10, (4, 9), generator=tasks.generator(0))
    targets = training.targets_from(tokens, 5)
    assert targets[:, :4].eq(training.IGNORED).all()
    assert torch.equal(targets[:, 4:7], tokens[:, 5:8])
    assert targets[:, 7].eq(training.IGNORED).all()
    with torch.no_grad():
        hidden = model(tokens[:, :-1])
    nll = F.cross_entropy(
        (hidden.double() @ model.embedding.weight.detach().double().T).flatten(0, 1),
        tokens[:, 1:].flatten(),
        reduction="none",
    )
    nll = nll.view(4, 8)[:, 4:7]
    for per_sequence, wanted in ((True, nll.sum(1).mean()), (False, nll.mean())):
        loss = training.language_loss(model, hidden, targets, per_sequence=per_sequence)
        assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)
    assert training.mean_logprobs(model, tokens, 5).tolist() == pytest.approx((-nll.mean(1)).tolist(), rel=1e-5)


def test_binarised_pairs_prefer_the_tag_that_is_true():
    special = tasks.specials(tasks.make_source(SOURCE, 0))
    better, worse = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 0]])
    preferred, other = pmp._binarised((better, worse), special)
    b, e, good, bad = special.begin, special.end, special.good, special.bad
    assert preferred.tolist() == [[b, good, 1, 2, e], [b, bad, 5, 6, e], [b, good, 3, 4, e], [b, bad, 7, 0, e]]
    assert other.tolist() == [[b, bad, 1, 2, e], [b, good, 5, 6, e], [b, bad, 3, 4, e], [b, good, 7, 0, e]]


def test_objectives_losses_are_those_of_the_paper():
    model = training.build((16, 1, 1), 13, 0, "cpu")
    good, bad = torch.randint(13, (2, 6, 7), generator=tasks.generator(0))
    with torch.no_grad():
        up, down = (model(x)[:, -1].double() @ model.score.weight[0].double() for x in (good, bad))
    losses = {name: objectives._loss(model, name, 6, 0, good, bad, 1).detach() for name in objectives.OBJECTIVES}
    assert float(losses["pairwise"]) == pytest.approx(float(F.softplus(down - up).mean()), rel=1e-5)
    both = torch.cat((F.softplus(-up), F.softplus(down)))
    assert float(losses["pointwise"]) == pytest.approx(float(both.mean()), rel=1e-5)


def world(**changes):
    settings = dataclasses.asdict(MICRO_SETTINGS[context]) | changes
    return context.World(settings | {"source": SOURCE, "seed": 0, "device": "cpu"})


def test_student_position_t_is_matched_with_the_teacher_behind_the_prompt():
    here = world()
    x = here.text(3, tasks.generator(0))
    model = training.build((16, 1, 1), here.vocab, 0, "cpu")
    batch = here.collate(list(x))
    with torch.no_grad():
        wanted = context._logits(model, here.behind(x, here.prompt))[:, len(here.prompt) : -1]
        found = context._logits(model, batch["teacher_input_ids"]).flatten(0, 1)[
            batch["teacher_rows"][:, :-1].flatten()
        ]
    assert torch.equal(found.view_as(wanted), wanted)
    assert batch["teacher_rows"][:, -1].eq(-1).all()  # what follows X is no token of it
    assert torch.equal(batch["input_ids"], here.behind(x))


def test_a_rule_answers_every_question_and_the_prompt_shows_the_first_rule():
    here = world()
    for answers in here.answers:
        assert sorted(answers.tolist()) == list(range(here.source.vocab + 4, here.source.vocab + 8))
    asked, answered = here.prompt[::2] - here.source.vocab, here.prompt[1::2]
    assert torch.equal(here.answers[0, asked], answered)


# Statistics


def test_mean_interval_is_students():
    found = statistics.mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert found.n == 3
    assert str(statistics.Interval(0.5, 0.25, 0.75, 3)) == "0.500 [0.250, 0.750]"


def test_a_difference_is_told_from_zero_by_its_interval():
    found = [statistics.Interval(0.5, *ends, 3).told() for ends in ((0.1, 0.9), (-0.9, -0.1), (-0.1, 0.9))]
    assert [x.partition(", ")[2].partition("], ")[2] for x in found] == ["above 0", "below 0", "not told from 0"]
    assert statistics.Interval(0.5, math.nan, math.nan, 1).told() == "0.500 (one seed), not told from 0"


def test_intervals_cover_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).standard_normal((2000, 5))
    found = [statistics.mean_interval(row.tolist()) for row in draws]
    assert sum(x.low < 0 < x.high for x in found) / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_interval_and_none_no_mean():
    one = statistics.mean_interval([0.5])
    assert math.isnan(one.low)
    assert str(one) == "0.500 (one seed)"
    with pytest.raises(ValueError, match="values: got none"):
        statistics.mean_interval([])


def test_differences_are_taken_seed_by_seed():
    found = statistics.difference_interval([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_fit_is_the_line_of_each_seed():
    sizes = [10.0, 100.0, 1000.0]
    fit = statistics.fit_log(sizes, [[0.1 + b * math.log10(n) for n in sizes] for b in (0.1, 0.2, 0.3)])
    assert fit.slope[:3] == pytest.approx(statistics.mean_interval([0.1, 0.2, 0.3])[:3])
    assert fit.intercept.mean == pytest.approx(0.1)


# Units


def test_a_units_key_is_its_whole_configuration():
    unit = Unit("objectives", {"seed": 0, "rate": 0.1}, "label", "group", 1.0)
    assert unit.key == dataclasses.replace(unit, label="x", group="y", seconds=2.0, config={"rate": 0.1, "seed": 0}).key
    others = [{"seed": 1, "rate": 0.1}, {"seed": 0, "rate": 0.2}, {"seed": 0}, {"seed": 0, "rate": 0.1, "more": None}]
    keys = {dataclasses.replace(unit, config=config).key for config in others}
    assert len(keys | {unit.key, dataclasses.replace(unit, experiment="pmp").key}) == 6


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("preset", PRESETS)
def test_units_differ_and_their_configuration_is_json(name, preset):
    units = find(name).units(Preset(preset, text=Path(os.__file__)))
    assert len({unit.key for unit in units}) == len({unit.label for unit in units}) == len(units)
    assert all(json.loads(json.dumps(unit.config)) == unit.config for unit in units)
    assert all(unit.seconds > 0 for unit in units)
    seeds = {unit.config["seed"] for unit in units}
    assert len(seeds) >= (3 if preset == "quick" else 5)


def test_states_are_trained_once(tmp_path):
    store, calls = Store(tmp_path), []

    def train():
        calls.append(1)
        return {"x": torch.ones(2)}

    for config in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        assert torch.equal(store.state("kind", config, train)["x"], torch.ones(2))
    assert len(calls) == 2


def test_two_workers_train_a_state_once(tmp_path):
    store, calls = Store(tmp_path), []

    def train():
        calls.append(1)
        time.sleep(0.2)
        return {"x": torch.ones(2)}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: store.state("kind", {"seed": 0}, train)["x"], range(2)))
    assert torch.equal(found[0], found[1])
    assert len(calls) == 1


def test_estimate_is_no_shorter_than_the_longest_group():
    units = [Unit("pmp", {"i": i}, "", group, 10.0) for i, group in enumerate("aaab")]
    assert runs.estimate(units, 2) == 30.0
    assert runs.estimate(units, 1) == 40.0
    assert runs.estimate([], 2) == 0.0


# Runs and reports


def without_times(path):
    return re.sub(r"(?m)^Preset .*$", "", path.read_text())


def test_a_killed_run_goes_on_and_writes_the_same_report(tmp_path, micro, monkeypatch):
    whole = run(["objectives"], tmp_path / "whole")
    trained, kill = [], {"at": 5}
    real = objectives.Objectives.run

    def killed(self, unit, store):
        if len(trained) == kill["at"]:
            raise KeyboardInterrupt
        trained.append(unit.key)
        return real(self, unit, store)

    monkeypatch.setattr(objectives.Objectives, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(["objectives"], tmp_path / "killed")
    units = tmp_path / "killed" / "work" / "units"
    assert len(list(units.iterdir())) == 5
    (units / (trained[0] + ".json.tmp")).write_text('{"half": ')
    kill["at"] = -1
    again = run(["objectives"], tmp_path / "killed")
    assert without_times(again) == without_times(whole)
    assert len(trained) == len(set(trained)) == 2 * 2 * 2 * 3  # seeds, tasks, sizes, objectives: none twice


def test_runs_of_another_configuration_are_not_mixed_in(tmp_path, micro, monkeypatch):
    store = Store(tmp_path / "work")
    for unit in find("objectives").units(MICRO):
        store.keep(unit, {"accuracy": 1.0}, 0.0)
    assert runs.missing(find("objectives").units(MICRO), store) == []
    changed = dataclasses.replace(objectives.SETTINGS["quick"], rate=1e-3)
    monkeypatch.setitem(objectives.SETTINGS, "quick", changed)
    units = find("objectives").units(MICRO)
    assert runs.missing(units, store) == units


def test_objectives_rank_what_imitation_cannot(tmp_path, micro, monkeypatch):
    settings = objectives.Settings(
        ((8, 1, 1), (16, 1, 1)), seeds=2, steps=60, batch=32, length=8, test=500, tasks=("tokens",), vocab=8, rate=1e-2
    )
    monkeypatch.setitem(objectives.SETTINGS, "quick", settings)
    report = run(["objectives"], tmp_path).read_text()
    store = Store(tmp_path / "work")
    found = {}
    for unit in find("objectives").units(MICRO):
        result = store.result(unit)
        found.setdefault((unit.config["task"], unit.config["objective"]), []).append(result["accuracy"])
        assert ("ideal" in result) == (unit.config["objective"] == "imitation")
    means = {key: sum(x) / len(x) for key, x in found.items()}
    assert means["tokens", "pairwise"] > 0.75
    assert means["tokens", "imitation"] < 0.7
    assert means["tokens", "pointwise"] > 0.7
    assert re.search(r"\| tokens \| ranked preference modelling \| 848 \| 0\.\d{3} \[.*\] \| 2 \| 500 pairs \|", report)
    assert (tmp_path / "out" / "objectives.png").read_bytes().startswith(b"\x89PNG")
    for name in ("pmp", "context"):
        assert f"Absent: **{name}**" in report


def test_pmp_helps_where_the_target_agrees_and_hurts_untrained_where_it_conflicts(tmp_path, micro):
    report = run(["pmp"], tmp_path).read_text()
    store = Store(tmp_path / "work")
    found = {}
    for unit in find("pmp").units(MICRO):
        c = unit.config
        found.setdefault((c["arm"], c["head"], c["target"], c["pairs"]), []).append(store.result(unit)["accuracy"])
    assert np.mean(found["ranked", "kept", "agree", 0]) > 0.65
    assert np.mean(found["ranked", "kept", "conflict", 0]) < 0.35
    assert np.mean(found["ranked", "kept", "agree", 64]) > np.mean(found["none", "new", "agree", 64]) + 0.05
    # Language modelling once for a seed, PMP once for each way.
    assert len(list((tmp_path / "work" / "states").glob("*.pt"))) == 2 * 3
    assert "Fine-tuned at the paper's 0.01x" in report
    assert "binarised PMP, head re-initialised" in report


def test_context_distillation_stops_where_the_prompt_does_not_help(tmp_path, micro):
    report = run(["context"], tmp_path).read_text()
    assert "the experiment stopped here" in report
    store = Store(tmp_path / "work")
    for unit in find("context").units(MICRO):
        assert store.result(unit)["helps"] is False
        assert "student" not in store.result(unit)


def test_context_distillation_brings_the_student_to_the_prompted_teacher(tmp_path, micro, monkeypatch):
    settings = context.Settings((32, 2, 2), 1, 2, 8, 4, 8, 400, 32, steps=60, test=50, vocab=48, rate=5e-3)
    monkeypatch.setitem(context.SETTINGS, "quick", settings)
    report = run(["context"], tmp_path).read_text()
    store = Store(tmp_path / "work")
    teacher, *students = [store.result(unit) for unit in find("context").units(MICRO)]
    assert teacher["prompted"]["accuracy"] > 0.9
    assert teacher["plain"]["accuracy"] < 0.8
    assert teacher["plain"]["kl"] > 0.05
    full, fifty, eight = (x["student"] for x in students[:3])
    for student in (full, fifty, eight):
        assert student["kl"] < 0.3 * teacher["plain"]["kl"]
        assert student["accuracy"] > 0.9
    assert "(one seed)" in report
    assert "| top-8 dropped tail |" in report


def test_the_gpu_presets_code_runs_on_real_text(tmp_path, monkeypatch):
    for module, settings in MICRO_SETTINGS.items():
        few = {"pmp_steps": 2, "counts": (16,), "factors": (0.01,)} if module is pmp else {}
        monkeypatch.setitem(module.SETTINGS, "gpu", dataclasses.replace(settings, seeds=1, **few))
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(torch.randint(97, 123, (70_000,), generator=tasks.generator(0)).tolist()))
    path = command.run(MINIATURES, Preset("gpu", "cpu", text), Store(tmp_path / "work"), tmp_path / "out", 0)
    report = path.read_text()
    assert "windows of real text (bytes)" in report
    assert "s and the ideal are those of a bigram model of the text" in report
    assert not any(f"Absent: **{name}**" in report for name in MINIATURES)


def test_the_report_opens_with_claims_and_says_what_is_absent(tmp_path):
    sections = {
        "a": Section("First", "text\n", [Claim("claims | one", "0.5 [0.4, 0.6]", "small", "large")]),
        "b": Section("Second", "more", [Claim("claims two", "0.1 [0.0, 0.2]", "small", "large")]),
    }
    path = assemble(tmp_path, "command", "about", sections, {"c": "3 of its 4 runs are not there"})
    lines = path.read_text().splitlines()
    heads = [line for line in lines if line.startswith("## ")]
    assert heads == ["## Claims", "## First", "## Second"]
    rows = [line for line in lines if line.startswith("| claims")]
    assert rows == [
        r"| claims \| one | 0.5 [0.4, 0.6] | small | large |",
        "| claims two | 0.1 [0.0, 0.2] | small | large |",
    ]
    assert "Absent: **c** (3 of its 4 runs are not there)." in lines
    assert "`command`" in path.read_text()


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alignment"], "EXPERIMENT: got alignment; wanted some of objectives"),
        (["--text", "x"], "--text: got x; wanted none without --gpu"),
        (["--workers", "-1"], "--workers: got -1; wanted 0"),
        (["--gpu"], "--gpu: got no CUDA device; wanted one"),
    ],
)
def test_refusals_name_the_argument(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_work_directory_has_one_writer(tmp_path, capsys):
    with command.exclusive(tmp_path):
        assert command.main(["objectives", "--quick", "--work", str(tmp_path)]) == 1
    assert "is being written by another process" in capsys.readouterr().err


def test_pytest_collects_nothing_here():
    options = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "bench/paper"]
    found = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 5, found.stdout + found.stderr  # no tests, and no file imported


@pytest.mark.slow
def test_the_quick_preset_goes_on_after_a_kill_and_its_report_has_every_section(tmp_path):
    options = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "2"]
    command_line = [sys.executable, "-m", "bench.paper", *MINIATURES, *options]
    killed = subprocess.Popen(command_line, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    units = tmp_path / "work" / "units"
    while not (units.exists() and len(list(units.glob("*.json"))) >= 3):
        assert killed.poll() is None
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)  # its workers too
    killed.wait()
    before = {path.name: path.read_bytes() for path in units.glob("*.json")}
    found = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    assert {name: (units / name).read_bytes() for name in before} == before
    report = (tmp_path / "out" / "report.md").read_text()
    for name in MINIATURES:
        assert f"## {find(name).title}" in report
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"Absent: **{name}**" not in report
    assert "Absent: **tax** (no --hhh)" in report
    assert "nan" not in report


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_its_workers_finish(tmp_path):
    options = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "1"]
    command_line = [sys.executable, "-m", "bench.paper", "objectives", *options]
    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(
        command_line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds
    )
    units = tmp_path / "work" / "units"
    while not (units.exists() and len(list(units.glob("*.json"))) >= 1):
        assert running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "stopped; the same command goes on where it was" in errors
    assert "Traceback" not in errors
    assert not list(units.glob("*.tmp"))
    assert not (tmp_path / "out").exists()
