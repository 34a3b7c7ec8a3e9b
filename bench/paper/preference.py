"""Experiment 5: a preference model on real pairs, the ranked loss over hidden states of a small pretrained model.

The model stays as it is, and a linear head reads its hidden states at the end of a dialogue, as the paper's does (or
their mean). Of a few thousand pairs 100 million parameters would learn noise; the fit of a head is convex, so that
nothing depends on luck. Every pair is scored by a head that was fitted without it: dialogues that begin alike share a
fold, and layer and ridge are chosen inside of the training folds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper import real
from bench.paper.experiment import Preset
from bench.paper.report import COLOURS, Claim, Section, figure, save, table
from bench.paper.runs import Store, Unit
from bench.paper.statistics import mean_interval
from pyalign import bradley_terry, pairwise_preference_loss, preference_metrics
from pyalign.evaluation import Question, evaluate_multiple_choice, mean_estimate, plot_calibration

REVISION = 1
ELO = 400 / math.log(10)  # of one unit of score: 173.718
BOOTSTRAP = 500
POOLINGS = ("last", "mean")
RIDGES = (0.03, 0.1, 0.3, 1.0)
DEPTHS = (1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)  # of the layers whose outputs heads may read
LANGUAGE = ("mean_logprob", "sum_logprob", "information")
WRITERS = ("plain", "prompted")


@dataclasses.dataclass(frozen=True)
class Settings:
    pairs: int | None  # the first so many; None: all
    piece: int  # pairs of a unit
    seeds: int
    folds: int
    sizes: tuple[int, ...]  # training pairs of the learning curve
    dialogues: int  # that models answer
    answer_tokens: int
    max_tokens: int = 512  # of a dialogue, from its end


SETTINGS = {
    "quick": Settings(48, 24, seeds=2, folds=3, sizes=(16,), dialogues=2, answer_tokens=8, max_tokens=128),
    "full": Settings(None, 300, seeds=5, folds=5, sizes=(100, 250, 500, 1000), dialogues=80, answer_tokens=48),
    "gpu": Settings(None, 1000, seeds=5, folds=5, sizes=(100, 250, 500, 1000), dialogues=400, answer_tokens=64),
}


def fit(hidden: Tensor, ridge: float) -> Tensor:
    """(H,) the head, whose scores are hidden @ head: the least ranked loss over pairs (N, 2, H), chosen first, plus
    ridge / 2 times the squared norm of its weights on features of one spread."""
    spread = hidden.flatten(0, 1).std(0).clamp_min(1e-6)
    gaps = (hidden[:, 0] - hidden[:, 1]) / spread
    zero = gaps.new_zeros(len(gaps))
    weight = gaps.new_zeros(gaps.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> float:
        solver.zero_grad()
        value = pairwise_preference_loss(gaps @ weight, zero) + 0.5 * ridge * weight.square().sum()
        value.backward()
        return float(value.detach())

    solver.step(loss)
    return weight.detach() / spread


def folds_of(groups: Sequence[str], count: int, seed: int) -> Tensor:
    """(N,) the fold of each item, by a hash of its group."""
    digests = [hashlib.sha256(f"{seed} {group}".encode()).digest() for group in groups]
    return torch.tensor([int.from_bytes(x[:8], "big") % count for x in digests])


def choose(hidden: Tensor, inner: Tensor) -> tuple[int, float]:
    """Layer and ridge with the least loss on fold 0 of ``inner``, by heads of the others. hidden (N, 2, L, H)."""
    best = (math.inf, 0, RIDGES[0])
    for layer in range(hidden.shape[2]):
        for ridge in RIDGES:
            head = fit(hidden[inner != 0, :, layer], ridge)
            chosen, rejected = (hidden[inner == 0, :, layer] @ head).unbind(1)
            best = min(best, (float(pairwise_preference_loss(chosen, rejected)), layer, ridge))
    return best[1:]


def cross_validated(hidden: Tensor, groups: Sequence[str], count: int, seed: int, size: int | None = None) -> Tensor:
    """(N, 2) scores of every pair by a head that was fitted without its fold: on all other folds, or on ``size`` of
    their pairs. hidden (N, 2, L, H)."""
    folds, inner = folds_of(groups, count, seed), folds_of(groups, count, seed + 1_000_000)
    scores = torch.empty(hidden.shape[:2], dtype=hidden.dtype)
    generator = torch.Generator().manual_seed(seed)
    for fold in range(count):
        train = (folds != fold).nonzero().squeeze(1)
        train = train[torch.randperm(len(train), generator=generator)[:size]]
        layer, ridge = choose(hidden[train], inner[train])
        scores[folds == fold] = hidden[folds == fold][:, :, layer] @ fit(hidden[train][:, :, layer], ridge)
    return scores


# Units


class PreferenceModel:
    name = "preference"
    title = "A preference model on real pairs"

    def units(self, preset: Preset) -> list[Unit]:
        s = SETTINGS[preset.name]
        pairs = real.file_of(preset, "pairs")
        model = real.model_of(preset)
        shared = {"revision": REVISION, "model": model, "pairs": pairs, "device": preset.device}
        count = len(real.read_pairs(pairs, s.pairs))
        shared |= {"count": count, "piece": s.piece, "max_tokens": s.max_tokens}
        token = 2e-3 if preset.device == "cpu" else 2e-5
        jobs: list[tuple[dict[str, Any], str, float]] = []
        for begin in range(0, count, s.piece):
            label = f"hidden states from pair {begin}"
            jobs.append(({"job": "states", "begin": begin}, label, 10 + 320 * token * min(s.piece, count - begin)))
        jobs.append(({"job": "language"}, "log-probs", 10 + 800 * token * count))
        for seed in range(s.seeds):
            config = {"job": "heads", "seed": seed, "folds": s.folds, "sizes": [x for x in s.sizes if x < count]}
            jobs.append((config, f"heads, seed {seed}", 5 + 0.04 * count * (1 + len(s.sizes)) / 5))
        for writer in WRITERS:
            config = {"job": "answers", "writer": writer, "dialogues": s.dialogues, "tokens": s.answer_tokens}
            config |= {"folds": s.folds}
            jobs.append((config, f"answers, {writer}", 10 + 0.05 * s.dialogues * s.answer_tokens))
        return [Unit(self.name, {**shared, **config}, label, self.name, seconds) for config, label, seconds in jobs]

    def run(self, unit: Unit, store: Store) -> dict[str, Any]:
        c = unit.config
        pairs = real.read_pairs(c["pairs"], c["count"])
        if c["job"] == "states":
            _states(c, c["begin"], store)
            return {}
        if c["job"] == "language":
            return _language(c, pairs)
        if c["job"] == "heads":
            hidden = torch.cat([_states(c, begin, store) for begin in range(0, c["count"], c["piece"])])
            return _heads(c, pairs, hidden)
        return _answers(c, pairs, store)

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        return _section(self.title, results, directory)


def _states(config: Any, begin: int, store: Store) -> Tensor:
    """(n, 2, poolings, layers, H) of the piece that begins with this pair, in float32."""
    names = ("revision", "model", "pairs", "device", "count", "piece", "max_tokens")
    key = {name: config[name] for name in names} | {"begin": begin}

    def compute() -> dict[str, Tensor]:
        pairs = real.read_pairs(config["pairs"], config["count"])[begin : begin + config["piece"]]
        texts = [question.context + side for question in pairs for side in question.continuations]
        found = real.hidden_states(config["model"], texts, DEPTHS, config["max_tokens"], config["device"])
        return {"hidden": found.unflatten(0, (-1, 2)).half()}

    return store.state("hidden states", key, compute)["hidden"].float()


def _language(config: Any, pairs: Sequence[Question]) -> dict[str, Any]:
    """What the language model itself prefers."""
    model, tokenizer = real.load(config["model"], config["device"])
    found = evaluate_multiple_choice(
        model, pairs, tokenizer, scorings=LANGUAGE, null_context="Assistant:", max_length=config["max_tokens"]
    )
    return {name: found.values[f"{name}/accuracy"].tolist() for name in (*LANGUAGE, "longest", "shortest")}


def _heads(config: Any, pairs: Sequence[Question], hidden: Tensor) -> dict[str, Any]:
    groups = [_group(question) for question in pairs]
    result: dict[str, Any] = {}
    for i, pooling in enumerate(POOLINGS):
        scores = cross_validated(hidden[:, :, i], groups, config["folds"], config["seed"])
        result[pooling] = [[round(x, 5) for x in row] for row in scores.tolist()]
    result["curve"] = {
        str(size): _right(cross_validated(hidden[:, :, 1], groups, config["folds"], config["seed"], size)).tolist()
        for size in config["sizes"]
    }
    return result


def _group(question: Question) -> str:
    """What dialogues that begin alike share: all up to the first answer."""
    return question.context.partition("\n\nAssistant:")[0]


def _right(scores: Tensor) -> Tensor:
    """(N,) 1 where the chosen response has the higher score, 1/2 where both have the same."""
    return 0.5 + 0.5 * (scores[:, 0] - scores[:, 1]).sign()


def _answers(config: Any, pairs: Sequence[Question], store: Store) -> dict[str, Any]:
    """Scores of a model's own answers in dialogues of fold 0, and of both responses there, by a head of the others."""
    groups = [_group(question) for question in pairs]
    folds = folds_of(groups, config["folds"], 0)
    asked = [pairs[i] for i in (folds == 0).nonzero().squeeze(1)[: config["dialogues"]].tolist()]
    prompt = real.PROMPT.read_text(encoding="utf-8") if config["writer"] == "prompted" else ""
    contexts = [question.context for question in asked]
    written = real.answers(config["model"], [prompt + x for x in contexts], config["tokens"], config["device"])
    hidden = torch.cat([_states(config, begin, store) for begin in range(0, config["count"], config["piece"])])[:, :, 1]
    train = folds != 0
    layer, ridge = choose(hidden[train], folds_of(groups, config["folds"], 1_000_000)[train])
    head = fit(hidden[train][:, :, layer], ridge)
    texts = [x + answer for x, answer in zip(contexts, written, strict=True)]
    own = real.hidden_states(config["model"], texts, DEPTHS, config["max_tokens"], config["device"])[:, 1, layer]
    both = hidden[folds == 0][: len(asked)][:, :, layer] @ head
    return {
        "written": written,
        "own": (own @ head).tolist(),
        "chosen": both[:, 0].tolist(),
        "rejected": both[:, 1].tolist(),
    }


# The report


def _section(title: str, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
    by_job: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for unit, result in results:
        by_job.setdefault(unit.config["job"], []).append((unit.config, result))
    config = results[0][0].config
    language, heads = by_job["language"][0][1], [result for _, result in by_job["heads"]]
    seeds = len(heads)
    right = {
        pooling: torch.stack([_right(torch.tensor(result[pooling])) for result in heads]).mean(0)
        for pooling in POOLINGS
    }
    rows = [
        [f"head on {name} hidden state" if name == "last" else f"head on {name} of hidden states", x, seeds]
        for name, x in ((name, mean_estimate(right[name].tolist(), proportion=True)) for name in POOLINGS)
    ]
    rows += [
        [f"{name}, no training", mean_estimate(language[name], proportion=True), 1]
        for name in (*LANGUAGE, "longest", "shortest")
    ]
    first: dict[str, Any] = {}  # of seed 0
    calibration: list[list[Any]] = []
    for pooling in POOLINGS:
        scores = torch.tensor([result[pooling] for result in heads], dtype=torch.float64)  # (seeds, N, 2)
        found = [preference_metrics(*(side.contiguous() for side in x.unbind(1))) for x in scores]
        first[f"{pooling}, seed 0"] = found[0]
        gaps = scores[..., 0] - scores[..., 1]
        losses, squares = -torch.nn.functional.logsigmoid(gaps).mean(0), torch.sigmoid(-gaps).square().mean(0)
        calibration.append(
            [pooling, *(mean_estimate(x.tolist(), proportion=False) for x in (losses, squares)),
             mean_interval([float(x.ece) for x in found])]
        )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    plot_calibration(first, directory / "preference_calibration.png", title="held-out pairs")
    sizes = sorted(int(size) for size in heads[0]["curve"])
    curve = {size: [result["curve"][str(size)] for result in heads] for size in sizes}
    whole = round(config["count"] * (1 - 1 / by_job["heads"][0][0]["folds"]))
    estimates = {
        size: mean_estimate(torch.tensor(values).mean(0).tolist(), proportion=True) for size, values in curve.items()
    } | {whole: mean_estimate(right["mean"].tolist(), proportion=True)}
    made, (axes,) = figure(1)
    heights = [x.value for x in estimates.values()]
    errors = [
        [x.value - x.lower for x in estimates.values()],
        [x.upper - x.value for x in estimates.values()],
    ]
    axes.errorbar(list(estimates), heights, errors, fmt="o-", ms=4, capsize=2, color=COLOURS[0])
    axes.axhline(0.5, color="#777", lw=1, ls="--")
    axes.set(xscale="log", xlabel="training pairs", ylabel="accuracy on held-out pairs")
    curve_plot = save(made, directory, "preference_curve.png")
    best = max(POOLINGS, key=lambda name: float(right[name].mean()))
    estimate = mean_estimate(right[best].tolist(), proportion=True)
    name, folds = Path(config["pairs"]["path"]).name, by_job["heads"][0][0]["folds"]
    body = f"""{config["count"]:,} pairs of {name}, read by {config["model"]["name"]}, whose weights
stay as they are. Heads are fitted by the ranked loss with a ridge; {folds} folds, {seeds} seeds (of the folds). A
pair's figure is its mean over seeds, and intervals (95 %, Wilson) are over pairs.

{table(["who chooses", "accuracy", "seeds"], rows)}

Calibration (the interval of its error is a t interval over seeds):

{table(["head", "log-loss", "Brier score", "calibration error"], calibration)}

![calibration](preference_calibration.png)

Accuracy of the head on means by the number of training pairs:
{"; ".join(f"{n:,}: {x}" for n, x in estimates.items())}.

{curve_plot}

{_elo(by_job["answers"])}
"""
    claim = Claim(
        "ranked preference models learn what people prefer, where imitation hardly tells",
        f"accuracy of a head on frozen hidden states {estimate}, of the same model's mean log-prob without training "
        f"{mean_estimate(language['mean_logprob'], proportion=True)}, of the shorter response "
        f"{mean_estimate(language['shortest'], proportion=True)}",
        config["model"]["name"],
        "fine-tuning of all weights on many thousands of pairs",
    )
    return Section(title, body, [claim])


def _elo(answers: Sequence[tuple[Any, dict[str, Any]]]) -> str:
    """Ratings of the responses in the data and of a model's own answers, by the head's win probabilities."""
    found = {c["writer"]: result for c, result in answers}
    first = found[WRITERS[0]]
    scores = {"chosen": first["chosen"], "rejected": first["rejected"]}
    scores |= {f"{writer} model": found[writer]["own"] for writer in WRITERS}
    names = list(scores)
    values = torch.tensor([scores[name] for name in names], dtype=torch.float64)  # (players, dialogues)
    count = values.shape[1]
    random = torch.Generator().manual_seed(0)
    again = torch.randint(count, (BOOTSTRAP, count), generator=random)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    drawn = torch.stack([_ratings(values[:, index]) for index in again]).quantile(ends, 0)  # (2, players)
    ratings, rows = _ratings(values), []
    for i, name in enumerate(names):
        gap = mean_estimate((ELO * (values[i] - values[1])).tolist(), proportion=False)
        shown = (float(ratings[i]), *drawn[:, i].tolist()), (gap.value, gap.lower, gap.upper)
        rows.append([name, *(f"{x:+.0f} ({low:+.0f} to {high:+.0f}, n = {count})" for x, low, high in shown)])
    return f"""Elo differences to the rejected responses in {count} dialogues of one fold, by a head of the others: of
Bradley-Terry ratings fitted to its win probabilities (bootstrap over dialogues), and of scores (one unit is {ELO:.1f});
95 %. The model's own answers have {answers[0][0]["tokens"]} tokens at most. These are the head's opinions, and no
person's.

{table(["response", "Elo, Bradley-Terry", "Elo, mean of scores"], rows)}"""


def _ratings(values: Tensor) -> Tensor:
    """(players,) Elo of scores (players, dialogues), player 1 at 0: of the probabilities with which they beat each
    other, summed over dialogues."""
    players = range(len(values))
    ordered = [(i, j) for i in players for j in players if i != j]
    winners, losers = (torch.tensor(side) for side in zip(*ordered, strict=True))
    weight = torch.sigmoid(values[winners] - values[losers]).sum(1)
    strengths = bradley_terry(winners, losers, num_players=len(values), weight=weight).strengths
    return (ELO * (strengths - strengths[1])).double()
