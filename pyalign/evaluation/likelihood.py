"""Likelihoods of continuations behind contexts, by the scorer of ``pyalign score``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pyalign._log import Log
from pyalign._options import OptionError
from pyalign.pair_scorer.batches import BatchTensors
from pyalign.pair_scorer.scorer import Likelihoods, PairScorer, Window
from pyalign.pair_scorer.tokens import ResponseSet, Truncation


class Reader:
    """A causal language model that reads contexts and continuations: log P(a|q), log P(a), and whether a is what greedy
    decoding writes.

    It is a :class:`pyalign.PairScorer`: context and continuation are tokenised as one text, the continuation beginning
    with the first token that the context alone doesn't have; continuations of one context are computed in one row that
    holds it once; rows of like lengths make batches.

    Args:
        model: a local model directory, a GGUF file, or a loaded model of transformers.
        tokenizer: of a loaded model.
        prompt: a text in front of every context (see :func:`evaluate_multiple_choice`).
        null_context: what log P(a) is read behind; None: it isn't computed.
        options: of ``PairScorer``.

    Raises:
        OptionError: an option that can't be followed.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, prompt: str = "", null_context: str | None = "", **options: Any
    ):
        for name in ("score", "null_prompt", "prefix", "reference", "beta", "label"):
            if name in options:
                raise OptionError(
                    name, f"got {options[name]!r}; wanted prompt, null_context and a language model alone"
                )
        score = (
            {"score": "sum_logprob"} if null_context is None else {"score": "information", "null_prompt": null_context}
        )
        self.scorer = PairScorer(model, tokenizer, prefix=prompt, **score, **options)
        self.truncation = Truncation()
        """What had to be cut in all that was read so far."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, **options: Any) -> Reader:
        """``model`` as a reader; one that is a reader already comes with its own prompt and options."""
        if not isinstance(model, Reader):
            return cls(model, tokenizer, **options)
        prompt, null, given = options.pop("prompt", ""), options.pop("null_context", None), sorted(options)
        if tokenizer is not None or prompt or null or given:
            raise OptionError("model", "got a Reader and options beside it; wanted a Reader made with them")
        if null is not None and model.scorer.score != "information":
            raise OptionError(
                "model", "got a Reader without log P(a); wanted one with a null_context, for 'information'"
            )
        return model

    def read(
        self,
        items: Sequence[tuple[str, Sequence[str]]],
        *,
        greedy: bool = False,
        log: Log | None = None,
        advance: Callable[[float], None] = lambda items: None,
    ) -> list[Likelihoods]:
        """Of the continuations of each (context, continuations), in order.

        Args:
            items: contexts and what may follow them.
            greedy: whether to find out what greedy decoding writes, too.
            log: batches that are in it are not computed again, others are added.
            advance: told how many items were done since it was told before.
        """
        return list(self.stream(items, greedy=greedy, log=log, advance=advance))

    def stream(
        self,
        items: Sequence[tuple[str, Sequence[str]]],
        *,
        greedy: bool,
        log: Log | None,
        advance: Callable[[float], None],
    ) -> Iterator[Likelihoods]:
        """:meth:`read`, a window of items at a time."""
        done: dict[int, dict[int, list[Any]]] = {}
        for entry in log.entries if log is not None else ():
            done.setdefault(entry["window"], {})[entry["batch"]] = entry["found"]
        under_way: dict[int, tuple[int, float]] = {}  # number and items per sequence

        def work() -> Iterator[tuple[Window, int, BatchTensors | None]]:
            size = self.scorer.window
            for number, first in enumerate(range(0, len(items), size)):
                window = self.scorer.prepare(ResponseSet(q, a) for q, a in items[first : first + size])
                sequences = sum(len(batch.sequences) for _, batch in window.batches)
                under_way[id(window)] = number, len(window.groups) / max(sequences, 1)
                before = done.get(number, {})
                for batch, found in before.items():
                    window.add(batch, found)
                yield from self.scorer.tensors(window, frozenset(before))
                yield window, -1, None

        told = 0.0
        for window, batch, found in self.scorer.run(
            work(), lambda batch: self.scorer.likelihoods(batch, greedy=greedy)
        ):
            number, each = under_way[id(window)]
            if found is not None:
                window.add(batch, found)
                if log is not None:
                    log.add(window=number, batch=batch, found=found)
                told += each * len(found)
                advance(each * len(found))
            else:
                del under_way[id(window)]
                self.truncation.add(window.truncation)
                advance(len(window.groups) - told)
                told = 0.0
                yield from window.likelihoods()

    def describe(self) -> dict[str, Any]:
        """Everything that decides the likelihoods, on one kind of machine."""
        scorer = self.scorer
        return {
            **scorer.digests,
            **asdict(scorer.options),
            "information": scorer.score == "information",
            "share_prefix": scorer.shares_prefix,
            "token_budget": scorer.token_budget,
            "window": scorer.window,
            "dtype": str(scorer.dtype).removeprefix("torch."),
            "device": scorer.device.type,
        }
