"""The published methods, as named settings of one engine.

Every preset takes a model, its named parameters or groups of them, a learning rate (default 1e-3), the settings it
names, and as further options `betas`, `eps`, `weight_decay` and any field of `Settings`.
"""

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
HYPERPARAMETERS = ("betas", "eps", "weight_decay")
Params = nn.Module | Iterable[Any]


class _Preset(BlockCoordinateOptimizer):
    """Settings of a published method, overridden by the caller's options."""

    def __init__(self, params: Params, lr: float, chosen: dict[str, Any], options: dict[str, Any]) -> None:
        given = {k: v for k, v in options.items() if k not in HYPERPARAMETERS}
        if unknown := sorted(set(given) - set(Settings.__dataclass_fields__)):
            allowed = ", ".join(sorted([*Settings.__dataclass_fields__, *HYPERPARAMETERS]))
            raise ValueError(f"unknown option {', '.join(unknown)}: allowed are {allowed}")
        given |= {k: tuple(given[k]) for k in ("include", "exclude", "always_on") if isinstance(given.get(k), list)}
        adam = {k: v for k, v in options.items() if k in HYPERPARAMETERS}
        super().__init__(params, Settings(**{**chosen, **given}), lr=lr, **adam)


class MISA(_Preset):
    """Module-wise importance sampling (arXiv 2511.00056): matrix blocks, drawn by importance under a budget.

    Args:
        params: A model, its named parameters, or groups of them.
        lr: Learning rate. Default 1e-3.
        budget: Largest share of all trainable parameters on at once (the paper's delta). Default 0.03, or `num_blocks`.
        interval: Steps in a round (T). Default 50.
        eta: Sharpness of the draw; 0 uniform, `"auto"` scale-free. Default 1.0.
        beta: Factor of the score's moving average. Default 0.8; a `score` has its own.
        variant: `"default"`; `"paper"`, Algorithm 1 to the letter (bounded Adam, last momentum step, state dropped
            every round); `"official"`, as the authors' published code (score of plain norms with compounding bias
            correction and clip 5, a first pass over never-used blocks, the 2 longest-idle blocks forced in).
        **options: `betas`, `eps`, `weight_decay`, and any field of `Settings`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        budget: float | None = None,
        interval: int = 50,
        eta: float | str = 1.0,
        beta: float | None = None,
        variant: str = "default",
        **options: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(VARIANTS)}")
        rule: ScoreRule = {"default": ScoreRule(), "paper": PAPER_RULE, "official": OFFICIAL_RULE}[variant]
        if beta is not None and "score" in options:
            raise ValueError(f"beta={beta}: give it in score=, which is given too")
        score = replace(rule, beta=rule.beta if beta is None else beta)
        budget = 0.03 if budget is None and options.get("num_blocks") is None else budget
        chosen: dict[str, Any] = {"budget": budget, "interval": interval, "eta": eta, "score": score}
        if variant == "paper":
            chosen |= {"inner": inner.BoundedAdam, "state_policy": "reset"}
        elif variant == "official":
            chosen |= {"first_pass": True, "sample_last": 2}
        super().__init__(params, lr, chosen, options)


class BAdam(_Preset):
    """Block-coordinate Adam (arXiv 2404.02827): layers in a cyclic order, one (`num_blocks`, or a `budget`) a round."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        interval: int = 50,
        order: str = "shuffled",
        num_blocks: int | None = None,
        **options: Any,
    ) -> None:
        num_blocks = 1 if num_blocks is None and options.get("budget") is None else num_blocks
        chosen = {"granularity": "layer", "interval": interval, "order": order, "num_blocks": num_blocks}
        super().__init__(params, lr, chosen, options)


class LISA(_Preset):
    """Layer-wise importance sampling (arXiv 2403.17919): 2 random layers a round, embeddings, head and norms always."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        interval: int = 20,
        num_blocks: int | None = None,
        always_on: Iterable[str] = ("embeddings", "head", "norms"),
        **options: Any,
    ) -> None:
        num_blocks = 2 if num_blocks is None and options.get("budget") is None else num_blocks
        chosen = {"granularity": "layer", "order": "uniform", "interval": interval, "num_blocks": num_blocks}
        super().__init__(params, lr, {**chosen, "always_on": tuple(always_on)}, options)
