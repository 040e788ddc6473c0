"""Optional record of every round: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RoundRecord:
    """A JSONL file that a resumed run continues without gaps or repeats.

    Args:
        path: File to write; its folder is created.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._continued = False

    def append(self, line: dict[str, Any]) -> None:
        """Add a round; `line["round"]` is its number."""
        if not self._continued:
            self._truncate(line["round"])
            self._continued = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self) -> None:
        """Say that the run was set back to an earlier round: the next `append` drops what it repeats."""
        self._continued = False

    def _truncate(self, num_rounds: int) -> None:
        """Drop the lines of rounds that a resumed run will do again, and a last line cut short by a kill."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                number = json.loads(line)["round"]
            except json.JSONDecodeError:
                continue
            if number < num_rounds:
                kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)
