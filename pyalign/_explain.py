"""What really runs for a call: ``pyalign info --op`` calls the op once per backend and reads torch's profiler.

Nothing is repeated from the code that chooses, so that nothing can be out of date: on a GPU these are the kernels that
were launched, with their grids, and the layouts that were chosen for them, and why; on a CPU pyalign's engines and
torch's operators.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import pyalign
from pyalign import _backends, _ops, _tables
from pyalign._models import choose_device
from pyalign._options import OptionError, one_of
from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import all_cases
from pyalign.benchmark.measure import Upstream, step

DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# Names of autograd's own, and operators that allocate or look at what is there. Those that fill and copy are shown
# where they are called by themselves, not as parts of others.
_NO_WORK = re.compile(
    r"(aten::)?(empty|new_empty|detach|alias|view|as_strided|expand|t|transpose|select|slice|unsqueeze|squeeze|to|"
    r"result_type|promote_types|resolve_\w+|set_|resize_|reshape|unbind)(_\w+)?$|autograd::|(?!aten::|pyalign::cpu::)"
)
_FILLS = re.compile(r"aten::(fill_|zero_|scalar_tensor|copy_)$")
_DETAILS = {  # of a kernel, as the profiler calls them
    "grid": "grid",
    "block": "block",
    "shared memory": "shared bytes",
    "registers per thread": "registers",
    "est. achieved occupancy %": "occupancy %",
}


def explain(op: str, sizes: list[str], dtype: str | None, device: str) -> dict[str, Any]:
    """Who serves ``op`` for inputs of this shape, and what runs: forward, and backward where the op has gradients.

    Args:
        sizes: overrides of the benchmark's shape, each ``name=number``.
        dtype: of DTYPES; None: that of the benchmark.
        device: cpu, cuda, cuda:1 ..., or auto.

    Raises:
        OptionError: an argument that can't be followed.
    """
    one_of("op", op, _ops.OPS)
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
    where = choose_device(device)
    case = _case(op, sizes, None if dtype is None else DTYPES[dtype], where)
    choice = _backends.choose(where, case.dtype)
    report: dict[str, Any] = {"op": op, "case": case.name, "device": str(where), "choice": choice.backend}
    report["reason"] = choice.reason
    if where.type == "cpu":
        report["threads"] = torch.get_num_threads()
        native, _ = _backends.native()
        report["cpu_isa"] = None if native is None else native.cpu.isa()
    report["backends"] = {name: _backend(name, case, where) for name in _backends.BACKENDS}
    return report


def _case(op: str, sizes: list[str], dtype: torch.dtype | None, device: torch.device) -> Case:
    cases = [x for x in all_cases(device) if x.op == op]
    case = next((x for x in cases if x.dtype == dtype), cases[0])
    shape: dict[str, int] = {}
    for text in sizes:
        name, _, number = text.partition("=")
        if name not in case.shape or not number.isdecimal() or int(number) < 1:
            wanted = " ".join(f"{key}={size}" for key, size in case.shape.items())
            raise OptionError("shape", f"got {text!r}; wanted some of {wanted}, with other numbers")
        shape[name] = int(number)
    return case.at(shape).replaced(dtype=dtype or case.dtype)


def _backend(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """Why it can't serve, or what it runs."""
    refusal = _backends.refusal(name, device, case.dtype)
    if refusal:
        return {"refusal": refusal}
    try:
        with pyalign.backend(name):
            run = step(case, case.ours, case.inputs(device, 0), Upstream())
            with _tables.watched() as choices:
                run()  # compiles, allocates
            return {"choices": [x._asdict() for x in dict.fromkeys(choices)], "runs": _traced(run, device)}
    except (RuntimeError, ValueError) as error:  # what it refuses for these options alone
        return {"refusal": str(error)}


def _traced(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The kernels of a call, on a CPU engines and operators, in their order."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with tempfile.TemporaryDirectory() as directory, _quiet(), _named_engines():
        with profile(activities=activities) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
        path = str(Path(directory, "trace.json"))
        profiler.export_chrome_trace(path)
        events = json.loads(Path(path).read_text())["traceEvents"]
    return kernels(events) if on_gpu else operators(events)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The profiler's C++ speaks on standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _named_engines() -> Generator[None]:
    """C++ engines are not operators of torch: they are given names in the trace."""
    try:
        from pyalign import _native
    except ImportError:
        yield
        return
    call = _native.OnCpu._call  # pyright: ignore[reportPrivateUsage]

    def named(self: Any, name: str, *arguments: Any) -> None:
        with record_function(f"pyalign::cpu::{name}"):
            call(self, name, *arguments)

    with mock.patch.object(_native.OnCpu, "_call", named):
        yield


def kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels, copies and fills on the device, from a trace's events."""
    found = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found.sort(key=lambda e: e["ts"])
    return [
        {
            "name": short_name(e["name"]) if e["cat"] == "kernel" else e["name"],
            **{ours: e["args"][theirs] for theirs, ours in _DETAILS.items() if theirs in e.get("args", {})},
        }
        for e in found
    ]


@dataclass
class _Operator:
    name: str
    end: float
    inner: list[_Operator] = field(default_factory=list[Any])

    def works(self) -> bool:
        return not (_NO_WORK.match(self.name) or _FILLS.match(self.name)) or any(x.works() for x in self.inner)

    def working(self) -> list[str]:
        """Of itself and what it calls: the innermost that compute something."""
        if _NO_WORK.match(self.name) or any(x.works() for x in self.inner):
            return [name for x in self.inner for name in x.working()]
        return [self.name]


def operators(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """pyalign's engines and the innermost of torch's operators that compute, and how often each was called."""
    found = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    root = _Operator("autograd::", math.inf)
    stack = [root]
    for event in sorted(found, key=lambda e: (e["ts"], -e["dur"])):
        while event["ts"] >= stack[-1].end:
            stack.pop()
        stack[-1].inner.append(_Operator(event["name"], event["ts"] + event["dur"]))
        stack.append(stack[-1].inner[-1])
    return [{"name": name, "calls": count} for name, count in Counter(root.working()).items()]


def short_name(name: str) -> str:
    """A kernel's name without result, namespaces and parameters: ``distill_rows<bfloat16, ForwardKL>``."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("__nv_bfloat16", "bfloat16")
    name = re.sub(r"\b__half\b", "float16", name)
    depth = 0
    for i, letter in enumerate(name):  # cut the parameter list: the first bracket outside of template arguments
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\b(?:\w+::)+(?=\w)", "", name)


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['case']} on {report['device']}: {report['choice']} ({report['reason']})"]
    if report.get("cpu_isa"):
        lines.append(f"CPU kernels: {report['cpu_isa']}, {report['threads']} threads")
    for name, found in report["backends"].items():
        if "refusal" in found:
            lines.append(f"{name}: no, {found['refusal']}")
            continue
        lines.append(f"{name}:")
        lines += [f"    {x['what']}: {x['reason']}" for x in found.get("choices", [])]
        for entry in found["runs"]:
            details = ", ".join(f"{key} {_text(value)}" for key, value in entry.items() if key != "name")
            lines.append(f"    {entry['name']}{'  ' if details else ''}{details}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)
