"""Which blocks are drawn."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from misa.optimizer.importance import log_weights
from misa.optimizer.sampling import BlockSampler

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def uniform(num_blocks):
    return log_weights(np.zeros(num_blocks), 1.0)


@given(
    sizes, st.sampled_from(["importance", "uniform", "ascending", "descending", "shuffled"]),
    st.floats(0.02, 1), st.booleans(), st.integers(0, 3), st.integers(0, 1000),
)  # fmt: skip
def test_draw_never_exceeds_the_budget_nor_repeats_a_block(numels, order, budget, first_pass, sample_last, seed):
    limit = max(int(budget * sum(numels)), min(numels))
    sampler = BlockSampler(numels, order, max_numel=limit, first_pass=first_pass, sample_last=sample_last, seed=seed)
    log_p = log_weights(np.random.default_rng(seed).random(len(numels)), 2.0)
    for _ in range(5):
        drawn = sampler.draw(log_p)
        assert 1 <= len(drawn) == len(set(drawn))
        assert sum(numels[i] for i in drawn) <= limit


@given(sizes, st.integers(0, 1000))
def test_greedy_fill_leaves_out_only_what_does_not_fit(numels, seed):
    limit = max(sum(numels) // 3, min(numels))
    drawn = BlockSampler(numels, "uniform", max_numel=limit, seed=seed).draw(uniform(len(numels)))
    free = limit - sum(numels[i] for i in drawn)
    assert all(n > free for i, n in enumerate(numels) if i not in drawn)


def exact_inclusion(numels, p, limit):
    """Inclusion probabilities of successive weighted drawing, where what does not fit is passed over."""
    inclusion = [0.0] * len(p)
    for ranking in itertools.permutations(range(len(p))):
        probability, left = 1.0, 1.0
        for i in ranking:
            probability *= p[i] / left
            left -= p[i]
        used = 0
        for i in ranking:
            if used + numels[i] <= limit:
                used += numels[i]
                inclusion[i] += probability
    return inclusion


@pytest.mark.parametrize(
    ("numels", "p", "limit"),
    [
        ([1, 1, 1], [0.6, 0.3, 0.1], 1),
        ([1, 1, 1, 1], [0.5, 0.3, 0.15, 0.05], 2),
        ([3, 2, 1], [0.2, 0.5, 0.3], 3),
        ([4, 3, 2, 1], [0.4, 0.3, 0.2, 0.1], 5),
    ],
)
def test_inclusion_frequencies_match_exact_enumeration(numels, p, limit):
    num_draws = 6000
    sampler = BlockSampler(numels, "importance", max_numel=limit, seed=3)
    log_p = np.log(p)
    counts = [0] * len(p)
    for _ in range(num_draws):
        for i in sampler.draw(log_p):
            counts[i] += 1
    for count, expected in zip(counts, exact_inclusion(numels, p, limit), strict=True):
        sigma = (expected * (1 - expected) / num_draws) ** 0.5
        assert abs(count / num_draws - expected) <= 4.5 * sigma + 1e-9


def test_uniform_order_ignores_the_probabilities():
    certain = np.array([0.0, -1e9, -1e9])
    first = BlockSampler([1, 1, 1], "uniform", num_blocks=1, seed=5)
    second = BlockSampler([1, 1, 1], "uniform", num_blocks=1, seed=5)
    assert [first.draw(certain) for _ in range(20)] == [second.draw(uniform(3)) for _ in range(20)]


@pytest.mark.parametrize(
    ("order", "num_blocks", "expected"),
    [
        ("ascending", 1, [(0,), (1,), (2,), (0,), (1,)]),
        ("descending", 1, [(2,), (1,), (0,), (2,), (1,)]),
        ("ascending", 2, [(0, 1), (0, 2), (1, 2), (0, 1), (0, 2)]),
        ("ascending", 3, [(0, 1, 2)] * 5),
    ],
)
def test_cyclic_order_visits_blocks_in_turn(order, num_blocks, expected):
    sampler = BlockSampler([1, 1, 1], order, num_blocks=num_blocks)
    assert [sampler.draw(uniform(3)) for _ in range(5)] == expected


def test_shuffled_order_visits_every_block_once_a_cycle_in_changing_orders():
    sampler = BlockSampler([1] * 6, "shuffled", num_blocks=1, seed=1)
    cycles = [[sampler.draw(uniform(6))[0] for _ in range(6)] for _ in range(4)]
    assert all(sorted(c) == list(range(6)) for c in cycles)
    assert len({tuple(c) for c in cycles}) > 1


def test_a_round_is_filled_from_the_next_cycle():
    numels, limit = [1, 2, 3, 1, 2, 3, 2], 5
    sampler = BlockSampler(numels, "shuffled", max_numel=limit, seed=2)
    counts = [0] * 7
    for _ in range(60):
        drawn = sampler.draw(uniform(7))
        assert sum(numels[i] for i in drawn) + max(numels) > limit  # no round is left half empty
        for i in drawn:
            counts[i] += 1
        assert max(counts) - min(counts) <= 1  # no block is on again before all others were


def test_first_pass_uses_every_block_once_in_order_before_any_twice():
    sampler = BlockSampler([2, 2, 2, 2, 2], "importance", max_numel=4, first_pass=True)
    drawn = []
    while sampler.in_first_pass:
        drawn.append(sampler.draw(uniform(5)))
    assert drawn[:2] == [(0, 1), (2, 3)]
    assert 4 in drawn[2]
    assert len(drawn) == 3


def test_first_pass_ends_although_some_blocks_never_fit():
    sampler = BlockSampler([2, 9, 2], "importance", max_numel=4, first_pass=True)
    assert sampler.never_fit == (1,)
    sampler.draw(uniform(3))
    assert not sampler.in_first_pass


def test_sample_last_forces_the_longest_idle_blocks_in():
    greedy = np.array([0.0, -1e6, -1e6, -1e6])
    sampler = BlockSampler([1, 1, 1, 1], "importance", max_numel=2, sample_last=1, seed=2)
    drawn = [sampler.draw(greedy) for _ in range(8)]
    assert all(len(d) == 2 for d in drawn)
    assert {i for d in drawn[:4] for i in d} == {0, 1, 2, 3}


def test_draw_leaves_the_global_random_state_alone():
    before = torch.get_rng_state(), random.getstate()
    sampler = BlockSampler([1] * 5, "importance", num_blocks=2)
    for _ in range(3):
        sampler.draw(uniform(5))
    BlockSampler([1] * 5, "shuffled", num_blocks=2).draw(uniform(5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize("order", ["importance", "shuffled"])
def test_loaded_sampler_continues_with_the_same_draws(order):
    sampler = BlockSampler([1, 2, 3, 4], order, max_numel=5, first_pass=True, sample_last=1, seed=9)
    for _ in range(3):
        sampler.draw(uniform(4))
    other = BlockSampler([1, 2, 3, 4], order, max_numel=5, first_pass=True, sample_last=1, seed=0)
    other.load_state_dict(sampler.state_dict())
    assert [sampler.draw(uniform(4)) for _ in range(9)] == [other.draw(uniform(4)) for _ in range(9)]


def test_blocks_of_a_loaded_cycle_that_fit_no_more_are_passed_over():
    """Out of memory, a run goes on with a smaller budget."""
    sampler = BlockSampler([1, 3, 1], "ascending", max_numel=3)
    assert sampler.draw(uniform(3)) == (0,)
    smaller = BlockSampler([1, 3, 1], "ascending", max_numel=2)
    smaller.load_state_dict(sampler.state_dict())
    assert [smaller.draw(uniform(3)) for _ in range(2)] == [(0, 2), (0, 2)]


def test_more_blocks_than_there_are_raises():
    with pytest.raises(ValueError, match="num_blocks=4: there are only 3"):
        BlockSampler([1, 1, 1], "uniform", num_blocks=4)


def test_block_of_the_size_of_the_limit_fits():
    assert BlockSampler([2, 3, 4], max_numel=3).never_fit == (2,)


def test_last_round_of_the_first_pass_is_filled_with_used_blocks():

    sampler = BlockSampler([2, 2, 2, 2, 2], "importance", max_numel=4, first_pass=True)
    assert [len(sampler.draw(np.zeros(5))) for _ in range(3)] == [2, 2, 2]
