"""The documents of the paper's benchmarks: a test set out of a local folder or from the hub, and its prompt.

A document has the fields instruction, input and answer, as in LLM-Adapters (arXiv 2304.01933). Their `output` is a
model's old response, often wrong, and is left out: `answer` alone is scored against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa.data.instruction import record_prompt
from misa.data.records import Record, numbered_records, require_text, sound_records

ORIGIN = "https://github.com/AGI-Edgerunners/LLM-Adapters/tree/main/dataset"


@dataclass(frozen=True)
class Benchmark:
    """A test set.

    Attributes:
        family: math or commonsense.
        folder: Name of its folder in LLM-Adapters.
        num_documents: Size of the whole test set.
    """

    family: str
    folder: str
    num_documents: int


BENCHMARKS = {
    "gsm8k": Benchmark("math", "gsm8k", 1319),
    "svamp": Benchmark("math", "SVAMP", 1000),
    "aqua": Benchmark("math", "AQuA", 254),
    "mawps": Benchmark("math", "mawps", 238),
    "boolq": Benchmark("commonsense", "boolq", 3270),
    "piqa": Benchmark("commonsense", "piqa", 1838),
    "siqa": Benchmark("commonsense", "social_i_qa", 1954),
    "hellaswag": Benchmark("commonsense", "hellaswag", 10042),
    "winogrande": Benchmark("commonsense", "winogrande", 1267),
    "arc_easy": Benchmark("commonsense", "ARC-Easy", 2376),
    "arc_challenge": Benchmark("commonsense", "ARC-Challenge", 1172),
    "openbookqa": Benchmark("commonsense", "openbookqa", 500),
}


def benchmark(dataset: str) -> Benchmark:
    """What is known of a test set; one that no benchmark of the paper is lies in a folder of its own name."""
    return BENCHMARKS.get(dataset) or Benchmark("", dataset, 0)


def load(dataset: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """Read a test set.

    Args:
        dataset: A key of `BENCHMARKS`, or the name of another set in a local folder.
        data_dir: Local folder, see `find_test`; None takes the hub's copy.

    Returns:
        The split "test" with the fields instruction, input, answer.

    Raises:
        ValueError: If the data is missing or malformed.
    """
    from datasets import Dataset

    if data_dir is None:
        from misa.tasks.hub import fetch_test

        records = fetch_test(dataset)
    else:
        records = read_test(dataset, data_dir)
    return {"test": Dataset.from_list(records)}


def read_test(
    dataset: str, data_dir: str | Path, check: Callable[[dict[str, str]], object] | None = None
) -> list[dict[str, str]]:
    """Read a test set out of a local folder.

    Args:
        dataset: A key of `BENCHMARKS`.
        data_dir: Local folder, see `find_test`.
        check: Called with each record, may raise `ValueError` for one that cannot be scored.

    Returns:
        Records with instruction, input and answer, all text.

    Raises:
        ValueError: If the file is missing or malformed; the message names the line or record.
    """
    path = find_test(dataset, data_dir)

    def convert(record: Record) -> dict[str, str]:
        require_text(record, ("instruction",))
        context, answer = record.get("input") or "", record.get("answer")
        if not isinstance(context, str):
            raise ValueError(f"field 'input' must be text, found {context!r}")
        # AQuA has its letter in a list.
        answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        if not isinstance(answer, str | int | float) or isinstance(answer, bool):
            raise ValueError(f"field 'answer' must be text or a number, found {answer!r}")
        fields = {"instruction": record["instruction"], "input": context, "answer": str(answer)}
        if check is not None:
            check(fields)
        return fields

    return sound_records(numbered_records(path), convert, 0.0, str(path))


def find_test(dataset: str, data_dir: str | Path) -> Path:
    """Find the file of a test set.

    Args:
        dataset: A key of `BENCHMARKS`, or the name of another set.
        data_dir: A folder laid out as in LLM-Adapters (`ARC-Easy/test.json`, perhaps below `dataset/`), or with one
            file for each set (`arc_easy_test.json`, perhaps below `commonsense/`). `.jsonl` is read, too.

    Raises:
        ValueError: If there is none; the message says where it was looked for and where it comes from.
    """
    known = benchmark(dataset)
    places = [f"{known.folder}/test", f"dataset/{known.folder}/test"]
    places += [f"{known.family}/{dataset}_test"] if known.family else []
    places.append(f"{dataset}_test")
    for place in places:
        for suffix in (".json", ".jsonl"):
            if (path := Path(data_dir) / f"{place}{suffix}").is_file():
                return path
    raise ValueError(
        f"data_dir {data_dir} has no test set of {dataset}: looked for {', '.join(f'{place}.json' for place in places)}"
        f" (or .jsonl){f'; it comes from {ORIGIN}/{known.folder}' if known.family else ''}"
    )


def prompt(doc: dict[str, Any]) -> str:
    """Return the Alpaca prompt of a document, the same that training uses."""
    return record_prompt(doc)
