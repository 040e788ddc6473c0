"""Instruction data by name, hub id, file or folder, and the field layouts of the public sets."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from misa.data.formats import FORMATS, format_of, plain_number
from misa.data.hub import hub_digest
from misa.data.records import write_records
from misa.data.sources import KNOWN, InstructionSource, find_instructions

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "blue"},
    {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"},
]

# One record of each layout as the hub has it, and what it becomes.
LAYOUTS = {
    "mawps": (
        {"id": 1, "original_text": "He had 22 .", "equation": "X=(22.0-8.0)", "ans": 14.0},
        ("He had 22 .", "X=(22.0-8.0)\nThe answer is 14", "14"),
    ),
    "mawps with placeholders": (
        {"Question": "Tom has N_00 and N_01 .", "Numbers": "3.0 0.5", "Equation": "N_00 + N_01", "Answer": 3.5},
        ("Tom has 3 and 0.5 .", "3 + 0.5\nThe answer is 3.5", "3.5"),
    ),
    "svamp": (
        {"Body": "He has 8 pens", "Question": "How many?", "Equation": "( 8.0 - 3.0 )", "Answer": "5.0"},
        ("He has 8 pens. How many?", "( 8.0 - 3.0 )\nThe answer is 5", "5"),
    ),
    "aqua": (
        {"question": "Two?", "options": ["A)21", "B)2 and a half"], "rationale": "Because.", "correct": "B"},
        ("Two? Answer Choices: (A) 21 (B) 2 and a half", "Because.\nThe answer is (B).", "B"),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"},
        ("How many?", "48/2 = 24 clips.\n#### 24", "24"),
    ),
    "boolq": (
        {"question": "is ice cold", "passage": "...", "answer": True},
        (
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "the correct answer is true",
            "true",
        ),
    ),
    "piqa": (
        {"goal": "Keep it.", "sol1": "Box.", "sol2": "Bag.", "label": 1},
        (
            "Please choose the correct solution to the question: Keep it.\n\nSolution1: Box.\n\nSolution2: Bag.\n\n"
            "Answer format: solution1/solution2",
            "the correct answer is solution2",
            "solution2",
        ),
    ),
    "social_i_qa": (
        {"context": "He left.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"},
        (
            "Please choose the correct answer to the question: He left. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
            "Answer format: answer1/answer2/answer3",
            "the correct answer is answer1",
            "answer1",
        ),
    ),
    "hellaswag": (
        {"activity_label": "Travel", "ctx": "They go", "endings": ["a", "b", "c", "d"], "label": "3"},
        (
            "Please choose the correct ending to complete the given sentence: Travel: They go\n\n"
            "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
            "the correct answer is ending4",
            "ending4",
        ),
    ),
    "winogrande": (
        {"sentence": "It fit _ well.", "option1": "jeans", "option2": "shirt", "answer": "2"},
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: It fit _ well.\n\n"
            "Option1: jeans Option2: shirt Answer format: option1/option2",
            "the correct answer is option2",
            "option2",
        ),
    ),
    "openbookqa": (
        {"question_stem": "The sun", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        (
            "Please choose the correct answer to the question: The sun\n\nAnswer1: a Answer2: b\n\n"
            "Answer format: answer1/answer2",
            "the correct answer is answer2",
            "answer2",
        ),
    ),
    "arc": (
        {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        (
            "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
            "Answer format: answer1/answer2/answer3",
            "the correct answer is answer3",
            "answer3",
        ),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_recognised_and_converted(name: str) -> None:
    record, (instruction, output, answer) = LAYOUTS[name]
    layout = format_of(record)
    assert layout.name == name
    assert layout.convert(record) == {"instruction": instruction, "input": "", "output": output, "answer": answer}


def test_every_layout_is_tested() -> None:
    assert {layout.name for layout in FORMATS} == {*LAYOUTS, "alpaca"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"label": -1}, "field 'label' is -1, allowed is 0 to 1"),
        ("hellaswag", {"label": ""}, "field 'label' is ''"),
        ("arc", {"answerKey": "E"}, "field 'answerKey' is 'E', the choices are 1, 2, 3"),
        ("aqua", {"correct": "E"}, "field 'correct' is 'E', which is no option"),
        ("aqua", {"options": ["21"]}, "field 'options' must hold texts such as"),
        ("boolq", {"answer": "yes"}, "field 'answer' must be true or false, found 'yes'"),
        ("mawps", {"ans": "many"}, "'many' is not a number"),
        ("mawps", {"ans": "nan"}, "'nan' is not a finite number"),
        ("svamp", {"Answer": float("inf")}, "inf is not a finite number"),
        ("mawps", {"ans": 10**400}, "is not a number"),
        ("gsm8k", {"answer": 24}, "field 'answer' must be text, found int"),
    ],
)
def test_unusable_answers_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    record = {**LAYOUTS[name][0], **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        format_of(LAYOUTS[name][0]).convert(record)


def test_numbers_are_written_plainly() -> None:
    assert [plain_number(value) for value in (2.0, "72", 0.5, "-3.0")] == ["2", "72", "0.5", "-3"]


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(records).to_parquet(path)


def test_json_lines_list_and_parquet_read_alike(tmp_path: Path) -> None:
    write_records(tmp_path / "lines" / "train.jsonl", ALPACA)
    (tmp_path / "train.json").write_text(json.dumps(ALPACA))
    write_parquet(tmp_path / "table" / "train.parquet", ALPACA)
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", ALPACA[:1])
    write_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", ALPACA[1:])
    for source in ("lines", "train.json", "table", "table/train.parquet", "hub"):
        records, validation, digest = find_instructions(str(tmp_path / source)).read(True)
        assert records == ALPACA
        assert validation == []
        assert len(digest) == 64


def test_folder_of_llm_adapters_is_understood(tmp_path: Path) -> None:
    (tmp_path / "ft-training_set").mkdir()
    (tmp_path / "ft-training_set" / "math_10k.json").write_text(json.dumps(ALPACA))
    (tmp_path / "ft-training_set" / "commonsense_170k.json").write_text(json.dumps(ALPACA[:1]))
    for name in ("gsm8k", "ARC-Easy"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
        (tmp_path / "dataset" / name / "train.json").write_text(json.dumps(ALPACA[1:]))
        (tmp_path / "dataset" / name / "test.json").write_text("[]")
    for name, expected in {
        "math10k": ALPACA,
        "commonsense170k": ALPACA[:1],
        "gsm8k": ALPACA[1:],
        "arc_easy": ALPACA[1:],
    }.items():
        source = find_instructions(name, str(tmp_path))
        assert source.name == name
        assert source.read(False)[0] == expected
    assert find_instructions(str(tmp_path / "dataset" / "gsm8k")).read(False)[0] == ALPACA[1:]
    with pytest.raises(ValueError, match=r"must hold one training file of svamp, such as svamp_train\.json: none"):
        find_instructions("svamp", str(tmp_path))
    with pytest.raises(ValueError, match="data_dir goes with a known name"):
        find_instructions(str(tmp_path), str(tmp_path))
    (tmp_path / "gsm8k_train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must hold one training file of gsm8k.*train\.json, .*gsm8k_train\.json"):
        find_instructions("gsm8k", str(tmp_path))


def test_a_folder_with_several_files_and_none_for_training_is_refused(tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(ALPACA))
    with pytest.raises(ValueError, match=r"has no train\.jsonl, .* it holds one\.json, two\.json"):
        find_instructions(str(tmp_path))
    (tmp_path / "two.json").unlink()
    assert find_instructions(str(tmp_path)).read(False)[0] == ALPACA


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.hub_id] + ["someone/something"])
def test_without_a_hub_the_missing_set_is_named_at_once(name: str) -> None:
    hub_id = KNOWN[name].hub_id if name in KNOWN else name
    begun = time.monotonic()
    with pytest.raises(ValueError, match=f"the hub does not give {hub_id} .*give a local file or folder"):
        find_instructions(name).read(False)
    assert time.monotonic() - begun < 20


def test_splits_of_the_hub_are_read_by_the_same_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder in place of a repository, by the same code."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"How many is {number}?", "answer": f"#### {number}"} for number in range(30)]
    write_records(tmp_path / "owner" / "sums" / "train.jsonl", rows[:20])
    write_records(tmp_path / "owner" / "sums" / "validation.jsonl", rows[20:])
    source = InstructionSource("sums", hub_id="owner/sums")
    train, validation, digest = source.read(True)
    assert [record["answer"] for record in train] == [str(number) for number in range(20)]
    assert [record["answer"] for record in validation] == [str(number) for number in range(20, 30)]
    assert source.read(True)[2] == digest != source.read(False)[2]
    assert source.read(False)[1] == []
    write_records(tmp_path / "owner" / "bad" / "train.jsonl", [*rows[:3], {"question": "x", "answer": None}])
    with pytest.raises(ValueError, match="owner/bad, train, row 4: field 'answer' must be text, found NoneType"):
        InstructionSource("bad", hub_id="owner/bad").read(False)


def test_revision_of_the_hub_is_remembered_for_when_it_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"id": "owner/texts", "sha": self.server.revision}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    unknown = hub_digest("owner/other", None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        digests = []
        for server.revision in ("a" * 40, "b" * 40):
            digests.append(hub_digest("owner/texts", None))
        server.shutdown()
    assert digests[0] != digests[1]
    assert hub_digest("owner/texts", None) == digests[1] != hub_digest("owner/texts", "en")
    assert hub_digest("owner/other", None) == unknown


def test_names_mean_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_instructions("vicgalle/alpaca-gpt4").hub_id == "vicgalle/alpaca-gpt4"
    assert find_instructions("openai/gsm8k").config == find_instructions("gsm8k").config == "main"
    assert find_instructions("allenai/ai2_arc").config is None
    # A set of that name, but somebody's own.
    assert find_instructions("someone/gsm8k").hub_id == "someone/gsm8k"
    assert find_instructions("datasets/Commonsense170k").hub_id == "zwhe99/commonsense_170k"
    with pytest.raises(ValueError, match="math10k has no verified hub id"):
        find_instructions("datasets/Math10k")
    (tmp_path / "datasets" / "Math10k").mkdir(parents=True)
    (tmp_path / "datasets" / "Math10k" / "math_10k.json").write_text(json.dumps(ALPACA))
    assert find_instructions("datasets/Math10k").read(False)[0] == ALPACA
    (tmp_path / "folder").mkdir()
    for missing in ("./nowhere", "/nowhere/else", "nowhere", "a/b/c", "d/nofile.json", "folder/nothing"):
        with pytest.raises(ValueError, match="is neither a folder nor a file"):
            find_instructions(missing)


def test_malformed_records_are_counted_named_and_left_out_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps(record) for record in ALPACA * 4]
    lines[2] = '{"instruction": "x"}'
    lines[5] = "{"
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    source = find_instructions(str(tmp_path))
    with pytest.raises(ValueError, match=r"line 3: field 'output' is missing.*line 6: not valid JSON.*2 of 8 records"):
        source.read(False)
    with pytest.raises(ValueError, match=r"2 of 8 records malformed, max_malformed allows a share of 0\.2"):
        source.read(False, 0.2)
    with caplog.at_level(logging.WARNING):
        assert len(source.read(False, 0.25)[0]) == 6
    assert len(caplog.records) == 1
    assert "2 of 8 records malformed and left out" in caplog.text
    assert f"{tmp_path / 'train.jsonl'}, line 3" in caplog.text
    with pytest.raises(ValueError, match=r"max_malformed is 1, allowed is a share from 0 to below 1"):
        source.read(False, 1)


def test_half_a_character_in_any_field_is_named_with_its_line(tmp_path: Path) -> None:
    half = {**ALPACA[1], "input": "\ud83d"}
    nested = {**ALPACA[1], "notes": ["\udc00"]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*ALPACA, half, nested]))
    with pytest.raises(ValueError, match=r"line 3: field 'input' holds half a.*line 4: field 'notes' holds half a"):
        find_instructions(str(tmp_path)).read(False)
    assert find_instructions(str(tmp_path)).read(False, 0.9)[0] == ALPACA


def test_malformed_rows_of_a_table_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [*ALPACA, {"instruction": "x", "input": None, "output": " "}])
    with pytest.raises(ValueError, match=r"train\.parquet, row 3: field 'output' is empty"):
        find_instructions(str(tmp_path)).read(False)
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"train\.parquet: not a Parquet file"):
        find_instructions(str(tmp_path)).read(False)


def test_only_a_few_of_many_malformed_records_are_named(tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", [ALPACA[0], *[{"instruction": "x"}] * 50])
    with pytest.raises(ValueError, match=r"50 of 51") as raised:
        find_instructions(str(tmp_path)).read(False)
    assert str(raised.value).count(", line ") == 3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k", 7473),
        ("mawps", 1898),
        ("arc_easy", 2251),
        ("arc_challenge", 1119),
        ("openbookqa", 4957),
        ("boolq", 9427),
    ],
)
def test_local_copies_of_public_sets_are_read(real_data: Path, name: str, count: int) -> None:
    records, _, _ = find_instructions(name, str(real_data)).read(False)
    assert len(records) == count
    for record in records:
        assert record["instruction"]
        assert record["answer"] in record["output"]
        assert "<<" not in record["output"] or name != "gsm8k"


def test_hub_layouts_word_questions_as_the_local_files_do(real_data: Path) -> None:
    """The same question from the hub's fields must give the published instruction, character for character."""
    record = find_instructions("arc_challenge", str(real_data)).read(False)[0][0]
    texts = ["dry palms", "wet palms", "palms covered with oil", "palms covered with lotion"]
    question = "George wants to warm his hands quickly by rubbing them. Which skin surface will produce the most heat?"
    hub = {"question": question, "choices": {"text": texts, "label": list("ABCD")}, "answerKey": "A"}
    assert format_of(hub).convert(hub) == record
    record = find_instructions("boolq", str(real_data)).read(False)[0][0]
    hub = {"question": "do iran and afghanistan speak the same language", "passage": "", "answer": True}
    assert format_of(hub).convert(hub) == record
