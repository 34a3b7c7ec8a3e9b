"""A causal language model from a local directory, with its tokenizer, its identity and its head apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyalign._models import is_plain_linear, leading_bos, load_pretrained, tokenizer_digest
from pyalign._options import JobError
from pyalign.distill import TopKLogprobs, linear_topk_distillation_loss, topk_distillation_loss
from pyalign.teacher_store import Identity

CHUNK = 1024  # rows whose logits exist at a time


@dataclass
class CausalLM:
    """A language model taken apart at its last hidden states: only the rows that count meet the head.

    ``head(features(input_ids))`` are the model's logits, soft caps and scales included.
    """

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    path: str
    identity: Identity
    bos: int | None  # what the tokenizer puts in front of every text, if it does
    body: Callable[..., Any] | None  # None: the features are the logits
    head: Callable[[Tensor], Tensor]  # (T, H) -> (T, V)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    @property
    def context(self) -> int | None:
        """How many tokens the model reads at most, if it says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, with no special token added."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def features(self, input_ids: Tensor, cache: Any = None) -> Tensor:
        """input_ids (B, L), read after what ``cache`` holds (and added to it) -> (B, L, H).

        Sequences are padded on the right, so under the causal mask no position that counts sees padding.
        """
        arguments = {"input_ids": input_ids, "past_key_values": cache, "use_cache": cache is not None}
        if self.body is None:
            return self.model(**arguments).logits
        return self.body(**arguments).last_hidden_state

    def rows(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        """Features (T, H) at the flat positions ``rows`` (T,) of ``input_ids`` (B, L)."""
        return self.features(input_ids).flatten(0, 1).index_select(0, rows)

    def topk_loss(self, features: Tensor, teacher: TopKLogprobs, **options: Any) -> Tensor:
        """``topk_distillation_loss(head(features), teacher)``, features (T, H); a plain linear head never makes logits
        of all of them."""
        head = self.head
        if self.body is not None and isinstance(head, nn.Linear) and is_plain_linear(head):
            return linear_topk_distillation_loss(features, head.weight, teacher, student_bias=head.bias, **options)
        return topk_distillation_loss(head(features), teacher, **options)

    def layers(self) -> nn.ModuleList:
        """The decoder's layers: the longest list of modules in the model."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise JobError(
                f"{type(self.model).__name__} has no list of layers; train the whole model (no --last-layers)"
            )
        return max(lists, key=len)

    def learned_positions(self) -> bool:
        """Whether absolute positions are learned, so that a prompt in front shifts what the model reads."""
        name = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")
        return any(isinstance(m, nn.Embedding) and name.search(n) for n, m in self.model.named_modules())


def head_chunks(head: Callable[[Tensor], Tensor], features: Tensor, rows: int = CHUNK) -> Iterator[Tensor]:
    """Logits of ``features`` (T, H), at most ``rows`` of them at a time."""
    for chunk in features.split(rows):
        yield head(chunk)


def load(
    path: str | Path, *, gguf_file: str | None = None, dtype: str = "auto", device: str | torch.device = "cpu"
) -> CausalLM:
    """Load a local Hugging Face model directory, or the GGUF file in it, which is dequantised.

    Args:
        path: the directory, or a ``.gguf`` file.
        gguf_file: the GGUF file's name in the directory; needed only where it holds several, or a config.json.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device multiplies it in hardware, else float32.
        device: where the model goes; "auto" is cuda where there is one, else cpu.

    Raises:
        OptionError: no such directory, no model in it, or one that can't be loaded; no such dtype or device.
        ModuleNotFoundError: transformers (for GGUF also gguf or accelerate) is missing; it names the extra.
    """
    found = load_pretrained(path, "AutoModelForCausalLM", gguf_file=gguf_file, dtype=dtype, device=device)
    model, tokenizer = found.model, found.tokenizer
    body, head, vocab_size = _split_head(model)
    identity = Identity(found.digest, tokenizer_digest(tokenizer), vocab_size)
    return CausalLM(model, tokenizer, str(path), identity, leading_bos(tokenizer), body, head)


def _split_head(model: Any) -> tuple[Callable[..., Any] | None, Callable[[Tensor], Tensor], int]:
    """Body, head and vocabulary: apart if head(body(x)) are the model's logits to the bit on a probe, else whole."""
    probe = torch.arange(4, device=model.device)[None]
    with torch.inference_mode():
        logits = model(input_ids=probe, use_cache=False).logits
        body, head = model.base_model, model.get_output_embeddings()
        if body is not model and head is not None:
            hidden = getattr(body(input_ids=probe, use_cache=False), "last_hidden_state", None)
            if hidden is not None and torch.equal(head(hidden), logits):
                return body, head, logits.shape[-1]
    return None, nn.Identity(), logits.shape[-1]
