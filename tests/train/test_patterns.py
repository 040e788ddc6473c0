"""Which matrices train, said on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from misa.models import load_model
from misa.results import read_result


def test_patterns_say_which_matrices_train(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = {"include": "*.self_attn.*, *.mlp.*", "exclude": "*.down_proj"}
    assert finetune("some", method="misa", budget=0.2, interval=2, **patterns) == 0
    settings = read_result(tmp_path / "some").config["method_settings"]
    assert (settings["include"], settings["exclude"]) == (["*.self_attn.*", "*.mlp.*"], ["*.down_proj"])
    before, after = (
        dict(load_model(path, "float32").named_parameters()) for path in (small / "model", tmp_path / "some/model")
    )
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved
    assert all(".self_attn." in name or name.endswith(("gate_proj.weight", "up_proj.weight")) for name in moved)
    for wrong, message in (
        ({"include": "*.attn.*"}, "include: pattern '*.attn.*' matches nothing that can be a block; nearest: model."),
        ({"budget": 1e-6}, "budget=1e-06: no block fits into 0 of"),
    ):
        capsys.readouterr()
        assert finetune("none", method="misa", **wrong) == 2
        assert capsys.readouterr().err.startswith(f"misa.train: error: {message}")
