"""The C++ engines of the preference losses: tensors become pointers, sizes and strides here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyalign import _C
from pyalign._tickets import gpu_ticket
from pyalign._types import (
    PAIR_LOSSES,
    RANK_METHODS,
    REDUCTIONS,
    PairOptions,
    PairResults,
    PairTensors,
    RankOptions,
    RankResults,
    RankTensors,
    accumulation_dtype,
)

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Engine:
    """The engine functions over one submodule of ``_C``."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        """``_C``'s function, told where to run: a thread count or a stream."""
        getattr(self._module, name)(*arguments, torch.get_num_threads())

    def ticket(self, device: torch.device) -> Tensor | None:
        """() int32, 0: how the blocks of a GPU kernel find out which of them is the last."""
        return None

    def pair_loss(
        self,
        first: Tensor,
        second: Tensor | None,
        tensors: PairTensors,
        options: PairOptions,
        *,
        want_gradient: bool,
        want_rewards: bool,
    ) -> PairResults:
        count, dtype, device = first.shape[0], accumulation_dtype(first.dtype), first.device
        sides = 1 if second is None else 2
        loss = torch.empty((count,) if options.reduction == "none" else (), dtype=dtype, device=device)
        denominator = torch.empty((), dtype=dtype, device=device)
        gradient = torch.empty(sides, count, dtype=dtype, device=device) if want_gradient else None
        rewards = torch.empty(sides, count, dtype=dtype, device=device) if want_rewards else None
        form, *numbers, reduction = options
        reward = _pointer(rewards)
        self._call(
            "pair_loss",
            device,
            (
                count,
                _DTYPE[first.dtype],
                first.data_ptr(),
                _pointer(second),
                _pointer(tensors.first_reference),
                _pointer(tensors.second_reference),
                _pointer(tensors.margin),
                0 if tensors.margin is None else tensors.margin.dim(),
                _pointer(tensors.labels),
                _pointer(tensors.weight),
                _pointer(tensors.mask),
                REDUCTIONS.index(reduction),
                _pointer(tensors.num_items),
            ),
            (PAIR_LOSSES.index(form), *numbers),
            (
                loss.data_ptr(),
                denominator.data_ptr(),
                _pointer(gradient),
                reward,
                reward + count * dtype.itemsize if rewards is not None and sides == 2 else 0,
            ),
        )
        return PairResults(loss, denominator, gradient, rewards)

    def ranked_loss(
        self, scores: Tensor, tensors: RankTensors, options: RankOptions, *, want_gradient: bool
    ) -> RankResults:
        dtype, device, offsets = accumulation_dtype(scores.dtype), scores.device, tensors.group_offsets
        groups, size = scores.shape if offsets is None else (offsets.shape[0] - 1, 0)
        loss = torch.empty((groups,) if options.reduction == "none" else (), dtype=dtype, device=device)
        denominator = torch.empty((), dtype=dtype, device=device)
        gradient = torch.empty(scores.numel(), dtype=dtype, device=device) if want_gradient else None
        ticket = self.ticket(device)
        group_loss = stages = None
        if ticket is not None:
            group_loss = torch.empty(2, groups, dtype=dtype, device=device)
            stages = None if options.method == "pairwise" else torch.empty(3, scores.numel(), device=device)
        method, *numbers, reduction = options
        self._call(
            "ranked_loss",
            device,
            (
                groups,
                size,
                scores.numel(),
                _DTYPE[scores.dtype],
                scores.data_ptr(),
                tensors.ranks.data_ptr(),
                _pointer(offsets),
                REDUCTIONS.index(reduction),
                _pointer(tensors.num_items),
            ),
            (RANK_METHODS.index(method), *numbers),
            (
                loss.data_ptr(),
                denominator.data_ptr(),
                _pointer(gradient),
                _pointer(group_loss),
                _pointer(stages),
                _pointer(ticket),
            ),
        )
        return RankResults(loss, denominator, gradient)

    def score_gradient(
        self,
        gradient: Tensor,
        upstream: Tensor,
        denominator: Tensor,
        group_offsets: Tensor | None,
        size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """(rows, N) gradient * upstream / denominator as ``dtype``; upstream is () or one per group of ``size``."""
        rows, count = gradient.shape
        result = torch.empty(rows, count, dtype=dtype, device=gradient.device)
        self._call(
            "score_gradient",
            gradient.device,
            (
                rows,
                count,
                upstream.numel() if upstream.dim() else 0,
                size,
                _DTYPE[dtype],
                gradient.data_ptr(),
                upstream.data_ptr(),
                upstream.dim() == 1,
                _pointer(group_offsets),
                denominator.data_ptr(),
                result.data_ptr(),
            ),
        )
        return result


class _Cuda(_Engine):
    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        with torch.cuda.device(device):
            getattr(self._module, name)(*arguments, torch.cuda.current_stream(device).cuda_stream)

    def ticket(self, device: torch.device) -> Tensor | None:
        return gpu_ticket(device)


@functools.cache
def cpu() -> _Engine:
    return _Engine(_C.cpu)


@functools.cache
def cuda() -> _Engine:
    return _Cuda(_C.cuda)
