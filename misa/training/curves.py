"""Turn what a Trainer logged into the rows of a run's curve file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from misa.results import CurvePoint

# Names in the curves, and under which names transformers logs them.
CURVES = {
    "train_loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "active_numel": "active_numel",
}


def curve_points(history: Sequence[dict[str, Any]]) -> list[CurvePoint]:
    """Turn a Trainer's log history into rows of the curve file.

    Args:
        history: `trainer.state.log_history`.
    """
    return [
        CurvePoint(
            step=entry["step"],
            tokens=entry.get("num_input_tokens_seen", 0),
            time_s=entry.get("time_s", 0.0),
            metric=metric,
            value=entry[logged],
        )
        for entry in history
        for metric, logged in CURVES.items()
        # The number of active parameters belongs to a training step, and is noted at every entry.
        if logged in entry and (metric != "active_numel" or "loss" in entry)
    ]


def mean_loss(losses: Sequence[CurvePoint]) -> float:
    """Return the mean over all steps; each point is the mean over the steps since the one before."""
    steps = [point.step for point in losses]
    counts = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    return sum(point.value * count for point, count in zip(losses, counts, strict=True)) / steps[-1]
