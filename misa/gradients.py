"""Measuring gradients during the backward pass: their norms, sums of them by block, and the norms of what is off.

Numbers of a step are handled in one of two ways. On a CPU reading a tensor costs nothing, and sums of a few numbers
less than calls of torch, so they become floats. On a GPU they stay there as a tensor, and nothing is read before the
end of a round.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from misa.distributed.sharded import local_part

if TYPE_CHECKING:
    from misa.distributed.workers import Workers

Number = Tensor | float
Numbers = Tensor | list[float]

LARGE_NUMEL = 1 << 19  # gradients worth a second thread: waking it takes as long as reading so many on the first
TINY = 1e-300


def gradient_norm(grad: Tensor) -> Number:
    """Euclidean norm of a gradient: a float where that needs no waiting (on a CPU), else an fp32 scalar.

    On a CPU the norm of a whole tensor runs on one thread, and asking for fp32 makes a copy; so a large tensor goes row
    by row, and bf16 stays what it is (fp16 does not, because the norm may exceed its range). Of a sharded gradient it
    is the norm of the local part.
    """
    grad = local_part(grad)
    readable = grad.is_cpu and type(grad) is Tensor  # not a fake tensor, say
    whole = grad
    if grad.is_cpu and grad.dtype != torch.float16:
        if readable and grad.numel() < LARGE_NUMEL:
            return float(torch.linalg.vector_norm(grad))
        if grad.ndim >= 2:
            whole = torch.linalg.vector_norm(grad, dim=-1)
    norm: Tensor = torch.linalg.vector_norm(whole, dtype=torch.float32)
    return float(norm) if readable else norm


class NormSums:
    """Sums over a round of the gradient norms of its blocks.

    Args:
        blocks: Indices of the blocks, in the order in which their gradients are handed over; gradients of no block
            come last, as block -1.
        squared: Sum squared norms, or norms.
    """

    def __init__(self, blocks: tuple[int, ...], squared: bool) -> None:
        self._blocks = blocks
        self._squared = squared
        self._sums: Numbers = []  # one for each block, and last of no block
        self._num_good: Tensor | int = 0
        self._zero: Tensor | None = None
        self._lengths: Tensor | None = None
        self._num_lengths = 0  # gradients that `_lengths` is made for

    def squares(self, blocks: Sequence[int], norms: Sequence[Number]) -> Numbers:
        """Squared norm of every block's gradients, and last of those of no block.

        Args:
            blocks: The block of every gradient.
            norms: Their norms, in the same order.
        """
        counts = dict.fromkeys((*self._blocks, -1), 0.0)
        device = next((norm.device for norm in norms if isinstance(norm, Tensor)), None)
        if device is None:
            for block, norm in zip(blocks, norms, strict=True):
                counts[block] += float(norm) * float(norm)
            return list(counts.values())
        if self._zero is None:
            self._zero = torch.zeros((), device=device)
        there = [x.to(device) if isinstance(x, Tensor) else torch.tensor(x, device=device) for x in norms]
        if tuple(blocks) == self._blocks:  # one gradient each, and none of no block: nothing to sum, fewer kernels
            return torch.stack([*there, self._zero]).square_()
        if self._lengths is None or self._num_lengths != len(norms):
            for block in blocks:
                counts[block] += 1
            self._lengths = torch.tensor(list(counts.values()), dtype=torch.long, device=device)
            self._num_lengths = len(norms)
        # Sums one after the other: scattered ones have no fixed order on a GPU.
        squares = torch.stack(there).square_()
        return torch.segment_reduce(squares, "sum", lengths=self._lengths, unsafe=True)

    def add(self, squares: Numbers, good: Tensor | bool) -> None:
        """Add a step's squared norms, as `squares` returns them, if the step was taken."""
        if isinstance(squares, Tensor):
            row = squares if self._squared else squares.sqrt()
            if not isinstance(self._sums, Tensor):  # zeros are made there: a copy of numbers would wait for the device
                self._sums = torch.tensor(self._sums, device=row.device) if self._sums else torch.zeros_like(row)
            self._sums = torch.where(torch.as_tensor(good), self._sums + row, self._sums)
        elif good:
            row = squares if self._squared else [x**0.5 for x in squares]
            self._sums = [a + b for a, b in zip(self._sums, row, strict=True)] if self._sums else row
        self._num_good = self._num_good + good

    def read(self) -> tuple[list[float], int]:
        """The sums so far, one for each block, empty before the first good step, and how many steps entered them."""
        num_good = int(self._num_good)
        sums = self._sums.tolist() if isinstance(self._sums, Tensor) else self._sums
        return sums[: len(self._blocks)] if num_good else [], num_good

    def write(self, sums: list[float], num_good: int) -> None:
        """Continue with what was read."""
        self._sums, self._num_good = [*sums, 0.0] if sums else [], num_good


class Probe:
    """Norms of the gradients of parameters that do not train, each freed the moment it is ready.

    Over several micro-batches the squared norms are added up, which is less than the squared norm of their sum.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._norms: dict[int, list[Number]] = {}
        self._handles: list[Any] = []

    def watch(self, block: int, params: Sequence[Tensor]) -> None:
        """Measure the gradients of a block from now on."""
        norms = self._norms[block] = []
        owner = weakref.ref(self)  # so that the hooks of a forgotten optimizer do nothing

        def reduce(p: Tensor) -> None:
            if owner() is not None and p.grad is not None:
                norms.append(gradient_norm(p.grad))
                p.grad = None

        self._handles += self._workers.watch(params, dict.fromkeys(params, reduce), always=True)

    @property
    def blocks(self) -> list[int]:
        """The blocks that are watched."""
        return list(self._norms)

    def squares(self, unscale: Number) -> dict[int, float]:
        """Squared norm of every watched block that got a gradient, times the square of `unscale`."""
        of_block = [i for i, norms in self._norms.items() for _ in norms]
        *values, factor = read([*(norm for norms in self._norms.values() for norm in norms), unscale])
        squares = dict.fromkeys(of_block, 0.0)
        for i, norm in zip(of_block, values, strict=True):
            squares[i] += (norm * factor) ** 2
        return dict(zip(squares, self._workers.total(list(squares.values())), strict=True))

    def forget(self) -> None:
        """Forget what was measured, and go on."""
        for norms in self._norms.values():
            norms.clear()

    def stop(self) -> None:
        """Remove the hooks and forget what was measured."""
        for handle in self._handles:
            handle.remove()
        self._norms, self._handles = {}, []


def all_finite(squares: Numbers, overflow: Tensor | None = None) -> Tensor | bool:
    """Whether all are finite and a `GradScaler` found no overflow; for numbers on a GPU the answer stays there."""
    if isinstance(squares, list):
        return math.isfinite(sum(squares)) and not overflow
    good = squares.sum() < math.inf  # of squares; fewer kernels than `isfinite`
    return good if overflow is None else good & (overflow.to(good.device) == 0)


def each(function: Callable[[Any], Any], numbers: Numbers) -> Numbers:
    """Apply elementwise arithmetic to numbers of either kind."""
    return [function(x) for x in numbers] if isinstance(numbers, list) else function(numbers)


def read(numbers: Sequence[Number]) -> list[float]:
    """Numbers that may lie on a device, all read at once."""
    there = [x.float() for x in numbers if isinstance(x, Tensor)]
    values = iter(torch.stack([x.to(there[0].device) for x in there]).tolist() if there else ())
    return [next(values) if isinstance(x, Tensor) else x for x in numbers]
