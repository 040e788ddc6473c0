"""Full training by plain stochastic gradient descent, the authors' `--optim sgd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from misa.methods.adamw import AllOn
from misa.methods.base import Hyperparameters, Method


def _apply(
    model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    return model, (AllOn, {"lr": hyper.lr, "weight_decay": hyper.weight_decay, "inner": torch.optim.SGD})


METHOD = Method(
    "sgd",
    "stochastic gradient descent on every parameter; no state but an fp32 master copy of bf16 weights",
    _apply,
)
