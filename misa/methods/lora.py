"""LoRA by PEFT: low-rank adapters on all linear layers, AdamW on the adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from misa.methods.base import Hyperparameters, Method


def _apply(
    model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options["lora_r"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options["lora_dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # PEFT keeps adapters in fp32 beside bf16 weights, so plain AdamW needs no master copies.
    return get_peft_model(model, config), (torch.optim.AdamW, {**hyper.adam(), "fused": True})


METHOD = Method(
    "lora",
    "low-rank adapters on all linear layers (PEFT); fp32 adapters, their gradients and two moments",
    _apply,
    {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
)
