"""Trainings with parameters sharded by FSDP2, and the same in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import KINDS, rows
from failures import message
from tiny import llama
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from misa.distributed import checkpoint
from misa.distributed.sharded import is_sharded

NUM_STEPS = 7
SAVED_AT = 3  # in the middle of the second round

CASES: dict[str, dict[str, Any]] = {
    "matrix blocks": {},
    "layer blocks": {"kind": "badam"},
    "always on": {"kind": "lisa", "num_blocks": 1},
    "accumulation": {"accumulation": 2},
    "clipping": {"clip": 0.05},
    "activation checkpointing": {"checkpointing": True},
    "probe": {"probe_every": 2},
    "bf16": {"dtype": torch.bfloat16},
    "mixed precision": {"mixed": True},
    "no layer kept whole": {"reshard": True},
}


def make(
    shards: bool,
    kind: str = "misa",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    mixed: bool = False,
    reshard: bool | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    model = llama(2, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if shards:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        for module in (*model.model.layers, model):
            fully_shard(module, mp_policy=policy, reshard_after_forward=reshard)
    defaults = {"lr": 1e-3, "eps": 1e-4, "interval": 2, **({"budget": 0.3} if kind == "misa" else {})}
    return model, KINDS[kind](model, **{**defaults, **options})


def train(model: Any, optimizer: Any, steps: range, accumulation: int = 1, clip: float | None = None) -> None:
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    for step in steps:
        for part in range(accumulation):
            if is_sharded(next(model.parameters())):
                model.set_requires_gradient_sync(part == accumulation - 1)
            own = {k: v.chunk(size)[rank] for k, v in rows(step * accumulation + part).items()}
            (model(**own).loss / accumulation).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def outcome(model: Any, optimizer: Any) -> dict[str, Any]:
    whole = {n: (p.full_tensor() if is_sharded(p) else p).detach().clone() for n, p in model.named_parameters()}
    return {"weights": whole, "active": optimizer.active, "scores": optimizer.scores}


def _split(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    loop = {k: case[k] for k in ("accumulation", "clip") if k in case}
    return loop, {k: v for k, v in case.items() if k not in loop}


def alone() -> dict[str, dict[str, Any]]:
    found = {}
    for name, case in CASES.items():
        loop, options = _split(case)
        model, optimizer = make(False, **options)
        if options.get("mixed"):
            with torch.autocast("cpu", torch.bfloat16):
                train(model, optimizer, range(NUM_STEPS), **loop)
        else:
            train(model, optimizer, range(NUM_STEPS), **loop)
        found[name] = {**outcome(model, optimizer), "bytes": optimizer.state_bytes()}
    return found


def together(folder: str) -> dict[str, Any]:
    """All cases; of the first and of bf16 a checkpoint in the middle of a round."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        loop, options = _split(case)
        model, optimizer = make(True, seed=dist.get_rank(), **options)
        train(model, optimizer, range(SAVED_AT), **loop)
        if name in ("matrix blocks", "bf16"):
            checkpoint.save(Path(folder) / name, model, optimizer)
        local = optimizer.state_bytes()
        saved = optimizer.state_dict()["state"].values()
        train(model, optimizer, range(SAVED_AT, NUM_STEPS), **loop)
        found[name] = {
            **outcome(model, optimizer),
            "bytes": local,
            "as DTensors": all(is_sharded(v) for held in saved for v in held.values() if v.ndim),
        }
    found["resumed"] = resumed(folder)
    found["step in backward"] = message(lambda: make(True, step_in_backward=True))
    found["8bit"] = message(lambda: make(True, dtype=torch.bfloat16, state_format="8bit"))
    found["bound"] = message(lambda: make(True, variant="paper"))
    found["partly"] = message(_partly)
    found["finite after a skipped step"] = _finite_after_a_skipped_step()
    return found


def resumed(folder: str) -> dict[str, Any]:
    """Go on from the checkpoints, with a seed and blocks of its own before."""
    found = {}
    for name in ("matrix blocks", "bf16"):
        model, optimizer = make(True, seed=7, **CASES[name])
        checkpoint.load(Path(folder) / name, model, optimizer)
        train(model, optimizer, range(SAVED_AT, NUM_STEPS))
        found[name] = outcome(model, optimizer)
    return found


def _partly() -> Any:
    model = llama(2)
    fully_shard(model.model.layers[0])
    return KINDS["misa"](model, budget=0.3)


def _finite_after_a_skipped_step() -> bool:
    """One weight has no gradient in the step that follows, as an expert without tokens."""
    model, optimizer = make(True)
    for factor in (float("nan"), 1.0):
        (model(**rows(0)).loss * factor).backward()
        if factor == 1:
            optimizer._on.entries[0].param.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return all(weight.isfinite().all() for weight in outcome(model, optimizer)["weights"].values())
