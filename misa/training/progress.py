"""Show how a run is going: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from misa.training.meter import Meter


class Progress(TrainerCallback):
    """Report step, loss, learning rate, tokens a second, what is trained, the peak of memory, and the time left.

    Args:
        meter: The run's meter, from which the speed is read.
        bar: Draw a bar; None does so if standard error is a terminal.
    """

    def __init__(self, meter: Meter, bar: bool | None = None) -> None:
        self.meter = meter
        self.use_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: Any = None
        self._session_steps = 0
        self._session_begun = time.perf_counter()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar at the step the run continues from."""
        self._session_steps = 0
        self._session_begun = time.perf_counter()
        if self.use_bar and state.is_world_process_zero:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self._session_steps += 1
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the last point of the curve."""
        logs = logs or {}
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        speed = state.num_input_tokens_seen / self.meter.train_s if self.meter.train_s else 0.0
        if "eval_loss" in logs:
            self._line(f"step {state.global_step}/{state.max_steps}  eval loss {logs['eval_loss']:.4f}")
        elif self.bar is not None:
            self.bar.set_postfix(
                loss=f"{logs['loss']:.4f}",
                lr=f"{logs['learning_rate']:.2g}",
                tokens_s=f"{speed:.0f}",
                active=self._active(),
                peak=f"{self.meter.peak_bytes / 2**30:.2f}GiB",
            )
        else:
            elapsed = time.perf_counter() - self._session_begun
            left = elapsed / max(self._session_steps, 1) * (state.max_steps - state.global_step)
            self._line(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2g}"
                f"  {speed:.0f} tokens/s  active {self._active()}  peak {self.meter.peak_bytes / 2**30:.2f} GiB"
                f"  {timedelta(seconds=round(left))} left"
            )

    def _active(self) -> str:
        """Parameters trained in the last step, and in how many blocks."""
        blocks = f" in {self.meter.num_active_blocks} blocks" if self.meter.num_active_blocks else ""
        return f"{self.meter.active_numel / 1e6:.3g}M{blocks}"

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
