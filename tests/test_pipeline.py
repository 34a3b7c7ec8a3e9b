"""Row losses beside the next chunk's products: the same bits, two chunks' buffers, every reuse behind an event."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from distill_support import GPU, name_of
from linear_support import (
    COUNT,
    Operands,
    Outcome,
    Teacher,
    call,
    chunks_of,
    evaluate,
    every_kind,
    normal,
    operands,
    teacher,
    uncounted,
    wide_products,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyalign
from pyalign import _backends, _linear, _ops_linear, _pipeline, _tables
from pyalign._types import Options, Results, Tokens

__all__ = ["chunks_of", "uncounted", "wide_products"]  # fixtures
SetRows = Callable[[int], None]


def same_bits(first: Outcome, second: Outcome) -> None:
    for part, other in zip(first, second, strict=True):
        for y, z in zip(part, other, strict=True):
            assert torch.equal(y, z)


# The order


class Noted:
    """A chunk that notes its steps."""

    def __init__(self, name: int, log: list[str]) -> None:
        self.name, self.log = name, log

    def products(self) -> None:
        self.log.append(f"products {self.name}")

    def row_loss(self) -> None:
        self.log.append(f"loss {self.name}")

    def gradients(self) -> None:
        self.log.append(f"gradients {self.name}")


class Waits(_pipeline.Inline):
    def __init__(self, log: list[str]) -> None:
        self.log, self.started = log, 0

    def start(self, work: Callable[[], None]) -> Any:
        work()
        self.started += 1
        return self.started - 1

    def wait(self, started: Any) -> None:
        self.log.append(f"wait {started}")

    def join(self) -> None:
        self.log.append("join")


def test_the_next_chunks_products_are_queued_before_a_loss_is_waited_for():
    log: list[str] = []
    _pipeline.overlapped((Noted(i, log) for i in range(3)), Waits(log))
    assert log == [
        *("products 0", "loss 0"),
        *("products 1", "loss 1", "wait 0", "gradients 0"),
        *("products 2", "loss 2", "wait 1", "gradients 1"),
        *("wait 2", "gradients 2"),
    ]
    one: list[str] = []
    _pipeline.overlapped([Noted(0, one)], Waits(one))
    assert one == ["products 0", "loss 0", "wait 0", "gradients 0"]
    _pipeline.overlapped([], Waits(one))


def test_a_chunk_lives_until_its_loss_has_been_waited_for():
    """What it holds was allocated for the current stream, which would reuse it at once."""
    log: list[str] = []
    alive: list[weakref.ref[Noted]] = []

    def chunks() -> Iterator[Noted]:
        for i in range(4):
            chunk = Noted(i, log)
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk

    class Looks(Waits):
        def wait(self, started: Any) -> None:
            assert alive[started]() is not None
            assert all(alive[i]() is None for i in range(started - 1))

    _pipeline.overlapped(chunks(), Looks(log))
    assert [line for line in log if line.startswith("gradients")] == [f"gradients {i}" for i in range(4)]


def test_what_is_under_way_is_waited_for_when_a_step_fails():
    """The buffers are freed then."""
    log: list[str] = []

    def chunks() -> Iterator[Noted]:
        yield Noted(0, log)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        _pipeline.overlapped(chunks(), Waits(log))
    assert log[-1] == "join"


# The same bits, on a CPU


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[int]]:
    """Whether ops overlap from now on; gives the numbers of chunks that did."""

    def set_to(on: bool) -> list[int]:
        found: list[int] = []
        real = _pipeline.overlapped

        def counted(chunks: Any, where: Any) -> None:
            given = list(chunks)
            found.append(len(given))
            real(given, where)

        monkeypatch.setattr(_ops_linear._Parsed, "overlaps", lambda self, op, divergence="": on)
        monkeypatch.setattr(_linear._pipeline, "overlapped", counted)
        return found

    return set_to


Overlap = Callable[[bool], list[int]]
OF_TOKENS = {"mask": torch.arange(COUNT) % 5 != 1, "weight": torch.arange(COUNT) / 9}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"distill": OF_TOKENS, "topk": OF_TOKENS},
    "rows of the teacher": {
        kind: {"teacher_rows": (torch.arange(COUNT) * 5 % COUNT).where(torch.arange(COUNT) % 4 > 0, -1)}
        for kind in ("distill", "topk")
    },
    "per token": {
        **{kind: {"reduction": "none"} for kind in ("distill", "topk", "cross_entropy")},
        "logprob": {"return_entropy": True},
    },
    "softcap": {
        "distill": {"student_softcap": 4.0, "teacher_softcap": 3.0, "divergence": "jsd"},
        "topk": {"student_softcap": 4.0, "return_metrics": True},
        "cross_entropy": {"softcap": 4.0, "z_loss": 0.1},
        "logprob": {"softcap": 4.0},
    },
}


@every_kind
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [21, 11, 7, 4])  # 1, 2, 3 and 6 chunks
def test_overlapped_chunks_give_the_bits_of_chunks_in_turn(
    kind: str, options: str, rows: int, chunks_of: SetRows, overlap: Overlap
):
    x, other = operands(), teacher(ignored=0)
    given = OPTIONS[options].get(kind, {})
    chunks_of(rows)
    assert not overlap(False)
    in_turn = evaluate(kind, x, other, **given)
    counts = overlap(True)
    same_bits(evaluate(kind, x, other, **given), in_turn)
    if rows < 12:
        assert counts
        assert all(n > 1 for n in counts)
    else:
        assert not counts


@every_kind
@pytest.mark.usefixtures("uncounted", "wide_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_valid", [None, 18])
def test_the_same_in_the_arithmetic_of_a_gpu(
    kind: str,
    dtype: torch.dtype,
    bias: bool,
    num_valid: int | None,
    chunks_of: SetRows,
    overlap: Overlap,
    monkeypatch: pytest.MonkeyPatch,
):
    """Fixed chunks in a stable order, products with a float32 result, in tiles."""
    monkeypatch.setattr(_linear, "gemm_dtype", lambda own, settings, device: settings.gemm_dtype or own)
    monkeypatch.setattr(_linear, "_TILE", {"cpu": 16})
    x, other = operands(dtype=dtype, bias=bias), teacher(dtype=dtype)
    given: dict[str, Any] = {"num_valid": num_valid}
    if kind in ("distill", "topk"):
        given["mask"] = other.targets >= 0
    chunks_of(5)
    overlap(False)
    in_turn = evaluate(kind, x, other, **given)
    counts = overlap(True)
    same_bits(evaluate(kind, x, other, **given), in_turn)
    assert counts


@every_kind
@pytest.mark.parametrize("frozen", [("hidden", "bias"), ("weight", "bias")])
def test_frozen_operands(kind: str, frozen: tuple[str, ...], chunks_of: SetRows, overlap: Overlap):
    x, other = operands(), teacher()
    chunks_of(4)
    overlap(False)
    in_turn = evaluate(kind, x, other, frozen)
    overlap(True)
    same_bits(evaluate(kind, x, other, frozen), in_turn)


# The workspace


@every_kind
def test_two_chunks_fit_the_workspace(kind: str, monkeypatch: pytest.MonkeyPatch, overlap: Overlap):
    """What holds only one of the smallest chunks is used for chunks in turn; less is refused, as without."""
    given: list[tuple[int, int]] = []
    real = _linear.Layout.allocate

    def allocate(self: _linear.Layout, chunk: int, device: torch.device) -> list[_linear.Buffers]:
        lanes = real(self, chunk, device)
        memory = [part.untyped_storage() for part in lanes[-1].parts.values()]
        assert len({x.data_ptr() for x in memory}) == 1
        given.append((memory[0].nbytes(), len(lanes)))
        return lanes

    monkeypatch.setattr(_linear.Layout, "allocate", allocate)
    x, other = operands(300), teacher(300)

    def largest(workspace: int) -> tuple[int, int]:
        """The workspace that is used, in forward or backward, and for how many chunks at once."""
        given.clear()
        evaluate(kind, x, other, workspace_bytes=workspace)
        return max(given)

    def least() -> int:
        workspace = 1
        while True:
            try:
                return largest(workspace)[0]
            except ValueError as error:
                workspace = int(str(error).split("wanted at least ")[1].split(",")[0])

    overlap(False)
    smallest = least()
    overlap(True)
    assert least() == smallest
    assert largest(smallest) == (smallest, 1)
    for workspace in (2 * smallest, 2 * smallest + 1, 3 * smallest):
        size, lanes = largest(workspace)
        assert size <= workspace
        assert lanes == 2
    assert largest(100 * smallest)[1] == 1  # one chunk


def test_by_default_two_chunks_are_together_as_long_as_one():
    cpu = torch.device("cpu")
    for lanes in (1, 2):
        layout = _linear.Layout(lanes)
        layout.add("logits", 1000, torch.float32, lasts=True)
        layout.add("tile", 10, torch.float32, rows=16)
        assert _linear.chunk_rows(layout, 2048, None, cpu) == 512 // lanes
        assert layout.bytes(512 // lanes) == 512 * 4000 + 640


def test_where_memory_is_short_chunks_go_in_turn(monkeypatch: pytest.MonkeyPatch, overlap: Overlap):
    x, other = operands(300), teacher(300)
    counts = overlap(True)
    evaluate("distill", x, other)
    assert counts
    counts.clear()
    monkeypatch.setattr(_linear, "available_memory", lambda device: 0)
    evaluate("distill", x, other)
    assert not counts


def test_lanes_share_what_does_not_last():
    layout = _linear.Layout(2)
    layout.add("logits", 8, torch.float32, lasts=True)
    layout.add("tile", 8, torch.float32)
    first, second = layout.allocate(16, torch.device("cpu"))
    assert first.parts["tile"].data_ptr() == second.parts["tile"].data_ptr()
    ends = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in (*first.parts.values(), second.parts["logits"]))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))


# When


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2048, 64, 100, torch.bfloat16)),
        ({"num_valid": 500}, (500, 64, 100, torch.bfloat16)),
        ({"gemm_dtype": torch.float16}, (2048, 64, 100, torch.float16)),
        ({"logits_dtype": torch.bfloat16}, None),
        ({"group": "0", "sizes": (100,)}, None),
        ({"backend": "triton"}, None),
    ],
)
def test_the_table_is_asked_for_the_cuda_kernels_alone(
    changes: dict[str, Any], expected: tuple[Any, ...] | None, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[Any, ...]] = []

    def overlaps(op: str, device: torch.device, dtype: torch.dtype, divergence: str, *sizes: int) -> bool:
        asked.append((op, divergence, *sizes, dtype))
        return True

    monkeypatch.setattr(_tables, "overlaps", overlaps)
    backend = changes.pop("backend", "cuda")
    head = _linear.Projection(torch.zeros(2048, 64).bfloat16(), torch.zeros(100, 64).bfloat16(), None, None)
    settings = _linear.Settings(None, None, None, torch.float32)._replace(**changes)
    wanted = _linear.Wanted(True, True, True, False)
    parsed = _ops_linear._Parsed(head, (), settings, wanted, False, backend)
    assert parsed.overlaps("linear_distill", "jsd") == (expected is not None)
    assert asked == ([] if expected is None else [("linear_distill", "jsd", *expected)])


# Streams, as far as a CPU can follow them: who touched which bytes, and what a stream knows to be done by then


class Stream:
    def __init__(self, name: str, deaf: bool = False) -> None:
        self.name, self.deaf = name, deaf
        self.knows: dict[str, int] = {}  # of each stream how many operations are done before the next of this one

    def wait_event(self, event: Event) -> None:
        if not self.deaf:
            self.knows = {x: max(self.knows.get(x, 0), event.knows.get(x, 0)) for x in {*self.knows, *event.knows}}

    def operation(self) -> int:
        self.knows[self.name] = self.knows.get(self.name, 0) + 1
        return self.knows[self.name]


class Event:
    def __init__(self) -> None:
        self.knows: dict[str, int] = {}

    def record(self, stream: Stream) -> None:
        self.knows = dict(stream.knows)


class Access(NamedTuple):
    begin: int
    end: int
    writes: bool
    stream: str
    number: int  # of the operation, on its stream
    name: str


class Recorder(TorchDispatchMode):
    """Runs operators as they are, and finds those that touch bytes that another stream may still be at."""

    def __init__(self) -> None:
        super().__init__()
        self.current = Stream("current")
        self.accesses: list[Access] = []
        self.races: list[str] = []
        self.kept: list[Tensor] = []  # memory that is freed would be reused here as no stream's allocator does

    @contextlib.contextmanager
    def stream(self, other: Stream) -> Iterator[None]:
        before, self.current = self.current, other
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns):
            return out  # a view
        number = self.current.operation()
        names = {x.name: x for x in schema.arguments}
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        for name, value in given.items():
            alias = names[name].alias_info
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(x, Tensor):
                    self.touch(x, alias is not None and alias.is_write, number, str(func))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor):
                self.touch(x, "empty" not in str(func), number, str(func))
        return out

    def touch(self, x: Tensor, writes: bool, number: int, name: str) -> None:
        if not x.numel():
            return
        self.kept.append(x)
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        now = Access(x.data_ptr(), x.data_ptr() + extent * x.element_size(), writes, self.current.name, number, name)
        for past in self.accesses:
            apart = past.end <= now.begin or now.end <= past.begin
            if apart or not (past.writes or now.writes) or past.stream == now.stream:
                continue
            if self.current.knows.get(past.stream, 0) < past.number:
                self.races.append(f"{now.name} on {now.stream} and {past.name} on {past.stream}")
        self.accesses.append(now)


class Torchs:
    """An engine of plain torch, whose operators can be seen."""

    def distill(self, student: Tensor, other: Tensor, *rest: Any, gradient: Tensor | None, **wanted: Any) -> Results:
        log_q, log_p = torch.log_softmax(student, 1), torch.log_softmax(other, 1)
        if gradient is not None:
            gradient.copy_(log_q.exp() - log_p.exp())
        return Results((log_p.exp() * (log_p - log_q)).sum(1), None, None)


def races(
    monkeypatch: pytest.MonkeyPatch, deaf: str = "", gradient: bool = True, softcap: float | None = None
) -> list[str]:
    """Of a distillation in 5 chunks on two streams; one of them may be deaf to events."""
    recorder = Recorder()
    recorder.current.deaf = deaf == "current"
    side = Stream("side", deaf == "side")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", recorder.stream)
    monkeypatch.setattr(_linear, "chunk_rows", lambda layout, count, workspace, device: 4)
    monkeypatch.setattr(_pipeline, "beside", lambda device: _pipeline.SideStream(recorder.current, side))
    monkeypatch.setattr(_linear, "_can_count", lambda device: False)
    x, other = operands(20), teacher(20)
    settings = _linear.Settings(None, None, None, torch.float32)
    wanted = _linear.Wanted(True, *[gradient] * 3)
    mask = torch.arange(20) % 5 != 1
    of_teacher = _linear.Products(_linear.Projection(other.hidden, other.weight, None, None), settings, "teacher_")
    tokens = Tokens(mask=mask, teacher_rows=torch.arange(20).flip(0), reduction="none")
    loss = _ops_linear._Distill(Torchs(), of_teacher, tokens, Options(67), torch.ones(()), False)
    head = _linear.Projection(*x, softcap)
    dtypes = [torch.float32, torch.float32, torch.bool]
    with recorder:
        outcome = _linear.run(head, loss, mask, settings, wanted, dtypes, overlap=True)
        for y in (*outcome.results, outcome.hidden, outcome.weight, outcome.bias):
            if y is not None:
                y.clone()  # what follows on the current stream
    assert {y.stream for y in recorder.accesses} == {"current", "side"}
    return recorder.races


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_reuse_of_a_buffer_is_behind_an_event(
    monkeypatch: pytest.MonkeyPatch, gradient: bool, softcap: float | None
):
    assert races(monkeypatch, gradient=gradient, softcap=softcap) == []


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("deaf", ["current", "side"])
def test_without_one_of_the_waits_there_is_a_race(monkeypatch: pytest.MonkeyPatch, deaf: str, gradient: bool):
    assert races(monkeypatch, deaf, gradient)


@pytest.mark.parametrize("shared", ["logits", "rows", "teacher_logits"])
def test_one_set_of_buffers_is_not_enough(monkeypatch: pytest.MonkeyPatch, shared: str):
    """In one stream's order the next chunk's products come before this one's gradients, and without a wait."""
    real = _linear.Layout.allocate

    def allocate(self: _linear.Layout, chunk: int, device: torch.device) -> list[_linear.Buffers]:
        first, second = real(self, chunk, device)
        second.parts[shared] = first.parts[shared]
        return [first, second]

    monkeypatch.setattr(_linear.Layout, "allocate", allocate)
    if shared == "rows":  # both are the current stream's: what is wrong there is the result
        x, other = operands(), teacher()
        monkeypatch.setattr(_linear, "chunk_rows", lambda layout, count, workspace, device: 4)
        monkeypatch.setattr(_linear, "_can_count", lambda device: False)
        found: list[Outcome] = []
        for on in (True, False):
            monkeypatch.setattr(_ops_linear._Parsed, "overlaps", lambda self, op, divergence="", on=on: on)
            if not on:
                monkeypatch.setattr(_linear.Layout, "allocate", real)
            found.append(evaluate("distill", x, other, mask=other.targets >= 0))
        assert not torch.equal(found[0].gradients[1], found[1].gradients[1])
    else:
        assert races(monkeypatch)


# On a GPU


in_cuda = pytest.mark.skipif(
    not GPU or bool(_backends.refusal("cuda", torch.device("cuda", 0), torch.bfloat16)),
    reason="no GPU that the CUDA kernels were built for",
)


def large(dtype: torch.dtype) -> tuple[Operands, Teacher]:
    """Kernels of some hundred microseconds, so that they meet."""
    where: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    x = operands(2048, bias=False, vocab=32000, width=1024, **where)
    weight = normal(32000, 1024, seed=2, scale=0.05, **where)
    return x._replace(weight=weight), teacher(2048, vocab=32000, **where)


@in_cuda
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("masked", [False, True])
def test_on_two_streams_the_bits_are_those_of_one(kind: str, dtype: torch.dtype, masked: bool, chunks_of: SetRows):
    x, other = large(dtype)
    given: dict[str, Any] = {"num_valid": 1800} if masked else {}
    if masked and kind in ("distill", "topk"):
        given["mask"] = other.targets >= 0
    chunks_of(400)
    with pyalign.backend("cuda"):
        with _tables.use(linear="in turn"):
            in_turn = evaluate(kind, x, other, **given)
        for _ in range(5):
            with _tables.use(linear="overlapped"):
                ours = evaluate(kind, x, other, **given)
            same_bits(ours, in_turn)


@in_cuda
@every_kind
def test_two_streams_are_captured_in_a_cuda_graph(kind: str, chunks_of: SetRows):
    """Replayed over new hidden states, the graph gives their results and gradients."""
    x, other = large(torch.bfloat16)
    leaves = x.leaves()
    chunks_of(400)

    def step() -> Outcome:
        result = call(kind, leaves, other)
        return Outcome((result,), torch.autograd.grad(result.sum(), [leaves.hidden, leaves.weight]))

    with pyalign.backend("cuda"), _tables.use(linear="overlapped"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            leaves.hidden.copy_(leaves.hidden.flip(0))
        for _ in range(3):
            graph.replay()
        expected = step()
    same_bits(captured, expected)
