"""Everything that is compared, in one table: name -> method."""

from __future__ import annotations

from typing import Any

from torch import nn

from misa.methods import adamw, badam, dora, galore, lisa, lora, misa, misa_lora, sgd
from misa.methods.base import Built, Hyperparameters, Method, from_words

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        *(adamw.METHOD, adamw.PURE, sgd.METHOD, lora.METHOD, dora.METHOD, galore.METHOD, galore.LAYERWISE),
        *(badam.METHOD, badam.OFFICIAL, lisa.METHOD, lisa.OFFICIAL),
        *(misa.METHOD, misa.UNIFORM, misa.PAPER, misa.OFFICIAL, misa_lora.METHOD),
    )
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


__all__ = ["METHODS", "Built", "Hyperparameters", "Method", "build", "from_words"]
