"""What an experiment is, and which there are."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.paper.report import Section
from bench.paper.runs import Store, Unit

PRESETS = ("quick", "full", "gpu")
MODULES = {"objectives": "Objectives", "pmp": "PreferencePretraining", "context": "ContextDistillation"}
"""Module of this package -> its experiment's class, in the order of the report."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes go by the name ("quick", "full", "gpu"); ``text`` is a file or directory of real text, which "gpu" uses."""

    name: str
    device: str = "cpu"
    text: Path | None = None


class Experiment(Protocol):
    """An experiment: ``units`` says what is to be run, ``run`` runs one, ``section`` reads what came of all.

    ``run`` may depend on nothing but the unit's configuration and the states that the store keeps for it. Units of one
    group run one after the other, so that the first may leave a state for the others; ``run`` copes with its absence.
    """

    name: str
    title: str

    def units(self, preset: Preset) -> list[Unit]: ...

    def run(self, unit: Unit, store: Store) -> dict[str, Any]: ...

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        """Of all units of one preset; plots are written to ``directory``."""
        ...


def find(name: str) -> Experiment:
    return getattr(importlib.import_module(f"bench.paper.{name}"), MODULES[name])()
