"""The C++ engines of the preference losses: tensors become pointers, sizes and strides here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyalign import _C
from pyalign._native import DTYPES, Module, OnCpu, OnCuda, pointer
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


class _Engine(Module):
    """The engine functions (pair_loss, ranked_loss, score_gradient)."""

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
        loss = first.new_empty((count,) if options.reduction == "none" else (), dtype=dtype)
        denominator = first.new_empty((), dtype=dtype)
        gradient = first.new_empty((sides, count), dtype=dtype) if want_gradient else None
        rewards = first.new_empty((sides, count), dtype=dtype) if want_rewards else None
        form, *numbers, reduction = options
        reward = pointer(rewards)
        self._call(
            "pair_loss",
            device,
            (
                count,
                DTYPES[first.dtype],
                first.data_ptr(),
                pointer(second),
                pointer(tensors.first_reference),
                pointer(tensors.second_reference),
                pointer(tensors.margin),
                0 if tensors.margin is None else tensors.margin.dim(),
                pointer(tensors.labels),
                pointer(tensors.weight),
                pointer(tensors.mask),
                REDUCTIONS.index(reduction),
                pointer(tensors.num_items),
            ),
            (PAIR_LOSSES.index(form), *numbers),
            (
                loss.data_ptr(),
                denominator.data_ptr(),
                pointer(gradient),
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
                DTYPES[scores.dtype],
                scores.data_ptr(),
                tensors.ranks.data_ptr(),
                pointer(offsets),
                REDUCTIONS.index(reduction),
                pointer(tensors.num_items),
            ),
            (RANK_METHODS.index(method), *numbers),
            (
                loss.data_ptr(),
                denominator.data_ptr(),
                pointer(gradient),
                pointer(group_loss),
                pointer(stages),
                pointer(ticket),
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
                DTYPES[dtype],
                gradient.data_ptr(),
                upstream.data_ptr(),
                upstream.dim() == 1,
                pointer(group_offsets),
                denominator.data_ptr(),
                result.data_ptr(),
            ),
        )
        return result


class _Cpu(OnCpu, _Engine):
    pass


class _Cuda(OnCuda, _Engine):
    def ticket(self, device: torch.device) -> Tensor | None:
        return gpu_ticket(device)


@functools.cache
def cpu() -> _Engine:
    return _Cpu(_C.cpu)


@functools.cache
def cuda() -> _Engine:
    return _Cuda(_C.cuda)
