"""Prompts, labels and batches: the loss falls on the response, its end included, and on nothing else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from misa.data.instruction import (
    IGNORED,
    InstructionCollator,
    InstructionDataset,
    encode,
    format_prompt,
    read_instructions,
    record_prompt,
)
from misa.data.records import write_records

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "blue"},
    {"instruction": "Translate the sentence into English, please.", "input": "Guten Tag", "output": "Good day"},
    {"instruction": "Count.", "output": "one two three four five"},
]


@pytest.fixture
def model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    from misa.models import build_model

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return build_model(config, seed=0)


def test_prompt_is_alpaca_s_in_both_forms() -> None:
    assert format_prompt("Name a colour. ") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n"
    )
    assert format_prompt("Translate.", "Guten Tag") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n"
    )
    assert record_prompt(RECORDS[2]) == format_prompt("Count.")


def test_labels_cover_the_response_and_its_end(tokenizer: Any) -> None:
    for record in RECORDS:
        item = encode(record, tokenizer, 512)
        learned = [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORED]
        assert tokenizer.decode(learned[:-1]) == record["output"]
        assert learned[-1] == tokenizer.eos_token_id
        assert item["labels"][-len(learned) :] == learned
        text = tokenizer.decode(item["input_ids"][: -len(learned)])
        assert text == record_prompt(record)


def test_end_is_learned_though_it_pads_too(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    items = [encode(record, tokenizer, 512) for record in RECORDS]
    batch = InstructionCollator(tokenizer.pad_token_id)(items)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)


def test_training_and_scoring_tokens_agree(family: Path, tokenizer: Any) -> None:
    """Scoring encodes prompt and response as one text; training must have seen the same tokens."""
    for record in read_instructions(family / "test.jsonl"):
        joint = tokenizer(record_prompt(record) + record["output"])["input_ids"]
        assert encode(record, tokenizer, 512)["input_ids"] == [*joint, tokenizer.eos_token_id]


@pytest.mark.parametrize("num_items", [None, 40])
def test_cut_logits_give_the_same_loss_and_gradients(model: Any, tokenizer: Any, num_items: int | None) -> None:
    items = [encode(record, tokenizer, 512) for record in RECORDS]
    more = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    results = []
    for keep_all in (True, False):
        model.zero_grad()
        output = model(**InstructionCollator(tokenizer.pad_token_id, keep_all_logits=keep_all)(items), **more)
        output.loss.backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (plain, plain_gradients), (cut, cut_gradients) = results
    assert cut.logits.shape[1] < plain.logits.shape[1] / 3
    torch.testing.assert_close(cut.loss, plain.loss, rtol=1e-6, atol=0)
    for name, gradient in plain_gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_padding_changes_no_loss(model: Any, tokenizer: Any) -> None:
    items = [encode(record, tokenizer, 512) for record in RECORDS]
    collate = InstructionCollator(tokenizer.pad_token_id)
    total = torch.tensor(sum(label != IGNORED for item in items for label in item["labels"]))
    with torch.no_grad():
        together = model(**collate(items), num_items_in_batch=total).loss
        alone = sum(model(**collate([item]), num_items_in_batch=total).loss for item in items)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_long_records_are_cut_and_hopeless_ones_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [len(tokenizer(record_prompt(record))["input_ids"]) for record in RECORDS]
    room = prompts[2] + 2
    with caplog.at_level(logging.WARNING):
        dataset = InstructionDataset(RECORDS, tokenizer, room)
    kept = [length for length in prompts if length < room]
    assert len(dataset) == len(kept) < len(RECORDS)
    assert f"left out {len(RECORDS) - len(kept)} of 3 records" in caplog.text
    assert dataset.lengths == [len(item["input_ids"]) for item in dataset.items]
    assert max(dataset.lengths) <= room
    with pytest.raises(ValueError, match="max_length 5 leaves no room for a response in any of 3 records"):
        InstructionDataset(RECORDS, tokenizer, 5)
    with pytest.raises(ValueError, match="max_length is 1"):
        InstructionDataset(RECORDS, tokenizer, 1)


def test_empty_outputs_are_refused(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", [*RECORDS, {"instruction": "x", "output": " "}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 4: field 'output' is empty"):
        read_instructions(tmp_path / "train.jsonl", to_learn=True)
    assert len(read_instructions(tmp_path / "train.jsonl")) == 4
    write_records(tmp_path / "train.jsonl", [{"instruction": "x", "output": "y", "input": 3}])
    with pytest.raises(ValueError, match="line 1: field 'input' must be text"):
        read_instructions(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('{"instruction": "x", "output": "y", "input": "\\ud83d"}')
    with pytest.raises(ValueError, match="line 1: field 'input' holds half a character"):
        read_instructions(tmp_path / "train.jsonl")


def test_public_benchmark_files_are_read(real_data: Path, tokenizer: Any) -> None:
    for name, count in (("math/gsm8k_test.json", 1319), ("commonsense/arc_challenge_train.json", 1119)):
        records = read_instructions(real_data / name)
        assert len(records) == count
        item = encode(records[0], tokenizer, 4096)
        assert (
            tokenizer.decode([label for label in item["labels"] if label != IGNORED][:-1])
            == records[0]["output"].strip()
        )
    with pytest.raises(ValueError, match=r"gsm8k_train\.jsonl, line 1: field 'instruction' is missing"):
        read_instructions(real_data / "math/gsm8k_train.jsonl")
