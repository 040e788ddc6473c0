"""Optional record of every round: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.files import write_text

if TYPE_CHECKING:
    from misa.optimizer.engine import BlockCoordinateOptimizer


class RoundRecord:
    """A JSONL file that a resumed run continues without gaps or repeats.

    Lines of rounds that are done again (after a resume, or by a new run over an old file) are dropped when the first
    of them is written.

    Args:
        path: File to write; its folder is created.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._next = -1  # the round that follows the last line, or -1 if the file has not been looked at
        if self._path.is_dir():
            raise ValueError(f"record is {path!r}, a folder; it must name a file")
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an optimizer records nothing: rounds of two would be mixed in one file."""

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: what is loaded later looks at the file again, which has grown since."""
        return vars(self) | {"_next": -1}

    def append(self, optimizer: BlockCoordinateOptimizer, measured: dict[int, float]) -> None:
        """Write the round that ends now.

        Args:
            optimizer: Just before it draws again.
            measured: What the round measured of blocks, by their index.
        """
        line = {
            "round": optimizer.round,
            "steps": optimizer._step_in_round,
            "active": list(optimizer.active),
            "probabilities": optimizer.probabilities,
            "scores": optimizer.scores,
            "measured": {optimizer.blocks[i].name: measured.get(i, 0.0) for i in optimizer._active},
            "lr": [float(group["lr"]) for group in optimizer.param_groups],
            "bytes": optimizer.state_bytes(),
            "skipped_steps": optimizer.num_skipped_steps,
        }
        if optimizer.round != self._next:
            self._keep_before(optimizer.round)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._next = optimizer.round + 1

    def _keep_before(self, num_rounds: int) -> None:
        """Drop lines from this round on, and a last line cut short by a kill."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                number = json.loads(line)["round"]
            except json.JSONDecodeError:
                continue
            if number < num_rounds:
                kept.append(line)
        write_text(self._path, "".join(f"{line}\n" for line in kept))
