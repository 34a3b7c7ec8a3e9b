"""Scoring preference pairs: PairScorer beside a loop over padded batches, as the README states it.

`python bench/pair_scorer.py MODEL PAIRS`: a model directory or GGUF file, and a JSONL file with whole dialogues
`chosen` and `rejected` in every line, gzipped or not. The loops take 16 sequences at a time through transformers' model
and torch's log_softmax, in the order of the file and sorted by length; all three take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyalign import PairScorer
from pyalign.pair_scorer.records import RecordOptions, Source
from pyalign.pair_scorer.tokens import ResponseSet, TokenGroup

BATCH = 16


@torch.inference_mode()
def padded_loop(model: Any, groups: list[TokenGroup], *, by_length: bool) -> list[float]:
    """Mean log-probs of the responses, chosen and rejected in turn."""
    sequences = [(ids, start) for g in groups for ids, start in zip(g.sequences, g.starts, strict=True)]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0])) if by_length else range(len(sequences))
    scores = [0.0] * len(sequences)
    for first in range(0, len(sequences), BATCH):
        batch = list(order[first : first + BATCH])
        longest = max(len(sequences[i][0]) for i in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            ids, _ = sequences[i]
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        for row, i in enumerate(batch):
            ids, start = sequences[i]
            scores[i] = float(logprobs[row, start - 1 : len(ids) - 1].mean())
    return scores


def padded_tokens(lengths: list[int]) -> int:
    batches = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--count", type=int, default=64, help="pairs, at even distances in the file")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    source = Source([arguments.pairs], RecordOptions())
    scan = source.scan()
    every = max(1, (scan.records - len(scan.malformed)) // arguments.count)
    items: list[ResponseSet] = [
        record.texts for _, records in source.chunks(scan, scan.records, [0]) for record in records[::every]
    ][: arguments.count]
    scorer = PairScorer(arguments.model)
    window = scorer.prepare(items)
    model = scorer._models[0].model

    lengths = [len(s) for group in window.groups for s in group.sequences]
    file_order, by_length = padded_tokens(lengths), padded_tokens(sorted(lengths))
    counts = window.counts
    print(f"{len(items)} pairs, {torch.get_num_threads()} threads, {scorer.dtype}")
    print(f"tokens: {sum(lengths)}; padded in file order {file_order}, by length {by_length}; PairScorer computes")
    print(f"{counts.computed} (padding {counts.padding}), {counts.responses} through the head")
    head_size = model.get_output_embeddings().weight.numel()
    head = head_size / (head_size + sum(p.numel() for m in model.base_model.layers for p in m.parameters()))
    ours = counts.computed * (1 - head) + counts.responses * head
    print(f"predicted from the products alone: {file_order / ours:.2f} x and {by_length / ours:.2f} x")

    cases: dict[str, Callable[[], list[float]]] = {
        "PairScorer": lambda: [score for result in scorer.stream(items) for score in result.scores],
        "padded, by length": lambda: padded_loop(model, window.groups, by_length=True),
        "padded, file order": lambda: padded_loop(model, window.groups, by_length=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    processor: dict[str, list[float]] = {name: [] for name in cases}  # of all threads: what others do counts less
    scores: dict[str, torch.Tensor] = {}
    longest = window.batches[0][1].rows[0].group
    list(scorer.stream([items[longest]]))  # a row longer than all before is tried out, which takes its time once
    for _ in range(arguments.rounds):
        for name, run in cases.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            scores[name] = torch.tensor(run(), dtype=torch.float64)
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - begin_processor)
            print(f"  {name}: {seconds[name][-1]:.1f} s, {processor[name][-1]:.1f} s of processors", flush=True)

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(b / a for a, b in zip(times["PairScorer"], times[name], strict=True))

    for name, times in seconds.items():
        error = float(((scores[name] - scores["PairScorer"]) / scores["PairScorer"]).abs().max())
        rate = len(items) / statistics.median(times)
        print(
            f"{name:20} {rate:6.2f} pairs/s, takes {ratio(seconds, name):.2f} x the time "
            f"({ratio(processor, name):.2f} x that of the processors); scores differ by {error:.1e} at most"
        )


if __name__ == "__main__":
    main()
