"""How far a model is from the prompted one on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyalign.context_distillation.collect import PromptedModel
from pyalign.context_distillation.language import CHUNK, CausalLM
from pyalign.distill import TopKLogprobs, distillation_loss
from pyalign.teacher_store import TeacherStore


@torch.inference_mode()
def stored_kl(lm: CausalLM, store: TeacherStore, sequences: Sequence[int], *, batch_size: int = 16) -> float:
    """KL(prompted || model) in nats, mean over the tokens of ``sequences``, over the k+1 stored categories.

    A lower bound of the KL over the whole vocabulary. The model is put in eval mode for it and back.
    """
    training = lm.model.training
    lm.model.eval()
    total, tokens = 0.0, 0
    for first in range(0, len(sequences), batch_size):
        batch = store.batch(sequences[first : first + batch_size], lm.device)
        features = lm.rows(batch.input_ids, batch.rows)
        for begin in range(0, features.shape[0], CHUNK):
            rows = slice(begin, begin + CHUNK)
            total += float(lm.topk_loss(features[rows], _rows(batch.teacher, rows), reduction="sum"))
        tokens += features.shape[0]
    lm.model.train(training)
    return total / max(tokens, 1)


def _rows(teacher: TopKLogprobs, rows: slice) -> TopKLogprobs:
    residual = None if teacher.residual is None else teacher.residual[rows]
    return TopKLogprobs(teacher.logprobs[rows], teacher.indices[rows], residual, teacher.temperature)


class ExactComparison(NamedTuple):
    """Over the whole vocabulary, from both models' logits, mean per token in nats."""

    tokens: int
    kl_plain: float  # KL(prompted || plain)
    kl_distilled: float  # KL(prompted || distilled)
    nll_plain: float  # -log p of the text's own next token
    nll_prompted: float
    nll_distilled: float


@torch.inference_mode()
def exact_comparison(
    plain: CausalLM,
    distilled: CausalLM,
    teacher: PromptedModel,
    store: TeacherStore,
    sequences: Sequence[int],
) -> ExactComparison:
    """Run all three models over ``sequences`` of the store, one at a time, at the store's temperature."""
    sums = torch.zeros(5, dtype=torch.float64)
    tokens = targets = 0
    temperature = store.manifest.temperature
    for index in sequences:
        ids = store.sequence(index).tokens.long()[None].to(plain.device)
        rows = torch.arange(ids.shape[1], device=plain.device)
        prompted = teacher.lm.head(teacher.rows(ids, rows))
        logits = [plain.head(plain.rows(ids, rows)), distilled.head(distilled.rows(ids, rows))]
        for i, student in enumerate(logits):
            sums[i] += float(distillation_loss(student, prompted, temperature=temperature, reduction="sum"))
        for i, predicted in enumerate((logits[0], prompted, logits[1])):
            sums[2 + i] += _nll(predicted[:-1], ids[0, 1:])
        tokens += ids.shape[1]
        targets += ids.shape[1] - 1
    kl, nll = sums[:2] / max(tokens, 1), sums[2:] / max(targets, 1)
    return ExactComparison(tokens, *kl.tolist(), *nll.tolist())


def _nll(logits: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))


@torch.inference_mode()
def continuation(lm: CausalLM, text: str, *, prompt: str = "", tokens: int = 60) -> str:
    """What the model writes after ``prompt + text``, greedily, up to the next "Human:"."""
    bos = [] if lm.bos is None else [lm.bos]
    ids = torch.tensor([bos + lm.encode(prompt) + lm.encode(text)], device=lm.device)
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    written: str = lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return written.partition("\n\nHuman:")[0].strip()


def fraction_left(before: float, after: float) -> float:
    """after / before; 1 where there was nothing to lose."""
    return after / before if before > 0 and math.isfinite(before) else 1.0
