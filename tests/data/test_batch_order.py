"""The order of the data: a permutation that depends on seed and epoch, and on nothing else."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from misa.data.sampling import SeededSampler

LENGTHS = [random.Random(i).randint(5, 200) for i in range(1003)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_every_item_comes_once_an_epoch(lengths: list[int] | None) -> None:
    sampler = SeededSampler(1003, seed=0, lengths=lengths, batch_size=8)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1003))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_order_ignores_and_keeps_the_global_random_state(lengths: list[int] | None) -> None:
    torch.manual_seed(1)
    first = list(SeededSampler(1003, 5, lengths, 8))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert list(SeededSampler(1003, 5, lengths, 8)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert list(SeededSampler(1003, 6, lengths, 8)) != first


def test_epoch_can_be_found_again() -> None:
    sampler = SeededSampler(1003, 0, LENGTHS, 8)
    sampler.set_epoch(1)
    second = list(sampler)
    fresh = SeededSampler(1003, 0, LENGTHS, 8)
    fresh.set_epoch(1)
    assert list(fresh) == second


def test_grouping_saves_padding_and_does_not_sort_the_epoch() -> None:
    def padded(order: list[int]) -> int:
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
        return sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)

    grouped, plain = list(SeededSampler(1003, 0, LENGTHS, 8)), list(SeededSampler(1003, 0))
    assert padded(grouped) < 1.1 * sum(LENGTHS) < 1.5 * sum(LENGTHS) < padded(plain)
    longest = [max(LENGTHS[i] for i in grouped[b : b + 8]) for b in range(0, 1000, 8)]
    rising = sum(a < b for a, b in itertools.pairwise(longest))
    assert 0.35 < rising / len(longest) < 0.65


def test_incomplete_batch_comes_last() -> None:
    order = list(SeededSampler(1003, 0, LENGTHS, 8))
    for start in range(0, 1000, 8):
        batch = [LENGTHS[i] for i in order[start : start + 8]]
        assert batch == sorted(batch, reverse=True)


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths has 1003 entries for 7 items"):
        SeededSampler(7, 0, LENGTHS)
