"""Trainings that one process and several must do alike."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from tiny import llama, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from misa.optimizer import LISA, MISA, BAdam

NUM_STEPS = 7  # three rounds of two steps, and one step
KINDS = {"misa": MISA, "badam": BAdam, "lisa": LISA}

# What `train` takes beside its defaults, by what is tried together.
CASES: dict[str, dict[str, Any]] = {
    "matrix blocks": {},
    "layer blocks": {"kind": "badam"},
    "always on": {"kind": "lisa", "num_blocks": 1},
    "uniform draws": {"order": "uniform"},
    "first pass": {"variant": "official", "num_steps": 9},
    "accumulation": {"accumulation": 3},
    "accumulation, all passes sent": {"accumulation": 3, "holds": False},
    "clipping": {"clip": 0.05},
    "activation checkpointing": {"checkpointing": True},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, no masters": {"dtype": torch.bfloat16, "state_format": "fp32"},
    "step in backward": {"step_in_backward": True},
    "probe": {"probe_every": 2, "accumulation": 2},
    "small buckets": {"bucket_bytes": 1000},
    "DDP around the model": {"wrap": "before", "accumulation": 2},
    "DDP around it later": {"wrap": "after", "accumulation": 2, "checkpointing": True},
    "DDP that finds unused": {"wrap": "before", "find_unused_parameters": True},
    "shard_state + accumulation + clipping": {"shard_state": True, "accumulation": 2, "clip": 0.05},
    "shard_state + always on": {"shard_state": True, "kind": "lisa", "num_blocks": 1},
    "shard_state + bf16": {"shard_state": True, "dtype": torch.bfloat16},
    "shard_state + step in backward": {"shard_state": True, "step_in_backward": True},
    "shard_state + part without gradient": {"shard_state": True, "skips": True, "always_on": ("head",)},
    "part without gradient": {"skips": True, "always_on": ("head",)},
    "process without any gradient": {"skips": True, "include": ("layers.1.*",), "budget": 0.5},
    "process without any gradient + accumulation": {
        "skips": True,
        "accumulation": 2,
        "include": ("layers.1.*",),
        "budget": 0.5,
    },
    "step in backward + part without gradient": {"skips": True, "always_on": ("head",), "step_in_backward": True},
    "shard_state + step in backward + small buckets": {
        "shard_state": True,
        "step_in_backward": True,
        "bucket_bytes": 100,
        "skips": True,
        "always_on": ("head",),
    },
}

# Those that are tried with four processes, too.
OF_FOUR = (
    "matrix blocks",
    "layer blocks",
    "accumulation",
    "clipping",
    "activation checkpointing",
    "bf16",
    "shard_state + accumulation + clipping",
    "shard_state + always on",
    "part without gradient",
    "process without any gradient",
    "shard_state + step in backward + small buckets",
)


class Skipping(nn.Module):
    """A model with a stack that only some rows go through: one process may have no gradient for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, routed: bool) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            if i == 1 and not routed:
                continue
            x = x + layer(x).tanh()
        return self.head(x)


def rows(number: int, num_rows: int = 24) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (num_rows, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": tokens, "labels": tokens}


def train(
    *,
    kind: str = "misa",
    num_steps: int = NUM_STEPS,
    accumulation: int = 1,
    holds: bool = True,
    clip: float | None = None,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    wrap: str = "",
    find_unused_parameters: bool = False,
    skips: bool = False,
    bucket_bytes: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on this process's share of the rows; weights and seeds start differently on each."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    model: Any = Skipping() if skips else llama(2, dtype, seed=rank)
    inner = model
    if checkpointing:
        model.gradient_checkpointing_enable()
    wrapper = {"find_unused_parameters": True} if find_unused_parameters else {}
    if size > 1 and wrap == "before":
        model = DistributedDataParallel(model, **wrapper)
    # A larger eps than usual: Adam divides tiny gradients by their own size, and with it their rounding.
    defaults = {"lr": 1e-3, "eps": 1e-4, "interval": 2, "seed": rank, **({"budget": 0.3} if kind == "misa" else {})}
    options = {**defaults, **options}
    optimizer = KINDS[kind](model, **options)
    if size > 1 and wrap == "after":
        model = DistributedDataParallel(model, **wrapper)
    if bucket_bytes is not None and size > 1:
        optimizer._workers._exchange._bucket_bytes = bucket_bytes
    torch.manual_seed(100 + rank)
    random_state = torch.get_rng_state()
    drawn = [optimizer.active]
    for step in range(num_steps):
        for part in range(accumulation):
            waits = holds and part < accumulation - 1
            hold = contextlib.nullcontext() if not waits else (model if wrap and size > 1 else optimizer).no_sync()
            with hold:
                loss = _loss(model, step * accumulation + part, rank, size, skips) / accumulation
                if loss.requires_grad:
                    loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(inner.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(optimizer.active)
    return {
        "weights": weights(inner),
        "drawn": drawn,
        "scores": optimizer.scores,
        "bytes": optimizer.state_bytes(),
        "random state": torch.equal(random_state, torch.get_rng_state()),
        "trained": sum(not torch.equal(p, q) for p, q in zip(inner.parameters(), _start(skips, dtype), strict=True)),
    }


def _loss(model: Any, number: int, rank: int, size: int, skips: bool) -> torch.Tensor:
    if skips:
        # Of four rows the last alone goes everywhere, and in every third step none: so other processes, or all, lack
        # the gradient of a layer.
        x = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(number))
        own = range(rank * 4 // size, (rank + 1) * 4 // size)
        return torch.stack([model(x[i], i == 3 and number % 3 != 2).square().mean() for i in own]).mean()
    own = {name: values.chunk(size)[rank] for name, values in rows(number).items()}
    return model(**own).loss


def _start(skips: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    return list((Skipping() if skips else llama(2, dtype, seed=0)).parameters())


def train_all(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: train(**CASES[name]) for name in names}
