"""The published methods, as named settings of one engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from misa import inner
from misa.optimizer.engine import BlockCoordinateOptimizer
from misa.optimizer.importance import OFFICIAL_RULE, PAPER_RULE, ScoreRule
from misa.optimizer.settings import Settings

VARIANTS = ("default", "paper", "official")


class MISA(BlockCoordinateOptimizer):
    """Module-wise importance sampling (arXiv 2511.00056): matrix blocks, drawn by importance under a budget.

    Args:
        params: A model, its named parameters, or groups of them.
        lr: Learning rate. Default 1e-3.
        budget: Largest share of all parameters on at once (the paper's delta). Default 0.03.
        interval: Steps in a round (T). Default 50.
        eta: Sharpness of the draw; 0 uniform, `"auto"` scale-free. Default 1.0.
        beta: Factor of the score's moving average. Default 0.8.
        variant: `"default"`; `"paper"`, Algorithm 1 to the letter (bounded Adam, last momentum step, state dropped
            every round); `"official"`, as the authors' published code (score of plain norms with compounding bias
            correction and clip 5, a first pass over never-used blocks, the 2 longest-idle blocks forced in).
        **options: `betas`, `eps`, `weight_decay`, and any field of `Settings`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        budget: float = 0.03,
        interval: int = 50,
        eta: float | str = 1.0,
        beta: float = 0.8,
        variant: str = "default",
        **options: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(VARIANTS)}")
        rule: ScoreRule = {"default": ScoreRule(), "paper": PAPER_RULE, "official": OFFICIAL_RULE}[variant]
        chosen: dict[str, Any] = {"score": replace(rule, beta=beta)}
        if variant == "paper":
            chosen |= {"inner": inner.BoundedAdam, "state_policy": "reset"}
        elif variant == "official":
            chosen |= {"first_pass": True, "sample_last": 2}
        chosen |= {"budget": budget, "interval": interval, "eta": eta}
        super().__init__(params, *_split(chosen, options), lr=lr, **_hyper(options))


class BAdam(BlockCoordinateOptimizer):
    """Block-coordinate Adam over layers (arXiv 2404.02827): one layer at a time, in a cyclic order.

    Args:
        params: A model, its named parameters, or groups of them.
        lr: Learning rate. Default 1e-3.
        interval: Steps a layer. Default 50.
        order: `"shuffled"` (new random order each cycle), `"ascending"` or `"descending"`.
        num_blocks: Layers on at once. Default 1.
        **options: `betas`, `eps`, `weight_decay`, and any field of `Settings`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        interval: int = 50,
        order: str = "shuffled",
        num_blocks: int = 1,
        **options: Any,
    ) -> None:
        chosen = {"granularity": "layer", "interval": interval, "order": order, "num_blocks": num_blocks}
        super().__init__(params, *_split(chosen, options), lr=lr, **_hyper(options))


class LISA(BlockCoordinateOptimizer):
    """Layer-wise importance sampling (arXiv 2403.17919): random layers, with embeddings and head always on.

    Args:
        params: A model, its named parameters, or groups of them.
        lr: Learning rate. Default 1e-3.
        interval: Steps in a round. Default 20.
        num_blocks: Layers on at once. Default 2.
        always_on: What else is trained all the time. Default embeddings, head and the norms outside the layers.
        **options: `betas`, `eps`, `weight_decay`, and any field of `Settings`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        interval: int = 20,
        num_blocks: int = 2,
        always_on: tuple[str, ...] = ("embeddings", "head", "norms"),
        **options: Any,
    ) -> None:
        chosen = {
            "granularity": "layer",
            "order": "uniform",
            "interval": interval,
            "num_blocks": num_blocks,
            "always_on": tuple(always_on),
        }
        super().__init__(params, *_split(chosen, options), lr=lr, **_hyper(options))


HYPERPARAMETERS = ("betas", "eps", "weight_decay")


def _split(chosen: dict[str, Any], options: dict[str, Any]) -> tuple[Settings]:
    """Settings from a preset's choice, overridden by the caller's options."""
    given = {k: v for k, v in options.items() if k not in HYPERPARAMETERS}
    if unknown := sorted(set(given) - set(Settings.__dataclass_fields__)):
        allowed = ", ".join(sorted([*Settings.__dataclass_fields__, *HYPERPARAMETERS]))
        raise ValueError(f"unknown option {', '.join(unknown)}: allowed are {allowed}")
    for name in ("include", "exclude", "always_on"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if given.get("num_blocks") is not None and "budget" in chosen:
        chosen = {**chosen, "budget": given.get("budget")}
    return (Settings(**{**chosen, **given}),)


def _hyper(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in HYPERPARAMETERS}
