"""Tensors that belong together and lie in memory in different orders, for kernels that read memory from end to end."""

from __future__ import annotations

import torch
from torch import Tensor


class SameLayout:
    """Lists of weights, gradients and moments in which those that belong together lie alike.

    A fused kernel pairs the elements of its tensors by their place in memory, not by their indices. Moments lie as
    their weight did when they were made, which `model.to(memory_format=...)` or the state of another run changes, a
    gradient that was put there by hand lies as its maker left it, and a slice has gaps. In the place of such tensors
    stand copies.

    Args:
        params: The weights.
        *others: What belongs to each of them, in the same order, one list for each kind.
    """

    def __init__(self, params: list[Tensor], *others: list[Tensor]) -> None:
        self.lists = [params, *others]
        self._copies: list[tuple[Tensor, Tensor]] = []  # and what each was made of
        for i, p in enumerate(params):
            stride = p.stride()
            if any(tensors[i].stride() != stride for tensors in others):
                self._copy(i)

    def write_back(self) -> None:
        """Write the copies to the tensors that they were made of."""
        for copy, origin in self._copies:
            origin.copy_(copy)

    def _copy(self, number: int) -> None:
        if not self._copies:
            self.lists = [list(tensors) for tensors in self.lists]
        like = torch.empty_like(self.lists[0][number])  # as the weight lies, without its gaps
        for tensors in self.lists:
            origin = tensors[number]
            if origin.stride() != like.stride():
                tensors[number] = torch.empty_like(like, dtype=origin.dtype).copy_(origin)
                self._copies.append((tensors[number], origin))
