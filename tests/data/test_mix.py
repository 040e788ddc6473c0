"""Several real sets as one training file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from misa.data.__main__ import main
from misa.data.mix import make_mix
from misa.data.records import read_records, write_records


def question(text: str, number: int = 1) -> dict[str, str]:
    return {
        "instruction": text,
        "input": "",
        "output": f"the correct answer is answer{number}",
        "answer": f"answer{number}",
    }


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Two sets, of which one overlaps with its own test set, and repeats a question of the other."""
    folder = tmp_path / "sets"
    write_records(folder / "arc_easy_train.jsonl", [question(f"easy {i}") for i in range(20)])
    write_records(folder / "arc_easy_test.jsonl", [question("easy 3"), question("new")])
    write_records(folder / "openbookqa_train.jsonl", [question(f"open {i}") for i in range(10)] + [question("easy 5")])
    return folder


def test_mix_holds_every_question_once_and_none_of_the_tests(sets: Path, tmp_path: Path) -> None:
    assert make_mix(tmp_path / "mix", ["arc_easy", "openbookqa"], str(sets))
    questions = [record["instruction"] for record in read_records(tmp_path / "mix" / "train.jsonl", ("answer",))]
    assert sorted(questions) == sorted([f"easy {i}" for i in range(20) if i != 3] + [f"open {i}" for i in range(10)])
    assert questions != sorted(questions)
    digest = json.loads((tmp_path / "mix" / "digest.json").read_text())
    assert (digest["records"], digest["left_out"]) == ({"arc_easy": 20, "openbookqa": 11}, 2)


def test_mix_is_made_once_and_follows_its_seed_and_sources(sets: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert make_mix(tmp_path / name, ["arc_easy"], str(sets))
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "two" / "train.jsonl").read_bytes()
    assert not make_mix(tmp_path / "one", ["arc_easy"], str(sets))
    make_mix(tmp_path / "other", ["arc_easy"], str(sets), seed=1)
    assert (tmp_path / "one" / "train.jsonl").read_bytes() != (tmp_path / "other" / "train.jsonl").read_bytes()
    write_records(sets / "arc_easy_train.jsonl", [question("changed")])
    with pytest.raises(ValueError, match="holds other data: sources"):
        make_mix(tmp_path / "one", ["arc_easy"], str(sets))


def test_records_of_one_instruction_are_told_apart_by_their_input(tmp_path: Path) -> None:
    records = [{"instruction": "Classify.", "input": f"sentence {i}", "output": f"class {i}"} for i in range(5)]
    write_records(tmp_path / "alpaca_gpt4_train.jsonl", [*records, records[0], {"instruction": "Hi.", "output": "Hi."}])
    write_records(tmp_path / "alpaca_gpt4_test.jsonl", [{**records[1], "output": ""}])
    assert make_mix(tmp_path / "mix", ["alpaca-gpt4"], str(tmp_path))
    made = read_records(tmp_path / "mix" / "train.jsonl", ("input", "output"))
    assert sorted(record["output"] for record in made) == ["Hi.", *(f"class {i}" for i in (0, 2, 3, 4))]


def test_test_file_that_came_later_asks_for_another_mix(sets: Path, tmp_path: Path) -> None:
    assert make_mix(tmp_path / "mix", ["openbookqa"], str(sets))
    write_records(sets / "openbookqa_test.jsonl", [question("open 3")])
    with pytest.raises(ValueError, match="holds other data: tests is"):
        make_mix(tmp_path / "mix", ["openbookqa"], str(sets))


def test_answers_of_tests_need_not_be_there(sets: Path, tmp_path: Path) -> None:
    write_records(sets / "arc_easy_test.jsonl", [{**question("easy 3"), "output": ""}, question("new")])
    assert make_mix(tmp_path / "mix", ["arc_easy"], str(sets))
    questions = {record["instruction"] for record in read_records(tmp_path / "mix" / "train.jsonl", ("answer",))}
    assert questions == {f"easy {i}" for i in range(20) if i != 3}


def test_mix_of_the_real_sets_can_be_made(real_data: Path, tmp_path: Path) -> None:
    assert make_mix(tmp_path / "math", ["gsm8k", "mawps"], str(real_data))
    assert len(read_records(tmp_path / "math" / "train.jsonl", ("instruction", "output"))) > 9000


def test_records_of_tests_need_no_output(sets: Path, tmp_path: Path) -> None:
    """Evaluation takes an instruction and an answer."""
    write_records(sets / "arc_easy_test.jsonl", [{"instruction": "easy 3", "answer": "answer1"}])
    assert make_mix(tmp_path / "mix", ["arc_easy"], str(sets))
    questions = [record["instruction"] for record in read_records(tmp_path / "mix" / "train.jsonl", ("answer",))]
    assert sorted(questions) == sorted(f"easy {i}" for i in range(20) if i != 3)


def test_wrong_sets_are_named(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="arc_easy, arc_easy; name at least one, and none twice"):
        make_mix(tmp_path / "mix", ["arc_easy", "arc_easy"], str(sets))
    words = ["mix", "--sets", "piqa", "--data_dir", str(sets), "--output_dir", str(tmp_path / "mix")]
    assert main(words) == 2
    assert "must hold one training file of piqa" in capsys.readouterr().err
