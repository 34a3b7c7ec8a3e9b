"""Evaluations of preference models, and their plots."""

from pyalign.evaluation.calibration import plot_calibration

__all__ = ["plot_calibration"]
