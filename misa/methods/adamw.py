"""Full training: AdamW on every parameter; with fp32 masters, and, as the published baselines, without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from misa.methods.base import Hyperparameters, Method
from misa.optimizer import BlockCoordinateOptimizer, Settings
from misa.optimizer.blocks import REST_KINDS


class AllOn:
    """Factory of an engine with every block on: torch's fused AdamW, with fp32 masters for low-precision weights."""

    def __call__(
        self, model: nn.Module, inner: Any = None, always_on_lr: float | None = None, **hyper: Any
    ) -> BlockCoordinateOptimizer:
        """Make the optimizer.

        Args:
            model: The model to train.
            inner: Class of another inner optimizer.
            always_on_lr: Learning rate of what is in no layer, if not `lr`.
            **hyper: `lr`, `weight_decay`, `betas`, `eps`.
        """
        settings = Settings(order="all", always_on=REST_KINDS, inner=inner, always_on_lr=always_on_lr)
        return BlockCoordinateOptimizer(model, settings, **hyper)


def _apply(
    model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    return model, (AllOn, {**hyper.adam(), **options})


def _apply_pure(
    model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    return model.to(torch.bfloat16), (torch.optim.AdamW, {**hyper.adam(), "fused": True})


METHOD = Method(
    "adamw",
    "AdamW on every parameter; two fp32 moments for each, and an fp32 master copy of bf16 weights",
    _apply,
    {"always_on_lr": None},
)
PURE = Method(
    "adamw_bf16",
    "AdamW on every parameter, all in bf16 (updates smaller than the spacing of bf16 are lost); two bf16 moments for "
    "each, no master copies",
    _apply_pure,
)
