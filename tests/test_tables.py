"""Measured tables: which entry serves a call, that the kernel is told, what is said of it, and files that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyalign import _backends, _explain, _native, _tables
from pyalign._tables import BY_RULE, ONE_BLOCK, Entry, Layout, Table, TableError
from pyalign._types import Options, Tokens

H100 = "NVIDIA H100 80GB HBM3"
FITS: list[Layout] = [(16, 2), (8, 2), (8, 1), ONE_BLOCK]


def entry(vocab: int = 128256, choice: str = "cluster of 8, 2 stages", **changes: Any) -> Entry:
    times = {"cluster of 16, 2 stages": 2.14, "cluster of 8, 2 stages": 2.0, "cluster of 8, 1 stage": 2.1}
    times |= {"one block": 3.0}
    given: dict[str, Any] = {
        "op": "distill", "dtype": "bfloat16", "divergence": "forward_kl", "rows": 4096, "vocab": vocab, "hidden": 0,
        "choice": choice, "rule": "cluster of 16, 2 stages", "milliseconds": times,
    }  # fmt: skip
    return Entry(**{**given, **changes})


def linear_entry(**changes: Any) -> Entry:
    times = {"in turn": 60.0, "overlapped": 50.0}
    given: dict[str, Any] = {"op": "linear_distill", "rows": 8192, "hidden": 4096, "rule": "in turn"}
    return entry(**{**given, "choice": "overlapped", "milliseconds": times, **changes})


def table(*entries: Entry, gpu: str = H100) -> Table:
    return Table(gpu, "2.13.0+cu130", "13.0", "580.95", "a1b2c3", "2026-11-26", list(entries))


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An H100 for which pyalign has no table of its own; nothing remembered."""

    class Engine:
        def distill_layouts(self, vocab: int, dtype: torch.dtype, divergence: str, device: int) -> list[Layout]:
            return FITS

        def topk_distill_layouts(self, vocab: int, dtype: torch.dtype, device: int) -> list[Layout]:
            return FITS

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: H100)
    monkeypatch.setattr(_backends, "engine", lambda name: Engine())
    monkeypatch.setattr(_tables, "DIRECTORY", tmp_path / "own")
    monkeypatch.delenv(_tables.VARIABLE, raising=False)
    caches = (_tables._table, _tables._distill, _tables._linear)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


Install = Callable[[Table], Path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Gives a table through the environment variable."""

    def to_variable(x: Table) -> Path:
        path = tmp_path / "mine.json"
        x.save(path)
        monkeypatch.setenv(_tables.VARIABLE, str(path))
        return path

    return to_variable


def chosen(vocab: int, dtype: torch.dtype = torch.bfloat16, divergence: str = "forward_kl") -> tuple[Layout, str]:
    with _tables.watched() as choices:
        layout = _tables.distill_layout(0, vocab, dtype, divergence)
    return layout, choices[0].reason


# Lookup


def test_without_a_table_the_rule_chooses():
    assert chosen(128256) == (BY_RULE, f"by rule: no measured table for {H100}")


def test_an_entry_of_the_same_shape(install: Install):
    install(table(entry()))
    reason = f"measured on {H100} (2026-11-26): cluster of 8, 2 stages, 1.07x faster than the rule's"
    assert chosen(128256) == ((8, 2), reason)


def test_that_the_rule_was_the_fastest_is_said(install: Install):
    install(table(entry(choice="cluster of 16, 2 stages")))
    assert chosen(128256) == ((16, 2), f"measured on {H100} (2026-11-26): cluster of 16, 2 stages, the rule's")


def test_one_block_can_be_the_choice(install: Install):
    install(table(entry(choice="one block")))
    assert chosen(128256)[0] == ONE_BLOCK


@pytest.mark.parametrize(
    ("vocab", "layout"),
    [
        (79_999, BY_RULE),
        (80_000, (8, 2)),
        (105_000, (8, 2)),
        (112_000, (8, 1)),  # nearer to 120,000, in factors
        (150_000, (8, 1)),
        (150_001, BY_RULE),
    ],
)
def test_the_nearest_vocabulary_within_a_quarter(install: Install, vocab: int, layout: Layout):
    install(table(entry(100_000), entry(120_000, "cluster of 8, 1 stage")))
    assert chosen(vocab)[0] == layout


@pytest.mark.parametrize(
    ("dtype", "divergence"), [(torch.float32, "forward_kl"), (torch.bfloat16, "jsd"), (torch.float16, "forward_kl")]
)
def test_another_dtype_or_divergence_is_not_served(install: Install, dtype: torch.dtype, divergence: str):
    install(table(entry(), linear_entry()))
    layout, reason = chosen(128256, dtype, divergence)
    assert layout == BY_RULE
    assert reason == f"by rule: nothing of about this shape was measured on {H100} (2026-11-26)"


def test_a_layout_that_does_not_fit_is_left(install: Install):
    times = {"cluster of 4, 2 stages": 1.0, "one block": 2.0}
    install(table(entry(choice="cluster of 4, 2 stages", rule="one block", milliseconds=times)))
    layout, reason = chosen(140_000)
    assert layout == BY_RULE
    assert "cluster of 4, 2 stages, measured on" in reason
    assert reason.endswith("at 128256, does not fit")


def test_a_table_of_another_gpu_is_not_used(install: Install):
    path = install(table(entry(), gpu="NVIDIA A100-SXM4-80GB"))
    layout, reason = chosen(128256)
    assert layout == BY_RULE
    assert reason == f"by rule: no measured table for {H100} ({path} is of NVIDIA A100-SXM4-80GB)"


def test_pyaligns_own_table_serves_where_the_users_does_not(install: Install):
    _tables.DIRECTORY.mkdir()
    table(entry(choice="one block")).save(_tables.DIRECTORY / "nvidia-h100-80gb-hbm3.json")
    assert chosen(128256)[0] == ONE_BLOCK
    install(table(entry()))
    assert chosen(128256)[0] == (8, 2)
    install(table(entry(), gpu="another"))
    _tables._table.cache_clear()
    _tables._distill.cache_clear()
    assert chosen(128256)[0] == ONE_BLOCK


def test_a_shape_is_looked_up_once(install: Install, monkeypatch: pytest.MonkeyPatch):
    install(table(entry()))
    reads: list[Path] = []
    load = _tables.load
    monkeypatch.setattr(_tables, "load", lambda path: (reads.append(path), load(path))[1])
    before = _tables._distill.cache_info().misses
    for _ in range(3):
        chosen(128256)
        chosen(120000)
    assert len(reads) == 1
    assert _tables._distill.cache_info().misses == before + 2


def test_measurements_choose_for_themselves(install: Install):
    install(table(entry()))
    with _tables.use(distill="one block"):
        assert chosen(128256) == (ONE_BLOCK, "one block, as asked")
        with _tables.use(distill="cluster of 16, 1 stage"):
            assert chosen(128256)[0] == (16, 1)
    assert chosen(128256)[0] == (8, 2)


# Losses from hidden states


def overlaps(tokens: int = 8192, hidden: int = 4096, vocab: int = 128256, op: str = "linear_distill") -> bool:
    return _tables.overlaps(op, torch.device("cuda", 0), torch.bfloat16, "forward_kl", tokens, hidden, vocab)


def test_chunks_overlap_only_where_that_was_measured_to_win(install: Install):
    assert not overlaps()
    install(table(linear_entry()))
    assert overlaps()
    assert not overlaps(op="linear_topk_distill")
    assert not overlaps(hidden=2047)
    assert overlaps(hidden=2048)
    assert not overlaps(hidden=8193)
    assert not overlaps(tokens=4095)
    assert overlaps(tokens=100_000)  # more chunks of the same size
    assert not overlaps(vocab=50304)
    install(table(linear_entry(choice="in turn")))
    for cache in (_tables._table, _tables._linear):
        cache.cache_clear()
    assert not overlaps()


def test_the_nearest_of_hidden_widths(install: Install):
    install(table(linear_entry(hidden=2048, choice="in turn"), linear_entry(hidden=4096)))
    assert not overlaps(hidden=2500)
    assert overlaps(hidden=3500)


# Files


def test_what_is_written_is_read(tmp_path: Path):
    written = table(entry(), entry(32000, "one block"), linear_entry())
    written.save(tmp_path / "table.json")
    assert _tables.load(tmp_path / "table.json") == written


def test_layouts_have_names():
    for layout in [ONE_BLOCK, *((cluster, stages) for cluster in (1, 2, 4, 8, 16) for stages in (1, 2))]:
        assert _tables.layout_of(_tables.layout_name(layout)) == layout
    for name in ("", "cluster of 8", "cluster of 8, 1 stages", "rows"):
        assert _tables.layout_of(name) is None


def test_the_rule_stays_where_little_is_won():
    assert _tables.chosen({"a": 1.0, "b": 0.99}, "a") == "a"
    assert _tables.chosen({"a": 1.0, "b": 0.9, "c": 0.8}, "a") == "c"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: got 2; wanted 1"),
        ({"gpu": None}, "gpu: got None; wanted text"),
        ({"date": 20261126}, "date: got 20261126; wanted text"),
        ({"entries": {}}, "entries: got {}; wanted a list"),
        ({"entries": [{"op": "distill"}]}, r"entries\[0\]: got {'op': 'distill'}; wanted an object of op, dtype,"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    path = tmp_path / "table.json"
    table(entry()).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TableError, match=f"{path}: {message}"):
        _tables.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "kl"}, "op: got 'kl'; wanted one of 'distill', 'topk_distill', 'linear_distill'"),
        ({"dtype": "float64"}, "dtype: got 'float64'; wanted one of 'float32'"),
        ({"divergence": "kl"}, "divergence: got 'kl'; wanted one of 'forward_kl'"),
        ({"op": "linear_logprob", "hidden": 8}, "divergence: got 'forward_kl'; wanted one of ''"),
        ({"vocab": "32000"}, "vocab: got '32000'; wanted an integer of 1 or more"),
        ({"op": "linear_distill"}, "hidden: got 0; wanted an integer of 1 or more"),
        ({"choice": "one"}, "choice: got 'one'; wanted one of 'cluster of 16, 2 stages'"),
        ({"choice": ["one block"]}, r"choice: got \['one block'\]; wanted one of 'cluster of 16, 2 stages'"),
        ({"rule": "cluster of 2, 2 stages"}, "rule: got 'cluster of 2, 2 stages'; wanted one of"),
        ({"milliseconds": {"one block": -1.0}}, r"milliseconds: got {'one block': -1.0}; wanted an object of positive"),
        ({"milliseconds": {"rows": 1.0}}, "milliseconds: got 'rows'; wanted 'one block' or 'cluster of 8, 2 stages'"),
        ({"op": "linear_distill", "hidden": 8}, "milliseconds: got 'cluster of 16, 2 stages'; wanted 'in turn' or"),
    ],
)
def test_a_malformed_entry_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    path = tmp_path / "table.json"
    table(entry(), entry(**changes)).save(path)
    with pytest.raises(TableError, match=rf"{path}: entries\[1\].{message}"):
        _tables.load(path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_file_that_is_no_table_is_named_by_the_call_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(_tables.VARIABLE, str(path))
    for _ in range(2):
        with pytest.raises(TableError, match=str(path)):
            chosen(128256)


def test_the_tables_that_are_shipped_can_be_read():
    shipped = list((Path(_tables.__file__).parent / "kernel_tables").glob("*.json"))
    if not shipped:
        pytest.skip("no GPU has been measured: there is none yet")
    for path in shipped:
        assert path.name == _tables.file_name(_tables.load(path).gpu)


# What the kernel is told, and what info says


class Native:
    """In the place of ``_C.cuda``; it computes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def distill(self, *arguments: Any) -> None:
        self.calls.append(("distill", *arguments[:-1]))

    def laid_out_distill(self, *arguments: Any) -> None:
        self.calls.append(("laid_out_distill", *arguments[:-1]))

    def topk_distill(self, *arguments: Any) -> None:
        self.calls.append(("topk_distill", *arguments[:-1]))

    def laid_out_topk_distill(self, *arguments: Any) -> None:
        self.calls.append(("laid_out_topk_distill", *arguments[:-1]))

    def explain_distill(self, vocab: int, dtype: int, layout: Layout, device: int) -> str:
        return f"layout {layout}"


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> tuple[Native, _native._Cuda]:
    module = Native()
    monkeypatch.setattr(_native.OnCuda, "_call", lambda self, name, device, *x: getattr(module, name)(*x, 0))
    return module, _native._Cuda(module)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("op", ["distill", "topk_distill"])
def test_the_choice_reaches_the_kernel(install: Install, native: tuple[Native, _native._Cuda], op: str, measured: bool):
    module, engine = native
    if measured:
        install(table(entry(32), entry(32, op="topk_distill", divergence="", choice="one block")))
    logits = torch.randn(3, 32).bfloat16()
    wanted = {"gradient": torch.empty_like(logits), "want_loss": True, "want_metrics": False}
    if op == "distill":
        engine.distill(logits, logits, Tokens(), Options(32), **wanted)
    else:
        stored = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.int64), None
        engine.topk_distill(logits, *stored, "bucket", Tokens(), Options(32), **wanted)
    ((name, *arguments),) = module.calls
    assert name == (f"laid_out_{op}" if measured else op)
    assert len(arguments) == (5 if op == "distill" else 6) + measured
    if measured:
        assert arguments[-1] == ((8, 2) if op == "distill" else ONE_BLOCK)


def test_info_says_which_layout_and_why(install: Install, native: tuple[Native, _native._Cuda]):
    _, engine = native
    by_rule = engine.explain_distill(128256, torch.bfloat16, "forward_kl", 0)
    assert by_rule == f"layout (0, 0); by rule: no measured table for {H100}"
    install(table(entry()))
    assert engine.explain_distill(128256, torch.bfloat16, "forward_kl", 0).startswith("layout (8, 2); measured on")


def test_info_of_an_op_prints_the_choices_of_its_call(install: Install):
    install(table(entry(), linear_entry()))
    with _tables.watched() as choices:
        overlaps()
        _tables.distill_layout(0, 128256, torch.bfloat16, "forward_kl")
    found = {"choices": [x._asdict() for x in choices], "runs": [{"name": "distill_clusters", "grid": [264, 1, 1]}]}
    report = {"case": "c", "device": "cuda", "choice": "cuda", "reason": "r", "backends": {"cuda": found}}
    assert _explain.render(report).splitlines()[1:] == [
        "cuda:",
        f"    linear_distill forward_kl bfloat16 8192 x 4096 -> 128256: measured on {H100} (2026-11-26): overlapped, "
        "1.20x faster than the rule's",
        f"    distill forward_kl bfloat16 rows of 128256: measured on {H100} (2026-11-26): cluster of 8, 2 stages, "
        "1.07x faster than the rule's",
        "    distill_clusters  grid 264 x 1 x 1",
    ]


def test_info_collects_the_choices_of_what_it_calls(monkeypatch: pytest.MonkeyPatch):
    """Here of a CPU's engine, which asks as a GPU's would."""
    real = _native._Cpu.distill

    def asking(self: _native._Cpu, student: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if _tables._seen is not None:
            _tables._seen.append(_tables.Choice("distill", "", "by rule"))
        return real(self, student, *arguments, **options)

    monkeypatch.setattr(_native._Cpu, "distill", asking)
    report = _explain.explain("distillation_loss", ["rows=2", "vocab=64"], None, "cpu")
    assert report["backends"]["cpu"]["choices"] == [{"what": "distill", "name": "", "reason": "by rule"}]
    assert "    distill: by rule" in _explain.render(report)
