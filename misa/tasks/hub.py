"""The paper's test sets from the hub: Parquet copies, put into the words of LLM-Adapters.

MAWPS has no entry: its 238 test problems are a selection that only LLM-Adapters has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# The branch on which the hub keeps a Parquet copy of a data set that has a loading script.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class Source:
    """Where a test set lies on the hub, and how one of its rows becomes a document.

    Attributes:
        hub_id: Data set on the hub.
        config: Its configuration, or None.
        splits: Splits that make up the test set, in order.
        convert: Row -> (instruction, answer).
        revision: Branch or commit.
    """

    hub_id: str
    config: str | None
    splits: tuple[str, ...]
    convert: Callable[[Row], tuple[str, str]]
    revision: str = "main"


def fetch_test(dataset: str) -> list[dict[str, str]]:
    """Fetch a test set from the hub, or from the cache of an earlier fetch.

    Args:
        dataset: A name of a benchmark.

    Returns:
        Records with instruction, input and answer.

    Raises:
        ValueError: If the hub has no copy of it, or cannot be reached.
    """
    from misa.tasks.benchmarks import BENCHMARKS, ORIGIN

    if dataset not in SOURCES:
        origin = f": {ORIGIN}/{BENCHMARKS[dataset].folder}" if dataset in BENCHMARKS else ""
        raise ValueError(f"{dataset} is on no hub; put it into a folder and name that as data_dir{origin}")
    source = SOURCES[dataset]
    import datasets

    records = []
    for split in source.splits:
        try:
            rows = datasets.load_dataset(source.hub_id, source.config, split=split, revision=source.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{dataset}: cannot get {source.hub_id} (split {split}, revision {source.revision}) from the hub: "
                f"{str(error).splitlines()[0]}; with data_dir a local folder is read instead"
            ) from error
        for row in rows:
            instruction, answer = source.convert(row)
            records.append({"instruction": instruction, "input": "", "answer": answer})
    return records


def choice_instruction(question: str, word: str, choices: Sequence[str], ask: str = "", between: str = " ") -> str:
    """Put a question with choices into the words of LLM-Adapters.

    Args:
        question: The question.
        word: What a choice is called: solution, answer, ending or option.
        choices: The choices, named word1, word2, ...
        ask: What stands before the question, without the colon; default: to choose the correct `word`.
        between: What stands between the choices.
    """
    ask = ask or f"Please choose the correct {word} to the question"
    labels = [f"{word}{number}" for number in range(1, len(choices) + 1)]
    listed = between.join(f"{label.capitalize()}: {choice}" for label, choice in zip(labels, choices, strict=True))
    return f"{ask}: {question}\n\n{listed}\n\nAnswer format: {'/'.join(labels)}"


def _gsm8k(row: Row) -> tuple[str, str]:
    return row["question"], row["answer"].rsplit("####", 1)[1].strip()


def _svamp(row: Row) -> tuple[str, str]:
    body = row["Body"].strip()
    return f"{body}{'' if body.endswith('.') else '.'} {row['Question'].strip()}", str(row["Answer"])


def _aqua(row: Row) -> tuple[str, str]:
    choices = " ".join("({}) {}".format(*option.split(")", 1)) for option in row["options"])
    return f"{row['question']} Answer Choices: {choices}", row["correct"]


def _boolq(row: Row) -> tuple[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{question}\n\nAnswer format: true/false", str(bool(row["answer"])).lower()


def _piqa(row: Row) -> tuple[str, str]:
    choices = (row["sol1"], row["sol2"])
    return choice_instruction(row["goal"], "solution", choices, between="\n\n"), f"solution{int(row['label']) + 1}"


def _siqa(row: Row) -> tuple[str, str]:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return choice_instruction(f"{row['context']} {row['question']}", "answer", choices), f"answer{int(row['label'])}"


def _hellaswag(row: Row) -> tuple[str, str]:
    ask = "Please choose the correct ending to complete the given sentence"
    sentence = f"{row['activity_label']}: {row['ctx']}"
    return choice_instruction(sentence, "ending", row["endings"], ask), f"ending{int(row['label']) + 1}"


def _winogrande(row: Row) -> tuple[str, str]:
    ask = "Please choose the correct answer to fill in the blank to complete the given sentence"
    return choice_instruction(
        row["sentence"], "option", (row["option1"], row["option2"]), ask
    ), f"option{row['answer']}"


def _arc(row: Row) -> tuple[str, str]:
    choices = row["choices"]
    question = row.get("question") or row["question_stem"]
    answer = f"answer{list(choices['label']).index(row['answerKey'].strip()) + 1}"
    return choice_instruction(question, "answer", choices["text"]), answer


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", ("test",), _gsm8k),
    "svamp": Source("ChilleD/SVAMP", None, ("train", "test"), _svamp),
    "aqua": Source("deepmind/aqua_rat", "raw", ("test",), _aqua),
    "boolq": Source("google/boolq", None, ("validation",), _boolq),
    "piqa": Source("ybisk/piqa", None, ("validation",), _piqa, CONVERTED),
    "siqa": Source("allenai/social_i_qa", None, ("validation",), _siqa, CONVERTED),
    "hellaswag": Source("Rowan/hellaswag", None, ("validation",), _hellaswag, CONVERTED),
    "winogrande": Source("allenai/winogrande", "winogrande_xl", ("validation",), _winogrande, CONVERTED),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", ("test",), _arc),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", ("test",), _arc),
    "openbookqa": Source("allenai/openbookqa", "main", ("test",), _arc),
}
