"""``PairScorer``: a model and a tokenizer, from prompts and responses to scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyalign._models import load_pretrained, locate, tokenizer_digest
from pyalign._options import OptionError, at_least, one_of, positive
from pyalign.logprob import sequence_logprobs
from pyalign.pair_scorer.batches import Batch, BatchTensors, Sharing, collate, make_batches
from pyalign.pair_scorer.models import CausalScorer, RewardScorer
from pyalign.pair_scorer.prefetch import prefetched
from pyalign.pair_scorer.tokens import Encoder, ResponseSet, Text, TokenGroup, TokenOptions, Truncation

SCORES = ("auto", "mean_logprob", "sum_logprob", "information", "dpo", "reward")
T = TypeVar("T")


class ScoredResponses(NamedTuple):
    """The scores of one response set, in its order."""

    scores: tuple[float, ...]  # NaN: too long (truncation "drop"), or no token to average over
    tokens: tuple[int, ...]  # how many tokens of each response counted


class Likelihoods(NamedTuple):
    """What the responses of one set are to a language model, in its order."""

    logprobs: tuple[float, ...]  # log P(a|q); NaN: too long (truncation "drop")
    null_logprobs: tuple[float, ...] | None  # log P(a), behind the null prompt; None unless the score is "information"
    tokens: tuple[int, ...]  # how many tokens of each response counted
    greedy: tuple[bool, ...] | None  # whether greedy decoding would have written it; None: not asked for


class Counts(NamedTuple):
    """What was computed, in tokens."""

    whole: int  # of all sequences, each read whole
    computed: int  # that the model read
    padding: int  # among these
    responses: int  # that count, and went through the head

    def __add__(self, other: Counts) -> Counts:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Window:
    """Response sets whose rows are batched together, and their scores as they come."""

    groups: list[TokenGroup]
    nulls: list[TokenGroup]
    batches: list[tuple[bool, Batch]]  # of the groups, then of the null prompt
    truncation: Truncation
    counts: Counts

    def __post_init__(self) -> None:
        self._found: dict[tuple[bool, int, int], Any] = {}

    def add(self, index: int, scores: Sequence[Any]) -> None:
        """Take in the scores (or likelihoods) of batch ``index``."""
        null, batch = self.batches[index]
        for (group, member), score in zip(batch.sequences, scores, strict=True):
            self._found[null, group, member] = score

    def results(self) -> list[ScoredResponses]:
        """Of every response set, in order, once all batches are in."""
        results: list[ScoredResponses] = []
        for g, group in enumerate(self.groups):
            scores: list[float] = []
            for m in range(len(group.sequences)):
                score = float("nan") if group.dropped else self._found[False, g, m]
                scores.append(score - self._found[True, g, m] if self.nulls and not group.dropped else score)
            results.append(ScoredResponses(tuple(scores), tuple(group.counts)))
        return results

    def likelihoods(self) -> list[Likelihoods]:
        """Of every response set, in order, once those of all batches are in (:meth:`PairScorer.likelihoods`)."""
        return [self._likelihoods(g, group) for g, group in enumerate(self.groups)]

    def _likelihoods(self, index: int, group: TokenGroup) -> Likelihoods:
        members = range(len(group.sequences))
        if group.dropped:
            nothing = (float("nan"),) * len(members)
            return Likelihoods(nothing, nothing if self.nulls else None, tuple(group.counts), None)
        found: list[list[float]] = [self._found[False, index, m] for m in members]
        nulls: list[list[float]] = [self._found[True, index, m] for m in members] if self.nulls else []
        return Likelihoods(
            tuple(x[0] for x in found),
            tuple(x[0] for x in nulls) if self.nulls else None,
            tuple(group.counts),
            tuple(x[1] == 1 for x in found) if all(len(x) > 1 for x in found) else None,
        )


class PairScorer:
    """Scores of responses to prompts, by a reward model or a causal language model.

    =================  ==========================================================================================
    ``score``          what a response a to a prompt q gets
    =================  ==========================================================================================
    ``reward``         the output of a sequence-classification model, its head read at the last token of q + a
    ``mean_logprob``   log P(a|q) / tokens of a: how Askell et al. 2021 (arXiv 2112.00861) rank by imitation
    ``sum_logprob``    log P(a|q)
    ``information``    log P(a|q) - log P(a), the paper's I(a, q); P(a) is read after ``null_prompt``
    ``dpo``            beta * (log P(a|q) - log P_reference(a|q)), the implicit reward of DPO (arXiv 2305.18290)
    ``auto``           ``reward`` for a sequence-classification model, else ``mean_logprob``
    =================  ==========================================================================================

    Responses to one prompt are computed in one row that holds the prompt once; rows of like lengths make batches of at
    most ``token_budget`` tokens; the tokens that count, and no others, go through the head; the scores of a batch come
    back in one copy. On a model that reads such rows in another way (it is tried out), each sequence is read whole, and
    ``notes`` says so.

    What a head makes of given hidden states doesn't depend on the batch, but the matrix products of the model may:
    scores agree to about 1e-5 of their size between batchings, and to the bit between runs of the same batches on the
    same machine with the same number of threads.

    Args:
        model: a local model directory, a GGUF file, or a loaded model of transformers (put in eval mode).
        tokenizer: of a loaded model; a directory has its own.
        score: one of the above.
        reference: for "dpo", as ``model``; with the same tokenizer.
        beta: for "dpo" (0.1).
        null_prompt: for "information": what stands in place of the prompt.
        prefix: a text in front of every prompt, the null prompt too, as context distillation's teacher reads it:
            tokenised by itself and never cut. Not for reward models, nor for prompts that are messages.
        label: which output of a reward model with several.
        tokenization: "together" tokenises prompt + response as one text, the response beginning with the first token
            that the prompt alone doesn't have; "apart" tokenises both on their own (not for reward models).
        append_eos: end every sequence with EOS, which counts as the response's last token.
        max_length: tokens of a sequence at most; None: what the model reads.
        truncation: "prompt" takes tokens from the beginning of the prompt, the same for all responses to it, then from
            the end of a response that is too long by itself; "drop" gives NaN to all responses of such a set.
        share_prefix: compute a prompt once for its responses.
        token_budget: tokens of a batch, padding included; a longer row is a batch by itself.
        window: response sets that are batched together.
        prefetch: batches tokenised and collated ahead, in a background thread.
        dtype: "float32" (the default of a directory), "bfloat16", or "auto": bfloat16 where the hardware multiplies it.
        device: "cpu", "cuda", ... ; None or "auto": cuda where there is one.
        gguf_file: the GGUF file in a directory that holds several.

    Raises:
        OptionError: an option that can't be followed; it names the option, what was given and what is wanted.
        ModuleNotFoundError: transformers is missing; it names the extra.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        score: str = "auto",
        reference: Any = None,
        beta: float | None = None,
        null_prompt: str | None = None,
        prefix: str = "",
        label: int | None = None,
        tokenization: str = "together",
        append_eos: bool = False,
        max_length: int | None = None,
        truncation: str = "prompt",
        share_prefix: bool = True,
        token_budget: int = 4096,
        window: int = 256,
        prefetch: int = 4,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        gguf_file: str | None = None,
    ):
        one_of("score", score, SCORES)
        for name, value in (("token_budget", token_budget), ("window", window), ("prefetch", prefetch)):
            at_least(name, value, 1)
        score = resolve_score(score, model, gguf_file)
        for name, value, owner in (
            ("reference", reference, "dpo"),
            ("beta", beta, "dpo"),
            ("null_prompt", null_prompt, "information"),
            ("label", label, "reward"),
        ):
            if value is not None and score != owner:
                raise OptionError(name, f"got {value!r}; wanted none with score {score!r}, it is of {owner!r} alone")
        if score == "dpo" and reference is None:
            raise OptionError("reference", "got none; wanted the reference model of score 'dpo'")
        options = TokenOptions(tokenization, append_eos, max_length, truncation, null_prompt or "", prefix)
        self.score = score
        self.label = label
        self.beta = 0.1 if beta is None else beta
        positive("beta", self.beta)
        self.token_budget, self.window, self.prefetch = token_budget, window, prefetch

        reward = score == "reward"
        auto_class = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
        loading = {"gguf_file": gguf_file, "dtype": dtype, "device": device}
        model, tokenizer, digest = load_model("model", model, tokenizer, auto_class, loading)
        padding = next((p for p in (model.config.pad_token_id, tokenizer.pad_token_id) if p is not None), 0)
        self._reward = RewardScorer(model, padding=padding, share_prefix=share_prefix, label=label) if reward else None
        self._policy = None if reward else CausalScorer(model, padding=padding, share_prefix=share_prefix)
        self._reference: CausalScorer | None = None
        self._models: list[CausalScorer | RewardScorer] = [m for m in (self._policy, self._reward) if m is not None]
        self.digests = {"model": digest, "tokenizer": tokenizer_digest(tokenizer)}
        if reference is not None:
            self._add_reference(reference, tokenizer, loading, padding, share_prefix)
        self._check_length(options, tokenizer)
        self.tokenizer = tokenizer
        self._sharing = _common_sharing(self._models)
        self._encoder = Encoder(tokenizer, self.options, specials=reward)
        self._verified = 0  # length of the longest shared row that was tried out

    def _add_reference(
        self, reference: Any, tokenizer: Any, loading: dict[str, Any], padding: int, share_prefix: bool
    ) -> None:
        from_path = isinstance(reference, (str, Path))
        loading = {**loading, "gguf_file": None} if from_path else dict.fromkeys(loading)
        own_tokenizer = None if from_path else tokenizer
        loaded, own, digest = load_model("reference", reference, own_tokenizer, "AutoModelForCausalLM", loading)
        if tokenizer_digest(own) != self.digests["tokenizer"]:
            raise OptionError("reference", f"got {reference} with another tokenizer; wanted the model's")
        self._reference = CausalScorer(loaded, padding=padding, share_prefix=share_prefix)
        self._models.append(self._reference)
        self.digests["reference"] = digest
        if loaded.device != self.device:
            raise OptionError("reference", f"got a model on {loaded.device}; wanted one on {self.device}")

    def _check_length(self, options: TokenOptions, tokenizer: Any) -> None:
        limits = [m.context for m in self._models]
        longest = min((n for n in (*limits, tokenizer.model_max_length) if isinstance(n, int)), default=None)
        if longest is not None and options.max_length is not None and options.max_length > longest:
            raise OptionError("max_length", f"got {options.max_length}; wanted at most {longest}, what the model reads")
        self.options = options if options.max_length is not None else replace(options, max_length=longest)

    @property
    def device(self) -> torch.device:
        return self._models[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self._models[0].dtype

    @property
    def shares_prefix(self) -> bool:
        """Whether responses to one prompt share its computation."""
        return self._sharing.allowed

    @property
    def notes(self) -> list[str]:
        """What is done in a slower way than usual for these models, and why."""
        return [note for m in self._models for note in m.notes]

    # ---- Scores ----

    def stream(self, items: Iterable[ResponseSet | tuple[Text, Sequence[Text]]]) -> Iterator[ScoredResponses]:
        """The scores of each (prompt, responses), in order, read and computed a window at a time."""

        def work() -> Iterator[tuple[Window, int, BatchTensors | None]]:
            for part in _parts(items, self.window):
                window = self.prepare(part)
                yield from self.tensors(window)
                yield window, -1, None

        for window, index, scores in self.run(work()):
            if scores is None:
                yield from window.results()
            else:
                window.add(index, scores)

    def __call__(self, items: Iterable[ResponseSet | tuple[Text, Sequence[Text]]]) -> list[ScoredResponses]:
        """:meth:`stream`, as a list."""
        return list(self.stream(items))

    def score_pairs(
        self, prompts: Sequence[Text], chosen: Sequence[Text], rejected: Sequence[Text]
    ) -> tuple[Tensor, Tensor]:
        """Scores of pairs, (P,) each, as losses and metrics of pairs want them.

        Raises:
            ValueError: the three differ in length.
        """
        if not len(prompts) == len(chosen) == len(rejected):
            given = f"{len(prompts)} prompts, {len(chosen)} chosen, {len(rejected)} rejected"
            raise ValueError(f"prompts, chosen, rejected: got {given}; wanted as many of each")
        items = [ResponseSet(q, (a, b)) for q, a, b in zip(prompts, chosen, rejected, strict=True)]
        dtype = torch.promote_types(self.dtype, torch.float32)
        scores = torch.tensor([found.scores for found in self.stream(items)], dtype=dtype).reshape(-1, 2)
        return scores[:, 0], scores[:, 1]

    # ---- Its parts, for jobs that keep what was computed ----

    def prepare(self, items: Iterable[ResponseSet | tuple[Text, Sequence[Text]]]) -> Window:
        """Tokenise response sets and plan their batches; the same sets make the same batches."""
        encoded = self._encoder.encode([ResponseSet(*item) for item in items], nulls=self.score == "information")
        singly = any(m.singly for m in self._models)
        batches = [
            (null, batch)
            for null, groups in ((False, encoded.groups), (True, encoded.nulls))
            for batch in make_batches(groups, self.token_budget, self._sharing, singly=singly)
        ]
        counts = Counts(0, 0, 0, 0)
        for null, batch in batches:
            groups = encoded.nulls if null else encoded.groups
            whole = sum(len(groups[g].sequences[m]) for g, m in batch.sequences)
            rows = sum(row.length for row in batch.rows)
            head = sum(groups[g].counts[m] for g, m in batch.sequences)
            counts += Counts(whole, batch.tokens, batch.tokens - rows, head)
        return Window(encoded.groups, encoded.nulls, batches, encoded.truncation, counts)

    def tensors(self, window: Window, skip: frozenset[int] = frozenset()) -> Iterator[tuple[Window, int, BatchTensors]]:
        """The batches of ``window`` that aren't among ``skip``, as :meth:`run` takes them."""
        first = self._models[0]
        for index, (null, batch) in enumerate(window.batches):
            if index not in skip:
                groups = window.nulls if null else window.groups
                tensors = collate(batch, groups, padding=first.padding, count=first.counts)
                yield window, index, tensors.pin() if self.device.type == "cuda" else tensors

    def run(
        self,
        work: Iterable[tuple[Window, int, BatchTensors | None]],
        compute: Callable[[BatchTensors], Tensor] | None = None,
    ) -> Generator[tuple[Window, int, list[Any] | None]]:
        """The scores of each batch, in order; ``work`` is made ahead in a background thread, and its Nones passed on.

        ``compute`` replaces scores by something else of a batch's N sequences, (N, ...) on the device.

        On a GPU a batch is read back while the next one is computed.

        Raises:
            JobError: a prompt is read in another way when it is shared; each row longer than all before is tried out.
        """
        compute = compute or self._scores
        waiting: list[tuple[Window, int, _Copy]] = []
        for window, index, tensors in prefetched(work, self.prefetch):
            copy = None
            if tensors is not None:
                self._verify(window, index)
                with torch.inference_mode():
                    copy = _Copy(compute(tensors.to(self.device)))
            if waiting:
                done = waiting.pop()
                yield done[0], done[1], done[2].read()
            if copy is None:
                yield window, index, None
            elif copy.ready:
                yield window, index, copy.read()
            else:
                waiting.append((window, index, copy))
        for done in waiting:
            yield done[0], done[1], done[2].read()

    def _verify(self, window: Window, index: int) -> None:
        """Try out a shared row that is longer than all before: what differs may show beyond a certain length alone."""
        null, batch = window.batches[index]
        longest = next((row for row in batch.rows if len(row.members) > 1), None)
        if longest is not None and longest.length > self._verified:
            group = (window.nulls if null else window.groups)[longest.group]
            for model in self._models:
                model.verify(group)
            self._verified = longest.length

    def likelihoods(self, batch: BatchTensors, *, greedy: bool = False) -> Tensor:
        """(N, 1) log P(response); with ``greedy`` (N, 2), with 1 where greedy decoding would have written it.

        Raises:
            OptionError: a reward model has none.
        """
        if self._policy is None:
            raise OptionError("score", "got a reward model; wanted a causal language model for likelihoods")
        return self._policy.likelihoods(batch, greedy=greedy)

    def _scores(self, batch: BatchTensors) -> Tensor:
        """(N,) on the device."""
        if self._policy is None:
            assert self._reward is not None
            return self._reward.scores(batch)
        logprobs = self._policy.token_logprobs(batch)
        if self._reference is not None:
            logprobs = self.beta * (logprobs - self._reference.token_logprobs(batch))
        scores = sequence_logprobs(logprobs, offsets=batch.offsets, average=self.score == "mean_logprob")
        if self.score == "mean_logprob":  # the mean of nothing is 0 there, which no log-prob reaches
            scores = torch.where(batch.offsets.diff() > 0, scores, float("nan"))
        return scores


class _Copy:
    """Scores on their way to the host."""

    def __init__(self, scores: Tensor):
        self.ready = scores.device.type != "cuda"
        if self.ready:
            self._scores = scores.cpu()
        else:
            self._scores = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
            self._scores.copy_(scores, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        if not self.ready:
            self._event.synchronize()
        return self._scores.tolist()


def _common_sharing(models: Sequence[CausalScorer | RewardScorer]) -> Sharing:
    """What all of ``models`` can do."""
    alone = min((m.sharing.alone for m in models if m.sharing.alone is not None), default=None)
    if not all(m.sharing.allowed for m in models):
        return Sharing(False, alone=alone)
    longest = min((m.sharing.longest for m in models if m.sharing.longest is not None), default=None)
    return Sharing(True, longest, alone, max(m.sharing.attention for m in models))


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while part := list(itertools.islice(iterator, size)):
        yield part


def resolve_score(score: str, model: Any, gguf_file: str | None = None) -> str:
    """What "auto" means for ``model``."""
    if score != "auto":
        return score
    return "reward" if _is_reward_model(model, gguf_file) else "mean_logprob"


def _is_reward_model(model: Any, gguf_file: str | None) -> bool:
    if not isinstance(model, (str, Path)):
        return "SequenceClassification" in type(model).__name__
    directory, gguf_file = locate(Path(model), gguf_file)
    if gguf_file is not None:
        return False
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return any("SequenceClassification" in name for name in config.get("architectures") or ())


def load_model(
    option: str, model: Any, tokenizer: Any, auto_class: str, loading: dict[str, Any]
) -> tuple[Any, Any, str | None]:
    """The model in eval mode, its tokenizer, and its digest where it was read from a directory."""
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise OptionError("tokenizer", f"got {type(tokenizer).__name__}; wanted None: {model} has its own")
        try:
            return load_pretrained(
                model,
                auto_class,
                gguf_file=loading["gguf_file"],
                dtype=loading["dtype"] or "float32",
                device=loading["device"] or "auto",
            )
        except OptionError as error:
            raise OptionError(option if error.option == "model" else error.option, error.problem) from error
    for name, value in loading.items():
        if value is not None:
            raise OptionError(name, f"got {value!r}; wanted None: the model given is loaded already")
    if tokenizer is None:
        raise OptionError("tokenizer", "got None; wanted that of the loaded model")
    return model.eval(), tokenizer, None
