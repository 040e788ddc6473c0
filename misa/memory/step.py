"""Measure one training step of a causal language model with the memory tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from misa.integration.first_forward import skip_frozen_prefix
from misa.memory.tracker import ACTIVATIONS, CATEGORIES, MemoryTracker, Moment

MOMENTS = ("peak", "forward_end", "backward_end", "step_end")


@dataclass(frozen=True)
class StepMemory:
    """What one training step held.

    Attributes:
        moments: Live bytes at each of `MOMENTS`; the three ends come before what the phase left dies.
        loss: The step's loss (not a number on fake tensors).
    """

    moments: dict[str, Moment]
    loss: float

    @property
    def peak(self) -> Moment:
        """The moment of the most live bytes."""
        return self.moments["peak"]


def measure_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, torch.Tensor],
    rounding_bytes: int = 1,
) -> StepMemory:
    """Run forward, backward, step and `zero_grad` once, counting every live byte.

    Run one step before, unmeasured, so that the optimizer's state exists. As in the Trainer, the model's outputs other
    than the loss die before the backward pass, and gradients are freed after the step.

    Args:
        model: A causal language model whose forward pass takes `batch` and returns an object with `.loss`, in the mode
            (train or eval) in which it is to be measured. May be frozen in any part.
        optimizer: Its optimizer.
        batch: Keyword arguments of the forward pass, with labels.
        rounding_bytes: Passed to `MemoryTracker`.

    Returns:
        The peak and the ends of the three phases.
    """
    tracker = MemoryTracker(rounding_bytes)
    tracker.watch_model(model)
    tracker.watch_optimizer(optimizer)
    tracker.watch(ACTIVATIONS, dict(batch))
    with tracker, _logits_region(model, tracker):
        with tracker.phase("forward"):
            loss = model(**batch).loss
        with tracker.phase("backward"):
            # Until the gradient reaches the head's input, the backward pass is that of the loss and the logits.
            tracker.enter_logits()
            loss.backward()
        with tracker.phase("step"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ends = {f"{name}_end": moment for name, moment in tracker.phase_ends.items()}
    value = float("nan") if isinstance(loss, torch._subclasses.FakeTensor) else float(loss.detach())
    return StepMemory({"peak": tracker.peak, **ends}, value)


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor]) -> None:
    """The same step without counting, to bring an optimizer into its steady state."""
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _logits_region(model: torch.nn.Module, tracker: MemoryTracker) -> Iterator[None]:
    """Tell the tracker when the output head begins, and when the backward pass has left it."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        yield
        return

    def enter(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        tracker.enter_logits()
        hidden = inputs[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.leave_logits())

    handle = head.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Recompute each layer in the backward pass, from the lowest layer that trains upwards.

    Switching checkpointing on makes transformers also force gradients through the embedding, by which every layer
    would be recomputed whatever is frozen; the force is taken off again.

    Args:
        model: A transformers model.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    skip_frozen_prefix(model)


def checkpoint_layers(model: torch.nn.Module, num: int) -> None:
    """Recompute only some layers: the lowest that trains and those next above it.

    The lowest ones, because they are recomputed last, when what the others saved is gone.

    Args:
        model: A transformers model.
        num: Number of layers, 0 for none, negative for all.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if num == 0:
        for layer in layers:
            layer.gradient_checkpointing = False
        return
    enable_checkpointing(model)
    trains = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    embeds = model.get_input_embeddings()
    lowest = 0 if any(p.requires_grad for p in embeds.parameters()) or True not in trains else trains.index(True)
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = num < 0 or lowest <= i < lowest + num


def random_batch(vocabulary: int, batch_size: int, seq_len: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with all positions labelled: memory does not depend on which tokens they are.

    Args:
        vocabulary: Number of token ids.
        batch_size: Sequences.
        seq_len: Tokens of each.
        seed: Of the draw.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each `[batch_size, seq_len]`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch_size, seq_len), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def rows(memory: StepMemory, **columns: Any) -> list[dict[str, Any]]:
    """Tidy rows: one per moment and category.

    Args:
        memory: A measurement.
        **columns: Further columns of every row (method, model, batch_size, ...).

    Returns:
        Rows with `columns`, category, bytes, moment.
    """
    return [
        {**columns, "category": category, "bytes": moment.by_category[category], "moment": name}
        for name, moment in memory.moments.items()
        for category in CATEGORIES
    ]
