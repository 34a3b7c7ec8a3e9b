"""Sections, tables and plots as one Markdown page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyalign._files import atomic_file, write_text
from pyalign._optional import require

COLOURS = ("#246", "#c52", "#2a7", "#84b", "#b92", "#777", "#0aa", "#d58")
NOT_SHOWN = (
    "an alignment tax that vanishes or becomes a bonus with size (the paper's 13B and 52B)",
    "a gain of PMP that still grows at 52B",
    "harmlessness that generalises from a helpful prompt",
    "TruthfulQA getting worse with size",
    "Elo ratings by people",
)


class Claim(NamedTuple):
    """A row of the opening table."""

    claim: str
    shown: str
    size: str
    cannot: str


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    text: str
    claims: Sequence[Claim]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def blocks(*parts: str) -> str:
    """Markdown of paragraphs, which may be wrapped anywhere, and of tables and plots, which are kept as they are."""
    return "\n\n".join(part if part.startswith(("|", "!")) else " ".join(part.split()) for part in parts)


def figure(columns: int) -> tuple[Any, list[Any]]:
    """A matplotlib figure of ``columns`` panels."""
    made = require("matplotlib.figure", extra="bench").Figure(
        figsize=(1 + 4.2 * columns, 4.2), dpi=110, layout="constrained"
    )
    panels = made.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return made, list(panels)


def save(made: Any, directory: Path, name: str) -> str:
    """Writes the figure as PNG; returns Markdown that shows it."""
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(directory / name) as temporary:
        made.savefig(temporary, format="png", metadata={"Software": None})
    return f"![{name.removesuffix('.png')}]({name})"


def assemble(
    directory: Path, command: str, about: str, sections: Mapping[str, Section], absent: Mapping[str, str]
) -> Path:  # fmt: skip
    """Writes report.md from sections by name; ``absent`` says of the other experiments why they aren't there."""
    claims = [claim for section in sections.values() for claim in section.claims]
    lines = [
        "# A General Language Assistant as a Laboratory for Alignment, in miniature",
        "",
        f"Written by `{command}`. Experiments after Askell et al. 2021 (arXiv 2112.00861) with pyalign's losses and",
        "scores. A figure is a mean over seeds with its 95 % t interval in brackets; a seed settles the task, the data",
        "and the first weights. Beside it stand the number of seeds and n, what a seed's figure is a mean over. (The t",
        "interval of a few seeds may reach beyond 0 or 1.) Experiments with a real model say what their intervals are",
        "over.",
        "",
        about,
        "",
        "## Claims",
        "",
        table(
            ["claim of the paper", "what this reproduction shows", "at what size", "what it cannot show"], claims
        ),
        "",
        "Nothing here can show " + "; ".join(NOT_SHOWN) + ".",
    ]  # fmt: skip
    for name, why in absent.items():
        lines += ["", f"Absent: **{name}** ({why})."]
    for section in sections.values():
        lines += ["", f"## {section.title}", "", section.text.strip()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path
