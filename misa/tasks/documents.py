"""What the task files call: documents out of a local folder, the prompt they were trained with, and the score."""

from __future__ import annotations

import re
import string
from typing import Any

from misa.data.instruction import read_instructions, record_prompt
from misa.data.records import read_records, require_split

# The answers of the family-relations questions.
RELATIONS = frozenset(
    [
        "mother",
        "father",
        "sister",
        "brother",
        "daughter",
        "son",
        "wife",
        "husband",
        "grandmother",
        "grandfather",
        "aunt",
        "uncle",
        "niece",
        "nephew",
        "mother-in-law",
        "father-in-law",
    ]
)


def load_test(data_dir: str, **_: Any) -> dict[str, Any]:
    """Read the instruction records of `test.jsonl`.

    Args:
        data_dir: Folder with `test.jsonl` or `test.json`.

    Returns:
        The split "test" with the fields instruction, input, output, answer; a record without an answer is scored
        against its output.

    Raises:
        ValueError: If the file is missing or malformed.
    """
    from datasets import Dataset

    records = read_instructions(require_split(data_dir, "test"))
    fields = ("instruction", "input", "output", "answer")
    filled = [{"input": "", "answer": record["output"], **record} for record in records]
    return {"test": Dataset.from_list([{field: record[field] for field in fields} for record in filled])}


def load_validation(data_dir: str, **_: Any) -> dict[str, Any]:
    """Read the documents of `validation.jsonl`, field text.

    Args:
        data_dir: Folder with `validation.jsonl`.

    Raises:
        ValueError: If the file is missing or malformed.
    """
    from datasets import Dataset

    records = read_records(require_split(data_dir, "validation"), ("text",))
    return {"validation": Dataset.from_list([{"text": record["text"]} for record in records])}


def prompt(doc: dict[str, Any]) -> str:
    """Return the prompt of a document, the same that training uses."""
    return record_prompt(doc)


def normalise(text: str) -> str:
    """Return the first line that is not empty, in lower case, without punctuation around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].lower().strip(string.punctuation + string.whitespace) if lines else ""


def first_relation(text: str) -> str:
    """Return the first word of a text that names a family relation, or "" if there is none."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())
    return next((word for word in words if word in RELATIONS), "")


def score_relation(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one response to a family-relations question.

    Args:
        doc: The document, with its `answer`.
        results: The response.

    Returns:
        exact_match: 1 if the first line is the answer and nothing else, as the question asks for.
        relation_match: 1 if the first relation that the response names is the answer. A model that was never taught
            to answer in one word can score here.
    """
    answer = normalise(doc["answer"])
    return {
        "exact_match": float(normalise(results[0]) == answer),
        "relation_match": float(first_relation(results[0]) == answer),
    }
