"""Experiment 2: preference model pre-training between language modelling and little fine-tuning data (section 4).

LM pre-training -> PMP on many ranked pairs, or on the same pairs binarised (``GOOD:A > BAD:A``, ``BAD:B > GOOD:B``) ->
fine-tuning on few pairs of another preference, in one pass. One pairwise loss throughout; PMP adds the language model's
loss on the preferred sequence. The target's quality has the correlation +rho ("agree") or -rho ("conflict") with PMP's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper import tasks, training
from bench.paper.experiment import Preset
from bench.paper.model import Transformer
from bench.paper.report import COLOURS, Claim, Section, blocks, figure, save, table
from bench.paper.runs import Store, Unit
from bench.paper.statistics import Interval, difference_interval, mean_interval
from pyalign import pairwise_preference_loss

REVISION = 1
TARGETS = {"agree": 1.0, "conflict": -1.0}
ARMS = {"none": ("new",), "ranked": ("kept", "new"), "binarised": ("kept", "new")}
"""Pre-training by preferences, and what becomes of its head before fine-tuning."""
PAPER_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Settings:
    shape: tuple[int, int, int]
    seeds: int
    length: int
    pretraining_steps: int
    pretraining_batch: int  # sequences
    pmp_steps: int
    pmp_batch: int  # ranked pairs
    counts: tuple[int, ...]  # of fine-tuning pairs
    factors: tuple[float, ...]  # fine-tuning's learning rates, as multiples of pre-training's
    test: int
    validation: int = 500
    batch: int = 16
    rate: float = 3e-3
    pmp_factor: float = 0.3
    correlation: float = 0.8
    lm_weight: float = 1.0
    task: str = "tokens"
    vocab: int = 32
    spread: float = 1.3


SETTINGS = {
    "quick": Settings(
        (32, 2, 2), seeds=3, length=14, pretraining_steps=150, pretraining_batch=32, pmp_steps=250, pmp_batch=32,
        counts=(100, 500), factors=(0.1, 0.3, 1.0), test=1000,
    ),
    "full": Settings(
        (64, 2, 4), seeds=5, length=14, pretraining_steps=800, pretraining_batch=64, pmp_steps=800, pmp_batch=64,
        counts=(100, 500, 1000, 5000, 10000), factors=(0.01, 0.1, 0.3, 1.0), test=2000,
    ),
    "gpu": Settings(
        (256, 4, 4), seeds=5, length=48, pretraining_steps=2000, pretraining_batch=128, pmp_steps=1500, pmp_batch=64,
        counts=(100, 500, 1000, 5000, 10000), factors=(0.01, 0.1, 1.0), test=4000, rate=1e-3,
    ),
}  # fmt: skip


class PreferencePretraining:
    name = "pmp"
    title = "PMP: preference model pre-training"

    def units(self, preset: Preset) -> list[Unit]:
        s = SETTINGS[preset.name]
        source: dict[str, Any] = {"kind": "bigram", "vocab": s.vocab, "spread": s.spread}
        if preset.name == "gpu":
            source = tasks.text_config(preset.text)
        shared = {
            "revision": REVISION, "source": source, "device": preset.device, "shape": list(s.shape), "length": s.length,
            "pretraining_steps": s.pretraining_steps, "pretraining_batch": s.pretraining_batch, "rate": s.rate,
            "pmp_steps": s.pmp_steps, "pmp_batch": s.pmp_batch, "pmp_factor": s.pmp_factor, "lm_weight": s.lm_weight,
            "task": s.task, "correlation": s.correlation, "batch": s.batch, "test": s.test, "validation": s.validation,
        }  # fmt: skip
        evaluation = training.evaluation_seconds(s.shape, 2 * (s.validation + s.test) * (s.length + 2))
        units: list[Unit] = []
        for seed in range(s.seeds):
            for arm, heads in ARMS.items():
                preparation = _preparation_seconds(s, arm)
                for head in heads:
                    for target in TARGETS:
                        for count in (0, *s.counts) if head == "kept" else s.counts:
                            for factor in s.factors if count else s.factors[:1]:
                                config = {
                                    **shared, "seed": seed, "arm": arm, "head": head, "target": target, "pairs": count,
                                    "factor": factor,
                                }  # fmt: skip
                                label = f"{arm} PMP, {head} head, {target}, {count} pairs, rate {factor}x, seed {seed}"
                                steps = training.step_seconds(s.shape, 2 * s.batch * (s.length + 2)) * count / s.batch
                                seconds = 0.2 + evaluation + steps + preparation
                                units.append(Unit(self.name, config, label, f"{self.name} {arm} {seed}", seconds))
                                preparation = 0.0  # its state is kept for the others of the group
        return units

    def run(self, unit: Unit, store: Store) -> dict[str, Any]:
        c = unit.config
        source = tasks.make_source(c["source"], c["seed"])
        special = tasks.specials(source)
        quality = tasks.make_quality(source, c["task"], c["length"], c["seed"])
        other = tasks.make_quality(source, c["task"], c["length"], 1000 + c["seed"])
        rho = c["correlation"]
        sign = TARGETS[c["target"]]

        def wanted(x: Tensor) -> Tensor:
            return sign * rho * quality(x) + (1 - rho**2) ** 0.5 * other(x)

        prepared = {name: c[name] for name in _PREPARATION[c["arm"]]}
        state = store.state("pmp", prepared, lambda: _prepared(prepared, source, special, quality, store))
        model = training.restore(c["shape"], special.vocab, state, c["device"])
        if c["head"] == "new":
            model.score.load_state_dict(training.build(c["shape"], special.vocab, c["seed"], "cpu").score.state_dict())
        random, held_out = tasks.generator(c["seed"], 7), tasks.generator(c["seed"], 8)
        if c["pairs"]:
            pairs = _framed(tasks.ranked_pairs(source, wanted, c["pairs"], c["length"], random), special)
            steps = -(-c["pairs"] // c["batch"])
            rate = c["factor"] * c["rate"]
            training.optimise(model, steps, rate, lambda step: _loss(model, pairs, step, c["batch"])[0])
        test = tasks.ranked_pairs(source, wanted, c["validation"] + c["test"], c["length"], held_out, held_out=True)
        chosen, rejected = (training.scores(model, x) for x in _framed(test, special))
        cut = c["validation"]
        validation = training.measured(chosen[:cut], rejected[:cut])["accuracy"]
        return {**training.measured(chosen[cut:], rejected[cut:]), "validation": validation}

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        return _section(self.title, results, directory)


_PRETRAINING = (
    "revision", "source", "device", "shape", "length", "pretraining_steps", "pretraining_batch", "rate", "seed",
)  # fmt: skip
_PMP = (*_PRETRAINING, "pmp_steps", "pmp_batch", "pmp_factor", "lm_weight", "task", "arm")
_PREPARATION = {"none": _PRETRAINING, "ranked": _PMP, "binarised": _PMP}


def _preparation_seconds(s: Settings, arm: str) -> float:
    tokens = s.length + 2
    seconds = s.pretraining_steps * training.step_seconds(s.shape, s.pretraining_batch * tokens)
    pairs = {"none": 0, "ranked": s.pmp_batch, "binarised": 2 * s.pmp_batch}[arm]
    return seconds + (s.pmp_steps * training.step_seconds(s.shape, 2 * pairs * tokens) if pairs else 0.0)


def _framed(pairs: tuple[Tensor, Tensor], special: tasks.Specials) -> tuple[Tensor, Tensor]:
    better, worse = pairs
    return tuple(tasks.framed(x, special.begin, end=special.end) for x in (better, worse))  # type: ignore[return-value]


def _binarised(pairs: tuple[Tensor, Tensor], special: tasks.Specials) -> tuple[Tensor, Tensor]:
    """Every pair A > B as GOOD:A > BAD:A and BAD:B > GOOD:B, next to each other: (2P, S) preferred, (2P, S) other."""

    def tagged(x: Tensor, tag: int) -> Tensor:
        return tasks.framed(x, special.begin, tag, end=special.end)

    better, worse = pairs
    preferred = torch.stack((tagged(better, special.good), tagged(worse, special.bad)), 1).flatten(0, 1)
    other = torch.stack((tagged(better, special.bad), tagged(worse, special.good)), 1).flatten(0, 1)
    return preferred, other


def _loss(model: Transformer, pairs: tuple[Tensor, Tensor], step: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairwise loss of a batch, and the hidden states and tokens of the preferred sequences."""
    device = model.embedding.weight.device
    better, worse = (x[step * batch : (step + 1) * batch].to(device) for x in pairs)
    hidden = model(torch.cat((better, worse)))
    return pairwise_preference_loss(*model.score(hidden).chunk(2)), hidden[: len(better)], better


def _prepared(
    c: dict[str, Any], source: tasks.Source, special: tasks.Specials, quality: tasks.Quality, store: Store
) -> dict[str, Tensor]:
    """The state of a model after language modelling and, but for the arm "none", PMP."""
    if "arm" in c:
        first = {name: c[name] for name in _PRETRAINING}
        state = store.state("pmp", first, lambda: _prepared(first, source, special, quality, store))
        model = training.restore(c["shape"], special.vocab, state, c["device"])
        count = c["pmp_steps"] * c["pmp_batch"]
        drawn = tasks.ranked_pairs(source, quality, count, c["length"], tasks.generator(c["seed"], 9))
        pairs, batch = (_framed(drawn, special), c["pmp_batch"])
        if c["arm"] == "binarised":
            pairs, batch = _binarised(drawn, special), 2 * batch
        start = pairs[0].shape[1] - c["length"] - 1

        def loss_of(step: int) -> Tensor:
            loss, hidden, tokens = _loss(model, pairs, step, batch)
            targets = training.targets_from(tokens, start)
            return loss + c["lm_weight"] * training.language_loss(model, hidden[:, :-1], targets, per_sequence=False)

        training.optimise(model, c["pmp_steps"], c["pmp_factor"] * c["rate"], loss_of)
        return model.state_dict()
    model = training.build(c["shape"], special.vocab, c["seed"], c["device"])
    steps, batch = c["pretraining_steps"], c["pretraining_batch"]
    drawn = source.draw(steps * batch, c["length"], tasks.generator(c["seed"], 10))
    texts = tasks.framed(drawn, special.begin, end=special.end)

    def language(step: int) -> Tensor:
        tokens = texts[step * batch : (step + 1) * batch].to(c["device"])
        return training.language_loss(
            model, model(tokens[:, :-1]), training.targets_from(tokens, 1), per_sequence=False
        )  # fmt: skip

    training.optimise(model, steps, c["rate"], language)
    return model.state_dict()


# The report

Curves = dict[tuple[str, str, str, int], dict[float, list[dict[str, float]]]]
"""(arm, head, target, pairs) -> factor of the learning rate -> a result per seed."""


def _chosen(by_factor: dict[float, list[dict[str, float]]]) -> tuple[float, list[float]]:
    """The learning rate that is best on validation pairs, mean over seeds, and the test accuracies it has."""
    best = max(by_factor, key=lambda factor: sum(x["validation"] for x in by_factor[factor]))
    return best, [x["accuracy"] for x in by_factor[best]]


def _section(title: str, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
    curves: Curves = {}
    for unit, result in sorted(results, key=lambda x: x[0].config["seed"]):
        c = unit.config
        by_factor = curves.setdefault((c["arm"], c["head"], c["target"], c["pairs"]), {})
        by_factor.setdefault(c["factor"], []).append(result)
    c, test = results[0][0].config, results[0][1]["pairs"]
    counts = sorted({count for *_, count in curves if count})
    lines = [(arm, head) for arm, heads in ARMS.items() for head in heads]

    def named(arm: str, head: str) -> str:
        return "no PMP" if arm == "none" else f"{arm} PMP, head {'kept' if head == 'kept' else 're-initialised'}"

    made, panels = figure(len(TARGETS))
    rows, gains, at_paper = [], [], []
    for target, axes in zip(TARGETS, panels, strict=True):
        axes.set(xscale="log", xlabel="pairs of fine-tuning", ylabel="accuracy", title=f"target and PMP {target}")
        for (arm, head), colour in zip(lines, COLOURS, strict=False):
            means: list[Interval] = []
            for count in counts:
                factor, accuracies = _chosen(curves[arm, head, target, count])
                means.append(mean_interval(accuracies))
                rows.append(
                    [target, named(arm, head), f"{count:,}", means[-1], f"{factor}x", means[-1].n, f"{test:,} pairs"]
                )
                if arm != "none":
                    gain = difference_interval(accuracies, _chosen(curves["none", "new", target, count])[1])
                    gains.append([target, named(arm, head), f"{count:,}", gain, gain.n, f"{test:,} pairs"])
            errors = [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]
            axes.errorbar(
                counts, [m.mean for m in means], None if means[0].n == 1 else errors, fmt="o-", ms=4, lw=1.2, capsize=2,
                color=colour, label=named(arm, head),
            )  # fmt: skip
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    before = []
    for arm in ("ranked", "binarised"):
        for target in TARGETS:
            found = mean_interval(_chosen(curves[arm, "kept", target, 0])[1])
            before.append([target, named(arm, "kept"), found, found.n, f"{test:,} pairs"])
    slowest = PAPER_RATE if PAPER_RATE in curves["none", "new", "agree", counts[0]] else None
    for target in TARGETS if slowest else ():
        for arm, head in lines:
            for count in counts:
                found = mean_interval([x["accuracy"] for x in curves[arm, head, target, count][PAPER_RATE]])
                at_paper.append([target, named(arm, head), f"{count:,}", found, found.n, f"{test:,} pairs"])
    factors = ", ".join(f"{factor}x" for factor in sorted(curves["none", "new", "agree", counts[0]]))
    parts = [
        f"""Width {c["shape"][0]}, {c["shape"][1]} layers. {c["pretraining_steps"]} steps of language modelling
        ({c["pretraining_batch"]} sequences); {c["pmp_steps"]} steps of PMP ({c["pmp_batch"]} ranked pairs;
        binarised makes two comparisons of each: the same pairs in twice the compute); the LM loss on the
        preferred sequence, a mean over tokens, has the weight {c["lm_weight"]:g}. Then one pass over the
        fine-tuning pairs in batches of {c["batch"]}. The target's quality has the correlation
        +{c["correlation"]:g} (agree) or -{c["correlation"]:g} (conflict) with PMP's. Each point's learning rate
        is the best of {factors} of pre-training's on {c["validation"]} validation pairs, mean over seeds; test
        pairs are others.""",
        f"""The paper's recipe is one pass at 0.1x (PMP) and {PAPER_RATE}x (fine-tuning). Here PMP has
        {c["pmp_factor"]:g}x, because {c["pmp_steps"]} steps at 0.1x end before so small a model has learned the
        preference, and fine-tuning may choose, because a hundred pairs are a handful of steps, in which {PAPER_RATE}x
        moves nothing{" (see the last table)" if at_paper else ""}.""",
        save(made, directory, "pmp.png"),
        table(["target", "pre-training", "pairs", "accuracy", "rate", "seeds", "n"], rows),
        "Accuracy gained over no PMP, seed by seed:",
        table(["target", "pre-training", "pairs", "gain", "seeds", "n"], gains),
        "Before any fine-tuning, with the head of PMP:",
        table(["target", "pre-training", "accuracy", "seeds", "n"], before),
    ]
    if at_paper:
        parts += [
            f"Fine-tuned at the paper's {PAPER_RATE}x:",
            table(["target", "pre-training", "pairs", "accuracy", "seeds", "n"], at_paper),
        ]
    return Section(title, blocks(*parts), _claims(curves, counts, f"width {c['shape'][0]}, {c['shape'][1]} layers"))


def _claims(curves: Curves, counts: Sequence[int], size: str) -> list[Claim]:
    shown_at = [count for count in (500, 5000) if count in counts] or [counts[0], counts[-1]]

    def gain(arm: str, base: tuple[str, str], target: str, count: int) -> Interval:
        ours, others = curves[arm, "kept", target, count], curves[(*base, target, count)]
        return difference_interval(_chosen(ours)[1], _chosen(others)[1])

    none, ranked = ("none", "new"), ("ranked", "kept")
    gains = "; ".join(
        f"{arm}, {target}, {count:,} pairs: {gain(arm, none, target, count).told()}"
        for arm in ("ranked", "binarised") for target in TARGETS for count in shown_at
    )  # fmt: skip
    between = "; ".join(
        f"{target}, {count:,} pairs: {gain('binarised', ranked, target, count).told()}"
        for target in TARGETS
        for count in shown_at
    )
    n = len(next(iter(curves[(*none, "agree", counts[0])].values())))
    return [
        Claim(
            "PMP improves accuracy by 5 to 10 % at 500 fine-tuning pairs",
            f"gain of accuracy, head kept: {gains} ({n} seeds)",
            size,
            "a gain that grows with size to 52B; transfer between human preferences",
        ),
        Claim(
            "binarised PMP transfers better than ranked PMP, by about 5 % at 500 pairs",
            f"binarised minus ranked: {between} ({n} seeds)",
            size,
            "whether human preferences conflict as often; here how much they do is set by hand",
        ),
    ]
