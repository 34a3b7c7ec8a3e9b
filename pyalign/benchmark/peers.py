"""Other packages' ways to the same results, each with the settings that suit it best, imported when it is measured.

Where a package is installed and can't run (a Triton kernel without a GPU), its error is what a run reports of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyalign.benchmark.case import Function, Inputs, Way

PACKAGES = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn", "trl", "choix")


def peer(name: str, package: str, module: str, build: Callable[[Any], Function], *, compiles: bool = False) -> Way:
    """A way of another package: ``build`` makes the function of its ``module``."""
    return Way(name, "peer", lambda: build(importlib.import_module(module)), package, compiles)


def _log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, -1)


# ---- From logits ----


def divergence(kind: str) -> tuple[Way, ...]:
    """Inputs student, teacher (N, V)."""

    def kl(liger: Any) -> Function:
        loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
        if kind == "forward_kl":
            return lambda x: loss(_log_softmax(x["student"]), _log_softmax(x["teacher"]))
        return lambda x: loss(_log_softmax(x["teacher"]), _log_softmax(x["student"]))

    def jsd(liger: Any) -> Function:
        loss = liger.LigerJSD(beta={"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind])
        return lambda x: loss(_log_softmax(x["student"]), _log_softmax(x["teacher"]))

    def tvd(liger: Any) -> Function:
        loss = liger.LigerTVDLoss(reduction="batchmean")
        return lambda x: loss(torch.softmax(x["student"], -1), torch.softmax(x["teacher"], -1))

    module = "liger_kernel.transformers"
    if kind == "tvd":
        return (peer("liger TVD", "liger-kernel", module, tvd),)
    ways = (peer("liger JSD", "liger-kernel", module, jsd),)
    return (peer("liger KL", "liger-kernel", module, kl), *ways) if kind == "forward_kl" else ways


def logprobs_and_entropy() -> tuple[Way, ...]:
    """Inputs logits (N, V), targets (N,)."""

    def trl(utils: Any) -> Function:
        return lambda x: utils.selective_log_softmax_and_entropy(x["logits"], x["targets"])

    return (peer("trl", "trl", "trl.trainer.utils", trl),)


def logprobs() -> tuple[Way, ...]:
    """Inputs logits (N, V), targets (N,): a cross-entropy of every row, with its sign turned."""

    def trl(utils: Any) -> Function:
        return lambda x: utils.selective_log_softmax(x["logits"], x["targets"])

    def liger(functional: Any) -> Function:
        return lambda x: -functional.liger_cross_entropy(x["logits"], x["targets"], reduction="none")

    def quack(module: Any) -> Function:
        return lambda x: -module.cross_entropy(x["logits"], x["targets"], reduction="none")

    def flash(module: Any) -> Function:
        return lambda x: -module.cross_entropy_loss(x["logits"], x["targets"])[0]

    return (
        peer("trl", "trl", "trl.trainer.utils", trl),
        peer("liger", "liger-kernel", "liger_kernel.transformers.functional", liger),
        peer("quack", "quack-kernels", "quack.cross_entropy", quack),
        peer("flash-attn", "flash-attn", "flash_attn.ops.triton.cross_entropy", flash),
    )


# ---- From hidden states ----


def linear_cross_entropy() -> tuple[Way, ...]:
    """Inputs hidden (N, H), weight (V, H), targets (N,)."""

    def liger(transformers: Any) -> Function:
        loss = transformers.LigerFusedLinearCrossEntropyLoss()
        return lambda x: loss(x["weight"], x["hidden"], x["targets"])

    def cce(package: Any) -> Function:
        return lambda x: package.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], impl="cce")

    def cce_compiled(package: Any) -> Function:
        return lambda x: package.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], impl="torch_compile")

    def quack(module: Any) -> Function:
        return lambda x: module.chunked_linear_cross_entropy(x["hidden"], x["weight"], x["targets"])

    return (
        peer("liger", "liger-kernel", "liger_kernel.transformers", liger),
        peer("cce", "cut-cross-entropy", "cut_cross_entropy", cce),
        peer("cce torch_compile", "cut-cross-entropy", "cut_cross_entropy", cce_compiled, compiles=True),
        peer("quack", "quack-kernels", "quack.linear_cross_entropy", quack),
    )


def linear_logprobs() -> tuple[Way, ...]:
    """Inputs hidden (N, H), weight (V, H), targets (N,)."""

    def trl(module: Any) -> Function:
        # its trainers' chunk of the vocabulary; no figures beside the log-probs
        return lambda x: module.ChunkedLogProbFunction.apply(
            x["hidden"], x["weight"], None, x["targets"], 1.0, 32768, None, 1.0, ()
        )[0]

    return (peer("trl", "trl", "trl.kernels.chunked_logprob", trl),)


def linear_divergence(kind: str) -> tuple[Way, ...]:
    """Inputs hidden, teacher_hidden (N, H), weight, teacher_weight (V, H)."""
    beta = {"forward_kl": 0.0, "jsd": 0.5}[kind]

    def sides(x: Inputs) -> tuple[Tensor, ...]:
        return x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"]

    def liger(transformers: Any) -> Function:
        loss = transformers.LigerFusedLinearJSD(jsd_beta=beta)
        return lambda x: loss(*sides(x), None)

    def liger_chunked(module: Any) -> Function:
        loss = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
        return lambda x: loss(*sides(x), x["targets"])

    def trl(module: Any) -> Function:
        def run(x: Inputs) -> Tensor:
            hidden, weight, teacher_hidden, teacher_weight = sides(x)
            arguments = (hidden, weight, None, teacher_hidden, teacher_weight, None, beta)
            return module.ChunkedDivergenceFunction.apply(*arguments)[0].mean()

        return run

    return (
        peer("liger", "liger-kernel", "liger_kernel.transformers", liger),
        peer("liger chunked", "liger-kernel", "liger_kernel.chunked_loss", liger_chunked, compiles=True),
        peer("trl", "trl", "trl.kernels.chunked_divergence", trl),
    )
