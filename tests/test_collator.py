"""Batches for context distillation: which position of the student meets which of the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyalign.distill import ContextDistillationCollator, distillation_loss

PAD = 99
BOS, PROMPT = [1], [10, 11, 12, 13]
TEXTS = [[2, 3, 4], [5, 6, 7, 8, 9], [3]]


def predicted(batch: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """(example, token that the student predicts, token that the matched teacher position predicts)."""
    flat = torch.cat([batch["teacher_input_ids"].flatten(), torch.tensor([-7])])
    found: list[tuple[int, int, int]] = []
    for b, position in (batch["teacher_rows"] >= 0).nonzero().tolist():
        row = int(batch["teacher_rows"][b, position])
        assert row // batch["teacher_input_ids"].shape[1] == b
        found.append((b, int(batch["input_ids"][b, position + 1]), int(flat[row + 1])))
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt", [BOS, [1, 14, 15, 16, 17, 18], []], ids=["bos", "longer", "none"])
def test_matched_positions_predict_the_same_token(side: str, prompt: list[int]):
    collate = ContextDistillationCollator(
        pad_token_id=PAD, prompt_ids=prompt, teacher_prompt_ids=BOS + PROMPT, padding_side=side
    )
    batch = collate(TEXTS)
    first = 0 if prompt else 1  # without a prompt nothing predicts the first token
    wanted = [(b, token, token) for b, text in enumerate(TEXTS) for token in text[first:]]
    assert predicted(batch) == wanted
    targets = batch["targets"]
    assert targets[targets != -100].tolist() == [token for _, token, _ in wanted]
    assert torch.equal(targets != -100, batch["teacher_rows"] >= 0)
    for name, before in (("", prompt), ("teacher_", BOS + PROMPT)):
        for ids, mask, text in zip(batch[name + "input_ids"], batch[name + "attention_mask"], TEXTS, strict=True):
            assert ids[mask > 0].tolist() == before + text
            assert (ids[mask == 0] == PAD).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")


def test_without_a_students_prompt_position_t_meets_the_teachers_prompt_plus_t():
    """How the paper states it, the student reading X alone."""
    batch = ContextDistillationCollator(pad_token_id=PAD, teacher_prompt_ids=PROMPT)([[2, 3, 4]])
    assert batch["teacher_rows"].tolist() == [[4, 5, -1]]


def test_a_loss_over_the_batch_is_that_of_each_example():
    collate = ContextDistillationCollator(pad_token_id=PAD, prompt_ids=BOS, teacher_prompt_ids=BOS + PROMPT)
    torch.manual_seed(0)
    embedding, head = torch.randn(100, 8, dtype=torch.float64), torch.randn(8, 100, dtype=torch.float64)

    def logits(ids: Tensor) -> Tensor:  # of a causal model without padding's influence
        return embedding[ids].cumsum(1) @ head

    def loss(texts: list[list[int]]) -> Tensor:
        batch = collate(texts)
        return distillation_loss(
            logits(batch["input_ids"]), logits(batch["teacher_input_ids"]), teacher_rows=batch["teacher_rows"],
            targets=batch["targets"], hard_weight=0.3, reduction="sum",
        )  # fmt: skip

    torch.testing.assert_close(loss(TEXTS), sum((loss([text]) for text in TEXTS), torch.zeros((), dtype=torch.float64)))


def test_examples_may_bring_their_own_prompts():
    collate = ContextDistillationCollator(pad_token_id=PAD, prompt_ids=BOS, teacher_prompt_ids=PROMPT)
    mixed = collate([{"input_ids": torch.tensor([2, 3]), "teacher_prompt_ids": [20]}, [4, 5]])
    assert mixed["teacher_input_ids"][0, :3].tolist() == [20, 2, 3]
    assert mixed["teacher_input_ids"][1].tolist() == [*PROMPT, 4, 5]
    assert predicted(mixed) == [(0, 2, 2), (0, 3, 3), (1, 4, 4), (1, 5, 5)]


def test_long_continuations_lose_their_end_on_both_sides():
    collate = ContextDistillationCollator(
        pad_token_id=PAD, prompt_ids=BOS, teacher_prompt_ids=BOS + PROMPT, max_length=7
    )
    batch = collate(TEXTS)
    assert batch["teacher_input_ids"].shape[1] == 7
    assert predicted(batch) == [(0, 2, 2), (0, 3, 3), (1, 5, 5), (1, 6, 6), (2, 3, 3)]


def test_nothing_to_predict_matches_nothing():
    collate = ContextDistillationCollator(pad_token_id=PAD, teacher_prompt_ids=PROMPT)
    assert collate([])["teacher_rows"].shape == (0, 0)
    assert (collate([[5], []])["teacher_rows"] == -1).all()


@pytest.mark.parametrize(
    ("options", "examples", "error"),
    [
        ({"padding_side": "middle"}, None, "padding_side: got 'middle'; wanted one of 'right', 'left'"),
        ({"pad_token_id": None}, None, "pad_token_id: got None; wanted a token id"),
        ({"max_length": 0}, None, "max_length: got 0; wanted None or an int >= 1"),
        ({"prompt_ids": "hello"}, None, "prompt_ids: got str; wanted a sequence or a tensor of token ids"),
        ({}, [[1], ["a"]], "example 1: input_ids: got ['a']; wanted token ids"),
        ({}, [{"labels": [1]}], "example 0: fields: got labels; wanted input_ids and perhaps"),
        ({}, [torch.zeros(2, 2, dtype=torch.int64)], "example 0: input_ids: got shape (2, 2); wanted token ids of one"),
        ({}, [torch.zeros(2)], "example 0: input_ids: got torch.float32; wanted bool or an integer dtype"),
        ({"max_length": 4}, [[1]], "example 0: prompt: got 4 tokens; wanted fewer than max_length, 4"),
    ],
)  # fmt: skip
def test_errors_name_what_was_given_and_what_is_wanted(options: dict[str, Any], examples: Any, error: str):
    with pytest.raises((ValueError, TypeError)) as raised:
        ContextDistillationCollator(**{"pad_token_id": PAD, "teacher_prompt_ids": PROMPT, **options})(examples or [])
    assert str(raised.value).startswith(error)
