"""An evaluation of files into files: every finished batch is kept, the output is whole or absent.

Beside the output OUT stands, while the job runs, the directory OUT.parts with ``job.json``, everything that decides
what the model makes of the items, and ``log.jsonl``, its finished batches. At the end OUT holds a row per item and
OUT.summary.json the estimates. The same job again reads OUT instead of the model, so that other scorings and
comparisons are free.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyalign._files import atomic_file, write_text
from pyalign._log import Log
from pyalign._optional import require
from pyalign._options import OptionError, at_least, one_of
from pyalign.evaluation.calibration import ChoiceCalibration, plot_calibration
from pyalign.evaluation.completion import Writer
from pyalign.evaluation.human_eval import (
    Completion,
    HumanEvalEvaluation,
    Problem,
    check_allowed,
    evaluate_human_eval,
    human_eval_evaluation,
)
from pyalign.evaluation.last_word import last_word_evaluation
from pyalign.evaluation.likelihood import Reader
from pyalign.evaluation.multiple_choice import SCORINGS, MultipleChoiceEvaluation, choice_evaluation
from pyalign.evaluation.records import LastWord, Question
from pyalign.evaluation.results import Comparison, Evaluation, finite, row_of
from pyalign.pair_scorer.output import Output, begin, read_output
from pyalign.pair_scorer.scorer import Likelihoods
from pyalign.scoring import PreferenceEvaluation

TASKS = ("multiple-choice", "pairs", "last-word", "human-eval")


@dataclass(frozen=True)
class ItemsFile(Output):
    """The file of the items, *.jsonl or *.parquet.

    Raises:
        OptionError: another name.
    """

    out: Path
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.check_out()


@dataclass(frozen=True)
class EvalSettings:
    """What becomes of an evaluation.

    Raises:
        OptionError: a setting out of range.
    """

    task: str
    output: ItemsFile | None = None  # None: nothing is written
    scorings: tuple[str, ...] = SCORINGS
    ties: str = "split"
    level: float = 0.95
    bins: int = 10
    plots: bool = False
    baseline: Path | None = None

    def __post_init__(self) -> None:
        one_of("task", self.task, TASKS)
        for scoring in self.scorings:
            one_of("scoring", scoring, SCORINGS)
        one_of("ties", self.ties, ("split", "first"))
        at_least("bins", self.bins, 1)
        if not 0 < self.level < 1:
            raise OptionError("level", f"got {self.level}; wanted a number between 0 and 1")
        if self.plots and self.output is None:
            raise OptionError("plots", "got no --out, beside which they are drawn; wanted one")


@dataclass
class Progress:
    """Told what goes on; each method may be replaced."""

    start: Callable[[float, int], None] = lambda done, total: None
    advance: Callable[[float], None] = lambda items: None


@dataclass
class Outcome:
    """What an evaluation came to."""

    evaluation: Evaluation
    comparison: Comparison | None
    summary: dict[str, Any]
    written: list[Path]


def load_baseline(settings: EvalSettings, ids: Sequence[str]) -> Evaluation | None:
    """The run to compare with, before anything is computed.

    Raises:
        OptionError: it isn't one, or is over other items.
    """
    if settings.baseline is None:
        return None
    try:
        baseline = Evaluation.load(settings.baseline)
    except OptionError as error:
        raise OptionError("compare", error.problem) from error
    if baseline.ids != tuple(ids):
        same = len(set(ids) & set(baseline.ids))
        raise OptionError(
            "compare",
            f"got {settings.baseline} of {len(baseline)} items, {same} of which are among the {len(ids)} here; wanted "
            "a run over the same items in the same order",
        )
    return baseline


def evaluate_items(
    reader: Reader,
    items: Sequence[Question] | Sequence[LastWord],
    settings: EvalSettings,
    *,
    data: Mapping[str, Any],
    progress: Progress | None = None,
) -> Outcome:
    """Evaluate questions or last words into ``settings.output``, or go on with it.

    Args:
        reader: the model.
        items: of the task.
        settings: what becomes of it.
        data: what tells the items apart from others, for the job's description.
        progress: told how many items are done.

    Raises:
        OptionError, JobError: the output is that of another job, or one is being written.
    """
    progress = progress or Progress()
    greedy = settings.task == "last-word"
    baseline = load_baseline(settings, [item.identity for item in items])
    description = {"task": settings.task, **data, **reader.describe()}
    texts = [(x.context, x.continuations if isinstance(x, Question) else (x.target,)) for x in items]

    def compute(log: Log | None) -> list[Likelihoods]:
        found = reader.read(texts, greedy=greedy, log=log, advance=progress.advance)
        # As it is in the output, in which what isn't finite is None: such an item has no score.
        return [x._replace(logprobs=_finite(x.logprobs), null_logprobs=_finite(x.null_logprobs)) for x in found]

    def restore(row: Mapping[str, Any]) -> Likelihoods:
        greedy = None if row["greedy"] is None else tuple(row["greedy"])
        return Likelihoods(_finite(row["logprobs"]), _finite(row["null_logprobs"]), tuple(row["tokens"]), greedy)

    with ExitStack() as stack:
        progress.start(0, len(items))
        begun = time.perf_counter()
        found, again = _compute(settings, description, stack, compute, restore)
        seconds = time.perf_counter() - begun
        if again:
            progress.advance(len(items))
        if greedy:
            evaluation: Evaluation = last_word_evaluation([x for x in items if isinstance(x, LastWord)], found)
        else:
            questions = [x for x in items if isinstance(x, Question)]
            evaluation = choice_evaluation(questions, found, scorings=settings.scorings, ties=settings.ties)

        def rows() -> Iterator[dict[str, Any]]:
            for index, (item, x) in enumerate(zip(items, found, strict=True)):
                own = {"targets": list(item.targets)} if isinstance(item, Question) else {"target": item.target}
                yield row_of(evaluation, index) | own | {
                    "logprobs": list(map(finite, x.logprobs)),
                    "null_logprobs": None if x.null_logprobs is None else list(map(finite, x.null_logprobs)),
                    "tokens": list(x.tokens),
                    "greedy": None if x.greedy is None else list(x.greedy),
                }  # fmt: skip

        unscored = sum(any(map(math.isnan, (*x.logprobs, *(x.null_logprobs or ())))) for x in found)
        counts = {"truncation": vars(reader.truncation), "notes": reader.scorer.notes, "unscored": unscored}
        return _finish(settings, description, evaluation, baseline, rows(), _before(settings, counts, seconds, again))


def evaluate_programs(
    source: Writer | Sequence[Completion],
    problems: Sequence[Problem],
    settings: EvalSettings,
    *,
    data: Mapping[str, Any],
    k: Sequence[int],
    progress: Progress | None = None,
    **execution: Any,
) -> Outcome:
    """Evaluate completions of HumanEval's problems into ``settings.output``, or go on with it.

    Args:
        source: a model that writes them, or the completions.
        problems, k, execution: of :func:`evaluate_human_eval`.
        settings, data, progress: as in :func:`evaluate_items`.

    Raises:
        OptionError, JobError: execution isn't allowed; the output is that of another job, or one is being written.
    """
    progress = progress or Progress()
    check_allowed(execution.get("allow_code_execution", False))
    if isinstance(source, Writer) and min(k) > source.samples:
        raise OptionError("k", f"got {min(k)}; wanted at most {source.samples}, the samples of each problem")
    baseline = load_baseline(settings, [problem.task_id for problem in problems])
    limits = {name: execution.get(name) for name in ("timeout", "memory_mib")}
    description = {"task": settings.task, **data, **limits}
    description |= source.describe() if isinstance(source, Writer) else {}

    def compute(log: Log | None) -> list[tuple[list[str], tuple[str, ...]]]:
        count = len(problems) * source.samples if isinstance(source, Writer) else 0
        progress.start(0, count + (count or len(source)))  # pyright: ignore[reportArgumentType]
        completions = (
            source.write(problems, log=log, advance=progress.advance) if isinstance(source, Writer) else source
        )
        evaluation = evaluate_human_eval(problems, completions, k=k, advance=progress.advance, **execution)
        texts: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
        for task_id, text in completions:
            texts[task_id].append(text)
        return list(zip(texts.values(), evaluation.verdicts, strict=True))

    def restore(row: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
        return row["completions"], tuple(row["verdicts"])

    with ExitStack() as stack:
        begun = time.perf_counter()
        found, again = _compute(settings, description, stack, compute, restore)
        seconds = time.perf_counter() - begun
        least = min(len(verdicts) for _, verdicts in found)
        ks = [value for value in k if value <= least]
        if not ks:
            raise OptionError("k", f"got {', '.join(map(str, k))}; wanted at most {least}, the completions there are")
        ids = [problem.task_id for problem in problems]
        evaluation = human_eval_evaluation(ids, [verdicts for _, verdicts in found], k=ks)

        def rows() -> Iterator[dict[str, Any]]:
            for index, (texts, verdicts) in enumerate(found):
                yield row_of(evaluation, index) | {"completions": texts, "verdicts": list(verdicts)}

        return _finish(settings, description, evaluation, baseline, rows(), _before(settings, {}, seconds, again))


# ---- The output ----


def _compute(
    settings: EvalSettings,
    description: Mapping[str, Any],
    stack: ExitStack,
    compute: Callable[[Log | None], list[Any]],
    restore: Callable[[Mapping[str, Any]], Any],
) -> tuple[list[Any], bool]:
    """What was computed, item by item, and whether it was there already."""
    if settings.output is None:
        return compute(None), False
    if begin(settings.output, dict(description), stack):
        return [restore(row) for row in read_output(settings.output.out)], True
    return compute(Log(settings.output.parts / "log.jsonl")), False


def _before(settings: EvalSettings, counts: Mapping[str, Any], seconds: float, again: bool) -> dict[str, Any]:
    """What the summary says of the computation: of the run that computed."""
    if settings.output is None or not again:
        return {**counts, "seconds": round(seconds, 3)}
    before = json.loads(settings.output.summary.read_text(encoding="utf-8"))
    return {name: before[name] for name in (*counts, "seconds")}


def _finish(
    settings: EvalSettings,
    description: Mapping[str, Any],
    evaluation: Evaluation,
    baseline: Evaluation | None,
    rows: Iterator[dict[str, Any]],
    counts: Mapping[str, Any],
) -> Outcome:
    comparison = None if baseline is None else evaluation.compare(baseline, level=settings.level)
    estimates = evaluation.estimates(level=settings.level)
    summary: dict[str, Any] = {
        "task": settings.task,
        "items": len(evaluation),
        **counts,
        "level": settings.level,
        "estimates": {subset: {k: x.to_dict() for k, x in part.items()} for subset, part in estimates.items()},
    }
    written: list[Path] = []
    calibrations: dict[Hashable, PreferenceEvaluation | ChoiceCalibration] = {}
    if isinstance(evaluation, MultipleChoiceEvaluation):
        calibrations = {name: evaluation.calibration(name, bins=settings.bins) for name in evaluation.scores}
        summary["ties"] = settings.ties
        summary["ece"] = {str(name): finite(float(x.ece)) for name, x in calibrations.items()}
    if isinstance(evaluation, HumanEvalEvaluation):
        kinds = [verdict.split(":")[0] for found in evaluation.verdicts for verdict in found]
        summary["verdicts"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    if comparison is not None:
        summary["baseline"] = str(settings.baseline)
        summary["not_compared"] = list(comparison.not_compared)
        summary["differences"] = {
            subset: {k: x.to_dict() for k, x in part.items()} for subset, part in comparison.differences.items()
        }
    if settings.output is not None:
        out = settings.output.out
        _write(out, rows)
        written.append(out)
        if settings.plots and calibrations:
            written.append(out.with_name(out.name + ".calibration.png"))
            plot_calibration(calibrations, written[-1])
        summary["job"] = dict(description)
        write_text(settings.output.summary, json.dumps(summary, indent=2) + "\n")
        written.append(settings.output.summary)
        shutil.rmtree(settings.output.parts, ignore_errors=True)
    return Outcome(evaluation, comparison, summary, written)


def _write(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    with atomic_file(out) as temporary:
        if out.suffix == ".parquet":
            arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
            parquet.write_table(arrow.Table.from_pylist(list(rows)), temporary)
            return
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _finite(values: Any) -> Any:
    """A tuple of ``values``, NaN for what isn't a finite number; None for None."""
    return None if values is None else tuple(x if x is not None and math.isfinite(x) else math.nan for x in values)
