"""Experiment 3: context distillation, KL(p0(X | C) || p(X)) (section 2.4).

A world of documents: text of the source, and dialogues of questions and answers, in which one of several rules says
which answer a question has. A prompt C of questions answered by one rule tells the model which; alone it has to guess.
The teacher is the model with C in front, the student the same model that reads X alone, half text, half dialogue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper import tasks, training
from bench.paper.experiment import Preset
from bench.paper.model import Transformer
from bench.paper.report import COLOURS, Claim, Section, blocks, figure, save, table
from bench.paper.runs import Store, Unit
from bench.paper.statistics import difference_interval, mean_interval
from pyalign import (
    ContextDistillationCollator,
    distillation_loss,
    token_logprobs,
    topk_distillation_loss,
    topk_logprobs,
)

REVISION = 1
LOSSES = {
    "full KL": (None, ""),
    "top-50 bucket": (50, "bucket"),
    "top-8 bucket": (8, "bucket"),
    "top-8 renormalised": (8, "renormalize"),
    "top-8 dropped tail": (8, "drop"),
}
"""What the student is trained with: how many log-probs of the teacher, and what becomes of the rest."""
_COUNTED = ("accuracy", "probability", "dialogue_accuracy", "kl", "text_loss", "other_rules_loss")


@dataclasses.dataclass(frozen=True)
class Settings:
    shape: tuple[int, int, int]
    seeds: int
    rules: int
    questions: int
    shown: int  # questions with answers in the prompt
    length: int  # of X
    pretraining_steps: int
    pretraining_batch: int
    steps: int
    test: int  # sequences of either kind
    batch: int = 32
    rate: float = 3e-3
    factor: float = 0.2  # distillation's learning rate, as a multiple of pre-training's
    vocab: int = 64
    spread: float = 1.3


SETTINGS = {
    "quick": Settings((32, 2, 2), 3, 3, 12, 6, 12, 600, 32, steps=80, test=200, rate=5e-3),
    "full": Settings((64, 2, 4), 5, 4, 32, 8, 24, 2500, 32, steps=400, test=1000),
    "gpu": Settings((256, 4, 4), 5, 8, 64, 16, 64, 5000, 64, steps=1000, test=1000, rate=1e-3),
}


class ContextDistillation:
    name = "context"
    title = "Context distillation"

    def units(self, preset: Preset) -> list[Unit]:
        s = SETTINGS[preset.name]
        source: dict[str, Any] = {"kind": "bigram", "vocab": s.vocab, "spread": s.spread}
        if preset.name == "gpu":
            source = tasks.text_config(preset.text)
        settings = dataclasses.asdict(s)
        shared = {name: settings[name] for name in settings if name not in ("seeds", "vocab", "spread")}
        shared |= {"revision": REVISION, "shape": list(s.shape), "source": source, "device": preset.device}
        vocab = s.vocab + 2 * s.questions + 5
        tokens, prompt = s.length + 1, 2 * s.shown
        pretraining = s.pretraining_steps * training.step_seconds(
            s.shape, s.pretraining_batch * (2 * tokens + prompt) // 2, vocab
        )  # fmt: skip
        units: list[Unit] = []
        for seed in range(s.seeds):
            group = f"{self.name} {seed}"
            config = {**shared, "seed": seed, "loss": "none"}
            units.append(Unit(self.name, config, f"teacher, seed {seed}", group, 2.0 + pretraining))
            step = training.step_seconds(s.shape, s.batch * (4 * tokens + prompt) // 3, vocab)
            for loss in LOSSES:
                config = {**shared, "seed": seed, "loss": loss}
                units.append(Unit(self.name, config, f"{loss}, seed {seed}", group, 1.0 + s.steps * step))
        return units

    def run(self, unit: Unit, store: Store) -> dict[str, Any]:
        c = unit.config
        world = World(c)
        shared = {name: c[name] for name in c if name not in ("loss", "steps", "batch", "factor", "test")}
        state = store.state("context", shared, lambda: _pretrained(world, shared))
        teacher = training.restore(c["shape"], world.vocab, state, c["device"])
        plain, prompted = _figures(world, teacher, teacher, False), _figures(world, teacher, teacher, True)
        # First of all: without a prompt that helps there is nothing to distil, and a KL may fall for other reasons.
        gain = _first_answers(world, teacher, world.prompt) - _first_answers(world, teacher, None)
        helps = bool(gain.mean() > 2 * gain.std() / len(gain) ** 0.5)
        if c["loss"] == "none":
            return {"plain": plain, "prompted": prompted, "helps": helps}
        if not helps:
            return {"helps": False}
        student = training.restore(c["shape"], world.vocab, state, c["device"])
        _distil(world, student, teacher, c["loss"])
        return {"student": _figures(world, student, teacher, False), "helps": True}

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        return _section(self.title, results, directory)


class World:
    """Tokens: the source's, those of the questions, those of the answers, and specials."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        self.c = c
        self.source = tasks.make_source(c["source"], c["seed"])
        self.questions = torch.arange(c["questions"]) + self.source.vocab
        first = self.source.vocab + c["questions"]
        random = tasks.generator(c["seed"], 11)
        # (rules, questions): each rule gives every question an answer, and every answer to one question.
        self.answers = torch.stack(
            [torch.randperm(c["questions"], generator=random) + first for _ in range(c["rules"])]
        )
        self.begin = first + c["questions"]
        self.vocab = self.begin + 1
        self.prompt = self.dialogues(torch.zeros(1, dtype=torch.int64), 2 * c["shown"], random)[0]
        self.collate = ContextDistillationCollator(
            pad_token_id=self.begin, prompt_ids=[self.begin], teacher_prompt_ids=[self.begin, *self.prompt.tolist()]
        )

    def dialogues(self, rules: Tensor, length: int, random: torch.Generator) -> Tensor:
        """(B, length) questions and answers by ``rules`` (B,)."""
        which = torch.randint(len(self.questions), (len(rules), -(-length // 2)), generator=random)
        pairs = torch.stack((self.questions[which], self.answers[rules[:, None], which]), -1)
        return pairs.flatten(1)[:, :length]

    def any_rules(self, count: int, random: torch.Generator) -> Tensor:
        return torch.randint(len(self.answers), (count,), generator=random)

    def text(self, count: int, random: torch.Generator, held_out: bool = False) -> Tensor:
        return self.source.draw(count, self.c["length"], random, held_out)

    def behind(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        """x (B, T) with the token of the beginning, and a prompt (B, P) or (P,), in front."""
        begin = torch.full((len(x), 1), self.begin, dtype=torch.int64)
        return torch.cat((begin, x) if prompt is None else (begin, prompt.expand(len(x), -1), x), 1)


def _pretrained(world: World, c: Mapping[str, Any]) -> dict[str, Tensor]:
    """Language modelling on text and dialogues, half of them behind a prompt of the same rule."""
    model = training.build(c["shape"], world.vocab, c["seed"], c["device"])
    random, half = tasks.generator(c["seed"], 12), c["pretraining_batch"] // 2

    def loss_of(step: int) -> Tensor:
        rules = world.any_rules(half, random)
        x = torch.cat((world.dialogues(rules[: half // 2], c["length"], random), world.text(half - half // 2, random)))
        prompts = world.dialogues(rules, 2 * c["shown"], random)
        other = world.dialogues(world.any_rules(half // 2, random), c["length"], random)
        alone = torch.cat((other, world.text(half - half // 2, random)))
        losses = []
        for tokens in (world.behind(x, prompts), world.behind(alone)):
            tokens = tokens.to(c["device"])
            hidden = model(tokens[:, :-1])
            losses.append(training.language_loss(model, hidden, tokens[:, 1:], per_sequence=False))
        return (losses[0] + losses[1]) / 2

    training.optimise(model, c["pretraining_steps"], c["rate"], loss_of, warm_up=100)
    return model.state_dict()


def _logits(model: Transformer, tokens: Tensor) -> Tensor:
    return model(tokens) @ model.embedding.weight.T


def _distil(world: World, student: Transformer, teacher: Transformer, name: str) -> None:
    c = world.c
    k, tail = LOSSES[name]
    random, half = tasks.generator(c["seed"], 13), c["batch"] // 2

    def loss_of(step: int) -> Tensor:
        rules = torch.zeros(half, dtype=torch.int64)
        x = torch.cat((world.dialogues(rules, c["length"], random), world.text(c["batch"] - half, random)))
        batch = {key: value.to(c["device"]) for key, value in world.collate(list(x)).items()}
        with torch.no_grad():
            wanted = _logits(teacher, batch["teacher_input_ids"])
        logits = _logits(student, batch["input_ids"])
        if k is None:
            return distillation_loss(logits, wanted, teacher_rows=batch["teacher_rows"])
        return topk_distillation_loss(logits, topk_logprobs(wanted, k), tail=tail, teacher_rows=batch["teacher_rows"])

    training.optimise(student, c["steps"], c["factor"] * c["rate"], loss_of)


@torch.no_grad()
def _first_answers(world: World, model: Transformer, prompt: Tensor | None) -> Tensor:
    """(questions,) the probability of the right answer to each question, asked first."""
    asked = world.behind(world.questions[:, None], prompt).to(world.c["device"])
    answers = world.answers[0].to(world.c["device"])
    return token_logprobs(_logits(model, asked)[:, -1], answers).exp()


@torch.no_grad()
def _figures(world: World, model: Transformer, teacher: Transformer, prompted: bool) -> dict[str, float]:
    """What a model reaches on held-out sequences, with the prompt or without.

    accuracy: of the first answer of a dialogue, over all questions; probability: of the right one;
    dialogue_accuracy: of all answers of dialogues, whose earlier ones are a hint; kl: to the prompted teacher, per
    token of X; text_loss: NLL per token of text; other_rules_loss: NLL per token of dialogues by the other rules.
    """
    c = world.c
    device, random = c["device"], tasks.generator(c["seed"], 14)
    prompt = world.prompt if prompted else None
    ours = torch.zeros(c["test"], dtype=torch.int64)
    dialogues = world.dialogues(ours, c["length"], random)
    text = world.text(c["test"], random, held_out=True)
    others = world.dialogues(
        1 + torch.randint(len(world.answers) - 1, ours.shape, generator=random), c["length"], random
    )
    start = 1 + (len(world.prompt) if prompted else 0)  # of X

    def logits_of(x: Tensor) -> Tensor:  # (B, T, V), predictions of x
        return torch.cat(
            [_logits(model, world.behind(part, prompt).to(device))[:, start - 1 : -1] for part in x.split(256)]
        )

    def right(x: Tensor, every: slice) -> float:
        found = logits_of(x)[:, every].argmax(-1)
        return float((found == x[:, every].to(device)).double().mean())

    def nll(x: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits_of(x).flatten(0, 1), x.flatten().to(device)))

    every_question = torch.stack((world.questions, world.answers[0]), 1)
    kl = 0.0
    if not (prompted and model is teacher):
        total, count = 0.0, 0
        for part in torch.cat((dialogues, text)).split(256):
            batch = {key: value.to(device) for key, value in world.collate(list(part)).items()}
            wanted = _logits(teacher, batch["teacher_input_ids"])
            rows = batch["teacher_rows"]
            loss = distillation_loss(_logits(model, batch["input_ids"]), wanted, teacher_rows=rows, reduction="sum")
            total, count = total + float(loss), count + int((rows >= 0).sum())
        kl = total / count
    return {
        "accuracy": right(every_question, slice(1, 2)),
        "probability": float(_first_answers(world, model, prompt).mean()),
        "dialogue_accuracy": right(dialogues, slice(1, None, 2)),
        "kl": kl,
        "text_loss": nll(text),
        "other_rules_loss": nll(others),
    }


# The report


def _section(title: str, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
    c = results[0][0].config
    ways: dict[str, dict[int, dict[str, float]]] = {}
    stopped: list[int] = []
    for unit, result in results:
        seed = unit.config["seed"]
        if unit.config["loss"] == "none":
            ways.setdefault("prompted", {})[seed] = result["prompted"]
            ways.setdefault("plain", {})[seed] = result["plain"]
            if not result["helps"]:
                stopped.append(seed)
        elif result["helps"]:
            ways.setdefault(unit.config["loss"], {})[seed] = result["student"]
    seeds = sorted(set(ways["plain"]) - set(stopped))
    both = ([ways[way][s]["probability"] for s in ways["plain"]] for way in ("prompted", "plain"))
    check = difference_interval(*both)
    parts = [
        f"""Checked first: a dialogue's first answer is the right one with a probability that is {check} higher for the
        prompted model than for the plain one ({check.n} seeds, {c["questions"]} questions each).""",
    ]
    if not seeds:
        parts.append("The prompt helps on no seed, so that there is nothing to distil: the experiment stopped here.")
        claim = Claim(
            "context distillation is about as good as the prompt", "stopped: the prompt doesn't help", "-", "-"
        )
        return Section(title, blocks(*parts), [claim])
    parts.append(
        f"On the seeds {stopped} it doesn't help by two standard errors: they are left out below."
        if stopped
        else "It helps on every seed, by more than two standard errors."
    )
    order = ["prompted", *LOSSES, "plain"]
    values = {way: {name: [ways[way][s][name] for s in seeds] for name in _COUNTED} for way in order}
    rows = [[way, *(mean_interval(values[way][name]) for name in _COUNTED)] for way in order]
    tax = [
        [way, *(difference_interval(values[way][name], values["plain"][name]) for name in _COUNTED[4:])]
        for way in order[:-1]
    ]
    made, panels = figure(3)
    for name, axes in zip(("accuracy", "kl", "text_loss"), panels, strict=True):
        for place, (way, colour) in enumerate(zip(order, COLOURS, strict=False)):
            mean = mean_interval(values[way][name])
            error = None if len(seeds) == 1 else [[mean.mean - mean.low], [mean.high - mean.mean]]
            axes.errorbar([mean.mean], [place], xerr=error, fmt="o", color=colour, capsize=2)
        axes.set_yticks(range(len(order)), order if axes is panels[0] else [""] * len(order), fontsize=8)
        axes.invert_yaxis()
    panels[0].set(xlabel="accuracy of the first answer")
    panels[1].set(xlabel="KL to the prompted teacher, nats per token")
    panels[2].set(xlabel="NLL of text, nats per token")
    n = f"{c['questions']} questions, {c['test']:,} sequences"
    rows, tax = ([[*row, len(seeds), n] for row in lines] for lines in (rows, tax))
    heads = [
        "",
        "accuracy, first answer",
        "its probability",
        "accuracy, all answers",
        "KL to prompted",
        "NLL of text",
        "NLL, other rules",
    ]
    parts += [
        f"""Width {c["shape"][0]}, {c["shape"][1]} layers, rotary positions, so that no absolute position can be
        learned in place of the prompt. {c["pretraining_steps"]} steps of language modelling on text and on
        dialogues under {c["rules"]} rules; the prompt shows {c["shown"]} answers of one rule. Then {c["steps"]}
        steps of distillation: {c["batch"]} sequences of {c["length"]} tokens, half text, half dialogue; student
        position t is matched with teacher position len(C) + t; {c["factor"]:g}x the learning rate of pre-training
        with a linear decay to 0 (the paper's 0.05x takes more steps than a miniature has). The prompted model
        is the teacher, whose KL is 0.""",
        save(made, directory, "context.png"),
        table([*heads, "seeds", "n"], rows),
        """The tax: NLL per token minus the plain model's, seed by seed. "Other rules" are dialogues in which what
        the prompt says isn't so: who has taken it in pays.""",
        table(["", "text", "other rules", "seeds", "n"], tax),
        """With the tail dropped, the loss falls where the student takes mass from what isn't stored; renormalised,
        nothing says how much mass belongs there. Text, whose distributions are flat, shows both in its NLL.""",
    ]
    best = difference_interval(values["top-50 bucket"]["accuracy"], values["prompted"]["accuracy"])
    full = difference_interval(values["full KL"]["accuracy"], values["prompted"]["accuracy"])
    beside = f"top-50 bucket {best.told()}; full KL {full.told()}"
    name = "text_loss"
    taxes = "; ".join(
        f"{way}: {difference_interval(values[way][name], values['plain'][name]).told()}"
        for way in ("prompted", "full KL", "top-50 bucket", "top-8 dropped tail")
    )
    size = f"width {c['shape'][0]}, {c['shape'][1]} layers"
    return Section(
        title,
        blocks(*parts),
        [
            Claim(
                "context distillation is about as good as the prompt",
                f"accuracy minus the prompted model's: {beside} ({len(seeds)} seeds)",
                size,
                "that a student behaves as prompted where no training sequence went",
            ),
            Claim(
                "prompts and distillation cost little on other tasks (the alignment tax)",
                f"NLL of text minus the plain model's: {taxes} ({len(seeds)} seeds)",
                size,
                "a tax that vanishes or becomes a bonus with size",
            ),
        ],
    )
