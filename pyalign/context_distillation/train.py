"""Train the unprompted model on a teacher store."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyalign._files import atomic_directory, exclusive, write_text
from pyalign._log import Log, read_log
from pyalign._options import JobError, OptionError, at_least, differences, one_of, positive
from pyalign._types import DIVERGENCES, TAILS
from pyalign.context_distillation.checkpoint import checkpoint_settings, load_checkpoint, save_checkpoint
from pyalign.context_distillation.evaluate import stored_kl
from pyalign.context_distillation.language import CausalLM
from pyalign.teacher_store import Manifest, TeacherBatch, TeacherStore

PAPER_FACTOR = 0.05  # the paper's learning rate, as a fraction of pretraining's


@dataclass(frozen=True)
class TrainSettings:
    """How the student is trained; the defaults are the paper's where it has one.

    Those are k+1 categories, batches of 32, one pass, and a rate of 0.05 times pretraining's (3e-3 is usual for
    models of some 100 million parameters) falling linearly to 0.

    Raises:
        OptionError: a setting out of range.
    """

    epochs: int = 1
    batch_size: int = 32  # sequences per step
    micro_batch: int = 8  # sequences per forward and backward pass
    learning_rate: float = PAPER_FACTOR * 3e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # inf: not clipped
    last_layers: int | None = None  # train these layers and the final norm alone; None: every parameter
    divergence: str = "forward_kl"
    beta: float = 0.5  # of "jsd"
    tail: str = "bucket"
    seed: int = 0
    eval_every: int = 0  # steps; 0: before and after alone
    checkpoint_every: int = 20  # steps
    min_prompt_effect: float = 0.01  # nats per token

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch", "checkpoint_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("weight_decay", "eval_every", "min_prompt_effect"):
            at_least(name, getattr(self, name), 0)
        positive("learning_rate", self.learning_rate)
        if not self.max_grad_norm > 0:
            raise OptionError("max_grad_norm", f"got {self.max_grad_norm}; wanted a positive number, or inf")
        if self.last_layers is not None:
            at_least("last_layers", self.last_layers, 1)
        one_of("divergence", self.divergence, DIVERGENCES)
        one_of("tail", self.tail, TAILS)
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise OptionError("beta", f"got {self.beta}; wanted 0 < beta < 1 with the divergence jsd")
        if not 0 <= self.seed < 2**63:
            raise OptionError("seed", f"got {self.seed}; wanted 0 <= seed < 2**63")


class TrainResult(NamedTuple):
    directory: Path
    kl_before: float  # held out, k+1 categories, nats per token
    kl_after: float

    @property
    def model(self) -> Path:
        return self.directory / "model"


def schedule(step: int, total: int, learning_rate: float) -> float:
    """Learning rate of step 0 .. total-1: linear from ``learning_rate``, 0 after the last step."""
    return learning_rate * (1.0 - step / total)


def select_parameters(lm: CausalLM, last_layers: int | None) -> dict[str, nn.Parameter]:
    """The parameters to train, by name; all others are frozen, and no graph is built below the first."""
    if last_layers is None:
        chosen = {id(p) for p in lm.model.parameters()}
    else:
        layers = lm.layers()
        if not 1 <= last_layers <= len(layers):
            raise OptionError("last_layers", f"got {last_layers}; wanted 1 to {len(layers)}, all the model has")
        outside = {id(p) for p in layers.parameters()}
        trained = [p for layer in layers[len(layers) - last_layers :] for p in layer.parameters()]
        chosen = {id(p) for p in trained} | {id(p) for p in _final_norm(lm, outside)}
    for p in lm.model.parameters():
        p.requires_grad_(id(p) in chosen)
    return {name: p for name, p in lm.model.named_parameters() if p.requires_grad}


def _final_norm(lm: CausalLM, in_layers: set[int]) -> Iterator[nn.Parameter]:
    """Vectors outside the layers and outside the head: the scale (and shift) of the last norm."""
    head = lm.model.get_output_embeddings()
    in_head = {id(p) for p in head.parameters()} if head is not None else set[int]()
    for name, p in lm.model.named_parameters():
        if p.dim() == 1 and id(p) not in in_layers | in_head and "emb" not in name:
            yield p


class MasterWeights:
    """Float32 copies of the trained parameters.

    Steps of 1e-4 are lost on bfloat16 weights, and so are sums of small gradients. Float32 parameters are
    their own masters.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self._pairs = [
            (p, p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())) for p in parameters.values()
        ]
        self.by_name: dict[str, Tensor] = {n: m for n, (_, m) in zip(parameters, self._pairs, strict=True)}

    @property
    def masters(self) -> list[nn.Parameter]:
        return [master for _, master in self._pairs]

    def gather_gradients(self) -> None:
        """Add the parameters' gradients to the masters', and clear them."""
        for parameter, master in self._pairs:
            if master is not parameter and parameter.grad is not None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in self._pairs:
            if master is not parameter:
                parameter.copy_(master)


class Stopwatch:
    """Seconds of a part of the step; on a GPU by events, read only when asked."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._marks.append((self._begin, self._now()))
        else:
            self._seconds += self._now() - self._begin

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """The seconds since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
            self._seconds = sum(a.elapsed_time(b) for a, b in self._marks) / 1e3
            self._marks.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def held_out_kls(log: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, held-out KL) of a log, the one before training first.

    Raises:
        JobError: the log doesn't hold that one.
    """
    kls = [(e["step"], e["held_out_kl"]) for e in log if e["event"] == "eval"]
    if not kls or kls[0][0] != 0:
        raise JobError(
            "the log train.jsonl was lost with the KL before training in it; delete the directory of the training, or "
            "give another"
        )
    return kls


def train(
    lm: CausalLM,
    store: TeacherStore,
    settings: TrainSettings,
    directory: str | Path,
    *,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainResult:
    """Lower the divergence from the stored teacher; ``lm`` changes in place and is saved in ``directory/model``.

    Where that is done already, ``lm`` stays as it is.

    A step is ``batch_size`` sequences, divided into micro-batches whose losses share the step's number of
    tokens as their denominator: accumulation changes nothing but rounding. Each epoch's order is a
    permutation of (seed, epoch). The last batch of an epoch may be smaller; nothing is left out.

    In the directory: ``train.jsonl`` (the log), ``checkpoint.safetensors`` while it runs, ``model/`` at the
    end. Killed at any point, the same call goes on from the last checkpoint, to the same weights (on a CPU to
    the bit).

    Raises:
        StoreError: the store was collected from another model.
        OptionError: more ``last_layers`` than the model has.
        JobError: the directory holds a run with other settings, or one without its log; the prompt changes the model
            by less than ``min_prompt_effect``; a gradient is not finite, or a KL is NaN.
    """
    store.require_match(lm.identity)
    directory = Path(directory)
    with exclusive(directory):
        description = _description(store, settings, lm)
        log_path, checkpoint, model_path = (directory / n for n in ("train.jsonl", "checkpoint.safetensors", "model"))
        plan = _plan(store, settings)
        if model_path.exists():
            on_start(len(plan), len(plan))
            _check_same(json.loads((directory / "train.json").read_text(encoding="utf-8")), description, directory)
            checkpoint.unlink(missing_ok=True)  # it was killed between saving the model and this
            kls = held_out_kls(read_log(log_path))
            return TrainResult(directory, kls[0][1], kls[-1][1])
        if checkpoint.exists():
            _check_same(checkpoint_settings(checkpoint), description, directory)

        torch.manual_seed(settings.seed)
        parameters = select_parameters(lm, settings.last_layers)
        masters = MasterWeights(parameters)
        optimizer = torch.optim.AdamW(masters.masters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        step = 0
        resumed = checkpoint.exists()
        if resumed:
            step = load_checkpoint(checkpoint, masters.by_name, optimizer)
            masters.publish()
        log = Log(log_path, keep=lambda entry: resumed and entry["step"] <= step)
        if resumed:
            held_out_kls(log.entries)
        held_out = store.split(held_out=True)
        on_start(step, len(plan))

        if not resumed:
            before = _held_out_kl(lm, store, held_out, step)
            if before < settings.min_prompt_effect:
                raise JobError(
                    f"the prompt hardly changes the model: KL(prompted || plain) is {before:.2g} nats per "
                    f"held-out token, below min_prompt_effect = {settings.min_prompt_effect:g}. There is next to "
                    "nothing to distil: give another prompt or other texts, or --min-prompt-effect 0 to train all "
                    "the same"
                )
            log.add(event="eval", step=0, held_out_kl=before)

        watch = Stopwatch(lm.device)
        lm.model.train()
        while step < len(plan):
            begin = time.perf_counter()
            batches = _micro_batches(store, plan[step], settings.micro_batch)
            tokens = sum(int(store.lengths[i]) for i in plan[step])
            loss = torch.zeros((), device=lm.device)
            for indices in batches:
                loss += _accumulate(lm, store.batch(indices, lm.device), tokens, settings, watch)
                masters.gather_gradients()
            rate = schedule(step, len(plan), settings.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            norm = float(nn.utils.clip_grad_norm_(masters.masters, settings.max_grad_norm))
            if not math.isfinite(norm):
                raise JobError(
                    f"the gradient of step {step + 1} is not finite (its norm is {norm}, the loss {float(loss):.4g}): "
                    "a lower --learning-rate, a --max-grad-norm or --dtype float32 may help; start in another directory"
                )
            optimizer.step()
            optimizer.zero_grad()
            masters.publish()
            step += 1
            value = float(loss)
            log.add(
                event="step",
                step=step,
                loss=value,
                learning_rate=rate,
                grad_norm=norm,
                tokens=tokens,
                loss_seconds=round(watch.take(), 4),
                seconds=round(time.perf_counter() - begin, 4),
            )
            if step == len(plan) or (settings.eval_every and step % settings.eval_every == 0):
                log.add(event="eval", step=step, held_out_kl=_held_out_kl(lm, store, held_out, step))
            if step < len(plan) and step % settings.checkpoint_every == 0:
                save_checkpoint(
                    checkpoint,
                    step=step,
                    settings=json.dumps(description),
                    weights=masters.by_name,
                    optimizer=optimizer,
                )
            on_step(step, value)

        lm.model.eval()
        write_text(directory / "train.json", json.dumps(description, indent=2) + "\n")
        with atomic_directory(model_path) as temporary:
            lm.model.save_pretrained(temporary)
            lm.tokenizer.save_pretrained(temporary)
        checkpoint.unlink(missing_ok=True)
        kls = held_out_kls(log.entries)
        return TrainResult(directory, kls[0][1], kls[-1][1])


def _held_out_kl(lm: CausalLM, store: TeacherStore, held_out: list[int], step: int) -> float:
    kl = stored_kl(lm, store, held_out)
    if math.isnan(kl):
        raise JobError(
            f"the held-out KL is NaN after {step} steps: --dtype float32 or a lower --learning-rate may help; start in "
            "another directory"
        )
    return kl


def _accumulate(lm: CausalLM, batch: TeacherBatch, tokens: int, settings: TrainSettings, watch: Stopwatch) -> Tensor:
    """Add one micro-batch's gradient; returns its share of the step's mean loss.

    The graph is cut at the hidden states (T, H), so that head and loss are timed apart from the model.
    """
    features = lm.rows(batch.input_ids, batch.rows)
    cut = features.detach().requires_grad_(features.requires_grad)
    with watch:
        loss = lm.topk_loss(
            cut,
            batch.teacher,
            divergence=settings.divergence,
            beta=settings.beta,
            tail=settings.tail,
            num_items=tokens,
        )
        loss.backward()
    if cut.grad is not None:
        features.backward(cut.grad)
    return loss.detach()


def _plan(store: TeacherStore, settings: TrainSettings) -> list[list[int]]:
    """The sequences of every step of the run."""
    indices = torch.tensor(store.split(held_out=False))
    steps: list[list[int]] = []
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed + epoch * 1_000_003)
        order = indices[torch.randperm(len(indices), generator=generator)]
        steps += [part.tolist() for part in order.split(settings.batch_size)]
    return steps


def _micro_batches(store: TeacherStore, indices: list[int], size: int) -> list[list[int]]:
    """A step's sequences, longest first, so that little of a micro-batch is padding."""
    ordered = sorted(indices, key=lambda i: (-int(store.lengths[i]), i))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


# What may change between a run and its resumption.
_FREE = ("checkpoint_every", "min_prompt_effect")


def _description(store: TeacherStore, settings: TrainSettings, lm: CausalLM) -> dict[str, Any]:
    """Everything that decides the weights: a run resumes only where all of it is the same."""
    return {
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE},
        "store": describe_store(store.manifest),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def describe_store(manifest: Manifest) -> dict[str, Any]:
    """Everything that decides a store's rows."""
    return {
        "sequences": manifest.sequences_digest,
        "model": manifest.identity.model,
        "tokenizer": manifest.identity.tokenizer,
        "prompt": manifest.prompt_digest,
        "k": manifest.k,
        "temperature": manifest.temperature,
        "logprob_dtype": manifest.logprob_dtype,
        "compute_dtype": manifest.compute_dtype,
    }


def _check_same(found: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    changed = differences(found["settings"], wanted["settings"])
    changed += differences(found["store"], wanted["store"], "the store's ")
    changed += differences({"dtype": found["dtype"]}, {"dtype": wanted["dtype"]})
    if changed:
        raise JobError(
            f"{directory} holds a run with other settings: {'; '.join(changed)}. Give another directory, "
            "or delete this one"
        )


@contextmanager
def unchanged(lm: CausalLM, last_layers: int | None) -> Generator[None]:
    """On leaving, the parameters that ``train`` changes are what they were, to compare with the result."""
    parameters = select_parameters(lm, last_layers)
    before = [p.detach().clone() for p in parameters.values()]
    yield
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), before, strict=True):
            parameter.copy_(value)
