"""Experiment 4: the alignment tax of a real model: plain, with the prompt in front, and with the prompt distilled into
it.

All three read the same items, so that differences are of pairs. What choosing the longer or the shorter answer comes to
stands beside every accuracy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.demo import write_texts
from bench.paper import real
from bench.paper.experiment import Absent, Preset
from bench.paper.report import COLOURS, Claim, Section, figure, save, table
from bench.paper.runs import Store, Unit
from pyalign._files import write_text
from pyalign.evaluation import (
    Completion,
    Evaluation,
    PairedDifference,
    Problem,
    Question,
    Reader,
    alignment_tax,
    evaluate_human_eval,
    evaluate_last_words,
    evaluate_multiple_choice,
    mean_estimate,
    read_multiple_choice,
    read_problems,
)
from pyalign.evaluation.results import finite

REVISION = 1
VARIANTS = ("plain", "prompted", "distilled")
DIALOGUE = "Human: {question}\n\nAssistant:"
NULL = "Assistant:"
SUBSETS = ("harmless", "helpful", "honest", "other")
SCORINGS = {"hhh": ("information", "mean_logprob", "sum_logprob"), "truthful_qa": ("sum_logprob",)}
HEADLINES = (  # task, metric, name in the table
    ("hhh", "information/accuracy", "HHH comparisons, log P(a given q) - log P(a)"),
    ("hhh", "mean_logprob/accuracy", "HHH comparisons, mean log-prob"),
    ("truthful_qa", "sum_logprob/accuracy", "TruthfulQA MC1"),
    ("last_word", "accuracy", "last word"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    items: int | None  # of a task at most, evenly over its subsets; None: all
    words: int  # texts whose last word is asked for
    sequences: int  # that distillation collects
    chunk: int  # tokens of a sequence at most
    layers: int  # that it trains, the last ones
    problems: int | None


SETTINGS = {
    "quick": Settings(8, 8, sequences=16, chunk=32, layers=1, problems=4),
    "full": Settings(None, 500, sequences=176, chunk=96, layers=10, problems=None),
    "gpu": Settings(None, 500, sequences=4096, chunk=256, layers=30, problems=None),
}


class AlignmentTax:
    name = "tax"
    title = "The alignment tax of a real model"

    def units(self, preset: Preset) -> list[Unit]:
        s = SETTINGS[preset.name]
        if preset.hhh is None:
            raise Absent("no --hhh")
        config = {
            "revision": REVISION,
            "model": real.model_of(preset),
            "prompt": real.fingerprint(real.PROMPT)["sha256"],
            "device": preset.device,
        }
        distillation = {**config, "job": "distil", "sequences": s.sequences, "chunk": s.chunk, "layers": s.layers}
        tasks: dict[str, Any] = {
            "hhh": [real.fingerprint(preset.hhh / f"{name}.json") for name in SUBSETS],
            "last_word": None if preset.words is None else real.fingerprint(preset.words),
        }
        if preset.truthful_qa is not None:
            tasks["truthful_qa"] = real.fingerprint(preset.truthful_qa)
        size = {"items": s.items, "words": s.words}
        cost = 1.0 if preset.name == "full" else 0.05
        units = [Unit(self.name, distillation, "distillation", self.name, 400 * cost)]
        for variant in VARIANTS:
            for task, data in tasks.items():
                job = {**config, "job": "evaluate", "variant": variant, "task": task, "data": data, **size}
                if variant == "distilled":
                    job["distillation"] = distillation
                units.append(Unit(self.name, job, f"{task}, {variant}", self.name, 20 + 200 * cost))
        try:
            read_problems(preset.human_eval)
        except ModuleNotFoundError:
            return units
        path = None if preset.human_eval is None else real.fingerprint(preset.human_eval)
        job = {"revision": REVISION, "job": "harness", "data": path, "problems": s.problems}
        return [*units, Unit(self.name, job, "HumanEval's harness", self.name, 60 * cost)]

    def run(self, unit: Unit, store: Store) -> dict[str, Any]:
        c = unit.config
        if c["job"] == "distil":
            made = _distilled(unit, store)
            log = (made / "train" / "train.jsonl").read_text(encoding="utf-8").splitlines()
            found = [event["held_out_kl"] for event in map(json.loads, log) if event["event"] == "eval"]
            manifest = json.loads((made / "store" / "manifest.json").read_text(encoding="utf-8"))
            counts = {name: manifest[f"num_held_out_{name}"] for name in ("sequences", "tokens")}
            return {"kl_before": found[0], "kl_after": found[-1], **counts}
        if c["job"] == "harness":
            return _harness(read_problems(None if c["data"] is None else c["data"]["path"])[: c["problems"]])
        return _evaluate(c, store)

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        return _section(self.title, results, directory)


def _distilled(unit: Unit, store: Store) -> Path:
    """Where ``pyalign distill`` trains the model, on Python's help topics as documents and as dialogues."""
    c = unit.config
    out = store.directory / "models" / unit.key
    if (out / "done").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    texts, shared = out / "topics.jsonl", {"--model": c["model"]["path"], "--device": c["device"]}
    write_texts(texts)
    collect = {
        **shared, "--prompt-file": real.PROMPT, "--text": texts, "--store": out / "store",
        "--chunk-length": c["chunk"], "--max-sequences": c["sequences"], "--held-out": 0.15, "--shard-sequences": 64,
    }  # fmt: skip
    train = {
        **shared, "--store": out / "store", "--out": out / "train", "--last-layers": c["layers"], "--epochs": 2,
        "--batch-size": 16, "--learning-rate": 2e-4,
    }  # fmt: skip
    for stage, options in (("collect", collect), ("train", train)):  # each goes on where it was stopped
        arguments = [str(x) for option in options.items() for x in option]
        command = [sys.executable, "-m", "pyalign.cli", "distill", stage, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"pyalign distill {stage} failed with exit code {done.returncode}: {done.stderr[-2000:]}"
            )
    write_text(out / "done", "")
    return out


def _evaluate(c: Any, store: Store) -> dict[str, Any]:
    model: Any = c["model"]
    if c["variant"] == "distilled":
        unit = Unit(AlignmentTax.name, c["distillation"], "", "", 0.0)
        path = _distilled(unit, store)
        model = {**model, "path": str(path / "train" / "model")}
    prompt = real.PROMPT.read_text(encoding="utf-8") if c["variant"] == "prompted" else ""
    network, tokenizer = real.load(model, c["device"])
    if c["task"] == "last_word":
        examples = real.last_words(None if c["data"] is None else c["data"]["path"], c["words"])
        found: Evaluation = evaluate_last_words(network, examples, tokenizer, prompt=prompt)
    else:
        files = [x["path"] for x in (c["data"] if isinstance(c["data"], list) else [c["data"]])]
        questions = _few(read_multiple_choice(files, question_format=DIALOGUE), c["items"])
        scorings = SCORINGS[c["task"]]
        reader = Reader(network, tokenizer, prompt=prompt, null_context=NULL if "information" in scorings else None)
        found = evaluate_multiple_choice(reader, questions, scorings=scorings)
    values = {name: [finite(x) for x in column] for name, column in found.values.items()}
    return {"values": values, "ids": found.ids, "subsets": found.subsets}


def _few(questions: Sequence[Question], count: int | None) -> list[Question]:
    """At most ``count``, evenly spread over the file."""
    if count is None or count >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // count] for i in range(count)]


def _harness(problems: Sequence[Problem]) -> dict[str, Any]:
    """How many canonical solutions pass, and how many of the same with their results thrown away."""
    right = [Completion(x.task_id, x.canonical_solution or "") for x in problems]
    broken = [Completion(x.task_id, "    return None\n") for x in problems]
    passed = [
        evaluate_human_eval(problems, completions, allow_code_execution=True, k=[1], timeout=20.0, workers=1)
        for completions in (right, broken)
    ]
    return {"problems": len(problems), "canonical": passed[0].values["pass@1"].tolist(),
            "broken": passed[1].values["pass@1"].tolist()}  # fmt: skip


# The report


def _section(title: str, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
    config = results[0][0].config
    found: dict[tuple[str, str], Evaluation] = {}
    harness, distillation, layers = None, None, 0
    for unit, result in results:
        c = unit.config
        if c["job"] == "evaluate":
            values = {name: [math.nan if x is None else x for x in xs] for name, xs in result["values"].items()}
            found[c["task"], c["variant"]] = Evaluation.of(values, ids=result["ids"], subsets=result["subsets"])
        elif c["job"] == "harness":
            harness = result
        else:
            distillation, layers = result, c["layers"]
    tasks = [(task, metric, name) for task, metric, name in HEADLINES if (task, VARIANTS[0]) in found]
    rows, taxes = [], []
    for task, metric, name in tasks:
        baselines = [m for m in ("longest/accuracy", "shortest/accuracy") if m in found[task, "plain"].values]
        rows.append([
            name, *(found[task, variant].estimate(metric) for variant in VARIANTS),
            *(found[task, "plain"].estimate(m) for m in baselines), *[""] * (2 - len(baselines)),
        ])  # fmt: skip
        for variant in VARIANTS[1:]:
            taxes.append((name, variant, alignment_tax(found[task, variant], found[task, "plain"])[metric]))
    subsets = [
        [subset, *(found["hhh", variant].estimate("information/accuracy", subset=subset) for variant in VARIANTS),
         found["hhh", "plain"].estimate("longest/accuracy", subset=subset)]
        for subset in found["hhh", "plain"].groups()
    ]  # fmt: skip
    losses = {variant: found["last_word", variant].estimate("log_loss") for variant in VARIANTS}
    made, (axes,) = figure(1)
    for at, (_, variant, x) in enumerate(taxes):
        colour = COLOURS[VARIANTS.index(variant)]
        axes.errorbar([x.value], [-at], xerr=[[x.value - x.lower], [x.upper - x.value]], fmt="o", ms=4, color=colour,
                      capsize=2)  # fmt: skip
    axes.axvline(0, color="#777", lw=1, ls="--")
    axes.set_yticks([-at for at in range(len(taxes))], [f"{name}: {variant}" for name, variant, _ in taxes], fontsize=7)
    axes.set(xlabel="accuracy, minus plain")
    body = f"""{config["model"]["name"]}: as it is, behind a prompt of ours with three dialogues (the paper's has
14), and with that prompt distilled into its last {layers} layers by `pyalign distill`, on help topics of Python's own
library and dialogues about them{_kl(distillation)}. One run each; intervals (95 %) are over items:
of accuracies Wilson's, of differences Bonett and Price's for pairs.

{table(["task", *VARIANTS, "longest answer", "shortest answer"], rows)}

The tax: accuracy minus the plain model's on the same items, negative where alignment costs something.

{table(["task", "model", "difference"], [[name, variant, x] for name, variant, x in taxes])}

{save(made, directory, "tax.png")}

HHH comparisons by log P(a given q) - log P(a), by subset:

{table(["subset", *VARIANTS, "longest answer"], subsets)}

Log-loss of the last word, in nats: {"; ".join(f"{variant} {x}" for variant, x in losses.items())}.
{_harness_text(harness)}
"""
    return Section(title, body, _claims(taxes, config["model"]["name"]))


def _claims(taxes: Sequence[tuple[str, str, PairedDifference]], size: str) -> list[Claim]:
    def shown(name: str) -> str:
        return "; ".join(f"{variant} {x}" for task, variant, x in taxes if task == name)

    helped, _, _, word = (name for _, _, name in HEADLINES)
    return [
        Claim(
            "a prompt makes models more helpful, honest and harmless, and distillation keeps that",
            f"HHH comparisons, minus plain: {shown(helped)}", size,
            "221 comparisons tell differences of 7 points from none; the paper's prompt has 14 dialogues",
        ),
        Claim(
            "small models pay an alignment tax (Lambada 1 to 2 %), large ones none",
            f"{word}, minus plain: {shown(word)}", size,
            "that it vanishes with size; Lambada itself; code, which such a model can't write",
        ),
    ]  # fmt: skip


def _kl(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    return (
        f" (held-out KL to the prompted model {report['kl_before']:.3f} -> {report['kl_after']:.3f} nats a token, over "
        f"{report['tokens']:,} tokens of {report['sequences']} texts)"
    )


def _harness_text(harness: dict[str, Any] | None) -> str:
    if harness is None:
        return "\nHumanEval's harness was not checked: neither --human-eval nor the package human-eval was there."
    passed = {name: mean_estimate(harness[name], proportion=True) for name in ("canonical", "broken")}
    return (
        f"\nHumanEval's harness passes canonical solutions in {passed['canonical']} of the problems, one that returns "
        f"None in {passed['broken']}. No model's programs were run: one of this size passes hardly any, which leaves "
        "no tax to be seen."
    )
