"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str = "cli") -> Any:
    """Import ``module``; where it is missing, the error names the extra of pyalign that brings it.

    Returns ``Any``: these packages have no or partial types.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed; it comes with the extra '{extra}': pip install 'pyalign[{extra}]'",
            name=error.name,
        ) from error
