"""The field layouts of public instruction data, and how each becomes instruction, input and output.

The instructions of the commonsense sets and of AQuA are worded as LLM-Adapters words them (arXiv 2304.01933,
github.com/AGI-Edgerunners/LLM-Adapters), which is also how their published test files ask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from misa.data.records import Record, require_text

_CALCULATOR_MARKS = re.compile(r"<<[^<>]*>>")
_OPTION = re.compile(r"\s*\(?([A-E])\)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """A field layout.

    Attributes:
        name: Name of the layout.
        fields: Fields by which it is recognised.
        convert: Turns such a record into instruction, input, output and answer; raises `ValueError` if malformed.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[[Record], Record]


def format_of(record: Mapping[str, Any]) -> Format:
    """Return the layout of a record: the first of `FORMATS` whose fields it has; without any, Alpaca's."""
    return next((form for form in FORMATS if all(field in record for field in form.fields)), ALPACA)


def _alpaca(record: Record) -> Record:
    require_text(record, ALPACA.fields)
    if not isinstance(record.get("input") or "", str):
        raise ValueError("field 'input' must be text")
    return {**record, "input": record.get("input") or ""}


def _gsm8k(record: Record) -> Record:
    """Leave out the marks for a calculator, `<<48/2=24>>`; the result stands behind them anyway."""
    require_text(record, ("question", "answer"))
    answer = record["answer"].rpartition("####")[2].strip()
    return _record(record["question"], _CALCULATOR_MARKS.sub("", record["answer"]), answer)


def _mawps(record: Record) -> Record:
    require_text(record, ("original_text", "equation"))
    return _worked(record["original_text"], record["equation"], record["ans"])


def _mawps_with_placeholders(record: Record) -> Record:
    """Put the numbers back, which the hub's copy keeps in a field of their own: `N_00` is the first."""
    require_text(record, ("Question", "Numbers", "Equation"))
    question, equation = record["Question"], record["Equation"]
    for index, number in enumerate(record["Numbers"].split()):
        question, equation = (text.replace(f"N_{index:02d}", plain_number(number)) for text in (question, equation))
    if "N_0" in question:
        raise ValueError("field 'Question' has more placeholders than 'Numbers' has numbers")
    return _worked(question, equation, record["Answer"])


def _svamp(record: Record) -> Record:
    require_text(record, ("Body", "Question", "Equation"))
    body = record["Body"].strip()
    # Some bodies end without a full stop.
    body = body if body.endswith((".", "?", "!", ",")) else f"{body}."
    return _worked(f"{body} {record['Question'].strip()}", record["Equation"], record["Answer"])


def _aqua(record: Record) -> Record:
    require_text(record, ("question", "rationale", "correct"))
    options = [_OPTION.fullmatch(option) for option in _texts(record, "options")]
    if not options or not all(options):
        raise ValueError("field 'options' must hold texts such as 'A)21'")
    choices = " ".join(f"({match[1]}) {match[2].strip()}" for match in options if match)
    correct = record["correct"].strip()
    if correct not in {match[1] for match in options if match}:
        raise ValueError(f"field 'correct' is {correct!r}, which is no option")
    output = f"{record['rationale'].strip()}\nThe answer is ({correct})."
    return _record(f"{record['question'].strip()} Answer Choices: {choices}", output, correct)


def _boolq(record: Record) -> Record:
    require_text(record, ("question",))
    if not isinstance(record["answer"], bool):
        raise ValueError(f"field 'answer' must be true or false, found {record['answer']!r}")
    question = record["question"].strip().rstrip("?")
    return _chosen(
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false",
        str(record["answer"]).lower(),
    )


def _piqa(record: Record) -> Record:
    require_text(record, ("goal", "sol1", "sol2"))
    return _choice(
        f"Please choose the correct solution to the question: {record['goal']}",
        "solution",
        [record["sol1"], record["sol2"]],
        _index(record, "label", first=0, count=2),
        between="\n\n",
    )


def _social_i_qa(record: Record) -> Record:
    names = ("answerA", "answerB", "answerC")
    require_text(record, ("context", "question", *names))
    return _choice(
        f"Please choose the correct answer to the question: {record['context']} {record['question']}",
        "answer",
        [record[name] for name in names],
        _index(record, "label", first=1, count=3),
    )


def _hellaswag(record: Record) -> Record:
    require_text(record, ("activity_label", "ctx"))
    endings = _texts(record, "endings")
    return _choice(
        f"Please choose the correct ending to complete the given sentence: {record['activity_label']}: {record['ctx']}",
        "ending",
        endings,
        _index(record, "label", first=0, count=len(endings)),
    )


def _winogrande(record: Record) -> Record:
    require_text(record, ("sentence", "option1", "option2"))
    return _choice(
        "Please choose the correct answer to fill in the blank to complete the given sentence: " + record["sentence"],
        "option",
        [record["option1"], record["option2"]],
        _index(record, "answer", first=1, count=2),
        # As published: no line break before the answer format.
        before_format=" ",
    )


def _multiple_choice(question: str) -> Callable[[Record], Record]:
    """Return the conversion of ARC and OpenBookQA, which differ in the name of the question's field."""

    def convert(record: Record) -> Record:
        require_text(record, (question, "answerKey"))
        choices = record["choices"]
        if not isinstance(choices, Mapping):
            raise ValueError("field 'choices' must hold 'text' and 'label'")
        texts, labels = _texts(choices, "text"), _texts(choices, "label")
        key = record["answerKey"].strip()
        if len(texts) != len(labels) or key not in labels:
            raise ValueError(f"field 'answerKey' is {key!r}, the choices are {', '.join(labels)}")
        prompt = f"Please choose the correct answer to the question: {record[question]}"
        return _choice(prompt, "answer", texts, labels.index(key))

    return convert


def plain_number(value: Any) -> str:
    """Write a number without a needless ".0".

    Raises:
        ValueError: If it is no number, or not a finite one.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return str(int(number)) if number.is_integer() else str(number)


def _record(instruction: str, output: str, answer: str) -> Record:
    return {"instruction": instruction.strip(), "input": "", "output": output.strip(), "answer": answer}


def _worked(question: str, equation: str, answer: Any) -> Record:
    number = plain_number(answer)
    return _record(question, f"{equation.strip()}\nThe answer is {number}", number)


def _chosen(instruction: str, answer: str) -> Record:
    return _record(instruction, f"the correct answer is {answer}", answer)


def _choice(
    prompt: str, name: str, texts: Sequence[str], correct: int, between: str = " ", before_format: str = "\n\n"
) -> Record:
    options = between.join(f"{name.capitalize()}{i}: {text}" for i, text in enumerate(texts, start=1))
    answers = "/".join(f"{name}{i}" for i in range(1, len(texts) + 1))
    return _chosen(f"{prompt}\n\n{options}{before_format}Answer format: {answers}", f"{name}{correct + 1}")


def _index(record: Record, field: str, first: int, count: int) -> int:
    """Return a label as an index from 0; the labels of unpublished answers (-1, "") are out of range."""
    try:
        index = int(record[field]) - first
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < count:
        raise ValueError(f"field {field!r} is {record[field]!r}, allowed is {first} to {first + count - 1}")
    return index


def _texts(record: Mapping[str, Any], field: str) -> list[str]:
    values = record.get(field)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {field!r} must be a list of texts")
    return values


ALPACA = Format("alpaca", ("instruction", "output"), _alpaca)

# The first that fits is taken: those with many fields stand before those with few.
FORMATS = (
    ALPACA,
    Format("mawps", ("original_text", "equation", "ans"), _mawps),
    Format("mawps with placeholders", ("Question", "Numbers", "Equation", "Answer"), _mawps_with_placeholders),
    Format("svamp", ("Body", "Question", "Equation", "Answer"), _svamp),
    Format("aqua", ("question", "options", "rationale", "correct"), _aqua),
    Format("social_i_qa", ("context", "question", "answerA", "answerB", "answerC", "label"), _social_i_qa),
    Format("hellaswag", ("activity_label", "ctx", "endings", "label"), _hellaswag),
    Format("piqa", ("goal", "sol1", "sol2", "label"), _piqa),
    Format("winogrande", ("sentence", "option1", "option2", "answer"), _winogrande),
    Format("arc", ("question", "choices", "answerKey"), _multiple_choice("question")),
    Format("openbookqa", ("question_stem", "choices", "answerKey"), _multiple_choice("question_stem")),
    Format("boolq", ("question", "passage", "answer"), _boolq),
    Format("gsm8k", ("question", "answer"), _gsm8k),
)
