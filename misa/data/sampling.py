"""The order of training batches: a function of seed and epoch alone, so every method sees the same one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# How many batches are sorted by length together: more saves more padding, fewer mixes better.
BATCHES_SORTED_TOGETHER = 50


class SeededSampler(Sampler[int]):
    """Shuffle the items anew each epoch, optionally so that items of like length share a batch.

    The generator is the sampler's own, made from seed and epoch, so the order neither depends on nor changes the
    global random state (which initialising an adapter or dropout would move), and resuming in any epoch finds it again.

    Args:
        num_items: Number of items in the data set.
        seed: Seed of the order.
        lengths: Length of each item, in tokens. If given, items are shuffled, cut into pools of
            `BATCHES_SORTED_TOGETHER` batches, sorted by length inside a pool, cut into batches, and the batches
            shuffled. If None, the order is a plain shuffle.
        batch_size: Items in one optimizer step; only used with `lengths`.
    """

    def __init__(self, num_items: int, seed: int, lengths: Sequence[int] | None = None, batch_size: int = 1) -> None:
        if lengths is not None and len(lengths) != num_items:
            raise ValueError(f"lengths has {len(lengths)} entries for {num_items} items")
        self.num_items = num_items
        self.seed = seed
        self.lengths = lengths
        self.batch_size = batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_items

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # The two numbers are mixed by hand because neighbouring (seed, epoch) pairs must not share an order.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch * 7_919 + 17) % 2**63)
        order = torch.randperm(self.num_items, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        lengths = self.lengths
        pool = self.batch_size * BATCHES_SORTED_TOGETHER
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=lambda index: lengths[index], reverse=True)
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        # The incomplete batch, if any, must stay last, or it would cut the batches after it apart.
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()] + short
        return iter([index for batch in shuffled for index in batch])
