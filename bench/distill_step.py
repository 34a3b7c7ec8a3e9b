"""One training step of `pyalign distill`, straight from hidden states and through logits: seconds, peak memory.

`python bench/distill_step.py DTYPE [MODEL]`: float32 or bfloat16, and a model directory or, without one, the demo's
SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from pyalign import topk_distillation_loss, topk_logprobs
from pyalign.benchmark import interleaved, peak_extra_memory
from pyalign.context_distillation import language

CPU = torch.device("cpu")
SEQUENCES, LENGTH, LAYERS = 8, 96, 10


def measure(path: str, dtype: str) -> None:
    lm = language.load(path, dtype=dtype)
    lm.model.train().requires_grad_(False)
    for layer in lm.layers()[-LAYERS:]:
        layer.requires_grad_(True)
    torch.manual_seed(0)
    ids, rows = torch.randint(0, lm.vocab_size, (SEQUENCES, LENGTH)), torch.arange(SEQUENCES * LENGTH)
    with torch.no_grad():
        logits = lm.head(lm.rows(ids, rows)).float()
        stored = topk_logprobs(logits + 0.3 * torch.randn_like(logits), 50)
    del logits

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            lm.model.zero_grad()
            loss(lm.rows(ids, rows)).backward()

        return run

    functions = {
        "hidden states": step(lambda x: lm.topk_loss(x, stored)),
        "logits": step(lambda x: topk_distillation_loss(lm.head(x), stored)),
    }
    times = interleaved(functions, CPU, rounds=7)
    for name, run in functions.items():
        extra = peak_extra_memory(run, CPU) / 2**20
        print(f"{dtype}, from {name}: {times[name]:.2f} s, {extra:.0f} MiB beyond the model", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dtype", choices=list(language.DTYPES))
    parser.add_argument("model", nargs="?")
    arguments = parser.parse_args()
    path = arguments.model
    if path is None:
        from demo import find_model  # beside this script; pytest imports the script from elsewhere

        path = find_model()
    measure(str(path), arguments.dtype)


if __name__ == "__main__":
    main()
