"""Parameters that FSDP2 (`fully_shard`) shards over the processes: the part that lies here, and sums over all parts.

A sharded parameter is a `DTensor`. The optimizer works on the local part, an ordinary tensor that shares its memory;
what it saves is wrapped into a DTensor again, so that `torch.distributed.checkpoint` can load it onto another number
of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: at once for an ordinary one, and without importing what DTensors need."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this process, in the same memory; the tensor itself unless it is sharded."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.detach().to_local()  # type: ignore[attr-defined]


def like_parameter(value: Any, param: Tensor) -> Any:
    """Wrap a local tensor of optimizer state as the parameter it belongs to is sharded; other values as they are."""
    if not is_sharded(param) or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def part_for(value: Any, param: Tensor) -> Any:
    """The local part of saved state, whether it was saved whole or sharded; the reverse of `like_parameter`."""
    if not isinstance(value, Tensor):
        return value
    if not is_sharded(param):
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    if is_sharded(value):
        return local_part(value)
    if value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return local_part(distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None))


class Sharding:
    """How the trained parameters of a model are sharded: all alike.

    Args:
        params: Parameters, some of which are DTensors.

    Raises:
        ValueError: If they are sharded in different ways, or only some of them are.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        kinds = {
            (p.device_mesh, tuple(str(x) for x in p.placements)) if is_sharded(p) else None  # type: ignore[attr-defined]
            for p in params
        }
        if len(kinds) > 1:
            raise ValueError(
                "parameters are sharded in different ways (tensor parallel training, or fully_shard on a part of the "
                "model): call fully_shard on every layer and on the model, and on nothing else"
            )
        first = next(p for p in params if is_sharded(p))
        mesh: Any = first.device_mesh  # type: ignore[attr-defined]
        placements: Any = first.placements  # type: ignore[attr-defined]
        self._groups = [mesh.get_group(i) for i, x in enumerate(placements) if x.is_shard()]
        self.device = torch.device(mesh.device_type)

    def total(self, numbers: Any) -> Any:
        """Sums, over all parts, of numbers that each process has of its own part: a list of floats, or a tensor."""
        values = numbers
        if isinstance(numbers, list):
            values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        for group in self._groups:
            torch.distributed.all_reduce(values, group=group)
        return values.tolist() if isinstance(numbers, list) else values


def settle_types(model: nn.Module) -> None:
    """Let FSDP2 look at the parameters' types while all are trainable.

    It does so in its first forward pass, and what is frozen then has no type to reduce its gradients in later on. The
    call is a private one: without it, all works but a mixed-precision policy.
    """
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is not None and hasattr(state(), "_lazy_init"):
            state()._lazy_init()
