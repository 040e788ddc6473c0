"""The optimizer: blocks, importance, sampling, the engine, and the published methods as presets. Needs torch alone."""

from misa.legacy import BlockCoordinateDesentOptimizer
from misa.optimizer.blocks import Block, partition, rest
from misa.optimizer.engine import BlockCoordinateOptimizer
from misa.optimizer.importance import ScoreRule
from misa.optimizer.presets import LISA, MISA, BAdam
from misa.optimizer.settings import Settings

__all__ = [
    "LISA",
    "MISA",
    "BAdam",
    "Block",
    "BlockCoordinateDesentOptimizer",
    "BlockCoordinateOptimizer",
    "ScoreRule",
    "Settings",
    "partition",
    "rest",
]
