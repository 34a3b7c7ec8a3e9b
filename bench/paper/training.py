"""What every experiment trains with: one optimiser loop, the losses over framed sequences, and scores in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.paper.model import Transformer
from bench.paper.tasks import generator
from pyalign import linear_cross_entropy, linear_token_logprobs, preference_metrics, sequence_logprobs

IGNORED = -100
_BATCH = 512


def build(shape: Sequence[int], vocab: int, seed: int, device: str) -> Transformer:
    """``shape`` is width, layers, heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator(seed, 4))))
        return Transformer(vocab, *shape).to(device)


def restore(shape: Sequence[int], vocab: int, state: Mapping[str, Tensor], device: str) -> Transformer:
    model = build(shape, vocab, 0, device)
    model.load_state_dict(state)
    return model


def step_seconds(shape: Sequence[int], tokens: int, vocab: int = 40) -> float:
    """What a training step of so many tokens takes on one core; constants fitted to steps timed with AVX-512."""
    width, layers, _ = shape
    parameters = 12 * layers * width**2 + vocab * width
    return 0.003 + tokens * (1e-10 * parameters + 3e-8 * width * layers)


def evaluation_seconds(shape: Sequence[int], tokens: int, vocab: int = 40) -> float:
    """What scores of so many tokens take: a forward pass, a third of a step."""
    return step_seconds(shape, tokens, vocab) / 3


def optimise(model: Transformer, steps: int, rate: float, loss_of: Callable[[int], Tensor], warm_up: int = 20) -> None:
    """AdamW over ``steps`` calls of ``loss_of(step)``: linear warm-up, linear decay to 0, gradients clipped at 1."""
    used = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(used, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    warm_up = min(warm_up, max(1, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(used, 1.0)
        optimizer.step()
        schedule.step()


def targets_from(tokens: Tensor, first: int) -> Tensor:
    """(B, S - 1) what positions of ``tokens[:, :-1]`` predict, counted from token ``first`` on, without the end."""
    targets = tokens[:, 1:].clone()
    targets[:, : first - 1] = IGNORED
    targets[:, -1] = IGNORED
    return targets


def language_loss(model: Transformer, hidden: Tensor, targets: Tensor, *, per_sequence: bool) -> Tensor:
    """Token NLLs of hidden (B, S, H), a mean over tokens, or summed over each sequence with a mean over these."""
    count = len(targets) if per_sequence else None
    return linear_cross_entropy(hidden, model.embedding.weight, targets, ignore_index=IGNORED, num_items=count)


@torch.no_grad()
def scores(model: Transformer, tokens: Tensor) -> Tensor:
    """(B,) what the preference model gives."""
    device = model.embedding.weight.device
    return torch.cat([model.score(model(part.to(device))) for part in tokens.split(_BATCH)])


@torch.no_grad()
def mean_logprobs(model: Transformer, tokens: Tensor, first: int) -> Tensor:
    """(B,) mean log-prob per token of tokens ``first`` and following: how imitation ranks."""
    device = model.embedding.weight.device
    found = []
    for part in tokens.to(device).split(_BATCH):
        targets = targets_from(part, first)
        token = linear_token_logprobs(model(part[:, :-1]), model.embedding.weight, targets, ignore_index=IGNORED)
        found.append(sequence_logprobs(token, mask=targets != IGNORED, average=True))
    return torch.cat(found)


def measured(chosen: Tensor, rejected: Tensor) -> dict[str, Any]:
    """Accuracy (ties a half) and calibration of scores as JSON."""
    found = preference_metrics(chosen, rejected).to_dict()
    return {name: found[name] for name in ("accuracy", "pairs", "log_loss", "ece")}
