"""Distillation with both heads split along the vocabulary (tensor parallelism): every process holds a slice of either.

No process ever has a whole row of logits: a few numbers per token pass between them. The losses printed are the same
for any number of processes.

    torchrun --nproc-per-node 2 bench/examples/vocabulary_parallel_distillation.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from pyalign import linear_distillation_loss

VOCAB, BATCH, LENGTH = 500, 4, 32


def language_model(width: int, layers: int, spread: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    student, teacher = language_model(32, 2, 0.02), language_model(64, 2, 0.2)
    for model in (student, teacher):
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})  # its weight: a DTensor, split by rows
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for number in range(20):
        generator = torch.Generator().manual_seed(number % 5)
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)  # the same on every process
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state
        hidden = student.model(ids).last_hidden_state
        loss = linear_distillation_loss(
            hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, process_group=mesh
        )
        optimizer.zero_grad()
        loss.backward()  # the hidden states' gradient is that of all slices
        optimizer.step()
        if number % 5 == 4 and dist.get_rank() == 0:
            print(f"step {number + 1}: {loss.item():.4f} nats a token")
    # torch 2.13 keeps gloo's threads once there were DTensors. One that drops its last tensor while Python ends aborts
    # the process ("terminate called without an active exception"): rare, after all work is done, and gloo's alone.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
