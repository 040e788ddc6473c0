"""Activation checkpointing that recomputes only from the lowest active layer up."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def prepare_before_first_forward(model: nn.Module) -> None:
    """Arrange `skip_frozen_prefix` to run once, just before the model's first forward pass.

    Only then is it known whether activation checkpointing is on: a Trainer turns it on after it has made the
    optimizer.
    """

    def prepare(module: nn.Module, _: Any) -> None:
        handle.remove()
        skip_frozen_prefix(module)

    handle = model.register_forward_pre_hook(prepare)


def skip_frozen_prefix(model: nn.Module) -> None:
    """Let a checkpointed transformers model skip its frozen prefix in the backward pass.

    transformers makes the embedding output require a gradient whenever checkpointing is on, so that every layer is
    recomputed and differentiated, frozen or not. Without that mark, and with non-reentrant checkpointing, autograd
    starts at the lowest active layer. A model without activation checkpointing is left alone.

    Args:
        model: Any module.
    """
    checkpointed = "_gradient_checkpointing_func"
    if not any(checkpointed in m.__dict__ and getattr(m, "gradient_checkpointing", True) for m in model.modules()):
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            # Reentrant checkpointing drops every gradient when no input of the layer requires one.
            module._gradient_checkpointing_func = functools.partial(  # type: ignore[assignment]
                function.func, *function.args, **{**function.keywords, "use_reentrant": False}
            )
        # Not the model's own disable_input_require_grads(): that also initializes and ties weights again.
        for hook in module.__dict__.get("_require_grads_hooks", ()):
            hook.remove()
            module._misa_skips_prefix = True  # type: ignore[assignment]


def restore_prefix(model: nn.Module) -> None:
    """Undo `skip_frozen_prefix`: mark the embedding output again where it was marked."""
    for module in model.modules():
        if module.__dict__.pop("_misa_skips_prefix", False):
            module.enable_input_require_grads()  # type: ignore[operator]
