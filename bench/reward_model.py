"""The README's reward model on pairs of yours, a fifth of them held out.

`python bench/reward_model.py PAIRS`, a JSONL file with `chosen` and `rejected` in every line, gzipped or not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def accuracy(readme: dict[str, Any], pairs: list[dict[str, str]]) -> float:
    model, encode, right = readme["model"].eval(), readme["encode"], 0.0
    for pair in pairs:
        with torch.no_grad():
            chosen, rejected = model(torch.tensor([encode(pair["chosen"]), encode(pair["rejected"])])).tolist()
        right += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
    return right / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    path: Path = arguments.pairs
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        pairs = [json.loads(line) for line in file]
    random.seed(0)
    torch.manual_seed(0)
    random.shuffle(pairs)
    held_out, train = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]
    code = README.read_text().partition("## Train a reward model")[2].partition("```python\n")[2].partition("```")[0]
    code = code.replace("range(50)", f"range({arguments.steps})")
    readme: dict[str, Any] = {"__name__": "readme"}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in train))
        exec(compile(code, "README.md", "exec"), readme)
        os.chdir("/")
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in held_out) / len(held_out)
    share = accuracy(readme, held_out)
    error = (share * (1 - share) / len(held_out)) ** 0.5
    print(f"training pairs right {accuracy(readme, train[: len(held_out)]):.1%}")
    print(f"held-out pairs right {share:.1%} +- {error:.1%} of {len(held_out)}; the longer answer {longer:.1%}")


if __name__ == "__main__":
    main()
