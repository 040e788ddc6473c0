"""Full fine-tuning: AdamW on every parameter."""

from __future__ import annotations

from typing import Any

from torch import nn

from misa.methods.base import Hyperparameters, Method
from misa.optimizer import BlockCoordinateOptimizer, Settings
from misa.optimizer.blocks import REST_KINDS


class _AllOn:
    """Factory of an engine with every block on: torch's fused AdamW, with fp32 masters for low-precision weights."""

    def __call__(self, model: nn.Module, **hyper: Any) -> BlockCoordinateOptimizer:
        return BlockCoordinateOptimizer(model, Settings(order="all", always_on=REST_KINDS), **hyper)


def _apply(
    model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    return model, (_AllOn, hyper.adam())


METHOD = Method(
    "adamw",
    "AdamW on every parameter; two fp32 moments for each, and an fp32 master copy of bf16 weights",
    _apply,
)
