"""Tokens that are kept: made once, found again, and never taken for others."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from misa.data.corpus import train_tokenizer
from misa.data.instruction import InstructionDataset
from misa.data.tokens import cached_tokens, tokenizer_digest

RECORDS = [{"instruction": f"Count to {number}.", "input": "", "output": "one two " * number} for number in range(1, 9)]


@pytest.fixture
def calls(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the real tokenizer was called with."""
    kind, seen = type(tokenizer), []
    original = kind.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return seen


def rows(dataset: InstructionDataset) -> list[dict[str, list[int]]]:
    return [dataset[index] for index in range(len(dataset))]


def test_second_start_does_not_tokenize(tokenizer: Any, calls: list[Any], tmp_path: Path) -> None:
    for packing in (False, True):
        calls.clear()
        first = InstructionDataset(RECORDS, tokenizer, 400, packing=packing, tokenized_dir=tmp_path)
        assert len(calls) == 2 * len(RECORDS)
        calls.clear()
        second = InstructionDataset(RECORDS, tokenizer, 400, packing=packing, tokenized_dir=tmp_path)
        assert calls == []
        assert rows(second) == rows(first)
        assert second.lengths == first.lengths
        fresh = InstructionDataset(RECORDS, tokenizer, 400, packing=packing)
        assert rows(fresh) == rows(first)


def test_whatever_tokens_depend_on_makes_them_anew(tokenizer: Any, calls: list[Any], tmp_path: Path) -> None:
    other = train_tokenizer(["other text " * 20], 300)
    variants: list[dict[str, Any]] = [
        {},
        {"max_length": 300},
        {"train_on_inputs": True},
        {"packing": True},
        {"records": RECORDS[:-1]},
        {"records": RECORDS[::-1]},
        {"tokenizer": other},
    ]
    for change in variants:
        calls.clear()
        options = {"records": RECORDS, "tokenizer": tokenizer, "max_length": 400, **change}
        InstructionDataset(**options, tokenized_dir=tmp_path)
        assert calls, change
    assert len(list(tmp_path.iterdir())) == len(variants)
    calls.clear()
    InstructionDataset(RECORDS, tokenizer, 400, tokenized_dir=tmp_path)
    assert calls == []


def test_left_out_records_are_counted_again_from_kept_tokens(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [*RECORDS, {"instruction": "long " * 400, "output": "x"}]
    for packing in (False, True):
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                InstructionDataset(records, tokenizer, 400, packing=packing, tokenized_dir=tmp_path)
            assert "left out 1 of 9 records" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "gone", "unfinished"])
def test_damaged_tokens_are_made_anew(
    tokenizer: Any, calls: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = rows(InstructionDataset(RECORDS, tokenizer, 400, tokenized_dir=tmp_path))
    (entry,) = tmp_path.iterdir()
    (table,) = entry.glob("*.arrow")
    if damage == "cut":
        table.write_bytes(table.read_bytes()[:-50])
    elif damage == "gone":
        table.unlink()
    else:
        (entry / "complete.json").unlink()
    calls.clear()
    assert rows(InstructionDataset(RECORDS, tokenizer, 400, tokenized_dir=tmp_path)) == first
    assert calls
    assert "is damaged" in caplog.text
    calls.clear()
    assert rows(InstructionDataset(RECORDS, tokenizer, 400, tokenized_dir=tmp_path)) == first
    assert calls == []
    assert list(tmp_path.iterdir()) == [entry]


def test_folder_that_cannot_be_written_is_no_error(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dataset = InstructionDataset(RECORDS, tokenizer, 400, tokenized_dir=tmp_path / "file" / "tokens")
    assert len(dataset) == len(RECORDS)


def _make_together(folder: Path, barrier: Any, results: Any) -> None:
    def sequences() -> Iterator[dict[str, list[int]]]:
        # Both are in the middle of it before either can finish.
        barrier.wait(timeout=60)
        yield from ({"ids": list(range(number))} for number in range(1, 50))

    table = cached_tokens(folder, {"name": "both"}, sequences)
    results.put([list(ids) for ids in table["ids"]])


def test_two_processes_may_make_the_same_tokens(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make_together, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found[0] == found[1] == [list(range(number)) for number in range(1, 50)]
    (entry,) = tmp_path.iterdir()

    def never() -> Iterator[dict[str, list[int]]]:
        raise AssertionError

    assert len(cached_tokens(tmp_path, {"name": "both"}, never)) == 49
    shutil.rmtree(entry)


def test_tokenizer_is_known_by_its_content(tokenizer: Any, tmp_path: Path) -> None:
    from misa.models import load_tokenizer

    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "b c"], truncation=True, padding=True, max_length=8)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_digest(loaded) == before
    loaded.add_tokens(["<new>"])
    assert tokenizer_digest(loaded) != before
