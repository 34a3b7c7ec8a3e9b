"""Batches for context distillation in an ordinary training loop: one continuation behind two prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyalign import _checks

_FIELDS = ("input_ids", "prompt_ids", "teacher_prompt_ids")


class ContextDistillationCollator:
    """Makes batches of continuations that a student reads after one prompt and its teacher after another.

    With C_s and C_t the prompts and X the continuation, the student reads ``C_s X`` and the teacher ``C_t X``. Position
    len(C_s) + t - 1 of the student and len(C_t) + t - 1 of the teacher both predict X's token t: ``teacher_rows`` says
    so, and :func:`pyalign.distill.distillation_loss` follows it without copying logits (context distillation, Askell et
    al. 2021, arXiv 2112.00861: KL(p(X | C) || p(X)))::

        collate = ContextDistillationCollator(pad_token_id=tokenizer.pad_token_id, teacher_prompt_ids=prompt)
        for batch in DataLoader(continuations, batch_size=8, collate_fn=collate):
            with torch.no_grad():
                teacher_logits = teacher(batch["teacher_input_ids"], batch["teacher_attention_mask"]).logits
            logits = student(batch["input_ids"], batch["attention_mask"]).logits
            loss = distillation_loss(logits, teacher_logits, teacher_rows=batch["teacher_rows"])

    Args:
        pad_token_id: what fills up the shorter sequences.
        prompt_ids: the student's prompt C_s, a BOS token for instance; none by default.
        teacher_prompt_ids: the teacher's prompt C_t.
        padding_side: "right" or "left".
        max_length: tokens of either sequence at most: the end of a longer continuation is left out.

    Called with a list of examples, each a sequence of token ids X, or a mapping with ``input_ids`` and, to replace
    those above, ``prompt_ids`` and ``teacher_prompt_ids``, it returns a dict of int64 tensors:

    - ``input_ids``, ``attention_mask`` (B, S): what the student reads
    - ``teacher_input_ids``, ``teacher_attention_mask`` (B, T): what the teacher reads
    - ``teacher_rows`` (B, S): for each position of the student the flat row b * T + position of the teacher's logits,
      -1 where it predicts no token of X. Without a prompt nothing predicts X's first token.
    - ``targets`` (B, S): the token of X that the position predicts, -100 elsewhere: ``targets=`` and ``labels=`` of
      the losses, which shift nothing.

    Raises:
        ValueError, TypeError: an argument or an example of the wrong kind; a prompt that leaves no room.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        prompt_ids: Sequence[int] | Tensor = (),
        teacher_prompt_ids: Sequence[int] | Tensor = (),
        padding_side: str = "right",
        max_length: int | None = None,
    ):
        _checks.one_of("padding_side", padding_side, ("right", "left"))
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int):
            _checks.refuse("pad_token_id", repr(pad_token_id), "a token id", TypeError)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            _checks.refuse("max_length", repr(max_length), "None or an int >= 1")
        self.pad_token_id, self.padding_side, self.max_length = pad_token_id, padding_side, max_length
        self.prompt_ids = _ids("prompt_ids", prompt_ids)
        self.teacher_prompt_ids = _ids("teacher_prompt_ids", teacher_prompt_ids)

    def __call__(self, examples: Sequence[Mapping[str, Any] | Sequence[int] | Tensor]) -> dict[str, Tensor]:
        parts = [self._parts(number, example) for number, example in enumerate(examples)]
        student, mask, starts = self._padded([(prompt, text) for prompt, _, text in parts])
        teacher, teacher_mask, teacher_starts = self._padded([(prompt, text) for _, prompt, text in parts])
        rows = torch.full(student.shape, -1, dtype=torch.int64)
        targets = torch.full(student.shape, -100, dtype=torch.int64)
        for b, (prompt, teacher_prompt, text) in enumerate(parts):
            first = 0 if len(prompt) and len(teacher_prompt) else 1  # token of X that both have a position to predict
            count = len(text) - first
            if count <= 0:
                continue
            at = starts[b] + len(prompt) + first - 1
            teacher_at = b * teacher.shape[1] + teacher_starts[b] + len(teacher_prompt) + first - 1
            rows[b, at : at + count] = torch.arange(teacher_at, teacher_at + count)
            targets[b, at : at + count] = text[first:]
        return {
            "input_ids": student,
            "attention_mask": mask,
            "teacher_input_ids": teacher,
            "teacher_attention_mask": teacher_mask,
            "teacher_rows": rows,
            "targets": targets,
        }

    def _parts(self, number: int, example: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The student's prompt, the teacher's, and as much of the continuation as fits behind both."""
        where = f"example {number}: "
        prompt, teacher_prompt = self.prompt_ids, self.teacher_prompt_ids
        if isinstance(example, Mapping):
            unknown = sorted(set(map(str, example)) - set(_FIELDS))
            if unknown or "input_ids" not in example:
                _checks.refuse(
                    f"{where}fields", ", ".join(map(str, example)), "input_ids and perhaps " + ", ".join(_FIELDS[1:])
                )
            prompt = _ids(f"{where}prompt_ids", example["prompt_ids"]) if "prompt_ids" in example else prompt
            if "teacher_prompt_ids" in example:
                teacher_prompt = _ids(f"{where}teacher_prompt_ids", example["teacher_prompt_ids"])
            example = example["input_ids"]
        text = _ids(f"{where}input_ids", example)
        if self.max_length is not None:
            longest = max(len(prompt), len(teacher_prompt))
            if longest >= self.max_length:
                _checks.refuse(f"{where}prompt", f"{longest} tokens", f"fewer than max_length, {self.max_length}")
            text = text[: self.max_length - longest]
        return prompt, teacher_prompt, text

    def _padded(self, sequences: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[int]]:
        """(B, L) ids and mask, and where each sequence starts."""
        lengths = [len(prompt) + len(text) for prompt, text in sequences]
        longest = max(lengths, default=0)
        ids = torch.full((len(lengths), longest), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        starts = [longest - length if self.padding_side == "left" else 0 for length in lengths]
        for b, ((prompt, text), start, length) in enumerate(zip(sequences, starts, lengths, strict=True)):
            ids[b, start : start + len(prompt)] = prompt
            ids[b, start + len(prompt) : start + length] = text
            mask[b, start : start + length] = 1
        return ids, mask, starts


def _ids(name: str, ids: Any) -> Tensor:
    """(L,) int64."""
    if not isinstance(ids, Tensor):
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            _checks.refuse(name, type(ids).__name__, "a sequence or a tensor of token ids", TypeError)
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in ids):
            _checks.refuse(name, repr(list(ids[:4])), "token ids", TypeError)
        ids = torch.tensor(ids, dtype=torch.int64)
    if ids.dim() != 1:
        _checks.refuse(name, f"shape {tuple(ids.shape)}", "token ids of one sequence, (L,)")
    _checks.integer_dtype(name, ids)
    return ids.to("cpu", torch.int64)
