"""What the preference-loss tests share: random scores, the float64 truth, and TRL's published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from distill_support import ROUNDING, SMALLEST, generator, one_thread, to_float64, within
from torch import Tensor

import pyalign
from pyalign._types import accumulation_dtype

DPO_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "bco_pair": {"bco_delta": 0.3},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.5},
}
PAIRWISE: dict[str, dict[str, Any]] = {
    "logistic": {"label_smoothing": 0.1},
    "hinge": {},
    "exponential": {},
    "ipo": {},
}
METHODS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "groups": {"group_reduction": "groups", "margin": 0.3, "label_smoothing": 0.1},
    "breslow": {"method": "plackett_luce"},
    "efron": {"method": "plackett_luce", "ties": "efron", "scale": 0.7},
}


def scores(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def ranks(*shape: int, seed: int = 5, most: int = 6) -> Tensor:
    """Ranks with ties and absent entries."""
    return torch.randint(-1, most, shape, generator=generator(seed))


class Outcome(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]


def evaluate(
    function: Callable[..., Any], *tensors: Tensor, constants: tuple[Any, ...] = (), upstream: Tensor | None = None,
    **options: Any,
) -> Outcome:  # fmt: skip
    """The loss of ``function(*tensors, *constants)`` and its gradients in the tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    result = function(*leaves, *constants, **options)
    loss = result[0] if isinstance(result, tuple) else result
    gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return Outcome(loss.detach(), gradients)


def truth(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Outcome:
    """The same in float64, in plain torch, on the CPU."""
    constants = tuple(to_float64(x) for x in options.pop("constants", ()))
    with pyalign.backend("reference"), one_thread():
        return evaluate(
            function, *(to_float64(x) for x in tensors), constants=constants,
            **{key: to_float64(x) for key, x in options.items()},
        )  # fmt: skip


def assert_close(ours: Outcome, exact: Outcome, dtype: torch.dtype, slack: float = 1.0) -> None:
    """The loss within 8 roundings of its size and of 1, gradients within two of their dtype and 32 of the largest."""
    accumulation = accumulation_dtype(dtype)
    assert ours.loss.dtype == accumulation
    assert ours.loss.shape == exact.loss.shape
    unit = slack * (2.0**-24 if accumulation == torch.float32 else 2.0**-50)
    within("loss", ours.loss, exact.loss, 8 * unit * (1 + exact.loss.abs()))
    for name, x, wanted in zip(("first", "second"), ours.gradients, exact.gradients, strict=False):
        assert x.dtype == dtype
        assert x.shape == wanted.shape
        finite = wanted[wanted.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        bound = 2 * ROUNDING[dtype] * wanted.abs() + SMALLEST.get(dtype, 0.0) + 32 * unit * (largest + 1e-30)
        within(f"gradient of {name}", x, wanted, bound)


# ---- Torch's own words for the same ----


def naive_pairs(x: Tensor, ranks: Tensor, offsets: Tensor, margin: float, scale: float) -> list[tuple[Tensor, int]]:
    """Sum of softplus over the pairs of each group and how many there are, pair by pair."""
    groups: list[tuple[Tensor, int]] = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        total, count = x.new_zeros(()), 0
        for i in range(begin, end):
            for j in range(begin, end):
                if 0 <= int(ranks[i]) < int(ranks[j]):
                    z = scale * (x[i] - x[j]) - margin * int(ranks[j] - ranks[i])
                    total, count = total - F.logsigmoid(z), count + 1
        groups.append((total, count))
    return groups


def naive_plackett_luce(x: Tensor, ranks: Tensor, ties: str) -> Tensor:
    """Stage by stage, in the probabilities themselves."""
    total = x.new_zeros(())
    levels = sorted({r for r in ranks.tolist() if r >= 0})
    if len(levels) < 2:
        return total
    for level in levels:
        block, rest = x[ranks == level], x[ranks > level]
        d = len(block)
        everything, tied = block.exp().sum() + rest.exp().sum(), block.exp().sum()
        for stage in range(d):
            part = stage / d if ties == "efron" else 0.0
            total = total + torch.log(everything - part * tied) - block[stage]
    return total


def trl_dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float, loss_type: str,
    label_smoothing: float = 0.0, discopop_tau: float = 0.05, bco_delta: float = 0.0,
) -> Tensor:  # fmt: skip
    """The formulas of TRL's DPOTrainer, as published, per pair."""
    chosen_logratios, rejected_logratios = chosen - reference_chosen, rejected - reference_rejected
    delta_score = chosen_logratios - rejected_logratios
    e = label_smoothing
    logsigmoid = F.logsigmoid
    if loss_type == "sigmoid":
        return -logsigmoid(beta * delta_score) * (1 - e) - logsigmoid(-beta * delta_score) * e
    if loss_type == "robust":
        clean = -logsigmoid(beta * delta_score) * (1 - e)
        return (clean + logsigmoid(-beta * delta_score) * e) / (1 - 2 * e)
    if loss_type == "hinge":
        return torch.relu(1 - beta * delta_score)
    if loss_type == "ipo":
        return (delta_score - 1 / (2 * beta)) ** 2
    if loss_type == "exo_pair":
        log_qw, log_pw = logsigmoid(beta * delta_score), math.log1p(-e)
        log_ql, log_pl = logsigmoid(-beta * delta_score), math.log(e)
        return log_qw.exp() * (log_qw - log_pw) + log_ql.exp() * (log_ql - log_pl)
    chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
    if loss_type == "nca_pair":
        return -logsigmoid(chosen_rewards) - 0.5 * logsigmoid(-chosen_rewards) - 0.5 * logsigmoid(-rejected_rewards)
    if loss_type == "bco_pair":
        return -logsigmoid(chosen_rewards - bco_delta) - logsigmoid(-(rejected_rewards - bco_delta))
    if loss_type == "sppo_hard":
        return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2
    if loss_type == "apo_zero":
        return 1 - torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)
    if loss_type == "apo_down":
        losses_rejected = 1 - torch.sigmoid(beta * (chosen_logratios - rejected_logratios))
        return torch.sigmoid(beta * chosen_logratios) + losses_rejected
    assert loss_type == "discopop"
    logits = beta * delta_score
    modulation = torch.sigmoid(logits / discopop_tau)
    return -logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation
