"""Where a run starts and what it keeps: starts that cannot be used, signals, damaged files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from misa.results import read_result
from misa.training import lock, run
from misa.training.checkpoints import STAGING_FOLDER, checkpoints
from misa.training.lock import FolderLock
from misa.training.trainer import Schedule

from .conftest import Killed, outcome


def test_checkpoint_of_another_run_starts_one_with_more_steps(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("base", "--keep_checkpoints", budget=0.2) == 0
    last = tmp_path / "base" / "checkpoints" / "checkpoint-9"
    copied = tmp_path / "start"
    shutil.copytree(last, copied)
    for name, start in (("more", last), ("copied", copied)):
        assert finetune(name, budget=0.2, continue_from=start, max_steps=12) == 0
        assert read_result(tmp_path / name).metrics["num_steps"] == 12
    assert outcome(tmp_path / "more") == outcome(tmp_path / "copied")
    assert finetune("epochs", budget=0.2, continue_from=last, max_steps=-1, num_train_epochs=3) == 0
    assert read_result(tmp_path / "epochs").metrics["num_steps"] == 15


def test_start_that_cannot_be_used_is_refused_before_training(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("base", "--keep_checkpoints", method="lora", lora_r=4, max_steps=5) == 0
    start = tmp_path / "base" / "checkpoints" / "checkpoint-5"
    options: dict[str, Any] = {"method": "lora", "lora_r": 4, "continue_from": start}
    assert finetune("epochs", **options, max_steps=-1, num_train_epochs=1) == 2
    assert "of step 5: this run has 5 steps" in capsys.readouterr().err
    assert finetune("rank", **options | {"lora_r": 2}) == 2
    assert "of a run with another model, method options or optimizer: " in capsys.readouterr().err
    assert not checkpoints(tmp_path / "rank" / "checkpoints")


def test_blocks_of_another_kind_are_no_start(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("base", "--keep_checkpoints", budget=0.3, max_steps=3) == 0
    start = tmp_path / "base" / "checkpoints" / "checkpoint-3"
    assert finetune("layers", continue_from=start, granularity="layer", budget=0.4) == 2
    assert "blocks are missing from this model" in capsys.readouterr().err


def test_run_that_transformers_stops_after_a_signal_is_not_finished(
    finetune: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Schedule.on_step_end

    def on_step_end(self: Schedule, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 5:  # what its answer to SIGTERM does
            control.should_save = control.should_training_stop = True
        return original(self, args, state, control, **kwargs)

    words = ("--enable_jit_checkpoint", "True")
    assert finetune("whole", *words, budget=0.2) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "on_step_end", on_step_end)
        assert finetune("stopped", *words, budget=0.2) == 130
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert finetune("stopped", *words, budget=0.2) == 0
    assert outcome(tmp_path / "stopped")[0] == outcome(tmp_path / "whole")[0]


def test_folders_of_others_stay(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own" / "model" / "precious.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for words in ((), ("--no_save_model",)):
        assert finetune("own", *words, budget=0.2, max_steps=2) == 2
        assert f"{own.parent} is there" in capsys.readouterr().err
    assert own.read_text() == "mine"
    saving = tmp_path / "scratch" / "saving"
    saving.mkdir(parents=True)
    assert finetune("other", budget=0.2, max_steps=2, checkpoint_dir=saving.parent) == 0
    assert saving.is_dir()
    assert not (saving.parent / STAGING_FOLDER).exists()


def test_overwriting_leaves_nothing_of_the_run_before(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    kill_at(5)
    with pytest.raises(Killed):
        finetune("run", budget=0.2, snapshot_steps="2,4")
    kill_at(None)
    assert finetune("run", "--overwrite_output_dir", budget=0.2, snapshot_steps="3", max_steps=4) == 0
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["step-3"]
    scores = tmp_path / "run" / "evaluation" / "result.json"
    scores.parent.mkdir()
    scores.write_text("{}")
    assert finetune("run", "--overwrite_output_dir", budget=0.2, max_steps=2) == 0
    assert not scores.parent.exists()


def test_checkpoints_that_a_kill_left_of_a_finished_run_go(
    finetune: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "remove_checkpoints", killed)
        with pytest.raises(Killed):
            finetune("run", budget=0.2)
    assert checkpoints(tmp_path / "run" / "checkpoints")
    assert finetune("run", budget=0.2) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert finetune("kept", "--keep_checkpoints", budget=0.2) == 0
    assert finetune("kept", budget=0.2) == 0
    assert checkpoints(tmp_path / "kept" / "checkpoints")


def test_finished_run_with_a_setting_without_end_is_recognised(finetune: Callable[..., int]) -> None:
    options = {"budget": 0.2, "max_steps": 2, "max_grad_norm": "inf"}
    assert finetune("run", **options) == 0
    assert finetune("run", **options) == 0
    assert finetune("run", **options | {"max_grad_norm": 1.0}) == 2


def test_loss_that_is_no_number_names_its_records_in_every_epoch(
    finetune: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records of a batch, whether or not the last one of an epoch is dropped."""
    from misa.training.trainer import Trainer

    original = Trainer.training_step
    seen: list[list[int]] = []

    def training_step(self: Trainer, model: Any, inputs: Any, *rest: Any) -> Any:
        loss = original(self, model, inputs, *rest)
        rows = {tuple(ids): i for i, ids in enumerate(self.train_dataset[k]["input_ids"] for k in range(21))}
        ids, mask = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
        whole = [tuple(i for i, m in zip(*pair, strict=True) if m) for pair in zip(ids, mask, strict=True)]
        seen.append([rows[row] for row in whole])
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    options: dict[str, Any] = {"budget": 0.2, "validation_samples": 3, "eval_strategy": "no"}
    for drop in (True, False):
        seen.clear()
        assert finetune(f"drop-{drop}", **options, dataloader_drop_last=drop, max_steps=7) == 0
        trainer_says = []

        def look(self: Trainer, *args: Any, said: list[str] = trainer_says) -> Any:
            said.append(self._divergence(float("nan"), 0))
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "training_step", look)
            assert finetune(f"look-{drop}", **options, dataloader_drop_last=drop, max_steps=7) == 0
        said = [list(map(int, text.rpartition("records ")[2].split(", "))) for text in trainer_says]
        assert said == seen


@pytest.mark.parametrize("damage", ["zeros", "garbage"])
def test_damaged_tokens_are_made_anew(
    finetune: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    assert finetune("first", budget=0.2, max_steps=2) == 0
    for entry in (tmp_path / "tokens").iterdir():
        (table,) = entry.glob("*.arrow")
        size = table.stat().st_size
        table.write_bytes(
            bytes(size) if damage == "zeros" else table.read_bytes()[: size // 2] + bytes(size - size // 2)
        )
    assert finetune("second", budget=0.2, max_steps=2) == 0
    assert "is damaged; tokenizing again" in caplog.text
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")


def test_damaged_stream_of_tokens_and_tokenizer_are_made_anew(
    pretrain_words: Callable[..., list[str]], small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from misa import pretrain

    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(small / "corpus" / "train.jsonl", text / "a.jsonl")
    options = {"dataset_path": text, "vocab_size": 320, "budget": 0.2, "validation_share": 0.1}
    assert pretrain.main(pretrain_words("first", **options)) == 0
    kept = [path for path in (tmp_path / "tokens").glob("*.npy") if np.load(path).size > 1000]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:400] + bytes(path.stat().st_size - 400))
    (tokenizer,) = (tmp_path / "tokens").glob("tokenizer-*")
    (tokenizer / "tokenizer.json").write_text("")
    assert pretrain.main(pretrain_words("second", **options)) == 0
    assert caplog.text.count("is damaged; tokenizing again") == len(kept)
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")


def test_smoothed_labels_are_for_training_alone(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    from misa import pretrain

    for name, factor in (("plain", 0.0), ("smoothed", 0.3)):
        words = pretrain_words(name, budget=0.2, learning_rate=0, label_smoothing_factor=factor)
        assert pretrain.main(words) == 0
    plain, smoothed = (read_result(tmp_path / name).metrics for name in ("plain", "smoothed"))
    assert plain["perplexity"] == pytest.approx(smoothed["perplexity"], rel=1e-6)
    assert plain["train_loss"] != smoothed["train_loss"]


def test_lock_that_was_taken_away_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder may remove the file between its opening and its locking here."""
    times = []

    def lockf(file: Any, kind: int) -> None:
        times.append(kind)
        if len(times) == 1:
            Path(file.name).unlink()

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    held = FolderLock([tmp_path / "run"])
    held.acquire()
    assert len(times) == 2
    assert (tmp_path / "run" / lock.LOCK_FILE).exists()
    held.release()


def test_streamed_folder_may_have_any_name(
    pretrain_words: Callable[..., list[str]], small: Path, tmp_path: Path
) -> None:
    from misa import pretrain

    folder = tmp_path / "da[ta] x"
    shutil.copytree(small / "corpus", folder)
    assert pretrain.main(pretrain_words("run", "--streaming", dataset_path=folder, budget=0.2, max_steps=3)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_on_start": True, "eval_strategy": "no", "validation_samples": 0}, "eval_on_start is True, but nothing"),
        ({"report_to": "mlflow"}, "report_to is 'mlflow', which is not installed"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0, allowed is 1 or more"),
        ({"neftune_noise_alpha": -5}, "neftune_noise_alpha is -5.0, allowed is 0 or more"),
        ({"budget": 0.03, "num_blocks": 2}, "budget is 0.03, num_blocks 2: give one of them"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio is '1.5': allowed is a share of the steps"),
        ({"max_steps": -1, "num_train_epochs": 1, "snapshot_steps": "3,500"}, "whole numbers from 1 to 5"),
        ({"no_save_model": "", "save_model_at_last": True}, "--save_model False and --save_model_at_last True"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    words = ["--no_save_model"] if options.pop("no_save_model", None) is not None else []
    assert finetune("run", *words, **options) == 2
    assert message in capsys.readouterr().err


def test_tokenizer_with_more_tokens_than_the_model_is_refused(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from misa.data.corpus import train_tokenizer

    large = train_tokenizer([f"{a}{b}" * 3 for a in "abcdefghij" for b in "klmnopqrst"], 400)
    large.save_pretrained(tmp_path / "large")
    assert finetune("run", tokenizer_name_or_path=tmp_path / "large") == 2
    assert f"the tokenizer has {len(large)} tokens, and the model embeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 0, "max_train_tokens": "1M", "max_steps": None},
            "--batch_size is 0: allowed is a whole number",
        ),
        ({"per_device_train_batch_size": "abc"}, "--per_device_train_batch_size is 'abc': allowed is a whole number"),
        ({"max_length": "abc", "max_train_tokens": "1M", "max_steps": None}, "--max_length is 'abc': allowed"),
    ],
)
def test_numbers_of_a_published_line_are_named(
    pretrain_words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    from misa import pretrain

    assert pretrain.main(pretrain_words("run", **options)) == 2
    assert message in capsys.readouterr().err
