"""The C++ engines of the preference losses: tensors become pointers, sizes and strides here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyalign import _C
from pyalign._native import DTYPES, Module, OnCpu, OnCuda, pointer
from pyalign._tickets import gpu_tickets
from pyalign._types import (
    NO_PAIR_TENSORS,
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
    stores_both,
)


def _pointers(tensors: PairTensors) -> tuple[int, ...]:
    """(first_reference, second_reference, margin, labels, weight, mask, num_items, margin's stride)"""
    return (*map(pointer, tensors), 0 if tensors.margin is None else tensors.margin.dim())


def _both(x: Tensor | None) -> tuple[int, int]:
    """The rows of (2, N), or of (1, N) or (N,) the one; 0 for those that aren't there."""
    if x is None:
        return 0, 0
    first = x.data_ptr()
    return first, first + x.stride(0) * x.itemsize if x.dim() == 2 and x.shape[0] == 2 else 0


_ONE_BLOCK = 4096  # items that one block of a GPU does as fast as several
_NO_POINTERS = _pointers(NO_PAIR_TENSORS)


class _Engine(Module):
    """The engine functions (pair_loss, ranked_loss, score_gradient)."""

    def pair_workspace(self, count: int, device: torch.device) -> tuple[Tensor | None, ...]:
        """What a GPU kernel needs for the sums of its blocks: block_sums and ticket of csrc/common/ranking_args.h."""
        return None, None

    def rank_workspace(
        self, count: int, groups: int, largest: int, method: str, device: torch.device
    ) -> tuple[Tensor | None, ...]:
        """For groups of at most ``largest`` entries: group_loss, rows, stages, sorted and counters."""
        return None, None, None, None, None

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
        count, dtype = first.shape[0], accumulation_dtype(first.dtype)
        denominator = first.new_empty((), dtype=dtype)
        form, *numbers, reduction = options
        loss = first.new_empty((count,), dtype=dtype) if reduction == "none" else torch.empty_like(denominator)
        gradient = rewards = None
        if want_gradient:
            both = stores_both(options)
            gradient = first.new_empty((2, count), dtype=dtype) if both else torch.empty_like(first, dtype=dtype)
        if want_rewards:
            rewards = first.new_empty((1 if second is None else 2, count), dtype=dtype)
        workspace = self.pair_workspace(count, first.device)
        self._call(
            "pair_loss",
            first.device,
            (
                count,
                DTYPES[first.dtype],
                first.data_ptr(),
                pointer(second),
                *(_NO_POINTERS if tensors is NO_PAIR_TENSORS else _pointers(tensors)),
                REDUCTIONS.index(reduction),
            ),
            (PAIR_LOSSES.index(form), *numbers),
            (
                loss.data_ptr(),
                denominator.data_ptr(),
                *_both(gradient),
                *_both(rewards),
                *map(pointer, workspace),
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
        count = scores.numel()
        workspace = self.rank_workspace(count, groups, count if offsets is not None else size, options.method, device)
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
                *map(pointer, workspace),
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
        sides: int,
    ) -> list[Tensor]:
        """``sides`` times (N,) gradient * upstream / denominator as ``dtype``; upstream is () or one per group of
        ``size``. A gradient (N,) of two sides is that of the first, and of the second the negative."""
        one = gradient if gradient.dim() == 1 else gradient[0]
        result = torch.empty_like(one, dtype=dtype)
        results = [result] if sides == 1 else [result, torch.empty_like(result)]
        self._call(
            "score_gradient",
            gradient.device,
            (
                one.shape[0],
                upstream.numel() if upstream.dim() else 0,
                size,
                DTYPES[dtype],
                *_both(gradient),
                upstream.data_ptr(),
                upstream.dim() == 1,
                pointer(group_offsets),
                denominator.data_ptr(),
                result.data_ptr(),
                results[1].data_ptr() if sides == 2 else 0,
            ),
        )
        return results


class _Cpu(OnCpu, _Engine):
    pass


class _Cuda(OnCuda, _Engine):
    def pair_workspace(self, count: int, device: torch.device) -> tuple[Tensor | None, ...]:
        if count <= _ONE_BLOCK:
            return None, None
        return torch.empty(2, _C.cuda.pair_blocks, dtype=torch.float64, device=device), gpu_tickets(device)

    def rank_workspace(
        self, count: int, groups: int, largest: int, method: str, device: torch.device
    ) -> tuple[Tensor | None, ...]:
        group_loss, tickets = torch.empty(2, groups, device=device), gpu_tickets(device, 1 + groups)
        if method == "pairwise":
            return group_loss, torch.empty(2, count, device=device), None, None, tickets
        stages, in_global = torch.empty(3, count, device=device), None
        if largest > _C.cuda.shared_entries:
            in_global = torch.empty(2 * count * _C.cuda.sorted_bytes, dtype=torch.uint8, device=device)
        return group_loss, None, stages, in_global, tickets


@functools.cache
def cpu() -> _Engine:
    return _Cpu(_C.cpu)


@functools.cache
def cuda() -> _Engine:
    return _Cuda(_C.cuda)
