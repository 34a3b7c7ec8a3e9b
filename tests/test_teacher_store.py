"""The teacher store keeps every row, whole shards only, and refuses what it was not made for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pyalign.distill import TopKLogprobs, topk_distillation_loss, topk_logprobs
from pyalign.teacher_store import (
    Identity,
    Manifest,
    SequenceRows,
    StoreError,
    TeacherStore,
    TeacherStoreWriter,
    shard_path,
    text_digest,
)

VOCAB, K = 31, 5
LENGTHS = [4, 1, 7, 3, 5, 2, 6]


def make_rows(temperature: float = 1.0) -> list[SequenceRows]:
    generator = torch.Generator().manual_seed(0)
    rows: list[SequenceRows] = []
    for i, n in enumerate(LENGTHS):
        logits = 4 * torch.randn(n, VOCAB, generator=generator)
        tokens = torch.randint(VOCAB, (n,), generator=generator)
        rows.append(SequenceRows(tokens, topk_logprobs(logits, K, temperature=temperature), i % 3 == 2))
    return rows


def make_manifest(rows: list[SequenceRows], **changes: object) -> Manifest:
    held_out = [r for r in rows if r.held_out]
    fields = {
        "identity": Identity("m" * 64, "t" * 64, VOCAB),
        "prompt": "Be kind.\n",
        "prompt_digest": text_digest("Be kind.\n"),
        "prompt_tokens": 3,
        "begins_with_bos": False,
        "k": K,
        "temperature": 1.0,
        "logprob_dtype": "float16",
        "compute_dtype": "float32",
        "num_sequences": len(rows),
        "num_tokens": sum(LENGTHS),
        "num_held_out_sequences": len(held_out),
        "num_held_out_tokens": sum(r.tokens.numel() for r in held_out),
        "sequences_per_shard": 3,
        "sequences_digest": "d" * 64,
        "model_path": "/models/tiny",
        "texts": ("a.txt",),
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def write(directory: Path, rows: list[SequenceRows], manifest: Manifest, shards: list[int] | None = None) -> None:
    writer = TeacherStoreWriter(directory, manifest)
    for shard in writer.missing() if shards is None else shards:
        writer.write(shard, [rows[i] for i in manifest.shard_range(shard)])


@pytest.fixture
def rows() -> list[SequenceRows]:
    return make_rows()


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_rows_come_back_as_stored(tmp_path: Path, rows: list[SequenceRows], dtype: str, bits: int):
    write(tmp_path, rows, make_manifest(rows, logprob_dtype=dtype))
    store = TeacherStore(tmp_path)
    assert store.lengths.tolist() == LENGTHS
    assert store.manifest == make_manifest(rows, logprob_dtype=dtype)
    for i, expected in enumerate(rows):
        found = store.sequence(i)
        assert torch.equal(found.tokens.long(), expected.tokens)
        assert found.teacher.indices.dtype == torch.int32
        assert torch.equal(found.teacher.indices.long(), expected.teacher.indices)
        torch.testing.assert_close(
            found.teacher.logprobs.float(), expected.teacher.logprobs, rtol=2.0**-bits, atol=1e-7
        )
        assert torch.equal(found.teacher.residual, expected.teacher.residual)
        assert found.held_out == expected.held_out


def test_a_token_costs_6k_plus_8_bytes_and_headers(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows))
    payload = sum(LENGTHS) * (6 * K + 8) + 3 * 8 + len(LENGTHS) * 9  # offsets: one more per shard
    assert 0 < TeacherStore(tmp_path).num_bytes - payload < 3 * 1024


def test_the_splits_partition_the_sequences(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows))
    store = TeacherStore(tmp_path)
    assert store.split(held_out=True) == [2, 5]
    assert store.split(held_out=False) == [0, 1, 3, 4, 6]


def test_a_batch_pads_tokens_and_packs_the_teacher(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows))
    order = [2, 6, 1]  # across shards
    batch = TeacherStore(tmp_path).batch(order)
    assert batch.input_ids.shape == (3, 7)
    assert torch.equal(batch.input_ids.flatten()[batch.rows], torch.cat([rows[i].tokens for i in order]))
    assert int((batch.input_ids != 0).sum()) <= batch.rows.numel() == 7 + 6 + 1
    expected = torch.cat([rows[i].teacher.indices for i in order])
    assert torch.equal(batch.teacher.indices.long(), expected)


def test_stored_rows_give_a_divergence_of_zero_to_their_own_model(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    logits = [6 * torch.randn(n, VOCAB, generator=generator) for n in LENGTHS]
    temperature = 1.5
    rows = [
        SequenceRows(torch.zeros(x.shape[0], dtype=torch.int64), topk_logprobs(x, K, temperature=temperature), False)
        for x in logits
    ]
    manifest = make_manifest(rows, temperature=temperature, num_held_out_sequences=0, num_held_out_tokens=0)
    write(tmp_path, rows, manifest)
    batch = TeacherStore(tmp_path).batch(range(len(rows)))
    assert batch.teacher.temperature == temperature
    kl = topk_distillation_loss(torch.cat(logits), batch.teacher, reduction="none")
    assert kl.min() >= 0
    assert kl.max() < 1e-5  # what float16 costs


# ---- Stopping and going on ----


def test_a_stopped_writer_goes_on_with_the_missing_shards(tmp_path: Path, rows: list[SequenceRows]):
    manifest = make_manifest(rows)
    write(tmp_path / "whole", rows, manifest)
    write(tmp_path / "stopped", rows, manifest, shards=[1])
    (tmp_path / "stopped" / "shard-00000.safetensors.tmp").write_bytes(b"half a shard")
    assert TeacherStoreWriter(tmp_path / "stopped", manifest).missing() == [0, 2]
    write(tmp_path / "stopped", rows, manifest)
    for shard in range(3):
        whole, stopped = (shard_path(tmp_path / d, shard).read_bytes() for d in ("whole", "stopped"))
        assert whole == stopped


def test_damaged_shards_and_those_of_another_prompt_are_written_anew(tmp_path: Path, rows: list[SequenceRows]):
    manifest = make_manifest(rows)
    write(tmp_path, rows, manifest)
    whole = [shard_path(tmp_path, s).read_bytes() for s in range(3)]
    other = make_manifest(rows, prompt_digest="another")
    (tmp_path / "manifest.json").unlink()  # by hand; the shards stay
    assert TeacherStoreWriter(tmp_path, other).missing() == [0, 1, 2]
    (tmp_path / "manifest.json").unlink()
    shard_path(tmp_path, 2).write_bytes(whole[2][:-10])
    assert TeacherStoreWriter(tmp_path, manifest).missing() == [2]
    write(tmp_path, rows, manifest)
    assert [shard_path(tmp_path, s).read_bytes() for s in range(3)] == whole


def test_an_unfinished_store_is_not_read(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows), shards=[0])
    with pytest.raises(StoreError, match=r"incomplete: 2 of 3 shards are missing.*shard-00001.*goes on there"):
        TeacherStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, "k is 5 in the store and 4 now"),
        ({"prompt_digest": "0"}, "prompt_digest is"),
        ({"temperature": 2.0}, "temperature is 1.0 in the store and 2.0 now"),
        ({"logprob_dtype": "bfloat16"}, "logprob_dtype is 'float16' in the store and 'bfloat16' now"),
        ({"sequences_digest": "e"}, "sequences_digest is"),
        ({"sequences_per_shard": 2}, "sequences_per_shard is 3 in the store and 2 now"),
        ({"identity": Identity("x", "t" * 64, VOCAB)}, "its model is mmmmmmmmmmmm, this model is x"),
    ],
)
def test_a_store_made_with_other_settings_is_not_gone_on_with(
    tmp_path: Path, rows: list[SequenceRows], change: dict[str, object], message: str
):
    write(tmp_path, rows, make_manifest(rows), shards=[0])
    with pytest.raises(StoreError, match=message):
        TeacherStoreWriter(tmp_path, make_manifest(rows, **change))


def test_paths_may_change_between_runs(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows), shards=[0])
    TeacherStoreWriter(tmp_path, make_manifest(rows, model_path="elsewhere", texts=()))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "x" * 64, "its model is mmmmmmmmmmmm, this model is xxxxxxxxxxxx"),
        ("tokenizer", "x" * 64, "its tokenizer is tttttttttttt, this model's is xxxxxxxxxxxx"),
        ("vocab_size", 32, "its vocabulary has 31 entries, this model's logits have 32"),
    ],
)
def test_a_store_of_another_model_is_refused(
    tmp_path: Path, rows: list[SequenceRows], field: str, value: object, message: str
):
    manifest = make_manifest(rows)
    write(tmp_path, rows, manifest)
    store = TeacherStore(tmp_path)
    store.require_match(manifest.identity)
    with pytest.raises(StoreError, match=message):
        store.require_match(dataclasses.replace(manifest.identity, **{field: value}))


def test_no_store(tmp_path: Path):
    with pytest.raises(StoreError, match=r"holds no teacher store \(no manifest.json\)"):
        TeacherStore(tmp_path)


def test_a_newer_version_is_refused(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(StoreError, match=r"version 2; this pyalign reads 'pyalign\.teacher_store' version 1"):
        TeacherStore(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "pyalign.teacher_store", "version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match="manifest"):
        TeacherStore(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path, rows, make_manifest(rows))
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"shard-00001.safetensors is damaged .*; collect again, which rewrites"):
        TeacherStore(tmp_path)


def test_a_shard_of_another_store_is_refused(tmp_path: Path, rows: list[SequenceRows]):
    write(tmp_path / "a", rows, make_manifest(rows))
    write(tmp_path / "b", rows, make_manifest(rows, prompt_digest="another"))
    shard_path(tmp_path / "a", 1).write_bytes(shard_path(tmp_path / "b", 1).read_bytes())
    with pytest.raises(StoreError, match="belongs to another store; collect again, which rewrites it alone"):
        TeacherStore(tmp_path / "a")


def test_a_shard_has_all_its_sequences(tmp_path: Path, rows: list[SequenceRows]):
    writer = TeacherStoreWriter(tmp_path, make_manifest(rows))
    with pytest.raises(StoreError, match="sequences: got 2 for shard 0; wanted 3"):
        writer.write(0, rows[:2])


def test_rows_are_those_that_the_manifest_announces(tmp_path: Path, rows: list[SequenceRows]):
    writer = TeacherStoreWriter(tmp_path, make_manifest(rows))
    teacher = rows[1].teacher
    for wrong, message in (
        (teacher._replace(residual=None), r"sequences\[1\]\.teacher\.residual: got shape None; wanted \(1,\)"),
        (teacher._replace(indices=teacher.indices[:, 1:]), r"indices: got shape \(1, 4\); wanted \(1, 5\)"),
        (teacher._replace(temperature=2.0), r"teacher\.temperature: got 2\.0; wanted 1\.0, the store's"),
    ):
        with pytest.raises(StoreError, match=message):
            writer.write(0, [rows[0], rows[1]._replace(teacher=wrong), rows[2]])
    assert writer.missing() == [0, 1, 2]


@pytest.mark.parametrize("index", [-1, len(LENGTHS)])
def test_a_sequence_beyond_the_store_is_refused(tmp_path: Path, rows: list[SequenceRows], index: int):
    write(tmp_path, rows, make_manifest(rows))
    with pytest.raises(IndexError, match=f"index: got {index}; wanted 0 <= index < 7"):
        TeacherStore(tmp_path).sequence(index)


def test_float32_is_no_dtype_of_the_store(tmp_path: Path, rows: list[SequenceRows]):
    with pytest.raises(StoreError, match="logprob_dtype: got 'float32'; wanted one of float16, bfloat16"):
        TeacherStoreWriter(tmp_path, make_manifest(rows, logprob_dtype="float32"))


def test_missing_safetensors_names_the_extra(tmp_path: Path, rows: list[SequenceRows], monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    writer = TeacherStoreWriter(tmp_path, make_manifest(rows))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pyalign\[cli\]'"):
        writer.write(0, rows[:3])
    assert writer.missing() == [0, 1, 2]
    assert isinstance(rows[0].teacher, TopKLogprobs)


def test_files_have_the_permissions_of_any_other(tmp_path: Path, rows: list[SequenceRows]):
    """A store that one account collects, another trains on."""
    other = tmp_path / "other"
    other.touch()
    write(tmp_path / "store", rows, make_manifest(rows))
    for shard in range(3):
        assert shard_path(tmp_path / "store", shard).stat().st_mode == other.stat().st_mode
