"""Distillation straight from hidden states with FSDP2: student, teacher and both heads are sharded over the processes.

A head is gathered once a step, whatever the number of chunks of the loss, and logits of all tokens never exist. The
losses printed are the same for any number of processes.

    torchrun --nproc-per-node 2 bench/examples/fsdp2_linear_distillation.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from pyalign import linear_distillation_loss
from pyalign.distributed import global_num_items

VOCAB, BATCH, LENGTH = 500, 6, 32


def language_model(width: int, layers: int, spread: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=spread,
    )
    model = LlamaForCausalLM(config)
    for part in (*model.model.layers, model.lm_head):
        fully_shard(part)
    fully_shard(model.model)
    return model


class Distillation(nn.Module):
    """Both models and the loss, so that FSDP2's hooks run around all of it."""

    def __init__(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_hidden = self.teacher.model(ids).last_hidden_state
        hidden = self.student.model(ids).last_hidden_state
        return linear_distillation_loss(
            hidden,
            self.student.lm_head.weight,  # a DTensor: gathered here; its gradient comes back averaged and sharded
            teacher_hidden,
            self.teacher.lm_head.weight,
            labels=labels,
            num_items=num_items,
        )


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    step = fully_shard(Distillation(language_model(32, 2, 0.02), language_model(64, 2, 0.2)))
    optimizer = torch.optim.AdamW(step.student.parameters(), lr=3e-3)
    for number in range(20):
        generator = torch.Generator().manual_seed(number % 5)
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -100, ids)  # tokens that don't count
        ids, labels = ids[rank::size], labels[rank::size]
        num_items = global_num_items((labels != -100).sum())
        # FSDP2 averages gradients over ranks; times their number, that is the sum of what each adds to the mean.
        loss = size * step(ids, labels, num_items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 5 == 4:
            total = loss.detach() / size
            dist.all_reduce(total)
            if rank == 0:
                print(f"step {number + 1}: {total.item():.4f} nats a token")
    # torch 2.13 keeps gloo's threads once there were DTensors. One that drops its last tensor while Python ends aborts
    # the process ("terminate called without an active exception"): rare, after all work is done, and gloo's alone.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
