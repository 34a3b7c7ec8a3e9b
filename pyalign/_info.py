"""What is installed here, what was built for which targets, and which backend each op would run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from pyalign import _backends, _ops
from pyalign._version import __version__


def collect() -> dict[str, Any]:
    """The report as plain values, in the layout of ``pyalign info --json``."""
    module, import_error = _backends.native()
    native: dict[str, Any] = {"error": import_error}
    if module is not None:
        native = {**module.build_info(), "cpu_isa": module.cpu.isa(), "cpu_isas": module.cpu.isas()}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": native,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "triton": {"version": _triton_version(), "interpreter": os.environ.get("TRITON_INTERPRET") == "1"},
        "ops": {op: {device: _backend(op, device) for device in devices} for op in _ops.OPS},
    }


def _gpu(index: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(index)
    refusal = _backends.refusal("cuda", torch.device("cuda", index), torch.float32)
    gpu: dict[str, Any] = {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "cuda_kernels": refusal or "compiled for this GPU",
    }
    if not refusal:
        gpu["distillation_kernels"] = {
            f"{vocab} x bfloat16": _backends.engine("cuda").explain_distill(vocab, torch.bfloat16, "forward_kl", index)
            for vocab in (1024, 32000, 128256, 262144)
        }
    return gpu


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(op: str, device: str) -> dict[str, str | None]:
    try:
        backend, reason = _ops.explain(op, device)
    except (RuntimeError, ValueError) as error:  # a forced backend that can't serve
        return {"backend": None, "reason": str(error)}
    return {"backend": backend, "reason": reason}


def render(info: dict[str, Any]) -> str:
    """The report as text, one fact per line."""
    native, triton = info["native"], info["triton"]
    lines = [
        ("pyalign", info["version"]),
        ("torch", f"{info['torch']}, {info['threads']} threads"),
        ("platform", f"{info['platform']}, Python {info['python']}"),
    ]
    if "error" in native:
        lines.append(("native", native["error"]))
    else:
        openmp = "OpenMP" if native["openmp"] else "no OpenMP"
        targets = ", ".join(native["cuda_archs"])
        lines += [
            ("compiler", f"{native['compiler']}, {openmp}"),
            ("CPU kernels", f"{native['cpu_isa']}, of those built: {', '.join(native['cpu_isas'])}"),
            ("CUDA kernels", f"nvcc {native['cuda']}, targets {targets}" if native["cuda"] else "not built"),
        ]
    for index, gpu in enumerate(info["gpus"]):
        name = f"{gpu['name']}, compute capability {gpu['capability']}"
        lines.append((f"GPU {index}", f"{name}; CUDA kernels: {gpu['cuda_kernels']}"))
        lines += [(f"  rows of {row}", kernel) for row, kernel in gpu.get("distillation_kernels", {}).items()]
    if not info["gpus"]:
        lines.append(("GPUs", "none that torch sees"))
    interpreter = ", in its interpreter" if triton["interpreter"] else ""
    lines.append(("Triton", f"{triton['version']}{interpreter}" if triton["version"] else "not installed"))
    for op, devices in info["ops"].items():
        for device, choice in devices.items():
            lines.append((f"{op} on {device}", f"{choice['backend'] or 'error'}: {choice['reason']}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def show(as_json: bool) -> None:
    info = collect()
    print(json.dumps(info, indent=2) if as_json else render(info))
