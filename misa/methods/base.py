"""What a compared method is: a name, its options, and a builder of the model and optimizer it trains with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Hyperparameters:
    """What every method takes.

    Attributes:
        lr: Learning rate.
        weight_decay: Decoupled weight decay. Default 0.
        betas: Adam's moment factors. Default (0.9, 0.999).
        eps: Adam's epsilon. Default 1e-8.
        seed: Seed of whatever the method draws.
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0

    def adam(self) -> dict[str, Any]:
        """Keyword arguments of an Adam optimizer."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}


@dataclass(frozen=True)
class Built:
    """A method applied to a model.

    Attributes:
        model: The model to train, perhaps wrapped (LoRA).
        optimizer_cls_and_kwargs: What `transformers.Trainer` takes under this name.
        settings: The method's options, resolved.
        description: What is trained and what is kept in memory.
    """

    model: nn.Module
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]]
    settings: dict[str, Any]
    description: str

    @property
    def steps_in_backward(self) -> bool:
        """Whether a gradient is applied and freed as soon as it is ready: no accumulation, no clipping."""
        return bool(self.settings.get("step_in_backward"))


@dataclass(frozen=True)
class Method:
    """One row of the table of compared methods.

    Attributes:
        name: Name on the command line and in tables.
        description: What is trained and what is kept in memory.
        defaults: Options and their default values; others are refused.
        apply: Called with the model, the hyperparameters and the resolved options; returns the model to train and
            what Trainer makes the optimizer from.
    """

    name: str
    description: str
    apply: Callable[[nn.Module, Hyperparameters, dict[str, Any]], tuple[nn.Module, tuple[Any, dict[str, Any]]]]
    defaults: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, hyperparameters: Hyperparameters, options: dict[str, Any]) -> Built:
        """Apply the method.

        Args:
            model: A freshly loaded model.
            hyperparameters: Learning rate and so on.
            options: Overrides of `defaults`; None means the default.

        Raises:
            ValueError: for an option the method does not have, or two that exclude each other.
        """
        given = {k: v for k, v in options.items() if v is not None}
        if unknown := sorted(set(given) - set(self.defaults)):
            allowed = ", ".join(sorted(self.defaults)) or "none"
            raise ValueError(f"method {self.name}: has no option {', '.join(unknown)}; its options are: {allowed}")
        settings = {**self.defaults, **given}
        if "num_blocks" in given and "budget" in self.defaults:
            if "budget" in given:
                both = f"budget is {given['budget']}, num_blocks {given['num_blocks']}"
                raise ValueError(f"method {self.name}: {both}: give one of them")
            settings["budget"] = None
        trained, optimizer = self.apply(model, hyperparameters, settings)
        return Built(trained, optimizer, settings, self.description)


def from_words(options: dict[str, Any]) -> dict[str, Any]:
    """Turn a method's options as they stand on a command line into the types that methods take.

    Args:
        options: By name. `eta` is a number or auto; lists are separated by commas, and always_on may be "none".

    Raises:
        ValueError: If eta is neither a number nor "auto".
    """
    options = dict(options)
    if "eta" in options and options["eta"] != "auto":
        try:
            options["eta"] = float(options["eta"])
        except ValueError:
            raise ValueError(f"eta is {options['eta']!r}, allowed is a number from 0 up, or auto") from None
    for name in ("include", "exclude", "always_on"):
        if name in options:
            options[name] = tuple(word for part in options[name].split(",") if (word := part.strip()))
    if options.get("always_on") == ("none",):
        options["always_on"] = ()
    return options
