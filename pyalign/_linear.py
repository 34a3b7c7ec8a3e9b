"""Losses straight from hidden states: the chunk loop between the matrix products of torch and our row kernels.

    logits = softcap(hidden @ weight.T + bias)                    a chunk of rows at a time, in the workspace
    a row loss writes d loss / d logits                           (pyalign._backends.engine)
    d hidden = gradient @ weight,  d weight += gradient.T @ hidden

Products are torch's; nothing of size tokens x vocabulary is ever held. A product whose operands must be converted, or
whose sum is wider than they are, runs in tiles of the vocabulary that stay in the cache:

- 16-bit operands, float32 logits. On a GPU one product with a float32 result. On a CPU, which offers none, the product
  and what its rounding lost, ``a = x w`` and ``b = x w - a``, both rounded to 16 bits but summed in float32: 17 good
  bits, for a fifth of the time of a float32 product where bfloat16 has matrix instructions.
- float16 on a CPU, and bfloat16 without such instructions: float32 products over converted tiles, faster there.
- The row loss writes its gradient over the logits or, where products take 16 bits, in these: it is rounded once, and
  not written in 32 bits to be read again.
- The gradient of the weight is summed over chunks in float32 (float64), whatever the operands are.

On a GPU a chunk's row loss runs beside the products of the next (``_pipeline``) where that was measured to be faster
(``_tables``). It takes the buffers of two chunks, so chunks are half as long.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyalign import _pipeline
from pyalign._shards import Shards, agree, of_group, sum_over
from pyalign._types import accumulation_dtype

ALIGNMENT = 64  # bytes
_TILE = {"cpu": 16384}  # columns; elsewhere _GPU_TILE
_GPU_TILE = 32768
# Rows of a chunk. Fewer than `least` would read the weight, and read and write its gradient, too often for the
# products to be efficient; more than `enough` gain nothing that can be measured.
_LEAST_ROWS, _ENOUGH_ROWS = {"cpu": 64}, {"cpu": 512}
_GPU_LEAST_ROWS, _GPU_ENOUGH_ROWS = 512, 4096


class Projection(NamedTuple):
    """One side's logits, softcap(hidden @ weight.T + bias), where softcap(x) = c tanh(x / c)."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None


def cut(side: Projection, vocab: int) -> Projection:
    """The projection onto the first ``vocab`` entries."""
    bias = side.bias
    return side._replace(weight=side.weight[:vocab], bias=None if bias is None else bias[:vocab])


class Settings(NamedTuple):
    """How the logits are computed."""

    workspace_bytes: int | None  # None: by default_workspace
    num_valid: int | None  # at least as many as the tokens that count
    gemm_dtype: torch.dtype | None  # of the operands of products; None: their own
    logits_dtype: torch.dtype  # of the chunks
    group: str | None = None  # the process group that the vocabulary is split over, by name
    sizes: tuple[int, ...] | None = None  # the entries of each of its ranks
    saved: Tensor | None = None  # (N, w) float64: what a forward pass over ranks learnt, for the gradient

    @property
    def shards(self) -> Shards | None:
        return None if self.group is None or self.sizes is None else of_group(self.group, tuple(self.sizes))


class Wanted(NamedTuple):
    loss: bool
    hidden: bool
    weight: bool
    bias: bool

    @property
    def gradient(self) -> bool:
        return self.hidden or self.weight or self.bias


class Selection(NamedTuple):
    """The tokens of one chunk: a slice of all of them, or of an index."""

    begin: int
    end: int
    index: Tensor | None  # (n,) int64
    mask: Tensor | None  # (n,) bool, those that count; None: all do

    def of(self, x: Tensor) -> Tensor:
        """The tokens' entries of ``x`` (N, ...)."""
        return x[self.begin : self.end] if self.index is None else x.index_select(0, self.index)

    def maybe(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.of(x)

    def put(self, to: Tensor, values: Tensor) -> None:
        if self.index is None:
            to[self.begin : self.end].copy_(values)
        else:
            to.index_copy_(0, self.index, values.to(to.dtype))


class RowLoss(Protocol):
    """A loss over rows of logits, and what of the workspace it needs."""

    def reserve(self, layout: Layout, gathers: bool) -> None: ...

    def project(self, tokens: Selection, buffers: Buffers) -> Tensor | None:
        """What the logits are compared with (n, V), where that takes matrix products; in the workspace."""
        ...

    def run(
        self, logits: Tensor, other: Tensor | None, tokens: Selection, gradient: Tensor | None, want_loss: bool
    ) -> tuple[Tensor | None, ...]:
        """Per-token results (n,) of logits (n, V), compared with what ``project`` gave; the gradient is written to
        ``gradient``, which may be the logits, or of 16 bits."""
        ...


# The workspace


class _Matrix(NamedTuple):
    rows: int | None
    width: int
    dtype: torch.dtype
    lasts: bool

    def bytes(self, chunk: int) -> int:
        return (self.rows or chunk) * self.width * self.dtype.itemsize


class Layout:
    """What the workspace holds: matrices with a row per token of the chunk, and such of a fixed number of rows."""

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes  # chunks that are under way at once
        self._matrices: dict[str, _Matrix] = {}

    def add(self, name: str, width: int, dtype: torch.dtype, rows: int | None = None, lasts: bool = False) -> None:
        """``rows`` None: one per token. Rows are dense: ``Buffers`` gives out narrower ones too. What ``lasts`` from a
        chunk's products to its gradients is there once for each lane."""
        self._matrices[name] = _Matrix(rows, width, dtype, lasts)

    def bytes(self, chunk: int, lanes: int | None = None) -> int:
        lanes = lanes or self.lanes
        return sum(_aligned(x.bytes(chunk)) * (lanes if x.lasts else 1) for x in self._matrices.values())

    def allocate(self, chunk: int, device: torch.device) -> list[Buffers]:
        """Of each lane."""
        memory = torch.empty(self.bytes(chunk), dtype=torch.uint8, device=device)
        begin = 0

        def next_part(matrix: _Matrix) -> Tensor:
            nonlocal begin
            size = matrix.bytes(chunk)
            part = memory[begin : begin + size].view(matrix.dtype)
            begin += _aligned(size)
            return part

        lanes = [Buffers({name: next_part(x) for name, x in self._matrices.items()})]
        for _ in range(1, self.lanes):
            own = {name: next_part(x) for name, x in self._matrices.items() if x.lasts}
            lanes.append(Buffers(lanes[0].parts | own))
        return lanes


class Buffers(NamedTuple):
    parts: dict[str, Tensor]

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """A dense (rows, width) matrix at the start of the named one's memory."""
        return self.parts[name][: rows * width].view(rows, width)

    def __contains__(self, name: object) -> bool:
        return name in self.parts


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def available_memory(device: torch.device) -> int:
    """Bytes that this process might still take, without waiting for the device."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return max(total - torch.cuda.memory_allocated(device), 0)
    if device.type == "cpu":
        with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return 1 << 32


def least_rows(count: int, device: torch.device) -> int:
    """Of the smallest chunk."""
    return min(max(count, 1), _LEAST_ROWS.get(device.type, _GPU_LEAST_ROWS))


def chunk_rows(
    layout: Layout, count: int, workspace_bytes: int | None, device: torch.device, alone: bool = True
) -> int:
    """Tokens per chunk, the same for all but the last.

    Without ``workspace_bytes``, as many as are enough, over all lanes, halved until the workspace is a quarter of the
    available memory or the chunk the least: so the same call gives the same bits unless memory is short. (Ranks that
    share a vocabulary and not ``alone`` don't look at their memory: their chunks must be the same.)

    Raises:
        ValueError: ``workspace_bytes`` doesn't hold the smallest chunk.
    """
    count, least = max(count, 1), least_rows(count, device)
    if workspace_bytes is None:
        most = min(count, _ENOUGH_ROWS.get(device.type, _GPU_ENOUGH_ROWS) // layout.lanes)
        while alone and most > least and layout.bytes(most) > available_memory(device) // 4:
            most = max(most // 2, least)
    else:
        if layout.bytes(least) > workspace_bytes:
            raise ValueError(
                f"workspace_bytes: got {workspace_bytes}; wanted at least {layout.bytes(least)}, the smallest chunk:"
                f" {least} tokens at a time"
            )
        low, most = least, count
        while low < most:  # the largest that fits
            middle = (low + most + 1) // 2
            low, most = (middle, most) if layout.bytes(middle) <= workspace_bytes else (low, middle - 1)
    chunks = -(-count // most)
    even = -(-count // chunks)
    return min(most, -(-even // 16) * 16)


def _hold_two(layout: Layout, count: int, workspace_bytes: int | None, device: torch.device) -> bool:
    """Whether the workspace, or what ``chunk_rows`` would give it, holds two chunks of the smallest size."""
    room = available_memory(device) // 4 if workspace_bytes is None else workspace_bytes
    return layout.bytes(least_rows(count, device), lanes=2) <= room


def shared_chunk_rows(
    layout: Layout, count: int, workspace_bytes: int | None, device: torch.device, shards: Shards
) -> int:
    """``chunk_rows`` of which all ranks have the same.

    Slices of one size need no words. Else the least of all ranks' is taken, which the host waits for; where a workspace
    is too small for one rank's slice, all ranks raise.
    """
    if len(set(shards.sizes)) == 1:
        return chunk_rows(layout, count, workspace_bytes, device, alone=False)
    error, chunk = None, 0
    try:
        chunk = chunk_rows(layout, count, workspace_bytes, device, alone=False)
    except ValueError as too_small:
        error = too_small
    chunk = agree(chunk, shards, device)
    if error is not None:
        raise error
    if chunk == 0:
        raise ValueError(f"workspace_bytes: got {workspace_bytes}; wanted more, by what another rank says")
    return chunk


# Matrix products


@functools.cache
def _has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def gemm_dtype(own: torch.dtype, settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of a side's operands: autocast's or their own, but what a CPU multiplies slowly goes to float32."""
    if settings.logits_dtype.itemsize != 4:
        return settings.logits_dtype
    dtype = settings.gemm_dtype or own
    if dtype.itemsize != 2:
        return settings.logits_dtype
    if device.type == "cpu" and not (dtype == torch.bfloat16 and _has_bfloat16_products()):
        return torch.float32
    return dtype


def _wide_product(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
    """out = a @ b + beta * out, 16-bit operands and a float32 result, on a GPU."""
    if beta:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _has_wide_products(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


class Widen(Protocol):
    """out = a [+ b] [+ out], summed in float32; ``a`` and ``b`` of a 16-bit dtype."""

    def __call__(self, out: Tensor, a: Tensor, b: Tensor | None, add: bool) -> None: ...


def _widen(out: Tensor, a: Tensor, b: Tensor | None, add: bool) -> None:
    out.add_(a) if add else out.copy_(a)
    if b is not None:
        out.add_(b)


class Products:
    """The matrix products of one side. ``prefix`` names its part of the workspace; ``widen`` is the CPU engine's
    where that runs; ``rounds`` says whether the row loss may round its gradient to the products' 16 bits."""

    def __init__(
        self,
        side: Projection,
        settings: Settings,
        prefix: str,
        wanted: Wanted | None = None,
        widen: Widen | None = None,
        rounds: bool = True,
    ) -> None:
        self.hidden, self.weight, self.bias, self.softcap = side
        self.prefix, self.wanted = prefix, wanted or Wanted(True, False, False, False)
        device = self.hidden.device
        self.vocab, self.width = self.weight.shape
        self.logits_dtype, self.dtype = settings.logits_dtype, gemm_dtype(self.hidden.dtype, settings, device)
        self.sum_dtype = accumulation_dtype(self.logits_dtype)
        self.wide = _has_wide_products(device)
        self.widen = widen or _widen
        converts = self.weight.dtype != self.dtype
        narrow = self.dtype.itemsize == 2
        self.mixed = self.logits_dtype != self.dtype
        # The bias sums what isn't rounded, and the soft cap's derivative takes its logits' dtype.
        rounds = rounds and self.mixed and self.wanted.gradient and self.softcap is None and not self.wanted.bias
        self.gradient_dtype = self.dtype if rounds else self.logits_dtype
        same = self.wide and self.gradient_dtype == self.dtype
        tiles = converts or (narrow and not same)
        self.tile = max(min(_TILE.get(device.type, _GPU_TILE), self.vocab) if tiles else self.vocab, 1)
        # Only the weight's gradient is tiled, if any is.
        self.whole = not converts and (same or not self.mixed)
        summed = settings.group is not None or (self.tile < self.vocab and not self.whole)
        self.hidden_dtype = self.sum_dtype if summed else self.dtype  # of a chunk's gradient

    def reserve(self, layout: Layout, gathers: bool) -> None:
        p, tile, width = self.prefix, self.tile, self.width
        if gathers or self.hidden.dtype != self.dtype:
            layout.add(p + "rows", width, self.dtype, lasts=self.wanted.gradient)
        if self.weight.dtype != self.dtype:
            layout.add(p + "weight", width, self.dtype, rows=tile)
        layout.add(p + "logits", self.vocab, self.logits_dtype, lasts=True)
        converts = self.wanted.gradient and self.gradient_dtype != self.dtype
        if converts or (self.mixed and not self.wide):
            layout.add(p + "tile", tile, self.dtype)
        if self.mixed and not self.wide:
            layout.add(p + "rest", tile, self.dtype)
        if self._has_gradient_buffer():
            layout.add(p + "gradient", self.vocab, self.gradient_dtype, lasts=True)
        narrow = not self.wide and self.dtype != self.sum_dtype
        if self.wanted.hidden:
            layout.add(p + "hidden_gradient", width, self.hidden_dtype)
            if narrow and self.hidden_dtype != self.dtype:
                layout.add(p + "hidden_product", width, self.dtype)
        if self.wanted.weight and narrow:
            layout.add(p + "weight_product", width, self.dtype, rows=tile)

    def rows(self, tokens: Selection, buffers: Buffers, at: Tensor | None = None) -> Tensor:
        """The chunk's hidden states (n, H) in the products' dtype; those of tokens that don't count are 0.

        ``at`` (n,): the rows that the tokens are matched with, if not their own.
        """
        index = tokens.index if at is None else at
        hidden = self.hidden[tokens.begin : tokens.end] if index is None else self.hidden
        if self.prefix + "rows" not in buffers:
            return hidden
        rows = buffers.take(self.prefix + "rows", tokens.end - tokens.begin, self.width)
        if index is not None and hidden.dtype == rows.dtype:
            torch.index_select(hidden, 0, index, out=rows)
        else:
            rows.copy_(hidden if index is None else hidden.index_select(0, index))
        if tokens.mask is not None:
            rows.masked_fill_(~tokens.mask[:, None], 0.0)  # what lies in them must not meet a gradient of 0
        return rows

    def _tiles(self, buffers: Buffers, tile: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary and their weights (t, H) in the products' dtype."""
        for begin in range(0, self.vocab, tile):
            columns = slice(begin, min(begin + tile, self.vocab))
            weight = self.weight[columns]
            if weight.dtype != self.dtype:
                weight = buffers.take(self.prefix + "weight", columns.stop - begin, self.width).copy_(weight)
            yield columns, weight

    def project(self, rows: Tensor, buffers: Buffers) -> Tensor:
        """The logits (n, V) of hidden states (n, H), in the workspace."""
        count = rows.shape[0]
        logits = buffers.take(self.prefix + "logits", count, self.vocab)
        bias = None if self.bias is None else self.bias.to(self.logits_dtype)
        for columns, weight in self._tiles(buffers, max(self.vocab, 1) if self.whole else self.tile):
            out = logits[:, columns]
            if not self.mixed and bias is not None:
                torch.addmm(bias[columns], rows, weight.t(), out=out)
            elif not self.mixed:
                torch.mm(rows, weight.t(), out=out)
            elif self.wide:
                _wide_product(rows, weight.t(), out, 0)
            else:
                first = buffers.take(self.prefix + "tile", count, out.shape[1])
                rest = buffers.take(self.prefix + "rest", count, out.shape[1])
                torch.mm(rows, weight.t(), out=first)
                rest.copy_(first).addmm_(rows, weight.t(), beta=-1)
                self.widen(out, first, rest, False)
        if bias is not None and self.mixed:
            logits.add_(bias)
        if self.softcap is not None:
            for block in _blocks(logits):
                block.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def _has_gradient_buffer(self) -> bool:
        return self.wanted.gradient and (self.softcap is not None or self.gradient_dtype != self.logits_dtype)

    def gradient_buffer(self, logits: Tensor, buffers: Buffers) -> Tensor:
        """Where a row loss writes d loss / d logits: over them, unless the softcap's derivative needs them, or it is
        narrower."""
        return buffers.take(self.prefix + "gradient", *logits.shape) if self._has_gradient_buffer() else logits

    def uncap(self, gradient: Tensor, logits: Tensor) -> None:
        """d softcap(x) / dx = 1 - (softcap(x) / c)^2; the logits are used up."""
        if self.softcap is not None:
            for g, y in zip(_blocks(gradient), _blocks(logits), strict=True):
                g.addcmul_(g, y.mul_(y), value=-1.0 / self.softcap**2)

    def add_gradients(
        self, gradient: Tensor, rows: Tensor, buffers: Buffers, weight_sum: Tensor | None, bias_sum: Tensor | None,
        is_first: bool,
    ) -> Tensor | None:  # fmt: skip
        """Adds the chunk's gradients of weight and bias to the sums; returns the one of its hidden states (n, H)."""
        count, hidden_sum = rows.shape[0], None
        if bias_sum is not None:
            total = gradient.sum(0, dtype=bias_sum.dtype)
            bias_sum.copy_(total) if is_first else bias_sum.add_(total)
        if self.wanted.hidden:
            hidden_sum = buffers.take(self.prefix + "hidden_gradient", count, self.width)
            if self.whole:
                self._add(gradient, self.weight, hidden_sum, True, buffers, "hidden_product")
        if weight_sum is None and (hidden_sum is None or self.whole):
            return hidden_sum
        for columns, weight in self._tiles(buffers, self.tile):
            part = gradient[:, columns]
            if part.dtype != self.dtype:
                part = buffers.take(self.prefix + "tile", count, part.shape[1]).copy_(part)
            if hidden_sum is not None and not self.whole:
                self._add(part, weight, hidden_sum, columns.start == 0, buffers, "hidden_product")
            if weight_sum is not None:
                self._add(part.t(), rows, weight_sum[columns], is_first, buffers, "weight_product")
        return hidden_sum

    def _add(self, a: Tensor, b: Tensor, total: Tensor, is_first: bool, buffers: Buffers, scratch: str) -> None:
        """total += a @ b, or = for the first."""
        if total.dtype == a.dtype:
            torch.mm(a, b, out=total) if is_first else total.addmm_(a, b)
        elif self.wide:
            _wide_product(a, b, total, 0 if is_first else 1)
        else:
            product = torch.mm(a, b, out=buffers.take(self.prefix + scratch, *total.shape))
            self.widen(total, product, None, not is_first)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Rows of ``x`` that fit a CPU's cache together; on a GPU all of them."""
    if x.device.type != "cpu":
        yield x
        return
    yield from x.split(max(1, (1 << 20) // max(x.shape[1] * x.element_size(), 1)))


# The loop


def _can_count(device: torch.device) -> bool:
    """Whether the host may read how many tokens count without waiting for a device."""
    return device.type == "cpu"


def selection_of(counted: Tensor | None, count: int, num_valid: int | None, device: torch.device) -> Selection:
    """All the tokens to be computed. On a CPU those that count; on a GPU, which isn't asked how many they are, all, or
    the first ``num_valid`` of a stable order by whether they count.

    Raises:
        ValueError: on a CPU, more tokens count than ``num_valid``.
    """
    if _can_count(device):
        index = None if counted is None else counted.nonzero().squeeze(1)
        valid = count if index is None else index.shape[0]
        if num_valid is not None and valid > num_valid:
            raise ValueError(f"num_valid: got {num_valid}; wanted at least {valid}, the tokens that count")
        return Selection(0, valid, None if valid == count else index, None)
    if num_valid is None or num_valid >= count:
        return Selection(0, count, None, counted)
    if counted is None:
        counted = torch.ones(count, dtype=torch.bool, device=device)
    index = counted.logical_not().argsort(stable=True)[:num_valid]
    return Selection(0, num_valid, index, counted)


def _part(tokens: Selection, begin: int, end: int) -> Selection:
    index = None if tokens.index is None else tokens.index[begin:end]
    part = Selection(begin, end, index, None)
    return part if tokens.mask is None else part._replace(mask=part.of(tokens.mask))


class Outcome(NamedTuple):
    """(N,) results of the row loss, and (N, H), (V, H) and (V,) gradients; None for what was not wanted."""

    results: list[Tensor]
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Chunk:
    """The steps of one chunk, which add what it gives to the outcome."""

    def __init__(
        self, products: Products, loss: RowLoss, wanted: Wanted, to: Outcome, tokens: Selection, buffers: Buffers
    ) -> None:
        self._products, self._loss, self._wanted, self._to = products, loss, wanted, to
        self._tokens, self._buffers = tokens, buffers

    def products(self) -> None:
        self._rows = self._products.rows(self._tokens, self._buffers)
        self._logits = self._products.project(self._rows, self._buffers)
        self._other = self._loss.project(self._tokens, self._buffers)
        wanted = self._wanted.gradient
        self._gradient = self._products.gradient_buffer(self._logits, self._buffers) if wanted else None

    def row_loss(self) -> None:
        found = self._loss.run(self._logits, self._other, self._tokens, self._gradient, self._wanted.loss)
        for to, values in zip(self._to.results, found, strict=True):
            if values is not None:
                self._tokens.put(to, values)

    def gradients(self) -> None:
        if self._gradient is None:
            return
        self._products.uncap(self._gradient, self._logits)
        of_rows = self._products.add_gradients(
            self._gradient, self._rows, self._buffers, self._to.weight, self._to.bias, self._tokens.begin == 0
        )
        if of_rows is not None:
            assert self._to.hidden is not None
            self._tokens.put(self._to.hidden, of_rows)


def run(
    head: Projection,
    loss: RowLoss,
    counted: Tensor | None,
    settings: Settings,
    wanted: Wanted,
    result_dtypes: list[torch.dtype],
    widen: Widen | None = None,
    rounds: bool = True,
    overlap: bool = False,
) -> Outcome:
    """Runs ``loss`` over the logits of ``head``, chunk by chunk, and sums up the gradients. ``rounds``: see Products;
    ``overlap``: see ``_pipeline``, where there is memory for two chunks and no other rank to wait for.

    ``head.weight`` may be longer than its vocabulary ever gets: callers cut it, and fill up its gradient. Where it is
    a slice of a vocabulary that is split, the gradient of the hidden states is that of all slices.
    """
    device, count = head.hidden.device, head.hidden.shape[0]
    tokens = selection_of(counted, count, settings.num_valid, device)
    products = Products(head, settings, "", wanted, widen, rounds)
    layout, gathers = Layout(), tokens.index is not None or tokens.mask is not None
    products.reserve(layout, gathers)
    loss.reserve(layout, gathers)
    total = tokens.end
    shards = settings.shards
    if shards is None:
        layout.lanes = 2 if overlap and _hold_two(layout, total, settings.workspace_bytes, device) else 1
        chunk = chunk_rows(layout, total, settings.workspace_bytes, device)
    else:
        chunk = shared_chunk_rows(layout, total, settings.workspace_bytes, device, shards)

    # What no chunk writes: results and gradients of tokens that don't count are 0, and so are gradients of no tokens.
    # Should more tokens count than num_valid says, those left out are NaN.
    results = [torch.zeros(count, dtype=dtype, device=device) for dtype in result_dtypes]
    if tokens.index is not None and tokens.mask is not None:
        for x in results:
            x.masked_fill_(tokens.mask, math.nan if x.is_floating_point() else 0)
    hidden_gradient = weight_sum = bias_sum = None
    if wanted.hidden:
        dtype = head.hidden.dtype if shards is None else products.sum_dtype  # slices' gradients are added unrounded
        hidden_gradient = torch.empty(head.hidden.shape, dtype=dtype, device=device)
        if tokens.index is not None or not total:
            hidden_gradient.zero_()
    if wanted.weight:
        weight_sum = torch.empty(head.weight.shape, dtype=products.sum_dtype, device=device)
    if wanted.bias:
        bias_sum = torch.empty(head.weight.shape[0], dtype=products.sum_dtype, device=device)
    if not total:
        for x in (weight_sum, bias_sum):
            if x is not None:
                x.zero_()
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(head.hidden.dtype)
        return Outcome(results, hidden_gradient, weight_sum, bias_sum)

    if chunk >= total:
        layout.lanes = 1
    outcome = Outcome(results, hidden_gradient, weight_sum, bias_sum)
    lanes = itertools.cycle(layout.allocate(chunk, device))
    parts = (_part(tokens, begin, min(begin + chunk, total)) for begin in range(0, total, chunk))
    chunks = (_Chunk(products, loss, wanted, outcome, part, next(lanes)) for part in parts)
    if layout.lanes > 1:
        _pipeline.overlapped(chunks, _pipeline.beside(device))
    else:
        _pipeline.in_turn(chunks)
    if hidden_gradient is not None and shards is not None:
        outcome = outcome._replace(hidden=sum_over(hidden_gradient, shards).to(head.hidden.dtype))
    return outcome


def finish_gradient(total: Tensor | None, like: Tensor) -> Tensor | None:
    """A sum over chunks as the gradient of ``like``, whose entries past the vocabulary get 0."""
    if total is None:
        return None
    if total.shape == like.shape:
        return total.to(like.dtype)
    gradient = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    gradient[: total.shape[0]].copy_(total)
    gradient[total.shape[0] :].zero_()
    return gradient
