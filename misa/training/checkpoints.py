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


def fault(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None if every file is there as it was written."""
    return broken(checkpoint, REQUIRED_FILES)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step a checkpoint was made at, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def found_again(checkpoint: str | None, folder: str | Path) -> str | None:
    """Where a checkpoint that a state names lies, if its folder may have been moved meanwhile.

    Args:
        checkpoint: Its path when the state was written, or None.
        folder: Where the checkpoints of the run are now.
    """
    if checkpoint is None or not (here := Path(folder) / Path(checkpoint).name).is_dir():
        return checkpoint
    return str(here)


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
        problem = fault(checkpoint) or _fault_of_best(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("%s is not used: %s", checkpoint, problem)
        # It would count as the newest one when old checkpoints are removed.
        shutil.rmtree(checkpoint)
    return None


def _fault_of_best(checkpoint: Path) -> str | None:
    """Say what is wrong with the checkpoint that a whole one names as the best so far, which the run may end with."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = found_again(state.get("best_model_checkpoint"), checkpoint.parent)
    if best is None or Path(best) == checkpoint or not Path(best).is_dir():
        return None
    problem = fault(Path(best))
    return problem and f"the best checkpoint before it, {best}, cannot be used: {problem}"
