"""``pyalign eval``: a local language model on questions with choices, pairs, last words or programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pyalign._optional import require
from pyalign._options import OptionError, at_least, one_of, read_text
from pyalign.cli._session import Session, quiet_transformers, refusals
from pyalign.evaluation.completion import Writer
from pyalign.evaluation.estimates import Estimate
from pyalign.evaluation.human_eval import check_allowed, problems_digest, read_completions, read_problems
from pyalign.evaluation.job import (
    TASKS,
    EvalSettings,
    ItemsFile,
    Outcome,
    Progress,
    evaluate_items,
    evaluate_programs,
    load_baseline,
)
from pyalign.evaluation.likelihood import Reader
from pyalign.evaluation.multiple_choice import BASELINES, SCORINGS
from pyalign.evaluation.records import read_last_words, read_multiple_choice, read_pairs
from pyalign.evaluation.results import OVERALL, Evaluation
from pyalign.pair_scorer.records import FORMATS, files_digest

_CHOICES, _READ, _PROGRAMS = ("multiple-choice", "pairs"), ("multiple-choice", "pairs", "last-word"), ("human-eval",)
_WRITING = ("samples", "temperature", "top_p", "max_new_tokens", "batch_size", "seed")
# Which tasks an option is of, where it isn't of all.
_TASKS_OF = {
    **dict.fromkeys(
        ("scoring", "null_context", "question_format", "choice_format", "subset", "ties", "bins"), _CHOICES
    ),
    "turn": ("pairs",),
    **dict.fromkeys(("separator", "min_context_words", "max_context_words"), ("last-word",)),
    **dict.fromkeys(("max_length", "token_budget", "window", "share_prefix"), _READ),
    **dict.fromkeys((*_WRITING, "k", "timeout", "memory", "workers"), _PROGRAMS),
}


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Local Hugging Face model directory, or a GGUF file. For human-eval also *.jsonl with completions."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help=f"{FORMATS} with context, choices, label, or of pairs prompt, chosen, rejected; plain text of "
            "last-word; HumanEval.jsonl.gz of human-eval (default: that of the installed package human-eval)."
        ),
    ] = None,
    task: Annotated[str, typer.Option(help=", ".join(TASKS) + ".")] = "multiple-choice",
    out: Annotated[Path | None, typer.Option(help="Write every item to this file, *.jsonl or *.parquet.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="The --out of another run over the same data: show what is better or worse here."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text in front of every context.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file holding the prompt, taken as it is.")] = None,
    scoring: Annotated[
        list[str] | None, typer.Option(help=", ".join(SCORINGS) + ". Repeat for more. Default: all.")
    ] = None,
    null_context: Annotated[
        str | None, typer.Option(help="Of information: what P(a) is read behind (\\n is a new line). Default: nothing.")
    ] = None,
    question_format: Annotated[
        str | None,
        typer.Option(help="Text with {question} in it (\\n is a new line). Default: as it is in the file."),
    ] = None,
    choice_format: Annotated[
        str | None, typer.Option(help="Text with {choice} in it. Default: the choice behind a space, if none is there.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Field by which figures are divided.")] = None,
    turn: Annotated[
        str | None,
        typer.Option(help="Of pairs without a prompt: it ends with the last one of these both share: \\n\\nAssistant:"),
    ] = None,
    ties: Annotated[
        str | None, typer.Option(help="split (default): equal scores share the credit; first: the first is taken.")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Of last-word: cut texts at this (\\n is a new line). Default: whole files or rows."),
    ] = None,
    min_context_words: Annotated[
        int | None, typer.Option(help="Of last-word: words in front of the last one at least. Default: 10.")
    ] = None,
    max_context_words: Annotated[int | None, typer.Option(help="Of last-word: the last ones. Default: all.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items at most, the first ones.")] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Of human-eval: completions are programs and are run here, in processes with limits but no sandbox.",
        ),
    ] = False,
    k: Annotated[list[int] | None, typer.Option(help="Of pass@k. Repeat for more. Default: 1, 10, 100.")] = None,
    samples: Annotated[int | None, typer.Option(help="Completions of a problem. Default: 1.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the completions. Default: 0, the most probable token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the completions. Default: 1.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of a completion. Default: 384.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Completions written at a time. Default: 8.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the completions. Default: 0.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a completion may run. Default: 3.")] = None,
    memory: Annotated[int | None, typer.Option(help="MiB that a completion may use. Default: 1024.")] = None,
    workers: Annotated[int | None, typer.Option(help="Completions run at a time. Default: one a core.")] = None,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    bins: Annotated[int | None, typer.Option(help="Of the calibration. Default: 10.")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw OUT.calibration.png, of choices.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Begin anew where --out is another job's.")] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of context and choice at most. Default: what the model reads.")
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(help="Tokens of a batch, padding included. Default: 4096.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Items that are batched together. Default: 256.")] = None,
    share_prefix: Annotated[
        bool | None, typer.Option(help="Compute a context once for its choices. Default: yes.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (default), bfloat16, or auto: bfloat16 where the hardware multiplies it."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ..., or auto (default): cuda where there is one.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in MODEL, where there are several.")] = None,
) -> None:
    """Evaluate a language model: accuracy with intervals, calibration, the length baselines; what a prompt or a
    distilled model costs.

    Killed at any moment, the same command with --out goes on where it was. OUT.summary.json holds all figures.

    \b
    Scorings of a choice a behind q:
      sum_logprob    log P(a|q)
      mean_logprob   log P(a|q) / tokens of a
      per_character  log P(a|q) / characters of a
      per_byte       log P(a|q) / bytes of a
      information    log P(a|q) - log P(a)

    \b
    Examples (plain, prompted, and what the prompt costs):
      pyalign eval ./SmolLM2 hhh_alignment/*.json --out plain.jsonl
      pyalign eval ./SmolLM2 hhh_alignment/*.json --out prompted.jsonl \\
        --prompt-file hhh.txt --compare plain.jsonl
      pyalign eval ./SmolLM2 book.txt --task last-word --separator "\\n\\n"
      pyalign eval samples.jsonl HumanEval.jsonl.gz --task human-eval \\
        --allow-code-execution
    """
    options = dict(locals())
    renamed = {"memory_mib": "memory", "scorings": "scoring", "share_prefix": "no_share_prefix", "prefix": "prompt"}
    with refusals("pyalign eval", renamed, "--token-budget (human-eval: --batch-size)"):
        one_of("task", task, TASKS)
        for name, tasks in _TASKS_OF.items():
            if options[name] is not None and task not in tasks:
                wanted = f"none with --task {task}, it is of {' and '.join(tasks)}"
                raise OptionError(name, f"got {options[name]!r}; wanted {wanted}")
        if plots and task not in _CHOICES:
            raise OptionError("plots", f"it draws the calibration of choices; wanted none with --task {task}")
        if allow_code_execution and task not in _PROGRAMS:
            raise OptionError("allow_code_execution", f"nothing is executed; wanted none with --task {task}")
        if limit is not None:
            at_least("limit", limit, 1)
        scorings = tuple(dict.fromkeys(scoring or SCORINGS))
        if null_context is not None and "information" not in scorings:
            raise OptionError("null_context", f"got {null_context!r}; wanted none without the scoring information")
        settings = EvalSettings(
            task, None if out is None else ItemsFile(out, overwrite), scorings, ties or "split", level,
            10 if bins is None else bins, plots, compare,
        )  # fmt: skip
        if overwrite and out is None:
            raise OptionError("overwrite", "got no --out; wanted one")
        if plots:
            require("matplotlib")  # not missed only after the work
        for name in ("null_context", "question_format", "choice_format", "turn", "separator"):
            options[name] = _lines(options[name])
        options["prompt"] = _prompt(prompt, prompt_file)
        session = Session()
        run = _programs if task in _PROGRAMS else _texts
        _show(session, run(session, settings, options), settings)


def _texts(session: Session, settings: EvalSettings, options: dict[str, Any]) -> Outcome:
    """Read the items and evaluate them."""
    files: list[Path] = list(options["data"] or ())
    if not files:
        raise OptionError("data", "got no file; wanted one or more")
    items: Sequence[Any]
    if settings.task == "last-word":
        names = ("separator", "min_context_words", "max_context_words", "limit")
        reading: dict[str, Any] = {"min_context_words": 10, **_given(options, *names)}
        items = read_last_words(files, **reading)
    else:
        reading = _given(options, "question_format", "choice_format", "subset", "turn")
        items = (read_pairs if settings.task == "pairs" else read_multiple_choice)(files, **reading)[: options["limit"]]
    data = {"data": files_digest(files), "limit": options["limit"], "reading": reading}
    load_baseline(settings, [item.identity for item in items])  # refused before a model is loaded
    quiet_transformers()
    with session.stage("load") as say:
        null = None
        if settings.task in _CHOICES and "information" in settings.scorings:
            null = options["null_context"] or ""
        own = ("max_length", "token_budget", "window", "share_prefix", "dtype", "device", "gguf_file")
        reader = Reader(options["model"], prompt=options["prompt"], null_context=null, **_given(options, *own))
        say(f"{options['model']}: {reader.scorer.dtype} on {reader.scorer.device}")
    for note in reader.scorer.notes:
        session.console.print(f"note: {note}", style="yellow", markup=False)
    with session.stage("evaluate"), session.bar("items") as (start, advance):
        return evaluate_items(reader, items, settings, data=data, progress=Progress(start, advance))


def _programs(session: Session, settings: EvalSettings, options: dict[str, Any]) -> Outcome:
    """Read or write completions and run them."""
    files: list[Path] = list(options["data"] or ())
    if len(files) > 1:
        raise OptionError("data", f"got {len(files)} files; wanted one, or none for the package human-eval")
    problems = read_problems(files[0] if files else None)[: options["limit"]]
    check_allowed(options["allow_code_execution"])
    data: dict[str, Any] = {"problems": problems_digest(problems)}
    model: Path = options["model"]
    source: Any
    if model.name.removesuffix(".gz").endswith(".jsonl"):
        own = (*_WRITING, "dtype", "device", "gguf_file")
        for name, value in {**_given(options, *own), "prompt": options["prompt"] or None}.items():
            if value is not None:
                raise OptionError(name, f"got {value!r}; wanted none with {model}, which holds completions already")
        source = read_completions(model)
        data["completions"] = files_digest([model])
        if options["limit"] is not None:
            ids = {problem.task_id for problem in problems}
            source = [completion for completion in source if completion.task_id in ids]
    else:
        quiet_transformers()
        with session.stage("load") as say:
            source = Writer(
                model, prompt=options["prompt"], **_given(options, *_WRITING, "dtype", "device", "gguf_file")
            )
            say(f"{model}: {source.model.dtype} on {source.model.device}")
    limits = _given({"timeout": options["timeout"], "memory_mib": options["memory"], "workers": options["workers"]})
    with session.stage("evaluate"), session.bar("completions") as (start, advance):
        return evaluate_programs(
            source, problems, settings, data=data, k=options["k"] or (1, 10, 100), progress=Progress(start, advance),
            allow_code_execution=True, **limits,
        )  # fmt: skip


def _given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of ``names`` (or all) that have a value: the others keep the library's defaults."""
    return {name: options[name] for name in names or options if options[name] is not None}


def _lines(text: str | None) -> str | None:
    return None if text is None else text.replace("\\n", "\n")


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise OptionError("prompt", "got --prompt-file too; wanted one of them")
    return read_text("prompt_file", file) if file is not None else prompt or ""


# ---- Tables ----


def _show(session: Session, outcome: Outcome, settings: EvalSettings) -> None:
    say, evaluation = session.result.print, outcome.evaluation
    if settings.task in _CHOICES:
        say(_choices_table(outcome, settings))
    else:
        say(_plain_table(evaluation, settings))
    if len(evaluation.groups()) > 2:  # a single subset is all there is
        say(_subsets_table(evaluation, settings))
    if outcome.comparison is not None:
        say(_differences_table(outcome, settings))
        if outcome.comparison.not_compared:
            say(f"in one of the runs alone: {', '.join(outcome.comparison.not_compared)}", highlight=False)
    cut = outcome.summary.get("truncation", {})
    if any(cut.values()):
        say(
            f"too long: {cut['prompts']} contexts lost {cut['prompt_tokens']} tokens, {cut['responses']} choices "
            f"{cut['response_tokens']}; {cut['dropped']} items dropped",
            highlight=False,
        )
    if outcome.summary.get("unscored"):
        say(f"{outcome.summary['unscored']} items have no score, and are left out", highlight=False)
    if "verdicts" in outcome.summary:
        say(", ".join(f"{n} {kind}" for kind, n in outcome.summary["verdicts"].items()), highlight=False)
    if outcome.written:
        say(*outcome.written, sep=", ", markup=False, highlight=False)


def _new_table(title: str, *columns: str) -> Any:
    table = require("rich.table").Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _choices_table(outcome: Outcome, settings: EvalSettings) -> Any:
    evaluation, ece = outcome.evaluation, outcome.summary["ece"]
    table = _new_table(
        f"{settings.task}: {len(evaluation)} questions",
        "scoring", "accuracy", f"{settings.level:.0%} interval", "P(right)", "log-loss", "Brier", "ECE",
    )  # fmt: skip
    for name in (*settings.scorings, *BASELINES):
        accuracy = evaluation.estimate(f"{name}/accuracy", level=settings.level)
        others = [
            _number(evaluation.estimate(f"{name}/{metric}").value) if f"{name}/{metric}" in evaluation.values else ""
            for metric in ("probability", "log_loss", "brier")
        ]
        shown = f"{name} choice" if name in BASELINES else name
        table.add_row(
            shown, _percent(accuracy), _interval(accuracy), *others, _number(ece[name]) if name in ece else ""
        )
    return table


def _plain_table(evaluation: Evaluation, settings: EvalSettings) -> Any:
    table = _new_table(
        f"{settings.task}: {len(evaluation)} items", "metric", "mean", f"{settings.level:.0%} interval", "n"
    )
    for name in evaluation.values:
        found = evaluation.estimate(name, level=settings.level)
        table.add_row(name, _number(found.value), f"{_number(found.lower)} to {_number(found.upper)}", str(found.n))
    return table


def _subsets_table(evaluation: Evaluation, settings: EvalSettings) -> Any:
    names = [name for name in evaluation.values if name.rpartition("/")[2] == "accuracy"]
    table = _new_table("accuracy", "", "n", *(name.rpartition("/")[0] or name for name in names))
    for subset, inside in evaluation.groups().items():
        found = [evaluation.estimate(name, subset=subset) for name in names]
        table.add_row(
            subset, str(int(inside.sum())), *(f"{_percent(x)} ± {_number(x.standard_error, 100)}" for x in found)
        )
    return table


def _differences_table(outcome: Outcome, settings: EvalSettings) -> Any:
    assert outcome.comparison is not None
    table = _new_table(
        f"minus {settings.baseline}, on the same items",
        "", "metric", "here", "there", "difference", f"{settings.level:.0%} interval", "above", "below", "p",
    )  # fmt: skip
    differences = outcome.comparison.differences
    for subset, part in differences.items():
        if subset != OVERALL and len(differences) == 2:
            continue
        for name, x in part.items():
            scoring, _, metric = name.rpartition("/")
            if scoring not in BASELINES and (not scoring or metric == "accuracy"):
                interval = f"{x.lower:+.4f} to {x.upper:+.4f}"
                means = (_number(x.mean), _number(x.baseline), f"{x.value:+.4f}")
                table.add_row(subset, name, *means, interval, str(x.above), str(x.below), f"{x.p_value:.3g}")
    return table


def _percent(x: Estimate) -> str:
    return "-" if x.n == 0 else f"{x.value:.1%}"


def _interval(x: Estimate) -> str:
    return "-" if x.n == 0 else f"{x.lower:.1%} to {x.upper:.1%}"


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None or value != value:
        return "-"
    return f"{scale * value:.1f}" if scale != 1.0 else f"{value:.4f}"
