"""Every method against MISA on the same data in the same order: differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from misa.results.tables import Cell, is_share, read_tidy, shown, write_table

if TYPE_CHECKING:
    import pandas as pd

_DIFFERENCE = ("minus MISA's, paired by seed", "p", "p (Holm)")
_LOSS_HEAD = ("trained on", "method", "runs", "final evaluation loss", *_DIFFERENCE)
_SCORE_HEAD = ("runs scored", "mean accuracy (%)", *_DIFFERENCE)
_BASE = "misa"


def paired_table(settings: pd.DataFrame, scores: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """Compare the last evaluation loss of every method with that of MISA, and the accuracy of its models.

    Args:
        settings: Tidy table `settings.csv`. Data on which a method has several runs with one seed, as in an ablation,
            or on which MISA has none, are left out.
        scores: Tidy table `scores.csv`. The accuracy of a run is the mean of its shares of right answers over the
            tasks of its data, each with the same weight.

    Returns:
        Column headings, and a row for each data set and method: mean loss with the standard error of the mean over
        seeds (nats a token), the mean difference over the seeds that both have with its standard error, the p value
        of a paired t test, and that value after Holm's correction for the other methods on the same data; then the
        same of accuracies, if there are any. No difference for MISA, and no error and no p value for one seed. Of a
        method with a run without a finite loss, that it diverged.
    """
    from misa.figures.style import METHODS, in_order, look

    accuracy = _accuracies(scores, settings)
    rows: list[list[str | Cell]] = []
    for (_, data), own in settings.groupby(["kind", "data"], sort=False):
        if own.duplicated(["method", "seed"]).any() or _BASE not in set(own["method"]):
            continue
        methods = in_order(METHODS, set(own["method"]))
        runs = own.set_index(["method", "seed"])
        losses = _compare(runs["eval_loss"].astype(float), methods)
        found = _compare(100 * runs["run"].map(accuracy).dropna().astype(float), methods)
        for method, loss, score in zip(methods, losses, found, strict=True):
            rows.append([str(data), look(METHODS, method).label, *loss, *(score if accuracy else ())])
    return [*_LOSS_HEAD, *(_SCORE_HEAD if accuracy else ())], rows


def write_paired_table(tables_dir: str | Path, output_dir: str | Path) -> list[Path]:
    """Write `paired.md` and `paired.tex` of a folder of tidy tables, and return their paths."""
    head, rows = paired_table(*(read_tidy(tables_dir, name) for name in ("settings", "scores")))
    return write_table("paired", head, rows, output_dir, empty="No runs to compare with MISA yet.\n")


def _accuracies(scores: pd.DataFrame, settings: pd.DataFrame) -> dict[str, float]:
    """Mean share of right answers of each run, if it was scored on all tasks that any run on its data was scored on."""
    import pandas as pd

    chosen = shown(scores, 1).merge(settings[["run", "data"]], on="run")
    shares = [rows for (_, metric), rows in chosen.groupby(["task", "metric"]) if is_share(metric, rows["value"])]
    means: dict[str, float] = {}
    for _, own in pd.concat(shares).groupby("data") if shares else ():
        means |= own.pivot(index="run", columns="task", values="value").mean(axis=1, skipna=False).dropna().to_dict()
    return means


def _compare(values: pd.Series[float], methods: Sequence[str]) -> list[list[str | Cell]]:
    """Cells of each method: runs, mean, difference to MISA's by seed, p, p after Holm's correction.

    Args:
        values: By method and seed.
        methods: The rows wanted.
    """
    of_method = {str(method): own.droplevel(0) for method, own in values.groupby(level=0)}
    cells: list[list[str | Cell]] = []
    ps: list[float] = []
    for method in methods:
        own, base = of_method.get(method), of_method.get(_BASE)
        paired = [] if own is None or base is None or method == _BASE else [v for v in own - base if math.isfinite(v)]
        diverged = own is not None and not own.map(math.isfinite).all()
        if own is None:
            cells.append(["", "", ""])
        elif diverged:
            cells.append([str(len(own)), "diverged", ""])
        else:
            mean = Cell(float(own.mean()), float(own.sem()))
            cells.append([str(len(own)), mean, Cell(*mean_and_error(paired)) if paired else ""])
        ps.append(math.nan if diverged else p_value(paired))
    return [[*row, p_text(p), p_text(after)] for row, p, after in zip(cells, ps, holm(ps), strict=True)]


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

    # Apart by rounding alone, they have no spread.
    if len(differences) < 2 or all(math.isclose(value, differences[0], abs_tol=1e-12) for value in differences):
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """P values after Holm's step-down correction for their number (1979); what is not a number is not counted.

    All rejected at a level by these have, together, at most that chance of one false among them.
    """
    known = sorted((p, index) for index, p in enumerate(ps) if not math.isnan(p))
    found, largest = [math.nan] * len(ps), 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        found[index] = largest
    return found


def p_text(p: float) -> str:
    """A p value as text, empty if there is none."""
    return "" if math.isnan(p) else f"{p:.2g}"
