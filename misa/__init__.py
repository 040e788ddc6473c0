"""MISA: memory-efficient training of large language models by module-wise importance sampling.

The public names are loaded when they are first used, so that commands which need no tensors start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from misa._version import __version__

if TYPE_CHECKING:
    from misa.integration.trainer import TrainerOptimizer
    from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateOptimizer, Settings, partition

_HOMES = {
    "TrainerOptimizer": "misa.integration.trainer",
    **dict.fromkeys(("LISA", "MISA", "BAdam", "BlockCoordinateOptimizer", "Settings", "partition"), "misa.optimizer"),
}

__all__ = [
    "LISA",
    "MISA",
    "BAdam",
    "BlockCoordinateOptimizer",
    "Settings",
    "TrainerOptimizer",
    "__version__",
    "partition",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
