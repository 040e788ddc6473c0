"""Reading records: every fault is named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from misa.data.records import already_made, find_split, read_records, require_split, write_digest, write_records

RECORDS = [{"text": "one"}, {"text": "zwei ü 二\u2028\r\nline"}]


def test_lines_and_lists_read_alike(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    assert read_records(tmp_path / "a.jsonl", ["text"]) == RECORDS
    assert read_records(tmp_path / "a.json", ["text"]) == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "x", "n": 1}\n', r"line 2: field 'text' is missing; .* 'txt', 'n'"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: field 'text' must be text, found int"),
        ("a.jsonl", '["x"]\n', r"line 1: expected a JSON object, found list"),
        ("a.jsonl", "\n\n", r"holds no records"),
        ("a.json", '{"text": "x"}', r"a\.json: expected a list of records, found dict"),
        ("a.json", '[{"text": "x"},\n {"text" 1}]', r"a\.json, line 2: not valid JSON"),
        ("a.json", '[{"text": "x"}, {}]', r"a\.json, record 2: field 'text' is missing"),
        ("a.json", "[]", r"holds no records"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "\\ud83d"}\n',
            r"line 2: field 'text' holds half a character \('\\ud83d'\)",
        ),
        ("a.json", '[{"text": "\\ud83d"}]', r"record 1: field 'text' holds half a character"),
        ("a.jsonl", f'{{"text": "x", "n": {"1" * 5000}}}\n', r"line 1: JSON that cannot be read \(.*digits"),
        ("a.json", f'[{{"text": "x", "n": {"1" * 5000}}}]', r"a\.json: JSON that cannot be read \(.*digits"),
        ("a.jsonl", "[" * 100_000, r"line 1: JSON that cannot be read \(.*recursion"),
    ],
)
def test_malformed_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name, ["text"])


def test_lines_that_cannot_be_read_or_written_count_as_malformed(tmp_path: Path) -> None:
    lines = ['{"text": "\\ud83d\\ude00"}', '{"text": "\\ud83d"}', f'{{"n": {"1" * 5000}}}', '{"text": "x"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_records(tmp_path / "a.jsonl", ["text"], 0.5) == [{"text": "😀"}, {"text": "x"}]


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes('[{"text": "Zürich"}]'.encode("latin-1"))
        with pytest.raises(ValueError, match="not UTF-8 text"):
            read_records(tmp_path / name, ["text"])


def test_splits_are_found_in_folders_and_files(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "test.json").write_text("[]")
    assert find_split(tmp_path, "train") == tmp_path / "train.jsonl"
    assert find_split(tmp_path, "test") == tmp_path / "test.json"
    assert find_split(tmp_path, "validation") is None
    assert find_split(tmp_path / "train.jsonl", "train") == tmp_path / "train.jsonl"
    assert find_split(tmp_path / "train.jsonl", "test") is None
    with pytest.raises(ValueError, match=r"has no validation\.jsonl or .*\.parquet; it holds test\.json, train"):
        require_split(tmp_path, "validation")
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        find_split(tmp_path / "elsewhere", "train")


def test_made_data_is_recognised_by_settings_and_content(tmp_path: Path) -> None:
    assert not already_made(tmp_path, "texts", {"seed": 1})
    write_records(tmp_path / "train.jsonl", RECORDS)
    write_digest(tmp_path, "texts", {"seed": 1}, ["train.jsonl"])
    assert already_made(tmp_path, "texts", {"seed": 1})
    with pytest.raises(ValueError, match="seed is 1 there and 2 here"):
        already_made(tmp_path, "texts", {"seed": 2})
    with pytest.raises(ValueError, match="kind is 'texts' there and 'family' here"):
        already_made(tmp_path, "family", {"seed": 1})
    write_records(tmp_path / "train.jsonl", RECORDS[:1])
    with pytest.raises(ValueError, match=r"train\.jsonl is missing or was changed"):
        already_made(tmp_path, "texts", {"seed": 1})
    (tmp_path / "digest.json").write_text("{")
    with pytest.raises(ValueError, match="malformed"):
        already_made(tmp_path, "texts", {"seed": 1})
