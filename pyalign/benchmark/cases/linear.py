"""Losses straight from hidden states: bound by matrix products.

Beside the others stand the bare products that a loss can't do without (three for a cross-entropy, four for a
distillation), in the chunks of our default workspace.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import (
    TopKLogprobs,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_token_logprobs,
    linear_topk_distillation_loss,
    topk_logprobs,
)
from pyalign.benchmark import peers
from pyalign.benchmark.case import Case, Draw, Function, Inputs, Outputs, Shape, Way, Work, way
from pyalign.benchmark.cases import distill

GPU_SHAPE = {"tokens": 8192, "hidden": 4096, "vocab": 128256}
CPU_SHAPE = {"tokens": 1024, "hidden": 576, "vocab": 49152}
TINY = {"tokens": 8, "hidden": 16, "vocab": 100}
FEW = {"tokens": 32}
QUICK = {"tokens": 128, "vocab": 16384}
PEAK = 4 << 30


def cases(device: torch.device) -> list[Case]:
    return [*cross_entropies(device), *distillations(device), *logprobs(device), *topk_losses(device)]


def _dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]


# ---- Inputs and products ----


def make(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    tokens, hidden, vocab = shape["tokens"], shape["hidden"], shape["vocab"]
    return {
        "hidden": draw.normal(tokens, hidden, dtype=dtype),
        "weight": draw.normal(vocab, hidden, dtype=dtype, scale=0.05),
        "targets": draw.integers(0, vocab, tokens),
    }


def make_both(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    student, teacher = make(shape, dtype, draw), make(shape, dtype, draw)
    return {**student, "teacher_hidden": teacher["hidden"], "teacher_weight": teacher["weight"]}


def make_topk(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    stored = topk_logprobs(draw.normal(shape["tokens"], shape["vocab"]), min(distill.K, shape["vocab"]))
    assert stored.residual is not None
    teacher = {"logprobs": stored.logprobs, "indices": stored.indices.long(), "residual": stored.residual}
    return {**make(shape, dtype, draw), **teacher}


def logits(x: Inputs, side: str = "") -> Tensor:
    products = x[side + "hidden"] @ x[side + "weight"].T
    return products if products.dtype == torch.float64 else products.float()


def bare_products(sides: int, rows: int, x: Inputs) -> Outputs:
    """A projection of each side, and the products of both gradients, in chunks of ``rows`` tokens."""
    hidden, weight = x["hidden"].detach(), x["weight"].detach()
    tokens = hidden.shape[0]
    size = min(rows, tokens), weight.shape[0]
    chunks = [torch.empty(size, dtype=hidden.dtype, device=hidden.device) for _ in range(sides)]
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)
    for begin in range(0, tokens, rows):
        chunk = slice(begin, min(begin + rows, tokens))
        part = [y[: chunk.stop - begin] for y in chunks]
        torch.mm(hidden[chunk], weight.t(), out=part[0])
        for other in part[1:]:
            torch.mm(x.get("teacher_hidden", hidden)[chunk], x.get("teacher_weight", weight).t(), out=other)
        torch.mm(part[0], weight, out=hidden_gradient[chunk])
        if begin:
            weight_gradient.addmm_(part[0].t(), hidden[chunk])
        else:
            torch.mm(part[0].t(), hidden[chunk], out=weight_gradient)
    return hidden_gradient, weight_gradient


def _bare(sides: int, device: torch.device) -> tuple[Way, ...]:
    largest = 4096 if device.type == "cuda" else 512  # rows of a chunk in our default workspace
    return tuple(
        way(f"bare products of {rows}", "bare", functools.partial(bare_products, sides, rows))
        for rows in (largest // 2, largest)
    )


def _work(sides: int, case: Case) -> Work:
    """``sides`` projections and two products for the gradients, of 2 T H V FLOPs each; operands read, gradients written
    once."""
    tokens, hidden, vocab = case.shape["tokens"], case.shape["hidden"], case.shape["vocab"]
    operands = tokens * hidden + vocab * hidden
    return Work((sides + 1) * operands * case.dtype.itemsize, (sides + 2) * 2 * tokens * hidden * vocab)


def _product(shape: Shape) -> tuple[int, int, int]:
    return shape["tokens"], shape["hidden"], shape["vocab"]


def _case(
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    ours: Function,
    eager: Mapping[str, Function],
    others: tuple[Way, ...],
    *,
    sides: int,
    products: int | None = None,
    variant: str = "",
    quick: bool = False,
) -> Case:
    """``products``: how many projections the bare products do, where that isn't one for each side."""
    case = Case(
        system="linear", op=op, variant=variant, shape=GPU_SHAPE if device.type == "cuda" else CPU_SHAPE, dtype=dtype,
        leaves=("hidden", "weight"), make=make if sides == 1 else make_both, ours=ours, eager=eager,
        others=(*others, *_bare(products or sides, device)), work=functools.partial(_work, products or sides),
        checked_at=FEW, tiny=TINY, quick=QUICK if quick else None, bound="products", product=_product, kept_bytes=PEAK,
    )  # fmt: skip
    return case


# ---- Cross-entropy ----


def torch_cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(logits(x), x["targets"])


def our_cross_entropy(x: Inputs) -> Tensor:
    return linear_cross_entropy(x["hidden"], x["weight"], x["targets"])


def _in_16_bit(x: Inputs) -> Tensor:
    return linear_cross_entropy(x["hidden"], x["weight"], x["targets"], logits_dtype=x["hidden"].dtype)


def _torch_fused() -> tuple[Way, ...]:
    """torch's own, in chunks and whole, from the version on that has it."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        return ()
    options = torch.nn.LinearCrossEntropyOptions()
    return (
        way("torch chunked", "torch", lambda x: function(x["hidden"], x["weight"], x["targets"], options=options)),
        way("torch whole", "torch", lambda x: function(x["hidden"], x["weight"], x["targets"])),
    )


def cross_entropies(device: torch.device) -> list[Case]:
    found: list[Case] = []
    for i, dtype in enumerate(_dtypes(device)):
        narrow = () if dtype == torch.float32 else (way("pyalign 16-bit logits", "pyalign", _in_16_bit),)
        others = (*narrow, *_torch_fused(), *peers.linear_cross_entropy())
        eager = {"eager": torch_cross_entropy}
        case = _case(
            device, dtype, "linear_cross_entropy", our_cross_entropy, eager, others, sides=1, quick=i == 0
        )  # fmt: skip
        found.append(case)
    return found


# ---- Distillation ----


def torch_distillation(kind: str, x: Inputs) -> Tensor:
    return distill.torch_divergence(kind, {"student": logits(x), "teacher": logits(x, "teacher_")})


def _our_distillation(kind: str, x: Inputs) -> Tensor:
    sides = x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"]
    return linear_distillation_loss(*sides, divergence=kind)


def _distillation_in_16_bit(x: Inputs) -> Tensor:
    sides = x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"]
    return linear_distillation_loss(*sides, logits_dtype=x["hidden"].dtype)


def distillations(device: torch.device) -> list[Case]:
    found: list[Case] = []
    kinds = [("forward_kl", dtype) for dtype in _dtypes(device)] + [("jsd", _dtypes(device)[0])]
    for i, (kind, dtype) in enumerate(kinds):
        others = peers.linear_divergence(kind)
        if dtype != torch.float32 and kind == "forward_kl":
            others = (way("pyalign 16-bit logits", "pyalign", _distillation_in_16_bit), *others)
        ours, eager = functools.partial(_our_distillation, kind), functools.partial(torch_distillation, kind)
        case = _case(
            device, dtype, "linear_distillation_loss", ours, {"eager": eager}, others, sides=2, variant=kind,
            quick=i == 0,
        )  # fmt: skip
        found.append(case)
    return found


def torch_topk_loss(x: Inputs) -> Tensor:
    return distill.torch_topk_loss({**x, "student": logits(x)})


def our_topk_loss(x: Inputs) -> Tensor:
    stored = TopKLogprobs(x["logprobs"], x["indices"], x["residual"])
    return linear_topk_distillation_loss(x["hidden"], x["weight"], stored)


def topk_losses(device: torch.device) -> list[Case]:
    eager = {"eager": torch_topk_loss}
    op, variant = "linear_topk_distillation_loss", f"k={distill.K}"
    case = _case(device, _dtypes(device)[0], op, our_topk_loss, eager, (), sides=1, variant=variant)
    return [case.replaced(make=make_topk)]


# ---- Log-probs ----


def torch_logprobs(x: Inputs) -> Tensor:
    return torch.log_softmax(logits(x), -1).gather(-1, x["targets"][:, None]).squeeze(-1)


def our_logprobs(x: Inputs) -> Tensor:
    return linear_token_logprobs(x["hidden"], x["weight"], x["targets"])


def logprobs(device: torch.device) -> list[Case]:
    """Four products: backward, which knows its upstream gradient only then, projects again."""
    eager, others = {"eager": torch_logprobs}, peers.linear_logprobs()
    dtype = _dtypes(device)[0]
    return [_case(device, dtype, "linear_token_logprobs", our_logprobs, eager, others, sides=1, products=2)]
