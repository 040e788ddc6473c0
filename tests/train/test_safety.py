"""Nothing is lost to a command that turns out wrong, no input is overwritten, and what is wrong is said in a line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from misa.results import read_result
from misa.training.checkpoints import latest_checkpoint
from misa.training.lock import LOCK_FILE


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrong", [{"method": "msia"}, {"lora_r": 3}, {"lr_scheduler_type": "cosine_with_min_lr"}])
def test_wrong_command_leaves_a_finished_run_alone(
    finetune: Callable[..., int], tmp_path: Path, wrong: dict[str, Any]
) -> None:
    assert finetune("run", budget=0.2, max_steps=2) == 0
    before = contents(tmp_path / "run")
    assert finetune("run", "--overwrite_output_dir", max_steps=2, **wrong) == 2
    assert contents(tmp_path / "run") == before


def test_wrong_command_leaves_the_checkpoints_of_another_run_alone(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    from .conftest import Killed

    kill_at(5)
    with pytest.raises(Killed):
        finetune("run", budget=0.2)
    kill_at(None)
    before = contents(tmp_path / "run")
    assert finetune("run", "--overwrite_output_dir", method="msia") == 2
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("words", [(), ("--overwrite_output_dir",)])
def test_model_in_the_place_of_the_trained_one_is_refused(
    finetune: Callable[..., int],
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    shutil.copytree(small / "model", tmp_path / "run" / "model")
    before = contents(tmp_path / "run")
    assert finetune("run", *words, model_name_or_path=tmp_path / "run" / "model", budget=0.2) == 2
    assert "which this run would overwrite: choose another output_dir" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_checkpoint_that_would_be_removed_is_no_start(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("run", "--keep_checkpoints", budget=0.2) == 0
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert finetune("run", "--overwrite_output_dir", budget=0.2, continue_from=checkpoint) == 2
    assert "continue_from" in capsys.readouterr().err
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == checkpoint
    assert finetune("other", budget=0.2, continue_from=checkpoint) == 2
    assert "of step 9: this run has 9 steps, so that none is left" in capsys.readouterr().err
    assert finetune("other", method="lora", continue_from=checkpoint, max_steps=12) == 2
    assert "of method misa, and this run's is lora" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_another_run(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small / "model", model)
    assert finetune("first", model_name_or_path=model, budget=0.2, max_steps=2) == 0
    shutil.rmtree(model)
    shutil.copytree(tmp_path / "first" / "model", model)
    assert finetune("first", model_name_or_path=model, budget=0.2, max_steps=2) == 2
    assert "model_digest" in capsys.readouterr().err
    result = json.loads((tmp_path / "first" / "result.json").read_text())
    del result["config"]["model_digest"]  # as of a run from before it was recorded
    (tmp_path / "first" / "result.json").write_text(json.dumps(result))
    assert finetune("first", model_name_or_path=model, budget=0.2, max_steps=2) == 0


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process holds a folder, until it is killed."""
    code = (
        "import sys, pathlib; from misa.training.lock import FolderLock\n"
        "lock = FolderLock([pathlib.Path(sys.argv[1])]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


def test_folder_of_a_running_command_is_refused_unless_all_is_done(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "run"):
        assert finetune("run", budget=0.2, max_steps=2) == 2
        assert "run is in use by another run" in capsys.readouterr().err
    assert finetune("run", budget=0.2, max_steps=2) == 0
    assert not list((tmp_path / "run").rglob(LOCK_FILE))
    with held(tmp_path / "run"):
        assert finetune("run", budget=0.2, max_steps=2) == 0  # what is finished is only read


def test_run_without_its_model_is_not_the_one_with_it(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("run", budget=0.2, max_steps=2, save_model=False) == 0
    assert finetune("run", budget=0.2, max_steps=2) == 2
    assert "save_model False -> True" in capsys.readouterr().err


def test_adapter_is_no_base_for_another(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("first", method="lora", max_steps=2) == 0
    assert finetune("second", method="dora", max_steps=2, model_name_or_path=tmp_path / "first" / "model") == 2
    assert "the model is an adapter on another: start from its base model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, allowed is 1 or more"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size is -1, allowed is 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, allowed is 1 or more"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1, allowed is 0 or more"),
        ({"max_grad_norm": "nan"}, "max_grad_norm is nan, allowed is 0 or more"),
        ({"learning_rate": "inf"}, "learning_rate is inf, allowed are finite numbers from 0"),
        ({"max_steps": 0}, "max_steps is 0, allowed is 1 or more, or -1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs is 0.0, allowed is more than 0"),
        ({"max_steps": -1, "num_train_epochs": "inf"}, "num_train_epochs is inf, allowed is more than 0"),
        ({"label_smoothing_factor": -1}, "label_smoothing_factor is -1.0, allowed is 0 or more"),
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor is 1.5, allowed is 0 to 1"),
        ({"loss": "chunked", "label_smoothing_factor": 0.1}, "loss is chunked, and label_smoothing_factor needs"),
        ({"metric_for_best_model": "perplexity"}, "metric_for_best_model is 'perplexity', allowed is loss, which"),
        ({"eval_steps": -4}, "eval_steps is -4.0, allowed is 0 or more"),
        ({"logging_steps": -2}, "logging_steps is -2.0, allowed is 0 or more"),
        ({"train_sampling_strategy": "group_by_lenght"}, "allowed is group_by_length, random, sequential"),
        ({"resume_from_checkpoint": "nope"}, "resume_from_checkpoint is not needed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type is cosine_with_min_lr"),
        ({"validation_samples": 0}, "eval_strategy is steps, but nothing is held out: give validation_samples"),
        (
            {"per_device_train_batch_size": 64, "dataloader_drop_last": True},
            "dataloader_drop_last: 20 training sequences make no batch of 64",
        ),
        ({"method": "lora", "lora_target": "q_proj,foo"}, "'foo' is no linear layer; allowed are all, or of down_proj"),
    ],
)
def test_wrong_value_is_one_line(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert finetune("run", **options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("place", ["output_dir", "checkpoint_dir", "record"])
def test_file_in_the_place_of_a_folder_is_one_line(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "afile").write_text("")
    assert finetune("run", budget=0.2, max_steps=2, **{place: tmp_path / "afile" / "x"}) == 2
    assert "afile" in capsys.readouterr().err


def test_record_names_a_file(finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("run", budget=0.2, max_steps=2, record=tmp_path) == 2
    assert "a folder; it must name a file" in capsys.readouterr().err


def test_sequences_beyond_the_models_positions_are_refused(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "short"
    shutil.copytree(small / "model", model)
    config = json.loads((model / "config.json").read_text())

    def train_with(positions: int) -> int:
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        return finetune("run", model_name_or_path=model, budget=0.2, max_steps=2)

    assert train_with(16) == 2
    error = capsys.readouterr().err
    assert "max_length is 512" in error
    assert "allowed is up to the model's 16" in error
    longest = int(error.partition("sequences of ")[2].split()[0])
    assert train_with(longest - 1) == 2
    assert train_with(longest) == 0


def test_labels_can_be_smoothed(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("plain", budget=0.2, max_steps=2) == 0
    assert finetune("smooth", budget=0.2, max_steps=2, label_smoothing_factor=0.1) == 0
    plain, smooth = (read_result(tmp_path / name).metrics["train_loss"] for name in ("plain", "smooth"))
    assert plain != smooth


def test_result_is_that_of_the_best_model_if_that_is_kept(finetune: Callable[..., int], tmp_path: Path) -> None:
    options = {"method": "adamw", "learning_rate": 1.0, "warmup_steps": 30, "eval_steps": 3, "save_steps": 3}
    assert finetune("run", "--load_best_model_at_end", **options) == 0
    curve = pd.read_csv(tmp_path / "run" / "curves.csv").query("metric == 'eval_loss'")
    best = curve["value"].min()
    assert best < curve["value"].iloc[-1]  # at this rate the last model is not the best
    assert read_result(tmp_path / "run").metrics["eval_loss"] == best


def test_last_step_is_evaluated_once_although_an_epoch_ends_with_it(
    finetune: Callable[..., int], tmp_path: Path
) -> None:
    assert finetune("run", budget=0.2, max_steps=-1, num_train_epochs=2, eval_strategy="epoch") == 0
    curve = pd.read_csv(tmp_path / "run" / "curves.csv").query("metric == 'eval_loss'")
    assert curve["step"].tolist() == [5, 10]
