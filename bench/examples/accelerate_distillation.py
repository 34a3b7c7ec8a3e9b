"""Distillation in a plain loop with accelerate: gradient accumulation over sequences of unequal length.

    python bench/examples/accelerate_distillation.py
    ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 bench/examples/accelerate_distillation.py --accumulation 4

Every token of an optimizer step weighs the same, whatever micro-batch or process it is in: the loss is divided by the
tokens of the whole step (``num_items``), not by those of its micro-batch. Both commands print the same losses.
"""

import argparse
import contextlib
import itertools

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from pyalign import distillation_loss  # instead of torch.nn.functional.kl_div

VOCAB, PAD, BATCH = 258, 257, 2
TEXTS = [" ".join(str(n * n) for n in range(i, i + 1 + i % 7)) for i in range(40)]


def make_model(seed: int) -> LlamaForCausalLM:
    """A tiny random model over bytes; a real loop loads a teacher and a student here."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=PAD, **sizes))


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(list(text.encode())) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}


def train(accumulation: int = 8, epochs: int = 4) -> list[float]:
    """The loss of every optimizer step."""
    accelerator = Accelerator()
    loader = DataLoader(TEXTS, batch_size=BATCH, collate_fn=collate)
    student, teacher = make_model(0), make_model(1).eval().to(accelerator.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    losses = []
    for _ in range(epochs):
        batches = iter(loader)
        while window := list(itertools.islice(batches, accumulation)):  # the micro-batches of one optimizer step
            tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
            num_items = accelerator.reduce(tokens, "sum")  # of the step, over all processes
            total = torch.zeros((), device=accelerator.device)
            for i, batch in enumerate(window):
                with accelerator.no_sync(student) if i + 1 < len(window) else contextlib.nullcontext():
                    labels = batch.pop("labels")
                    with torch.no_grad():
                        teacher_logits = teacher(**batch).logits
                    logits = student(**batch).logits
                    loss = distillation_loss(
                        logits[:, :-1], teacher_logits[:, :-1], labels=labels[:, 1:], num_items=num_items
                    )
                    # Data-parallel training averages gradients over processes, and they should be added up.
                    accelerator.backward(loss * accelerator.num_processes)
                    total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(total, "sum").item())
            accelerator.print(f"step {len(losses)}: {losses[-1]:.6f} over {int(num_items)} tokens")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of a step in each process")
    train(parser.parse_args().accumulation)
    PartialState().destroy_process_group()  # after the model is dropped: DDP must not outlive its process group
