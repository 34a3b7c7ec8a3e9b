"""Committed baselines of what can be counted without timing: reading, comparing, rewriting them.

A baseline is a JSON file of sections (an instruction set, a GPU target) that hold figures by name, and of what they
were made with: other compilers count otherwise, so a test that finds another one skips and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent / "budgets"
MORE, FEWER = 0.03, 0.10  # what passes: a share more than the baseline, or fewer

Figures = Mapping[str, float]
Sections = dict[str, dict[str, Any]]


def flat(section: Mapping[str, Any]) -> dict[str, float]:
    """Figures by "name" or "name: figure", or "name: figure 1", "name: figure 2" for lists."""
    found: dict[str, float] = {}
    for name, figures in section.items():
        if isinstance(figures, int | float):
            found[name] = figures
            continue
        for figure, value in figures.items():
            if isinstance(value, list):
                found |= {f"{name}: {figure} {i}": one for i, one in enumerate(value, 1)}
            else:
                found[f"{name}: {figure}"] = value
    return found


def complaints(measured: Figures, baseline: Figures) -> list[str]:
    """What isn't as the baseline has it: more, clearly fewer, new or gone. Blocks that fit are better the more."""
    found: list[str] = []
    for name in sorted({*measured, *baseline}):
        if name not in measured or name not in baseline:
            found.append(f"{name}: {'not measured any more' if name in baseline else 'not in the baseline'}")
            continue
        value, limit = measured[name], baseline[name]
        if name.endswith("blocks per processor"):
            if value != limit:
                found.append(f"{name}: {value:g}, {'FEWER than' if value < limit else 'more than'} {limit:g}")
        elif value > limit * (1 + MORE):
            found.append(f"{name}: {value:g}, MORE than {limit:g}" + (f" x {value / limit:.3f}" if limit else ""))
        elif value < limit * (1 - FEWER):
            found.append(f"{name}: {value:g}, fewer than {limit:g} x {value / limit:.3f}")
    return found


def check(measured: Mapping[str, Any], baseline: Mapping[str, Any], command: str) -> None:
    """Fails with every figure that is not as the baseline has it."""
    found = complaints(flat(measured), flat(baseline))
    if found:
        listed = "\n".join(found)
        pytest.fail(f"{listed}\nWhere this is meant (or better), rewrite the baseline: {command}", pytrace=False)


def load(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"made_with": {}, "sections": {}}


def section_of(name: str, section: str, made_with: Mapping[str, str]) -> dict[str, Any]:
    """A section of a baseline; skips the test where that was made with something else."""
    baseline = load(name)
    if baseline["made_with"] != made_with:
        pytest.skip(f"{name}.json was made with {baseline['made_with']}, and here is {dict(made_with)}")
    return baseline["sections"][section]


def rewrite(name: str, made_with: Mapping[str, str], sections: Sections) -> None:
    """Writes the baseline, an entry a line, and prints what has changed."""
    before = load(name)
    parts = [f'{{\n"made_with": {json.dumps(dict(made_with))},\n"sections": {{']
    for i, (section, entries) in enumerate(sections.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        parts.append(f'{"," if i else ""}\n"{section}": {{\n{lines}\n}}')
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text("".join(parts) + "\n}\n}\n")
    if before["made_with"] != made_with:
        print(f"made with {dict(made_with)}, before with {before['made_with']}")
    for section in sorted({*sections, *before["sections"]}):
        old, new = flat(before["sections"].get(section, {})), flat(sections.get(section, {}))
        for figure in sorted({*old, *new}):
            if old.get(figure) != new.get(figure):
                print(f"{section} {figure}: {old.get(figure, 'none')} -> {new.get(figure, 'none')}")
