"""``pyalign score``: responses to prompts, scored by a local model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pyalign._optional import require
from pyalign.cli._session import Session, quiet_transformers, refusals
from pyalign.pair_scorer.job import ON_ERROR, Progress, ScoreSettings, read_source, report_malformed, score_files
from pyalign.pair_scorer.processes import Processes, joined
from pyalign.pair_scorer.records import FORMATS
from pyalign.pair_scorer.scorer import SCORES, PairScorer, resolve_score
from pyalign.pair_scorer.tokens import TOKENIZATIONS, TRUNCATIONS


def score(
    model: Annotated[Path, typer.Argument(help="Local Hugging Face model directory, or a GGUF file.")],
    data: Annotated[
        list[Path],
        typer.Argument(
            help=f"{FORMATS}. Rows hold prompt, chosen, rejected; or prompt, responses; each a text or a list of "
            "messages. Without a prompt, chosen and rejected are whole dialogues, and share it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The scores, *.jsonl or *.parquet, in the order of the data.")],
    score: Annotated[str, typer.Option(help=", ".join(SCORES) + ".")] = "auto",
    reference: Annotated[Path | None, typer.Option(help="Reference model of score dpo.")] = None,
    beta: Annotated[float | None, typer.Option(help="Of score dpo. Default: 0.1.")] = None,
    null_prompt: Annotated[
        str | None,
        typer.Option(help="Of score information: what P(a) is read after (\\n is a new line). Default: nothing."),
    ] = None,
    label: Annotated[int | None, typer.Option(help="Which output of a reward model with several.")] = None,
    tokenization: Annotated[
        str, typer.Option(help=f"Prompt and response as texts: {' or '.join(TOKENIZATIONS)}.")
    ] = "together",
    append_eos: Annotated[bool, typer.Option(help="End every response with the tokenizer's EOS.")] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and response at most. Default: what the model reads.")
    ] = None,
    truncation: Annotated[
        str,
        typer.Option(
            help=f"{' or '.join(TRUNCATIONS)}: what is too long loses the beginning of its prompt, or gets no score."
        ),
    ] = "prompt",
    share_prefix: Annotated[bool, typer.Option(help="Compute a prompt once for its responses.")] = True,
    token_budget: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 4096,
    window: Annotated[int, typer.Option(help="Rows that are batched together.")] = 256,
    category: Annotated[str | None, typer.Option(help="Field by which the summary is divided.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Field to copy to the output. Repeat for more.")] = None,
    turn: Annotated[
        str, typer.Option(help="Where there is no prompt, it ends with the last one of these that both sides share.")
    ] = "\\n\\nAssistant:",
    on_error: Annotated[str, typer.Option(help=f"Malformed rows: {' or '.join(ON_ERROR)}.")] = "stop",
    scale: Annotated[float, typer.Option(help="Makes log-odds of a difference of scores, for the calibration.")] = 1.0,
    bins: Annotated[int, typer.Option(help="Of the calibration.")] = 10,
    plots: Annotated[bool, typer.Option(help="Draw OUT.calibration.png and OUT.gaps.png.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Begin anew where --out is another job's.")] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where the hardware multiplies it.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: cuda where there is one.")] = "auto",
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in MODEL, where there are several.")] = None,
) -> None:
    """Score responses to prompts; a summary with accuracy, calibration and the length baseline.

    Killed at any moment, the same command goes on where it was. Under torchrun the work is divided; the output is the
    same. OUT.summary.json holds the summary.

    \b
    Scores:
      reward        a sequence-classification model's output at the last token
      mean_logprob  log P(a|q) / tokens of a
      sum_logprob   log P(a|q)
      information   log P(a|q) - log P(a)
      dpo           beta * (log P(a|q) - log P_reference(a|q))
      auto          reward, or mean_logprob for a language model

    \b
    Examples:
      pyalign score ./reward-model pairs.jsonl --out scores.jsonl
      pyalign score ./SmolLM2 hhh_alignment/*.json --out hhh.jsonl \\
        --score information
      pyalign score ./policy pairs.parquet --out dpo.parquet \\
        --score dpo --reference ./sft
      torchrun --nproc-per-node 2 -m pyalign.cli score ./reward-model \\
        pairs.jsonl --out scores.jsonl
    """
    renamed = {"share_prefix": "no_share_prefix"}
    with refusals("pyalign score", renamed, "--token-budget"), joined() as processes:
        settings = ScoreSettings(
            tuple(data),
            out,
            on_error=on_error,
            category=category,
            keep=tuple(keep or ()),
            turn=turn.replace("\\n", "\n"),
            scale=scale,
            bins=bins,
            plots=plots,
            overwrite=overwrite,
        )
        if plots:
            require("matplotlib")  # not missed only after the work
        session = Session(quiet=processes.rank > 0)
        source, scan = read_source(settings, score=resolve_score(score, model, gguf_file), append_eos=append_eos)
        if scan.malformed:
            session.console.print(report_malformed(scan), style="yellow", markup=False, highlight=False)
        quiet_transformers()
        with session.stage("load") as say:
            scorer = PairScorer(
                model,
                score=score,
                reference=reference,
                beta=beta,
                null_prompt=None if null_prompt is None else null_prompt.replace("\\n", "\n"),
                label=label,
                tokenization=tokenization,
                append_eos=append_eos,
                max_length=max_length,
                truncation=truncation,
                share_prefix=share_prefix,
                token_budget=token_budget,
                window=window,
                dtype=dtype,
                device=_own_device(device),
                gguf_file=gguf_file,
            )
            say(f"{model}: {scorer.score}, {scorer.dtype} on {scorer.device}, {processes.count} process(es)")
        for note in scorer.notes:
            session.console.print(f"note: {note}", style="yellow", markup=False)
        unit = "pairs" if scan.kind == "pair" else "prompts"
        with session.stage("score") as say, session.bar(unit) as (start, advance):
            progress = _progress(start, advance, unit, processes)
            summary = score_files(scorer, source, scan, settings, processes=processes, progress=progress)
        if summary is not None:
            _print_summary(session, summary, settings)


def _own_device(device: str) -> str:
    """Where one of several processes of a machine computes."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def _progress(start: Any, advance: Any, unit: str, processes: Processes) -> Progress:
    begin, done = time.perf_counter(), 0.0

    def more(records: float) -> None:
        nonlocal done
        done += records
        per_second = done / (time.perf_counter() - begin)
        of_all = f" on each of {processes.count} processes" if processes.count > 1 else ""
        advance(records, f"{per_second:.1f} {unit}/s{of_all}")

    return Progress(start, more)


# ---- The summary ----


def _print_summary(session: Session, summary: dict[str, Any], settings: ScoreSettings) -> None:
    say = session.result.print
    if "metrics" in summary:
        say(_table(summary))
    else:
        best, mean, longest = (summary[n] for n in ("mean_best_score", "mean_score", "longest_is_best"))
        if best is not None:
            say(f"mean score {mean:.4g}, of the best responses {best:.4g}; the longest is the best in {longest:.1%}")
    tokens, cut = summary["tokens"], summary["truncation"]
    say(
        f"{summary['rows']} rows, {summary['unscored']} of them without a score, {summary['malformed']} malformed left "
        f"out; {summary['per_second'] or 0:.2f} rows/s",
        highlight=False,
    )
    if tokens["computed"]:
        say(
            f"tokens: {tokens['whole']} read one by one, {tokens['computed']} computed (padding {tokens['padding']}), "
            f"{tokens['responses']} through the head",
            highlight=False,
        )
    if any(cut.values()):
        say(
            f"too long: {cut['prompts']} prompts lost {cut['prompt_tokens']} tokens, {cut['responses']} responses "
            f"{cut['response_tokens']}; {cut['dropped']} rows dropped",
            highlight=False,
        )
    say(f"{settings.out}, {settings.summary}", *summary["plots"], sep=", ", markup=False, highlight=False)


def _table(summary: dict[str, Any]) -> Any:
    table = require("rich.table").Table(title=f"{summary['score']}: chosen above rejected")
    for name in ("", "pairs", "accuracy", "the longer answer", "log-loss", "Brier", "ECE"):
        table.add_column(name, justify="left" if not name else "right")
    model, baseline = summary["metrics"], summary["length_baseline"]
    rows = [("all", model, baseline)]
    if len(model.get("slices", ())) > 1:
        rows += [(name, part, baseline["slices"][name]) for name, part in model["slices"].items()]
    for name, part, longer in rows:
        table.add_row(
            name,
            str(part["pairs"]),
            *(_percent(x["accuracy"], x["standard_error"]) for x in (part, longer)),
            *("-" if part[key] is None else f"{part[key]:.4f}" for key in ("log_loss", "brier", "ece")),
        )
    return table


def _percent(share: float | None, error: float | None) -> str:
    return "-" if share is None or error is None else f"{share:.1%} ± {error:.1%}"
