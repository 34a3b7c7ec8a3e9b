"""Time and peak memory of the distillation loss with its gradient: pyalign's, and the same in plain torch.

``python -m pyalign.context_distillation.loss_cost pyalign 768 49152 50 bfloat16 cpu`` measures in a process
of its own and prints JSON: there nothing else moves the peak.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from pyalign.benchmark import peak_extra_memory, seconds
from pyalign.distill import TopKLogprobs, topk_distillation_loss, topk_logprobs

IMPLEMENTATIONS = ("pyalign", "torch")


class LossCost(NamedTuple):
    """Of one call and its gradient with respect to the logits."""

    seconds: float  # median
    peak_bytes: int | None  # above the logits and the teacher's rows, the gradient included; None: not measurable here
    loss: float


def torch_topk_loss(logits: Tensor, teacher: TopKLogprobs) -> Tensor:
    """Mean KL(teacher || student) over k+1 categories as one writes it with torch: logits (T, V), teacher (T, k)."""
    log_q = torch.log_softmax(logits.float(), -1)
    indices = teacher.indices.long()
    rest = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, indices), rest], -1)
    assert teacher.residual is not None
    log_p = torch.cat([teacher.logprobs, teacher.residual[:, None]], -1).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def measure(implementation: str, rows: int, vocab: int, k: int, dtype: torch.dtype, device: torch.device) -> LossCost:
    """Measure in this process: on a CPU the peak is the resident set's, on a GPU that of torch's allocator."""
    if device.type == "cpu":
        _loss_and_gradient(implementation, *_inputs(8, 64, 4, dtype, device))  # loads code, starts threads
    logits, teacher = _inputs(rows, vocab, k, dtype, device)
    call = functools.partial(_loss_and_gradient, implementation, logits, teacher)
    try:
        peak = peak_extra_memory(call, device)
    except OSError:
        peak = None
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 20):
        times.append(seconds(call, device))
    return LossCost(statistics.median(times), peak, float(call()))


def measure_apart(
    implementation: str, rows: int, vocab: int, k: int, dtype: torch.dtype, device: torch.device
) -> LossCost:
    """``measure`` in a process of its own, with as many threads as this one uses."""
    name = str(dtype).removeprefix("torch.")
    arguments = [
        implementation,
        str(rows),
        str(vocab),
        str(k),
        name,
        str(device),
        str(torch.get_num_threads()),
    ]
    command = [sys.executable, "-m", __name__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"measuring the loss failed: {' '.join(command)}\n{result.stderr}")
    return LossCost(*json.loads(result.stdout.splitlines()[-1]))


def _inputs(rows: int, vocab: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, TopKLogprobs]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, vocab, dtype=dtype, device=device).normal_(0.0, 3.0, generator=generator)
    # The teacher's rows from a part at a time: its own logits would raise the peak before the loss runs.
    parts: list[TopKLogprobs] = []
    for part in logits.split(64):
        noise = torch.empty_like(part, dtype=torch.float32).normal_(generator=generator)
        parts.append(topk_logprobs(part + noise, k))
    residual = torch.cat([p.residual for p in parts if p.residual is not None])
    teacher = TopKLogprobs(torch.cat([p.logprobs for p in parts]), torch.cat([p.indices for p in parts]), residual)
    return logits.requires_grad_(), teacher


def _loss_and_gradient(implementation: str, logits: Tensor, teacher: TopKLogprobs) -> Tensor:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}; wanted {' or '.join(IMPLEMENTATIONS)}")
    function = topk_distillation_loss if implementation == "pyalign" else torch_topk_loss
    loss = function(logits, teacher)
    torch.autograd.grad(loss, logits)
    return loss.detach()


def main() -> None:
    implementation, rows, vocab, k, dtype, device = sys.argv[1:7]
    if len(sys.argv) > 7:
        torch.set_num_threads(int(sys.argv[7]))
    cost = measure(implementation, int(rows), int(vocab), int(k), getattr(torch, dtype), torch.device(device))
    print(json.dumps(cost))


if __name__ == "__main__":
    main()
