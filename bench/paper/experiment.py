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
MODULES = {
    "objectives": "Objectives",
    "pmp": "PreferencePretraining",
    "context": "ContextDistillation",
    "tax": "AlignmentTax",
    "preference": "PreferenceModel",
}
"""Module of this package -> its experiment's class, in the order of the report."""


class Absent(Exception):
    """Something that an experiment needs isn't there; the message says what."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes go by the name ("quick", "full", "gpu"); ``text`` is a file or directory of real text, which "gpu" uses.

    The others are files of the experiments with a real model: ``model`` (a directory or a GGUF file), ``hhh`` (a
    directory of BIG-bench's four tasks), ``truthful_qa``, ``words``, ``human_eval`` and ``pairs``.
    """

    name: str
    device: str = "cpu"
    text: Path | None = None
    model: Path | None = None
    hhh: Path | None = None
    truthful_qa: Path | None = None
    words: Path | None = None
    human_eval: Path | None = None
    pairs: Path | None = None


class Experiment(Protocol):
    """An experiment: ``units`` says what is to be run, ``run`` runs one, ``section`` reads what came of all.

    ``run`` may depend on nothing but the unit's configuration and the states that the store keeps for it. Units of one
    group run one after the other, so that the first may leave a state for the others; ``run`` copes with its absence.
    """

    name: str
    title: str

    def units(self, preset: Preset) -> list[Unit]:
        """Raises:
        Absent: the preset lacks something that it needs.
        """
        ...

    def run(self, unit: Unit, store: Store) -> dict[str, Any]: ...

    def section(self, results: Sequence[tuple[Unit, dict[str, Any]]], directory: Path) -> Section:
        """Of all units of one preset; plots are written to ``directory``."""
        ...


def find(name: str) -> Experiment:
    return getattr(importlib.import_module(f"bench.paper.{name}"), MODULES[name])()
