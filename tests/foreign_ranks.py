"""Adapters over a vocabulary that is split over two ranks: what each process of a pool does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pyalign.integrations.megatron import topk_kl_div
from pyalign.integrations.nemo_rl import DistillationLossFn
from pyalign.integrations.openrlhf import KTOLoss

RANKS = 2


def slice_of(x: Tensor) -> Tensor:
    return x.chunk(RANKS, -1)[dist.get_rank()].detach().clone()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)


def megatron(student: Tensor, logprobs: Tensor, ids: Tensor, mask: Tensor, expected: Any) -> None:
    """As Megatron's LossFuncCallable: each rank masks and sums, then the ranks' sums are added up."""
    rank = dist.get_rank()
    for ghost, (value, gradient) in expected.items():
        part = slice_of(student).requires_grad_()
        losses = topk_kl_div(part, logprobs, ids, RANKS, rank, dist.group.WORLD, add_ghost_token=ghost)
        assert rank == 0 or not losses.any()
        loss = (losses * mask).sum()
        loss.backward()
        dist.all_reduce(loss.detach())
        close(loss, value)
        close(part.grad, slice_of(gradient))
    message = f"got rank {rank} of 2; wanted one in which this process is rank {1 - rank} of 2"
    with pytest.raises(ValueError, match=message):
        topk_kl_div(part, logprobs, ids, RANKS, 1 - rank, dist.group.WORLD)


def kto(sides: list[Tensor], expected: Tensor) -> None:
    """Ranks average their KL estimates, and each has the loss of its own samples."""
    module = KTOLoss(0.3, 1.0, 0.5, RANKS, torch.device("cpu"))
    _, _, _, kl = module(*(x.chunk(RANKS)[dist.get_rank()] for x in sides))
    close(kl, expected)


def nemo_rl(student: Tensor, data: Any, tokens: Tensor, options: Any, value: Tensor, gradient: Tensor) -> None:
    """Megatron workers hold plain slices, DTensor workers a DTensor."""
    cfg = SimpleNamespace(**options)
    part = slice_of(student).requires_grad_()
    loss, _ = DistillationLossFn(cfg, process_group=dist.group.WORLD)(part, data, tokens, tokens)
    loss.backward()
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = DTensor.from_local(slice_of(student), mesh, [Shard(2)]).requires_grad_()
    from_dtensor, _ = DistillationLossFn(cfg)(whole, data, tokens, tokens)
    from_dtensor.backward()
    for result, its_gradient in ((loss, part.grad), (from_dtensor, whole.grad.to_local())):
        close(result, value)
        close(its_gradient, slice_of(gradient))
