"""The torch.library ops of log-probs and their autograd.

A forward pass that needs a graph keeps the logits and a state of three numbers a row, from which backward maps the row
into its gradient: one read, one write. Upstream gradients come per token, so float16 never meets a small factor alone.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def engine(name: str) -> Any:
    """The object with the engine functions (logprob, logprob_gradient, cross_entropy) of a backend."""
    if name == "triton":
        return importlib.import_module("pyalign.kernels.logprob")
    if name == "reference":
        return importlib.import_module("pyalign.reference.logprob")
    return getattr(importlib.import_module("pyalign._native_logprob"), name)()
