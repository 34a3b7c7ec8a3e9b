"""Completions of programs, written by a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyalign._log import Log
from pyalign._models import leading_bos, tokenizer_digest
from pyalign._optional import require
from pyalign._options import OptionError, at_least
from pyalign.evaluation.human_eval import STOPS, Completion, Problem, truncate
from pyalign.pair_scorer.scorer import load_model

_TAIL = 16  # tokens in which an end may have been written, longer than any of them


class Writer:
    """A causal language model that writes completions, by transformers' ``generate``.

    Args:
        model: a local model directory, a GGUF file, or a loaded model of transformers.
        tokenizer: of a loaded model.
        prompt: a text in front of every problem, as context distillation's teacher reads it.
        samples: completions of each problem.
        temperature: of sampling; 0 takes the most probable token, always the same, so that there is one sample.
        top_p: sample among the most probable tokens that have this mass together.
        max_new_tokens: of a completion at most.
        batch_size: completions written at a time.
        stops: a completion ends before the first of these.
        seed: of the sampling; batch by batch, so that a resumed job writes what an uninterrupted one does.
        dtype, device, gguf_file: of a model directory, as in :class:`pyalign.PairScorer`.

    Raises:
        OptionError: an option that can't be followed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        prompt: str = "",
        samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 384,
        batch_size: int = 8,
        stops: Sequence[str] = STOPS,
        seed: int = 0,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        gguf_file: str | None = None,
    ):
        for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            at_least(name, value, 1)
        at_least("temperature", temperature, 0)
        if not 0 < top_p <= 1:
            raise OptionError("top_p", f"got {top_p}; wanted a number above 0, at most 1")
        if temperature == 0 and samples > 1:
            raise OptionError(
                "samples", f"got {samples} at temperature 0, which are all the same; wanted a temperature"
            )
        loading = {"gguf_file": gguf_file, "dtype": dtype, "device": device}
        self.model, self.tokenizer, digest = load_model("model", model, tokenizer, "AutoModelForCausalLM", loading)
        bos = leading_bos(self.tokenizer)
        self._lead = ([] if bos is None else [bos]) + (self._encode(prompt) if prompt else [])
        self._batch_size, self._stops, self._seed = batch_size, tuple(stops), seed
        self.samples = samples
        ends = self.model.generation_config.eos_token_id
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or ())
        self._padding = next((p for p in (self.tokenizer.pad_token_id, *self._ends) if p is not None), 0)
        self._generation = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self._description = {
            "model": digest, "tokenizer": tokenizer_digest(self.tokenizer), "prompt": prompt, **self._generation,
            "samples": samples, "batch_size": batch_size, "stops": list(stops), "seed": seed,
            "dtype": str(self.model.dtype).removeprefix("torch."), "device": self.model.device.type,
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Everything that decides the completions, on one kind of machine."""
        return self._description

    def write(
        self,
        problems: Sequence[Problem],
        *,
        log: Log | None = None,
        advance: Callable[[float], None] = lambda completions: None,
    ) -> list[Completion]:
        """``samples`` completions of each problem, in order.

        Args:
            problems: see :func:`read_problems`.
            log: batches that are in it are not written again, others are added.
            advance: told how many completions were written since it was told before.

        Raises:
            OptionError: a problem and ``max_new_tokens`` are longer than what the model reads.
        """
        jobs = [problem for problem in problems for _ in range(self.samples)]
        done: dict[int, list[str]] = {
            entry["batch"]: entry["texts"] for entry in (log.entries if log is not None else ())
        }
        completions: list[Completion] = []
        for batch, first in enumerate(range(0, len(jobs), self._batch_size)):
            part = jobs[first : first + self._batch_size]
            texts = done.get(batch)
            if texts is None:
                texts = self._batch(part, self._seed + batch)
                if log is not None:
                    log.add(batch=batch, texts=texts)
            completions += [Completion(problem.task_id, text) for problem, text in zip(part, texts, strict=True)]
            advance(len(part))
        return completions

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.inference_mode()
    def _batch(self, problems: Sequence[Problem], seed: int) -> list[str]:
        transformers = require("transformers")
        prompts = [self._lead + self._encode(problem.prompt) for problem in problems]
        longest = max(map(len, prompts))
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        new = int(self._generation["max_new_tokens"])
        if context is not None and longest + new > context:
            raise OptionError(
                "max_new_tokens",
                f"got {new} behind {longest} tokens; wanted at most {context} together, what the model reads",
            )
        ids = torch.full((len(prompts), longest), self._padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        sampling = self._generation["temperature"] > 0
        options = {name: self._generation[name] for name in ("temperature", "top_p") if sampling}
        config = transformers.GenerationConfig(
            do_sample=sampling,
            max_new_tokens=new,
            pad_token_id=self._padding,
            eos_token_id=self._ends or None,
            **options,
        )
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = self.model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=transformers.StoppingCriteriaList([self._ended(longest)]),
            )
        texts = self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return [truncate(text, self._stops) for text in texts]

    def _ended(self, start: int) -> Callable[..., Tensor]:
        """Which rows have written one of the stops: (B,) bool."""

        def ended(input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            tails = self.tokenizer.batch_decode(input_ids[:, max(start, input_ids.shape[1] - _TAIL) :])
            found = [any(stop in tail for stop in self._stops) for tail in tails]
            return torch.tensor(found, device=input_ids.device)

        return ended
