"""MISA: memory-efficient training of large language models by module-wise importance sampling."""

from misa._version import __version__
from misa.integration.trainer import TrainerOptimizer
from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateOptimizer, Settings, partition

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
