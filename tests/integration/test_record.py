"""The record of rounds."""

import copy
import json
import pickle

import torch
from tiny import llama, train

from misa.optimizer import MISA


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(path, **options):
    model = llama(2, torch.bfloat16)
    return model, MISA(model, budget=0.3, interval=2, record=str(path), **options)


def test_record_tells_what_each_round_did(tmp_path):
    path = tmp_path / "new folder" / "rounds.jsonl"
    model, optimizer = make(path, eta="auto")
    active, bytes_on = [], []
    for i in range(3):
        active.append(list(optimizer.active))
        train(model, optimizer, 1, first=2 * i)
        bytes_on.append(optimizer.state_bytes())
        train(model, optimizer, 1, first=2 * i + 1)
    rounds = lines(path)
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert [r["active"] for r in rounds] == active
    for r, expected in zip(rounds, bytes_on, strict=True):
        assert r["steps"] == 2
        assert sum(r["probabilities"].values()) == torch.tensor(1.0)
        assert set(r["measured"]) == set(r["active"])
        assert all(value > 0 for value in r["measured"].values())
        assert len(r["scores"]) == 14
        assert r["lr"] == [1e-3]
        assert r["skipped_steps"] == 0
        assert r["bytes"] == expected


def test_record_of_a_resumed_run_has_neither_gaps_nor_repeats(tmp_path):
    path = tmp_path / "rounds.jsonl"
    model, optimizer = make(path)
    train(model, optimizer, 5)
    saved = {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }
    train(model, optimizer, 5, first=5)
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"round": 5, "cut sho')
    other, again = make(path)
    again.load_state_dict(again.state_dict())  # as Accelerate does with every optimizer it prepares
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert len(path.read_text().splitlines()) == 6  # nothing is dropped before something is written
    train(other, again, 5, first=5)
    assert path.read_text() == whole


def test_record_of_a_new_run_replaces_an_old_one(tmp_path):
    path = tmp_path / "rounds.jsonl"
    train(*make(path), 8)
    train(*make(path), 4)
    assert [r["round"] for r in lines(path)] == [0, 1]


def test_record_of_a_pickled_optimizer_has_no_round_twice(tmp_path):
    path = tmp_path / "rounds.jsonl"
    model, optimizer = make(path)
    train(model, optimizer, 2)
    saved = pickle.dumps((model, optimizer))
    train(model, optimizer, 4, first=2)
    train(*pickle.loads(saved), 4, first=2)
    assert [r["round"] for r in lines(path)] == [0, 1, 2]


def test_record_does_not_change_training(tmp_path):
    model, optimizer = make(tmp_path / "rounds.jsonl")
    twin = llama(2, torch.bfloat16)
    train(model, optimizer, 6)
    train(twin, MISA(twin, budget=0.3, interval=2), 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_copy_of_an_optimizer_records_nothing(tmp_path):
    path = tmp_path / "rounds.jsonl"
    model, optimizer = make(path)
    train(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    train(other, twin, 4, first=2)
    assert [r["round"] for r in lines(path)] == [0]
    train(model, optimizer, 4, first=2)
    assert [r["round"] for r in lines(path)] == [0, 1, 2]
