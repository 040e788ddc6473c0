"""Weights written along a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from misa.models import load_model, load_tokenizer


def test_snapshots_are_the_weights_of_a_shorter_run(finetune: Callable[..., int], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "misa", "budget": 0.2, "interval": 2, "lr_scheduler_type": "constant"}
    assert finetune("long", snapshot_steps="2,4", **{**options, "max_steps": 5}) == 0
    assert finetune("short", snapshot_steps="none", **{**options, "max_steps": 4}) == 0
    snapshots = tmp_path / "long" / "snapshots"
    assert sorted(folder.name for folder in snapshots.iterdir()) == ["step-2", "step-4"]
    assert list((tmp_path / "short" / "snapshots").iterdir()) == []
    at_four, ended = (load_model(folder) for folder in (snapshots / "step-4", tmp_path / "short" / "model"))
    for (name, found), expected in zip(at_four.state_dict().items(), ended.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    assert load_tokenizer(snapshots / "step-4").pad_token_id is not None


def test_impossible_snapshot_is_named(finetune: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("wrong", snapshot_steps="3,10", max_steps=9) == 2
    assert "snapshot_steps is '3,10', allowed is none, or whole numbers from 1 to 9" in capsys.readouterr().err
