"""Every method against MISA on the same data in the same order: differences paired by seed."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from misa.results.tables import Cell, write_table

if TYPE_CHECKING:
    import pandas as pd

HEAD = ("trained on", "method", "runs", "final evaluation loss", "minus MISA's, paired by seed", "p")
_BASE = "misa"


def paired_table(settings: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """Compare the last evaluation loss of every method with that of MISA.

    Args:
        settings: Tidy table `settings.csv`. Data on which a method has several runs with one seed, as in an ablation,
            or on which MISA has none, are left out.

    Returns:
        Column headings, and a row for each data set and method: mean loss with the standard error of the mean over
        seeds (nats a token), the mean difference over the seeds that both have with its standard error, and the p
        value of a paired t test; neither of the last two for MISA, and no error and no p value for one seed. Of a
        method with a run without a finite loss, that it diverged.
    """
    from misa.figures.style import METHODS, in_order, look

    rows: list[list[str | Cell]] = []
    for (_, data), own in settings.groupby(["kind", "data"], sort=False):
        if own.duplicated(["method", "seed"]).any() or _BASE not in set(own["method"]):
            continue
        losses = {method: part.set_index("seed")["eval_loss"].astype(float) for method, part in own.groupby("method")}
        for method in in_order(METHODS, losses):
            loss = losses[method]
            about: list[str | Cell] = [str(data), look(METHODS, method).label, str(len(loss))]
            if not loss.map(math.isfinite).all():
                rows.append([*about, "diverged", "", ""])
                continue
            paired = loss - losses[_BASE]
            paired = paired[paired.map(math.isfinite)]
            about.append(Cell(float(loss.mean()), float(loss.sem())))
            if method == _BASE or paired.empty:
                rows.append([*about, "", ""])
            else:
                difference = Cell(float(paired.mean()), float(paired.sem()))
                rows.append([*about, difference, p_text(p_value(paired.tolist()))])
    return list(HEAD), rows


def write_paired_table(tables_dir: str | Path, output_dir: str | Path) -> list[Path]:
    """Write `paired.md` and `paired.tex` of a folder of tidy tables, and return their paths."""
    from misa.figures import read_table

    head, rows = paired_table(read_table(Path(tables_dir) / "settings.csv"))
    return write_table("paired", head, rows, output_dir, empty="No runs to compare with MISA yet.\n")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean of at least one value, and its standard error, which is not a number for one."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def half_interval(values: list[float]) -> float:
    """Half the 95% interval of the mean, by Student's t: of three values 4.3 standard errors; not a number for one."""
    from scipy import stats

    error = mean_and_error(values)[1]
    return math.nan if math.isnan(error) else error * float(stats.t.ppf(0.975, len(values) - 1))


def p_value(differences: list[float]) -> float:
    """P value of a t test of paired differences; not a number where there are less than two different ones."""
    from scipy import stats

    if len(differences) < 2 or len(set(differences)) < 2:
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def p_text(p: float) -> str:
    """A p value as text, empty if there is none."""
    return "" if math.isnan(p) else f"{p:.2g}"
