"""``pyalign info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pyalign import _explain, _info, _ops
from pyalign._options import OptionError
from pyalign.cli._session import refusals


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, say for a bug report.")] = False,
    op: Annotated[
        str | None,
        typer.Option(help=f"Call this op once per backend and print what runs. One of {', '.join(_ops.OPS)}."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Of the op's inputs, as rows=8192; repeat for more. Default: the benchmark's."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the op's inputs: {', '.join(_explain.DTYPES)}.")] = None,
    device: Annotated[str, typer.Option(help="Of the op's inputs: cpu, cuda, cuda:1 ..., or auto.")] = "auto",
) -> None:
    """Print what was built for which targets, the GPUs, and the backend that each op would run, and why.

    With --op: the backends that serve it, and the kernels with their grids that they run, from torch's profiler.
    """
    if op is None:
        with refusals("pyalign info", {}, memory=""):
            given = {"shape": shape, "dtype": dtype, "device": None if device == "auto" else device}
            for name, value in given.items():
                if value:
                    raise OptionError(name, "it is for --op alone")
        return _info.show(as_json)
    with refusals("pyalign info", {}, memory="--shape"):
        report = _explain.explain(op, shape or [], dtype, device)
    print(json.dumps(report, indent=2) if as_json else _explain.render(report))
