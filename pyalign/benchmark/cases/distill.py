"""Divergences between logits, and top-k log-probs: bound by memory, but for the smallest."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs
from pyalign.benchmark import peers
from pyalign.benchmark.case import Case, Draw, Inputs, Outputs, Shape, Work, widened

K = 50
GPU_SHAPES = [(8192, 128256, torch.bfloat16), (4096, 151936, torch.bfloat16), (4096, 128256, torch.float32)]
CPU_SHAPES = [(1024, 32000, torch.float32), (1024, 32000, torch.bfloat16), (256, 128256, torch.float32)]
FEW = {"rows": 16}
TINY = {"rows": 8, "vocab": 1000}
QUICK = {"rows": 128}


def cases(device: torch.device) -> list[Case]:
    return [*kl(device), *divergences(device), *topk(device), *topk_loss(device), *call_overhead(device)]


def _shapes(device: torch.device) -> list[tuple[Shape, torch.dtype]]:
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [({"rows": rows, "vocab": vocab}, dtype) for rows, vocab, dtype in shapes]


# ---- Divergences ----


def make(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    return {side: draw.normal(shape["rows"], shape["vocab"], dtype=dtype) for side in ("student", "teacher")}


def torch_divergence(kind: str, x: Inputs) -> Tensor:
    log_q, log_p = (torch.log_softmax(widened(x[side]), -1) for side in ("student", "teacher"))
    if kind == "forward_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    if kind == "reverse_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    if kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    teacher_side = F.kl_div(log_m, log_p, log_target=True, reduction="none")
    return 0.5 * (teacher_side + F.kl_div(log_m, log_q, log_target=True, reduction="none")).sum(-1).mean()


def _ours(kind: str, x: Inputs) -> Tensor:
    return distillation_loss(x["student"], x["teacher"], divergence=kind)


def dense_work(case: Case) -> Work:
    """Read student, read teacher, write the gradient. Of every entry two normalisers (subtract, exp, add), the term
    (subtract, multiply, add) and the gradient (two exp, subtract, multiply)."""
    return Work(3 * case.elements() * case.dtype.itemsize, 13 * case.elements())


def _divergence(kind: str, shape: Shape, dtype: torch.dtype, quick: bool) -> Case:
    return Case(
        system="distill", op="distillation_loss", variant=kind, shape=shape, dtype=dtype, leaves=("student",),
        make=make, ours=functools.partial(_ours, kind), eager={"eager": functools.partial(torch_divergence, kind)},
        others=peers.divergence(kind), work=dense_work, checked_at=FEW, tiny=TINY, quick=QUICK if quick else None,
        kept_bytes=48 * math.prod(shape.values()),
    )  # fmt: skip


def kl(device: torch.device) -> list[Case]:
    return [_divergence("forward_kl", shape, dtype, i < 2) for i, (shape, dtype) in enumerate(_shapes(device))]


def divergences(device: torch.device) -> list[Case]:
    shape, dtype = _shapes(device)[0]
    return [_divergence(kind, shape, dtype, kind == "jsd") for kind in ("reverse_kl", "jsd", "tvd")]


def call_overhead(device: torch.device) -> list[Case]:
    """8 x 32 logits: what a call costs beside its work."""
    small = _divergence("forward_kl", {"rows": 8, "vocab": 32}, torch.float32, True)
    return [small.replaced(bound="calls", checked_at={}, tiny={}, quick={})]


# ---- Top-k ----


def _make_logits(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    return {"logits": draw.normal(shape["rows"], shape["vocab"], dtype=dtype)}


def torch_topk(x: Inputs) -> Outputs:
    log_p = torch.log_softmax(widened(x["logits"]), -1)
    top = torch.topk(log_p, K)
    return top.values, log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1)


def torch_topk_and_normaliser(x: Inputs) -> Outputs:
    """Of all the rest it knows one minus a sum alone, which cancels."""
    logits = widened(x["logits"])
    top = torch.topk(logits, K)
    logprobs = top.values - torch.logsumexp(logits, -1, keepdim=True)
    return logprobs, torch.log(-torch.expm1(torch.logsumexp(logprobs, -1)))


def _our_topk(x: Inputs) -> Outputs:
    result = topk_logprobs(x["logits"], K)
    assert result.residual is not None
    return result.logprobs, result.residual


def topk(device: torch.device) -> list[Case]:
    rows, vocab = (8192, 128256) if device.type == "cuda" else (1024, 49152)
    return [
        Case(
            system="distill", op="topk_logprobs", variant=f"k={K}", shape={"rows": rows, "vocab": vocab},
            dtype=torch.float32, make=_make_logits, ours=_our_topk,
            eager={"eager": torch_topk, "eager normaliser": torch_topk_and_normaliser},
            work=lambda case: Work(case.elements() * case.dtype.itemsize, 4 * case.elements()),
            checked_at=FEW, tiny=TINY, quick=QUICK, kept_bytes=48 * rows * vocab,
        )
    ]  # fmt: skip


def _make_topk(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    logits = make(shape, dtype, draw)
    stored = topk_logprobs(logits["teacher"], K)
    assert stored.residual is not None
    return {
        "student": logits["student"],
        "logprobs": stored.logprobs,
        "indices": stored.indices.long(),
        "residual": stored.residual,
    }


def torch_topk_loss(x: Inputs) -> Tensor:
    log_q = torch.log_softmax(widened(x["student"]), -1)
    picked = log_q.gather(-1, x["indices"])
    rest = torch.log(-torch.expm1(torch.logsumexp(picked, -1)))
    tail = x["residual"].exp() * (x["residual"] - rest)
    return ((x["logprobs"].exp() * (x["logprobs"] - picked)).sum(-1) + tail).mean()


def our_topk_loss(x: Inputs) -> Tensor:
    return topk_distillation_loss(x["student"], TopKLogprobs(x["logprobs"], x["indices"], x["residual"]))


def topk_loss(device: torch.device) -> list[Case]:
    return [
        Case(
            system="distill", op="topk_distillation_loss", variant=f"k={K}", shape=shape, dtype=dtype,
            leaves=("student",), make=_make_topk, ours=our_topk_loss, eager={"eager": torch_topk_loss},
            # read student, write the gradient; a normaliser of every entry, an exp and a product for its gradient
            work=lambda case: Work(2 * case.elements() * case.dtype.itemsize, 6 * case.elements()),
            checked_at=FEW, tiny=TINY, quick=QUICK, kept_bytes=48 * math.prod(shape.values()),
        )
        for shape, dtype in _shapes(device)[:1]
    ]  # fmt: skip
