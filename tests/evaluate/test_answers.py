"""What the paper's rules read out of a text: case by case, and on responses of a small model judged by hand.

`responses.jsonl` holds responses of SmolLM2-135M-Instruct (beams of 4, Alpaca prompt) to questions of the test sets,
some asked for letters, solutions, endings or options instead. Where a response repeats its question, the repeated words
are replaced by `[...]`. `expected` was read off by hand, null where there is no answer.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from misa.tasks import answers

RESPONSES = Path(__file__).with_name("responses.jsonl")
RULES = {
    "number": answers.extract_number,
    "letter": answers.extract_letter,
    "truth": answers.extract_truth,
    **{word: lambda text, word=word: answers.extract_label(text, word) for word in answers.LABELS},
}


def responses() -> list[dict]:
    return [json.loads(line) for line in RESPONSES.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("response", responses(), ids=lambda response: f"{response['set']}-{response['document']}")
def test_answer_is_the_one_read_by_hand(response: dict) -> None:
    assert RULES[response["rule"]](response["text"]) == response["expected"]


def test_fixture_has_every_rule_and_answers_of_all_kinds() -> None:
    found = responses()
    assert len(found) >= 200
    counts = Counter((response["rule"], response["expected"] is not None) for response in found)
    assert {rule for rule, _ in counts} == set(RULES)
    assert sum(count for (_, has_answer), count in counts.items() if not has_answer) >= 50


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("no number at all", None),
        ("", None),
        ("She has 3 apples and 4 pears, 7 in all.", 7.0),
        ("It costs $1,250,000.", 1250000.0),
        ("The answer is -15.", -15.0),
        ("It is 12.5 cm long", 12.5),
        ("that makes 576", 576.0),
        ("#### 72\n", 72.0),
        ("5.", 5.0),
        # Literal to the rule, if not to the meaning.
        ("10-5", -5.0),
        ("1, 2 or 3,4", 34.0),
        ("three quarters: 3/4", 4.0),
        ("0.75 = 75%", 75.0),
    ],
)
def test_last_number_counts(text: str, number: float | None) -> None:
    assert answers.extract_number(text) == number


@pytest.mark.parametrize(
    ("response", "answer", "is_right"),
    [
        ("576.0009", "576.0", True),
        ("576.0011", "576.0", False),
        ("1.8333", "1.8333333333333335", True),
        ("1.83", "1.8333333333333335", False),
        ("1,250", "1250.0", True),
        ("1250", "1,250", True),
        ("none", "0.0", False),
        ("9" * 400, "1.0", False),
    ],
)
def test_number_is_right_within_a_thousandth(response: str, answer: str, is_right: bool) -> None:
    scores = answers.score_number({"answer": answer}, [response])
    assert scores == {"acc": float(is_right), "answered": float(response != "none")}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(c) is right", None),
        ("the answer is b", None),
        ("A, B or C", "C"),
        ("The answer is (D).", "D"),
        # The last capital of the text, be it that of a word.
        ("The answer is (A) because of gravity. Done", "D"),
        ("F or G", None),
    ],
)
def test_last_capital_from_a_to_e_counts(text: str, letter: str | None) -> None:
    assert answers.extract_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "word", "label"),
    [
        ("the correct answer is answer3", "answer", "answer3"),
        ("ANSWER2, not answer1", "answer", "answer2"),
        ("Answer 3", "answer", None),
        ("answer6 or answer0", "answer", None),
        ("answer12", "answer", "answer1"),
        ("the second one", "answer", None),
        ("solution3 or solution2", "solution", "solution2"),
        ("Ending4: she left", "ending", "ending4"),
        ("ending5", "ending", None),
        ("option1/option2", "option", "option1"),
    ],
)
def test_first_label_counts(text: str, word: str, label: str | None) -> None:
    assert answers.extract_label(text, word) == label


@pytest.mark.parametrize(
    ("text", "truth"), [("It is False, not true", "false"), ("untrue", "true"), ("yes", None), ("", None)]
)
def test_first_truth_counts(text: str, truth: str | None) -> None:
    assert answers.extract_truth(text) == truth


def test_scores_compare_with_the_answer_alone() -> None:
    """`output` of the public files is a model's old response and must not matter."""
    assert answers.score_label({"answer": "answer2", "output": "answer1"}, ["answer2"])["acc"] == 1.0
    assert answers.score_truth({"answer": "true", "output": "false"}, ["It is false"]) == {"acc": 0.0, "answered": 1.0}
    assert answers.score_letter({"answer": "C"}, ["nothing"]) == {"acc": 0.0, "answered": 0.0}
