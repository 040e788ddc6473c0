"""Settings of the block-coordinate optimizer: one frozen, checked dataclass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from misa.inner import takes_no_closure
from misa.optimizer.blocks import GRANULARITIES, REST_KINDS, Block, least_budget
from misa.optimizer.importance import ScoreRule
from misa.optimizer.sampling import ORDERS, BlockSampler

STATE_POLICIES = ("drop", "reset", "cpu", "keep")
STATE_FORMATS = ("master", "fp32", "bf16", "8bit", "inner")
RESIDUALS = ("cpu", "drop")


@dataclass(frozen=True)
class Settings:
    """How a model is split, how the next blocks are drawn, and what happens inside a round.

    Attributes:
        granularity: `"matrix"`, `"half"` or `"layer"`; see `misa.optimizer.blocks.partition`.
        include: Patterns of what may be in a block, or None for all layers.
        exclude: Patterns of what is in no block.
        always_on: Parameters outside the blocks that are trained all the time, on top of the budget: any of
            `"embeddings"`, `"head"`, `"norms"`, `"other"`. Default: none, they are frozen.
        always_on_lr: Learning rate of what is always on, if not that of the blocks. Needs a model.
        order: How blocks are drawn, one of `misa.optimizer.sampling.ORDERS`.
        budget: Largest share of all parameters (those the caller has frozen apart) that the drawn blocks may hold, the
            paper's delta, in (0, 1].
        num_blocks: Number of blocks drawn, instead of a budget.
        interval: Steps in a round (the paper's T).
        round_warmup: First steps of every round at a lower learning rate: step t of them at t / (round_warmup + 1) of
            its own. 0 (the published methods) takes full steps at once, and as Adam's first step on new moments has
            full size whatever the gradient, so has the first step of each round.
        eta: Sharpness of the softmax over scores, not negative; 0 is uniform; `"auto"` keeps the effective number of
            blocks at `effective_share`, in (0, 1], of all.
        score: How gradient norms become scores.
        first_pass: Draw never-used blocks first, one step each, until all were used.
        sample_last: Longest-idle blocks forced into each draw.
        probe_every: Every so many rounds, the last step of the round measures the gradient norm of all blocks;
            0 never. Costs a full backward pass and, at its peak, one block's gradient of memory. Wants one backward
            pass a step: over several, what is off is measured in each, and scores lower than what is on.
        state_policy: What becomes of moments and master copies at a switch: `"drop"` frees what goes off, `"reset"`
            starts every round afresh, also for what stays on (Algorithm 1), `"cpu"` moves them to main memory until the
            block is drawn again, `"keep"` leaves them where they are.
        state_format: For bf16 and fp16 weights: `"master"`, fp32 master copy and moments of what is active; `"fp32"`,
            `"bf16"` and `"8bit"`, moments of that type, no master and stochastic rounding; `"inner"`, no master, the
            inner optimizer works on the weights as they are.
        residual: What becomes of the part of a master copy that the weight cannot hold: `"cpu"` keeps it in main
            memory, 2 bytes a parameter ever used, so that switches lose no update; `"drop"` forgets it.
        step_in_backward: Apply and free each gradient as soon as it is ready. Needs one backward pass a step and no
            clipping, which would find no gradients and do nothing.
        shard_state: Between processes of a data parallel run (FSDP2 does so by itself): each keeps master copy and
            moments of its own rows of every active weight, and gets the other rows from the others after a step. Needs
            AdamW as the inner optimizer. A process alone keeps all.
        inner: Class or factory of the inner optimizer, called with parameter groups and `inner_kwargs`; None is AdamW.
        inner_kwargs: Further arguments of `inner`: all but `lr` and `weight_decay`, which it has from its groups.
        seed: Seed of the sampler's and the rounding's own generators.
        record: Path of a JSONL file that gets a line for every finished round, or None.
    """

    granularity: str = "matrix"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    always_on: tuple[str, ...] = ()
    always_on_lr: float | None = None
    order: str = "importance"
    budget: float | None = None
    num_blocks: int | None = None
    interval: int = 50
    round_warmup: int = 0
    eta: float | str = 1.0
    effective_share: float = 0.5
    score: ScoreRule = field(default_factory=ScoreRule)
    first_pass: bool = False
    sample_last: int = 0
    probe_every: int = 0
    state_policy: str = "drop"
    state_format: str = "master"
    residual: str = "cpu"
    step_in_backward: bool = False
    shard_state: bool = False
    inner: Callable[..., torch.optim.Optimizer] | None = None
    inner_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    record: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name, allowed in (
            ("granularity", GRANULARITIES),
            ("order", ORDERS),
            ("state_policy", STATE_POLICIES),
            ("state_format", STATE_FORMATS),
            ("residual", RESIDUALS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for kind in self.always_on:
            if kind not in REST_KINDS:
                raise ValueError(f"always_on={self.always_on!r}: {kind!r} is none of {', '.join(REST_KINDS)}")
        if self.always_on_lr is not None and not (self.always_on and 0 <= self.always_on_lr < math.inf):
            raise ValueError(f"always_on_lr={self.always_on_lr}: must be finite and not negative, and needs always_on")
        if self.order != "all" and (self.budget is None) == (self.num_blocks is None):
            raise ValueError("budget and num_blocks: give exactly one of them")
        if self.budget is not None and not (isinstance(self.budget, float | int) and 0 < self.budget <= 1):
            raise ValueError(f"budget={self.budget!r}: must lie in (0, 1], the share of all parameters")
        least_of = {"num_blocks": 1, "interval": 1, "round_warmup": 0, "probe_every": 0, "sample_last": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if (value, name) != (None, "num_blocks") and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
        if self.round_warmup >= self.interval:
            raise ValueError(f"round_warmup={self.round_warmup}: must be less than interval={self.interval}")
        if self.round_warmup and "lr" in self.inner_kwargs:
            raise ValueError("round_warmup: acts on the learning rate of groups, and inner_kwargs has another, 'lr'")
        if isinstance(self.eta, str):
            if self.eta != "auto":
                raise ValueError(f"eta={self.eta!r}: must be a number of at least 0, or 'auto'")
            if self.score.clip is not None:
                raise ValueError(
                    f"eta='auto': a score with clip={self.score.clip} needs a number, the scale it cuts at"
                )
        elif not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta={self.eta}: must be finite and not negative, or 'auto'")
        if not 0 < self.effective_share <= 1:
            raise ValueError(f"effective_share={self.effective_share}: must lie in (0, 1]")
        if self.inner is not None and self.state_format not in ("master", "inner"):
            raise ValueError(
                f"state_format={self.state_format!r}: with an inner optimizer of your own, choose 'master' or 'inner'"
            )
        if not takes_no_closure(self.inner):
            raise ValueError(f"inner={self.inner!r}: needs a closure, and is given gradients here")
        if self.inner is None and self.inner_kwargs:
            raise ValueError(f"inner_kwargs={self.inner_kwargs!r}: needs an inner optimizer, inner=")
        if self.inner is None and self.state_format == "inner":
            raise ValueError("state_format='inner': needs an inner optimizer, inner=")
        if self.shard_state and (self.inner is not None or self.state_format == "8bit"):
            raise ValueError(
                "shard_state=True: needs AdamW, which updates each element by itself, with masters or with moments of "
                "fp32 or bf16"
            )
        if self.step_in_backward and self.probe_every:
            raise ValueError("probe_every: cannot be used with step_in_backward=True")


def make_sampler(blocks: tuple[Block, ...], s: Settings, total: int) -> BlockSampler:
    """The sampler of these settings; a budget too small for any block raises, one too small for some warns."""
    numels = [b.numel for b in blocks]
    limit = None if s.budget is None or s.order == "all" else int(s.budget * total + 1e-6)
    sampler = BlockSampler(
        numels, s.order, max_numel=limit, num_blocks=s.num_blocks, first_pass=s.first_pass, sample_last=s.sample_last,
        seed=s.seed,
    )  # fmt: skip
    never = [blocks[i].name for i in sampler.never_fit]
    if len(never) == len(blocks):
        smallest = min(blocks, key=lambda b: b.numel)
        raise ValueError(
            f"budget={s.budget}: no block fits into {limit} of {total} parameters; the smallest, {smallest.name}, "
            f"needs budget >= {least_budget(smallest.numel, total)}"
        )
    if never:
        warnings.warn(
            f"budget={s.budget}: {len(never)} of {len(blocks)} blocks are larger than the whole budget and will never "
            f"be trained ({', '.join(never[:3])}{', ...' if len(never) > 3 else ''}); "
            f"budget={least_budget(max(numels), total)} would admit all",
            stacklevel=5,
        )
    return sampler
