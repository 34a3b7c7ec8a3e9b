"""``pyalign distill``: context distillation of a local language model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from pyalign._optional import require
from pyalign._options import OptionError, positive, read_text
from pyalign._types import DIVERGENCES, TAILS
from pyalign.cli._session import Session, refusals
from pyalign.context_distillation.collect import CollectSettings
from pyalign.context_distillation.collect import collect as collect_store
from pyalign.context_distillation.language import CausalLM, load
from pyalign.context_distillation.report import ReportSettings, check_samples
from pyalign.context_distillation.report import report as write_report
from pyalign.context_distillation.texts import make_sequences, read_records
from pyalign.context_distillation.train import PAPER_FACTOR, TrainSettings, select_parameters, unchanged
from pyalign.context_distillation.train import train as train_model
from pyalign.teacher_store import LOGPROB_DTYPES, Manifest, TeacherStore

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Distil a prompt into a language model: collect the prompted model's top-k log-probs, train the "
    "model without the prompt on them, report what it achieved. `run` does all three; every command resumes "
    "where it was stopped."
    """

\b
Examples:
  pyalign distill run --model ./SmolLM2 --prompt-file hhh.txt \\
    --text docs.jsonl --out ./run
  pyalign distill collect --model ./SmolLM2 --prompt-file hhh.txt \\
    --text docs.jsonl --store ./store
  pyalign distill train --model ./SmolLM2 --store ./store --out ./run
  pyalign distill report --model ./SmolLM2 --store ./store \\
    --trained ./run --out ./run
""",
)
_TRAIN = TrainSettings()

Model = Annotated[
    Path,
    typer.Option("--model", help="Local Hugging Face model directory, or a GGUF file (or its directory)."),
]
GgufFile = Annotated[str | None, typer.Option(help="The GGUF file in --model, where there are several.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where the hardware multiplies it.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: cuda where there is one.")]
Text = Annotated[
    list[Path],
    typer.Option(
        help='Text (one document a file), JSONL or Parquet with rows {"text"} or {"question", "answer"}, '
        'optionally "group" (held out together). Repeat for more.'
    ),
]
Prompt = Annotated[str | None, typer.Option(help="The prompt to distil.")]
PromptFile = Annotated[Path | None, typer.Option(help="A file holding the prompt, taken as it is.")]
K = Annotated[int, typer.Option("--k", help="Log-probs stored per token (the paper's 50).")]
Temperature = Annotated[float, typer.Option(help="Of teacher and student.")]
StoreDtype = Annotated[str, typer.Option(help=f"Of the stored log-probs: {' or '.join(LOGPROB_DTYPES)}.")]
ChunkLength = Annotated[int, typer.Option(help="Tokens of a sequence at most.")]
MaxSequences = Annotated[
    int | None, typer.Option(help="Stop at so many: half documents, half dialogues where there are both.")
]
TextPrefix = Annotated[str, typer.Option(help="What stands in front of every piece of a document.")]
HeldOut = Annotated[float, typer.Option(help="Fraction of the records (by hash) kept for evaluation.")]
Seed = Annotated[int, typer.Option(help="Of the shuffles and the split.")]
ShardSequences = Annotated[int, typer.Option(help="Sequences of a shard: what is lost at most when the job is killed.")]
CollectBatch = Annotated[int, typer.Option(help="Sequences of a forward pass of the teacher.")]
PromptCache = Annotated[bool, typer.Option(help="Run the prompt once and share its keys and values.")]
Store = Annotated[Path, typer.Option(help="Directory of the teacher store.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training sequences (the paper's 1).")]
BatchSize = Annotated[int, typer.Option(help="Sequences of a step (the paper's 32).")]
MicroBatch = Annotated[int, typer.Option(help="Sequences of a forward and backward pass; gradients accumulate.")]
LearningRate = Annotated[
    float | None,
    typer.Option(help=f"At the first step; falls linearly to 0. Default: {_TRAIN.learning_rate:g} = 0.05 * 3e-3."),
]
PretrainingLr = Annotated[
    float | None,
    typer.Option(help=f"Instead of --learning-rate: the model's pretraining rate; {PAPER_FACTOR} of it is used."),
]
WeightDecay = Annotated[float, typer.Option(help="AdamW's.")]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are clipped to this norm; inf: they are not.")]
LastLayers = Annotated[
    int | None, typer.Option(help="Train the last N layers and the final norm alone. Default: everything.")
]
Divergence = Annotated[str, typer.Option(help=", ".join(DIVERGENCES) + ".")]
Beta = Annotated[float, typer.Option(help="Weight of the teacher in jsd.")]
Tail = Annotated[str, typer.Option(help="What becomes of the entries outside the k: " + ", ".join(TAILS) + ".")]
EvalEvery = Annotated[int, typer.Option(help="Steps between evaluations on held-out text; 0: before and after alone.")]
CheckpointEvery = Annotated[
    int, typer.Option(help="Steps between checkpoints: what is lost at most when the job is killed.")
]
MinPromptEffect = Annotated[
    float,
    typer.Option(help="Refuse to train where KL(prompted || plain) is below this many nats per held-out token."),
]
SampleText = Annotated[
    list[str] | None,
    typer.Option(
        "--sample",
        help="A text to continue with all three models. Default: the beginnings of two held-out ones.",
    ),
]
SampleTokens = Annotated[int, typer.Option(help="Length of a continuation.")]
ExactSequences = Annotated[
    int, typer.Option(help="Held-out sequences on which to compute the KL over the whole vocabulary.")
]


# ---- Commands ----


@app.command()
def collect(
    model: Model,
    text: Text,
    store: Store,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    k: K = 50,
    temperature: Temperature = 1.0,
    store_dtype: StoreDtype = "float16",
    chunk_length: ChunkLength = 256,
    max_sequences: MaxSequences = None,
    text_prefix: TextPrefix = "Human:",
    held_out: HeldOut = 0.1,
    seed: Seed = 0,
    shard_sequences: ShardSequences = 256,
    batch_size: CollectBatch = 16,
    prompt_cache: PromptCache = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gguf_file: GgufFile = None,
) -> None:
    """Run the model with the prompt in front over the texts; store its top-k log-probs per token.

    The same command again goes on with an unfinished store.

    \b
    Examples:
      pyalign distill collect --model ./SmolLM2 --prompt-file hhh.txt \\
        --text docs.jsonl --store ./store
      pyalign distill collect --model ./model.gguf --prompt "Be kind." \\
        --text a.txt --text b.txt --store ./store --k 20
    """
    with _job() as job:
        settings = CollectSettings(
            _prompt(prompt, prompt_file),
            k,
            temperature,
            store_dtype,
            shard_sequences,
            batch_size,
            prompt_cache,
        )
        lm = job.load(model, gguf_file, dtype, device)
        job.collect(lm, text, store, settings, _Cut(chunk_length, max_sequences, text_prefix, held_out, seed))


@app.command()
def train(
    model: Model,
    store: Store,
    out: Annotated[Path, typer.Option(help="Directory for the log, the checkpoint and, at the end, model/.")],
    epochs: Epochs = _TRAIN.epochs,
    batch_size: BatchSize = _TRAIN.batch_size,
    micro_batch: MicroBatch = _TRAIN.micro_batch,
    learning_rate: LearningRate = None,
    pretraining_lr: PretrainingLr = None,
    weight_decay: WeightDecay = _TRAIN.weight_decay,
    max_grad_norm: MaxGradNorm = _TRAIN.max_grad_norm,
    last_layers: LastLayers = None,
    divergence: Divergence = _TRAIN.divergence,
    beta: Beta = _TRAIN.beta,
    tail: Tail = _TRAIN.tail,
    seed: Seed = _TRAIN.seed,
    eval_every: EvalEvery = _TRAIN.eval_every,
    checkpoint_every: CheckpointEvery = _TRAIN.checkpoint_every,
    min_prompt_effect: MinPromptEffect = _TRAIN.min_prompt_effect,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gguf_file: GgufFile = None,
) -> None:
    """Train the model, without the prompt, on a store collected from it.

    First checks, on held-out text, that the prompt changes the model.

    The same command again goes on from the last checkpoint.

    \b
    Examples:
      pyalign distill train --model ./SmolLM2 --store ./store --out ./run
      pyalign distill train --model ./SmolLM2 --store ./store --out ./run \\
        --last-layers 10 --epochs 2 --learning-rate 2e-4
    """
    with _job() as job:
        settings = TrainSettings(
            epochs=epochs,
            batch_size=batch_size,
            micro_batch=micro_batch,
            learning_rate=_rate(learning_rate, pretraining_lr),
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            last_layers=last_layers,
            divergence=divergence,
            beta=beta,
            tail=tail,
            seed=seed,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            min_prompt_effect=min_prompt_effect,
        )
        teacher = TeacherStore(store)
        job.train(job.load(model, gguf_file, dtype, device), teacher, settings, out)


@app.command()
def report(
    model: Model,
    store: Store,
    trained: Annotated[Path, typer.Option(help="The --out of `pyalign distill train`.")],
    out: Annotated[Path, typer.Option(help="Directory for report.md, curve.png and report.json.")],
    sample: SampleText = None,
    sample_tokens: SampleTokens = 60,
    exact_sequences: ExactSequences = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gguf_file: GgufFile = None,
) -> None:
    """Write report.md: KL to the prompted model before and after, a curve, samples, speed, memory.

    \b
    Example:
      pyalign distill report --model ./SmolLM2 --store ./store --trained ./run --out ./run \\
        --sample "Human: How do I apologise to a friend?\\n\\nAssistant:"
    """
    with _job() as job:
        settings = _reporting(sample, sample_tokens, exact_sequences)
        teacher = TeacherStore(store)
        job.report(job.load(model, gguf_file, dtype, device), teacher, trained, out, settings)


@app.command()
def run(
    model: Model,
    text: Text,
    out: Annotated[Path, typer.Option(help="Directory for store/, train/, report.md and curve.png.")],
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    k: K = 50,
    temperature: Temperature = 1.0,
    store_dtype: StoreDtype = "float16",
    chunk_length: ChunkLength = 256,
    max_sequences: MaxSequences = None,
    text_prefix: TextPrefix = "Human:",
    held_out: HeldOut = 0.1,
    shard_sequences: ShardSequences = 256,
    collect_batch: CollectBatch = 16,
    prompt_cache: PromptCache = True,
    epochs: Epochs = _TRAIN.epochs,
    batch_size: BatchSize = _TRAIN.batch_size,
    micro_batch: MicroBatch = _TRAIN.micro_batch,
    learning_rate: LearningRate = None,
    pretraining_lr: PretrainingLr = None,
    weight_decay: WeightDecay = _TRAIN.weight_decay,
    max_grad_norm: MaxGradNorm = _TRAIN.max_grad_norm,
    last_layers: LastLayers = None,
    divergence: Divergence = _TRAIN.divergence,
    beta: Beta = _TRAIN.beta,
    tail: Tail = _TRAIN.tail,
    seed: Seed = 0,
    eval_every: EvalEvery = _TRAIN.eval_every,
    checkpoint_every: CheckpointEvery = _TRAIN.checkpoint_every,
    min_prompt_effect: MinPromptEffect = _TRAIN.min_prompt_effect,
    sample: SampleText = None,
    sample_tokens: SampleTokens = 60,
    exact_sequences: ExactSequences = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gguf_file: GgufFile = None,
) -> None:
    """Collect, train and report in one, loading the model once.

    The same command again skips what is finished and goes on with the rest.

    \b
    Example:
      pyalign distill run --model ./SmolLM2 --prompt-file hhh.txt \\
        --text docs.jsonl --out ./run --last-layers 10
    """
    with _job() as job:
        with _option("batch_size", "collect_batch"):
            collecting = CollectSettings(
                _prompt(prompt, prompt_file),
                k,
                temperature,
                store_dtype,
                shard_sequences,
                collect_batch,
                prompt_cache,
            )
        training = TrainSettings(
            epochs=epochs,
            batch_size=batch_size,
            micro_batch=micro_batch,
            learning_rate=_rate(learning_rate, pretraining_lr),
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            last_layers=last_layers,
            divergence=divergence,
            beta=beta,
            tail=tail,
            seed=seed,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            min_prompt_effect=min_prompt_effect,
        )
        reporting = _reporting(sample, sample_tokens, exact_sequences)
        lm = job.load(model, gguf_file, dtype, device)
        # What these refuse, they refuse before the teacher runs.
        select_parameters(lm, last_layers)
        check_samples(lm, collecting.prompt, reporting)
        job.collect(
            lm,
            text,
            out / "store",
            collecting,
            _Cut(chunk_length, max_sequences, text_prefix, held_out, seed),
        )
        teacher = TeacherStore(out / "store")
        with unchanged(lm, last_layers):
            job.train(lm, teacher, training, out / "train")
        job.report(lm, teacher, out / "train", out, reporting)


# ---- What the commands share ----


class _Cut(NamedTuple):
    """How texts are cut into sequences."""

    chunk_length: int
    max_sequences: int | None
    text_prefix: str
    held_out: float
    seed: int


class _Job(Session):
    """The stages of a distillation."""

    def load(self, model: Path, gguf_file: str | None, dtype: str, device: str) -> CausalLM:
        transformers = require("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with self.stage("load") as say:
            lm = load(model, gguf_file=gguf_file, dtype=dtype, device=device)
            parameters = sum(p.numel() for p in lm.model.parameters())
            say(f"{model}: {parameters / 1e6:.1f} M parameters, vocabulary {lm.vocab_size}, {lm.dtype} on {lm.device}")
        if lm.learned_positions():
            self.console.print(
                "note: this model learns absolute positions; part of what it distils will be the prompt's "
                "shift of them",
                style="yellow",
            )
        return lm

    def collect(self, lm: CausalLM, text: list[Path], store: Path, settings: CollectSettings, cut: _Cut) -> Manifest:
        with self.stage("collect") as say:
            sequences = make_sequences(
                read_records(text),
                lm.encode,
                chunk_length=cut.chunk_length,
                held_out_fraction=cut.held_out,
                max_sequences=cut.max_sequences,
                text_prefix=cut.text_prefix,
                bos=lm.bos,
                seed=cut.seed,
            )
            with self.bar("tokens") as (start, advance):
                manifest = collect_store(
                    lm,
                    sequences,
                    settings,
                    store,
                    texts=[str(t) for t in text],
                    on_start=start,
                    on_tokens=advance,
                )
            say(
                f"{manifest.num_sequences} sequences, {manifest.num_tokens} tokens in {store}, of which "
                f"{manifest.num_held_out_sequences} and {manifest.num_held_out_tokens} are held out"
            )
        return manifest

    def train(self, lm: CausalLM, store: TeacherStore, settings: TrainSettings, out: Path) -> None:
        with self.stage("train") as say:
            with self.bar("steps") as (start, advance):
                result = train_model(
                    lm, store, settings, out, on_start=start, on_step=lambda _, loss: advance(1, f"loss {loss:.4f}")
                )
            say(
                f"held-out KL to the prompted model {result.kl_before:.4f} -> {result.kl_after:.4f} nats; "
                f"{result.model}"
            )

    def report(self, lm: CausalLM, store: TeacherStore, trained: Path, out: Path, settings: ReportSettings) -> None:
        with self.stage("report") as say:
            figures = write_report(
                lm, store, trained, out, settings, on_part=lambda part: self.console.print(f"  {part}", markup=False)
            )
            say(f"{figures.fraction_left:.0%} of the KL is left; {out / 'report.md'}")


# Settings whose option is called otherwise.
_OPTIONS = {"sequences_per_shard": "shard_sequences", "logprob_dtype": "store_dtype", "samples": "sample"}


@contextmanager
def _job() -> Generator[_Job]:
    with refusals("pyalign distill", _OPTIONS, "--micro-batch (collect: --batch-size, run: --collect-batch too)"):
        yield _Job()


@contextmanager
def _option(setting: str, option: str) -> Generator[None]:
    """Refusals of ``setting`` name ``option``."""
    try:
        yield
    except OptionError as error:
        raise OptionError(option if error.option == setting else error.option, error.problem) from None


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise OptionError("prompt", f"got {'neither' if file is None else 'both'}; wanted --prompt or --prompt-file")
    if file is None:
        assert prompt is not None
        return prompt
    return read_text("prompt_file", file)


def _rate(learning_rate: float | None, pretraining: float | None) -> float:
    if learning_rate is not None and pretraining is not None:
        raise OptionError("learning_rate", "got --pretraining-lr too; wanted one of them")
    if pretraining is not None:
        positive("pretraining_lr", pretraining)
        return PAPER_FACTOR * pretraining
    return _TRAIN.learning_rate if learning_rate is None else learning_rate


def _reporting(samples: list[str] | None, tokens: int, exact: int) -> ReportSettings:
    return ReportSettings(tuple(s.replace("\\n", "\n") for s in samples or ()), tokens, exact)
