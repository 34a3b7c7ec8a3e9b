"""Files scored by one or several processes: every finished batch is kept, the output is whole or absent.

Beside the output OUT stands, while the job runs, the directory OUT.parts:

=====================  ===================================================================
``job.json``           everything that decides the scores; a job resumes where it is the same
``chunk-N.jsonl``      the finished rows of ``window`` records, after a line of counts
``chunk-N.log``        the scores of the finished batches of a chunk under way
=====================  ===================================================================

A chunk's batches depend on its records alone, so a job that was killed, or run by several processes, writes the bytes
of one that wasn't. Chunk N is computed by process N modulo their number.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyalign._files import atomic_file, write_text
from pyalign._log import Log
from pyalign._optional import require
from pyalign._options import OptionError, at_least, one_of, positive
from pyalign.pair_scorer.batches import BatchTensors
from pyalign.pair_scorer.output import Output, begin, read_output
from pyalign.pair_scorer.processes import Processes
from pyalign.pair_scorer.records import PAIR, Record, RecordOptions, Scan, Source
from pyalign.pair_scorer.scorer import Counts, PairScorer, ScoredResponses, Window
from pyalign.pair_scorer.summary import Figures, Tally
from pyalign.pair_scorer.tokens import Truncation

ON_ERROR = ("stop", "skip")
_SHOWN = 20  # malformed rows that are listed


@dataclass(frozen=True)
class ScoreSettings(Output):
    """What is scored, and where to.

    Raises:
        OptionError: a setting out of range.
    """

    data: tuple[Path, ...]
    out: Path
    on_error: str = "stop"
    category: str | None = None
    keep: tuple[str, ...] = ()
    turn: str = "\n\nAssistant:"
    scale: float = 1.0  # what makes log-odds of a difference of scores
    bins: int = 10
    plots: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        one_of("on_error", self.on_error, ON_ERROR)
        positive("scale", self.scale)
        at_least("bins", self.bins, 1)
        self.check_out()
        if not self.turn:
            raise OptionError("turn", "it is empty; wanted what stands before a response")
        clash = sorted(set(self.keep) & _OWN_FIELDS)
        if clash:
            raise OptionError("keep", f"got {clash[0]!r}, which the output has already; wanted other fields")


_PAIR_FIELDS = [f"{who}_{what}" for what in ("score", "tokens", "length") for who in ("chosen", "rejected")]
_SET_FIELDS = ["scores", "tokens", "lengths", "best"]
_OWN_FIELDS = {"index", "category", *_PAIR_FIELDS, *_SET_FIELDS}


@dataclass
class Progress:
    """Told what goes on; each method may be replaced."""

    start: Callable[[float, int], None] = lambda done, total: None  # records
    advance: Callable[[float], None] = lambda records: None


def read_source(settings: ScoreSettings, *, score: str, append_eos: bool) -> tuple[Source, Scan]:
    """Read and check all data.

    Raises:
        OptionError: a file can't be read; rows are malformed and ``on_error`` is "stop"; no row is well formed.
    """
    options = RecordOptions(
        settings.category, settings.keep, settings.turn, score != "reward" and not append_eos, score != "reward"
    )
    source = Source(settings.data, options)
    scan = source.scan()
    if scan.malformed and settings.on_error == "stop":
        raise OptionError("data", f"{report_malformed(scan)}\nNothing was scored; --on-error skip leaves them out")
    if len(scan.malformed) == scan.records:
        raise OptionError("data", report_malformed(scan))
    return source, scan


def report_malformed(scan: Scan) -> str:
    """Which rows are malformed, and why."""
    bad = list(scan.malformed.values())
    lines = [f"{len(bad)} of {scan.records} rows are malformed:", *(f"  {x}" for x in bad[:_SHOWN])]
    return "\n".join([*lines, f"  and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else lines)


def score_files(
    scorer: PairScorer,
    source: Source,
    scan: Scan,
    settings: ScoreSettings,
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Score all records into ``settings.out``, or go on with it; the summary, on the first process (None elsewhere).

    Raises:
        OptionError, JobError: the output is that of another job, or one is being written.
    """
    processes, progress = processes or Processes(), progress or Progress()
    description = _describe(scorer, scan, settings)
    with ExitStack() as stack:
        finished = processes.agree(lambda: begin(settings, description, stack), description)
        if finished:
            progress.start(scan.records, scan.records)
            shutil.rmtree(settings.parts, ignore_errors=True)  # it was killed between the summary and this
            return None if processes.rank else _summarise_again(settings, scan, description)
        chunks = math.ceil(scan.records / scorer.window)
        settings.parts.mkdir(parents=True, exist_ok=True)
        own = range(processes.rank, chunks, processes.count)
        _score_chunks(scorer, source, scan, settings, progress, own)
        processes.collect(settings.parts, [_chunk_name(c) for c in range(chunks)])
        summary = None if processes.rank else _merge(scorer, scan, settings, description, chunks, processes.count)
        processes.wait()
        shutil.rmtree(settings.parts, ignore_errors=True)  # which another process of this machine may do too
        return summary


def _describe(scorer: PairScorer, scan: Scan, settings: ScoreSettings) -> dict[str, Any]:
    """Everything that decides the output's bytes, on one kind of machine."""
    return {
        "data": scan.digest,
        "malformed": len(scan.malformed),
        "score": scorer.score,
        "beta": scorer.beta if scorer.score == "dpo" else None,
        **scorer.digests,
        **asdict(scorer.options),
        "label": scorer.label,
        "share_prefix": scorer.shares_prefix,
        "token_budget": scorer.token_budget,
        "window": scorer.window,
        "dtype": str(scorer.dtype).removeprefix("torch."),
        "device": scorer.device.type,
        "category": settings.category,
        "keep": list(settings.keep),
        "turn": settings.turn,
    }


# ---- Chunks ----


def _chunk_name(chunk: int) -> str:
    return f"chunk-{chunk:08}.jsonl"


@dataclass
class _Chunk:
    number: int
    records: list[Record]
    log: Log
    each: float  # records a sequence stands for


def _score_chunks(
    scorer: PairScorer,
    source: Source,
    scan: Scan,
    settings: ScoreSettings,
    progress: Progress,
    own: range,
) -> None:
    """Compute those of the ``own`` chunks that aren't there yet."""
    missing = [c for c in own if not (settings.parts / _chunk_name(c)).exists()]

    def size(chunks: Sequence[int]) -> int:
        return sum(min((c + 1) * scorer.window, scan.records) - c * scorer.window for c in chunks)

    progress.start(size(own) - size(missing), size(own))
    chunks: dict[int, _Chunk] = {}

    def work() -> Iterator[tuple[Window, int, BatchTensors | None]]:
        for number, records in source.chunks(scan, scorer.window, missing):
            window = scorer.prepare([record.texts for record in records])
            log = Log((settings.parts / _chunk_name(number)).with_suffix(".log"))
            total = sum(len(batch.sequences) for _, batch in window.batches)
            chunks[id(window)] = _Chunk(number, records, log, size([number]) / max(total, 1))
            for entry in log.entries:
                window.add(entry["batch"], entry["scores"])
            done = frozenset(entry["batch"] for entry in log.entries)
            yield from scorer.tensors(window, done)
            yield window, -1, None

    begin = time.perf_counter()
    for window, index, scores in scorer.run(work()):
        chunk = chunks[id(window)]
        if scores is not None:
            now = time.perf_counter()
            window.add(index, scores)
            chunk.log.add(batch=index, scores=scores, seconds=round(now - begin, 4))
            begin = now
            progress.advance(chunk.each * len(scores))
        else:
            path = settings.parts / _chunk_name(chunk.number)
            write_text(path, "".join(_chunk_lines(chunk, window)))
            path.with_suffix(".log").unlink()
            del chunks[id(window)]


def _chunk_lines(chunk: _Chunk, window: Window) -> Iterator[str]:
    counts = {
        "truncation": asdict(window.truncation),
        "tokens": window.counts._asdict(),
        "seconds": sum(entry["seconds"] for entry in chunk.log.entries),
    }
    yield json.dumps(counts) + "\n"
    for record, result in zip(chunk.records, window.results(), strict=True):
        yield json.dumps(_row(record, result), ensure_ascii=False) + "\n"


def _row(record: Record, result: ScoredResponses) -> dict[str, Any]:
    """A row of the output; a score that isn't a finite number is None."""
    scores = [score if math.isfinite(score) else None for score in result.scores]
    row: dict[str, Any] = {"index": record.index}
    if record.kind == PAIR:
        row |= zip(_PAIR_FIELDS, (*scores, *result.tokens, *record.lengths), strict=True)
    else:
        finite = [(score, -i) for i, score in enumerate(scores) if score is not None]
        best = -max(finite)[1] if finite else None
        row |= zip(_SET_FIELDS, (scores, list(result.tokens), record.lengths, best), strict=True)
    if record.category is not None:
        row["category"] = record.category
    return row | record.kept


# ---- The output ----


def _merge(
    scorer: PairScorer,
    scan: Scan,
    settings: ScoreSettings,
    description: dict[str, Any],
    chunks: int,
    processes: int,
) -> dict[str, Any]:
    """Write the output, the plots and the summary from the chunks."""
    tally, truncation, tokens, seconds = Tally(scan.kind), Truncation(), Counts(0, 0, 0, 0), [0.0] * processes

    def rows() -> Iterator[list[str]]:
        nonlocal tokens
        for chunk in range(chunks):
            with open(settings.parts / _chunk_name(chunk), encoding="utf-8") as file:
                counts = json.loads(next(file))
                lines = list(file)
            truncation.add(Truncation(**counts["truncation"]))
            tokens += Counts(**counts["tokens"])
            seconds[chunk % processes] += counts["seconds"]
            for line in lines:
                tally.add(json.loads(line))
            yield lines

    with atomic_file(settings.out) as temporary:
        if settings.out.suffix == ".parquet":
            _write_parquet(temporary, rows(), scan.kind, settings)
        else:
            with open(temporary, "w", encoding="utf-8") as file:
                for lines in rows():
                    file.writelines(lines)
    scored = tally.rows - tally.unscored
    counts = {
        "kind": scan.kind,
        "records": scan.records,
        "malformed": len(scan.malformed),
        "truncation": asdict(truncation),
        "tokens": tokens._asdict(),
        "shares_prefix": scorer.shares_prefix,
        "notes": scorer.notes,
        "seconds": round(max(seconds), 3),  # of the process that computed longest, all its runs together
        "per_second": round(scored / max(seconds), 3) if max(seconds) > 0 else None,
        "processes": processes,
    }
    return _write_summary(settings, tally.figures(scale=settings.scale, bins=settings.bins), counts, description)


def _write_summary(
    settings: ScoreSettings, figures: Figures, counts: Mapping[str, Any], description: Mapping[str, Any]
) -> dict[str, Any]:
    paths = figures.plot(settings.out, str(description["score"])) if settings.plots else []
    summary = {
        "out": str(settings.out),
        "score": description["score"],
        **counts,
        **figures.to_dict(),
        "scale": settings.scale,
        "plots": [str(path) for path in paths],
        "job": description,
    }
    write_text(settings.summary, json.dumps(summary, indent=2) + "\n")
    return summary


def _summarise_again(settings: ScoreSettings, scan: Scan, description: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished output, with the scale and bins asked for now."""
    before = json.loads(settings.summary.read_text(encoding="utf-8"))
    tally = Tally(scan.kind)
    for row in read_output(settings.out):
        tally.add(row)
    figures = tally.figures(scale=settings.scale, bins=settings.bins)
    names = (
        "kind", "records", "malformed", "truncation", "tokens", "shares_prefix", "notes", "seconds", "per_second",
        "processes",
    )  # fmt: skip
    return _write_summary(settings, figures, {name: before[name] for name in names}, description)


def _write_parquet(path: Path, parts: Iterator[list[str]], kind: str, settings: ScoreSettings) -> None:
    """Fields that were kept are text in Parquet: what isn't text stands there as JSON."""
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    numbers = {"score": arrow.float64(), "tokens": arrow.int64(), "length": arrow.int64()}
    if kind == PAIR:
        fields = [(name, numbers[name.rpartition("_")[2]]) for name in _PAIR_FIELDS]
    else:
        types = (arrow.list_(arrow.float64()), arrow.list_(arrow.int64()), arrow.list_(arrow.int64()), arrow.int64())
        fields = list(zip(_SET_FIELDS, types, strict=True))
    text = [(name, arrow.string()) for name in ("category", *settings.keep)]
    schema = arrow.schema([("index", arrow.int64()), *fields, *text])
    with parquet.ParquetWriter(path, schema) as writer:
        for lines in parts:
            rows = [json.loads(line) for line in lines]
            for row in rows:
                for name in settings.keep:
                    value = row[name]
                    row[name] = value if value is None or isinstance(value, str) else json.dumps(value)
            writer.write_table(arrow.Table.from_pylist(rows, schema))
