"""Tiny random models and tokenizers, and scores by a plain loop over sequences in float64."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from pyalign.pair_scorer.tokens import ResponseSet  # noqa: E402

TURN = "\n\nAssistant:"
VOCABULARY = 270
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(*, bos: bool = False, merges: tuple[str, ...] = ()) -> Any:
    """Single bytes and the ``merges``; with ``bos`` every text begins with "<s>"."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet, *("".join(p) for p in pairs)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.post_processor = template
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
_BLOCKS = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2 = {**_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}  # beyond max_position_embeddings

# Family, configuration, whether its rows may be shared.
CAUSAL = {
    "llama": ("Llama", _BLOCKS, True),
    "gpt2": ("GPT2", _GPT2, True),
    "opt": ("OPT", {**_BLOCKS, "ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    "softcaps": ("Gemma2", {**_BLOCKS, "head_dim": 8, "sliding_window": 24, "final_logit_softcapping": 0.2}, True),
    "divided": ("Granite", {**_BLOCKS, "logits_scaling": 3.0}, True),
    "multiplied": ("Cohere", {**_BLOCKS, "logit_scale": 0.25}, True),
    "window": ("Mistral", {**_BLOCKS, "sliding_window": 24}, True),
    "dynamic": ("Llama", {**_BLOCKS, "rope_parameters": _DYNAMIC, "max_position_embeddings": 24}, True),
    "alibi": ("Bloom", {**_SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    "recurrent": ("Mamba", {**_SMALL, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, False),
}


def make_model(name: str, *, head: str = "ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """A random model of float32 whose layers matter: weights are as large as those of a trained one."""
    family, options, _ = CAUSAL[name]
    config = getattr(transformers, family + "Config")(**{**options, **changes})
    suffix = "LMHeadModel" if family == "GPT2" and head == "ForCausalLM" else head
    torch.manual_seed(seed)
    model = getattr(transformers, family + suffix)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def make_bert(labels: int = 1) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, num_labels=labels, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def make_items(n: int = 12, *, seed: int = 0, most: int = 3, longest: int = 30) -> list[ResponseSet]:
    """Prompts with one to ``most`` responses, of all lengths; some responses begin alike, some are equal."""
    r = random.Random(seed)

    def words(least: int, most: int) -> str:
        return "".join(r.choice("abcdef ") for _ in range(r.randint(least, most)))

    items: list[ResponseSet] = []
    for _ in range(n):
        responses = [" " + words(1, longest) for _ in range(r.randint(1, most))]
        if r.random() < 0.3:
            responses.append(responses[0] + words(0, 5))
        items.append(ResponseSet("Human: " + words(0, longest) + TURN, responses))
    return items


def token_logprobs(model: Any, ids: list[int], start: int) -> torch.Tensor:
    """log p of ids[start:], by the model's own logits of the one sequence, in float64."""
    with torch.no_grad():
        model(input_ids=torch.tensor([[0]]))  # dynamic positions stay those of a longer sequence before
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[start - 1 :, 0]


def flat(results: list[Any]) -> torch.Tensor:
    return torch.tensor([score for result in results for score in result.scores], dtype=torch.float64)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
