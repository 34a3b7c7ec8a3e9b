"""Counters by which the blocks of a GPU kernel find out which of them is the last."""

from __future__ import annotations

import torch
from torch import Tensor

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def gpu_ticket(device: torch.device) -> Tensor:
    """() int32, 0 before a kernel and 0 after it.

    Kernels of one stream follow each other and share one. A graph that is being captured may later run beside them,
    and gets its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros((), dtype=torch.int32, device=device)
    return _tickets[key]
