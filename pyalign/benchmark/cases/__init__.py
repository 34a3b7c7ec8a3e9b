"""The cases of every system. Shapes are those of the device: a CPU's are smaller."""

from __future__ import annotations

import torch

from pyalign.benchmark.case import Case
from pyalign.benchmark.cases import distill, linear, logprob, ranking, scoring

SYSTEMS = {
    "distill": distill.cases,
    "logprob": logprob.cases,
    "linear": linear.cases,
    "ranking": ranking.cases,
    "scoring": scoring.cases,
}


def all_cases(device: torch.device) -> list[Case]:
    return [case for cases in SYSTEMS.values() for case in cases(device)]
