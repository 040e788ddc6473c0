"""The authors' class and argument names, on this package's engine: scripts written for their code run unchanged."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from misa.optimizer.engine import BlockCoordinateOptimizer
from misa.optimizer.importance import OFFICIAL_RULE
from misa.optimizer.settings import Settings

logger = logging.getLogger(__name__)

ORDERS = {"misa": "importance", "random": "uniform", "ascending": "ascending", "descending": "descending"}
GRANULARITIES = {"module": "matrix", "layer": "layer"}


class BlockCoordinateDesentOptimizer(BlockCoordinateOptimizer):
    """`MISA(model, variant="official")` under the name and the arguments of the authors' published class.

    What their class gets wrong is put right: `state_dict` holds the whole state, a budget that no block fits is an
    error, weight decay is the one of `base_optimizer`, blocks are found by structure, and draws come from an own
    generator. A bias is trained with its matrix.

    Args:
        base_optimizer: Tells what happens inside a round: its class, learning rate and other settings are taken over;
            it is never stepped itself. A scheduler may act on it or on this one.
        named_parameters_list: `list(model.named_parameters())`.
        interval_steps: Steps in a round; `interval` of `MISA`.
        include_embedding_and_lm_head: Train embeddings and head all the time, on top of the limit.
        activated_layers: Blocks on at once, with layers as blocks or a cyclic order.
        misa_eta: `eta` of `MISA`.
        update_order: `"misa"`, `"random"`, `"ascending"` or `"descending"`.
        grad_beta: `beta` of `MISA`.
        granularity: `"module"` (one matrix) or `"layer"`.
        param_ratio_limit: `budget` of `MISA`.
        sample_last: How many of the longest-idle blocks are forced in.
        G_clip: Upper bound on the exponent of the sampling weights.
        mix_lora: Only parameters with "lora" in their names form blocks; found by itself where there are any.
        seed: Of the draws. Default 0.

    Raises:
        ValueError: for an unknown order or granularity, or a limit that no block fits.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        named_parameters_list: Iterable[tuple[str, nn.Parameter]],
        interval_steps: int = 50,
        include_embedding_and_lm_head: bool = False,
        activated_layers: int = 1,
        misa_eta: float = 1.0,
        update_order: str = "misa",
        grad_beta: float = 0.8,
        granularity: str = "module",
        param_ratio_limit: float = 0.03,
        sample_last: int = 2,
        G_clip: float = 5.0,  # noqa: N803 - the authors' name
        mix_lora: bool = False,
        seed: int = 0,
    ) -> None:
        logger.warning("BlockCoordinateDesentOptimizer is kept for old scripts; new ones: misa.MISA(model, lr=...)")
        for field, value, allowed in (
            ("update_order", update_order, ORDERS),
            ("granularity", granularity, GRANULARITIES),
        ):
            if value not in allowed:
                raise ValueError(f"{field}={value!r}: must be one of {', '.join(allowed)}")
        named = list(named_parameters_list)
        if adapters := [(n, p) for n, p in named if "lora" in n]:
            named, granularity = adapters, "module"
        elif mix_lora:
            raise ValueError("mix_lora=True: no parameter has 'lora' in its name")
        weighted = update_order in ("misa", "random")
        by_budget = weighted and granularity == "module"
        inner, inner_kwargs = _inner(base_optimizer)
        settings = Settings(
            granularity=GRANULARITIES[granularity],
            always_on=("embeddings", "head") if include_embedding_and_lm_head else (),
            order=ORDERS[update_order],
            budget=param_ratio_limit if by_budget else None,
            num_blocks=None if by_budget else activated_layers,
            interval=interval_steps,
            eta=misa_eta,
            score=replace(OFFICIAL_RULE, beta=grad_beta, clip=G_clip),
            first_pass=update_order == "misa",
            sample_last=sample_last if weighted and (by_budget or update_order == "misa") else 0,
            inner=inner,
            inner_kwargs=inner_kwargs,
            seed=seed,
        )
        group = base_optimizer.param_groups[0]
        adam = {k: group[k] for k in ("betas", "eps") if inner is None}
        decay = group.get("weight_decay", 0.0)
        super().__init__(named, settings, lr=group["lr"], weight_decay=decay, **adam)
        self.register_step_pre_hook(_RateOf(group))


class _RateOf:
    """Before a step, hands on a learning rate that a scheduler gave `base_optimizer`."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group
        self._last = group["lr"]

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._group["lr"] != self._last:
            self._last = self._group["lr"]
            for group in optimizer.param_groups:
                group["lr"] = self._last


def _inner(base: torch.optim.Optimizer) -> tuple[type[torch.optim.Optimizer] | None, dict[str, Any]]:
    """Class and arguments of the inner optimizer; None for AdamW, which the engine has itself."""
    plain = not (base.defaults.get("amsgrad") or base.defaults.get("maximize"))
    if type(base) is torch.optim.AdamW and plain:
        return None, {}
    accepted = set(inspect.signature(type(base)).parameters) - {"params", "lr", "weight_decay"}
    return type(base), {k: v for k, v in base.defaults.items() if k in accepted}
