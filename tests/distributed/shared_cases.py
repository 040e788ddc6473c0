"""Data parallel trainings in which each process keeps a share of the state, and their checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from failures import message
from sharded_cases import NUM_STEPS, SAVED_AT, make, outcome, train

from misa.distributed import checkpoint

CASES: dict[str, dict[str, Any]] = {
    "matrix blocks": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, no masters": {"dtype": torch.bfloat16, "state_format": "bf16"},
    "kept on the CPU": {"state_policy": "cpu"},
}


def together(folder: str) -> dict[str, Any]:
    """Each case with a checkpoint of either kind in the middle of a round, and a copy of the optimizer."""
    found: dict[str, Any] = {}
    for name, options in CASES.items():
        plain_model, plain = make(False, seed=dist.get_rank(), **options)
        train(plain_model, plain, range(SAVED_AT))
        whole = plain.state_bytes()
        train(plain_model, plain, range(SAVED_AT, NUM_STEPS))
        model, optimizer = make(False, seed=dist.get_rank(), shard_state=True, **options)
        train(model, optimizer, range(SAVED_AT))
        held = optimizer.state_bytes()
        checkpoint.save(Path(folder) / name, model, optimizer)
        refused = message(optimizer.state_dict)
        optimizer.consolidate_state_dict()
        if dist.get_rank() == 0:
            torch.save((model.state_dict(), optimizer.state_dict()), Path(folder) / f"{name}.pt")
        else:
            assert "process 0" in message(optimizer.state_dict)
        twin_model, twin = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(SAVED_AT, NUM_STEPS))
        train(twin_model, twin, range(SAVED_AT, NUM_STEPS))
        moved_model, moved = make(False, shard_state=True, **options)
        train(moved_model, moved, range(SAVED_AT))
        for p in moved_model.parameters():  # to another device, in the middle of a round, and back
            p.data = p.data.clone()
        train(moved_model, moved, range(SAVED_AT, NUM_STEPS))
        found[name] = {
            **outcome(model, optimizer),
            "moved": outcome(moved_model, moved),
            "without": outcome(plain_model, plain),
            "copy": outcome(twin_model, twin),
            "bytes": held,
            "whole bytes": whole,
            "refused": refused,
            "refused after a step": message(optimizer.state_dict),
        }
    found["resumed"] = resumed(folder)
    return found


def resumed(folder: str) -> dict[str, Any]:
    """Go on from either kind of checkpoint, with a seed and blocks of its own before."""
    found = {}
    for name, options in CASES.items():
        for kind in ("parts", "whole"):
            model, optimizer = make(False, seed=7, shard_state=True, **options)
            if kind == "parts":
                checkpoint.load(Path(folder) / name, model, optimizer)
            else:
                weights, state = torch.load(Path(folder) / f"{name}.pt")
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            train(model, optimizer, range(SAVED_AT, NUM_STEPS))
            found[name, kind] = outcome(model, optimizer)
    return found
