"""Experiment 1: imitation, binary discrimination and ranked preference modelling, over model sizes (section 3).

On ranked tasks the pairwise loss is the paper's ranked preference modelling, on binary tasks its binary discrimination
(``C:right > C:wrong``, the same loss). "pointwise" is the binary cross-entropy of single samples, pyalign's
``binary_discrimination_loss``, which the paper doesn't use. All objectives see the same pairs once; imitation reads the
good sample alone. Models start from random weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.paper import tasks, training
from bench.paper.experiment import Preset
from bench.paper.model import Transformer
from bench.paper.report import COLOURS, Claim, Section, blocks, figure, save, table
from bench.paper.runs import Store, Unit
from bench.paper.statistics import Interval, difference_interval, fit_log, mean_interval
from pyalign import binary_discrimination_loss, pairwise_preference_loss

REVISION = 1
OBJECTIVES = ("imitation", "pairwise", "pointwise")


@dataclasses.dataclass(frozen=True)
class Settings:
    shapes: tuple[tuple[int, int, int], ...]  # width, layers, heads
    seeds: int
    steps: int
    batch: int  # pairs
    length: int  # of a ranked sequence; a context and its completion have half of it each
    test: int
    tasks: tuple[str, ...] = (*tasks.RANKED, *tasks.BINARY)
    rate: float = 3e-3  # at width 64; others have it times (64 / width)^1/2
    vocab: int = 32
    spread: float = 1.3


SETTINGS = {
    "quick": Settings(
        ((16, 1, 1), (32, 2, 2)), seeds=3, steps=200, batch=32, length=14, test=1000, tasks=("interactions", "sort")
    ),
    "full": Settings(
        ((8, 1, 1), (16, 2, 1), (32, 2, 2), (64, 2, 4), (128, 2, 8)), seeds=5, steps=400, batch=64, length=14, test=4000
    ),
    "gpu": Settings(
        ((64, 2, 2), (128, 5, 2), (256, 4, 4), (384, 6, 6), (640, 6, 10)), seeds=5, steps=500, batch=64, length=48,
        test=4000, tasks=("interactions", "sort"), rate=2e-3,
    ),
}  # fmt: skip


class Objectives:
    name = "objectives"
    title = "Objectives: imitation, binary discrimination, ranked preference modelling"

    def units(self, preset: Preset) -> list[Unit]:
        s = SETTINGS[preset.name]
        source = {"kind": "bigram", "vocab": s.vocab, "spread": s.spread}
        if preset.name == "gpu":
            source = tasks.text_config(preset.text)
        units: list[Unit] = []
        for seed in range(s.seeds):
            for task in s.tasks:
                for shape in s.shapes:
                    for objective in OBJECTIVES:
                        config = {
                            "revision": REVISION, "source": source, "task": task, "objective": objective,
                            "shape": list(shape), "seed": seed, "steps": s.steps, "batch": s.batch, "length": s.length,
                            "test": s.test, "rate": s.rate * (64 / shape[0]) ** 0.5, "device": preset.device,
                        }  # fmt: skip
                        sequences = s.batch if objective == "imitation" else 2 * s.batch
                        seconds = 0.5 + s.steps * training.step_seconds(shape, sequences * (s.length + 2))
                        seconds += training.evaluation_seconds(shape, 2 * s.test * (s.length + 2))
                        label = f"{task}, {objective}, width {shape[0]}, seed {seed}"
                        units.append(Unit(self.name, config, label, f"{self.name} {label}", seconds))
        return units

    def run(self, unit: Unit, store: Store) -> dict[str, Any]:
        c = unit.config
        source = tasks.make_source(c["source"], c["seed"])
        special = tasks.specials(source)
        result: dict[str, Any] = {}
        random, held_out = tasks.generator(c["seed"], 5), tasks.generator(c["seed"], 6)
        count, task, length = c["steps"] * c["batch"], c["task"], c["length"]
        if task in tasks.RANKED:
            quality = tasks.make_quality(source, task, length, c["seed"])
            pairs = tasks.ranked_pairs(source, quality, count, length, random)
            test = tasks.ranked_pairs(source, quality, c["test"], length, held_out, held_out=True)
            first = 1
            good, bad, test_good, test_bad = (
                tasks.framed(x, special.begin, end=special.end) for x in (*pairs, *test)
            )  # fmt: skip
            if c["objective"] == "imitation":
                result["ideal"] = tasks.ideal_imitation(source, quality, length, c["seed"])._asdict()
        else:
            half = length // 2
            first = half + 2
            good, bad, test_good, test_bad = (
                tasks.framed(
                    torch.cat((context, torch.full_like(context[:, :1], special.separator), x), 1),
                    special.begin, end=special.end,
                )
                for context, right, wrong in (
                    tasks.binary_pairs(source, task, count, half, random),
                    tasks.binary_pairs(source, task, c["test"], half, held_out, held_out=True),
                )
                for x in (right, wrong)
            )  # fmt: skip
        model = training.build(c["shape"], special.vocab, c["seed"], c["device"])
        training.optimise(
            model, c["steps"], c["rate"], lambda step: _loss(model, c["objective"], c["batch"], step, good, bad, first)
        )
        if c["objective"] == "imitation":
            chosen, rejected = (training.mean_logprobs(model, x, first) for x in (test_good, test_bad))
        else:
            chosen, rejected = (training.scores(model, x) for x in (test_good, test_bad))
        return {**result, **training.measured(chosen, rejected), "parameters": model.body_parameters()}

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        return _section(self.title, results, directory)


def _loss(
    model: Transformer, objective: str, batch: int, step: int, good: torch.Tensor, bad: torch.Tensor, first: int
) -> torch.Tensor:
    device = model.embedding.weight.device
    a, b = (x[step * batch : (step + 1) * batch].to(device) for x in (good, bad))
    if objective == "imitation":
        targets = training.targets_from(a, first)
        return training.language_loss(model, model(a[:, :-1]), targets, per_sequence=True)
    given = model.score(model(torch.cat((a, b))))  # (2B,)
    if objective == "pairwise":
        return pairwise_preference_loss(*given.chunk(2))
    return binary_discrimination_loss(given, torch.arange(2 * batch, device=device) < batch)


# The report


def _section(title: str, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    ideals: dict[str, dict[int, dict[str, float]]] = {}
    for unit, result in results:
        c = unit.config
        found.setdefault((c["task"], c["objective"], result["parameters"]), {})[c["seed"]] = result["accuracy"]
        if "ideal" in result:
            ideals.setdefault(c["task"], {})[c["seed"]] = result["ideal"]
    config, test = results[0][0].config, results[0][1]["pairs"]
    names = list(dict.fromkeys(task for task, _, _ in found))
    sizes = sorted({size for _, _, size in found})
    seeds = sorted({unit.config["seed"] for unit, _ in results})
    text = config["source"]["kind"] == "text"

    def values(task: str, objective: str, size: int) -> list[float]:
        return [found[task, objective, size][seed] for seed in seeds]

    def named(task: str, objective: str) -> str:
        if objective != "pairwise":
            return objective
        return "ranked preference modelling" if task in tasks.RANKED else "binary discrimination"

    n, draws = f"{test:,} pairs", f"{tasks.IDEAL_DRAWS:,} pairs"
    made, panels = figure(len(names))
    rows, fits = [], []
    for task, axes in zip(names, panels, strict=True):
        axes.set(xscale="log", xlabel="parameters without embeddings", ylabel="accuracy", ylim=(0.45, 1.02))
        axes.set_title(f"{task} ({'ranked' if task in tasks.RANKED else 'binary'})", fontsize=10)
        for objective, colour in zip(OBJECTIVES, COLOURS, strict=False):
            means = [mean_interval(values(task, objective, size)) for size in sizes]
            rows += [
                [task, named(task, objective), f"{size:,}", mean, mean.n, n]
                for size, mean in zip(sizes, means, strict=True)
            ]
            fit = fit_log(sizes, [[found[task, objective, size][seed] for size in sizes] for seed in seeds])
            fits.append([task, named(task, objective), fit.slope, fit.slope.n, f"{len(sizes)} sizes"])
            errors = [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]
            axes.errorbar(
                sizes, [m.mean for m in means], None if len(seeds) == 1 else errors, fmt="o", ms=4, color=colour,
                capsize=2, label=named(task, objective),
            )  # fmt: skip
            ends = torch.tensor([sizes[0], sizes[-1]], dtype=torch.float64)
            axes.plot(ends, fit.intercept.mean + fit.slope.mean * ends.log10(), color=colour, lw=1, ls=":")
        if task in ideals:
            axes.axhline(
                mean_interval([x["closed_form"] for x in ideals[task].values()]).mean, color="#246", lw=1, ls="--",
                label="ideal imitation",
            )  # fmt: skip
        axes.legend(frameon=False, fontsize=8, loc="center right")
    ideal_rows = [
        [
            task,
            *(mean_interval([x[name] for x in by_seed.values()]) for name in tasks.Ideal._fields),
            len(by_seed),
            draws,
        ]
        for task, by_seed in ideals.items()
    ]
    differences: dict[str, list[Interval]] = {
        task: [difference_interval(values(task, "pairwise", n), values(task, "imitation", n)) for n in sizes]
        for task in names
    }
    pointwise = [
        [task, difference_interval(*(values(task, way, sizes[-1]) for way in OBJECTIVES[1:])), len(seeds), n]
        for task in names
    ]
    origin = "windows of real text (bytes)" if text else f"a bigram source over {config['source']['vocab']} tokens"
    s_note = (
        "s and the ideal are those of a bigram model of the text, which spreads less than the text's own log p0."
        if text
        else "s is measured on the source; the closed form takes log p0 for normal and independent of quality."
    )
    body = blocks(
        f"""Sequences of {config["length"]} tokens from {origin}. Ranked tasks: the better of two random sequences has
        the larger quality, which is a sum of its tokens' random worths (tokens), or what a random network makes
        of its counts of tokens (interactions), and doesn't correlate with log p0. Binary tasks:
        {config["length"] // 2} tokens, then the same sorted (or reversed), right or with one token replaced.
        {config["steps"]} steps of {config["batch"]} fresh pairs, from random weights. Imitation trains on the sum
        of token NLLs of the good sample and ranks by its mean NLL per token. The true quality, or rule, has the
        accuracy 1. (Pointwise: binary cross-entropy of single samples, which the paper doesn't use.)""",
        save(made, directory, "objectives.png"),
        table(["task", "objective", "parameters", "accuracy", "seeds", "n"], rows),
        f"""Ideal imitation: winners of random pairs have the density 2 F(quality) p0, so that even a perfect imitator
        ranks by log F + log p0 and is right in 1/2 + exp(s^2) Phi(-sqrt(2) s) of pairs. {s_note}""",
        table(["task", "s, sd of log p0", "closed form", "sampled on the task", "seeds", "n"], ideal_rows),
        """Fits accuracy = a + b log10 N, one for each seed. Accuracies near 1 bend: these are summaries, no laws.""",
        table(["task", "objective", "b per decade of parameters", "seeds", "n"], fits),
        "Pairwise minus pointwise loss at the largest size, by task:",
        table(["task", "difference of accuracies", "seeds", "n"], pointwise),
    )
    return Section(title, body, _claims(names, sizes, differences, ideals))


def _claims(
    names: Sequence[str], sizes: Sequence[int], differences: dict[str, list[Interval]], ideals: dict[str, Any]
) -> list[Claim]:
    size = f"{sizes[0]:,} to {sizes[-1]:,} parameters"
    claims: list[Claim] = []
    ranked = [task for task in names if task in tasks.RANKED]
    binary = [task for task in names if task in tasks.BINARY]

    def shown(chosen: Sequence[str]) -> str:
        parts = (
            f"{t}: {differences[t][0].told()} (smallest size), {differences[t][-1].told()} (largest)" for t in chosen
        )
        return f"difference of accuracies, {'; '.join(parts)} ({differences[chosen[0]][0].n} seeds, n below)"

    if ranked:
        claims.append(
            Claim(
                "ranked preference modelling beats imitation, by about 0.21 of accuracy at 52B",
                shown(ranked),
                size,
                "the gap of natural language: here quality is independent of likelihood, the gap as wide as it gets",
            )
        )
        ideal = "; ".join(f"{t}: {mean_interval([x['closed_form'] for x in ideals[t].values()])}" for t in ranked)
        claims.append(
            Claim(
                "imitation gains little from size on ranked data",
                f"even a perfect imitator has the accuracy {ideal} ({len(ideals[ranked[0]])} seeds); slopes are below",
                size,
                "how likelihood and people's rankings hang together",
            )
        )
    if binary:
        claims.append(
            Claim(
                "binary discrimination is about as good as imitation",
                shown(binary),
                size,
                "code and text, whose rules small models can't learn",
            )
        )
    return claims
