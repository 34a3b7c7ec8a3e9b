"""Batched pairwise scoring."""

from __future__ import annotations

from pyalign._bradley_terry import BradleyTerryFit, ConvergenceError, NoMaximumError, bradley_terry

__all__ = ["BradleyTerryFit", "ConvergenceError", "NoMaximumError", "bradley_terry"]
