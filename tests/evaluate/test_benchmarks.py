"""The twelve benchmarks: found in either layout, refused with a pointer to their origin, asked in the right words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from misa.data.formats import format_of
from misa.evaluation.scoring import data_files, expand, group_tasks, task_digest
from misa.evaluation.standard import STANDARD_TASKS, choice_row, files_of, local_config, number_row, task_folder
from misa.tasks.benchmarks import BENCHMARKS, find_test, load, prompt, read_test
from misa.tasks.hub import SOURCES, fetch_test

RECORD = {"instruction": "What is 2 + 3?", "input": "", "output": "6", "answer": "5.0"}
CHOICE = {
    "instruction": "Please choose the correct answer to the question: Why: is it so?\n\n"
    "Answer1: because. Answer2: of Answer 1 Answer3: no idea\n\nAnswer format: answer1/answer2/answer3",
    "answer": "answer2",
}


@pytest.mark.parametrize(
    "place",
    ["SVAMP/test.json", "dataset/SVAMP/test.json", "math/svamp_test.json", "svamp_test.json", "SVAMP/test.jsonl"],
)
def test_test_set_is_found_in_every_layout(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(RECORD if path.suffix == ".jsonl" else [RECORD]))
    assert find_test("svamp", tmp_path) == path
    assert load("svamp", str(tmp_path), version=1.0)["test"][0] == {
        "instruction": "What is 2 + 3?",
        "input": "",
        "answer": "5.0",
    }


def test_missing_test_set_names_places_and_origin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"piqa/test\.json.*commonsense/piqa_test\.json.*LLM-Adapters.*dataset/piqa"):
        find_test("piqa", tmp_path)


def test_answers_are_read_from_lists_and_numbers_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "aqua_test.json"
    for answer, expected in ((["C"], "C"), (7, "7"), ("B", "B")):
        path.write_text(json.dumps([{"instruction": "?", "answer": answer}]))
        assert read_test("aqua", tmp_path) == [{"instruction": "?", "input": "", "answer": expected}]
    for answer in (None, ["A", "B"], {}):
        path.write_text(json.dumps([{"instruction": "?", "answer": answer}]))
        with pytest.raises(ValueError, match="record 1: field 'answer'"):
            read_test("aqua", tmp_path)


@pytest.mark.parametrize("task", ["misa_svamp", "svamp"])
@pytest.mark.parametrize("answer", ["two", "", "nan", "1e999"])
def test_answer_that_is_no_number_is_named_before_anything_is_scored(tmp_path: Path, task: str, answer: str) -> None:
    (tmp_path / "svamp_test.json").write_text(json.dumps([RECORD, RECORD | {"answer": answer}]))
    (tmp_path / "gsm8k_train.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match=rf"svamp_test\.json, record 2: field 'answer' must be a number: '{answer}' is"
    ):
        data_files([task], str(tmp_path))


def choices(answer: object, **more: object) -> dict[str, object]:
    labels = [f"answer{number}" for number in range(1, 5)]
    listed = " ".join(f"{label.capitalize()}: c" for label in labels)
    text = f"Please choose the correct answer to the question: Q?\n\n{listed}\n\nAnswer format: {'/'.join(labels)}"
    return {"instruction": text, "answer": answer, **more}


# A record that can be scored, where it is no choice of four.
SOUND = {
    "misa_boolq": {"instruction": "?", "answer": "true"},
    "misa_aqua": {"instruction": "?", "answer": ["A"]},
    "misa_family": {"instruction": "?", "output": "son"},
}


@pytest.mark.parametrize(
    ("task", "file", "record", "message"),
    [
        ("misa_boolq", "boolq_test", {"instruction": "?", "answer": True}, "must be text or a number, found True"),
        ("misa_boolq", "boolq_test", {"instruction": "?", "answer": "True"}, r"is 'True', allowed is true\|false"),
        ("misa_aqua", "aqua_test", {"instruction": "?", "answer": ["a"]}, r"is 'a', allowed is \[A-E\]"),
        ("misa_arc_easy", "arc_easy_test", choices("C"), r"is 'C', allowed is .*answer\[1-5\]"),
        ("misa_arc_easy", "arc_easy_test", choices("3"), "is '3', allowed is"),
        (
            "misa_arc_easy",
            "arc_easy_test",
            choices("answer5"),
            "is 'answer5', the instruction allows answer1/.*answer4",
        ),
        (
            "arc_easy",
            "arc_easy_test",
            choices("answer5"),
            "is 'answer5', allowed is answer1, answer2, answer3, answer4",
        ),
        ("arc_easy", "arc_easy_test", choices("answer0"), "is 'answer0', allowed is answer1, answer2"),
        ("arc_easy", "arc_easy_test", {"instruction": "?", "answer": "answer1"}, "no question with Answer1"),
        ("misa_arc_easy", "arc_easy_test", choices("answer1", input=5), "field 'input' must be text, found 5"),
        (
            "misa_family",
            "test",
            {"instruction": "?", "output": "x", "answer": 5},
            "field 'answer' is 5, allowed is text",
        ),
        ("misa_family", "test", {"instruction": "?", "output": ""}, "field 'output' is '', allowed is text"),
    ],
)
def test_answer_that_cannot_be_scored_is_named_before_anything_is(
    tmp_path: Path, task: str, file: str, record: dict, message: str
) -> None:
    lines = [json.dumps(SOUND.get(task, choices("answer4"))), json.dumps(record)]
    (tmp_path / f"{file}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"{file}\.jsonl, line 2: .*{message}"):
        data_files([task], str(tmp_path))
    (tmp_path / f"{file}.jsonl").write_text(lines[0])
    assert data_files([task], str(tmp_path))


def test_validation_text_without_a_byte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"validation\.jsonl has no text in any record"):
        data_files(["perplexity"], str(tmp_path))


def test_prompt_is_that_of_training() -> None:
    from misa.data.instruction import format_prompt

    assert prompt({"instruction": "Why?", "input": "", "answer": "5"}) == format_prompt("Why?")


def test_families_are_those_of_the_paper() -> None:
    assert group_tasks("math", "paper") == ["misa_gsm8k", "misa_svamp", "misa_aqua", "misa_mawps"]
    assert len(group_tasks("commonsense", "paper")) == 8
    assert group_tasks("math", "harness") == ["gsm8k", "svamp", "agieval_aqua_rat", "mawps"]
    assert expand(["misa_math", "misa_gsm8k", "arc_easy"]) == [*group_tasks("math", "paper"), "arc_easy"]
    sizes = [benchmark.num_documents for benchmark in BENCHMARKS.values()]
    assert sizes == [1319, 1000, 254, 238, 3270, 1838, 1954, 10042, 1267, 2376, 1172, 500]


def test_offline_without_local_data_names_the_hub() -> None:
    with pytest.raises(ValueError, match=r"offline.*misa_gsm8k would come from .*openai/gsm8k"):
        data_files(["misa_gsm8k"], None, offline=True)
    assert data_files(["misa_gsm8k", "mmlu"], None) == {"misa_gsm8k": [], "mmlu": []}


def test_task_that_needs_the_hub_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task mmlu reads no local folder"):
        files_of("mmlu", str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "row", "instruction", "answer"),
    [
        ("gsm8k", {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, "How many?", "1,002"),
        (
            "svamp",
            {"Body": "He had 3,", "Question": "How many? ", "Equation": "3", "Answer": "3.0"},
            "He had 3, How many?",
            "3",
        ),
        (
            "aqua",
            {"question": "How much?", "options": ["A)1 gm", "B) 2 gms"], "rationale": "", "correct": "B"},
            "How much? Answer Choices: (A) 1 gm (B) 2 gms",
            "B",
        ),
        (
            "boolq",
            {"question": "is it so?", "passage": "It is.", "answer": True},
            "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false",
            "true",
        ),
        (
            "piqa",
            {"goal": "Sit.", "sol1": "On it.", "sol2": "Below it.", "label": 1},
            "Please choose the correct solution to the question: Sit.\n\nSolution1: On it.\n\nSolution2: Below it.\n\n"
            "Answer format: solution1/solution2",
            "solution2",
        ),
        (
            "siqa",
            {"context": "He left.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
            "Please choose the correct answer to the question: He left. Why?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer3",
        ),
        (
            "hellaswag",
            {"activity_label": "Skiing", "ctx": "She", "endings": ["a", "b", "c", "d"], "label": "0"},
            "Please choose the correct ending to complete the given sentence: Skiing: She\n\n"
            "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
            "ending1",
        ),
        (
            "winogrande",
            {"sentence": "He met _.", "option1": "Al", "option2": "Bo", "answer": "2"},
            "Please choose the correct answer to fill in the blank to complete the given sentence: He met _.\n\n"
            "Option1: Al Option2: Bo Answer format: option1/option2",
            "option2",
        ),
        (
            "openbookqa",
            {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B "},
            "Please choose the correct answer to the question: Ice is\n\nAnswer1: hot Answer2: cold\n\n"
            "Answer format: answer1/answer2",
            "answer2",
        ),
    ],
)
def test_hub_rows_become_the_words_of_training(
    monkeypatch: pytest.MonkeyPatch, dataset: str, row: dict, instruction: str, answer: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    records = fetch_test(dataset)
    assert records == [{"instruction": instruction, "input": "", "answer": answer}] * len(SOURCES[dataset].splits)
    assert records[0]["instruction"] == format_of(row).convert(row)["instruction"]


def test_task_is_another_one_where_questions_are_worded_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from misa.data import formats

    tasks = ("misa_boolq", "misa_family", "boolq")
    before = [task_digest(task) for task in tasks]
    (tmp_path / "formats.py").write_text("other words")
    monkeypatch.setattr(formats, "__file__", str(tmp_path / "formats.py"))
    assert [task_digest(task) == digest for task, digest in zip(tasks, before, strict=True)] == [False, True, True]


def test_malformed_row_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row = {"question": "is it so", "passage": "", "answer": "yes"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    with pytest.raises(ValueError, match="google/boolq, validation, row 1: field 'answer' must be true or false"):
        fetch_test("boolq")


def test_only_mawps_is_on_no_hub() -> None:
    assert set(BENCHMARKS) - set(SOURCES) == {"mawps"}
    with pytest.raises(ValueError, match=r"mawps is on no hub.*LLM-Adapters"):
        fetch_test("mawps")


def test_choices_are_taken_apart() -> None:
    row = choice_row(CHOICE)
    assert row["question"] == row["question_stem"] == "Why: is it so?"
    assert row["choices"] == {"text": ["because.", "of Answer 1", "no idea"], "label": ["A", "B", "C"]}
    assert row["answerKey"] == "B"
    with pytest.raises(ValueError, match="no question with Answer1"):
        choice_row(RECORD)


def test_hub_and_back_gives_the_same_row() -> None:
    """The words of LLM-Adapters made from a hub row hold all that the harness's task needs."""
    row = {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    back = choice_row(format_of(row).convert(row))
    assert (back["question"], back["choices"]["text"], back["answerKey"]) == ("Why?", ["x", "y"], "B")


def test_numbers_lose_an_empty_fraction() -> None:
    assert number_row(RECORD)["answer"] == "#### 5"
    assert number_row(RECORD | {"answer": "0.25"})["answer"] == "#### 0.25"


@pytest.mark.parametrize("task", STANDARD_TASKS)
def test_files_of_the_harness_are_there(task: str) -> None:
    assert list(task_folder(task).rglob("*.yaml"))


def test_local_task_keeps_the_harness_prompt_and_metrics(real_data: Path) -> None:
    config = local_config("arc_easy", str(real_data))
    assert config["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc", "acc_norm"]
    assert "dataset_path" not in config
    test = config["custom_dataset"](version=1.0, data_dir="elsewhere")["test"]
    assert len(test) == 2376


@pytest.mark.parametrize("dataset", ["gsm8k", "svamp", "mawps", "boolq", "arc_easy", "arc_challenge", "openbookqa"])
def test_public_files_have_the_published_sizes_and_an_answer_each(real_data: Path, dataset: str) -> None:
    from misa.tasks import answers

    records = read_test(dataset, real_data)
    assert len(records) == BENCHMARKS[dataset].num_documents
    score = {"boolq": answers.score_truth}.get(
        dataset, answers.score_number if BENCHMARKS[dataset].family == "math" else answers.score_label
    )
    assert all(score(record, [record["answer"]])["acc"] == 1.0 for record in records)
