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

MOST_UNREAD = 1024  # steps whose norms may wait on a device: a round has fewer, as a rule
NUM_FLAGS = 64  # made at a time, by one kernel
LARGE_NUMEL = 1 << 19  # gradients worth a second thread: waking it takes as long as reading so many on the first
TINY = 1e-300


def gradient_norm(grad: Tensor) -> Number:
    """Euclidean norm of a gradient: a float where that needs no waiting (on a CPU), else an fp32 scalar.

    On a CPU the norm of a whole tensor runs on one thread, and asking for fp32 makes a copy; so a large tensor goes row
    by row, and bf16 stays what it is (fp16 does not, because the norm may exceed its range). Of a sharded gradient it
    is the norm of the local part.
    """
    grad = local_part(grad)
    if grad.layout is not torch.strided:
        raise ValueError("a gradient is sparse, and AdamW needs whole ones: make its nn.Embedding with sparse=False")
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
    """Sums over a round of the gradient norms of its blocks, of the steps whose gradients were finite.

    Norms on a device wait there, unread, until someone asks for the sums, or for `MOST_UNREAD` steps.

    Args:
        blocks: Indices of the blocks, in the order in which their gradients are handed over; gradients of no block
            come last, as block -1.
        squared: Sum squared norms, or norms.
    """

    def __init__(self, blocks: tuple[int, ...], squared: bool) -> None:
        self._blocks = blocks
        self._squared = squared
        self._sums: list[float] = []  # one for each block, and last of no block
        self._num_good = 0
        self._unread: list[tuple[Tensor, Tensor]] = []  # norms of a step, and the flag that says not to count it
        self._zero_and_one: tuple[Tensor, Tensor] | None = None  # where the norms are
        self._flags: list[Tensor] = []  # zeros for `not_finite`, made many at a time
        self._lengths: Tensor | None = None
        self._lengths_of: tuple[int, ...] = ()  # the blocks of the gradients that `_lengths` is made for

    def of_blocks(self, blocks: Sequence[int], norms: Sequence[Number]) -> Numbers:
        """Norm of every block's gradients, and last of those of no block.

        Args:
            blocks: The block of every gradient.
            norms: Their norms, in the same order.
        """
        blocks = tuple(blocks)
        one_each = blocks == self._blocks  # and none of no block: nothing to sum
        device = next((norm.device for norm in norms if isinstance(norm, Tensor)), None)
        if device is None and one_each:
            return [*map(float, norms), 0.0]
        counts = dict.fromkeys((*self._blocks, -1), 0.0)
        if device is None:
            for block, norm in zip(blocks, norms, strict=True):
                counts[block] += float(norm) * float(norm)
            return [x**0.5 for x in counts.values()]
        there = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in norms]
        if one_each:  # fewer kernels
            return torch.stack([*there, self._constants(device)[0]])
        if self._lengths is None or self._lengths_of != blocks:
            for block in blocks:
                counts[block] += 1
            self._lengths = torch.tensor(list(counts.values()), dtype=torch.long, device=device)
            self._lengths_of = blocks
        # Sums one after the other: scattered ones have no fixed order on a GPU.
        squares = torch.stack(there).square_()
        return torch.segment_reduce(squares, "sum", lengths=self._lengths, unsafe=True).sqrt_()

    def not_finite(self, norms: Numbers, overflow: Tensor | None = None) -> Tensor | bool:
        """Whether one is not finite, or a `GradScaler` found an overflow.

        Of norms on a device the answer stays there, as what torch's kernels call `found_inf`: 1.0 for yes, or 0.0.
        """
        if isinstance(norms, list):
            return not math.isfinite(sum(norms)) or bool(overflow)
        if not self._flags:
            self._flags = [*torch.zeros(NUM_FLAGS, dtype=torch.float32, device=norms.device).unbind()]
        found = self._flags.pop()
        one = self._constants(norms.device)[1]
        torch._amp_foreach_non_finite_check_and_unscale_([norms], found, one)  # a single kernel
        return found if overflow is None else torch.maximum(found, overflow.to(found.device, found.dtype).reshape(()))

    def add(self, norms: Numbers, bad: Tensor | bool) -> None:
        """Add a step's norms, as `of_blocks` returns them, unless they are `bad` in the sense of `not_finite`."""
        if isinstance(norms, Tensor):
            self._unread.append((norms, torch.as_tensor(bad, dtype=torch.float32)))
            if len(self._unread) == MOST_UNREAD:
                self._read()
        elif not bad:
            self._read()
            self._count(norms)

    def read(self) -> tuple[list[float], int]:
        """The sums so far, one for each block, empty before the first good step, and how many steps entered them."""
        self._read()
        return self._sums[: len(self._blocks)], self._num_good

    def write(self, sums: list[float], num_good: int) -> None:
        """Continue with what was read."""
        self._sums, self._num_good, self._unread = [*sums, 0.0] if sums else [], num_good, []

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._zero_and_one is None:
            zeros = torch.zeros((), dtype=torch.float32, device=device)
            self._zero_and_one = zeros, torch.ones_like(zeros)
        return self._zero_and_one

    def _count(self, norms: list[float]) -> None:
        row = [x * x for x in norms] if self._squared else norms
        self._sums = [a + b for a, b in zip(self._sums, row, strict=True)] if self._sums else row
        self._num_good += 1

    def _read(self) -> None:
        """Add what waits on a device, step by step, so that it does not matter when it is read."""
        if self._unread:
            norms, flags = map(torch.stack, zip(*self._unread, strict=True))
            self._unread = []
            for *row, bad in torch.cat([norms, flags.to(norms.device).unsqueeze(1)], dim=1).tolist():
                if not bad:
                    self._count(row)


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

    def norms(self, unscale: Number) -> dict[int, float]:
        """Norm of every watched block that got a gradient, times `unscale`."""
        of_block = [i for i, norms in self._norms.items() for _ in norms]
        *values, factor = read([*(norm for norms in self._norms.values() for norm in norms), unscale])
        squares = dict.fromkeys(of_block, 0.0)
        for i, norm in zip(of_block, values, strict=True):
            squares[i] += (norm * factor) ** 2
        return dict(zip(squares, self._workers.norms([x**0.5 for x in squares.values()]), strict=True))

    def forget(self) -> None:
        """Forget what was measured, and go on."""
        for norms in self._norms.values():
            norms.clear()

    def stop(self) -> None:
        """Remove the hooks and forget what was measured."""
        for handle in self._handles:
            handle.remove()
        self._norms, self._handles = {}, []


def each(function: Callable[[Any], Any], numbers: Numbers) -> Numbers:
    """Apply elementwise arithmetic to numbers of either kind."""
    return [function(x) for x in numbers] if isinstance(numbers, list) else function(numbers)


def read(numbers: Sequence[Number]) -> list[float]:
    """Numbers that may lie on a device, all read at once."""
    there = [x.float() for x in numbers if isinstance(x, Tensor)]
    values = iter(torch.stack([x.to(there[0].device) for x in there]).tolist() if there else ())
    return [next(values) if isinstance(x, Tensor) else x for x in numbers]
