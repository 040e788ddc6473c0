"""The best model of a run: kept when it is interrupted, damaged or taken away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from misa.results import read_curves, read_result
from misa.training import run
from misa.training.checkpoints import checkpoints

from .conftest import Killed, outcome

BEST = {"method": "adamw", "learning_rate": 1.0, "warmup_steps": 30, "eval_steps": 1}


def evaluated(folder: Path) -> dict[int, float]:
    return {point.step: point.value for point in read_curves(folder) if point.metric == "eval_loss"}


def best_of(checkpoint: Path) -> Path:
    return Path(json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_result_is_that_of_the_model_that_was_kept(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    """The best evaluation may be one whose model was never saved; and the folder may be moved between two parts."""
    assert finetune("whole", "--load_best_model_at_end", **BEST) == 0
    losses = evaluated(tmp_path / "whole")
    saved = {step: losses[step] for step in (3, 6, 9)}
    assert min(losses.values()) < min(saved.values())
    assert read_result(tmp_path / "whole").metrics["eval_loss"] in saved.values()
    kill_at(8)
    with pytest.raises(Killed):
        finetune("first", "--load_best_model_at_end", **BEST)
    kill_at(None)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert finetune("moved", "--load_best_model_at_end", **BEST) == 0
    assert outcome(tmp_path / "moved") == outcome(tmp_path / "whole")
    assert read_result(tmp_path / "moved").metrics == read_result(tmp_path / "whole").metrics


@pytest.mark.parametrize(
    ("keep_best", "damaged"), [(True, "model.safetensors"), (True, "optimizer.pt"), (False, "model.safetensors")]
)
def test_damaged_best_checkpoint_changes_no_outcome(
    finetune: Callable[..., int],
    kill_at: Callable[[int | None], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    keep_best: bool,
    damaged: str,
) -> None:
    """If its model was to be kept, the run goes on from before it; otherwise from the newest."""
    options = BEST | {"eval_steps": 2, "save_steps": 2, "metric_for_best_model": "loss"}
    options |= {"load_best_model_at_end": keep_best}
    assert finetune("whole", **options) == 0
    kill_at(8)
    with pytest.raises(Killed):
        finetune("killed", **options)
    kill_at(None)
    first, newest = checkpoints(tmp_path / "killed" / "checkpoints")
    assert best_of(newest) == first
    cut(first / damaged)
    assert finetune("killed", **options) == 0
    if keep_best and damaged == "model.safetensors":
        assert f"{newest} is not used: the best checkpoint before it, {first}, cannot be used" in caplog.text
    else:
        assert f"continuing from {newest}" in caplog.text
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("is_done", [False, True])
def test_best_checkpoint_that_was_taken_away_gives_way_to_the_best_of_the_rest(
    finetune: Callable[..., int],
    kill_at: Callable[[int | None], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_done: bool,
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    options = BEST | {"eval_steps": 2, "save_steps": 2, "keep_checkpoints": True, "load_best_model_at_end": True}
    with monkeypatch.context() as patch:
        if is_done:  # but for its model folder and result
            patch.setattr(run, "new_folder", killed)
        else:
            kill_at(8)
        with pytest.raises(Killed):
            finetune("run", **options)
    kill_at(None)
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    best = best_of(newest)
    assert best != newest
    shutil.rmtree(best)
    assert finetune("run", **options) == 0
    assert f"{best}, the best checkpoint so far, is not there any more" in caplog.text
    kept = {step: loss for step, loss in evaluated(tmp_path / "run").items() if step > 6 or is_done}
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    expected = last if is_done else best_of(last)
    step = int(expected.name.removeprefix("checkpoint-"))
    assert is_done or kept[step] == min(kept.values())
    assert read_result(tmp_path / "run").metrics["eval_loss"] == kept[max(s for s in kept if s <= step)]
    assert outcome(tmp_path / "run")[0]["model.safetensors"] == (expected / "model.safetensors").read_bytes()


def test_saving_the_best_alone_keeps_the_curve(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    options = {"budget": 0.2, "save_strategy": "best", "eval_steps": 2, "logging_steps": 3}
    options |= {"metric_for_best_model": "loss"}
    assert finetune("whole", **options) == 0
    kill_at(7)
    with pytest.raises(Killed):
        finetune("killed", **options)
    kill_at(None)
    assert checkpoints(tmp_path / "killed" / "checkpoints")
    assert finetune("killed", **options) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
