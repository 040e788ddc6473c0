"""The quick tour's loop trains, its tables tell of the optimizer, and resuming changes no bit."""

from __future__ import annotations

import copy

import pytest
import torch

import misa
from misa import tour
from misa.figures import plot
from misa.results.collect import TABLES

SETTINGS = {"lr": 3e-3, "budget": 0.25, "interval": 2}


@pytest.fixture(scope="module")
def batches():
    return tour.byte_batches(12)


def test_batches_are_distinct_and_seeded(batches) -> None:
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(16, 32)}
    # Signatures of overloads repeat, so that a few sequences may be equal.
    assert len({bytes(row.tolist()) for batch in batches for row in batch["input_ids"]}) > 0.95 * 12 * 16
    same, other = tour.byte_batches(12), tour.byte_batches(12, seed=1)
    assert torch.equal(batches[0]["input_ids"], same[0]["input_ids"])
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])
    with pytest.raises(ValueError, match="num_batches is 100000; packaging has text for"):
        tour.byte_batches(100_000, package="packaging")


def test_loss_falls_and_is_drawn(batches) -> None:
    model = tour.small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    table = tour.train(model, optimizer, batches[2:], batches[:2], "adamw", evaluate_every=4)
    assert table["step"].tolist() == [4, 8, 10]
    assert set(table) == set(TABLES["convergence"])
    assert table["value"].iloc[-1] < table["value"].iloc[0]
    assert table["tokens"].iloc[-1] == 10 * 16 * 32
    assert plot("convergence", table).axes


def test_tables_tell_what_is_on_and_held(batches) -> None:
    model, other = tour.small_model(), tour.small_model()
    optimizer, rival = misa.MISA(model, **SETTINGS), torch.optim.AdamW(other.parameters())
    for each, trained in ((optimizer, model), (rival, other)):
        tour.train(trained, each, batches[:1], batches[:1], "x")
    blocks = tour.block_table(optimizer)
    assert tuple(blocks.index[blocks["on"]]) == optimizer.active
    assert blocks["probability"].sum() == pytest.approx(1)
    assert blocks.loc[blocks["on"], "parameters"].sum() == optimizer.active_numel
    states = tour.state_table({"AdamW": rival, "MISA": optimizer})
    assert states.at["MISA", "trainable parameters"] == optimizer.active_numel
    assert states.at["MISA", "optimizer state (KiB)"] == optimizer.active_numel * 8 / 1024
    assert states.at["AdamW", "optimizer state (KiB)"] >= sum(p.numel() for p in other.parameters()) * 8 / 1024


def test_resumed_model_is_the_same_to_the_last_bit(batches) -> None:
    model, resumed_model = tour.small_model(), tour.small_model(seed=1)
    optimizer = misa.MISA(model, **SETTINGS)
    tour.train(model, optimizer, batches[:3], batches[:1], "misa")
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = misa.MISA(resumed_model, **SETTINGS)
    assert tour.largest_difference(model, resumed_model) > 0
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for trained, each in ((model, optimizer), (resumed_model, resumed)):
        tour.train(trained, each, batches[3:8], batches[:1], "misa")
    assert tour.largest_difference(model, resumed_model) == 0
