"""Heads that are DTensors: sharded or replicated over the ranks of data-parallel training, as FSDP2 keeps them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from pyalign import _checks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # which nobody has a DTensor without
    return module is not None and isinstance(x, module.DTensor)


def whole(name: str, x: Any) -> Any:
    """``x``, gathered in one collective if it is a DTensor; anything else as it is.

    Each rank's loss is that of its own tokens, so the ranks' gradients differ: backward averages them over the mesh
    and keeps each rank's shard (one reduce-scatter), which is how FSDP2 and DDP treat the other parameters.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    if any(placement.is_partial() for placement in x.placements):
        wanted = "a DTensor that is sharded or replicated, or a plain tensor"
        _checks.refuse(name, f"a DTensor with placements {x.placements}", wanted, TypeError)
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def head(prefix: str, hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias whole; ``prefix`` is that of the arguments' names. Hidden states are those of a rank's tokens."""
    if is_dtensor(hidden):
        given = f"a DTensor with placements {hidden.placements}"
        _checks.refuse(prefix + "hidden", given, "this rank's tokens as a plain tensor, such as .to_local()", TypeError)
    return whole(prefix + "weight", weight), whole(prefix + "bias", bias)
