"""Checkpoints that a kill cannot spoil: each carries a list of its files, and one that does not match is not used."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

from misa.files import SEAL_FILE, broken, fingerprint

logger = logging.getLogger(__name__)

# Which run the checkpoints in a folder belong to.
RUN_FILE = "run.json"

# Where a checkpoint is written before it gets its name.
STAGING_FOLDER = ".misa-saving"

# Without these a run could continue, but not as the same run. Random state is that of a process that was alone, or of
# the first of several.
REQUIRED_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth|rng_state_0.pth")

# Weights of a model or an adapter, whole or in parts.
WEIGHTS = (".safetensors", ".bin", ".index.json")


def fault(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None if every file is there as it was written."""
    return broken(checkpoint, REQUIRED_FILES)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step a checkpoint was made at, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def best_checkpoint(named: str | None, folder: str | Path, is_read: bool) -> str | None:
    """Find the checkpoint that a state names as the best so far; its folder may have been moved meanwhile.

    Args:
        named: Its path when the state was written, or None.
        folder: Where the checkpoints of the run are now.
        is_read: Whether the run ends with its model, so that its weights must be whole.

    Returns:
        Its path, or None if there is none, or none that can be used, which a warning says.
    """
    if named is None:
        return None
    here = Path(folder) / Path(named).name
    best = here if here.is_dir() else Path(named)
    if best.is_dir() and (not is_read or _has_whole_weights(best)):
        return str(best)
    logger.warning("%s, the best checkpoint so far, is not used: its weights are missing or damaged", best)
    return None


def _has_whole_weights(checkpoint: Path) -> bool:
    try:
        listed = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
        weights = {name: written for name, written in listed.items() if name.endswith(WEIGHTS)}
        return bool(weights) and all(fingerprint(checkpoint / name) == written for name, written in weights.items())
    except (OSError, ValueError, AttributeError):
        return False


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, whole or not, from the oldest to the newest."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def remove_checkpoints(folder: str | Path) -> None:
    """Remove all checkpoints and what belongs to them, and the folder if nothing else is in it.

    Args:
        folder: Folder of the checkpoints; it need not exist.
    """
    folder = Path(folder)
    # The mark goes last: without it, checkpoints left by a kill in here would belong to nobody.
    for path in (folder / STAGING_FOLDER, *checkpoints(folder)):
        shutil.rmtree(path, ignore_errors=True)
    (folder / RUN_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest whole checkpoint, and remove what a kill left half done.

    Args:
        folder: Folder of the checkpoints; it need not exist.

    Returns:
        Folder of the checkpoint, or None if there is none to continue from.
    """
    folder = Path(folder)
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
    for checkpoint in reversed(checkpoints(folder)):
        if (problem := fault(checkpoint)) is None:
            return checkpoint
        logger.warning("%s is not used: %s", checkpoint, problem)
        # It would count as the newest one when old checkpoints are removed.
        shutil.rmtree(checkpoint)
    return None
