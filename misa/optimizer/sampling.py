"""Which blocks are on next: an order of preference, then a greedy fill of the budget."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from misa.optimizer.importance import Array

ORDERS = ("importance", "uniform", "ascending", "descending", "shuffled", "all")


class BlockSampler:
    """Draws blocks without replacement, from a random generator of its own.

    A draw ranks the blocks and takes them in that order while they fit, so a block that would break the limit is
    passed over and smaller ones may follow. Orders:

    - `"importance"`: weighted without replacement, by the probabilities handed to `draw` (MISA);
    - `"uniform"`: the same with equal weights (LISA);
    - `"ascending"`, `"descending"`, `"shuffled"`: cyclic, the last one in a new random order each cycle (BAdam);
    - `"all"`: every block, always.

    Args:
        numels: Elements of each block.
        order: One of `ORDERS`.
        max_numel: Most elements on at once, or None.
        num_blocks: Most blocks on at once, or None; a ValueError if there are fewer in all.
        first_pass: Take never-used blocks first, in their order, until all were used (the authors' code).
        sample_last: How many of the longest-idle blocks are forced in before the draw (the authors' code).
        seed: Seed of the generator.
    """

    def __init__(
        self,
        numels: Sequence[int],
        order: str = "importance",
        *,
        max_numel: int | None = None,
        num_blocks: int | None = None,
        first_pass: bool = False,
        sample_last: int = 0,
        seed: int = 0,
    ) -> None:
        if num_blocks is not None and num_blocks > len(numels):
            raise ValueError(f"num_blocks={num_blocks}: there are only {len(numels)} blocks")
        self.order = order
        self.first_pass = first_pass
        self.sample_last = sample_last
        self._numels = tuple(numels)
        self._smallest = min(numels, default=0)
        self._max_numel = sum(numels) if max_numel is None or order == "all" else max_numel
        self._num_blocks = len(self._numels) if num_blocks is None or order == "all" else num_blocks
        self._generator = torch.Generator().manual_seed(seed)
        self._last_used = [-1] * len(self._numels)
        self._round = 0
        self._cycle: list[int] = []

    @property
    def never_fit(self) -> tuple[int, ...]:
        """Blocks larger than the whole limit, which can never be drawn."""
        return tuple(i for i, n in enumerate(self._numels) if n > self._max_numel)

    @property
    def used(self) -> list[int]:
        """Blocks that were drawn at least once."""
        return [i for i, last in enumerate(self._last_used) if last >= 0]

    @property
    def in_first_pass(self) -> bool:
        """Whether some block that fits was never used and never-used blocks go first."""
        return self.first_pass and any(u < 0 for i, u in enumerate(self._last_used) if self._fits(i))

    def draw(self, log_p: Array) -> tuple[int, ...]:
        """Sorted indices of the next round's blocks, at least one.

        `log_p`, the log-probabilities of all blocks, shape `[B]`, is used by the order `"importance"` alone.
        """
        chosen = self._draw_cyclic() if self.order in ("ascending", "descending", "shuffled") else self._draw(log_p)
        for i in chosen:
            self._last_used[i] = self._round
        self._round += 1
        return tuple(sorted(chosen))

    def _fits(self, i: int) -> bool:
        return self._numels[i] <= self._max_numel

    def _fill(self, ranking: Iterable[int], chosen: Iterable[int] = ()) -> list[int]:
        """Take blocks in order of preference while they fit."""
        taken = dict.fromkeys(chosen)
        used = sum(self._numels[i] for i in taken)
        for i in ranking:
            if len(taken) == self._num_blocks or used + self._smallest > self._max_numel:
                break
            if i not in taken and used + self._numels[i] <= self._max_numel:
                taken[i] = None
                used += self._numels[i]
        return list(taken)

    def _draw(self, log_p: Array) -> list[int]:
        if self.order == "all":
            return list(range(len(self._numels)))
        # Gumbel top-k: ranking by log p + Gumbel noise is successive weighted drawing without replacement.
        noise = torch.rand(len(self._numels), generator=self._generator, dtype=torch.float64, device="cpu").numpy()
        keys = np.log(-np.log(np.maximum(noise, 1e-300)))
        if self.order == "importance":
            keys -= log_p
        ranking: list[int] = np.argsort(keys, kind="stable").tolist()
        if self.in_first_pass:
            return self._fill([i for i, used in enumerate(self._last_used) if used < 0] + ranking)
        fitting = (i for i in range(len(self._numels)) if self._fits(i))
        idle = heapq.nsmallest(self.sample_last, fitting, key=self._last_used.__getitem__) if self.sample_last else ()
        return self._fill(ranking, self._fill(idle))

    def _draw_cyclic(self) -> list[int]:
        """The next blocks of the cycle and then of the following one; what does not fit waits for the next round."""
        chosen: dict[int, None] = {}
        used = 0
        while len(chosen) < self._num_blocks:
            if not self._cycle:  # what is on already comes last in the new cycle
                self._cycle = sorted(self._new_cycle(), key=chosen.__contains__)
            following = self._cycle[0]
            if following in chosen or used + self._numels[following] > self._max_numel:
                break
            chosen[self._cycle.pop(0)] = None
            used += self._numels[following]
        return list(chosen)

    def _new_cycle(self) -> list[int]:
        indices = [i for i in range(len(self._numels)) if self._fits(i)]
        if self.order == "shuffled":
            return [indices[i] for i in torch.randperm(len(indices), generator=self._generator, device="cpu").tolist()]
        return indices[::-1] if self.order == "descending" else indices

    def state_dict(self) -> dict[str, Any]:
        """Generator and history, as tensors and numbers."""
        history = {"last_used": list(self._last_used), "round": self._round, "cycle": list(self._cycle)}
        return {"generator": self._generator.get_state(), **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._generator.set_state(state["generator"].cpu())
        self._last_used = list(state["last_used"])
        self._cycle = [i for i in state["cycle"] if self._fits(i)]  # the limit may be another one now
        self._round = state["round"]
