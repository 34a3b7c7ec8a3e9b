"""Evaluations of language models and preference models, and their plots: the library behind ``pyalign eval``.

=================== ======================================================================================
``records``         questions with choices, pairs and last words, from files
``likelihood``      a language model that reads them, by the scorer of ``pyalign score``
``multiple_choice`` accuracy, probability and mutual information of choices, with the length baselines
``choices``         the formulas of it, of plain scores
``last_word``       last-word prediction
``human_eval``      completions of programs, run against their tests
``completion``      a language model that writes them
``estimates``       means with intervals, paired differences, pass@k
``results``         what an evaluation came to, item by item; the alignment tax
``calibration``     whether probabilities are what they say, and the plot of it
``job``             an evaluation of files into files, resumable
=================== ======================================================================================
"""

from pyalign.evaluation.calibration import ChoiceCalibration, choice_calibration, plot_calibration
from pyalign.evaluation.choices import choice_metrics
from pyalign.evaluation.completion import Writer
from pyalign.evaluation.estimates import (
    Estimate,
    PairedDifference,
    mean_estimate,
    paired_difference,
    pass_at_k,
    sign_test,
    wilson_interval,
)
from pyalign.evaluation.human_eval import (
    Completion,
    HumanEvalEvaluation,
    Problem,
    evaluate_human_eval,
    read_completions,
    read_problems,
)
from pyalign.evaluation.last_word import LastWordEvaluation, evaluate_last_words, last_word_evaluation
from pyalign.evaluation.likelihood import Reader
from pyalign.evaluation.multiple_choice import (
    MultipleChoiceEvaluation,
    choice_evaluation,
    evaluate_multiple_choice,
)
from pyalign.evaluation.records import (
    LastWord,
    Question,
    last_word_examples,
    read_last_words,
    read_multiple_choice,
    read_pairs,
)
from pyalign.evaluation.results import Comparison, Evaluation, alignment_tax

__all__ = [
    "ChoiceCalibration",
    "Comparison",
    "Completion",
    "Estimate",
    "Evaluation",
    "HumanEvalEvaluation",
    "LastWord",
    "LastWordEvaluation",
    "MultipleChoiceEvaluation",
    "PairedDifference",
    "Problem",
    "Question",
    "Reader",
    "Writer",
    "alignment_tax",
    "choice_calibration",
    "choice_evaluation",
    "choice_metrics",
    "evaluate_human_eval",
    "evaluate_last_words",
    "evaluate_multiple_choice",
    "last_word_evaluation",
    "last_word_examples",
    "mean_estimate",
    "paired_difference",
    "pass_at_k",
    "plot_calibration",
    "read_completions",
    "read_last_words",
    "read_multiple_choice",
    "read_pairs",
    "read_problems",
    "sign_test",
    "wilson_interval",
]
