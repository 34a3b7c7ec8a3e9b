"""Last-word prediction: whether a language model ends a text with the word that it had (Lambada's form)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyalign import _checks
from pyalign.evaluation.likelihood import Reader
from pyalign.evaluation.records import LastWord
from pyalign.evaluation.results import OVERALL, Evaluation
from pyalign.pair_scorer.scorer import Likelihoods


@dataclass(frozen=True)
class LastWordEvaluation(Evaluation):
    """:class:`Evaluation` with the metrics ``accuracy`` and ``log_loss``."""

    def perplexity(self, *, subset: str = OVERALL) -> float:
        """exp(mean log-loss), per word; lm-eval's ``perplexity`` of Lambada."""
        return math.exp(self.estimate("log_loss", subset=subset).value)


def evaluate_last_words(
    model: Any, examples: Iterable[LastWord], tokenizer: Any = None, *, prompt: str = "", **options: Any
) -> LastWordEvaluation:
    """How often a causal language model predicts the last word w of a text from its context q.

    - ``accuracy``: whether greedy decoding writes w, that is, whether each of its tokens is the most probable one
      behind the context and w's tokens before it; lm-eval's ``acc`` of Lambada (Paperno et al. 2016, arXiv 1606.06031)
    - ``log_loss``: -log P(w|q), of all its tokens

    What may follow w isn't looked at: a model that would have written a longer word that begins with w's tokens is
    right.

    Args:
        model: a local model directory, a GGUF file, a loaded model of transformers, or a :class:`Reader` to use again.
        examples: see :func:`last_word_examples` and :func:`read_last_words`.
        tokenizer: of a loaded model.
        prompt: a text in front of every context; see :func:`evaluate_multiple_choice`.
        options: of :class:`pyalign.PairScorer`.

    Raises:
        OptionError: an option that the scorer can't follow.
    """
    items = list(examples)
    reader = Reader.of(model, tokenizer, prompt=prompt, null_context=None, **options)
    found = reader.read([(item.context, (item.target,)) for item in items], greedy=True)
    return last_word_evaluation(items, found)


def last_word_evaluation(examples: Sequence[LastWord], likelihoods: Sequence[Likelihoods]) -> LastWordEvaluation:
    """:func:`evaluate_last_words` of likelihoods that are there already, one per example.

    Raises:
        ValueError: not as many likelihoods as examples.
    """
    if len(likelihoods) != len(examples):
        _checks.refuse("likelihoods", len(likelihoods), f"{len(examples)}, one per example")
    right = [math.nan if found.greedy is None else float(found.greedy[0]) for found in likelihoods]
    return LastWordEvaluation(
        values={
            "accuracy": np.array(right, np.float64),
            "log_loss": np.array([-found.logprobs[0] for found in likelihoods], np.float64),
        },
        ids=tuple(example.identity for example in examples),
        subsets=tuple(example.subset for example in examples),
    )
