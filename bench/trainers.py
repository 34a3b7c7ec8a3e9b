"""Trainers with and without pyalign: `pytest bench/trainers.py`, or `python bench/trainers.py` for a table.

A step is a trainer's loss and its gradients for one batch, without the optimizer and without generation. The model is
small (two layers) and its vocabulary isn't (32,768): logits are most of the memory, as in a large model, but the head's
products are a larger share of the time than there. Half of each row is prompt, whose labels are -100: on a CPU, TRL's
DPO projects it all the same; on a GPU it doesn't, and pyalign's doesn't on either. Peak memory is what a step holds
beyond the models, gradients included, in a process of its own for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyalign.benchmark import peak_extra_memory, seconds

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, WIDTH, ROWS, LENGTH = 32768, 256, 8, 128
WAYS = {
    "causal_lm": ("transformers", "pyalign", "pyalign from hidden states"),
    "reward": ("TRL", "pyalign"),
    "dpo": ("TRL", "pyalign"),
    "gkd": ("TRL", "pyalign"),
    "distillation": ("TRL", "pyalign"),
}


class Case:
    """A trainer, and a step of it."""

    def __init__(self, kind: str, way: str, small: bool):
        sys.path.insert(0, str(Path(__file__).parent / "examples"))
        import tiny

        sys.path.pop(0)
        self.kind, self.way = kind, way
        vocab, width, rows, length = (300, 32, 4, 16) if small else (VOCAB, WIDTH, ROWS, LENGTH)
        sizes = {"vocab_size": vocab, "hidden_size": width}
        settings = {**tiny.SETTINGS, "output_dir": tempfile.mkdtemp(), "disable_tqdm": True}
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, vocab, (rows, length), generator=generator)
        # The first half of each row is the prompt.
        answer = (torch.arange(length) >= length // 2).long().expand(rows, -1).contiguous()
        labels = ids.masked_fill(answer == 0, -100)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        common = {"processing_class": tiny.tokenizer()}
        if kind == "causal_lm":
            from transformers import Trainer, TrainingArguments

            from pyalign.integrations.transformers import LinearCrossEntropyMixin, causal_lm_loss_func

            class LinearTrainer(LinearCrossEntropyMixin, Trainer): ...

            make = LinearTrainer if "hidden" in way else Trainer
            options = {"compute_loss_func": causal_lm_loss_func} if way == "pyalign" else {}
            self.trainer = make(tiny.language_model(**sizes), TrainingArguments(**settings), **options)
            batch["labels"] = labels
        else:
            self.trainer = self._of_trl(kind, tiny, sizes, settings, common)
            if kind == "dpo":
                batch["completion_mask"] = answer
            elif kind == "gkd":
                batch["labels"] = labels
            elif kind == "distillation":
                half = length // 2
                batch = {
                    "prompt_ids": ids[:, :half],
                    "prompt_mask": torch.ones_like(ids[:, :half]),
                    "completion_ids": ids[:, half:],
                    "completion_mask": torch.ones_like(ids[:, half:]),
                }
        self.batch = {name: x.to(self.trainer.args.device) for name, x in batch.items()}
        self.model = self.trainer.model.train()

    @staticmethod
    def _of_trl(kind: str, tiny: Any, sizes: Any, settings: Any, common: Any) -> Any:
        import trl
        from datasets import Dataset

        pairs = {"prompt": tiny.QUESTIONS, "chosen": tiny.ANSWERS, "rejected": tiny.OTHERS}
        if kind == "reward":
            data = Dataset.from_dict({name: pairs[name] for name in ("chosen", "rejected")})
            model = tiny.reward_model(**sizes)
            return trl.RewardTrainer(model=model, args=trl.RewardConfig(**settings), train_dataset=data, **common)
        model, other = tiny.language_model(**sizes), tiny.language_model(seed=1, **sizes)
        if kind == "dpo":
            args, data = trl.DPOConfig(**settings), Dataset.from_dict(pairs)
            return trl.DPOTrainer(model=model, ref_model=other, args=args, train_dataset=data, **common)
        data = Dataset.from_dict({"prompt": tiny.QUESTIONS})
        if kind == "distillation":
            args = trl.DistillationConfig(beta=0.5, **settings)
            return trl.DistillationTrainer(model=model, teacher_model=other, args=args, train_dataset=data, **common)
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        args = GKDConfig(beta=0.5, **settings)
        return GKDTrainer(model=model, teacher_model=other, args=args, train_dataset=data, **common)

    def applied(self) -> contextlib.AbstractContextManager[Any]:
        if self.kind == "causal_lm" or self.way == "TRL":
            return contextlib.nullcontext()
        from pyalign.integrations.trl import apply_pyalign_to_trl

        return apply_pyalign_to_trl([self.kind])

    def step(self) -> None:
        self.model.zero_grad()
        self.trainer.compute_loss(self.model, dict(self.batch), num_items_in_batch=None).backward()


def peak_memory(kind: str, way: str) -> float:
    """MiB, from a process of its own."""
    command = [sys.executable, __file__, "--case", kind, "--way", way]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.splitlines()[-1])


def measure(kind: str, rounds: int = 5) -> dict[str, dict[str, float]]:
    """By way, milliseconds (in turns) and MiB."""
    found: dict[str, dict[str, float]] = {way: {"MiB": peak_memory(kind, way)} for way in WAYS[kind]}
    cases = {way: Case(kind, way, small=False) for way in WAYS[kind]}
    times: dict[str, list[float]] = {way: [] for way in cases}
    for round_ in range(rounds + 1):
        for way, case in cases.items():
            with case.applied():
                time = seconds(case.step, DEVICE)
            if round_ > 0:
                times[way].append(time)
    for way, values in times.items():
        found[way]["ms"] = statistics.median(values) * 1e3
    return found


@pytest.mark.parametrize("kind", list(WAYS))
def test_trainer(benchmark: Any, kind: str) -> None:
    pytest.importorskip("transformers" if kind == "causal_lm" else "trl")
    cases = [Case(kind, way, small=True) for way in WAYS[kind]]
    for case in cases:
        with case.applied():
            case.step()
    if not benchmark.disabled:
        for way, figures in measure(kind).items():
            benchmark.extra_info |= {f"{way} {unit}": value for unit, value in figures.items()}
        cases = [Case(kind, WAYS[kind][-1], small=False)]
    with cases[-1].applied():
        benchmark.pedantic(cases[-1].step, rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(WAYS))
    parser.add_argument("--way")
    arguments = parser.parse_args()
    if arguments.way is None:
        for kind in WAYS if arguments.case is None else [arguments.case]:
            for way, figures in measure(kind).items():
                print(f"{kind:13} {way:28} {figures['ms']:7.0f} ms {figures['MiB']:7.0f} MiB", flush=True)
        return
    for small in (True, False):  # the first loads code, starts threads
        case = Case(arguments.case, arguments.way, small)
        with case.applied():
            step: Callable[[], None] = case.step
            peak = peak_extra_memory(step, DEVICE)
    print(peak / 2**20)


if __name__ == "__main__":
    main()
