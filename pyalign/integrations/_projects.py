"""Projects that the adapters fit and pyalign never installs."""

from __future__ import annotations

import importlib
from typing import Any


def imported(module: str, project: str) -> Any:
    """``module`` of a project; where it is missing, the error names the project.

    Returns ``Any``: none of these projects is installed where types are checked.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed, or has no such module: this needs {project}", name=error.name
        ) from error
