"""``pyalign info``."""

from typing import Annotated

import typer

from pyalign import _info


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, say for a bug report.")] = False,
) -> None:
    """Print what was built for which targets, the GPUs, and the backend that each op would run, and why."""
    _info.show(as_json)
