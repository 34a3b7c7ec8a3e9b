"""Choices scored by a language model: accuracy, probability and calibration, the length baselines beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyalign import _checks
from pyalign.evaluation.calibration import ChoiceCalibration, choice_calibration
from pyalign.evaluation.choices import TIES, choice_metrics
from pyalign.evaluation.likelihood import Reader
from pyalign.evaluation.records import Question
from pyalign.evaluation.results import Evaluation
from pyalign.pair_scorer.scorer import Likelihoods
from pyalign.scoring import PreferenceEvaluation, preference_metrics

SCORINGS = ("sum_logprob", "mean_logprob", "per_character", "per_byte", "information")
BASELINES = ("longest", "shortest")


@dataclass(frozen=True)
class MultipleChoiceEvaluation(Evaluation):
    """:class:`Evaluation` of questions with choices; its metrics are named ``SCORING/METRIC``."""

    targets: tuple[tuple[bool, ...], ...] = ()
    """Which choices of each question are right."""
    scores: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    """By scoring, of each question's choices."""

    def calibration(self, scoring: str, *, bins: int = 10) -> ChoiceCalibration | PreferenceEvaluation:
        """How well softmax(scores) serves as probabilities of the choices; for :func:`plot_calibration`.

        Where every question has two choices, one of them right, it is :func:`pyalign.preference_metrics` of the right
        one against the other, whose bins cut [1/2, 1]. Otherwise :func:`choice_calibration`, whose bins cut [0, 1].
        """
        _checks.one_of("scoring", scoring, tuple(self.scores))
        scores = self.scores[scoring]
        if all(len(t) == 2 and sum(t) == 1 for t in self.targets):
            sides = [(s[t.index(True)], s[t.index(False)]) for s, t in zip(scores, self.targets, strict=True)]
            chosen, rejected = torch.tensor(sides, dtype=torch.float64).reshape(-1, 2).unbind(1)
            return preference_metrics(chosen.contiguous(), rejected.contiguous(), bins=bins, mask=~chosen.isnan())
        return choice_calibration(scores, self.targets, bins=bins)


def evaluate_multiple_choice(
    model: Any,
    questions: Iterable[Question],
    tokenizer: Any = None,
    *,
    scorings: Sequence[str] = SCORINGS,
    prompt: str = "",
    null_context: str = "",
    ties: str = "split",
    **options: Any,
) -> MultipleChoiceEvaluation:
    """How often, and how surely, a causal language model takes the right choice a of a question q.

    ==================  ========================================================================  =====================
    scoring             what is compared between choices                                          in lm-eval
    ==================  ========================================================================  =====================
    ``sum_logprob``     log P(a|q), of all its tokens                                             ``acc``
    ``mean_logprob``    log P(a|q) / tokens of a
    ``per_character``   log P(a|q) / characters of the choice, without the space that joins it    ``acc_norm``
    ``per_byte``        log P(a|q) / bytes of the choice in UTF-8                                 ``acc_bytes``
    ``information``     I(a, q) = log P(a|q) - log P(a) of Askell et al. 2021 (arXiv 2112.00861)  ``acc_mutual_info``
    ``longest``         baseline: characters of the choice; it knows nothing of the question
    ``shortest``        baseline: the fewest characters
    ==================  ========================================================================  =====================

    Each scoring has, per question, with s the choices' scores, p = softmax(s) and R the right choices:

    - ``accuracy``: whether the highest score is a right choice's; see ``ties``. With log P(a|q) it is TruthfulQA's MC1.
    - ``probability``: the sum of p over R. With log P(a|q) it is TruthfulQA's MC2 (Lin et al. 2021, arXiv 2109.07958).
    - ``log_loss``: minus its logarithm.
    - ``brier``: sum over choices of (p - [right])^2, of questions with one right choice (NaN otherwise); lm-eval's
      ``brier_score``, and twice that of :func:`pyalign.preference_metrics` for pairs.

    The baselines have an accuracy alone, and stand in every result: a scoring that isn't above them has shown nothing.

    Args:
        model: a local model directory, a GGUF file, a loaded model of transformers, or a :class:`Reader` to use again.
        questions: see :func:`read_multiple_choice` and :func:`read_pairs`.
        tokenizer: of a loaded model.
        scorings: which of the above.
        prompt: a text in front of every context, as context distillation's teacher reads it: the same tokens with and
            without it follow, so that runs can be compared item by item (:meth:`Evaluation.compare`). It is a part of
            the model: it stands in front of ``null_context`` too.
        null_context: what log P(a) is read behind. "": nothing but BOS (or EOS, without BOS). ``"Answer:"`` is another
            usual choice.
        ties: "split": k choices that share the highest score count 1/k each. "first": the first of them is taken, as
            lm-eval's argmax does, which favours files whose right choice is the first.
        options: of :class:`pyalign.PairScorer`: ``dtype``, ``device``, ``token_budget``, ``max_length`` ...

    Raises:
        ValueError: no scoring, or an unknown one; OptionError: an option that the scorer can't follow.
    """
    check_scorings(scorings)
    _checks.one_of("ties", ties, TIES)
    items = list(questions)
    reader = Reader.of(
        model, tokenizer, prompt=prompt, null_context=null_context if "information" in scorings else None, **options
    )
    found = reader.read([(question.context, question.continuations) for question in items])
    return choice_evaluation(items, found, scorings=scorings, ties=ties)


def check_scorings(scorings: Sequence[str]) -> None:
    if isinstance(scorings, str) or not scorings:
        _checks.refuse("scorings", repr(scorings), "one or more of " + ", ".join(SCORINGS))
    for scoring in scorings:
        _checks.one_of("scorings", scoring, SCORINGS)


def choice_evaluation(
    questions: Sequence[Question],
    likelihoods: Sequence[Likelihoods],
    *,
    scorings: Sequence[str] = SCORINGS,
    ties: str = "split",
) -> MultipleChoiceEvaluation:
    """:func:`evaluate_multiple_choice` of likelihoods that are there already, one per question.

    Raises:
        ValueError: as many likelihoods as questions are wanted, with log P(a) for "information".
    """
    check_scorings(scorings)
    if len(likelihoods) != len(questions):
        _checks.refuse("likelihoods", len(likelihoods), f"{len(questions)}, one per question")
    scores = {name: tuple(map(_SCORE[name], questions, likelihoods)) for name in (*scorings, *BASELINES)}
    targets = tuple(question.targets for question in questions)
    values: dict[str, NDArray[np.float64]] = {}
    for name in scores:
        metrics = choice_metrics(scores[name], targets, ties=ties)
        kept = metrics if name not in BASELINES else {"accuracy": metrics["accuracy"]}
        values |= {f"{name}/{metric}": x for metric, x in kept.items()}
    return MultipleChoiceEvaluation(
        values=values,
        ids=tuple(question.identity for question in questions),
        subsets=tuple(question.subset for question in questions),
        targets=targets,
        scores={name: scores[name] for name in scorings},
    )


# Of a question's choices, (choices,): their scores by scoring


def _sum(question: Question, found: Likelihoods) -> tuple[float, ...]:
    return found.logprobs


def _per_token(question: Question, found: Likelihoods) -> tuple[float, ...]:
    return _divided(found, found.tokens)


def _per_character(question: Question, found: Likelihoods) -> tuple[float, ...]:
    return _divided(found, [len(choice) for choice in question.choices])


def _per_byte(question: Question, found: Likelihoods) -> tuple[float, ...]:
    return _divided(found, [len(choice.encode()) for choice in question.choices])


def _divided(found: Likelihoods, counts: Sequence[int]) -> tuple[float, ...]:
    return tuple(x / n if n else math.nan for x, n in zip(found.logprobs, counts, strict=True))


def _information(question: Question, found: Likelihoods) -> tuple[float, ...]:
    if found.null_logprobs is None:
        _checks.refuse("likelihoods", "none without a context", "log P(a) for the scoring 'information'")
    return tuple(x - y for x, y in zip(found.logprobs, found.null_logprobs, strict=True))


def _longest(question: Question, found: Likelihoods) -> tuple[float, ...]:
    return tuple(float(len(choice)) for choice in question.choices)


def _shortest(question: Question, found: Likelihoods) -> tuple[float, ...]:
    return tuple(-float(len(choice)) for choice in question.choices)


_SCORE = {
    "sum_logprob": _sum,
    "mean_logprob": _per_token,
    "per_character": _per_character,
    "per_byte": _per_byte,
    "information": _information,
    "longest": _longest,
    "shortest": _shortest,
}
