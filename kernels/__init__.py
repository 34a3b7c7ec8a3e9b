"""Triton kernels: the portable twin of the CUDA ones, for any GPU that Triton serves.

A module here mirrors one of ``csrc/common`` (same names, same formulas) and offers its engine functions over
torch tensors. Importing this package does not import triton; importing a module of it does. With
``TRITON_INTERPRET=1`` in the environment before that, the kernels run on CPU tensors in Triton's interpreter:
slow, and for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["available"]


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and if not, why."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() or torch.xpu.is_available():
        return True, ""
    return False, "torch sees no GPU, and TRITON_INTERPRET=1, which runs the kernels on a CPU, is not set"
