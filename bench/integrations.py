"""Benchmarks of adapters beside the formulas that they stand in for: `pytest bench/integrations.py`.

Each case runs forward and backward in turns with the project's formula in plain torch, float32, losses summed.
Bytes are those that the loss must move (read student, write gradient: 2 x logits).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyalign.benchmark import copy_function, figures, interleaved, kept_memory
from pyalign.integrations.distillkit import sparse_kl_div
from pyalign.integrations.megatron import topk_kl_div
from pyalign.integrations.verl import compute_forward_kl_topk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(benchmark: Any, student: Tensor, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]):
    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss(student).sum().backward()

        return run

    functions = {"pyalign": step(ours), "eager": step(theirs)}
    if benchmark.disabled:
        functions["eager"]()
        benchmark(functions["pyalign"])
        return
    copy, copy_bytes = copy_function(student.detach())
    with kept_memory(48 * student.numel()) if DEVICE.type == "cpu" else contextlib.nullcontext():
        times = interleaved({**functions, "copy": copy}, DEVICE)
        benchmark.pedantic(functions["pyalign"], rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(figures(times, 8 * student.numel(), copy_bytes))


def inputs(small: bool, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V) logits that require grad; (N, k) log-probs and ids."""
    rows, vocab = (8, 1000) if small else (8192, 128256) if DEVICE.type == "cuda" else (1024, 32000)
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, vocab, device=DEVICE) for _ in range(2))
    top = torch.log_softmax(2.0 * teacher, -1).topk(k, -1)
    return student.requires_grad_(), top.values, top.indices


def test_verl_compute_forward_kl_topk(benchmark: Any) -> None:
    """With the figures beside the loss."""
    student, logprobs, ids = inputs(benchmark.disabled, 128)
    offsets = torch.tensor([0, ids.shape[0]], device=DEVICE)
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets=offsets) for x in (logprobs, ids)]
    config: Any = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None))

    def theirs(x: Tensor) -> Tensor:
        log_q_all = torch.log_softmax(x, -1)
        own = log_q_all.topk(128, -1).indices
        log_q = log_q_all.gather(-1, ids)
        token_kl = logprobs.exp() * (logprobs - log_q)
        overlap = (ids.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
        (-token_kl * overlap).sum(-1)
        log_q.exp().sum(-1)
        return token_kl.sum(-1)

    def ours(x: Tensor) -> Tensor:
        return compute_forward_kl_topk(x[None], *nested, config, "thd")["distillation_losses"]

    measure(benchmark, student, ours, theirs)


def test_megatron_topk_kl_div(benchmark: Any) -> None:
    student, logprobs, ids = inputs(benchmark.disabled, 64)

    def theirs(x: Tensor) -> Tensor:
        shifted = x - x.detach().amax(-1, keepdim=True)
        log_q = (shifted - shifted.exp().sum(-1, keepdim=True).log()).gather(-1, ids)
        rest = [(1.0 - y.exp().sum(-1, keepdim=True)).clamp(min=1e-8).log() for y in (logprobs, log_q)]
        p, q = torch.cat([logprobs, rest[0]], -1), torch.cat([log_q, rest[1]], -1)
        return (p.exp() * (p - q)).sum(-1)

    def ours(x: Tensor) -> Tensor:
        return topk_kl_div(x[:, None], logprobs[:, None], ids[:, None], 1, 0, None, add_ghost_token=True)

    measure(benchmark, student, ours, theirs)


def test_distillkit_sparse_kl_div(benchmark: Any) -> None:
    student, logprobs, ids = inputs(benchmark.disabled, 32)

    def theirs(x: Tensor) -> Tensor:
        log_q = x.gather(-1, ids) - x.logsumexp(-1, keepdim=True)
        log_p = torch.log_softmax(logprobs, -1)
        return (log_p.exp() * (log_p - log_q)).sum()

    measure(benchmark, student, lambda x: sparse_kl_div(x[None], ids[None], logprobs[None]), theirs)
