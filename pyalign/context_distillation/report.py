"""What a distillation achieved and cost: ``report.md``, ``curve.png``, and the figures in ``report.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyalign._files import atomic_file, exclusive, write_text
from pyalign._log import read_log
from pyalign._optional import require
from pyalign._options import JobError, OptionError, at_least, differences, whole_text
from pyalign.context_distillation.collect import PromptedModel
from pyalign.context_distillation.evaluate import (
    ExactComparison,
    continuation,
    exact_comparison,
    fraction_left,
)
from pyalign.context_distillation.language import CausalLM, load
from pyalign.context_distillation.loss_cost import LossCase, LossCost, measure_apart
from pyalign.context_distillation.train import describe_store, held_out_kls
from pyalign.teacher_store import TeacherStore

_BEGINNING = 24  # tokens of a held-out sequence that are continued where no sample is given


@dataclass(frozen=True)
class ReportSettings:
    """What the report shows beside the run's own figures.

    Raises:
        OptionError: a setting out of range.
    """

    samples: tuple[str, ...] = ()  # texts to continue; none: the beginnings of the first two held-out sequences
    sample_tokens: int = 60  # length of a continuation
    exact_sequences: int = 16  # held-out sequences on which the KL over the whole vocabulary is computed too

    def __post_init__(self) -> None:
        for text in self.samples:
            whole_text("samples", text)
        if not all(text.strip() for text in self.samples):
            raise OptionError("samples", "one is empty; wanted texts to continue")
        at_least("sample_tokens", self.sample_tokens, 1)
        at_least("exact_sequences", self.exact_sequences, 1)


@dataclass(frozen=True)
class Sample:
    text: str
    plain: str
    prompted: str
    distilled: str


@dataclass(frozen=True)
class Figures:
    """Everything the report shows; KLs are to the prompted model, in nats per token of held-out text."""

    kl_before: float  # k+1 categories, all held-out tokens
    kl_after: float
    exact: ExactComparison
    samples: list[Sample]
    collect_tokens_per_second: float | None  # None: the log is gone
    collect_seconds: float
    train_tokens_per_second: float
    train_seconds: float
    bytes_per_token: float
    loss_share: float  # of a training step's time
    loss_case: LossCase  # the loss as it was trained, on the rows of one micro-batch at most
    loss_pyalign: LossCost | None  # of that loss alone; None: it could not be measured
    loss_torch: LossCost | None

    @property
    def fraction_left(self) -> float:
        return fraction_left(self.kl_before, self.kl_after)


def report(
    lm: CausalLM,
    store: TeacherStore,
    train_directory: str | Path,
    directory: str | Path,
    settings: ReportSettings = ReportSettings(),
    *,
    on_part: Callable[[str], None] = lambda part: None,
) -> Figures:
    """Measure and write the report.

    Both models are in memory at once. Killed, it leaves no half-written file and is simply run again.

    Args:
        lm: the model before training.
        store: what it was trained on.
        train_directory: where ``train`` left the log and the trained model, which is loaded from there.
        directory: where the report goes.
        settings: what it shows beside the run's own figures.
        on_part: told what is measured next.

    Raises:
        OptionError: prompt, sample and continuation are longer than the model reads.
        JobError: training has not finished, was on another store, or its log is lost.
        StoreError: the store was collected from another model.
    """
    store.require_match(lm.identity)
    train_directory, directory = Path(train_directory), Path(directory)
    if not (train_directory / "model").exists():
        raise JobError(
            f"{train_directory} holds no trained model; `pyalign distill train` makes it, or goes on making it"
        )
    prompt, length = store.manifest.prompt, settings.sample_tokens
    check_samples(lm, prompt, settings)
    with exclusive(directory):
        log = read_log(train_directory / "train.jsonl")
        described: dict[str, Any] = json.loads((train_directory / "train.json").read_text(encoding="utf-8"))
        changed = differences(described["store"], describe_store(store.manifest), "the store's ")
        if changed:
            raise JobError(
                f"{train_directory} was not trained on {store.directory}: {'; '.join(changed)}. Give the store that it "
                "was trained on"
            )
        kls = held_out_kls(log)
        dtype = str(lm.dtype).removeprefix("torch.")
        on_part("load the distilled model")
        distilled = load(train_directory / "model", dtype=dtype, device=lm.device)
        teacher = PromptedModel(lm, prompt)

        on_part("KL over the whole vocabulary")
        held_out = store.split(held_out=True)
        exact = exact_comparison(lm, distilled, teacher, store, held_out[: settings.exact_sequences])
        on_part("samples")
        texts = settings.samples or [_beginning(lm, store, i) for i in held_out[:2]]
        shown = [
            Sample(
                text,
                continuation(lm, text, tokens=length),
                continuation(lm, text, prompt=prompt, tokens=length),
                continuation(distilled, text, tokens=length),
            )
            for text in texts
        ]
        on_part("the loss alone, and in plain torch")
        steps = [e for e in log if e["event"] == "step"]
        case = _trained_loss(lm, store, described)
        costs: dict[str, LossCost | None] = {}
        for name in ("pyalign", "torch"):
            try:
                costs[name] = measure_apart(name, case)
            except RuntimeError as error:  # plain torch may want more memory than there is
                on_part(f"the loss in {name} could not be measured: {error}")
                costs[name] = None

        collect_tokens, collect_seconds = _collect_log(store.directory)
        train_seconds = sum(e["seconds"] for e in steps)
        figures = Figures(
            kl_before=kls[0][1],
            kl_after=kls[-1][1],
            exact=exact,
            samples=shown,
            collect_tokens_per_second=collect_tokens / collect_seconds if collect_seconds else None,
            collect_seconds=collect_seconds,
            train_tokens_per_second=sum(e["tokens"] for e in steps) / train_seconds,
            train_seconds=train_seconds,
            bytes_per_token=store.num_bytes / store.manifest.num_tokens,
            loss_share=sum(e["loss_seconds"] for e in steps) / train_seconds,
            loss_case=case,
            loss_pyalign=costs["pyalign"],
            loss_torch=costs["torch"],
        )
        _draw(log, case, directory / "curve.png")
        fields = {**dataclasses.asdict(figures), "fraction_left": figures.fraction_left}
        for name, value in (("exact", exact), ("loss_pyalign", costs["pyalign"]), ("loss_torch", costs["torch"])):
            fields[name] = None if value is None else value._asdict()
        write_text(directory / "report.json", json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        write_text(directory / "report.md", _markdown(figures, store, lm, described, len(steps)))
    return figures


def check_samples(lm: CausalLM, prompt: str, settings: ReportSettings) -> None:
    """Raise an ``OptionError`` where prompt, sample and continuation are more than the model reads."""
    if lm.context is None:
        return
    samples = [len(lm.encode(text)) for text in settings.samples] or [_BEGINNING]
    room = lm.context - len(lm.encode(prompt)) - max(samples) - (lm.bos is not None)
    if settings.sample_tokens > room:
        raise OptionError(
            "sample_tokens",
            f"got {settings.sample_tokens}; wanted at most {room}, what prompt and sample leave of the {lm.context} "
            "tokens that the model reads",
        )


def _trained_loss(lm: CausalLM, store: TeacherStore, described: dict[str, Any]) -> LossCase:
    """The loss of the run, on as many rows as its largest micro-batch can have."""
    settings = described["settings"]
    sequences = min(settings["micro_batch"], settings["batch_size"])
    return LossCase(
        rows=min(sequences * int(store.lengths.max()), store.manifest.num_tokens),
        vocab=lm.vocab_size,
        k=store.manifest.k,
        dtype=described["dtype"],
        device=str(lm.device),
        threads=torch.get_num_threads(),
        temperature=store.manifest.temperature,
        divergence=settings["divergence"],
        beta=settings["beta"],
        tail=settings["tail"],
    )


def _collect_log(directory: Path) -> tuple[int, float]:
    """Tokens and seconds of the shards in the log."""
    entries = read_log(directory / "collect.jsonl")
    return sum(e["tokens"] for e in entries), sum(e["seconds"] for e in entries)


def _beginning(lm: CausalLM, store: TeacherStore, index: int) -> str:
    """The first tokens of a sequence, as text."""
    return lm.tokenizer.decode(store.sequence(index).tokens[:_BEGINNING].tolist(), skip_special_tokens=True)


def _draw(log: list[dict[str, Any]], case: LossCase, path: Path) -> None:
    figure = require("matplotlib.figure").Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = [e for e in log if e["event"] == "step"]
    losses = [e["loss"] for e in steps]
    trained = f"training loss: {case.divergence}, tail {case.tail}"
    axes.plot([e["step"] for e in steps], losses, color="#9ab", lw=1.2, label=trained)
    kls = held_out_kls(log)
    axes.plot(
        [s for s, _ in kls],
        [kl for _, kl in kls],
        "o-",
        color="#c33",
        label=f"held out: KL(prompted || model), {case.k} + 1 categories",
    )
    bottom = None if min(losses) < 0 else 0  # of tail "drop", which is no divergence
    axes.set(xlabel="step", ylabel="nats per token", ylim=(bottom, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _markdown(figures: Figures, store: TeacherStore, lm: CausalLM, described: dict[str, Any], steps: int) -> str:
    manifest, exact = store.manifest, figures.exact
    parts = [
        "# Context distillation",
        f"The teacher is `{Path(manifest.model_path).name}` with the prompt below in front; the student is "
        "the same model without it.",
        _quote(manifest.prompt),
        _table(
            [f"KL(prompted ‖ model){_at(manifest.temperature)}, nats per held-out token", "before", "after", "left"],
            [
                _kl_row(
                    f"{manifest.k} + 1 categories, all {manifest.num_held_out_tokens} tokens",
                    figures.kl_before,
                    figures.kl_after,
                ),
                _kl_row(f"whole vocabulary, {exact.tokens} tokens", exact.kl_plain, exact.kl_distilled),
            ],
        ),
        _table(
            ["Negative log-likelihood, nats per token", "plain", "prompted", "distilled"],
            [["the held-out text", *(f"{nll:.3f}" for nll in exact[3:])]],
        ),
        "![training loss and held-out KL](curve.png)",
    ]
    if lm.learned_positions():
        parts.append(
            "**Caution.** This model learns absolute positions, and the prompt moves every text by "
            f"{manifest.prompt_tokens} of them. Part of the KL above is that shift and not the prompt's "
            "meaning; check the distilled model on a task."
        )
    parts += [
        "## What was run",
        _table(["", ""], _run_rows(store, lm, described, steps)),
        "## Cost",
        _table(["", ""], _speed_rows(figures)),
        _case_name(figures.loss_case),
        _table(
            ["", "time", "peak memory", "loss"],
            [_cost_row("pyalign", figures.loss_pyalign), _cost_row("plain torch", figures.loss_torch)],
        ),
        "Peak memory is what a call and its gradient add to the process that holds the inputs, the gradient "
        "included: on a CPU the rise of the resident set's high-water mark in a process of its own; on a GPU "
        "the rise in torch's allocator.",
        "## Samples",
    ]
    for sample in figures.samples:
        parts.append(_quote(sample.text))
        for name in ("plain", "prompted", "distilled"):
            parts += [f"*{name}*", _fence(getattr(sample, name))]
    return "\n\n".join(parts) + "\n"


def _run_rows(store: TeacherStore, lm: CausalLM, described: dict[str, Any], steps: int) -> list[list[str]]:
    manifest, settings = store.manifest, described["settings"]
    held_out = manifest.num_held_out_sequences, manifest.num_held_out_tokens
    sequences, tokens = manifest.num_sequences - held_out[0], manifest.num_tokens - held_out[1]
    last = settings["last_layers"]
    trained = "all parameters" if last is None else f"the last {last} of {len(lm.layers())} layers, the final norm"
    schedule = (
        f"{steps} steps of {settings['batch_size']} sequences, {settings['epochs']} epoch(s), learning rate "
        f"{settings['learning_rate']:g} falling linearly to 0"
    )
    return [
        ["training text", f"{sequences} sequences, {tokens} tokens"],
        [
            "held-out text",
            f"{manifest.num_held_out_sequences} sequences, {manifest.num_held_out_tokens} tokens",
        ],
        ["longest sequence", f"{int(store.lengths.max())} tokens"],
        ["prompt", f"{manifest.prompt_tokens} tokens"],
        [
            "teacher",
            f"top {manifest.k} and the rest, {manifest.logprob_dtype}, temperature {manifest.temperature:g}",
        ],
        ["trained", f"{trained}; computed in {described['dtype']}, AdamW on float32 weights"],
        ["loss", _loss_name(settings["divergence"], settings["beta"], settings["tail"])],
        ["schedule", schedule],
    ]


def _speed_rows(figures: Figures) -> list[list[str]]:
    collected = "no log"
    if figures.collect_tokens_per_second is not None:
        collected = f"{figures.collect_tokens_per_second:.0f} tokens per second ({figures.collect_seconds:.0f} s)"
    return [
        ["collect", collected],
        ["train", f"{figures.train_tokens_per_second:.0f} tokens per second ({figures.train_seconds:.0f} s)"],
        ["store", f"{figures.bytes_per_token:.0f} bytes per token"],
        ["head and loss, gradients too", f"{figures.loss_share:.1%} of a training step"],
    ]


def _at(temperature: float) -> str:
    return "" if temperature == 1 else f" at temperature {temperature:g}"


def _kl_row(name: str, before: float, after: float) -> list[str]:
    return [name, f"{before:.4f}", f"{after:.4f}", f"{fraction_left(before, after):.0%}"]


def _loss_name(divergence: str, beta: float, tail: str) -> str:
    weight = f" (beta {beta:g})" if divergence == "jsd" else ""
    return f"`{divergence}`{weight}, tail `{tail}`"


def _case_name(case: LossCase) -> str:
    return (
        f"The loss and its gradient alone, as trained ({_loss_name(case.divergence, case.beta, case.tail)}, top "
        f"{case.k}, temperature {case.temperature:g}), on random logits {case.rows} x {case.vocab} in {case.dtype} "
        f"(one micro-batch), on {case.device}, {case.threads} threads:"
    )


def _cost_row(name: str, cost: LossCost | None) -> list[str]:
    if cost is None:
        return [name, "could not be measured", "", ""]
    memory = "not measured here" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f} MiB"
    return [name, f"{cost.seconds * 1e3:.1f} ms", memory, f"{cost.loss:.6f}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() + "  " if line else ">" for line in text.strip().splitlines())


def _fence(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
