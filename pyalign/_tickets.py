"""Counters by which the blocks of a GPU kernel find out which of them is the last, of all or of a group's."""

from __future__ import annotations

import torch
from torch import Tensor

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def gpu_tickets(device: torch.device, count: int = 1) -> Tensor:
    """At least (count,) int32, 0 before a kernel and 0 after it.

    Kernels of one stream follow each other and share one. A graph that is being captured may later run beside them,
    and gets its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets or len(_tickets[key]) < count:
        _tickets[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _tickets[key]
