"""Log-probs of targets from logits, with and without the entropies: bound by memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import token_logprobs
from pyalign.benchmark import peers
from pyalign.benchmark.case import Case, Draw, Inputs, Outputs, Shape, Work, widened

GPU_SHAPES = [(8192, 151936, torch.bfloat16), (8192, 128256, torch.bfloat16), (4096, 128256, torch.float32)]
CPU_SHAPES = [(1024, 32000, torch.float32), (1024, 49152, torch.float32), (1024, 32000, torch.bfloat16)]


def make(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    rows, vocab = shape["rows"], shape["vocab"]
    return {"logits": draw.normal(rows, vocab, dtype=dtype), "targets": draw.integers(0, vocab, rows)}


def torch_logprobs_and_entropy(x: Inputs) -> Outputs:
    log_q = torch.log_softmax(widened(x["logits"]), -1)
    return log_q.gather(-1, x["targets"][:, None]).squeeze(-1), -(log_q.exp() * log_q).sum(-1)


def our_logprobs_and_entropy(x: Inputs) -> Outputs:
    return token_logprobs(x["logits"], x["targets"], return_entropy=True)


def torch_logprobs(x: Inputs) -> Tensor:
    return -F.cross_entropy(widened(x["logits"]), x["targets"], reduction="none")


def our_logprobs(x: Inputs) -> Tensor:
    return token_logprobs(x["logits"], x["targets"])


def _work(case: Case) -> Work:
    """Forward reads the logits, backward reads them again and writes the gradient."""
    passes, flops = (3, 11) if case.leaves else (1, 5)
    return Work(passes * case.elements() * case.dtype.itemsize, flops * case.elements())


def _case(shape: Shape, dtype: torch.dtype, entropy: bool, backward: bool, quick: bool) -> Case:
    return Case(
        system="logprob", op="token_logprobs", variant="entropy" if entropy else "", shape=shape, dtype=dtype,
        leaves=("logits",) if backward else (), make=make,
        ours=our_logprobs_and_entropy if entropy else our_logprobs,
        eager={"eager": torch_logprobs_and_entropy if entropy else torch_logprobs},
        others=peers.logprobs_and_entropy() if entropy else peers.logprobs(),
        work=_work, checked_at={"rows": 16}, tiny={"rows": 8, "vocab": 1000}, quick={"rows": 128} if quick else None,
        kept_bytes=32 * math.prod(shape.values()),
    )  # fmt: skip


def entropies(device: torch.device, *, backward: bool) -> list[Case]:
    return [_case(shape, dtype, True, backward, i == 0) for i, (shape, dtype) in enumerate(_shapes(device))]


def cross_entropies(device: torch.device) -> list[Case]:
    """What the peers' cross-entropies compute, forward and backward."""
    return [_case(shape, dtype, False, True, i == 0) for i, (shape, dtype) in enumerate(_shapes(device))]


def _shapes(device: torch.device) -> list[tuple[Shape, torch.dtype]]:
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [({"rows": rows, "vocab": vocab}, dtype) for rows, vocab, dtype in shapes]


def cases(device: torch.device) -> list[Case]:
    return [*entropies(device, backward=False), *entropies(device, backward=True), *cross_entropies(device)]
