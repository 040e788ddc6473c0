"""The training commands in several processes: the weights of a bare loop, one result, and kills that change nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.conftest import command_line

from misa import pretrain, train
from misa.data.instruction import InstructionCollator, InstructionDataset, read_instructions
from misa.data.sampling import SeededSampler
from misa.models import load_model, load_tokenizer
from misa.optimizer import MISA
from misa.results import read_result
from misa.training.identity import differences

NUM_STEPS, BATCH = 9, 4
METHOD = {"method": "misa", "budget": 0.2, "interval": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-4}

Launch = Callable[..., list[int]]
COMMANDS = "Training commands under `torchrun` (HF Trainer, Accelerate)"
REFUSED = "Refused before the first step, in words that name what works"


def words(small: Path, output: Path, num_processes: int = 2, **options: Any) -> list[str]:
    defaults = {
        **METHOD,
        "model_name_or_path": small / "model",
        "dataset_path": small / "instructions",
        "output_dir": output,
        "tokenized_dir": small / "tokens",
        "dtype": "float32",
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH // num_processes,
        "logging_steps": 1,
        "save_steps": 3,
        "seed": 0,
    }
    return command_line({**defaults, **options}, ())


@pytest.fixture(scope="module")
def whole(small: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert launch(2, "train", words(small, output)) == [0, 0]
    return output


@pytest.fixture(scope="module")
def killed(small: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, after the second process was killed in step 5, in the middle of a round."""
    output = tmp_path_factory.mktemp("runs") / "killed"
    assert -9 in launch(2, "train", words(small, output), kill=(1, 5))
    assert not (output / "result.json").exists()
    assert (output / "checkpoints" / "checkpoint-3" / "rng_state_1.pth").is_file()
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def require_close(output: Path, expected: dict[str, torch.Tensor]) -> None:
    for name, weight in weights(output).items():
        torch.testing.assert_close(weight, expected[name], rtol=0.0, atol=1e-6)


@pytest.mark.support(COMMANDS, "weights of a bare loop")
def test_two_processes_give_the_weights_of_a_bare_loop(small: Path, whole: Path) -> None:
    model, tokenizer = load_model(small / "model", "float32"), load_tokenizer(small / "model")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    items = InstructionDataset(read_instructions(small / "instructions" / "train.jsonl"), tokenizer, 512)
    collate = InstructionCollator(tokenizer.pad_token_id, keep_all_logits=True)
    sampler = SeededSampler(len(items), 0, items.lengths, BATCH)
    optimizer = MISA(model, lr=1e-3, eps=1e-4, budget=0.2, interval=2, seed=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    for step in range(NUM_STEPS):
        epoch, number = divmod(step, len(items) // BATCH)
        sampler.set_epoch(epoch)
        batch = collate([items[i] for i in list(sampler)[number * BATCH : (number + 1) * BATCH]])
        count = (batch["labels"] != -100).sum()
        model(**batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    expected = dict(model.named_parameters())
    require_close(whole, {name: p.detach() for name, p in expected.items()})
    assert sum(not torch.equal(before[name], p) for name, p in expected.items()) >= 10


@pytest.mark.support(COMMANDS, "one result")
def test_first_process_alone_writes_the_result(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["curves.csv", "model", "result.json"]
    result = read_result(whole)
    assert (result.config["num_processes"], result.metrics["num_steps"]) == (2, NUM_STEPS)


@pytest.mark.support(COMMANDS, "a killed process changes no bit")
def test_killed_process_changes_no_bit(small: Path, launch: Launch, whole: Path, killed: Path, tmp_path: Path) -> None:
    again = tmp_path / "killed"
    shutil.copytree(killed, again)
    assert launch(2, "train", words(small, again)) == [0, 0]
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(whole).items())
    assert read_result(again).metrics == read_result(whole).metrics


@pytest.mark.support(COMMANDS, "`--shard_state`")
def test_state_shared_out_changes_no_bit_even_where_a_process_is_killed(
    small: Path, launch: Launch, whole: Path, tmp_path: Path
) -> None:
    line = words(small, tmp_path, shard_state="true")
    assert -9 in launch(2, "train", line, kill=(1, 5))
    assert launch(2, "train", line) == [0, 0]
    assert all(torch.equal(weight, weights(tmp_path)[name]) for name, weight in weights(whole).items())


@pytest.mark.support("HF Trainer of your own under `torchrun`", "`shard_state` with a callback, resumed bit for bit")
def test_trainer_of_ones_own_saves_shared_state_with_a_callback(launch: Launch, tmp_path: Path) -> None:
    assert launch(2, "plain Trainer", [str(tmp_path)]) == [0, 0]


@pytest.mark.support(COMMANDS, "resumed on another number of processes")
def test_run_goes_on_with_another_number_of_processes(
    small: Path, launch: Launch, whole: Path, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, four = tmp_path / "alone", tmp_path / "four"
    shutil.copytree(killed, alone)
    shutil.copytree(killed, four)
    assert train.main(words(small, alone, num_processes=1)) == 0
    assert "continuing from" in caplog.text
    require_close(alone, weights(whole))
    assert launch(4, "train", words(small, four, num_processes=4)) == [0, 0, 0, 0]
    require_close(four, weights(whole))


def test_other_number_of_sequences_is_another_run() -> None:
    two = {"num_processes": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert not differences(two, {**two, "num_processes": 1, "gradient_accumulation_steps": 2})
    assert differences(two, {**two, "num_processes": 1}) == "sequences_per_step 4 -> 2"


@pytest.mark.support(COMMANDS, "streams, accumulation")
def test_pretraining_on_a_stream_in_two_processes_gives_the_weights_of_one(
    small: Path, launch: Launch, tmp_path: Path
) -> None:
    def of(name: str, batch_size: int) -> list[str]:
        options = {
            **METHOD,
            "model_config": small / "tiny.json",
            "dataset_path": small / "corpus",
            "output_dir": tmp_path / name,
            "tokenized_dir": small / "tokens",
            "max_length": 32,
            "max_eval_tokens": 320,
            "max_steps": 7,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "streaming": "true",
            "seed": 0,
        }
        return command_line(options, ())

    assert pretrain.main(of("alone", 4)) == 0
    assert launch(2, "pretrain", of("together", 2)) == [0, 0]
    require_close(tmp_path / "together", weights(tmp_path / "alone"))


@pytest.mark.support(REFUSED, "Trainer with DeepSpeed or with Accelerate's FSDP")
@pytest.mark.parametrize("option", ["deepspeed", "fsdp"])
def test_other_ways_of_sharing_a_model_are_refused(
    small: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words(small, tmp_path / "refused", **{option: "full_shard"})) == 2
    said = capsys.readouterr().err
    assert f"misa.train: error: {option}: " in said
    assert "use torchrun with the plain model" in said


@pytest.mark.support(REFUSED, "`galore_layerwise` in several processes")
def test_method_that_steps_in_the_backward_pass_is_refused_where_one_process_may_use_it(
    small: Path, launch: Launch, tmp_path: Path
) -> None:
    options = {"method": "galore_layerwise", "budget": None, "interval": None, "max_grad_norm": 0, "max_steps": 1}
    assert launch(1, "train", words(small, tmp_path / "one", 1, **options)) == [0]
    codes = launch(2, "train", words(small, tmp_path / "two", **options))
    # A process that lost its partner in the middle of an exchange ends otherwise.
    assert 2 in codes
    assert 0 not in codes
    assert not (tmp_path / "two" / "result.json").exists()
