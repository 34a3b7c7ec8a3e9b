"""A tokenizer of bytes, small random models and a few questions: what the examples beside it need to run anywhere.

Take a model, its tokenizer and a dataset of your own instead.
"""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

QUESTIONS = [f"What is {i} plus {i}? " for i in range(32)]
ANSWERS = [f"It is {2 * i}." for i in range(32)]
OTHERS = ["No idea" + "!" * (i % 5) for i in range(32)]
SETTINGS: dict[str, Any] = {
    "output_dir": "runs",
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "dataloader_pin_memory": False,
}


def tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)
    found.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    return found


def config(vocab_size: int = 259, hidden_size: int = 64) -> Any:
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )


def language_model(seed: int = 0, **sizes: int) -> Any:
    transformers.set_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config(**sizes))


def reward_model(seed: int = 0, **sizes: int) -> Any:
    transformers.set_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_config(config(**sizes))


def report(trainer: Any) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{type(trainer).__name__}: loss {losses[0]:.4g} -> {losses[-1]:.4g}")
