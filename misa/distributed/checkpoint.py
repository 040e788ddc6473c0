"""Save and load a model and its optimizer through `torch.distributed.checkpoint`, on any number of processes.

Each process writes and reads its own part of what is sharded. Which tensors a checkpoint holds depends on the blocks
that were active, so loading asks the checkpoint, not the optimizer, what there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from misa.distributed.wrapped import unwrapped

if TYPE_CHECKING:
    from misa.distributed.workers import Workers
    from misa.optimizer.engine import BlockCoordinateOptimizer

MODEL, OPTIMIZER = "model", "optimizer"


def save(folder: str | Path, model: nn.Module, optimizer: BlockCoordinateOptimizer) -> None:
    """Write a checkpoint; all processes call this together.

    Args:
        folder: Folder to write, on a disk that all processes see.
        model: The model; of a wrapped or compiled one, what is inside.
        optimizer: Its optimizer.
    """
    model = unwrapped(model, resting=False)
    dcp.save({MODEL: model.state_dict(), OPTIMIZER: optimizer.state_dict(in_parts=True)}, checkpoint_id=str(folder))


def load(folder: str | Path, model: nn.Module, optimizer: BlockCoordinateOptimizer) -> None:
    """Continue from a checkpoint, also one of another number of processes; all processes call this together.

    The model is written to last, so that a checkpoint that is refused leaves it as it was.

    Args:
        folder: Folder that `save` wrote.
        model: The model, of the same architecture.
        optimizer: An optimizer with the same settings.

    Raises:
        ValueError: If the checkpoint belongs to another model or optimizer.
    """
    model = unwrapped(model, resting=False)
    weights = model.state_dict()
    params = {name: p for group in optimizer.param_groups for name, p in _named(optimizer, group)}
    found = dcp.FileSystemReader(str(folder)).read_metadata()
    state: dict[str, Any] = {"state": {}}  # which has no entry where nothing holds state
    shapes: dict[str, list[int]] = {}
    for key, stored in found.state_dict_metadata.items():
        path = (found.planner_data or {}).get(key)
        if path is not None and path[0] == MODEL and isinstance(stored, TensorStorageMetadata):
            shapes[path[1]] = list(stored.size)
        if path is None or path[0] != OPTIMIZER:
            continue
        # state -> name of the parameter -> name of the moment
        param = params.get(path[2]) if path[1] == "state" else None
        if path[1] == "state" and param is None:
            raise ValueError(f"{folder}: has state of {path[2]}, which this optimizer does not train")
        _set(state, path[1:], _room(stored, param, optimizer._workers))
    own = {name: list(value.shape) for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if different := sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name)):
        name = different[0]
        raise ValueError(
            f"{folder}: does not belong to this model: {len(different)} tensors differ; first {name}, whose shape was "
            f"{shapes.get(name)} and is {own.get(name)} (None: there is no such tensor)"
        )
    dcp.load({OPTIMIZER: state}, checkpoint_id=str(folder))
    optimizer.load_state_dict(state)
    dcp.load({MODEL: weights}, checkpoint_id=str(folder))
    model.load_state_dict(weights)


def _named(optimizer: BlockCoordinateOptimizer, group: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
    return [(optimizer._entries[p].name, p) for p in group["params"] if p in optimizer._entries]


def _room(stored: Any, param: nn.Parameter | None, workers: Workers) -> Any:
    """Memory to load a value into: sharded as the state of its parameter, if it belongs to one."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    if param is None or not stored.size:
        return torch.empty(stored.size, dtype=stored.properties.dtype)
    local = workers.local_part(param)
    size = local.shape if stored.size == param.shape else stored.size
    return workers.like_parameter(torch.empty(size, dtype=stored.properties.dtype, device=local.device), param)


def _set(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value into nested dictionaries and lists, which grow as needed; numbers are indices of lists."""
    key, *rest = path
    if isinstance(tree, list):
        tree.extend([None] * (key + 1 - len(tree)))
        if rest and tree[key] is None:
            tree[key] = [] if isinstance(rest[0], int) else {}
    elif rest:
        tree.setdefault(key, [] if isinstance(rest[0], int) else {})
    if rest:
        _set(tree[key], tuple(rest), value)
    else:
        tree[key] = value
