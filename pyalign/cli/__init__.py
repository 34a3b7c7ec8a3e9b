"""The command line, ``pyalign``. It needs the extra ``pyalign[cli]``, ``info`` excepted."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from pyalign._optional import require

if TYPE_CHECKING:
    import typer


def build_app() -> typer.Typer:
    """The typer application with all sub-commands."""
    typer = require("typer")
    from pyalign.cli import bench, distill, eval, info, rank, score

    app = typer.Typer(name="pyalign", no_args_is_help=True, help="The loss layer of alignment training.")
    app.command()(info.info)
    app.command()(bench.bench)
    app.add_typer(distill.app, name="distill")
    app.command("eval", no_args_is_help=True)(eval.evaluate)
    app.command(no_args_is_help=True)(rank.rank)
    app.command(no_args_is_help=True)(score.score)
    return app


def main() -> None:
    """The entry point of the command ``pyalign``."""
    if sys.argv[1:] in (["info"], ["info", "--json"]) and importlib.util.find_spec("typer") is None:
        from pyalign import _info

        return _info.show(as_json=sys.argv[2:] == ["--json"])
    try:
        build_app()()
    except ModuleNotFoundError as error:
        if "pip install 'pyalign[" not in str(error):
            raise
        sys.exit(f"pyalign: {error}")
