"""The training commands on all kinds of data: files, folders, streams, packed and padded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from misa import pretrain
from misa.data.records import read_records, write_records
from misa.data.streaming import StreamedText
from misa.results import read_result

from .conftest import Killed, outcome


def test_known_set_trains_from_a_local_copy(finetune: Callable[..., int], real_data: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (real_data / "math" / "gsm8k_train.jsonl").read_text().splitlines()[:24]]
    write_records(tmp_path / "copies" / "math" / "gsm8k_train.jsonl", records)
    options = {"dataset_path": "gsm8k", "data_dir": tmp_path / "copies", "max_length": 2048, "max_steps": 2}
    assert finetune("run", **options) == 0
    assert read_result(tmp_path / "run").data == "gsm8k"


def test_parquet_trains_like_lines(finetune: Callable[..., int], small: Path, tmp_path: Path) -> None:
    import datasets

    records = read_records(small / "instructions" / "train.jsonl", ["output"])
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "table" / "train.parquet")
    assert finetune("lines") == 0
    assert finetune("rows", dataset_path=tmp_path / "table") == 0
    assert outcome(tmp_path / "rows") == outcome(tmp_path / "lines")


def test_second_run_does_not_tokenize(
    finetune: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    calls: list[Any] = []
    original = PreTrainedTokenizerFast.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    assert finetune("first") == 0
    assert len(calls) == 2 * 24
    calls.clear()
    assert finetune("second") == 0
    assert calls == []
    assert outcome(tmp_path / "second") == outcome(tmp_path / "first")
    assert finetune("elsewhere", tokenized_dir=tmp_path / "other") == 0
    assert calls
    # Where tokens are kept is no setting of the result.
    assert finetune("first", tokenized_dir=tmp_path / "other") == 0


def test_packing_trains_on_the_same_tokens_in_fewer_sequences(
    finetune: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from misa.data.instruction import InstructionCollator

    seen: dict[str, list[Any]] = {}
    original = InstructionCollator.__call__

    def spy(self: Any, items: Any) -> Any:
        batch = original(self, items)
        seen.setdefault("batches", []).append(batch)
        return batch

    monkeypatch.setattr(InstructionCollator, "__call__", spy)
    whole = {"validation_samples": 4, "eval_strategy": "no", "num_train_epochs": 1, "max_steps": None}
    totals = {}
    for name, options in {"alone": {}, "packed": {"packing": True, "max_length": 1024}}.items():
        seen.clear()
        assert finetune(name, **whole, **options) == 0
        totals[name] = sum(int((batch["labels"] != -100).sum()) for batch in seen["batches"])
    assert totals["packed"] == totals["alone"] > 0
    # The tokenizer's end token also pads, and ends every record.
    tokens = {name: read_result(tmp_path / name).metrics["num_tokens"] for name in totals}
    assert tokens["packed"] == tokens["alone"] > 0
    assert read_result(tmp_path / "packed").metrics["num_steps"] < read_result(tmp_path / "alone").metrics["num_steps"]
    assert all("attention_mask" not in batch for batch in seen["batches"])
    losses = [read_result(tmp_path / name).metrics["eval_loss"] for name in ("packed", "alone")]
    assert all(0 < loss < 10 for loss in losses)


def test_padding_to_max_length_trains_the_same(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("longest", method="adamw", learning_rate=1e-3) == 0
    assert finetune("full", method="adamw", learning_rate=1e-3, padding="max_length", max_length=512) == 0
    (_, longest), (_, full) = outcome(tmp_path / "longest"), outcome(tmp_path / "full")
    for a, b in zip(longest, full, strict=True):
        # Tokens that are no padding, and what is learned from them.
        assert a[:3] == b[:3]
        assert a[3] == pytest.approx(b[3], rel=2e-3)


def test_training_on_inputs_is_another_loss(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("response", max_steps=1) == 0
    assert finetune("all", "--train_on_inputs", max_steps=1) == 0
    losses = [read_result(tmp_path / name).metrics["train_loss"] for name in ("response", "all")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_few_malformed_records_are_left_out_if_allowed(
    finetune: Callable[..., int],
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text((small / "instructions" / "train.jsonl").read_text() + '{"instruction": "x"}\n{\n')
    assert finetune("run", dataset_path=path) == 2
    assert "2 of 26 records malformed" in capsys.readouterr().err
    assert finetune("run", dataset_path=path, max_malformed=0.1) == 0
    assert "2 of 26 records malformed and left out" in caplog.text
    assert finetune("clean") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "clean")


def test_held_out_questions_are_not_trained_on(
    finetune: Callable[..., int],
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = read_records(small / "instructions" / "train.jsonl", ["output"])
    other = {**records[1], "input": "of another kind"}
    write_records(tmp_path / "whole" / "train.jsonl", [*records, other])
    write_records(tmp_path / "doubled" / "train.jsonl", [*records, {**records[0], "output": "no"}, other, records[3]])
    assert finetune("whole", dataset_path=tmp_path / "whole") == 0
    assert "left out" not in caplog.text
    assert finetune("doubled", dataset_path=tmp_path / "doubled") == 0
    assert "left out 2 of 23 records to train on" in caplog.text
    assert outcome(tmp_path / "doubled") == outcome(tmp_path / "whole")
    write_records(tmp_path / "same" / "train.jsonl", [records[0]] * 8)
    assert finetune("same", dataset_path=tmp_path / "same") == 2
    assert "the other 4 records ask the same" in capsys.readouterr().err


def test_missing_hub_set_ends_with_one_line(finetune: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("run", dataset_path="vicgalle/alpaca-gpt4") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("misa.train: error: the hub does not give vicgalle/alpaca-gpt4")
    assert "local file or folder" in error


def test_any_text_folder_is_pretrained_on(
    pretrain_words: Callable[..., list[str]], small: Path, tmp_path: Path
) -> None:
    texts = [record["text"] for record in read_records(small / "corpus" / "train.jsonl", ["text"])]
    folder = tmp_path / "books"
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_text(text)
    options = {"dataset_path": folder, "validation_share": 0.2, "vocab_size": 310}
    assert pretrain.main(pretrain_words("run", **options)) == 0
    result = read_result(tmp_path / "run")
    assert result.data == "books"
    assert result.metrics["num_eval_tokens"] == 320
    from misa.models import load_tokenizer

    assert len(load_tokenizer(tmp_path / "run" / "model")) == 310
    # The same text with a tokenizer of one's own.
    assert pretrain.main(pretrain_words("own", **options, tokenizer_name_or_path=small / "model")) == 0
    assert len(load_tokenizer(tmp_path / "own" / "model")) == 320
    # A finished run is recognised, its trained tokenizer included.
    assert pretrain.main(pretrain_words("run", **options)) == 0


def test_published_padding_is_one_document_a_sequence(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    assert pretrain.main(pretrain_words("run", padding="max_length", max_length=64)) == 0
    metrics = read_result(tmp_path / "run").metrics
    # Padding is not counted.
    assert 12 * 2 * 15 < metrics["num_tokens"] < 12 * 2 * 64
    assert metrics["num_eval_tokens"] <= 320
    assert metrics["bits_per_byte"] > 0


STREAM = {"streaming": True, "shuffle_buffer": 16, "max_steps": 12, "save_steps": 4}


def read_batches(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record what the model is trained on."""
    from misa.training.trainer import Trainer

    seen: list[bytes] = []
    original = Trainer.training_step

    def spy(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        seen.append(inputs["input_ids"].numpy().tobytes())
        return original(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", spy)
    return seen


@pytest.mark.parametrize("padding", ["none", "max_length"])
def test_killed_stream_ends_as_if_it_had_not_been(
    pretrain_words: Callable[..., list[str]],
    kill_at: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    padding: str,
) -> None:
    seen = read_batches(monkeypatch)
    options = {**STREAM, "padding": padding, "method": "misa", "budget": 0.3, "interval": 3}
    options |= {"gradient_accumulation_steps": 2}
    assert pretrain.main(pretrain_words("whole", **options)) == 0
    whole, positions = list(seen), []
    assert len(set(whole)) == 24
    original = StreamedText.resume
    monkeypatch.setattr(
        StreamedText, "resume", lambda self, position: (positions.append(position), original(self, position))[1]
    )
    seen.clear()
    for step in (2, 6, 10):
        kill_at(step)
        with pytest.raises(Killed):
            pretrain.main(pretrain_words("killed", **options))
    kill_at(None)
    assert pretrain.main(pretrain_words("killed", **options)) == 0
    # Steps 1 and 2, then 1 to 6, 5 to 10, 9 to 12; two batches each.
    assert seen == whole[:4] + whole[:12] + whole[8:20] + whole[16:]
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert [position["number"] + position["skip"] for position in positions] == [4 * 2 * 2, 8 * 2 * 2]
    # A finished run is recognised: going on did not change its record.
    assert pretrain.main(pretrain_words("killed", **options)) == 0


def test_killed_stream_goes_on_with_the_same_dropout(
    pretrain_words: Callable[..., list[str]], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    options = {**STREAM, "method": "lora", "lora_r": 4, "lora_dropout": 0.5}
    assert pretrain.main(pretrain_words("whole", **options)) == 0
    kill_at(6)
    with pytest.raises(Killed):
        pretrain.main(pretrain_words("killed", **options))
    kill_at(None)
    assert pretrain.main(pretrain_words("killed", **options)) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_stream_is_the_same_for_every_method_and_number_of_workers(
    pretrain_words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = read_batches(monkeypatch)
    batches = {}
    for name, options in {
        "adamw": {"method": "adamw"},
        "misa": {"method": "misa"},
        "lora": {"method": "lora", "lora_dropout": 0.5},
        "workers": {"method": "adamw", "dataloader_num_workers": 2},
    }.items():
        seen.clear()
        assert pretrain.main(pretrain_words(name, **STREAM, **options)) == 0
        batches[name] = list(seen)
    assert len(set(batches["adamw"])) == 12
    assert batches["adamw"] == batches["misa"] == batches["lora"] == batches["workers"]
    assert outcome(tmp_path / "workers") == outcome(tmp_path / "adamw")


def test_stream_goes_on_with_workers_too(
    pretrain_words: Callable[..., list[str]], kill_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    options = {**STREAM, "dataloader_num_workers": 2}
    assert pretrain.main(pretrain_words("whole", **STREAM)) == 0
    kill_at(10)
    with pytest.raises(Killed):
        pretrain.main(pretrain_words("killed", **options))
    kill_at(None)
    assert pretrain.main(pretrain_words("killed", **options)) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_finetuning_is_the_same_for_every_number_of_workers(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("none") == 0
    assert finetune("two", dataloader_num_workers=2) == 0
    assert outcome(tmp_path / "two") == outcome(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True, "max_steps": -1}, "max_steps is -1; a stream has no length, so it must be given"),
        ({"dataset_path": "c4", "max_steps": None}, "max_steps is -1; a stream has no length"),
        ({"dataset_path": "c4", "tokenizer_name_or_path": "MODEL"}, "the hub does not give allenai/c4"),
        ({"dataset_path": "c4"}, "no tokenizer at google-t5/t5-base"),
        ({"dataset_path": "./nowhere"}, "data source nowhere is neither a folder nor a file"),
        ({"streaming": True, "shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"padding": "longest"}, "--padding: invalid choice"),
    ],
)
def test_wrong_text_ends_with_one_line(
    pretrain_words: Callable[..., list[str]],
    small: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    message: str,
) -> None:
    options = {name: small / "model" if value == "MODEL" else value for name, value in options.items()}
    assert pretrain.main(pretrain_words("run", **options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("misa.pretrain: error: ")
    assert message in error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fault_in_the_middle_of_a_stream_ends_the_run_with_one_line(
    pretrain_words: Callable[..., list[str]],
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    lines = (small / "corpus" / "train.jsonl").read_text().splitlines()
    (tmp_path / "text").mkdir()
    for split, rows in (("train", [*lines, '{"text": 3}']), ("validation", lines[:4])):
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    options = {**STREAM, "max_steps": 1000, "save_steps": 1000, "dataloader_num_workers": num_workers}
    words = pretrain_words("run", **options, dataset_path=tmp_path / "text", tokenizer_name_or_path=small / "model")
    assert pretrain.main(words) == 1
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1] == (
        f"misa.pretrain: error: streamed text, document {len(lines) + 1}: field 'text' must be text, found int; "
        "what was saved before stays"
    )
    assert "Traceback" not in said


def test_streamed_text_needs_a_tokenizer(
    pretrain_words: Callable[..., list[str]], small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = pretrain_words("run", **STREAM, dataset_path=small / "corpus" / "train.jsonl")
    assert pretrain.main(words) == 2
    assert "train is streamed, so tokenizer_name_or_path must name a tokenizer" in capsys.readouterr().err


def test_global_random_state_draws_no_data(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert pretrain.main(pretrain_words("one", **STREAM)) == 0
    torch.manual_seed(2)
    assert pretrain.main(pretrain_words("two", **STREAM)) == 0
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
