"""Both protocols of the paper's benchmarks in one table."""

from __future__ import annotations

import pandas as pd

from misa.results.__main__ import main

COLUMNS = ["run", "method", "seed", "task", "metric", "value", "stderr", "num_documents", "task_version", "prompt_hash"]


def scores(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame([("base", "none", 0, *row, 1.0, "ab") for row in rows], columns=COLUMNS)


def test_protocols_stand_side_by_side(tmp_path) -> None:
    table = scores(
        ("misa_openbookqa", "acc", 0.125, 0.0625, 500),
        ("misa_openbookqa", "answered", 0.5, 0.03125, 500),
        ("openbookqa", "acc", 0.25, 0.0125, 500),
        ("openbookqa", "acc_norm", 0.375, 0.0125, 500),
        ("misa_mawps", "acc", 0.5, 0.03, 238),
        ("gsm8k", "exact_match-flexible-extract", 0.02, 0.01, 300),
        ("misa_family", "exact_match", 1.0, 0.0, 9),
    )
    table.to_csv(tmp_path / "scores.csv", index=False)
    assert main(["benchmarks", "--tables", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "benchmarks.md").read_text().splitlines()
    assert lines[2:] == [
        "| gsm8k | base |  |  |  | 300 | 2.0 ± 1.0 |  |",
        "| mawps | base | 238 | 50.0 ± 3.0 |  |  |  |  |",
        "| openbookqa | base | 500 | 12.5 ± 6.2 | 50.0 ± 3.1 | 500 | 25.0 ± 1.2 | 37.5 ± 1.2 |",
    ]
    assert (tmp_path / "out" / "benchmarks.tex").read_text().startswith(r"\begin{tabular}{lrrrrrrr}")


def test_table_without_benchmarks_is_refused(tmp_path, capsys) -> None:
    scores(("misa_family", "exact_match", 1.0, 0.0, 9)).to_csv(tmp_path / "scores.csv", index=False)
    assert main(["benchmarks", "--tables", str(tmp_path), "--output_dir", str(tmp_path)]) == 2
    assert "has no score of a benchmark" in capsys.readouterr().err


def test_names_are_those_of_the_tasks() -> None:
    from misa.evaluation.scoring import group_tasks
    from misa.results.benchmarks import SETS

    paper = [*group_tasks("math", "paper"), *group_tasks("commonsense", "paper")]
    harness = [*group_tasks("math", "harness"), *group_tasks("commonsense", "harness")]
    assert [f"misa_{known}" for known in SETS] == paper
    assert list(SETS.values()) == harness
