"""Model wrappers under which switching blocks would be silently wrong."""

from __future__ import annotations

from torch import nn


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse such a wrapper, in words that name what works.

    Raises:
        ValueError: for FSDP1 with flat parameters and for DeepSpeed engines.
    """
    for module in model.modules():
        name = type(module).__name__
        if name == "FullyShardedDataParallel":
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) joins parameters into flat ones that cannot be switched on and off "
                "one by one: train on one device, or with plain data parallel training"
            )
        if name == "DeepSpeedEngine" or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            raise ValueError(
                "DeepSpeed ZeRO ignores changes of requires_grad after its start, so blocks that switch on later "
                "would silently get no gradient: train on one device, or with plain data parallel training"
            )
