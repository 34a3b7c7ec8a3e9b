"""Which backend runs an op: the default by device and dtype, or the one that a script forces.

``cpu`` (C++), ``cuda`` (CUDA C++), ``triton`` (any GPU that Triton supports, or its interpreter) and ``reference``
(plain torch). Force one with ``with pyalign.backend("triton"):`` or the environment variable ``PYALIGN_BACKEND``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GPU_TOPK_LIMIT = 256
TRITON_TOPK_VOCAB = 1 << 18

_warned: set[str] = set()
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("pyalign_backend", default=None)


@contextlib.contextmanager
def backend(name: str | None) -> Generator[None]:
    """Force a backend for the ops called in this context (of this thread or task); None restores the default.

    A forced backend that can't serve a call raises a ``RuntimeError`` that says why.
    """
    token = _forced.set(_known(name, "name"))
    try:
        yield
    finally:
        _forced.reset(token)


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}; wanted one of {', '.join(BACKENDS)}")
    return name


class Choice(NamedTuple):
    backend: str
    reason: str
    warning: str = ""  # for a call that kernels should serve and don't


@functools.cache
def native() -> tuple[Any, str]:
    """The compiled module, or None and why it can't be loaded."""
    try:
        return importlib.import_module("pyalign._C"), ""
    except ImportError as error:
        return None, f"pyalign._C can't be imported ({error})"


@functools.cache
def _cuda_refusal(index: int) -> str:
    """Why the CUDA kernels can't run on this GPU; empty if they can."""
    module, reason = native()
    if module is None:
        return reason
    if not hasattr(module, "cuda"):
        return "this build of pyalign has no CUDA kernels (no nvcc when it was installed)"
    capability = torch.cuda.get_device_capability(index)
    targets: list[str] = module.build_info()["cuda_archs"]
    if any(_runs_on(target, capability) for target in targets):
        return ""
    built = ", ".join(targets)
    return f"the CUDA kernels were built for {built}, not for compute capability {capability[0]}.{capability[1]}"


def _runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled for ``target``: "90" serves its own generation from 9.0 on, "90a" 9.0 alone,
    "90+PTX" every later GPU."""
    number = target.removesuffix("+PTX")
    built = divmod(int(number.rstrip("a")), 10)
    if number.endswith("a"):
        return built == capability
    return built <= capability and (number != target or built[0] == capability[0])


@functools.cache
def _triton_refusal(device_type: str) -> str:
    try:
        importlib.import_module("triton")
    except ImportError:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a CPU through its interpreter alone: set TRITON_INTERPRET=1"
    return ""


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, k: int = 0, wide: bool = False, split: bool = False
) -> str:
    """Why backend ``name`` can't serve logits of this device and dtype; empty if it can.

    ``k`` and ``wide`` are for the extraction of the ``k`` largest logits of rows, longer than TRITON_TOPK_VOCAB or not;
    ``split`` is for rows of which every rank of a process group holds a slice.
    """
    if name == "reference":
        return ""
    if name == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device.type}"
        return native()[1] or ("" if dtype in (*_KERNEL_DTYPES, torch.float64) else f"{dtype} has no kernel")
    if dtype not in _KERNEL_DTYPES:
        return f"{dtype} has no GPU kernel"
    if k > _GPU_TOPK_LIMIT:
        return f"k = {k} is over the GPU kernels' limit of {_GPU_TOPK_LIMIT}"
    if name == "cuda":
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the tensors are on {'hip' if torch.version.hip else device.type}"
        return "they take whole rows, not a vocabulary that is split" if split else _cuda_refusal(device.index or 0)
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"the tensors are on {device.type}"
    if wide:
        return f"the rows are longer than the Triton kernel's limit of {TRITON_TOPK_VOCAB}"
    return _triton_refusal(device.type)


@functools.cache
def _reader() -> Callable[[str], str | None]:
    """Reads an environment variable. os.environ.get takes a fiftieth of a small loss for one that is not set."""
    module = native()[0]
    return os.environ.get if module is None else module.getenv


def getenv(name: str) -> str | None:
    return _reader()(name)


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for these tensors, and why."""
    return _decide(_forced.get(), _reader()("PYALIGN_BACKEND"), device, dtype, 0, False, False)


@torch.compiler.assume_constant_result
def choose_name(device: torch.device, dtype: torch.dtype, k: int = 0, wide: bool = False, split: bool = False) -> str:
    """The backend's name; while torch.compile traces, it is a constant of the graph. Warns, once for each kind of call,
    where plain torch stands in for kernels that should be there."""
    variable = _reader()("PYALIGN_BACKEND")
    choice = _decide(_forced.get(), variable, device, dtype, k, wide, split)
    if choice.warning and choice.warning not in _warned:
        _warned.add(choice.warning)
        warnings.warn(choice.warning, RuntimeWarning, stacklevel=3)
    return choice.backend


@functools.cache
def _decide(
    forced: str | None,
    variable: str | None,
    device: torch.device,
    dtype: torch.dtype,
    k: int,
    wide: bool,
    split: bool,
) -> Choice:
    source = "pyalign.backend"
    if forced is None:
        forced, source = _known(variable or None, "PYALIGN_BACKEND"), "PYALIGN_BACKEND"
    if forced is not None:
        why_not = refusal(forced, device, dtype, k, wide, split)
        if why_not:
            raise RuntimeError(f"backend {forced!r}, forced by {source}, can't serve this call: {why_not}")
        return Choice(forced, f"forced by {source}")
    reasons: list[str] = []
    for name in {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ()):
        why_not = refusal(name, device, dtype, k, wide, split)
        if not why_not:
            return Choice(name, "; ".join([f"default on {device.type}", *reasons]))
        reasons.append(f"not {name}: {why_not}")
    warning = ""
    if reasons and dtype in (*_KERNEL_DTYPES, *((torch.float64,) if device.type == "cpu" else ())):
        warning = f"pyalign: plain torch serves {dtype} tensors on {device.type}: {'; '.join(reasons)}"
    return Choice("reference", "; ".join(reasons) or f"no kernels for {device.type}", warning)


@functools.cache
def engine(name: str) -> Any:
    """The object with the engine functions (distill, topk_distill, topk, scale) of a kernel backend."""
    if name == "triton":
        return importlib.import_module("pyalign.kernels.distill")
    return getattr(importlib.import_module("pyalign._native"), name)()
