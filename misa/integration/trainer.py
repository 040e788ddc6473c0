"""The one line for a Hugging Face Trainer: `Trainer(optimizer_cls_and_kwargs=(misa.TrainerOptimizer, {...}))`."""

from __future__ import annotations

from typing import Any

from torch import nn

from misa.integration.wrappers import refuse_launched
from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateOptimizer

PRESETS: dict[str, type[BlockCoordinateOptimizer]] = {"misa": MISA, "badam": BAdam, "lisa": LISA}


class TrainerOptimizer:
    """Factory that `transformers.Trainer` calls with the model, so that no Trainer subclass or callback is needed.

    Example:
        ```python
        Trainer(model, args, optimizer_cls_and_kwargs=(misa.TrainerOptimizer, {"lr": 1e-4, "budget": 0.03}))
        ```

    A trainer without that argument takes an optimizer made before it: `optimizers=(misa.MISA(model, lr=1e-4), None)`.
    """

    def __call__(self, model: nn.Module, preset: str = "misa", **options: Any) -> BlockCoordinateOptimizer:
        """Make the optimizer.

        Args:
            model: The model a Trainer trains.
            preset: `"misa"`, `"badam"` or `"lisa"`.
            **options: Arguments of the preset. `lr` must be among them: a Trainer does not pass on its own rate, weight
                decay and betas.

        Raises:
            ValueError: without `lr`, for an unknown preset, and under DeepSpeed or Accelerate's FSDP.
        """
        refuse_launched()
        if "lr" not in options:
            raise ValueError(
                "lr is missing: TrainingArguments' learning_rate, weight_decay, adam_beta1 and so on do not reach an "
                'optimizer given by optimizer_cls_and_kwargs; put them beside the other options, as "lr": 1e-4'
            )
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}")
        return PRESETS[preset](model, **options)
