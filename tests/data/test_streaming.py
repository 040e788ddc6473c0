"""Streamed text: one order for every reader, and reading that goes on where it stood."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from misa.data.records import write_records
from misa.data.streaming import StreamedText, first_texts, open_streams
from misa.data.text import TextSource, find_text, is_held_out

TEXTS = [f"Document {number} tells of the {number}th fox and of its {number % 7} cubs." for number in range(60)]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    for index in range(3):
        write_records(tmp_path / f"{index}.jsonl", ({"text": text} for text in TEXTS[20 * index : 20 * index + 20]))
    return tuple(tmp_path / f"{index}.jsonl" for index in range(3))


@pytest.fixture(params=["none", "max_length"])
def stream(files: tuple[Path, ...], tokenizer: Any, request: pytest.FixtureRequest) -> Any:
    """Make a stream of the files with chunks of 7 documents."""

    def make(**options: Any) -> StreamedText:
        documents, _, _ = open_streams(TextSource("x", files), 0.1)
        return StreamedText(documents, tokenizer, 16, **{"padding": request.param, "buffer": 7, "seed": 3, **options})

    return make


def first(stream: Any, count: int) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in itertools.islice(iter(stream), count)]


def test_order_is_one_of_the_seed(stream: Any) -> None:
    torch.manual_seed(1)
    items = first(stream(), 200)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert first(stream(), 200) == items
    assert torch.equal(torch.get_rng_state(), state)
    assert first(stream(seed=4), 200) != items
    assert first(stream(buffer=60), 200) != items
    assert first(stream(buffer=1), 200) != items


def test_every_epoch_has_every_document_once_in_another_order(files: tuple[Path, ...], tokenizer: Any) -> None:
    documents, _, _ = open_streams(TextSource("x", files), 0.1)
    items = first(StreamedText(documents, tokenizer, 64, "max_length", buffer=7), 180)
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in items]
    epochs = [decoded[start : start + 60] for start in (0, 60, 120)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(TEXTS)
        # Mixed inside a chunk, not across.
        assert set(epoch[:7]) == set(TEXTS[:7])
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != TEXTS


def test_packed_stream_is_its_documents_with_ends_between(files: tuple[Path, ...], tokenizer: Any) -> None:
    documents, _, _ = open_streams(TextSource("x", files), 0.1)
    items = first(StreamedText(documents, tokenizer, 16, "none", buffer=1), 30)
    decoded = tokenizer.decode([token for ids in items for token in ids]).split(tokenizer.eos_token)
    assert decoded[:-1] == TEXTS[: len(decoded) - 1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_number_of_workers_changes_nothing(stream: Any, num_workers: int) -> None:
    def batches(workers: int) -> list[Any]:
        loader = torch.utils.data.DataLoader(stream(), batch_size=4, num_workers=workers)
        return [batch["input_ids"].tolist() for batch in itertools.islice(iter(loader), 40)]

    assert batches(num_workers) == batches(0)


def test_reading_goes_on_from_any_place(stream: Any) -> None:
    items = first(stream(), 220)
    # Inside a chunk, at its end, in a later file, behind the end of an epoch.
    for taken in (0, 1, 6, 7, 8, 20, 61, 100, 199):
        for fetched_ahead in (0, 5):
            reading = stream()
            iterator = iter(reading)
            for _ in range(taken + fetched_ahead):
                next(iterator)
            position = json.loads(json.dumps(reading.position(taken)))
            again = stream()
            again.resume(position)
            assert first(again, 20) == items[taken : taken + 20]


def test_going_on_does_not_read_everything_before(stream: Any) -> None:
    reading = stream()
    iterator = iter(reading)
    for _ in range(150):
        next(iterator)
    position = reading.position(150)
    assert position["number"] > 100
    assert position["skip"] < 60
    # Where another process reads, all of it is read again.
    elsewhere = stream().position(150)
    assert (elsewhere["number"], elsewhere["skip"]) == (0, 150)


def test_a_second_interruption_goes_on_too(stream: Any) -> None:
    items = first(stream(), 120)
    reading, taken = stream(), 0
    for count in (13, 40, 2, 25):
        iterator = iter(reading)
        got = [next(iterator)["input_ids"].tolist() for _ in range(count)]
        assert got == items[taken : taken + count]
        taken += count
        position = reading.position(taken)
        reading = stream()
        reading.resume(position)


def test_held_out_documents_are_not_trained_on(files: tuple[Path, ...], tokenizer: Any) -> None:
    documents, apart, share = open_streams(TextSource("x", files), 0.2)
    assert share == 0.2
    held_out = first_texts(apart, tokenizer, 10**9, share)
    assert held_out == [text for text in TEXTS if is_held_out(text, 0.2)] != []
    train = first(StreamedText(documents, tokenizer, 64, "max_length", buffer=7, share=share), 60 - len(held_out))
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in train]
    assert sorted(decoded) == sorted(set(TEXTS) - set(held_out))


def test_validation_file_is_used_if_there_is_one(tmp_path: Path, tokenizer: Any) -> None:
    write_records(tmp_path / "train.jsonl", ({"text": text} for text in TEXTS[:40]))
    write_records(tmp_path / "validation.jsonl", ({"text": text} for text in TEXTS[40:]))
    _, apart, share = open_streams(find_text(str(tmp_path)), 0.02)
    assert share == 0
    texts = first_texts(apart, tokenizer, 100, share)
    assert texts == TEXTS[40 : 40 + len(texts)]
    assert len(texts) < 20


def test_other_kinds_of_files_are_streamed(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.txt").write_text("One\n\ndocument")
    datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_parquet(tmp_path / "b.parquet")
    text, _, _ = open_streams(TextSource("x", (tmp_path / "a.txt",)), 0.1)
    assert [record["text"] for record in text] == ["One\n\ndocument"]
    table, _, _ = open_streams(TextSource("x", (tmp_path / "b.parquet",)), 0.1)
    assert [record["text"] for record in table] == TEXTS
    with pytest.raises(ValueError, match=r"streaming reads files of one kind, found \.parquet, \.txt"):
        open_streams(TextSource("x", (tmp_path / "a.txt", tmp_path / "b.parquet")), 0.1)


def test_splits_of_the_hub_are_streamed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder in place of a repository, by the same code."""
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "owner" / "texts" / "train.jsonl", ({"text": text, "url": ""} for text in TEXTS[:40]))
    write_records(tmp_path / "owner" / "texts" / "validation.jsonl", ({"text": text} for text in TEXTS[40:]))
    documents, apart, share = open_streams(TextSource("x", hub_id="owner/texts"), 0.1)
    assert share == 0
    assert first_texts(apart, tokenizer, 10**9, share) == TEXTS[40:]
    items = first(StreamedText(documents, tokenizer, 64, "max_length", buffer=5), 40)
    assert sorted(tokenizer.decode(ids, skip_special_tokens=True) for ids in items) == sorted(TEXTS[:40])


def test_documents_without_text_are_left_out_up_to_a_share(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values: list[Any] = [*TEXTS[:40], None, 7, *TEXTS[40:]]
    write_records(tmp_path / "a.jsonl", ({"text": value} for value in values))
    documents, _, _ = open_streams(TextSource("x", (tmp_path / "a.jsonl",)), 0.1)

    def stream(share: float) -> StreamedText:
        return StreamedText(documents, tokenizer, 64, "max_length", buffer=21, max_malformed=share)

    with caplog.at_level(logging.WARNING):
        items = first(stream(0.05), 120)
    assert len(caplog.records) == 1
    assert "document 41: field 'text' must be text, found NoneType; left out" in caplog.text
    for epoch in (items[:60], items[60:]):
        assert sorted(tokenizer.decode(ids, skip_special_tokens=True) for ids in epoch) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"streamed text, document 41: field 'text' must be text, found NoneType$"):
        first(stream(0), 60)
    with pytest.raises(
        ValueError, match=r"document 42: .*found int \(2 of 42 documents malformed, max_malformed allows"
    ):
        first(stream(0.04), 60)
    assert first_texts(documents, tokenizer, 10**9, 0, max_malformed=0.04) == TEXTS
    with pytest.raises(ValueError, match="validation text, document 41: field 'text' must be text"):
        first_texts(documents, tokenizer, 10**9, 0)


def test_a_fault_in_the_middle_of_a_stream_is_named(tmp_path: Path, tokenizer: Any) -> None:
    write_records(tmp_path / "a.jsonl", ({"text": text} for text in TEXTS))
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    source = TextSource("x", (tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    stream = StreamedText(open_streams(source, 0.1)[0], tokenizer, 64, "max_length", buffer=7)
    with pytest.raises(ValueError, match="streamed text cannot be read: "):
        first(stream, 70)


def test_wrong_streams_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_records(tmp_path / "a.jsonl", [{"body": "x"}])
    with pytest.raises(ValueError, match="x, document 1: field 'text' must be text, found NoneType"):
        open_streams(TextSource("x", (tmp_path / "a.jsonl",)), 0.1)
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(ValueError, match="x cannot be read"):
        open_streams(TextSource("x", (tmp_path / "b.jsonl",)), 0.1)
    for name, reason in (("e.jsonl", "it is empty"), ("e.parquet", ".*size is 0")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} cannot be read: {reason}"):
            open_streams(TextSource("x", (tmp_path / name,)), 0.1)
    with pytest.raises(ValueError, match=r"the hub does not give allenai/c4 .*give a local file or folder"):
        open_streams(find_text("c4"), 0.1)
    write_records(tmp_path / "c.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"validation_share is 0\.7"):
        open_streams(TextSource("x", (tmp_path / "c.jsonl",)), 0.7)
    documents, _, _ = open_streams(TextSource("x", (tmp_path / "c.jsonl",)), 0.1)
    with pytest.raises(ValueError, match="shuffle_buffer is 0, allowed is 1 or more"):
        StreamedText(documents, tokenizer, 16, buffer=0)
    with pytest.raises(ValueError, match="max_malformed is 1, allowed is a share from 0 to below 1"):
        StreamedText(documents, tokenizer, 16, max_malformed=1)
    with pytest.raises(ValueError, match="no document to evaluate on"):
        first_texts(documents, tokenizer, 10, 1e-9)
    # All that there is is held out.
    with pytest.raises(ValueError, match="no document to train on"):
        next(iter(StreamedText(documents, tokenizer, 16, share=1.0)))
