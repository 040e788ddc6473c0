"""Methods that are presets of the block-coordinate engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from misa.integration.trainer import TrainerOptimizer
from misa.methods.base import Hyperparameters, Method

# What every method of the engine can be told; None leaves the choice to the preset.
ENGINE_OPTIONS: dict[str, Any] = {
    "granularity": None,
    "order": None,
    "include": None,
    "exclude": (),
    "always_on": (),
    "always_on_lr": None,
    "round_warmup": None,
    "state_policy": None,
    "state_format": "master",
    "residual": "cpu",
    "step_in_backward": False,
    "shard_state": False,
    "inner": "adamw",
    "record": None,
}

# What happens to the active weights; None is the engine's own AdamW.
INNER: dict[str, type[torch.optim.Optimizer] | None] = {"adamw": None, "sgd": torch.optim.SGD}


def method(
    name: str,
    description: str,
    defaults: dict[str, Any],
    preset: str | None = None,
    *,
    fixed: dict[str, Any] | None = None,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    wrap: Callable[[nn.Module, dict[str, Any]], nn.Module] | None = None,
) -> Method:
    """A row of the method table for a preset of the engine.

    Args:
        name: Name of the method.
        description: What is trained and what is kept in memory.
        defaults: Its options beside and over `ENGINE_OPTIONS`; None leaves the choice to the preset.
        preset: Name of the preset in `misa.integration.trainer.PRESETS`. Default: the method's own.
        fixed: Arguments of the preset that make it this method, not to be chosen.
        resolve: Turns options into arguments of the preset. Default: they are the same.
        wrap: Changes the model first, given the options; what it leaves trainable is split into blocks.
    """
    defaults = {**ENGINE_OPTIONS, **defaults}

    def apply(
        model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
    ) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
        if wrap is not None:
            model = wrap(model, options)
        chosen = resolve({k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
        share = chosen.get("effective_share")
        if share is not None and chosen["eta"] != "auto":
            raise ValueError(f"effective_share={share}: goes with eta=auto, not eta={chosen['eta']}")
        inner = chosen.pop("inner")
        if inner not in INNER:
            raise ValueError(f"inner={inner!r}: must be one of {', '.join(INNER)}")
        hyperparameters = hyper.adam()
        if INNER[inner] is not None:
            chosen["inner"] = INNER[inner]
        given = {k: v for k, v in chosen.items() if v is not None}
        if "budget" in chosen:
            given["budget"] = chosen["budget"]
        arguments = {"preset": preset or name, **hyperparameters, "seed": hyper.seed, **(fixed or {}), **given}
        return model, (TrainerOptimizer, arguments)

    return Method(name, description, apply, defaults)
