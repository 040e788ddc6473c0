"""Learning rates: one grid for all methods, what was chosen for each, and putting that into a run sheet."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from misa.files import write_text
from misa.results.tables import Cell, require_one_kind

if TYPE_CHECKING:
    import pandas as pd


# What a row of a sheet without data is trained on, as in `workflows/rules/common.smk`.
BUILT_IN = {"pretrain": "corpus", "finetune": "family"}


def mean_losses(settings: pd.DataFrame) -> pd.DataFrame:
    """Mean final evaluation loss over seeds of every method at every learning rate.

    Args:
        settings: Tidy table `settings.csv` of a scale in which methods differ in their learning rate alone.

    Returns:
        A row for each method, a column for each learning rate; infinity where a run diverged, missing where none was
        made.

    Raises:
        ValueError: If there are no rows, or runs of several kinds.
    """
    require_one_kind(settings)
    losses = settings.assign(eval_loss=settings["eval_loss"].astype(float).fillna(math.inf))
    return losses.pivot_table(index="method", columns="learning_rate", values="eval_loss", aggfunc="mean", sort=True)


def chosen_rates(settings: pd.DataFrame) -> dict[str, float]:
    """Learning rate with the lowest mean loss, by method; methods that diverged everywhere are left out."""
    means = mean_losses(settings)
    finite = means[means.map(math.isfinite).any(axis="columns")]
    return {str(method): float(rate) for method, rate in finite.idxmin(axis="columns").items()}


def tuning_table(settings: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """Build the table of the grid: losses, the chosen rate in bold, and whether it lies at an end of the grid.

    Args:
        settings: See `mean_losses`.

    Returns:
        Column headings and rows.
    """
    from misa.figures.style import METHODS, in_order, look

    means, chosen = mean_losses(settings), chosen_rates(settings)
    rows: list[list[str | Cell]] = []
    for method in in_order(METHODS, means.index):
        own = means.loc[method].dropna()
        cells: list[str | Cell] = []
        for rate in means.columns:
            value = own.get(rate, math.nan)
            is_chosen = chosen.get(method) == rate
            cells.append(
                "" if math.isnan(value) else Cell(value, best=is_chosen) if math.isfinite(value) else "diverged"
            )
        best = chosen.get(method)
        at_end = best is not None and best in (own.index.min(), own.index.max())
        rows.append([look(METHODS, method).label, *cells, "" if best is None else f"{best:g}", "yes" if at_end else ""])
    head = ["method", *(f"loss at {rate:g}" for rate in means.columns), "chosen", "end of the grid"]
    return head, rows


def apply_rates(sheet: str | Path, settings: pd.DataFrame) -> list[str]:
    """Write the chosen learning rates into the rows of a run sheet of the same kind, data and a known method.

    Args:
        sheet: A TSV file with the columns run, kind and args; changed in place.
        settings: See `mean_losses`.

    Returns:
        Names of the runs whose row was changed.

    Raises:
        ValueError: If the sheet is missing or unusable.
    """
    chosen, kind, trained_on = chosen_rates(settings), settings["kind"].iloc[0], set(settings["data"])
    path = Path(sheet)
    if not path.is_file():
        raise ValueError(f"sheet {sheet} does not exist")
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    columns, changed = head.split("\t"), []
    if not {"run", "kind", "args"} <= set(columns):
        raise ValueError(f"sheet {sheet} lacks one of the columns run, kind, args")
    for number, line in enumerate(lines):
        cells = line.split("\t")
        row = dict(zip(columns, cells, strict=True))
        words = shlex.split(row["args"])
        method = words[words.index("--method") + 1] if "--method" in words else ""
        data = row.get("data") or BUILT_IN.get(row["kind"])
        if row["kind"] != kind or method not in chosen or data not in trained_on:
            continue
        given = re.search(r"--learning_rate (\S+)", row["args"])
        if given and _rate(given[1], f"sheet {sheet}, run {row['run']}") == chosen[method]:
            continue
        others = re.sub(r" ?--learning_rate \S+", "", row["args"])
        cells[columns.index("args")] = others.replace(f"{method} ", f"{method} --learning_rate {chosen[method]:g} ", 1)
        lines[number] = "\t".join(cells)
        changed.append(row["run"])
    write_text(path, "\n".join([head, *lines]) + "\n")
    return changed


def _rate(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: learning_rate is {text!r}, allowed is a number") from None
