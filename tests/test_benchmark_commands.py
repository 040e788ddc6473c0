"""The benchmarks' commands and tables, apart from what they measure."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.training import table


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("evaluation", "--model_name_or_path nowhere/at/all --data_dir .", "nowhere/at/all: no such folder"),
        ("evaluation", "--model_name_or_path . --data_dir . --num_documents 0", "num_documents is 0, allowed is 1"),
        ("scaling", "--budget 0.05", "budget is 0.05, measured are "),
        ("distributed", "--budgets 3%", "budgets is '3%', allowed are numbers above 0"),
        ("distributed", "--model 5m", "5m"),
        ("distributed", "--interval 0", "interval is 0, allowed is 1 or more"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(command: str, words: str, message: str, capsys, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "page.md")] if command == "scaling" else ["--output_dir", str(tmp_path)]
    assert import_module(f"benchmarks.{command}").main([*words.split(), *output]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"benchmarks.{command}: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_table_of_training_that_was_cut_off_says_so(repository: Path) -> None:
    report = json.loads((repository / "benchmarks" / "results" / "training_gpu.json").read_text())
    assert "Not finished" not in table(report)
    last = report["cells"][-1]["seq_len"]
    report["cells"] = [row for row in report["cells"] if row["seq_len"] != last]
    assert "Not finished: " in table(report)
