"""LoRA by PEFT: low-rank adapters on the linear layers, AdamW on the adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from misa.methods.base import Hyperparameters, Method

OPTIONS: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all"}


def adapters(model: nn.Module, options: dict[str, Any], use_dora: bool = False) -> nn.Module:
    """Freeze a model and put adapters on it.

    Args:
        model: A freshly loaded model.
        options: `lora_r`, `lora_alpha`, `lora_dropout`, and `lora_target`: "all" linear layers but the head, or the
            last parts of their names, comma separated.
        use_dora: Split each adapted weight into direction and length, and train both.

    Returns:
        A `peft.PeftModel`. PEFT keeps the adapters in fp32 beside bf16 weights.

    Raises:
        ValueError: If a target is the name of no linear layer, or the model has adapters already.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if hasattr(model, "peft_config"):
        raise ValueError("the model is an adapter on another: start from its base model, or from a merged one")
    target = options["lora_target"]
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name in () if target == "all" else map(str.strip, target.split(",")):
        if not any(path.endswith(f".{name}") for path in linear):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise ValueError(f"lora_target is {target!r}: {name!r} is no linear layer; allowed are all, or of {known}")
    config = LoraConfig(
        r=options["lora_r"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options["lora_dropout"],
        target_modules="all-linear" if target == "all" else [name.strip() for name in target.split(",")],
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def method(name: str, description: str, use_dora: bool = False) -> Method:
    """A row of the method table that trains adapters with AdamW.

    Args:
        name: Name of the method.
        description: What is trained and what is kept in memory.
        use_dora: As for `adapters`.
    """

    def apply(
        model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
    ) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
        # The adapters are fp32 already, so plain AdamW needs no master copies.
        return adapters(model, options, use_dora), (torch.optim.AdamW, {**hyper.adam(), "fused": True})

    return Method(name, description, apply, OPTIONS)


METHOD = method("lora", "low-rank adapters on all linear layers (PEFT); fp32 adapters, their gradients and two moments")
