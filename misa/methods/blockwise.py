"""Methods that are presets of the block-coordinate engine."""

from __future__ import annotations

from typing import Any

from torch import nn

from misa.integration.trainer import TrainerOptimizer
from misa.methods.base import Hyperparameters, Method


def method(name: str, description: str, defaults: dict[str, Any], preset: str | None = None) -> Method:
    """A row of the method table for a preset of the engine.

    Args:
        name: Name of the method.
        description: What is trained and what is kept in memory.
        defaults: Its options; None leaves the choice to the preset.
        preset: Name of the preset in `misa.integration.trainer.PRESETS`. Default: the method's own.
    """

    def apply(
        model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
    ) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v is not None}
        return model, (TrainerOptimizer, {"preset": preset or name, **hyper.adam(), "seed": hyper.seed, **given})

    return Method(name, description, apply, defaults)
