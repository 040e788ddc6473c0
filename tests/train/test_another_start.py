"""A run that starts from a checkpoint of another: what is taken over from there, and what is its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from misa import pretrain
from misa.data.records import write_records
from misa.data.streaming import StreamedText
from misa.results import read_curves, read_result
from misa.training.checkpoints import checkpoints, step_of
from misa.training.trainer import Schedule

from .conftest import Killed, outcome

METHODS = {
    "misa": {"budget": 0.2, "interval": 2, "always_on": "embeddings,head,norms", "always_on_lr": 3e-3},
    "adamw": {"always_on_lr": 3e-3},
    "lora": {"lora_r": 4},
    "galore": {"galore_r": 4, "galore_update_every": 2, "galore_alpha": 0.5},
}
ADAM = {"learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4}
# What the method itself is asked for.
METHOD_SETTINGS = {"misa": {"always_on_lr": 1e-3}, "galore": {"galore_update_every": 3, "galore_alpha": 0.25}}


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], list[dict[str, Any]]]:
    """Settings of the optimizer's groups as the first step of a run begins, at which it is killed."""

    def look(train: Callable[[], int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def on_step_begin(self: Schedule, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            left = ("params", "param_names", "step")
            found.extend({k: v for k, v in group.items() if k not in left} for group in optimizer.param_groups)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Schedule, "on_step_begin", on_step_begin)
            with pytest.raises(Killed):
                train()
        return found

    return look


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_those_asked_for(
    finetune: Callable[..., int],
    kill_at: Callable[[int | None], None],
    settings_of: Callable[[Callable[[], int]], list[dict[str, Any]]],
    tmp_path: Path,
    method: str,
) -> None:
    options = {"method": method, **METHODS[method]}
    assert finetune("base", "--keep_checkpoints", **options, max_steps=3) == 0
    options |= {**ADAM, **METHOD_SETTINGS.get(method, {})}
    fresh = settings_of(lambda: finetune("fresh", **options))
    options["continue_from"] = tmp_path / "base" / "checkpoints" / "checkpoint-3"
    continued = settings_of(lambda: finetune("whole", **options))
    assert continued == [{**group, "lr": group["initial_lr"] * (6 / 9)} for group in fresh]
    assert finetune("whole", **options) == 0
    # Before a checkpoint of its own, and after it.
    for step in (5, 8):
        kill_at(step)
        with pytest.raises(Killed):
            finetune("killed", **options)
    kill_at(None)
    assert checkpoints(tmp_path / "killed" / "checkpoints")
    assert finetune("killed", **options) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    rates = {p.step: p.value for p in read_curves(tmp_path / "whole") if p.metric == "learning_rate" and p.step > 3}
    assert rates == pytest.approx({step: ADAM["learning_rate"] * (1 - (step - 1) / 9) for step in rates})


@pytest.mark.parametrize(("before", "now"), [("linear", "reduce_lr_on_plateau"), ("reduce_lr_on_plateau", "linear")])
def test_schedule_may_be_another(finetune: Callable[..., int], tmp_path: Path, before: str, now: str) -> None:
    options = {"budget": 0.2, "max_steps": 3, "lr_scheduler_type": before, "eval_steps": 1}
    assert finetune("base", "--keep_checkpoints", **options) == 0
    start = tmp_path / "base" / "checkpoints" / "checkpoint-3"
    options |= {"max_steps": 4, "lr_scheduler_type": now, "learning_rate": 4e-3, "continue_from": start}
    assert finetune("run", **options) == 0
    rates = {p.step: p.value for p in read_curves(tmp_path / "run") if p.metric == "learning_rate"}
    assert rates[4] == pytest.approx(1e-3 if now == "linear" else 4e-3)


def test_projections_of_another_rank_are_no_start(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("base", "--keep_checkpoints", method="galore", galore_r=4, max_steps=3) == 0
    start = tmp_path / "base" / "checkpoints" / "checkpoint-3"
    assert finetune("rank", method="galore", galore_r=2, continue_from=start) == 2
    assert "the rank of projections was 4 and is 2" in capsys.readouterr().err


def test_evaluation_before_the_first_step_is_that_of_this_run(finetune: Callable[..., int], tmp_path: Path) -> None:
    options = {"budget": 0.2, "max_steps": 3}
    assert finetune("base", "--keep_checkpoints", **options, validation_samples=2) == 0
    options |= {"max_steps": 5, "continue_from": tmp_path / "base" / "checkpoints" / "checkpoint-3"}
    assert finetune("run", "--eval_on_start", **options) == 0
    before, after = (
        [(p.step, p.value) for p in read_curves(tmp_path / name) if p.metric == "eval_loss"] for name in ("base", "run")
    )
    assert [step for step, _ in after] == [3, 4, 5]
    assert after[0] != before[-1]  # of other records


def test_run_goes_on_with_checkpoints_as_often_as_asked_for_now(
    finetune: Callable[..., int], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    options = {"budget": 0.2, "save_total_limit": 9}
    kill_at(5)
    with pytest.raises(Killed):
        finetune("run", "--keep_checkpoints", **options, save_steps=3)
    kill_at(None)
    assert finetune("run", "--keep_checkpoints", **options, save_steps=1) == 0
    steps = [step_of(checkpoint) for checkpoint in checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "changed",
    [{}, {"per_device_train_batch_size": 4}, {"shuffle_buffer": 8}, {"streaming": None}],
    ids=lambda changed: "-".join(changed) or "same",
)
def test_stream_of_another_run_goes_on_only_where_it_is_the_same(
    pretrain_words: Callable[..., list[str]],
    kill_at: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changed: dict[str, Any],
) -> None:
    """Else as many steps of the run's own data are left out as the other one has made."""
    options = {"streaming": True, "shuffle_buffer": 16, "method": "adamw", "save_steps": 4}
    assert pretrain.main(pretrain_words("base", "--keep_checkpoints", **{**options, "max_steps": 4})) == 0
    options |= {"continue_from": tmp_path / "base" / "checkpoints" / "checkpoint-4", **changed}
    resumed: list[dict[str, Any]] = []
    resume = StreamedText.resume
    with monkeypatch.context() as patch:
        patch.setattr(StreamedText, "resume", lambda self, place: (resumed.append(place), resume(self, place))[1])
        assert pretrain.main(pretrain_words("whole", **options)) == 0
    assert bool(resumed) == (not changed)
    kill_at(10)
    with pytest.raises(Killed):
        pretrain.main(pretrain_words("killed", **options))
    kill_at(None)
    assert pretrain.main(pretrain_words("killed", **options)) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_model_of_another_size_is_no_start(
    pretrain_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(pretrain_words("base", method="adamw", max_steps=1)) == 0
    options = {"method": "adamw", "max_steps": 1, "continue_from": tmp_path / "base" / "model"}
    assert pretrain.main(pretrain_words("large", **options, model_config="2m")) == 2
    assert "a model with hidden_size 32; that of model_config is 128" in capsys.readouterr().err
    assert pretrain.main(pretrain_words("same", **options)) == 0


def test_best_model_is_one_of_this_run(finetune: Callable[..., int], tmp_path: Path) -> None:
    """Losses on other data say nothing about it; and it is evaluated and saved as often as asked for here."""
    rng = random.Random(0)
    numbers = ({"instruction": f"{rng.random()}", "output": f"{rng.random()}"} for _ in range(24))
    write_records(tmp_path / "numbers" / "train.jsonl", numbers)
    options = {"method": "adamw", "eval_steps": 3, "save_steps": 3}
    assert finetune("base", "--load_best_model_at_end", "--keep_checkpoints", **options) == 0
    options |= {"continue_from": tmp_path / "base" / "checkpoints" / "checkpoint-9", "max_steps": 15}
    options |= {"eval_steps": 2, "save_steps": 2, "logging_steps": 1, "dataset_path": tmp_path / "numbers"}
    assert finetune("run", "--load_best_model_at_end", "--keep_checkpoints", **options) == 0
    points = read_curves(tmp_path / "run")
    losses = {p.step: p.value for p in points if p.metric == "eval_loss"}
    own = {step: loss for step, loss in losses.items() if step > 9}
    assert list(own) == [10, 12, 14, 15]
    assert [p.step for p in points if p.metric == "train_loss" and p.step > 9] == [10, 11, 12, 13, 14, 15]
    assert min(own.values()) > min(losses.values())
    assert read_result(tmp_path / "run").metrics["eval_loss"] == min(own.values())
    best = tmp_path / "run" / "checkpoints" / f"checkpoint-{min(own, key=own.__getitem__)}"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (best, tmp_path / "run" / "model")]
    assert weights[0] == weights[1]
