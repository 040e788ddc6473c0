"""Weights along a run, written beside its result: what the laboratories measure at several stages of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from misa.files import new_folder


def snapshot_steps(text: str | None, max_steps: int) -> tuple[int, ...]:
    """Steps after which the weights are wanted.

    Args:
        text: Comma list, "none", or None.
        max_steps: Last step of the run, if it is known, else -1.

    Raises:
        ValueError: If a word is no whole number from 1 up to the last step.
    """
    words = [] if text in (None, "none") else [word.strip() for word in str(text).split(",")]
    for word in words:
        if not word.isdecimal() or int(word) < 1 or 0 < max_steps < int(word):
            last = max_steps if max_steps > 0 else "the last step"
            raise ValueError(f"snapshot_steps is {text!r}, allowed is none, or whole numbers from 1 to {last}")
    return tuple(sorted({int(word) for word in words}))


class Snapshots(TrainerCallback):
    """Write model and tokenizer into `step-N` after some steps; a resumed run writes the same again.

    Args:
        folder: Folder of the snapshots, made at once, so that a run without any has one, too.
        steps: After which steps.
        tokenizer: Saved with the model.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...], tokenizer: Any) -> None:
        self.folder = folder
        self.steps = steps
        self.tokenizer = tokenizer
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write a snapshot if one is due."""
        if state.global_step in self.steps and state.is_world_process_zero:
            with new_folder(self.folder / f"step-{state.global_step}", last="config.json") as folder:
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
