"""Distillation by several processes. Each has its share of the texts; the gradient is that of the mean over all tokens,
so that the losses printed are the same for any number of processes.

    torchrun --nproc-per-node 2 bench/examples/ddp_distillation.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from pyalign import distillation_loss
from pyalign.distributed import global_num_items

VOCAB, PADDING = 257, 256  # bytes
TEXTS = [
    "Water boils at 100 degrees.",
    "A triangle has three sides and three angles.",
    "The heart pumps blood.",
    "Light is faster than sound.",
    "Bees make honey from the nectar of flowers, and store it.",
    "Ice floats.",
    "The moon moves the tides of the sea.",
    "Iron rusts in damp air.",
]


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


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """(B, T) ids, and where they are no padding."""
    rows = [torch.tensor(list(text.encode())) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return ids, ids != PADDING


def train() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    teacher = language_model(64, 2, 0.2).eval()
    student = DistributedDataParallel(language_model(32, 2, 0.02))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ids, mask = encode(TEXTS[rank::size])
    for step in range(20):
        with torch.no_grad():
            teacher_logits = teacher(ids, attention_mask=mask).logits
        logits = student(ids, attention_mask=mask).logits
        num_items = global_num_items(mask.sum())
        # DDP averages gradients over ranks; times their number, that is the sum of what each adds to the global mean.
        loss = size * distillation_loss(logits, teacher_logits, mask=mask, num_items=num_items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            total = loss.detach() / size
            dist.all_reduce(total)
            if rank == 0:
                print(f"step {step + 1}: {total.item():.4f} nats a token")


def main() -> None:
    dist.init_process_group("gloo")
    train()  # where the model is dropped: DDP must not outlive its process group, or gloo's threads may wait for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
