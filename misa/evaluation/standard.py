"""The harness's own tasks: from its YAML files as they are, on documents of a local folder where there are any.

LLM-Adapters' files hold the questions of the same test sets inside an instruction. They are put back into the columns
of the hub's data sets, so that the harness's prompts, choices and metrics apply to them unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from misa.tasks.answers import plain_answer
from misa.tasks.benchmarks import find_test, read_test

CHOICES = re.compile(r"[^:]*: (?P<question>.*)\n\nAnswer1: (?P<choices>.*)\n\nAnswer format: .*", re.DOTALL)

FEW_SHOT_FILES = ("math/gsm8k_train.jsonl", "gsm8k/train.jsonl", "gsm8k_train.jsonl")


@dataclass(frozen=True)
class Standard:
    """A task of the harness.

    Attributes:
        folder: Where its YAML lies below the harness's tasks.
        yaml: Name of the YAML file, for a task that can read a local folder.
        dataset: The benchmark whose local file it can read, or "" if it needs the hub.
        row: Local record -> row of the hub's data set.
    """

    folder: str
    yaml: str = ""
    dataset: str = ""
    row: Callable[[dict[str, str]], dict[str, Any]] | None = None


def choice_row(record: dict[str, str]) -> dict[str, Any]:
    """Take a multiple-choice record apart: the columns of ARC and OpenBookQA on the hub.

    Raises:
        ValueError: If the instruction does not have the form of LLM-Adapters, or the answer names none of its choices.
    """
    match = CHOICES.fullmatch(record["instruction"])
    if match is None:
        raise ValueError(f"no question with Answer1, Answer2, ... in {record['instruction'][:80]!r}")
    texts = re.split(r" ?Answer[2-9]: ", match["choices"])
    labels = {f"answer{index + 1}": chr(ord("A") + index) for index in range(len(texts))}
    if record["answer"] not in labels:
        raise ValueError(f"field 'answer' is {record['answer']!r}, allowed is {', '.join(labels)}")
    # ARC and OpenBookQA call the same thing by two names.
    question = {"question": match["question"], "question_stem": match["question"]}
    choices = {"text": texts, "label": list(labels.values())}
    return {**question, "choices": choices, "answerKey": labels[record["answer"]]}


def number_row(record: dict[str, str]) -> dict[str, Any]:
    """Return the columns of GSM8K on the hub, without the worked solution, which the harness strips anyway.

    Raises:
        ValueError: If the answer is no number.
    """
    return {"question": record["instruction"], "answer": f"#### {plain_answer(record['answer'])}"}


# SVAMP and MAWPS are unknown to the harness: its GSM8K task on their problems, with the same worked examples.
STANDARD_TASKS = {
    "gsm8k": Standard("gsm8k", "gsm8k.yaml", "gsm8k", number_row),
    "svamp": Standard("gsm8k", "gsm8k.yaml", "svamp", number_row),
    "mawps": Standard("gsm8k", "gsm8k.yaml", "mawps", number_row),
    "agieval_aqua_rat": Standard("agieval"),
    "boolq": Standard("super_glue/boolq"),
    "piqa": Standard("piqa"),
    "social_iqa": Standard("siqa"),
    "hellaswag": Standard("hellaswag"),
    "winogrande": Standard("winogrande"),
    "arc_easy": Standard("arc", "arc_easy.yaml", "arc_easy", choice_row),
    "arc_challenge": Standard("arc", "arc_challenge.yaml", "arc_challenge", choice_row),
    "openbookqa": Standard("openbookqa", "openbookqa.yaml", "openbookqa", choice_row),
    "mmlu": Standard("mmlu/default"),
    "mmlu_pro": Standard("mmlu_pro"),
}

# Benchmark -> the harness's task for it.
OF_BENCHMARK = {"aqua": "agieval_aqua_rat", "siqa": "social_iqa"}


def task_folder(task: str) -> Path:
    """Return where the harness's files of a task lie."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / STANDARD_TASKS[task].folder


def files_of(task: str, data_dir: str) -> list[Path]:
    """Return the local files that a task reads.

    Raises:
        ValueError: If a file is missing or the task can read none; the message says where its data comes from.
    """
    standard = STANDARD_TASKS[task]
    if not standard.row:
        raise ValueError(f"task {task} reads no local folder; leave data_dir out and its data comes from the hub")
    files = [find_test(standard.dataset, data_dir)]
    if standard.row is number_row:
        files.append(_few_shot_file(data_dir))
    return files


def local_config(task: str, data_dir: str) -> dict[str, Any]:
    """Return the harness's configuration of a task with its documents taken from a local folder.

    Args:
        task: A key of `STANDARD_TASKS` that can read one.
        data_dir: See `misa.tasks.benchmarks.find_test`.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(task_folder(task) / STANDARD_TASKS[task].yaml)
    for name in ("dataset_path", "dataset_name", "tag", "validation_split"):
        config.pop(name, None)
    if STANDARD_TASKS[task].row is not number_row:
        config.pop("training_split", None)
    return {**config, "task": task, "custom_dataset": partial(_load, task, data_dir)}


def _load(task: str, folder: str, **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    from misa.data.records import read_records

    row = STANDARD_TASKS[task].row
    if row is None:
        raise ValueError(f"task {task} reads no local folder")
    splits = {"test": Dataset.from_list([row(record) for record in read_test(STANDARD_TASKS[task].dataset, folder)])}
    if row is number_row:
        splits["train"] = Dataset.from_list(read_records(_few_shot_file(folder), ("question", "answer")))
    return splits


def _few_shot_file(data_dir: str) -> Path:
    for name in FEW_SHOT_FILES:
        if (path := Path(data_dir) / name).is_file():
            return path
    raise ValueError(
        f"data_dir {data_dir} has no worked examples of GSM8K: looked for {', '.join(FEW_SHOT_FILES)}; they are "
        "train.jsonl of https://github.com/openai/grade-school-math"
    )
