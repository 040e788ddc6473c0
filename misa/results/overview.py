"""Every method at a glance: losses and accuracy beside MISA's, optimizer state, memory of a large model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from misa.results.paired import paired_table
from misa.results.tables import Cell, cell_text, read_tidy, write_table

if TYPE_CHECKING:
    import pandas as pd

#: The form of each method in the memory grid that stands for it, and the step that is shown.
MEMORY_FORMS = {
    "adamw": "adamw",
    "lora": "lora-r16",
    "dora": "dora-r16",
    "galore": "galore",
    "badam": "badam",
    "lisa": "lisa",
    "misa": "misa-3",
}
SEQ_LEN = 2048
_GRID_COLUMNS = ("variant", "model", "batch_size", "seq_len", "checkpointing", "loss", "draw", "bytes")
#: A difference is marked where its p value, after Holm's correction, is below this.
LEVEL = 0.05


def overview_table(
    settings: pd.DataFrame, scores: pd.DataFrame, runs: pd.DataFrame, memory: pd.DataFrame | None = None
) -> tuple[list[str], list[list[str | Cell]]]:
    """Put what `paired_table` says of each method into one row, beside what the method holds in memory.

    Args:
        settings: Tidy table `settings.csv`.
        scores: Tidy table `scores.csv`.
        runs: Table `runs.csv`.
        memory: Tidy table `memory_grid.csv`; without it, or rows in it, there is no column of a large model's peak.

    Returns:
        Column headings, and a row for each method. A loss or accuracy is given as its difference to MISA's, paired by
        seed, in bold where it is told apart from none (see `LEVEL`); in MISA's own row as it is, in brackets. Of data
        where MISA was scored with one seed there are no accuracies. Optimizer state is the mean over fine-tuning runs.
        The peak is that of one sequence of `SEQ_LEN` tokens with activation checkpointing, of block methods for the
        worst draw.
    """
    from misa.figures.style import METHODS, look

    head = ["method"]
    columns: list[dict[str, str | Cell]] = []
    _, rows = paired_table(settings, scores)
    kinds = dict(zip(settings["data"].astype(str), settings["kind"], strict=True))
    own_label = look(METHODS, "misa").label
    for data in sorted({str(row[0]) for row in rows}, key=lambda data: (kinds[data] != "pretrain", data)):
        of_data = {str(row[1]): row[2:] for row in rows if row[0] == data}
        name = "pre-training" if kinds[data] == "pretrain" else data
        losses, accuracies = ({m: cells[k : k + 5] for m, cells in of_data.items()} for k in (0, 5))
        head.append(f"{name}: loss minus MISA's")
        columns.append(_differences(losses, own_label))
        if (scored := accuracies[own_label]) and str(scored[0]) not in ("", "1"):
            head.append(f"{name}: accuracy minus MISA's (points)")
            columns.append(_differences(accuracies, own_label))
    methods = [m for m in dict.fromkeys(settings["method"]) if any(look(METHODS, m).label in c for c in columns)]
    labels = {m: look(METHODS, m).label for m in [*METHODS, *methods] if m in methods}
    tuned = runs[runs["kind"] == "finetune"]
    if "state_bytes" in tuned and len(tuned):
        head.append("optimizer state, fine-tuning (MiB)")
        means = (tuned.groupby("method")["state_bytes"].mean() / 2**20).dropna()
        columns.append({labels[m]: Cell(float(mean)) for m, mean in means.items() if m in labels})
    if memory is not None and len(memory):
        model, peaks = _peaks(memory)
        head.append(f"peak of a step, {model} (GiB)")
        columns.append({labels[m]: Cell(peak) for m, peak in peaks.items() if m in labels})
    return head, [[label, *(column.get(label, "") for column in columns)] for label in labels.values()]


def read_overview(
    tables_dir: str | Path, grid_dir: str | Path | None = None
) -> tuple[list[str], list[list[str | Cell]]]:
    """Build `overview_table` of a folder of tidy tables.

    Args:
        tables_dir: Folder with `settings.csv`, `scores.csv` and `runs.csv`.
        grid_dir: Folder whose `memory_grid.csv` gives the peaks, if it is there. Default: `tables_dir`.

    Returns:
        Column headings, and a row for each method.

    Raises:
        ValueError: If one of the three tables is missing, or a table is unusable.
    """
    from misa.figures import read_table

    settings, scores, runs = (read_tidy(tables_dir, name) for name in ("settings", "scores", "runs"))
    grid = Path(grid_dir or tables_dir) / "memory_grid.csv"
    return overview_table(settings, scores, runs, read_table(grid, _GRID_COLUMNS) if grid.is_file() else None)


def write_overview(tables_dir: str | Path, output_dir: str | Path, grid_dir: str | Path | None = None) -> list[Path]:
    """Write `overview.md` and `overview.tex` of what `read_overview` takes, and return their paths."""
    empty = "No runs to compare with MISA yet.\n"
    return write_table("overview", *read_overview(tables_dir, grid_dir), output_dir, empty)


def _differences(of_method: Mapping[str, Sequence[str | Cell]], own_label: str) -> dict[str, str | Cell]:
    """The difference of each method to MISA, marked if it is told apart; MISA's value itself."""
    found: dict[str, str | Cell] = {}
    for label, (_, value, difference, _, corrected) in of_method.items():
        if label == own_label:
            found[label] = f"({cell_text(value)})" if isinstance(value, Cell) else value
        elif value == "diverged":
            found[label] = value
        elif isinstance(difference, Cell):
            found[label] = replace(difference, best=corrected != "" and float(str(corrected)) < LEVEL)
    return found


def _peaks(memory: pd.DataFrame) -> tuple[str, dict[str, float]]:
    """Name of the model of a memory grid, and the peak of each method that has one, in GiB."""
    rows = memory[(memory["batch_size"] == 1) & (memory["loss"] == "full") & (memory["draw"] != "mean")]
    rows = rows[rows["checkpointing"] & (rows["seq_len"] == SEQ_LEN)]
    totals = rows.groupby("variant")["bytes"].sum() / 2**30
    return str(memory["model"].iloc[0]), {m: float(totals[v]) for m, v in MEMORY_FORMS.items() if v in totals}
