"""A run that is killed and called again ends exactly as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from misa.results import read_result
from misa.training import run
from misa.training.checkpoints import checkpoints, fault, latest_checkpoint

from .conftest import Killed, outcome

METHODS = {
    "misa": {"method": "misa", "budget": 0.2, "interval": 2},
    "misa-bf16": {"method": "misa", "budget": 0.2, "interval": 2, "dtype": "bfloat16", "always_on": "norms"},
    "adamw-bf16": {"method": "adamw", "dtype": "bfloat16"},
    "lora": {"method": "lora", "lora_r": 4, "lora_dropout": 0.2},
    "badam": {"method": "badam", "interval": 2},
    # Ten steps in two epochs of five.
    "epochs": {"method": "adamw", "max_steps": -1, "num_train_epochs": 2}
    | {"save_strategy": "epoch", "eval_strategy": "epoch", "save_steps": None, "eval_steps": None},
    # A checkpoint of the step that an evaluation of its epoch follows.
    "epoch-and-steps": {"method": "lora", "lora_r": 4, "lora_dropout": 0.2}
    | {"save_steps": 5, "eval_strategy": "epoch", "eval_steps": None},
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_run_ends_as_if_it_had_not_been(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path, method: str
) -> None:
    assert finetune("whole", **METHODS[method]) == 0
    # Before the first checkpoint, right after one, in the middle of a round and of an epoch, at the last step.
    for step in (2, 4, 5, 8, 9):
        kill_at(step)
        with pytest.raises(Killed):
            finetune("killed", **METHODS[method])
    kill_at(None)
    assert finetune("killed", **METHODS[method]) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert checkpoints(tmp_path / "killed" / "checkpoints") == []


def test_killed_run_is_recognised(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    """Going on evaluates nothing before its first step, but the record says what was asked for."""
    kill_at(5)
    with pytest.raises(Killed):
        finetune("killed", "--eval_on_start")
    kill_at(None)
    assert finetune("killed", "--eval_on_start") == 0
    assert finetune("killed", "--eval_on_start") == 0
    assert read_result(tmp_path / "killed").config["eval_on_start"] is True


def test_two_runs_of_one_command_are_bit_identical(finetune: Callable[..., int], tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert finetune(name, **METHODS["misa"]) == 0
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")
    assert finetune("other", **METHODS["misa"], seed=1) == 0
    assert outcome(tmp_path / "other")[0] != outcome(tmp_path / "first")[0]


@pytest.mark.parametrize("moment", ["new_folder", "write_curves", "write_result"])
def test_kill_while_writing_results_loses_nothing(
    finetune: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    assert finetune("whole", **METHODS["misa"]) == 0

    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, moment, killed)
        with pytest.raises(Killed):
            finetune("killed", **METHODS["misa"])
    assert not (tmp_path / "killed" / "result.json").exists()
    assert finetune("killed", **METHODS["misa"]) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    # All steps were done before the kill: the times are those measured then.
    assert read_result(tmp_path / "killed").timings["train_s"] > 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "unfinished"])
def test_damaged_checkpoint_is_passed_over(
    finetune: Callable[..., int],
    kill_at: Callable[[int | None], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    assert finetune("whole", **METHODS["misa"]) == 0
    kill_at(8)
    with pytest.raises(Killed):
        finetune("killed", **METHODS["misa"])
    folder = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-6"]
    newest = latest_checkpoint(folder)
    assert newest == folder / "checkpoint-6"
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-50] ^= 1
        weights.write_bytes(content)
    elif damage == "gone":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "complete.json").unlink()
    assert fault(newest)
    kill_at(None)
    assert finetune("killed", **METHODS["misa"]) == 0
    assert "checkpoint-6 is not used" in caplog.text
    assert "continuing from" in caplog.text
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_times_and_tokens_go_on_after_a_kill(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    kill_at(8)
    with pytest.raises(Killed):
        finetune("killed", **METHODS["misa"])
    kill_at(None)
    assert finetune("killed", **METHODS["misa"]) == 0
    from misa.results import read_curves

    points = [point for point in read_curves(tmp_path / "killed") if point.metric == "train_loss"]
    assert [point.step for point in points] == [1, 2, 3, 4, 6, 8, 9]
    times, tokens = [p.time_s for p in points], [p.tokens for p in points]
    assert times == sorted(set(times))
    assert tokens == sorted(set(tokens))
    result = read_result(tmp_path / "killed")
    assert result.timings["train_s"] == pytest.approx(times[-1])
    assert result.metrics["num_tokens"] == tokens[-1]


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    options = {"method": "misa", "budget": 0.2, "interval": 3, "max_steps": 60, "save_steps": 5}

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "misa.pretrain", *pretrain_words(name, **options)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start("whole").wait(timeout=300) == 0
    scratch = tmp_path / "killed" / "checkpoints"
    for steps, delay_s in ((5, 0.0), (20, 0.02), (40, 0.07)):
        process = start("killed")
        deadline = time.monotonic() + 300
        while not any((scratch / f"checkpoint-{step}").exists() for step in range(steps, 61, 5)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        # The delays let the kill fall into training, logging or saving.
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        if (tmp_path / "killed" / "result.json").exists():
            break
    assert start("killed").wait(timeout=300) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
