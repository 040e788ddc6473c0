"""Find out before a run whether what it will write fits on the disk."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

# Two fp32 moments of every parameter that trains at a time: the least that a method here keeps, but for SGD.
_STATE_BYTES = 8


def require_space(job: Any, built: Any) -> None:
    """Compare the model and the checkpoints of a run with the free space.

    The estimate is a low one: the weights that are saved, and two moments for what trains at a time.

    Args:
        job: The run, a `misa.training.run.Job`.
        built: Its method applied to its model, a `misa.methods.Built`.

    Raises:
        ValueError: If a disk has less room than that.
    """
    needed: dict[Path, int] = {}
    weights = weight_bytes(built.model)
    if job.run.save_model:
        needed[Path(job.run.output_dir)] = weights
    if str(job.training.save_strategy) not in ("no", "SaveStrategy.NO"):
        # A checkpoint is written before the oldest one goes.
        kept = (job.training.save_total_limit or 2) + 1
        scratch = Path(job.training.output_dir)
        needed[scratch] = needed.get(scratch, 0) + kept * (weights + state_bytes(built, job.method.method))
    by_disk: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, size in needed.items():
        existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
        by_disk[existing.stat().st_dev].append((existing, size))
    for entries in by_disk.values():
        existing, size = entries[0][0], sum(size for _, size in entries)
        free = shutil.disk_usage(existing).free
        if size > free:
            raise ValueError(
                f"the disk of {existing} has {free / 2**20:.0f} MiB free, but this run needs about "
                f"{size / 2**20:.0f} MiB for its model and checkpoints: free some, name another output_dir and "
                "checkpoint_dir, or keep fewer checkpoints (save_total_limit, save_strategy no)"
            )


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that `save_pretrained` writes: all of them, or the adapters of a PEFT model."""
    parameters = list(model.parameters())
    if hasattr(model, "peft_config"):
        parameters = [p for p in parameters if p.requires_grad]
    return sum(p.nbytes for p in parameters)


def state_bytes(built: Any, method: str) -> int:
    """Bytes of the optimizer's state, at least."""
    if method in ("sgd", "galore", "galore_layerwise"):
        return 0
    numel = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    settings = built.settings
    if "num_blocks" in settings:
        # Layers and matrices differ in size; the budget is what is known.
        numel = int(numel * (settings.get("budget") or 0.0))
    return _STATE_BYTES * numel // (2 if method == "adamw_bf16" else 1)
