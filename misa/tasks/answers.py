"""Read the answer out of a model's text by the rules of the paper's evaluation, and score it.

The rules are loose on purpose, since published scores were made with them: the text is not cut at a new heading, and
whatever matches counts, wherever it stands. They are those of LLM-Adapters (arXiv 2304.01933) as the paper uses them.
"""

from __future__ import annotations

import math
import re
from typing import Any

from misa.data.formats import plain_number

# A number is right if it is this close.
TOLERANCE = 1e-3

NUMBER = re.compile(r"-?\d+\.?\d*")

# The word that a question asks for -> how many answers there can be.
LABELS = {"solution": 2, "answer": 5, "ending": 4, "option": 2}

# Scorer -> what the answer of a document can be; against another one no response would ever be right.
ANSWERS = {
    "score_letter": "[A-E]",
    "score_truth": "true|false",
    "score_label": "|".join(f"{word}[1-{count}]" for word, count in LABELS.items()),
}


def extract_number(text: str) -> float | None:
    """Return the last number of a text, or None if there is none.

    Commas are dropped first, so `1,250` is one number, and so is `3,4`. A minus directly before a digit belongs to the
    number, also in `10-5`. Units, currency signs, fractions and powers are not understood: `3/4` gives 4.
    """
    found = NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def extract_letter(text: str) -> str | None:
    """Return the last capital letter from A to E, be it inside a word, or None if there is none."""
    return next((letter for letter in reversed(text) if letter in "ABCDE"), None)


def extract_truth(text: str) -> str | None:
    """Return the first `true` or `false` of a text in lower case, be it inside a word, or None if there is none."""
    found = re.search("true|false", text.lower())
    return found.group() if found else None


def extract_label(text: str, word: str) -> str | None:
    """Return the first label of a text in lower case, such as `answer3`, or None if there is none.

    Args:
        text: The response. `Answer 3` and the text of a choice are no labels.
        word: A key of `LABELS`: solution, answer, ending or option.
    """
    found = re.search(f"{word}[1-{LABELS[word]}]", text.lower())
    return found.group() if found else None


def score_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a response against the number in `answer`, which may itself have commas."""
    found = extract_number(results[0])
    gold = float(str(doc["answer"]).replace(",", ""))
    return _scores(found is not None and math.isclose(found, gold, rel_tol=0, abs_tol=TOLERANCE), found)


def score_letter(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a response against the letter in `answer`."""
    found = extract_letter(results[0])
    return _scores(found == doc["answer"], found)


def score_truth(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a response against `true` or `false` in `answer`."""
    found = extract_truth(results[0])
    return _scores(found == doc["answer"], found)


def score_label(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a response against a label in `answer`, such as `option2`."""
    found = extract_label(results[0], doc["answer"].rstrip("0123456789"))
    return _scores(found == doc["answer"], found)


def plain_answer(answer: str) -> str:
    """Return the number that an answer is, without commas and without a needless ".0".

    Raises:
        ValueError: If it is no number, or not a finite one.
    """
    try:
        return plain_number(answer.replace(",", ""))
    except ValueError as error:
        raise ValueError(f"field 'answer' must be a number: {error}") from None


def require_answer(doc: dict[str, Any], scorer: str) -> None:
    """Check that a response can be right by the answer of a document.

    Args:
        doc: The document, with `instruction` and `answer`.
        scorer: Name of the function here that scores it; of a function elsewhere nothing is known or checked.

    Raises:
        ValueError: If none can be; the message says what is allowed.
    """
    if scorer == score_number.__name__:
        plain_answer(doc["answer"])
    elif scorer in ANSWERS:
        if not re.fullmatch(ANSWERS[scorer], doc["answer"]):
            raise ValueError(f"field 'answer' is {doc['answer']!r}, allowed is {ANSWERS[scorer]}")
        _, says_format, labels = doc["instruction"].rpartition("Answer format: ")
        if says_format and doc["answer"] not in labels.strip().split("/"):
            raise ValueError(f"field 'answer' is {doc['answer']!r}, the instruction allows {labels.strip()}")


def _scores(is_right: bool, found: Any) -> dict[str, float]:
    """`acc`, and `answered`: whether there was an answer to be read at all."""
    return {"acc": float(is_right), "answered": float(found is not None)}
