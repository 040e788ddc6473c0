r"""Two problems on which the rate of convergence is measured: one with known constants, and a small LLaMA.

Both are split into blocks by `misa.optimizer.partition` like any model, both are non-convex, and for both the gradient
that a step uses is an unbiased estimate of one that can be had exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Problem(Protocol):
    """What is minimised, and how far from stationary it is.

    Attributes:
        model: Holds the parameters.
    """

    model: nn.Module

    def loss(self) -> Tensor:
        """Loss on the next mini-batch."""

    def full_sq_norm(self) -> float:
        """Squared norm of the full gradient of all blocks, without noise."""


class Waves(nn.Module):
    r"""A quadratic with waves on it, in rotated coordinates: non-convex, with known smoothness and known noise.

    \(f(\theta) = \sum_i \tfrac12 \lambda_i x_i^2 + a (1 - \cos \omega x_i)\) with \(x = Q\theta\), \(Q\) orthogonal, so
    every block is coupled with every other one. Its curvatures are \(\lambda_i + a \omega^2 \cos \omega x_i\): the
    gradient is Lipschitz with the constant \(L = \max_i \lambda_i + a\omega^2\), and \(f\) is not convex, since
    \(a\omega^2 > \lambda_i\). Steps see \(f(\theta) + \langle \xi, \theta \rangle\) with fresh normal \(\xi\) of
    standard deviation `noise`, ten times as large in the last layer as in the first.

    Args:
        seed: Of rotation, start and noise.
        num_layers: Layers of two matrices each.
        width: Rows and columns of a matrix.
        noise: Standard deviation of the gradient's noise in the last layer.
    """

    num_matrices = 2
    amplitude = 0.25
    frequency = 2.0
    curvatures = (0.1, 0.9)

    def __init__(self, seed: int = 0, num_layers: int = 4, width: int = 7, noise: float = 0.3) -> None:
        super().__init__()
        names = [f"w{i}" for i in range(self.num_matrices)]
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names}) for _ in range(num_layers)
        )
        self.generator = torch.Generator().manual_seed(seed)
        per_layer = self.num_matrices * width**2
        size = num_layers * per_layer
        rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=self.generator, dtype=torch.float64))
        self.rotation = rotation.float()
        self.curvature = torch.linspace(*self.curvatures, size)
        self.noise = (noise * torch.logspace(-1, 0, num_layers)).repeat_interleave(per_layer)
        # Layers start at distances that differ tenfold, too, so that there is something to sample by importance.
        for layer, scale in zip(self.layers, torch.logspace(0.5, -0.5, num_layers).tolist(), strict=True):
            for matrix in layer.values():
                nn.init.normal_(matrix.weight, std=scale, generator=self.generator)

    @property
    def model(self) -> nn.Module:
        """This module."""
        return self

    @property
    def smoothness(self) -> float:
        """Lipschitz constant of the gradient."""
        return max(self.curvatures) + self.amplitude * self.frequency**2

    def loss(self) -> Tensor:
        """Return f at the present weights, plus this step's noise."""
        flat = torch.cat([p.flatten() for p in self.parameters()])
        x = self.rotation @ flat
        waves = self.amplitude * (1 - torch.cos(self.frequency * x))
        xi = self.noise * torch.randn(len(flat), generator=self.generator)
        return (self.curvature * x.square() / 2 + waves).sum() + xi @ flat

    @torch.no_grad()
    def full_sq_norm(self) -> float:
        """Squared norm of the gradient of f, in closed form."""
        x = self.rotation @ torch.cat([p.flatten() for p in self.parameters()])
        slope = self.curvature * x + self.amplitude * self.frequency * torch.sin(self.frequency * x)
        return float(slope.double().square().sum())  # a rotation keeps lengths


class SmallLlama:
    """A LLaMA on a fixed population of mini-batches, drawn one at a time; its full gradient is that of all of them.

    Args:
        model: A causal language model.
        batches: The population.
        seed: Of the draws.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], seed: int = 0) -> None:
        from misa.optimizer import partition

        self.model = model
        self._batches = batches
        # Of batches with as many tokens each, the mean loss is that of all of them in one pass, which is faster.
        self._parts = [join(batches)] if are_alike(batches) else batches
        self._blocks = [p for block in partition(model) for _, p in block.params]
        self._generator = torch.Generator().manual_seed(seed)

    def loss(self) -> Tensor:
        """Loss on a mini-batch drawn from the population."""
        return self._loss(self._batches[int(torch.randint(len(self._batches), (), generator=self._generator))])

    def full_sq_norm(self) -> float:
        """Squared norm of the mean gradient over the population; what is trainable stays as it is."""
        before = [p.requires_grad for p in self._blocks]
        for p in self._blocks:
            p.requires_grad_(True)
        # Not `backward`, which would run the optimizer's hooks.
        mean = [torch.zeros_like(p) for p in self._blocks]
        for part in self._parts:
            for total, g in zip(mean, torch.autograd.grad(self._loss(part), self._blocks), strict=True):
                total.add_(g, alpha=1 / len(self._parts))
        for p, on in zip(self._blocks, before, strict=True):
            p.requires_grad_(on)
        return sum(float(g.double().square().sum()) for g in mean)

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Any = self.model(**batch).loss
        return loss  # type: ignore[no-any-return]


def are_alike(batches: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether all batches have one shape and a label for every token."""
    shape = batches[0]["labels"].shape
    return all(batch["labels"].shape == shape and bool((batch["labels"] >= 0).all()) for batch in batches)


def join(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of the sequences of all."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
