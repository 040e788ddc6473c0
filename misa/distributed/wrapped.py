"""A model in `DistributedDataParallel`: its reducer is put to rest, because it holds buckets for all parameters.

The reducer is built for one set of trainable parameters, and blocks switch on later. What else the wrapper does (moving
inputs, buffers, `no_sync`) goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What reduces inside a wrapper: private attributes.
_REDUCER = ("reducer", "logger")


class _AtRest:
    """Stands in the place of a reducer and its logger, and does nothing whatever it is asked."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name == "_get_zeros_like_grad_buckets":
            raise RuntimeError("DistributedDataParallel.join(): not here; give each process the same number of batches")
        return lambda *args, **kwargs: None


class _Retired:
    """Stands there when the optimizer that reduced is gone: nobody reduces any more."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise RuntimeError(
            "DistributedDataParallel: the optimizer that averaged its gradients was released; wrap the model anew"
        )


def active_wrapper() -> DistributedDataParallel | None:
    """The wrapper whose forward pass is running, if any."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def unwrapped(model: nn.Module, resting: bool = True) -> nn.Module:
    """The model inside `DistributedDataParallel`, whose reducer is put to rest, and inside a compiled module.

    Args:
        model: The model, perhaps wrapped.
        resting: Put the reducer to rest. Default True.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            if resting:
                rest(model)
            model = model.module
        elif isinstance(inside := model._modules.get("_orig_mod"), nn.Module):
            model = inside
        else:
            return model


def retire(wrapper: nn.Module, stand_in: object) -> None:
    """Let a wrapper whose reducer rests refuse to train on: its buckets are gone, so it cannot reduce again.

    Args:
        wrapper: The wrapper.
        stand_in: What the optimizer saw in the place of its reducer. If another one is there now, somebody else has the
            wrapper; if it is a reducer, it goes on.
    """
    if isinstance(stand_in, _AtRest) and wrapper.__dict__.get("reducer") is stand_in:
        wrapper.__dict__.update(dict.fromkeys(_REDUCER, _Retired()))


def rest(wrapper: DistributedDataParallel) -> bool:
    """Put the reducer of a wrapper to rest, and free its buckets.

    The attributes are private ones: where a version of torch does not have them, the wrapper goes on reducing, which
    is right with `find_unused_parameters=True`, at the price of traffic and buckets for all parameters.

    Returns:
        Whether the reducer rests.

    Raises:
        ValueError: For settings of the wrapper that switching blocks would break.
    """
    works = "use DistributedDataParallel(model) without it, or no wrapper at all: the optimizer reduces the gradients"
    if wrapper.static_graph:
        raise ValueError(f"DistributedDataParallel(static_graph=True): blocks switch on and off, so it is not; {works}")
    if getattr(wrapper, "_comm_hooks", None):
        raise ValueError(f"DistributedDataParallel with a communication hook: gradients would pass it by; {works}")
    if dist.get_world_size(wrapper.process_group) != dist.get_world_size():
        raise ValueError(
            f"DistributedDataParallel(process_group=...): it holds {dist.get_world_size(wrapper.process_group)} of "
            f"{dist.get_world_size()} processes, and gradients are averaged over all of them"
        )
    if getattr(wrapper, "mixed_precision", None) is not None:
        raise ValueError(f"DistributedDataParallel(mixed_precision=...): {works}, with torch.autocast")
    state: dict[str, Any] = wrapper.__dict__
    # Another one each time, by which an optimizer sees that a later one has the wrapper.
    if isinstance(state.get("reducer"), (_AtRest, _Retired)) or all(name in state for name in _REDUCER):
        state.update(dict.fromkeys(_REDUCER, _AtRest()))
        return True
    if not wrapper.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel: this version of torch does not let its reducer rest; use "
            "find_unused_parameters=True, or no wrapper at all"
        )
    warnings.warn("DistributedDataParallel sends the gradients of all parameters: do without the wrapper", stacklevel=4)
    return False
