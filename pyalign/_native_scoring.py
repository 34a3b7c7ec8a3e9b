"""The C++ engines of scoring: tensors become pointers, sizes and strides here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyalign import _C
from pyalign._native import DTYPES, Module, OnCpu, OnCuda, pointer, row_pointers
from pyalign._types import GROUP_OPS, STATISTICS, MetricOptions, MetricTensors, RewardGradients

_NO_ROWS = (0, 0, 1, 0, 0)


class _Engine(Module):
    """The engine functions (reward_scores, reward_gradient, score_groups, preference_metrics)."""

    def pieces(self, count: int, cells: int, device: torch.device) -> int:
        """How many tables of sums the engine fills for ``count`` pairs; the caller adds them up."""
        return 1

    def reward_scores(
        self, hidden: Tensor, head: Tensor, bias: Tensor | None, offsets: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, C) scores and (B,) the rows that were read, -1 for none."""
        length = 0 if offsets is not None else hidden.shape[1]
        sequences = hidden.shape[0] if offsets is None else offsets.shape[0] - 1
        heads, width = head.shape
        count = hidden.shape[:-1].numel()
        scores = torch.empty(sequences, heads, dtype=head.dtype, device=hidden.device)
        last = torch.empty(sequences, dtype=torch.int64, device=hidden.device)
        hidden, rows = row_pointers(hidden)
        self._call(
            "reward_scores",
            hidden.device,
            rows,
            (
                count,
                width,
                sequences,
                heads,
                pointer(offsets),
                pointer(mask),
                length,
                head.data_ptr(),
                pointer(bias),
            ),
            (last.data_ptr(), scores.data_ptr()),
        )
        return scores, last

    def reward_gradient(
        self,
        upstream: Tensor,
        last: Tensor,
        hidden: Tensor | None,
        head: Tensor | None,
        count: int,
        dtype: torch.dtype,
        want_bias: bool,
    ) -> RewardGradients:
        """Gradients of ``count`` hidden states if the head is given, of the head if they are, of the bias if wanted."""
        sequences, heads = upstream.shape
        wide, device = upstream.dtype, upstream.device
        given = head if hidden is None else hidden
        width = 0 if given is None else given.shape[-1]
        by_hidden = None if head is None else torch.empty(count, width, dtype=dtype, device=device)
        by_head = None if hidden is None else torch.empty(heads, width, dtype=wide, device=device)
        by_bias = torch.empty(heads, dtype=wide, device=device) if want_bias else None
        rows = _NO_ROWS
        if hidden is not None:
            hidden, rows = row_pointers(hidden)
        self._call(
            "reward_gradient",
            device,
            rows,
            (DTYPES[dtype], count, width, sequences, heads, last.data_ptr(), pointer(head), upstream.data_ptr()),
            (pointer(by_hidden), pointer(by_head), pointer(by_bias)),
        )
        return RewardGradients(by_hidden, by_head, by_bias)

    def score_groups(
        self,
        op: str,
        scores: Tensor,
        offsets: Tensor | None,
        blocks: Tensor | None,
        upstream: Tensor | None,
        scale: float,
        result: Tensor,
    ) -> None:
        """Writes ``result``: see csrc/common/scoring_args.h."""
        groups, size = scores.shape if offsets is None else (offsets.shape[0] - 1, 0)
        self._call(
            "score_groups",
            scores.device,
            (
                GROUP_OPS.index(op),
                groups,
                size,
                scores.numel(),
                DTYPES[scores.dtype],
                scores.data_ptr(),
                pointer(offsets),
                pointer(blocks),
                scale,
                pointer(upstream),
                result.data_ptr(),
            ),
        )

    def preference_metrics(
        self, chosen: Tensor, rejected: Tensor, tensors: MetricTensors, options: MetricOptions
    ) -> Tensor:
        """(categories, bins + 1, 8) float64 sums of ``STATISTICS``."""
        cells = (options.categories, options.bins + 1, len(STATISTICS))
        count = chosen.shape[0]
        pieces = self.pieces(count, options.categories * (options.bins + 1), chosen.device)
        table = torch.empty(pieces, *cells, dtype=torch.float64, device=chosen.device)
        self._call(
            "preference_metrics",
            chosen.device,
            (
                count,
                options.categories,
                options.bins,
                DTYPES[chosen.dtype],
                chosen.data_ptr(),
                rejected.data_ptr(),
                pointer(tensors.margin),
                pointer(tensors.weight),
                pointer(tensors.mask),
                pointer(tensors.category),
                options.scale,
                options.margin,
                pieces,
                table.data_ptr(),
            ),
        )
        return table[0] if pieces == 1 else table.sum(0)


class _Cpu(OnCpu, _Engine):
    pass


class _Cuda(OnCuda, _Engine):
    def pieces(self, count: int, cells: int, device: torch.device) -> int:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        room = max((1 << 22) // (cells * len(STATISTICS)), 1)
        return max(min(-(-count // 4096), 4 * processors, room), 1)


@functools.cache
def cpu() -> _Engine:
    return _Cpu(_C.cpu)


@functools.cache
def cuda() -> _Engine:
    return _Cuda(_C.cuda)
