"""The table of the paper's benchmarks: one row for each set, both protocols side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from misa.results.published import PREFIX, published_cell
from misa.results.tables import Cell, read_tidy, write_table

if TYPE_CHECKING:
    import pandas as pd

# Sets in the order of the paper -> the harness's task on the same documents.
SETS = {
    "gsm8k": "gsm8k",
    "svamp": "svamp",
    "aqua": "agieval_aqua_rat",
    "mawps": "mawps",
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_iqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc_easy",
    "arc_challenge": "arc_challenge",
    "openbookqa": "openbookqa",
}
PAPER_METRICS = ("acc", "answered")
HARNESS_METRICS = ("acc", "acc_norm", "exact_match-flexible-extract")
HEAD = ("set", "run", "documents", "paper (%)", "answered (%)", "documents", "harness (%)", "normalised (%)")


def benchmark_table(
    scores: pd.DataFrame, models: Mapping[str, str] | None = None
) -> tuple[list[str], list[list[str | Cell]]]:
    """Build the table.

    Args:
        scores: Tidy table `scores.csv`.
        models: Name of each run's model, for a column of published numbers where there are comparable ones.

    Returns:
        Column headings, and one row for each set and run that has a score: under the paper's protocol the accuracy and
        the share of responses with an answer, under the harness's the accuracy (of mathematics: flexible extraction)
        and the length-normalised one, each with its number of documents. "" where there is none.
    """
    rows = []
    for name, standard in SETS.items():
        of_set = scores[scores["task"].isin([PREFIX + name, standard])]
        for run in dict.fromkeys(of_set["run"]):
            row: list[str | Cell] = [name, str(run)]
            for task, metrics in ((PREFIX + name, PAPER_METRICS), (standard, HARNESS_METRICS)):
                found = of_set[(of_set["run"] == run) & (of_set["task"] == task)].set_index("metric")
                row.append(str(int(found["num_documents"].iloc[0])) if len(found) else "")
                cells = [_cell(found, metric) for metric in metrics if metric in found.index]
                row += [*cells, *[""] * (2 - len(cells))]
            method = str(of_set.loc[of_set["run"] == run, "method"].iloc[0])
            row.append(published_cell(method, (models or {}).get(str(run), ""), PREFIX + name, "acc"))
            rows.append(row)
    if any(row[-1] for row in rows):
        return [*HEAD, "published"], rows
    return list(HEAD), [row[:-1] for row in rows]


def write_benchmark_table(tables_dir: str | Path, output_dir: str | Path) -> list[Path]:
    """Write `benchmarks.md` and `benchmarks.tex`.

    Args:
        tables_dir: Folder with `scores.csv`, and `runs.csv` for the published numbers.
        output_dir: Folder to write, made if needed.

    Returns:
        The paths written.

    Raises:
        ValueError: If the tidy table is missing or has no score of a benchmark.
    """
    path = Path(tables_dir) / "scores.csv"
    runs = Path(tables_dir) / "runs.csv"
    models = dict(read_tidy(tables_dir, "runs")[["run", "model"]].itertuples(index=False)) if runs.is_file() else None
    head, rows = benchmark_table(read_tidy(tables_dir, "scores"), models)
    if not rows:
        raise ValueError(f"{path} has no score of a benchmark ({', '.join(SETS)})")
    return write_table("benchmarks", head, rows, output_dir)


def _cell(found: pd.DataFrame, metric: str) -> Cell:
    stderr = found.at[metric, "stderr"]
    return Cell(100 * float(found.at[metric, "value"]), 100 * float(stderr) if stderr == stderr else math.nan)
