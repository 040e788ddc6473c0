"""Checkpoints that a kill cannot spoil: each carries a list of its files, and one that does not match is not used."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

from misa.files import broken

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


def best_checkpoint(named: str | None, folder: str | Path) -> str | None:
    """Find the checkpoint that a state names as the best so far; its folder may have been moved meanwhile.

    Args:
        named: Its path when the state was written, or None.
        folder: Where the checkpoints of the run are now.

    Returns:
        Its path, or None if there is none, or it is not there any more, which a warning says.
    """
    if named is None:
        return None
    here = Path(folder) / Path(named).name
    best = here if here.is_dir() else Path(named)
    if best.is_dir():
        return str(best)
    logger.warning("%s, the best checkpoint so far, is not there any more", best)
    return None


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


def latest_checkpoint(folder: str | Path, keeps_best: bool = False) -> Path | None:
    """Find the newest whole checkpoint, and remove what a kill left half done.

    Args:
        folder: Folder of the checkpoints; it need not exist.
        keeps_best: Whether the run ends with its best model: then one after a damaged best model is of no use, since
            the run would end with another model than without the damage.

    Returns:
        Folder of the checkpoint, or None if there is none to continue from.
    """
    folder = Path(folder)
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
    for checkpoint in reversed(checkpoints(folder)):
        problem = fault(checkpoint) or (_fault_of_best(checkpoint) if keeps_best else None)
        if problem is None:
            return checkpoint
        logger.warning("%s is not used: %s", checkpoint, problem)
        # It would count as the newest one when old checkpoints are removed.
        shutil.rmtree(checkpoint)
    return None


def _fault_of_best(checkpoint: Path) -> str | None:
    """Say what is wrong with the weights that a whole checkpoint names as the best so far."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = best_checkpoint(state.get("best_model_checkpoint"), checkpoint.parent)
    if best is None or (problem := broken(Path(best), only=WEIGHTS)) is None:
        return None
    return f"the best checkpoint before it, {best}, cannot be used: {problem}"
