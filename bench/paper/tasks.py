"""Sources of sequences x whose log p0(x) is known, and what makes a sequence good, or a completion right.

Ranked tasks: a sequence has a quality q(x), and the better of two random sequences is the good one. Binary tasks: a
context is followed by what a rule makes of it, or by that with one token replaced.

The sequences that win random pairs have the density 2 F(q(x)) p0(x), F the distribution function of q. A perfect
imitator prefers A to B where log F(q_A) + log p0(A) is larger: with F uniform, log p0 normal with the standard
deviation s, and both independent, it is right in a share 1/2 + exp(s^2) Phi(-sqrt(2) s) of pairs, which falls to 1/2
as s grows.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RANKED = ("tokens", "interactions")
BINARY = ("sort", "reverse")
MAXIMUM_TEXT = 16 << 20
IDEAL_DRAWS = 40_000


def generator(*seeds: int) -> torch.Generator:
    """One stream for every tuple of small integers."""
    seed = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


class BigramSource:
    """A Markov chain: x_0 uniform, P[x_{t-1}, x_t] a softmax of normal logits with the given spread."""

    def __init__(self, vocab: int, spread: float, seed: int) -> None:
        self.vocab = vocab
        normal = torch.randn(vocab, vocab, generator=generator(seed, 1), dtype=torch.float64)
        self.log_transitions = torch.log_softmax(spread * normal, -1)  # (V, V)
        self._cumulative = self.log_transitions.exp().cumsum(-1)
        self._cumulative[:, -1] = 1.0

    def draw(self, count: int, length: int, random: torch.Generator, held_out: bool = False) -> Tensor:
        """(count, length) int64. Fresh draws of a chain are as good as held out."""
        x = torch.zeros(count, length, dtype=torch.int64)
        x[:, 0] = torch.randint(self.vocab, (count,), generator=random)
        for t in range(1, length):
            uniform = torch.rand(count, 1, generator=random, dtype=torch.float64)
            x[:, t] = torch.searchsorted(self._cumulative[x[:, t - 1]], uniform, right=True).squeeze(1)
        return x.clamp_(max=self.vocab - 1)

    def logprob(self, x: Tensor) -> Tensor:
        """(B,) float64 log p0 of x (B, T)."""
        return self.log_transitions[x[:, :-1], x[:, 1:]].sum(1) - math.log(self.vocab)


class TextSource:
    """Windows of the bytes of real text, the last tenth held out. Its log p0 is a bigram model's, not the text's."""

    vocab = 256

    def __init__(self, path: Path, digest: str) -> None:
        data = read_text(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{path}: its text isn't that of the configuration any more; start again")
        self._bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64)
        self._cut = len(self._bytes) * 9 // 10
        train = self._bytes[: self._cut]
        counts = torch.bincount(train[:-1] * 256 + train[1:], minlength=256 * 256).view(256, 256).double()
        self.log_transitions = torch.log((counts + 0.01) / (counts + 0.01).sum(-1, keepdim=True))

    def draw(self, count: int, length: int, random: torch.Generator, held_out: bool = False) -> Tensor:
        first, last = (self._cut, len(self._bytes)) if held_out else (0, self._cut)
        starts = torch.randint(first, last - length, (count,), generator=random)
        return self._bytes[starts[:, None] + torch.arange(length)]

    def logprob(self, x: Tensor) -> Tensor:
        """(B,) float64 log p0 of x (B, T), behind its first byte."""
        return self.log_transitions[x[:, :-1], x[:, 1:]].sum(1)


Source = BigramSource | TextSource


def read_text(path: Path) -> bytes:
    """The bytes of a file, or of a directory's .py, .md, .rst and .txt files in order, up to 16 MiB."""
    if path.is_file():
        return path.read_bytes()[:MAXIMUM_TEXT]
    if not path.is_dir():
        raise FileNotFoundError(f"text: got {path}; wanted a file, or a directory with .py, .md, .rst or .txt files")
    data = bytearray()
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in (".py", ".md", ".rst", ".txt") and len(data) < MAXIMUM_TEXT:
            data += file.read_bytes()
    if len(data) < 1 << 16:
        raise ValueError(f"text: got {len(data)} bytes in {path}; wanted {1 << 16} at least")
    return bytes(data[:MAXIMUM_TEXT])


def text_config(path: Path | None) -> dict[str, Any]:
    """The configuration of a TextSource: the given text, or the Python standard library's source."""
    path = Path(sysconfig.get_paths()["stdlib"]) if path is None else path.resolve()
    return {"kind": "text", "path": str(path), "digest": hashlib.sha256(read_text(path)).hexdigest()}


@functools.lru_cache(maxsize=16)
def _source(kind: str, *parameters: Any) -> Source:
    return TextSource(Path(parameters[0]), parameters[1]) if kind == "text" else BigramSource(*parameters)


def make_source(config: Mapping[str, Any], seed: int) -> Source:
    if config["kind"] == "text":
        return _source("text", config["path"], config["digest"])
    return _source("bigram", config["vocab"], config["spread"], seed)


class Specials(NamedTuple):
    """Tokens behind the source's own, and how many there are in all."""

    begin: int
    end: int
    good: int
    bad: int
    separator: int
    vocab: int


def specials(source: Source) -> Specials:
    return Specials(*(source.vocab + i for i in range(6)))


def framed(x: Tensor, *before: int, end: int) -> Tensor:
    """x (B, T) between the tokens ``before`` and the one that scores are read at."""
    columns = [torch.full((len(x), 1), token, dtype=torch.int64) for token in (*before, end)]
    return torch.cat((*columns[:-1], x, columns[-1]), 1)


# Ranked tasks


class Quality:
    """A random quality q(x) = a . f(x), with mean 0 and standard deviation 1 under the source and no correlation with
    log p0(x): what has to be learned is not what is likely.

    "tokens": f are the counts n of tokens, so that a is the worth of each. "interactions": a hidden layer on top of
    them, f = tanh(n U) with 16 units. Normal a, with its part along cov(f, log p0) taken out.
    """

    def __init__(self, source: Source, task: str, length: int, seed: int) -> None:
        random = generator(seed, 2)
        self._vocab, self._hidden = source.vocab, None
        if task == "interactions":
            normal = torch.randn(source.vocab, 16, generator=random, dtype=torch.float64)
            self._hidden = normal * (4 / length) ** 0.5  # (V, 16); what tanh is taken of has variance 4
        x = source.draw(IDEAL_DRAWS, length, random)
        features, logprob = self._features(x), source.logprob(x)
        likely = (features - features.mean(0)).T @ (logprob - logprob.mean())  # (K,)
        out = torch.randn(features.shape[1], generator=random, dtype=torch.float64)
        out -= (out @ likely) / (likely @ likely) * likely
        raw = features @ out
        self._out, self._mean = out / raw.std(), float(raw.mean() / raw.std())

    def _features(self, x: Tensor) -> Tensor:  # (B, T) -> (B, K)
        counts = torch.zeros(len(x), self._vocab, dtype=torch.float64)
        counts.scatter_add_(1, x, torch.ones(x.shape, dtype=torch.float64))
        return counts if self._hidden is None else torch.tanh(counts @ self._hidden)

    def __call__(self, x: Tensor) -> Tensor:  # (B, T) -> (B,) float64
        return self._features(x) @ self._out - self._mean


@functools.lru_cache(maxsize=16)
def make_quality(source: Source, task: str, length: int, seed: int) -> Quality:
    return Quality(source, task, length, seed)


def ranked_pairs(
    source: Source, quality: Callable[[Tensor], Tensor], count: int, length: int, random: torch.Generator,
    held_out: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(count, length) twice: the better and the worse of two random sequences."""
    first, second = (source.draw(count, length, random, held_out) for _ in range(2))
    swap = (quality(first) < quality(second))[:, None]
    return torch.where(swap, second, first), torch.where(swap, first, second)


class Ideal(NamedTuple):
    """What perfect imitation would reach on a ranked task."""

    deviation: float
    """s, the standard deviation of log p0."""
    closed_form: float
    """1/2 + exp(s^2) Phi(-sqrt(2) s)."""
    sampled: float
    """The accuracy of log F(q) + log p0 on random pairs of this very task."""


def ideal_accuracy(deviation: float) -> float:
    """1/2 + exp(s^2) Phi(-sqrt(2) s) = 1/2 + erfcx(s) / 2; an asymptotic series where exp(s^2) is too large."""
    if deviation < 5.0:
        return 0.5 + 0.5 * math.exp(deviation**2) * math.erfc(deviation)
    square = 2 * deviation**2
    return 0.5 + 0.5 / (deviation * math.sqrt(math.pi)) * (1 - 1 / square + 3 / square**2 - 15 / square**3)


def ideal_imitation(source: Source, quality: Callable[[Tensor], Tensor], length: int, seed: int) -> Ideal:
    x = source.draw(2 * IDEAL_DRAWS, length, generator(seed, 3))
    logprob = source.logprob(x)
    share = (quality(x).argsort().argsort().double() + 0.5) / len(x)  # F(q)
    imitator = (share.log() + logprob).view(2, -1)
    right = ((imitator[0] > imitator[1]) == (share.view(2, -1)[0] > share.view(2, -1)[1])).double().mean()
    deviation = float(logprob.std())
    return Ideal(deviation, ideal_accuracy(deviation), float(right))


# Binary tasks


def binary_pairs(
    source: Source, rule: str, count: int, length: int, random: torch.Generator, held_out: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, right and wrong completions, (count, length) each; the wrong one differs in one token."""
    context = source.draw(count, length, random, held_out)
    right = context.sort(-1).values if rule == "sort" else context.flip(-1)
    wrong = right.clone()
    rows, place = torch.arange(count), torch.randint(length, (count,), generator=random)
    wrong[rows, place] = (
        wrong[rows, place] + torch.randint(1, source.vocab, (count,), generator=random)
    ) % source.vocab
    return context, right, wrong
