"""A teacher's top-k log-probs on disk, row for row with the tokens that a student will read.

A store is a directory::

    manifest.json               what the rows are and what made them; written first, never changed
    shard-00000.safetensors     sequences 0 .. sequences_per_shard-1, packed
    ...

and a shard of B sequences with T tokens in all holds

==========  =========================  =====================================================================
tokens      int32 (T,)                 what the student reads
offsets     int64 (B+1,)               sequence b is rows offsets[b] .. offsets[b+1]-1
logprobs    float16 or bfloat16 (T,k)  the teacher's k largest log-probs after reading the row's token
indices     int32 (T, k)               their vocabulary entries, most likely first
residual    float32 (T,)               log of the teacher's probability mass outside the k entries
held_out    bool (B,)                  sequences for evaluation, never trained on
==========  =========================  =====================================================================

Row t of a sequence is the distribution of the token *after* ``tokens[t]``, given the prompt and
``tokens[:t+1]``: one row per stored token, the last one included (a divergence needs no label). So student
position t meets teacher position len(prompt) + t. The first token of a text is predicted only where the
tokenizer puts a beginning-of-sequence token in front: then that token is ``tokens[0]``, and the teacher's
input begins with it too, before the prompt.

Why float16 for the log-probs: they lie between about -30 and 0, where float16 has 11 significant bits (an
error below 0.05 % of the log-prob) and bfloat16 has 8; its smaller range is never met. The loss renormalises
the k+1 categories in float32, so rounding biases no total. A token costs ``6 k + 8`` bytes: 308 at k = 50.

Every shard is written to a temporary file, synced and renamed: a store whose writer was killed holds whole
shards only, and the same command goes on with those that are missing, damaged or another store's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyalign._files import atomic_file, write_text
from pyalign._optional import require
from pyalign.distill import TopKLogprobs

FORMAT = "pyalign.teacher_store"
VERSION = 1
LOGPROB_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class StoreError(ValueError):
    """A store that is missing, incomplete, damaged, of another version, or made by something else."""


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What a store and a model must have in common: the same weights, tokenizer and vocabulary."""

    model: str  # digest of the configuration and the weight files
    tokenizer: str  # digest of the vocabulary and of how it cuts a probe text
    vocab_size: int  # width of the logits


@dataclass(frozen=True)
class Manifest:
    """What a store holds; every field is known before the teacher runs."""

    identity: Identity
    prompt: str
    prompt_digest: str  # sha256 of the prompt's text
    prompt_tokens: int
    begins_with_bos: bool  # tokens[0] of every sequence is the tokenizer's beginning-of-sequence token
    k: int
    temperature: float
    logprob_dtype: str
    compute_dtype: str  # in which the teacher ran
    num_sequences: int
    num_tokens: int
    num_held_out_sequences: int
    num_held_out_tokens: int
    sequences_per_shard: int
    sequences_digest: str  # of all tokens, lengths and splits, in order
    model_path: str  # for readers; not compared
    texts: tuple[str, ...]  # for readers; not compared

    @property
    def num_shards(self) -> int:
        return -(-self.num_sequences // self.sequences_per_shard)

    def shard_range(self, shard: int) -> range:
        first = shard * self.sequences_per_shard
        return range(first, min(first + self.sequences_per_shard, self.num_sequences))

    def to_json(self) -> str:
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, source: Path) -> Manifest:
        try:
            fields: dict[str, Any] = json.loads(text)
            found = (fields.pop("format"), fields.pop("version"))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{source} is not a manifest of {FORMAT}: {error!r}") from error
        if found != (FORMAT, VERSION):
            raise StoreError(
                f"{source} is {found[0]!r} version {found[1]!r}; this pyalign reads {FORMAT!r} version "
                f"{VERSION}: collect the store again, or use the pyalign that wrote it"
            )
        try:
            identity = Identity(**fields.pop("identity"))
            return Manifest(identity=identity, texts=tuple(fields.pop("texts")), **fields)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{source}: {error}") from error

    @property
    def compared(self) -> dict[str, Any]:
        """Everything but the identity that decides what the shards hold."""
        skipped = {"identity", "prompt", "model_path", "texts"}  # the prompt counts by its digest
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}

    @property
    def digest(self) -> str:
        """sha256 of everything that decides what the shards hold."""
        return text_digest(json.dumps([dataclasses.asdict(self.identity), self.compared], sort_keys=True))

    def differences(self, wanted: Manifest) -> list[str]:
        """In words, every setting in which a store to be resumed differs from what is wanted now."""
        result = identity_differences(self.identity, wanted.identity)
        for name, theirs in wanted.compared.items():
            if self.compared[name] != theirs:
                result.append(f"{name} is {self.compared[name]!r} in the store and {theirs!r} now")
        return result


def identity_differences(stored: Identity, given: Identity) -> list[str]:
    result: list[str] = []
    if stored.vocab_size != given.vocab_size:
        result.append(f"its vocabulary has {stored.vocab_size} entries, this model's logits have {given.vocab_size}")
    if stored.tokenizer != given.tokenizer:
        result.append(f"its tokenizer is {stored.tokenizer[:12]}, this model's is {given.tokenizer[:12]}")
    if stored.model != given.model:
        result.append(f"its model is {stored.model[:12]}, this model is {given.model[:12]}")
    return result


class SequenceRows(NamedTuple):
    """What the store keeps of one sequence of n tokens."""

    tokens: Tensor  # (n,) integer
    teacher: TopKLogprobs  # (n, k), (n, k), (n,)
    held_out: bool


class TeacherBatch(NamedTuple):
    """B sequences for one forward pass, padded on the right; T rows count."""

    input_ids: Tensor  # (B, L) int64, 0 beyond a sequence's end
    rows: Tensor  # (T,) int64, flat positions b * L + t of the tokens, in the order of the teacher's rows
    teacher: TopKLogprobs  # float32 (T, k), int32 (T, k), float32 (T,)


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05d}.safetensors"


def _shard_tag(manifest: Manifest, shard: int) -> str:
    return f"{FORMAT} {VERSION}, shard {shard} of {manifest.digest}"


def _open_shard(directory: Path, manifest: Manifest, shard: int) -> Any:
    """The safetensors file of a shard that is whole and belongs to the manifest."""
    path = shard_path(directory, shard)
    try:
        file = require("safetensors").safe_open(path, framework="pt")
    except Exception as error:  # safetensors has its own error type, and OSError for a file too short to map
        if isinstance(error, ModuleNotFoundError):
            raise
        raise StoreError(f"{path} is damaged ({error}); collect again, which rewrites it alone") from error
    if (file.metadata() or {}).get("pyalign") != _shard_tag(manifest, shard):
        raise StoreError(f"{path} belongs to another store; collect again, which rewrites it alone")
    return file


class TeacherStoreWriter:
    """Makes a store, or goes on with one whose writer was stopped.

    The directory must have one writer at a time (``pyalign._files.exclusive``).

    Args:
        directory: where the store is or will be.
        manifest: what it holds. One already there must be the same in everything that decides the rows.

    Raises:
        StoreError: the store there was made with other settings, or by another version.
    """

    def __init__(self, directory: str | Path, manifest: Manifest):
        if manifest.logprob_dtype not in LOGPROB_DTYPES:
            raise StoreError(
                f"logprob_dtype: got {manifest.logprob_dtype!r}; wanted one of {', '.join(LOGPROB_DTYPES)}"
            )
        self.directory, self.manifest = Path(directory), manifest
        path = self.directory / "manifest.json"
        if path.exists():
            differences = Manifest.from_json(path.read_text(encoding="utf-8"), path).differences(manifest)
            if differences:
                raise StoreError(
                    f"{self.directory} holds a store made with other settings: {'; '.join(differences)}. "
                    "Give another directory, or delete this one"
                )
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(path, manifest.to_json())

    def missing(self) -> list[int]:
        """The shards still to be written: absent, damaged, or another store's."""
        return [s for s in range(self.manifest.num_shards) if not self._holds(s)]

    def _holds(self, shard: int) -> bool:
        if not shard_path(self.directory, shard).exists():
            return False
        try:
            _open_shard(self.directory, self.manifest, shard)
        except StoreError:
            return False
        return True

    def write(self, shard: int, sequences: Sequence[SequenceRows]) -> None:
        """Write one shard, whole or not at all.

        Raises:
            StoreError: the sequences are not those that the manifest announces.
        """
        wanted = len(self.manifest.shard_range(shard))
        if len(sequences) != wanted:
            raise StoreError(f"sequences: got {len(sequences)} for shard {shard}; wanted {wanted}")
        for i, sequence in enumerate(sequences):
            self._check_rows(f"sequences[{i}]", sequence)
        dtype = LOGPROB_DTYPES[self.manifest.logprob_dtype]
        residuals = [s.teacher.residual for s in sequences]
        lengths = torch.tensor([0] + [s.tokens.numel() for s in sequences])
        tensors = {
            "tokens": torch.cat([s.tokens for s in sequences]).to(torch.int32),
            "offsets": lengths.cumsum(0),
            "logprobs": torch.cat([s.teacher.logprobs for s in sequences]).to(dtype),
            "indices": torch.cat([s.teacher.indices for s in sequences]).to(torch.int32),
            "residual": torch.cat([r for r in residuals if r is not None]).float(),
            "held_out": torch.tensor([s.held_out for s in sequences]),
        }
        # One entry: safetensors writes several in random order, and the same rows are to be the same bytes.
        metadata = {"pyalign": _shard_tag(self.manifest, shard)}
        with atomic_file(shard_path(self.directory, shard)) as temporary:
            require("safetensors.torch").save_file(tensors, temporary, metadata=metadata)

    def _check_rows(self, name: str, sequence: SequenceRows) -> None:
        tokens, teacher = sequence.tokens, sequence.teacher
        wanted = (tokens.numel(), self.manifest.k)
        for field, x, shape in (
            ("logprobs", teacher.logprobs, wanted),
            ("indices", teacher.indices, wanted),
            ("residual", teacher.residual, wanted[:1]),
        ):
            got = None if x is None else tuple(x.shape)
            if got != shape:
                raise StoreError(f"{name}.teacher.{field}: got shape {got}; wanted {shape}, a row per token")
        if teacher.temperature != self.manifest.temperature:
            raise StoreError(
                f"{name}.teacher.temperature: got {teacher.temperature}; wanted {self.manifest.temperature}, the "
                "store's"
            )


class TeacherStore:
    """Reads a complete store; tensors stay on disk (mapped) until they are asked for.

    Args:
        directory: a store that ``pyalign distill collect`` or ``TeacherStoreWriter`` finished.

    Raises:
        StoreError: there is no store, it is of another version, or shards are missing or damaged.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        if not path.exists():
            raise StoreError(
                f"{self.directory} holds no teacher store (no manifest.json); `pyalign distill collect` makes one"
            )
        self.manifest = Manifest.from_json(path.read_text(encoding="utf-8"), path)
        count = self.manifest.num_shards
        missing = [s for s in range(count) if not shard_path(self.directory, s).exists()]
        if missing:
            raise StoreError(
                f"{self.directory} is incomplete: {len(missing)} of {count} shards are missing, the first is "
                f"{shard_path(self.directory, missing[0]).name}; run the same `pyalign distill collect` "
                "again, it goes on there"
            )
        self._shards = [_open_shard(self.directory, self.manifest, s) for s in range(count)]
        offsets = [shard.get_tensor("offsets").numpy() for shard in self._shards]
        self._offsets = offsets
        self.lengths = np.concatenate([np.diff(o) for o in offsets])  # (num_sequences,) tokens of each sequence
        self.held_out = np.concatenate([shard.get_tensor("held_out").numpy() for shard in self._shards])
        if (len(self.lengths), int(self.lengths.sum())) != (
            self.manifest.num_sequences,
            self.manifest.num_tokens,
        ):
            raise StoreError(
                f"{self.directory} is damaged: its shards hold {len(self.lengths)} sequences of "
                f"{self.lengths.sum()} tokens, its manifest says {self.manifest.num_sequences} of "
                f"{self.manifest.num_tokens}"
            )

    def require_match(self, identity: Identity) -> None:
        """Raise a ``StoreError`` that says what differs, unless the store was collected from this model."""
        differences = identity_differences(self.manifest.identity, identity)
        if differences:
            raise StoreError(
                f"the store {self.directory} does not match the model: {'; '.join(differences)}. It was "
                f"collected from {self.manifest.model_path}; train that model, or collect again with this one"
            )

    def split(self, *, held_out: bool) -> list[int]:
        """The sequences for evaluation (``held_out=True``) or for training, in order."""
        return np.flatnonzero(self.held_out == held_out).tolist()

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard_path(self.directory, s).stat().st_size for s in range(self.manifest.num_shards))

    def sequence(self, index: int) -> SequenceRows:
        """Sequence ``index``: tokens int32 (n,), the teacher's rows as stored, and its split."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"index: got {index}; wanted 0 <= index < {len(self.lengths)}")
        shard, local = divmod(index, self.manifest.sequences_per_shard)
        begin, end = (int(x) for x in self._offsets[shard][local : local + 2])
        file = self._shards[shard]
        tokens, logprobs, indices, residual = (
            file.get_slice(name)[begin:end] for name in ("tokens", "logprobs", "indices", "residual")
        )
        teacher = TopKLogprobs(logprobs, indices, residual, self.manifest.temperature)
        return SequenceRows(tokens, teacher, bool(self.held_out[index]))

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> TeacherBatch:
        """The given sequences, padded for one forward pass, with the teacher's rows packed."""
        sequences = [self.sequence(i) for i in indices]
        length = max(s.tokens.numel() for s in sequences)
        input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
        rows: list[Tensor] = []
        for b, sequence in enumerate(sequences):
            input_ids[b, : sequence.tokens.numel()] = sequence.tokens
            rows.append(torch.arange(sequence.tokens.numel()) + b * length)
        residual = torch.cat([s.teacher.residual for s in sequences if s.teacher.residual is not None])
        teacher = TopKLogprobs(
            torch.cat([s.teacher.logprobs for s in sequences]).float().to(device),
            torch.cat([s.teacher.indices for s in sequences]).to(device),
            residual.to(device),
            self.manifest.temperature,
        )
        return TeacherBatch(input_ids.to(device), torch.cat(rows).to(device), teacher)
