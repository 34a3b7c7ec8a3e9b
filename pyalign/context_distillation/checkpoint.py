"""The state of a training run in one file without pickle: written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalign._files import atomic_file
from pyalign._optional import require


def save_checkpoint(
    path: Path, *, step: int, settings: str, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Save weights by name, the optimizer's state of each (its parameters, in order) and torch's RNG states.

    The learning rate and the data's order are functions of ``step`` and the settings, so they need no state.
    """
    tensors = {f"weight/{name}": tensor.detach() for name, tensor in weights.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    for i, name in enumerate(weights):
        tensors |= {f"optimizer/{key}/{name}": value for key, value in state.get(i, {}).items()}
    with atomic_file(path) as temporary:
        metadata = {"step": str(step), "settings": settings}
        require("safetensors.torch").save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata=metadata
        )


def load_checkpoint(path: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put the saved state into ``weights``, ``optimizer`` and torch's generators; returns the step."""
    with require("safetensors").safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        names = list(file.keys())
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for i, (name, weight) in enumerate(weights.items()):
                weight.copy_(file.get_tensor(f"weight/{name}"))
                state[i] = {}
                for key in names:
                    kind, _, rest = key.partition("/")
                    field, _, owner = rest.partition("/")
                    if kind == "optimizer" and owner == name:
                        state[i][field] = file.get_tensor(key)
        groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(file.get_tensor("rng/cpu"))
        cuda = sorted(k for k in names if k.startswith("rng/cuda"))
        if cuda and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([file.get_tensor(f"rng/cuda{i}") for i in range(len(cuda))])
    return step


def checkpoint_settings(path: Path) -> dict[str, Any]:
    """The settings a checkpoint was made with."""
    with require("safetensors").safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["settings"])
