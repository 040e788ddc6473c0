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
from misa.parameters import NamedParameter, kind_by_name

logger = logging.getLogger(__name__)

ORDERS = {"misa": "importance", "random": "uniform", "ascending": "ascending", "descending": "descending"}
GRANULARITIES = {"module": "matrix", "layer": "layer"}


class BlockCoordinateDesentOptimizer(BlockCoordinateOptimizer):
    """`MISA(model, variant="official")` under the name and the arguments of the authors' published class.

    What their class gets wrong is put right: `state_dict` holds the whole state, a budget that no block fits is an
    error, weight decay is the one of `base_optimizer`, blocks are found by structure, and draws come from an own
    generator. A bias is trained with its matrix.

    Args:
        base_optimizer: Tells what happens inside a round: its class, learning rate and weight decay of each group, and
            the other settings of the first are taken over; it is never stepped itself. A scheduler may act on it or on
            this one.
        named_parameters_list: `list(model.named_parameters())`.
        interval_steps: Steps in a round; `interval` of `MISA`.
        include_embedding_and_lm_head: Train embeddings and head all the time, on top of the limit; also beside LoRA,
            where the head of a classifier is always trained.
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
        ValueError: for an unknown order or granularity, a limit that no block fits, or a base without a learning rate
            or that needs a closure.
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
        always_on = ("embeddings", "head") if include_embedding_and_lm_head else ()
        if adapters := [(n, p) for n, p in named if "lora" in n]:
            whole = _trained_whole(named, always_on)
            named, granularity, always_on = adapters + whole, "module", ("embeddings", "head") if whole else ()
        elif mix_lora:
            raise ValueError("mix_lora=True: no parameter has 'lora' in its name")
        weighted = update_order in ("misa", "random")
        by_budget = weighted and granularity == "module"
        inner, inner_kwargs = _inner(base_optimizer)
        settings = Settings(
            granularity=GRANULARITIES[granularity],
            include=("*lora*",) if adapters else None,
            always_on=always_on,
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
        groups, bases = _groups(named, base_optimizer)
        super().__init__(groups, settings, **adam)
        rates = _Rates(bases)
        self.register_step_pre_hook(rates)
        self.register_state_dict_post_hook(rates.save)
        self.register_load_state_dict_pre_hook(rates.load)


class _Rates:
    """Before a step, hands on learning rates that a scheduler gave the groups of `base_optimizer`.

    They are saved, too: a scheduler steps from the rate that its optimizer has, and may be a step ahead of this one.
    """

    def __init__(self, bases: list[dict[str, Any]]) -> None:
        self._bases = bases
        self._last = [base["lr"] for base in bases]

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for i, (base, group) in enumerate(zip(self._bases, optimizer.param_groups, strict=False)):
            if base["lr"] != self._last[i]:
                self._last[i] = group["lr"] = base["lr"]

    def save(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["base_lrs"] = [float(base["lr"]) for base in self._bases]
        state_dict["last_lrs"] = [float(lr) for lr in self._last]

    def load(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for base, lr in zip(self._bases, state_dict.get("base_lrs", ()), strict=False):
            base["lr"] = lr
        self._last = list(state_dict.get("last_lrs", self._last))


def _trained_whole(named: list[NamedParameter], kinds: tuple[str, ...]) -> list[NamedParameter]:
    """Parameters beside LoRA's that train: of these kinds, which become trainable, and heads that are."""
    found = []
    for name, p in named:
        # PEFT keeps what a module was beside the copy of it that is trained.
        if "lora" in name or ".original_module." in name:
            continue
        kind = kind_by_name(name, p)
        if kind in kinds:
            p.requires_grad_(True)
        if kind in kinds or (kind == "head" and p.requires_grad):
            found.append((name, p))
    return found


def _groups(
    named: list[NamedParameter], base: torch.optim.Optimizer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameter groups with the learning rate and decay that the base gives each, and its group for each of these.

    What is in no group of the base counts to its first; groups with the same settings become one.
    """
    if base.param_groups[0].get("lr") is None:
        name = type(base).__name__
        raise ValueError(
            f"base_optimizer: {name} has no learning rate (lr=None), and cannot be the rule inside a round"
        )
    group_of = {p: group for group in base.param_groups for p in group["params"]}
    found: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, p in named:
        of_base = group_of.get(p, base.param_groups[0])
        own = {"lr": of_base["lr"], "weight_decay": of_base.get("weight_decay", 0.0)}
        # A scheduler may have set all rates to 0 for now.
        kind = (float(own["lr"]), own["weight_decay"], of_base.get("initial_lr"))
        found.setdefault(kind, ({"params": [], **own}, of_base))[0]["params"].append((name, p))
    return [group for group, _ in found.values()], [of_base for _, of_base in found.values()]


def _inner(base: torch.optim.Optimizer) -> tuple[type[torch.optim.Optimizer] | None, dict[str, Any]]:
    """Class and arguments of the inner optimizer; None for AdamW, which the engine has itself."""
    plain = not (base.defaults.get("amsgrad") or base.defaults.get("maximize"))
    if type(base) is torch.optim.AdamW and plain:
        return None, {}
    accepted = set(inspect.signature(type(base)).parameters) - {"params", "lr", "weight_decay"}
    return type(base), {k: v for k, v in base.defaults.items() if k in accepted}
