"""What losses need to know of other processes: who holds which part of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pyalign import _checks

__all__ = ["VocabularyShards"]


class VocabularyShards:
    """A vocabulary that is split over the ranks of a process group: ``process_group=`` of the losses.

    Rank r holds ``sizes[r]`` neighbouring entries, after those of the lower ranks. A bare process group does too; then
    every call asks all ranks for their sizes, a small collective that the host waits for. With the sizes known nothing
    is asked, and torch.compile and CUDA graphs can take the call::

        shards = VocabularyShards(group, [32064] * 4)
        loss = distillation_loss(student_logits, teacher_logits, process_group=shards)

    Args:
        process_group: a ``torch.distributed`` process group that this rank is in, or a 1-D DeviceMesh.
        sizes: the number of entries that each rank holds, 0 among them.

    Raises:
        ValueError, TypeError: no such group; sizes that aren't one int >= 0 for each of its ranks.
    """

    def __init__(self, process_group: Any, sizes: Sequence[int]) -> None:
        if isinstance(process_group, dist.DeviceMesh):
            process_group = process_group.get_group()
        if not isinstance(process_group, dist.ProcessGroup):
            wanted = "a torch.distributed process group that this rank is in, or a 1-D DeviceMesh"
            _checks.refuse("process_group", type(process_group).__name__, wanted, TypeError)
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes)
        if len(sizes) != process_group.size() or not whole or sum(sizes) == 0:
            wanted = f"an int >= 0 for each of the group's {process_group.size()} ranks, not all of them 0"
            _checks.refuse("sizes", repr(sizes), wanted)
        self.group_name: str = process_group.group_name
        self.sizes = tuple(sizes)
        self.rank: int = process_group.rank()

    def __repr__(self) -> str:
        return f"VocabularyShards({self.group_name!r}, {list(self.sizes)})"
