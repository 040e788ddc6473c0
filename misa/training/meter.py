"""Measure a run: seconds, tokens, memory; kept in the checkpoint, so that an interrupted run measures all of itself."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState

from misa.results.provenance import peak_rss_bytes

# Step durations kept for the median.
NUM_DURATIONS = 1000


class Meter(TrainerCallback, ExportableState):
    """Count training seconds and watch memory; note both at each point of the curve.

    Training seconds are those between the start of a step's first forward pass and the end of its update: evaluation,
    checkpoints and loading are left out.

    Attributes:
        train_s: Seconds spent in training steps.
        wall_s: Seconds since the start, evaluation and checkpoints included, pauses between two processes left out.
        durations_s: Seconds of each of the last `NUM_DURATIONS` steps.
        rss_bytes: Largest resident set of the process so far.
        device_bytes: Largest memory of the accelerator's tensors so far; 0 without one.
        state_bytes: Largest optimizer state so far, in total and by category, bytes.
        active_numel: Parameters trained in the last step.
        num_active_blocks: Blocks trained in the last step; 0 for a method without blocks.
    """

    def __init__(self) -> None:
        self.train_s = 0.0
        self.wall_s = 0.0
        self.durations_s: list[float] = []
        self.rss_bytes = 0
        self.device_bytes = 0
        self.state_bytes: dict[str, int] = {}
        self.active_numel = 0
        self.num_active_blocks = 0
        self._begun = self._step_begun = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in the form transformers asks for."""
        self.look()
        names = ("train_s", "wall_s", "durations_s", "rss_bytes", "device_bytes", "state_bytes", "active_numel")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def restore(self, state: TrainerState) -> None:
        """Take over what a checkpoint kept.

        Args:
            state: Trainer state read from the checkpoint.
        """
        for name, value in state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).items():
            setattr(self, name, value)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clocks; after a checkpoint, where they stood."""
        if state.global_step > 0:
            self.restore(state)
        self._begun = time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._step_begun = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Count what this step trains; after the update, a new round may already have begun."""
        self.active_numel = num_active(unwrapped(optimizer))
        self.num_active_blocks = len(getattr(unwrapped(optimizer), "active", ()))
        self._watch_state(optimizer)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Look at the optimizer's state after the update that may have made it."""
        self._watch_state(optimizer)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock of a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        duration = time.perf_counter() - self._step_begun
        self.train_s += duration
        self.durations_s = [*self.durations_s[1 - NUM_DURATIONS :], duration]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note time and active parameters beside what was just logged."""
        state.log_history[-1].update(time_s=self.train_s, active_numel=self.active_numel)

    @property
    def peak_bytes(self) -> int:
        """Largest memory so far: of the accelerator's tensors where there is one, else of the process."""
        self.look()
        return self.device_bytes or self.rss_bytes

    def peaks(self) -> dict[str, float]:
        """Return the largest sizes seen, bytes."""
        self.look()
        peaks: dict[str, float] = {"rss_bytes": self.rss_bytes, "state_bytes": self.state_bytes.get("total", 0)}
        peaks |= {f"state_{name}_bytes": size for name, size in self.state_bytes.items() if name != "total"}
        if self.device_bytes:
            peaks["device_bytes"] = self.device_bytes
        return peaks

    def timings(self, num_tokens: int) -> dict[str, float]:
        """Return seconds and speed.

        Args:
            num_tokens: Tokens trained on.
        """
        self.look()
        return {
            "train_s": self.train_s,
            "wall_s": self.wall_s,
            "step_s": statistics.median(self.durations_s) if self.durations_s else 0.0,
            "tokens_per_s": num_tokens / self.train_s if self.train_s else 0.0,
        }

    def _watch_state(self, optimizer: Any) -> None:
        sizes = optimizer_state_bytes(unwrapped(optimizer))
        for name, size in {**sizes, "total": sum(sizes.values())}.items():
            self.state_bytes[name] = max(self.state_bytes.get(name, 0), size)

    def look(self) -> None:
        """Read the clock and the peaks of memory."""
        now = time.perf_counter()
        self.wall_s += now - self._begun
        self._begun = now
        self.rss_bytes = max(self.rss_bytes, peak_rss_bytes())
        if torch.cuda.is_available():
            self.device_bytes = max(self.device_bytes, torch.cuda.max_memory_allocated())


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state_bytes(optimizer: Any) -> dict[str, int]:
    """Return the bytes an optimizer holds, by category.

    Args:
        optimizer: An optimizer with a method `state_bytes`, or any torch optimizer, whose state tensors are then
            counted as moments.
    """
    if hasattr(optimizer, "state_bytes"):
        return dict(optimizer.state_bytes())
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return {"moments": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


def num_active(optimizer: Any) -> int:
    """Return how many parameters an optimizer updates in the current step.

    Args:
        optimizer: An optimizer with the attribute `active_numel`, or any torch optimizer, all of whose parameters
            with a gradient count.
    """
    if hasattr(optimizer, "active_numel"):
        return int(optimizer.active_numel)
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
