"""Reward heads, win probabilities, the best of n, and the metrics of pairs."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalign import best_of_n, expected_win_rates, preference_metrics, reward_scores, win_probabilities
from pyalign.benchmark.case import Case, Draw, Function, Inputs, Outputs, Shape, Work, widened

MATRICES = ((4096, 16), (1024, 64), (1, 4096))


def cases(device: torch.device) -> list[Case]:
    return [*heads(), *win_matrices(), *win_rates(), *best(), *metrics()]


# ---- Reward heads ----


def _make_head(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    sequences, length, width = shape["sequences"], shape["length"], shape["width"]
    lengths = draw.integers(1, length, sequences, 1)
    return {
        "hidden": draw.normal(sequences, length, width, dtype=dtype),
        "weight": draw.normal(width),
        "mask": (torch.arange(length, device=draw.device) < lengths).long(),
    }


def _last(mask: Tensor) -> Tensor:
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def gathered_head(x: Inputs) -> Tensor:
    """The rows are gathered, then multiplied."""
    hidden = x["hidden"]
    rows = hidden[torch.arange(hidden.shape[0], device=hidden.device), _last(x["mask"])]
    return widened(rows) @ widened(x["weight"])


def head_of_all_tokens(x: Inputs) -> Tensor:
    """As transformers' classifiers do: the head over every token, of which one is kept."""
    hidden = x["hidden"]
    logits = F.linear(hidden, x["weight"].to(hidden.dtype)[None]).squeeze(-1)
    return widened(logits[torch.arange(hidden.shape[0], device=hidden.device), _last(x["mask"])])


def _our_head(x: Inputs) -> Tensor:
    return reward_scores(x["hidden"], x["weight"], mask=x["mask"])


def _head_work(case: Case) -> Work:
    """A row of each sequence and the mask read; backward writes the gradient of all hidden states."""
    sequences, length, width = case.shape["sequences"], case.shape["length"], case.shape["width"]
    moved = sequences * width * case.dtype.itemsize + 8 * sequences * length
    if not case.leaves:
        return Work(moved, 2 * sequences * width)
    return Work(moved + case.elements() * case.dtype.itemsize, 5 * sequences * width)


def heads() -> list[Case]:
    """64 sequences of up to 512 tokens."""
    return [
        Case(
            system="scoring", op="reward_scores", variant="", dtype=dtype,
            shape={"sequences": 64, "length": 512, "width": 1024}, leaves=leaves, make=_make_head, ours=_our_head,
            eager={"eager": gathered_head, "eager all tokens": head_of_all_tokens}, work=_head_work,
            checked_at={"length": 16}, tiny={"sequences": 2, "length": 8, "width": 64},
            quick={"length": 64} if leaves and dtype == torch.float32 else None, kept_bytes=1 << 30,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for leaves in ((), ("hidden", "weight"))
    ]  # fmt: skip


# ---- Groups ----


def _make_scores(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    return {"scores": draw.normal(shape["groups"], shape["size"], dtype=dtype)}


def torch_matrix(x: Inputs) -> Tensor:
    scores = widened(x["scores"])
    return torch.sigmoid(scores[:, :, None] - scores[:, None, :])


def torch_rates(x: Inputs) -> Tensor:
    return (torch_matrix(x).sum(2) - 0.5) / (x["scores"].shape[1] - 1)


def _our_matrix(x: Inputs) -> Tensor:
    return win_probabilities(x["scores"])


def _our_rates(x: Inputs) -> Tensor:
    return expected_win_rates(x["scores"])


def _matrix_work(case: Case) -> Work:
    """The matrix written, its gradient read; a difference, exp, sum and quotient, three more for the gradient."""
    entries = case.elements() * case.shape["size"]
    return Work((2 if case.leaves else 1) * entries * 4, (7 if case.leaves else 4) * entries)


def _rates_work(case: Case) -> Work:
    entries = case.elements() * case.shape["size"]
    return Work((4 if case.leaves else 2) * case.elements() * 4, (7 if case.leaves else 4) * entries)


def _group_cases(op: str, ours: Function, eager: Function, bound: str, quick: Shape) -> list[Case]:
    return [
        Case(
            system="scoring", op=op, variant="", shape={"groups": groups, "size": size}, dtype=torch.float32,
            leaves=leaves, make=_make_scores, ours=ours, eager={"eager": eager},
            work=_matrix_work if ours is _our_matrix else _rates_work, checked_at={"size": min(size, 256)},
            tiny={"groups": 2, "size": 8}, quick=quick if leaves and size == MATRICES[0][1] else None, bound=bound,
            kept_bytes=1 << 30,
        )
        for leaves in ((), ("scores",))
        for groups, size in MATRICES
    ]  # fmt: skip


def win_matrices() -> list[Case]:
    return _group_cases("win_probabilities", _our_matrix, torch_matrix, "memory", {"groups": 1024})


def win_rates() -> list[Case]:
    return _group_cases("expected_win_rates", _our_rates, torch_rates, "calls", {})


def _make_ragged(shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    sizes = draw.integers(1, 33, shape["groups"])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return {"scores": draw.normal(int(offsets[-1]), dtype=dtype), "offsets": offsets}


def best_in_a_loop(x: Inputs) -> Tensor:
    bounds = itertools.pairwise(x["offsets"].tolist())
    return torch.stack([begin + x["scores"][begin:end].argmax() for begin, end in bounds])


def _our_best(x: Inputs) -> Tensor:
    return best_of_n(x["scores"], x["offsets"])


def best() -> list[Case]:
    """Groups of 1 to 32."""
    return [
        Case(
            system="scoring", op="best_of_n", variant="ragged", shape={"groups": 10_000}, dtype=torch.float32,
            make=_make_ragged, ours=_our_best, eager={"python loop": best_in_a_loop},
            # a group holds 16.5 scores on average, an offset and a result
            work=lambda case: Work(82 * case.elements(), 17 * case.elements()),
            checked_at={"groups": 50}, tiny={"groups": 50}, quick={"groups": 1000}, bound="calls", compiled=False,
        )
    ]  # fmt: skip


# ---- Metrics ----


def _make_margins(categories: int, shape: Shape, dtype: torch.dtype, draw: Draw) -> Inputs:
    made = {name: draw.normal(shape["pairs"], dtype=dtype) for name in ("chosen", "rejected")}
    if categories:
        made["category"] = draw.integers(0, categories, shape["pairs"])
    return made


def _torch_metrics(chosen: Tensor, rejected: Tensor) -> Tensor:
    z = chosen - rejected
    right = (z > 0).to(z.dtype) + 0.5 * (z == 0).to(z.dtype)
    confidence = torch.sigmoid(z.abs())
    index = ((confidence - 0.5) * 20).long().clamp(max=9)
    confident, correct = (z.new_zeros(10).index_add(0, index, x) for x in (confidence, right))
    ece = (confident - correct).abs().sum() / z.shape[0]
    return torch.stack([right.mean(), F.softplus(-z).mean(), torch.sigmoid(-z).square().mean(), ece])


def torch_metrics(categories: int, x: Inputs) -> Outputs:
    """Accuracy, log-loss, Brier score and calibration error, in the scores' own dtype; of each category too."""
    chosen, rejected = x["chosen"], x["rejected"]
    whole = _torch_metrics(chosen, rejected)
    if not categories:
        return whole
    parts = [x["category"] == i for i in range(categories)]
    return torch.stack([whole, *(_torch_metrics(chosen[part], rejected[part]) for part in parts)])


def _our_metrics(x: Inputs) -> Outputs:
    whole = preference_metrics(x["chosen"], x["rejected"], category=x.get("category"))
    found = [whole, *whole.slices.values()]
    figures = [torch.stack([y.accuracy, y.log_loss, y.brier, y.ece]) for y in found]
    return torch.stack(figures) if "category" in x else figures[0]


def metrics() -> list[Case]:
    found: list[Case] = []
    for pairs in (100_000, 10_000_000):
        for categories in (0, 20):
            eager = functools.partial(torch_metrics, categories)
            case = Case(
                system="scoring", op="preference_metrics", variant=f"{categories} categories" if categories else "",
                shape={"pairs": pairs}, dtype=torch.float32, make=functools.partial(_make_margins, categories),
                ours=_our_metrics, eager={"eager": eager},
                work=lambda case: Work(case.elements() * (16 if case.variant else 8), 14 * case.elements()),
                checked_at={"pairs": 100_000}, tiny={"pairs": 1000}, quick={} if pairs == 100_000 else None,
                compiled=False, kept_bytes=1 << 30,
            )  # fmt: skip
            found.append(case)
    return found
