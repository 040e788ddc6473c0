"""The training commands: what they write, what they recognise, and what they refuse."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from misa import pretrain, train
from misa.data import instruction
from misa.data.corpus import BlockDataset
from misa.models import load_model, load_tokenizer
from misa.results import read_curves, read_result

from .conftest import Killed, outcome


def test_finetuning_writes_a_loadable_model_and_its_result(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = tmp_path / "rounds.jsonl"
    assert (
        finetune("misa-s0", "--eval_on_start", method="misa", budget=0.2, interval=2, max_steps=40, record=rounds) == 0
    )
    result = read_result(tmp_path / "misa-s0")
    assert (result.run, result.kind, result.method, result.seed) == ("misa-s0", "finetune", "misa", 0)
    assert (result.model, result.data) == ("model", "instructions")
    assert result.config["learning_rate"] == 1e-2
    assert result.config["method_settings"]["budget"] == 0.2
    assert result.provenance.command[:3] == ["python", "-m", "misa.train"]
    assert result.metrics["num_steps"] == 40

    points = read_curves(tmp_path / "misa-s0")
    losses = {point.step: point.value for point in points if point.metric == "train_loss"}
    evaluations = [(point.step, point.value) for point in points if point.metric == "eval_loss"]
    assert evaluations[0][0] == 0
    assert evaluations[-1] == (40, result.metrics["eval_loss"])
    assert losses[40] == result.metrics["final_train_loss"] < losses[1] - 0.1
    assert {point.metric for point in points} == {
        *("train_loss", "eval_loss", "learning_rate", "grad_norm", "active_numel")
    }

    model, tokenizer = load_model(tmp_path / "misa-s0" / "model"), load_tokenizer(tmp_path / "misa-s0" / "model")
    records = instruction.read_instructions(small / "instructions" / "train.jsonl")[:4]
    items = [instruction.encode(record, tokenizer, 512) for record in records]
    with torch.no_grad():
        loss = model(**instruction.InstructionCollator(tokenizer.pad_token_id)(items)).loss
    assert loss.item() == pytest.approx(result.metrics["eval_loss"], rel=1e-5)

    budget = 0.2 * sum(p.numel() for p in model.parameters())
    active = [point.value for point in points if point.metric == "active_numel"]
    assert 0 < max(active) <= budget
    recorded = [json.loads(line) for line in rounds.read_text().splitlines()]
    assert [line["steps"] for line in recorded] == [2] * 20
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert {sum(sizes[f"{name}.weight"] for name in line["active"]) for line in recorded} >= set(active)
    # Two moments in float32 for what is active at most, and not a byte more.
    assert 8 * min(active) <= result.peaks["state_bytes"] <= 8 * budget
    assert result.peaks["rss_bytes"] > 2**27
    assert result.timings["wall_s"] >= result.timings["train_s"] > 0

    shown = capsys.readouterr().err
    assert "step 40/40  loss" in shown
    assert "tokens/s" in shown
    assert "\r" not in shown


def test_train_loss_is_the_mean_over_all_steps(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("each", method="adamw", logging_steps=1) == 0
    assert finetune("some", method="adamw", logging_steps=4) == 0
    each, some = read_result(tmp_path / "each"), read_result(tmp_path / "some")
    values = [point.value for point in read_curves(tmp_path / "each") if point.metric == "train_loss"]
    assert len(values) == 9
    assert each.metrics["train_loss"] == pytest.approx(sum(values) / 9)
    assert some.metrics["train_loss"] == pytest.approx(each.metrics["train_loss"], rel=1e-6)


def test_lora_writes_an_adapter_folder(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("lora", method="lora", lora_r=4) == 0
    folder = tmp_path / "lora" / "model"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert load_model(folder).peft_config["default"].r == 4
    active = [point.value for point in read_curves(tmp_path / "lora") if point.metric == "active_numel"]
    # A: 4 x in, B: out x 4, of 4 square matrices of 32 and 3 of 32 x 64, in 3 layers.
    assert set(active) == {3 * 4 * (4 * (32 + 32) + 3 * (32 + 64))}


def test_every_method_sees_the_same_batches(finetune: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[bytes]] = {}
    original = instruction.InstructionCollator.__call__

    for method in ("adamw", "lora", "misa", "lisa"):
        batches = seen.setdefault(method, [])

        def spy(self: Any, items: Sequence[Any], batches: list[bytes] = batches) -> Any:
            batch = original(self, items)
            batches.append(batch["input_ids"].numpy().tobytes())
            return batch

        monkeypatch.setattr(instruction.InstructionCollator, "__call__", spy)
        options = {"lora_dropout": 0.5} if method == "lora" else {}
        assert finetune(method, method=method, eval_strategy="no", validation_samples=0, **options) == 0
    assert len(set(seen["adamw"])) > 5
    assert seen["adamw"] == seen["lora"] == seen["misa"] == seen["lisa"]


def test_accumulated_batches_train_like_whole_ones(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("whole", method="adamw", learning_rate=1e-3) == 0
    pieces = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert finetune("pieces", method="adamw", learning_rate=1e-3, **pieces) == 0
    (_, whole), (_, accumulated) = outcome(tmp_path / "whole"), outcome(tmp_path / "pieces")
    for a, b in zip(whole, accumulated, strict=True):
        assert a[:3] == b[:3]
        assert a[3] == pytest.approx(b[3], rel=2e-3)


def test_finished_run_is_recognised_and_other_settings_are_refused(
    finetune: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert finetune("run", method="misa") == 0
    stamp = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    # Where checkpoints go and how often does not change what comes out.
    assert finetune("run", method="misa", save_steps=5, checkpoint_dir=tmp_path / "elsewhere") == 0
    assert "nothing to do" in caplog.text
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == stamp
    assert finetune("run", method="misa", learning_rate=0.5, budget=0.5) == 2
    error = capsys.readouterr().err
    assert "learning_rate 0.01 -> 0.5" in error
    assert "method_options {} -> {'budget': 0.5}" in error
    assert "--overwrite_output_dir" in error
    assert finetune("run", "--overwrite_output_dir", method="misa", learning_rate=0.5, budget=0.5) == 0
    assert read_result(tmp_path / "run").config["learning_rate"] == 0.5


def test_changed_data_is_noticed(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data.jsonl"
    lines = (small / "instructions" / "train.jsonl").read_text().splitlines(keepends=True)
    copy.write_text("".join(lines))
    assert finetune("run", dataset_path=copy) == 0
    copy.write_text("".join(lines[:-1]))
    assert finetune("run", dataset_path=copy) == 2
    assert "data_digest" in capsys.readouterr().err


def test_checkpoints_of_other_settings_are_refused_or_overwritten(
    finetune: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from misa.training import run

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "notes.txt").write_text("not ours")

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_curves", killed)
        with pytest.raises(Killed):
            finetune("run", checkpoint_dir=scratch)
    assert finetune("run", checkpoint_dir=scratch, seed=7) == 2
    assert "seed 0 -> 7" in capsys.readouterr().err
    assert finetune("run", "--overwrite_output_dir", checkpoint_dir=scratch, seed=7) == 0
    # Only what the run put there is removed.
    assert [path.name for path in scratch.iterdir()] == ["notes.txt"]
    (scratch / "checkpoint-3").mkdir()
    assert finetune("new", checkpoint_dir=scratch) == 2
    assert "checkpoints of something else" in capsys.readouterr().err


def test_kept_checkpoints_stay(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("run", "--keep_checkpoints") == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["checkpoint-6", "checkpoint-9", "run.json"]


def test_pretraining_reports_perplexity_and_bits(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    words = pretrain_words("adamw-s0", method="adamw", max_steps=60, eval_strategy="steps", eval_steps=20)
    assert pretrain.main(words) == 0
    result = read_result(tmp_path / "adamw-s0")
    assert result.kind == "pretrain"
    loss = result.metrics["eval_loss"]
    assert result.metrics["perplexity"] == pytest.approx(math.exp(loss))
    assert result.metrics["num_eval_tokens"] == 320
    assert result.metrics["num_tokens"] == 60 * 2 * 32
    evaluations = [p.value for p in read_curves(tmp_path / "adamw-s0") if p.metric == "eval_loss"]
    assert evaluations[-1] == loss < 0.6 * math.log(320)
    # Words are drawn at random out of 18 and are about 5.1 bytes long with their space: no model gets below this.
    assert math.log2(18) / 5.3 < result.metrics["bits_per_byte"] < 1.1 * math.log2(18) / 4.9
    model = load_model(tmp_path / "adamw-s0" / "model")
    assert model.config.vocab_size == len(load_tokenizer(tmp_path / "adamw-s0" / "model"))


def test_diverged_run_stops_with_step_and_records(
    pretrain_words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[list[int]] = [[]]
    original = BlockDataset.__getitem__

    def watch(self: BlockDataset, index: int) -> Any:
        if len(taken[-1]) == 2:
            taken.append([])
        taken[-1].append(index)
        return original(self, index)

    monkeypatch.setattr(BlockDataset, "__getitem__", watch)
    options = {"method": "adamw", "learning_rate": 1e30, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    assert pretrain.main(pretrain_words("wild", gradient_accumulation_steps=2, **options)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.search(
        r"loss is (?:nan|inf) at step ([2-4]) \(epoch 1\), in the batch of training records (\d+), (\d+);", error
    )
    assert found, error
    # The same order the run took them in: two passes of two records a step.
    step, *records = map(int, found.groups())
    assert records in (taken[2 * step - 2], taken[2 * step - 1])
    assert not (tmp_path / "wild" / "result.json").exists()


def test_diverged_run_can_go_on_and_says_so(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    options = {"method": "adamw", "learning_rate": 1e30, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    assert pretrain.main(pretrain_words("wild", stop_on_nan="false", **options)) == 0
    result = read_result(tmp_path / "wild")
    assert not math.isfinite(result.metrics["final_train_loss"])
    assert not math.isfinite(result.metrics["eval_loss"])


def test_loss_that_is_no_number_spoils_no_later_one(
    pretrain_words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.Trainer.training_step

    def one_is_none(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss

    monkeypatch.setattr(transformers.Trainer, "training_step", one_is_none)
    options = {"method": "adamw", "max_steps": 4, "logging_steps": 1, "stop_on_nan": "false"}
    assert pretrain.main(pretrain_words("one", **options)) == 0
    losses = [point.value for point in read_curves(tmp_path / "one") if point.metric == "train_loss"]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
    assert math.isfinite(read_result(tmp_path / "one").metrics["eval_loss"])


def test_full_disk_is_found_before_training(
    finetune: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 300_000, 300_000))
    assert finetune("run", method="adamw") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has 0 MiB free, but this run needs about" in error
    assert not list(tmp_path.glob("run/checkpoints/checkpoint-*"))
    # Without checkpoints the model alone, of about 200 KB, is left to write.
    assert finetune("run", method="adamw", save_strategy="no") == 0


def test_progress_shows_blocks_and_peak(finetune: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("run", method="badam", max_steps=2) == 0
    line = r"step 2/2  loss \d\.\d+  lr \S+  \d+ tokens/s  active 0\.0\d+M in 1 blocks  peak \d\.\d\d GiB"
    assert re.search(line, capsys.readouterr().err)


def test_run_continues_from_a_checkpoint_elsewhere_and_from_a_model(
    finetune: Callable[..., int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("whole", "--keep_checkpoints", method="misa", budget=0.2, interval=2) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-6"
    assert finetune("rest", method="misa", budget=0.2, interval=2, continue_from=checkpoint) == 0
    assert outcome(tmp_path / "rest") == outcome(tmp_path / "whole")
    # A model folder gives the weights alone: the curve begins where the model ended.
    assert finetune("on", "--eval_on_start", method="misa", continue_from=tmp_path / "whole" / "model") == 0
    first = next(p for p in read_curves(tmp_path / "on") if p.metric == "eval_loss")
    assert first.step == 0
    assert first.value == pytest.approx(read_result(tmp_path / "whole").metrics["eval_loss"], rel=1e-5)
    (checkpoint / "optimizer.pt").unlink()
    assert finetune("broken", method="misa", budget=0.2, interval=2, continue_from=checkpoint) == 2
    assert "optimizer.pt is missing" in capsys.readouterr().err
    assert finetune("none", continue_from=tmp_path / "nowhere") == 2
    assert "which is no folder" in capsys.readouterr().err


def test_trained_model_is_scored_at_last(
    finetune: Callable[..., int],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # With the one generated task, since the sets of the two published task names need a folder of their own.
    monkeypatch.setitem(train.TASKS, "math", "misa_family")
    asked = {"method": "misa", "max_steps": 2, "task_name": "math", "evaluation_data_dir": tmp_path / "sets"}
    assert finetune("run", "--evaluate_at_last", **asked) == 2
    assert "no such folder; name the folder with --evaluation_data_dir" in capsys.readouterr().err
    (tmp_path / "sets").mkdir()
    record = {"instruction": "Who?", "input": "", "output": "-", "answer": "mother"}
    (tmp_path / "sets" / "test.jsonl").write_text(json.dumps(record) + "\n")
    # A response may have 16 tokens, which must fit into the model beside a prompt.
    short = shutil.copytree(small / "model", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    few = {**asked, "max_length": 16, "model_name_or_path": short}
    assert finetune("few", "--evaluate_at_last", "--train_on_inputs", **few) == 2
    assert "evaluate_at_last: max_length is 16" in capsys.readouterr().err
    assert finetune("run", "--evaluate_at_last", **asked) == 0
    scores = read_result(tmp_path / "run" / "evaluation")
    assert scores.config["base_run"] == "run"
    assert scores.metrics["misa_family/num_documents"] == 1


def test_model_need_not_be_written(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("run", method="misa", max_steps=2, save_model="false") == 0
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({"report_to": "trackio"}, [], "report_to is 'trackio', which is not installed: pip install trackio"),
        ({"optim": "adafactor"}, [], "--optim is 'adafactor', but the optimizer is chosen by --method"),
        ({"method": "galore_layerwise"}, [], "cannot be clipped together: max_grad_norm is 1.0, allowed is 0"),
        (
            {"method": "misa", "max_grad_norm": 0, "gradient_accumulation_steps": 2},
            ["--step_in_backward", "true"],
            "cannot be accumulated: gradient_accumulation_steps is 2, allowed is 1",
        ),
        ({}, ["--evaluate_at_last"], "evaluate_at_last: task_name is None, allowed is math, commonsense"),
        ({"attn_implementation": "best"}, [], "best"),
        ({"gguf_file": "no.gguf"}, [], "no file at"),
        ({"revision": "main"}, [], "revision is main, which a model of the hub has, but"),
        ({"model_name_or_path": "no.gguf"}, [], "no file at no.gguf"),
        ({"model_name_or_path": "./nowhere"}, [], "no folder at ./nowhere"),
        ({"dataset_path": "./nowhere"}, [], "data source nowhere is neither a folder nor a file"),
        ({"method": "magic"}, [], "method='magic': must be one of adamw, adamw_bf16"),
        ({"method": "adamw", "budget": 0.1}, [], "method adamw: has no option budget"),
        ({"eta": "high"}, [], "eta is 'high', allowed is a number from 0 up, or auto"),
        ({"dtype": "int4"}, [], "dtype is 'int4', allowed is bfloat16"),
        ({"validation_samples": 24}, [], "validation_samples is 24, but there are 24 records"),
        ({"max_length": 4}, [], "max_length 4 leaves no room"),
        ({"learning_rate": "fast"}, [], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({"model_name_or_path": None}, [], "the following arguments are required: --model_name_or_path"),
        ({}, ["--learning_rat", "1"], "unknown option --learning_rat; did you mean --learning_rate?"),
        ({}, ["--dataloader_num_worker", "1"], "unknown option --dataloader_num_worker; did you mean --dataloader_num"),
        ({}, ["--eval_strategy", "often"], "often"),
        ({}, ["--granularity", "word"], "--granularity is 'word': allowed is module, layer, half, matrix"),
    ],
)
def test_wrong_input_ends_with_one_line(
    finetune: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    assert finetune("run", *words, **options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("misa.train: error: ")
    assert message in error
    assert not (tmp_path / "run" / "result.json").exists()


def test_malformed_record_is_named(
    finetune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n" + json.dumps({"instruction": "a"}) + "\n")
    assert finetune("run", dataset_path=tmp_path) == 2
    assert f"{path}, line 2: field 'output' is missing" in capsys.readouterr().err
