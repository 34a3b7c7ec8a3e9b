"""Losses over a vocabulary that is split over processes, beside what torch offers for it.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 bench/vocabulary_parallel.py [--tokens N] [--vocab V]

Every process has its slice of the logits. Competitors take turns: ours; both sides' logits gathered and eager torch on
whole rows; and for the cross-entropy torch's own ``loss_parallel``. Times are those of the slowest process, forward and
backward; "whole" is ours in one process on unsplit logits, which have as many times the work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

from pyalign import distillation_loss, token_logprobs, topk_distillation_loss, topk_logprobs
from pyalign.benchmark import interleaved, kept_memory
from pyalign.distributed import VocabularyShards


def step(
    loss: Callable[[Tensor], Tensor], logits: Tensor, context: Callable[[], Any] = contextlib.nullcontext
) -> Callable[[], None]:
    def run() -> None:
        logits.grad = None
        with context():
            loss(logits).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses over a vocabulary that is split, beside torch's")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    mesh = init_device_mesh(device.type, (ranks,))
    sizes = [options.vocab // ranks] * ranks
    shards = VocabularyShards(mesh, sizes)
    torch.manual_seed(0)
    whole, whole_teacher = (torch.randn(options.tokens, sum(sizes), device=device) for _ in range(2))
    student, teacher = (x.chunk(ranks, -1)[rank].clone() for x in (whole, whole_teacher))
    targets = torch.randint(0, sum(sizes), (options.tokens,), device=device)
    stored = topk_logprobs(whole_teacher, 50)
    student.requires_grad_()
    whole.requires_grad_()

    def gathered(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(1)]).redistribute(placements=[Replicate()]).to_local()

    def eager_kl(x: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(gathered(x), -1), F.log_softmax(gathered(teacher), -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def parallel_cross_entropy(x: Tensor) -> Tensor:
        return F.cross_entropy(DTensor.from_local(x, mesh, [Shard(1)]), targets)

    families: dict[str, dict[str, tuple[Any, ...]]] = {
        "forward KL": {
            "ours": (lambda x: distillation_loss(x, teacher, process_group=shards), student),
            "gathered, eager": (eager_kl, student),
            "whole": (lambda x: distillation_loss(x, whole_teacher), whole),
        },
        "JSD": {
            "ours": (lambda x: distillation_loss(x, teacher, divergence="jsd", process_group=shards), student),
            "whole": (lambda x: distillation_loss(x, whole_teacher, divergence="jsd"), whole),
        },
        "top-k, k = 50": {
            "ours": (lambda x: topk_distillation_loss(x, stored, process_group=shards), student),
            "whole": (lambda x: topk_distillation_loss(x, stored), whole),
        },
        "cross-entropy": {
            "ours": (lambda x: -token_logprobs(x, targets, process_group=shards).mean(), student),
            "loss_parallel": (parallel_cross_entropy, student, loss_parallel),
            "whole": (lambda x: -token_logprobs(x, targets).mean(), whole),
        },
    }
    figures: dict[str, dict[str, float]] = {}
    for family, competitors in families.items():
        functions = {name: step(*each) for name, each in competitors.items()}
        with contextlib.nullcontext() if cuda else kept_memory(8 * whole.numel() * whole.element_size()):
            times = interleaved(functions, device, rounds=options.rounds)
        slowest = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        figures[family] = {name: 1e3 * x for name, x in zip(times, slowest.tolist(), strict=True)}
    if rank == 0:
        print(f"{options.tokens} x {options.vocab} over {ranks} processes, {device.type}, torch {torch.__version__}")
        for family, times in figures.items():
            others = ", ".join(f"{name} {x / times['ours']:.2f} x" for name, x in times.items() if name != "ours")
            print(f"{family:16} {times['ours']:8.2f} ms; {others}")
        print(json.dumps({"tokens": options.tokens, "vocab": options.vocab, "ranks": ranks, "ms": figures}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
