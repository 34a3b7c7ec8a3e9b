"""Run the prompted model over the sequences and store its top-k log-probs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyalign._files import exclusive
from pyalign._log import Log
from pyalign._options import JobError, OptionError, at_least, one_of, positive, whole_text
from pyalign.context_distillation.language import CausalLM, head_chunks
from pyalign.context_distillation.texts import TokenSequence, sequences_digest
from pyalign.distill import TopKLogprobs, topk_logprobs
from pyalign.teacher_store import LOGPROB_DTYPES, Manifest, SequenceRows, TeacherStoreWriter, text_digest


@dataclass(frozen=True)
class CollectSettings:
    """How the teacher is run and stored; the defaults are the paper's where it has one (k = 50).

    Raises:
        OptionError: a setting out of range.
    """

    prompt: str
    k: int = 50
    temperature: float = 1.0
    logprob_dtype: str = "float16"
    sequences_per_shard: int = 256
    batch_size: int = 16  # sequences per forward pass
    prompt_cache: bool = True  # run the prompt once and share its keys and values

    def __post_init__(self) -> None:
        whole_text("prompt", self.prompt)
        for name in ("k", "sequences_per_shard", "batch_size"):
            at_least(name, getattr(self, name), 1)
        positive("temperature", self.temperature)
        one_of("logprob_dtype", self.logprob_dtype, LOGPROB_DTYPES)


class PromptedModel:
    """The teacher p(. | C): reads ``[BOS] C X``, answers for the positions of ``[BOS] X``, which the student reads.

    With ``prompt_cache``, C is run once and its keys and values are repeated over each batch: the same rows
    up to rounding, in 1.6 s instead of 4.3 s (16 texts of 96 tokens, a prompt of 215, 135 M parameters, two
    cores). Models without such a cache (``batch_repeat_interleave``) read C with every batch.
    """

    def __init__(self, lm: CausalLM, prompt: str, *, prompt_cache: bool = True):
        self.lm = lm
        self.prompt_ids = lm.encode(prompt)
        self._bos = [] if lm.bos is None else [lm.bos]
        prefix = torch.tensor([self._bos + self.prompt_ids], device=lm.device)
        self._prefix, self._cache, self._last = prefix, None, None
        if prompt_cache:
            with torch.inference_mode():
                outputs = (lm.body or lm.model)(input_ids=prefix, use_cache=True)
                cache = getattr(outputs, "past_key_values", None)
                if hasattr(cache, "batch_repeat_interleave"):
                    hidden = outputs.logits if lm.body is None else outputs.last_hidden_state
                    self._cache = cache
                    self._last = hidden[:, -1:]  # the row that predicts the first token of X

    @property
    def uses_cache(self) -> bool:
        return self._cache is not None

    def features(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, L), as the student reads them -> (B, L, H) after the prompt."""
        batch = input_ids.shape[0]
        text = input_ids[:, len(self._bos) :]
        if self._cache is None:
            whole = torch.cat([self._prefix.expand(batch, -1), text], 1)
            return self.lm.features(whole)[:, len(self.prompt_ids) :]
        assert self._last is not None
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(batch)
        features = self.lm.features(text, cache) if text.shape[1] else self._last[:, :0].expand(batch, -1, -1)
        return torch.cat([self._last.expand(batch, -1, -1), features], 1) if self._bos else features

    def rows(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        """Features (T, H) at the flat positions ``rows`` (T,) of ``input_ids`` (B, L)."""
        return self.features(input_ids).flatten(0, 1).index_select(0, rows)


def collect(
    lm: CausalLM,
    sequences: list[TokenSequence],
    settings: CollectSettings,
    directory: str | Path,
    *,
    texts: Sequence[str] = (),
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Manifest:
    """Make the store, or go on with it: shards that are there stay, the others are computed.

    Each shard is computed from its own sequences alone, so an interrupted and an uninterrupted run write the
    same bytes. ``collect.jsonl`` in the store keeps the tokens of each shard and the seconds since the entry
    before, so that every token is counted once, however often the job was stopped. ``on_start`` is told the
    tokens already stored and all there are, ``on_tokens`` how many were done since.

    Raises:
        OptionError: k, the prompt or the sequences don't suit the model.
        StoreError: the directory holds a store made with other settings.
    """
    if settings.k > lm.vocab_size:
        raise OptionError("k", f"got {settings.k}; wanted at most {lm.vocab_size}, the vocabulary")
    prompt_tokens = len(lm.encode(settings.prompt))
    if not prompt_tokens:
        raise OptionError("prompt", "it is empty; wanted the text to distil into the model")
    longest = prompt_tokens + max(len(s.tokens) for s in sequences)
    if lm.context is not None and longest > lm.context:
        raise OptionError(
            "chunk_length",
            f"prompt and longest text are {longest} tokens together; wanted at most {lm.context}, what the model reads",
        )

    held_out = [s for s in sequences if s.held_out]
    manifest = Manifest(
        identity=lm.identity,
        prompt=settings.prompt,
        prompt_digest=text_digest(settings.prompt),
        prompt_tokens=prompt_tokens,
        begins_with_bos=lm.bos is not None,
        k=settings.k,
        temperature=settings.temperature,
        logprob_dtype=settings.logprob_dtype,
        compute_dtype=str(lm.dtype).removeprefix("torch."),
        num_sequences=len(sequences),
        num_tokens=sum(len(s.tokens) for s in sequences),
        num_held_out_sequences=len(held_out),
        num_held_out_tokens=sum(len(s.tokens) for s in held_out),
        sequences_per_shard=settings.sequences_per_shard,
        sequences_digest=sequences_digest(sequences),
        model_path=lm.path,
        texts=tuple(texts),
    )
    directory = Path(directory)
    with exclusive(directory):
        writer = TeacherStoreWriter(directory, manifest)
        missing = writer.missing()
        todo = sum(len(sequences[i].tokens) for shard in missing for i in manifest.shard_range(shard))
        on_start(manifest.num_tokens - todo, manifest.num_tokens)
        if not missing:
            return manifest
        teacher = PromptedModel(lm, settings.prompt, prompt_cache=settings.prompt_cache)
        log = Log(directory / "collect.jsonl", keep=lambda entry: entry["shard"] not in missing)
        begin = time.perf_counter()
        for shard in missing:
            chosen = [sequences[i] for i in manifest.shard_range(shard)]
            rows = _shard_rows(teacher, chosen, settings, on_tokens)
            now = time.perf_counter()
            # The entry comes first: one without its shard is removed on the next start, a shard without its
            # entry would stay uncounted.
            log.add(
                shard=shard,
                tokens=sum(r.tokens.numel() for r in rows),
                seconds=round(now - begin, 3),
                prompt_cache=teacher.uses_cache,
            )
            writer.write(shard, rows)
            begin = now
    return manifest


def _shard_rows(
    teacher: PromptedModel,
    sequences: list[TokenSequence],
    settings: CollectSettings,
    on_tokens: Callable[[int], None],
) -> list[SequenceRows]:
    """Rows of a shard's sequences, in order; batches are of like lengths, so that little is padding."""
    lm = teacher.lm
    result: dict[int, SequenceRows] = {}
    by_length = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens))
    for first in range(0, len(by_length), settings.batch_size):
        batch = by_length[first : first + settings.batch_size]
        lengths = [len(sequences[i].tokens) for i in batch]
        input_ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for b, i in enumerate(batch):
            input_ids[b, : lengths[b]] = torch.from_numpy(sequences[i].tokens)
        positions = torch.cat([torch.arange(n) + b * max(lengths) for b, n in enumerate(lengths)])
        with torch.inference_mode():
            features = teacher.rows(input_ids.to(lm.device), positions.to(lm.device))
            teacher_rows = topk_rows(lm, features, settings.k, settings.temperature)
        if teacher_rows.logprobs.isnan().any():
            raise JobError("the prompted model gives NaN log-probs; another --dtype (float32) may help")
        pieces = [t.split(lengths) for t in (teacher_rows.logprobs, teacher_rows.indices, _residual(teacher_rows))]
        for b, i in enumerate(batch):
            topk = TopKLogprobs(pieces[0][b], pieces[1][b], pieces[2][b], settings.temperature)
            result[i] = SequenceRows(torch.from_numpy(sequences[i].tokens), topk, sequences[i].held_out)
        on_tokens(sum(lengths))
    return [result[i] for i in range(len(sequences))]


def topk_rows(lm: CausalLM, features: Tensor, k: int, temperature: float) -> TopKLogprobs:
    """Top-k log-probs of ``head(features)``, features (T, H), on the CPU; logits exist a chunk at a time."""
    parts = [topk_logprobs(logits, k, temperature=temperature) for logits in head_chunks(lm.head, features)]
    return TopKLogprobs(
        torch.cat([p.logprobs for p in parts]).cpu(),
        torch.cat([p.indices for p in parts]).cpu(),
        torch.cat([_residual(p) for p in parts]).cpu(),
        temperature,
    )


def _residual(teacher: TopKLogprobs) -> Tensor:
    assert teacher.residual is not None
    return teacher.residual
