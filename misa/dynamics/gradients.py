"""Gradients of a model over a population of mini-batches, reduced to a few numbers for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from misa.dynamics.variance import BlockGradients

if TYPE_CHECKING:
    from misa.optimizer import Block


def block_gradients(
    model: torch.nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Mapping[str, torch.Tensor]],
    on_batch: Callable[[int, int], None] | None = None,
) -> BlockGradients:
    """Measure full-batch and mini-batch gradients of every block.

    Two passes over the batches: the first sums the gradients to that of the full batch, the second takes each
    mini-batch gradient's squared norm and its inner product with the full one. So one copy of the gradient is held,
    whatever the number of batches. Inner products are accumulated in float64.

    Args:
        model: A causal language model whose forward pass takes a batch and returns an object with `.loss`. It is put
            into evaluation mode (no dropout); its parameters end as they began, trainable or frozen.
        blocks: Blocks of this model, from `misa.optimizer.partition`.
        batches: The population, at least one; every batch weighs the same.
        on_batch: Called after each batch with the number done and the number in all (twice the batches).

    Returns:
        What `misa.dynamics.variance` needs.

    Raises:
        ValueError: If there are no batches, or the full gradient of the blocks is zero or not finite.
    """
    if not batches:
        raise ValueError("batches is empty; at least one batch is needed")
    parameters = [[parameter for _, parameter in block.params] for block in blocks]
    mean = [[torch.zeros_like(p, dtype=torch.float32) for p in group] for group in parameters]
    sq_norm = np.zeros((len(batches), len(blocks)))
    inner = np.zeros_like(sq_norm)
    with _only_trainable(model, [p for group in parameters for p in group]):
        for i, batch in enumerate(batches):
            _backward(model, batch)
            for sums, group in zip(mean, parameters, strict=True):
                for total, p in zip(sums, group, strict=True):
                    total.add_(_gradient(p), alpha=1 / len(batches))
            if on_batch is not None:
                on_batch(i + 1, 2 * len(batches))
        for i, batch in enumerate(batches):
            _backward(model, batch)
            for b, (sums, group) in enumerate(zip(mean, parameters, strict=True)):
                for total, p in zip(sums, group, strict=True):
                    gradient = _gradient(p).double()
                    sq_norm[i, b] += float(gradient.square().sum())
                    inner[i, b] += float((gradient * total).sum())
            if on_batch is not None:
                on_batch(len(batches) + i + 1, 2 * len(batches))
    full = inner.mean(axis=0).sum()
    if not np.isfinite(full) or full <= 0:
        raise ValueError(f"the squared norm of the full gradient is {full}; the model or the data is unusable")
    return BlockGradients(
        numel=np.array([block.numel for block in blocks], dtype=np.float64),
        layer=layer_indices(blocks),
        batch_sq_norm=sq_norm,
        batch_inner=inner,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def layer_indices(blocks: Sequence[Block]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Index of each block's layer: 0 for the first layer that occurs, and so on; shape `[B]`."""
    order = {layer: i for i, layer in enumerate(dict.fromkeys(block.layer for block in blocks))}
    return np.array([order[block.layer] for block in blocks], dtype=np.int64)


def matrix_name(block: Block) -> str:
    """Name of a block inside its layer, short: `q_proj` for `model.layers.3.self_attn.q_proj`."""
    return block.name.removesuffix(".weight").rpartition(".")[2]


def _backward(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    # A block that the loss does not reach (an unused expert) has no gradient at all: it counts as zero.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def _only_trainable(model: torch.nn.Module, wanted: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    keep = {id(p) for p in wanted}
    try:
        model.eval()
        for p, _ in before:
            p.requires_grad_(id(p) in keep)
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for p, on in before:
            p.requires_grad_(on)
        model.train(training)
