"""Everything that is compared, in one table: name -> method."""

from __future__ import annotations

from typing import Any

from torch import nn

from misa.methods import adamw, badam, lisa, lora, misa
from misa.methods.base import Built, Hyperparameters, Method

METHODS: dict[str, Method] = {
    m.name: m for m in (adamw.METHOD, lora.METHOD, badam.METHOD, lisa.METHOD, misa.METHOD, misa.UNIFORM)
}


def build(name: str, model: nn.Module, *, options: dict[str, Any] | None = None, **hyperparameters: Any) -> Built:
    """Apply a method to a model.

    Args:
        name: Key of `METHODS`.
        model: A freshly loaded model; LoRA wraps it, block methods freeze most of it once the optimizer is made.
        options: The method's own options; None values mean its defaults.
        **hyperparameters: Fields of `Hyperparameters`: `lr`, `weight_decay`, `betas`, `eps`, `seed`.

    Returns:
        Model, optimizer for `transformers.Trainer`, resolved settings and description.

    Raises:
        ValueError: for an unknown method or option.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: must be one of {', '.join(METHODS)}")
    return METHODS[name].build(model, Hyperparameters(**hyperparameters), options or {})


__all__ = ["METHODS", "Built", "Hyperparameters", "Method", "build"]
