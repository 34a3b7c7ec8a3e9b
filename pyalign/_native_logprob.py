"""The C++ engines of log-probs and cross-entropies: tensors become pointers, sizes and strides here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyalign import _C
from pyalign._native import Module, OnCpu, OnCuda, pointer, row_pointers
from pyalign._types import LogprobResults, accumulation_dtype

_NO_ROWS = (0, 0, 1, 0, 0)


class _Engine(Module):
    """The engine functions (logprob, logprob_gradient, cross_entropy).

    ``logits`` (..., V) are N rows behind at most two leading strides. ``targets`` (N,) int64, contiguous; a row whose
    target is ``ignore_index`` isn't read and gets zeros. What is (N,) besides is contiguous, in accumulation dtype.
    """

    def logprob(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        softcap: float | None,
        want_entropy: bool,
        want_state: bool,
    ) -> LogprobResults:
        count, dtype = targets.shape[0], accumulation_dtype(logits.dtype)
        logprob = torch.empty(count, dtype=dtype, device=logits.device)
        entropy = torch.empty(count, dtype=dtype, device=logits.device) if want_entropy else None
        state = torch.empty(count, 3, dtype=dtype, device=logits.device) if want_state else None
        self._run(
            logits, None, targets, ignore_index, (temperature, softcap or 0.0), logprob=logprob, entropy=entropy,
            state=state,
        )  # fmt: skip
        return LogprobResults(logprob, entropy, state)

    def logprob_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        softcap: float | None,
        state: Tensor | None,
        upstream_logprob: Tensor | None,
        upstream_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        """Writes the gradient into ``out``: of the logits' shape, or the logits themselves; of their dtype or, for
        float32 logits, any other. ``state`` is that of the forward pass; without it the rows are folded again."""
        self._run(
            logits, out, targets, ignore_index, (temperature, softcap or 0.0), given_state=state,
            upstream_logprob=upstream_logprob, upstream_entropy=upstream_entropy,
        )  # fmt: skip

    def cross_entropy(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        factor: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """(N,) losses and, in ``out`` (as in ``logprob_gradient``), ``factor`` times their gradient; ``factor`` is ()
        in accumulation dtype, read on the device."""
        loss = torch.empty(targets.shape[0], dtype=accumulation_dtype(logits.dtype), device=logits.device)
        options = (1.0, softcap or 0.0, label_smoothing, z_loss)
        self._run(logits, out, targets, ignore_index, options, factor=factor, row_loss=loss)
        return loss

    def logprob_slice(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        softcap: float | None,
        want_entropy: bool,
        want_above: bool,
    ) -> tuple[LogprobResults, Tensor | None]:
        """Of rows that are split: targets may be ELSEWHERE, for which entry 0 stands. Also (N,) sum (z - z_target)."""
        count, dtype = targets.shape[0], accumulation_dtype(logits.dtype)
        logprob = torch.empty(count, dtype=dtype, device=logits.device)
        entropy = torch.empty(count, dtype=dtype, device=logits.device) if want_entropy else None
        above = torch.empty(count, dtype=dtype, device=logits.device) if want_above else None
        state = torch.empty(count, 3, dtype=dtype, device=logits.device)
        self._run(
            logits, None, targets, ignore_index, (temperature, softcap or 0.0), logprob=logprob, entropy=entropy,
            state=state, above=above,
        )  # fmt: skip
        return LogprobResults(logprob, entropy, state), above

    def cross_entropy_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        state: Tensor,
        factor: Tensor | None,
        whole_vocab: int,
        out: Tensor,
    ) -> None:
        """``factor`` times the gradient of ``cross_entropy`` over a slice of rows whose merged state is ``state``."""
        unused = torch.empty(targets.shape[0], dtype=accumulation_dtype(logits.dtype), device=logits.device)
        options = (1.0, softcap or 0.0, label_smoothing, z_loss)
        self._run(
            logits, out, targets, ignore_index, options, given_state=state, factor=factor, row_loss=unused,
            whole_vocab=whole_vocab,
        )  # fmt: skip

    def _run(
        self,
        logits: Tensor,
        gradient: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        options: tuple[float, ...],
        *,
        given_state: Tensor | None = None,
        upstream_logprob: Tensor | None = None,
        upstream_entropy: Tensor | None = None,
        factor: Tensor | None = None,
        logprob: Tensor | None = None,
        entropy: Tensor | None = None,
        state: Tensor | None = None,
        row_loss: Tensor | None = None,
        above: Tensor | None = None,
        whole_vocab: int | None = None,
    ) -> None:
        count, vocab = targets.shape[0], logits.shape[-1]
        if count == 0:
            return
        in_place = gradient is logits
        logits, logit_rows = row_pointers(logits)
        gradient_rows = _NO_ROWS
        if gradient is not None:
            gradient_rows = logit_rows if in_place else row_pointers(gradient)[1]
        temperature, softcap, label_smoothing, z_loss = (*options, 0.0, 0.0)[:4]
        self._call(
            "logprob",
            logits.device,
            logit_rows,
            gradient_rows,
            (
                count,
                targets.data_ptr(),
                ignore_index,
                *map(pointer, (given_state, upstream_logprob, upstream_entropy, factor)),
            ),
            (vocab, temperature, softcap, label_smoothing, z_loss, whole_vocab or vocab),
            tuple(map(pointer, (logprob, entropy, state, row_loss, above))),
        )


class _Cpu(OnCpu, _Engine):
    pass


class _Cuda(OnCuda, _Engine):
    pass


@functools.cache
def cpu() -> _Engine:
    return _Cpu(_C.cpu)


@functools.cache
def cuda() -> _Engine:
    return _Cuda(_C.cuda)
