"""What an optimizer holds, as bytes and as a dictionary that can be saved: the bookkeeping behind the engine."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from misa.optimizer import importance
from misa.parameters import moved, num_bytes

if TYPE_CHECKING:
    from misa.optimizer.engine import BlockCoordinateOptimizer

FORMAT = 1
NUMBERS = ("round", "step_in_round", "num_steps", "round_length", "most_numel")
ARRAYS = ("scores", "counts", "log_p")


def state_bytes(optimizer: BlockCoordinateOptimizer) -> dict[str, int]:
    """Bytes by category: `master`, `moments` (all inner state but scalars), `residual`, `kept`."""
    found = {"master": 0, "moments": 0, "residual": 0, "kept": 0}
    on = {id(e) for e in optimizer._on.entries}
    for e in optimizer._entries.values():
        saved = sum(map(num_bytes, (e.saved or {}).values()))
        if id(e) in on:
            found["master"] += num_bytes(e.master)
            found["moments"] += saved + sum(map(num_bytes, optimizer.state.get(e.param, {}).values()))
        else:
            found["kept"] += saved + num_bytes(e.master)
        found["residual"] += num_bytes(e.residual)
    return found


def pack(optimizer: BlockCoordinateOptimizer) -> dict[str, Any]:
    """`state_dict` of an optimizer: see `BlockCoordinateOptimizer.state_dict`."""
    per_parameter: dict[str, dict[str, Any]] = {}
    for e in optimizer._entries.values():
        inner = optimizer.state.get(e.param) or e.saved or {}
        extra = {"master": e.master, "residual": e.residual}
        if taken := inner.keys() & extra.keys():
            raise ValueError(f"inner: keeps state under the name {taken.pop()!r}, under which master copies are saved")
        if held := {**inner, **{k: v.detach() for k, v in extra.items() if v is not None}}:
            per_parameter[e.name] = {k: optimizer._workers.like_parameter(v, e.param) for k, v in held.items()}
    name_of = {p: e.name for p, e in optimizer._entries.items()}
    groups = [
        {k: v for k, v in g.items() if k not in ("params", "param_names")}
        | {"params": [name_of[p] for p in g["params"] if p in name_of]}
        for g in optimizer.param_groups
    ]
    sums, num_good = optimizer._on.norms.read()
    held_by_us = {
        "format": FORMAT,
        "rule": _rule(optimizer),
        "blocks": _layout(optimizer),
        **{name: getattr(optimizer, f"_{name}") for name in NUMBERS},
        **{name: torch.tensor(getattr(optimizer, f"_{name}")) for name in ARRAYS},
        "active": list(optimizer._active),
        "sums": sums,
        "num_good_in_round": num_good,
        "num_good": optimizer._num_good + num_good,
        "sampler": optimizer._sampler.state_dict(),
        "rounding": optimizer._rounding.get_state(),
        "inner_groups": optimizer._on.group_state(),
    }
    return {"state": per_parameter, "param_groups": groups, "misa": held_by_us}


def _layout(optimizer: BlockCoordinateOptimizer) -> list[list[Any]]:
    """Parameters of every block with shape and type, and the always-on ones as a block without a name."""
    groups = [(b.name, b.params) for b in optimizer.blocks]
    groups.append(("", tuple((e.name, e.param) for e in optimizer._entries.values() if e.block < 0)))
    return [[name, [[n, list(p.shape), str(p.dtype)] for n, p in params]] for name, params in groups]


def unpack(optimizer: BlockCoordinateOptimizer, saved: dict[str, Any]) -> None:
    """Load what `pack` made, after checking that it belongs to this model."""
    if "misa" not in saved:
        raise ValueError("state_dict: not one of a BlockCoordinateOptimizer (it has no entry 'misa')")
    held = saved["misa"]
    _check_layout(held["blocks"], _layout(optimizer))
    before, now = len(saved["param_groups"]), len(optimizer.param_groups)
    if before != now:
        raise ValueError(f"state_dict: has {before} parameter groups, this optimizer {now}")
    rule = _rule(optimizer)
    if (other := list(held.get("rule", rule))) != rule:
        raise ValueError(f"state_dict: inner optimizer and state_format were {other}, and are {rule} here")
    names = {p: e.name for p, e in optimizer._entries.items()}
    both_groups = list(zip(optimizer.param_groups, saved["param_groups"], strict=True))
    for i, (group, values) in enumerate(both_groups):
        own = {names[p] for p in group["params"] if p in names}
        if strange := sorted(own.symmetric_difference(values.get("params", own))):
            raise ValueError(f"state_dict: group {i} of parameters differs in {len(strange)}, first {strange[0]}")
    for group, values in both_groups:
        group.update({k: deepcopy(v) for k, v in values.items() if k != "params"})
    for name in NUMBERS:
        setattr(optimizer, f"_{name}", held.get(name, 0))
    for name in ARRAYS:
        setattr(optimizer, f"_{name}", held[name].cpu().numpy().copy())
    both, score = zip(optimizer._scores, optimizer._counts, strict=True), optimizer.settings.score
    optimizer._values[:] = [importance.corrected(*one, score) for one in both]
    optimizer._sampler.load_state_dict(held["sampler"])
    optimizer._rounding.set_state(held["rounding"].cpu())
    optimizer._num_good = held["num_good"] - held["num_good_in_round"]
    optimizer._switch_to(tuple(held["active"]))
    on = dict.fromkeys(optimizer._on.entries)
    optimizer._on.norms.write(held["sums"], held["num_good_in_round"])
    optimizer._on.group_state_before = held.get("inner_groups", {})
    for e in optimizer._entries.values():
        device = "cpu" if e not in on and optimizer.settings.state_policy == "cpu" else e.param.device
        found = saved["state"].get(e.name, {})
        values = moved({k: optimizer._workers.part_for(v, e.param) for k, v in found.items()}, device, copy=True)
        e.master, e.residual = values.pop("master", None), values.pop("residual", None)
        e.residual = None if e.residual is None else e.residual.cpu()
        e.saved = values or None
        e.stamp = (-1, -1)  # so that the first step checks the master against the weight
        e.norm = None


def _rule(optimizer: BlockCoordinateOptimizer) -> list[str]:
    """What the state of a parameter belongs to."""
    inner = optimizer.settings.inner
    name = "AdamW" if inner is None else getattr(inner, "__qualname__", type(inner).__name__)
    return [name, optimizer.settings.state_format]


def _check_layout(saved: list[list[Any]], own: list[list[Any]]) -> None:
    if saved == own:
        return
    before, now = {b[0]: b[1] for b in saved}, {b[0]: b[1] for b in own}
    parts = []
    if missing := [n for n in before if n not in now]:
        parts.append(f"{len(missing)} blocks are missing from this model: {', '.join(missing[:3])}")
    if added := [n for n in now if n not in before]:
        parts.append(f"{len(added)} blocks are new in this model: {', '.join(added[:3])}")
    changed = [n for n in before if n in now and before[n] != now[n]]
    parts.extend(f"{name or 'always on'} was {before[name]} and is {now[name]}" for name in changed[:3])
    if not parts:
        first = next(a[0] for a, b in zip(saved, own, strict=True) if a[0] != b[0])
        parts.append(f"the blocks are the same but in another order, first at {first}")
    raise ValueError("state_dict: does not belong to this model: " + "; ".join(parts))
