"""The C++ engines behind ``pyalign._C``: tensors become pointers, sizes and strides here, and nowhere else."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyalign import _C, _tables
from pyalign._types import (
    DIVERGENCES,
    REDUCTIONS,
    TAILS,
    Options,
    Results,
    Tokens,
    accumulation_dtype,
    rows,
)

_ONE_STRIDE = 1 << 62  # rows up to this number are reached by the inner stride alone
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def row_pointers(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """The tensor that holds the rows (``x`` or its one copy) and how C++ finds them in it."""
    if x.is_contiguous():
        return x, (x.data_ptr(), DTYPES[x.dtype], _ONE_STRIDE, 0, x.shape[-1])
    tensor, _, inner, outer_stride, inner_stride = rows(x)
    return tensor, (tensor.data_ptr(), DTYPES[x.dtype], inner, outer_stride, inner_stride)


def _options(options: Options) -> tuple[Any, ...]:
    vocab, divergence, *rest = options
    return (vocab, DIVERGENCES.index(divergence), *rest)


class _Outputs:
    """Allocates what an engine writes beside the gradient."""

    def __init__(self, like: Tensor, count: int, tokens: Tokens, want_loss: bool, want_metrics: bool) -> None:
        dtype = accumulation_dtype(like.dtype)
        self.denominator = torch.empty((), dtype=dtype, device=like.device)
        self.loss = self.row_loss = self.entropy = self.agreement = None
        if want_loss:
            self.loss = torch.empty((count,) if tokens.reduction == "none" else (), dtype=dtype, device=like.device)
            if tokens.reduction != "none":
                # Never a null pointer, which would mean "not wanted": the mean of no rows is written too.
                self.row_loss = torch.empty(max(count, 1), dtype=dtype, device=like.device)
        if want_metrics:
            self.entropy = torch.empty(count, dtype=dtype, device=like.device)
            self.agreement = torch.empty(count, dtype=torch.bool, device=like.device)

    def pointers(self) -> tuple[int, ...]:
        outputs = (self.loss, self.row_loss, self.denominator, self.entropy, self.agreement)
        return tuple(pointer(x) for x in outputs)

    def results(self) -> Results:
        return Results(self.loss, self.entropy, self.agreement)


class Module:
    """One submodule of ``_C``; engines over it derive from ``OnCpu`` or ``OnCuda``, which say where to run."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        """``_C``'s function, told where to run: a thread count or a stream."""
        raise NotImplementedError


class OnCpu(Module):
    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        getattr(self._module, name)(*arguments, torch.get_num_threads())


class OnCuda(Module):
    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        with torch.cuda.device(device):
            getattr(self._module, name)(*arguments, torch.cuda.current_stream(device).cuda_stream)


class _Engine(Module):
    """The engine functions (distill, topk_distill, topk, scale)."""

    def distill(
        self,
        student: Tensor,
        teacher: Tensor,
        tokens: Tokens,
        options: Options,
        *,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
    ) -> Results:
        teacher, teacher_rows = row_pointers(teacher)
        teacher_count = teacher.shape[:-1].numel()
        return self._loss(
            "distill",
            student,
            (teacher_rows,),
            teacher_count,
            tokens,
            options,
            gradient,
            want_loss,
            want_metrics,
        )

    def topk_distill(
        self,
        student: Tensor,
        logprobs: Tensor,
        indices: Tensor,
        residual: Tensor | None,
        tail: str,
        tokens: Tokens,
        options: Options,
        *,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
    ) -> Results:
        logprobs, indices = logprobs.contiguous(), indices.contiguous()
        residual = None if residual is None else residual.contiguous()
        k = indices.shape[-1]
        teacher = (
            k,
            logprobs.data_ptr(),
            indices.data_ptr(),
            pointer(residual),
            DTYPES[logprobs.dtype],
            DTYPES[logprobs.dtype if residual is None else residual.dtype],
            indices.dtype == torch.int64,
        )
        return self._loss(
            "topk_distill",
            student,
            (teacher, TAILS.index(tail)),
            indices.shape[:-1].numel(),
            tokens,
            options,
            gradient,
            want_loss,
            want_metrics,
        )

    def _loss(
        self,
        name: str,
        student: Tensor,
        teacher: tuple[Any, ...],
        teacher_count: int,
        tokens: Tokens,
        options: Options,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
        *more: tuple[Any, ...],
    ) -> Results:
        count = student.shape[:-1].numel()
        outputs = _Outputs(student, count, tokens, want_loss, want_metrics)
        in_place = gradient is student
        student, student_rows = row_pointers(student)
        gradient_rows = (0, 0, 1, 0, 0)
        if in_place:
            gradient_rows = student_rows
        elif gradient is not None:
            gradient_rows = row_pointers(gradient)[1]
        mask, labels, teacher_index, weight, targets, num_items, upstream, ignore_index, reduction = tokens
        self._call(
            name,
            student.device,
            student_rows,
            *teacher,
            (
                count,
                *map(pointer, (mask, labels, teacher_index, weight, targets)),
                ignore_index,
                teacher_count,
                REDUCTIONS.index(reduction),
                pointer(num_items),
                pointer(upstream),
            ),
            (gradient_rows, student.shape[-1], *outputs.pointers()),
            _options(options),
            *more,
        )
        return outputs.results()

    def topk(self, logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        count, dtype = logits.shape[:-1].numel(), accumulation_dtype(logits.dtype)
        logits, logit_rows = row_pointers(logits)
        logprobs = torch.empty(count, k, dtype=dtype, device=logits.device)
        indices = torch.empty(count, k, dtype=torch.int64, device=logits.device)
        residual = torch.empty(count, dtype=dtype, device=logits.device)
        pointers = (logprobs.data_ptr(), indices.data_ptr(), residual.data_ptr())
        self._call("topk", logits.device, logit_rows, count, logits.shape[-1], k, temperature, *pointers)
        return logprobs, indices, residual

    def scale(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor in place, reading the 0-dim ``factor`` on the device; ``x`` is dense, or rows of two strides."""
        count, width = (1, x.numel()) if x.is_contiguous() else (x.shape[:-1].numel(), x.shape[-1])
        matrix = (x.data_ptr(), DTYPES[x.dtype], 1, 0, 0) if count == 1 else row_pointers(x)[1]
        self._call("scale", x.device, matrix, count, width, factor.data_ptr())


STAGES = ("whole", "fold", "sum", "map")  # csrc/common/distill_args.h


class _Cpu(OnCpu, _Engine):
    def distill(
        self,
        student: Tensor,
        teacher: Tensor,
        tokens: Tokens,
        options: Options,
        *,
        gradient: Tensor | None,
        want_loss: bool,
        want_metrics: bool,
        stage: str = "whole",
        states: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Results:
        """``stage``, ``states`` (N, 5) and ``sums`` (N, 2), float64, are for split rows, see distill_args.h."""
        if stage == "whole":
            return super().distill(
                student, teacher, tokens, options, gradient=gradient, want_loss=want_loss, want_metrics=want_metrics
            )
        teacher, teacher_rows = row_pointers(teacher)
        teacher_count = teacher.shape[:-1].numel()
        split = (STAGES.index(stage), pointer(states), pointer(sums))
        return self._loss(
            "split_distill",
            student,
            (teacher_rows,),
            teacher_count,
            tokens,
            options,
            gradient,
            want_loss,
            want_metrics,
            split,
        )

    def outside(
        self,
        logits: Tensor,
        mask: Tensor | None,
        indices: Tensor,
        vocab: int,
        temperature: float,
        *,
        states: Tensor | None = None,
        exponentials: Tensor | None = None,
        values: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> None:
        """Rows of logits (..., V) without the entries of ``indices`` (N, k), ascending in each row; those outside
        [0, vocab) are none. Writes ``states`` (N, 3) of the rest, or the ``gradient`` a e^((x - m) / T) + b e^(x - n)
        by ``exponentials`` (N, 4), with ``values`` (N, k) at the entries; float64, contiguous. Rows that ``mask``
        leaves out are zeros.
        """
        count, k = indices.shape
        in_place, width = gradient is logits, logits.shape[-1]
        logits, logit_rows = row_pointers(logits)
        gradient_rows = (0, 0, 1, 0, 0)
        if gradient is not None:
            gradient_rows = logit_rows if in_place else row_pointers(gradient)[1]
        self._call(
            "outside",
            logits.device,
            logit_rows,
            (count, vocab, k, pointer(mask), indices.data_ptr(), temperature),
            tuple(map(pointer, (states, exponentials, values))),
            gradient_rows,
            width,
        )

    def widen(self, out: Tensor, a: Tensor, b: Tensor | None, add: bool) -> None:
        """out = a [+ b] [+ out], summed in float32; ``a`` and ``b`` are dense, of a 16-bit dtype."""
        (count, width), matrix = out.shape, row_pointers(out)[1]
        self._call("widen", out.device, matrix, count, width, a.data_ptr(), pointer(b), DTYPES[a.dtype], add)


class _Cuda(OnCuda, _Engine):
    def distill_layouts(self, vocab: int, dtype: torch.dtype, divergence: str, device: int) -> list[tuple[int, int]]:
        """(cluster, stages) of all that rows of this length fit on this GPU, the rule's first."""
        return self._module.distill_layouts(vocab, DTYPES[dtype], DIVERGENCES.index(divergence), device)

    def topk_distill_layouts(self, vocab: int, dtype: torch.dtype, device: int) -> list[tuple[int, int]]:
        """The same for a teacher's top k."""
        return self._module.topk_distill_layouts(vocab, DTYPES[dtype], device)

    def explain_distill(self, vocab: int, dtype: torch.dtype, divergence: str, device: int) -> str:
        """Which kernel serves rows of this length on this GPU, how it is laid out there, and why."""
        with _tables.watched() as choices:
            layout = _tables.distill_layout(device, vocab, dtype, divergence)
        return f"{self._module.explain_distill(vocab, DTYPES[dtype], layout, device)}; {choices[0].reason}"

    def distill(
        self,
        student: Tensor,
        teacher: Tensor,
        tokens: Tokens,
        options: Options,
        *,
        gradient: Tensor | None,
        **wanted: bool,
    ) -> Results:
        """The kernels take one dtype: logits of two meet in float32."""
        if student.dtype != teacher.dtype:
            student, teacher = student.float(), teacher.float()
        return super().distill(student, teacher, tokens, options, gradient=gradient, **wanted)

    def _loss(
        self,
        name: str,
        student: Tensor,
        teacher: tuple[Any, ...],
        teacher_count: int,
        tokens: Tokens,
        options: Options,
        *wanted: Any,
    ) -> Results:
        index, vocab = student.device.index, options.vocab
        if name == _tables.DISTILL:
            layout = _tables.distill_layout(index, vocab, student.dtype, options.divergence)
        else:
            layout = _tables.topk_distill_layout(index, vocab, student.dtype)
        if layout != _tables.BY_RULE:
            name, wanted = f"laid_out_{name}", (*wanted, layout)
        return super()._loss(name, student, teacher, teacher_count, tokens, options, *wanted)


@functools.cache
def cpu() -> _Cpu:
    return _Cpu(_C.cpu)


@functools.cache
def cuda() -> _Cuda:
    return _Cuda(_C.cuda)
