"""Ways of sharing a model between processes under which switching blocks would be silently wrong."""

from __future__ import annotations

import os

from torch import nn

WORKS = (
    "use torchrun with the plain model or with DistributedDataParallel (only gradients of active blocks are sent), or, "
    "in a loop of your own, FSDP2 (torch.distributed.fsdp.fully_shard)"
)
_FSDP1 = (
    "FSDP1 (FullyShardedDataParallel) joins parameters into flat ones that cannot be switched on and off one by one: "
)
_ZERO = (
    "DeepSpeed ZeRO ignores changes of requires_grad after its start, so blocks that switch on later would silently "
    "get no gradient: "
)


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse such a wrapper, in words that name what works.

    Raises:
        ValueError: for FSDP1 with flat parameters and for DeepSpeed engines.
    """
    for module in model.modules():
        name = type(module).__name__
        if name == "FullyShardedDataParallel":
            raise ValueError(_FSDP1 + WORKS)
        if name == "DeepSpeedEngine" or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            raise ValueError(_ZERO + WORKS)


def refuse_launched(deepspeed: object = None, fsdp: object = None) -> None:
    """Refuse what Accelerate would do to the model later, when the optimizer has been made.

    Args:
        deepspeed: What is asked for under this name, beside what Accelerate's environment says.
        fsdp: The same.

    Raises:
        ValueError: for DeepSpeed and for Accelerate's FSDP, which exchanges the optimizer's parameters.
    """
    if deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(f"deepspeed: {_ZERO}{WORKS}")
    if fsdp or _is_set("ACCELERATE_USE_FSDP"):
        raise ValueError(f"fsdp: Accelerate shards the model and exchanges the optimizer's parameters; {WORKS}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
