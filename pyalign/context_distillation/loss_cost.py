"""Time and peak memory of the distillation loss with its gradient: pyalign's, and the same in plain torch.

``python -m pyalign.context_distillation.loss_cost pyalign CASE``, CASE a ``LossCase`` in JSON, measures in a process
of its own and prints JSON: there nothing else moves the peak.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyalign.benchmark import peak_extra_memory, seconds
from pyalign.distill import TopKLogprobs, topk_distillation_loss, topk_logprobs

IMPLEMENTATIONS = ("pyalign", "torch")


@dataclass(frozen=True)
class LossCase:
    """A loss as it is trained: logits (rows, vocab) beside a teacher's k entries per row."""

    rows: int
    vocab: int
    k: int
    dtype: str  # of the logits, as "bfloat16"
    device: str
    threads: int
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    tail: str = "bucket"


class LossCost(NamedTuple):
    """Of one call and its gradient with respect to the logits."""

    seconds: float  # median
    peak_bytes: int | None  # above the logits and the teacher's rows, the gradient included; None: not measurable here
    loss: float


def torch_topk_loss(
    logits: Tensor, teacher: TopKLogprobs, *, divergence: str = "forward_kl", beta: float = 0.5, tail: str = "bucket"
) -> Tensor:
    """``topk_distillation_loss`` as one writes it with torch, a mean: logits (T, V), teacher (T, k)."""
    indices, log_p = teacher.indices.long(), teacher.logprobs
    if tail == "renormalize":
        log_q = torch.log_softmax(logits.gather(-1, indices).float() / teacher.temperature, -1)
        log_p = torch.log_softmax(log_p, -1)
    else:
        log_q_all = torch.log_softmax(logits.float() / teacher.temperature, -1)
        log_q = log_q_all.gather(-1, indices)
        if tail == "bucket" and indices.shape[-1] < logits.shape[-1]:
            rest = log_q_all.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
            log_q = torch.cat([log_q, rest], -1)
            assert teacher.residual is not None
            log_p = torch.log_softmax(torch.cat([log_p, teacher.residual[:, None]], -1), -1)
    if divergence == "forward_kl":
        loss = log_p.exp() * (log_p - log_q)
    elif divergence == "reverse_kl":
        loss = log_q.exp() * (log_q - log_p)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        loss = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    else:
        loss = 0.5 * (log_p.exp() - log_q.exp()).abs()
    return loss.sum(-1).mean()


def measure(implementation: str, case: LossCase) -> LossCost:
    """Measure in this process: on a CPU the peak is the resident set's, on a GPU that of torch's allocator."""
    device = torch.device(case.device)
    if device.type == "cpu":
        small = dataclasses.replace(case, rows=8, vocab=64, k=4)
        _call(implementation, small)()  # loads code, starts threads
    call = _call(implementation, case)
    try:
        peak = peak_extra_memory(call, device)
    except OSError:
        peak = None
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 20):
        times.append(seconds(call, device))
    return LossCost(statistics.median(times), peak, float(call()))


def measure_apart(implementation: str, case: LossCase) -> LossCost:
    """``measure`` in a process of its own.

    Raises:
        RuntimeError: that process failed, for want of memory perhaps; the last thing that it said.
    """
    command = [sys.executable, "-m", __name__, implementation, json.dumps(dataclasses.asdict(case))]
    # In the folder that holds this very package: ``-m`` looks in the present one first.
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if result.returncode < 0:
        raise RuntimeError(f"ended by {signal.Signals(-result.returncode).name}")
    if result.returncode:
        raise RuntimeError(result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}")
    return LossCost(*json.loads(result.stdout.splitlines()[-1]))


def _call(implementation: str, case: LossCase) -> functools.partial[Tensor]:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}; wanted {' or '.join(IMPLEMENTATIONS)}")
    return functools.partial(_loss_and_gradient, implementation, *_inputs(case), case)


def _inputs(case: LossCase) -> tuple[Tensor, TopKLogprobs]:
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(case.rows, case.vocab, dtype=getattr(torch, case.dtype), device=device)
    logits.normal_(0.0, 3.0, generator=generator)
    # The teacher's rows from a part at a time: its own logits would raise the peak before the loss runs.
    parts: list[TopKLogprobs] = []
    for part in logits.split(64):
        noise = torch.empty_like(part, dtype=torch.float32).normal_(generator=generator)
        parts.append(topk_logprobs(part + noise, case.k, temperature=case.temperature))
    teacher = TopKLogprobs(
        torch.cat([p.logprobs for p in parts]),
        torch.cat([p.indices for p in parts]),
        torch.cat([p.residual for p in parts if p.residual is not None]),
        case.temperature,
    )
    return logits.requires_grad_(), teacher


def _loss_and_gradient(implementation: str, logits: Tensor, teacher: TopKLogprobs, case: LossCase) -> Tensor:
    function = topk_distillation_loss if implementation == "pyalign" else torch_topk_loss
    loss = function(logits, teacher, divergence=case.divergence, beta=case.beta, tail=case.tail)
    torch.autograd.grad(loss, logits)
    return loss.detach()


def main() -> None:
    case = LossCase(**json.loads(sys.argv[2]))
    torch.set_num_threads(case.threads)
    print(json.dumps(measure(sys.argv[1], case)))


if __name__ == "__main__":
    main()
