"""Every method against MISA on the same data in the same order: differences paired by seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from misa.results.tables import Cell

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
        value of a paired t test; neither of the last two for MISA, and no error and no p value for one seed.
    """
    from misa.figures.style import METHODS, in_order, look

    rows: list[list[str | Cell]] = []
    for (_, data), own in settings.groupby(["kind", "data"], sort=False):
        if own.duplicated(["method", "seed"]).any() or _BASE not in set(own["method"]):
            continue
        losses = own.pivot_table(index="seed", columns="method", values="eval_loss")
        for method in in_order(METHODS, losses.columns):
            loss, paired = losses[method].dropna(), (losses[method] - losses[_BASE]).dropna()
            is_base = method == _BASE
            rows.append(
                [
                    str(data),
                    look(METHODS, method).label,
                    str(len(loss)),
                    Cell(float(loss.mean()), standard_error(loss)),
                    "" if is_base or paired.empty else Cell(float(paired.mean()), standard_error(paired)),
                    "" if is_base else p_text(p_value(paired.tolist())),
                ]
            )
    return list(HEAD), rows


def standard_error(values: pd.Series) -> float:
    """Standard error of a mean; not a number for less than two values."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def p_value(differences: list[float]) -> float:
    """P value of a t test of paired differences; not a number where there are less than two different ones."""
    from scipy import stats

    if len(differences) < 2 or len(set(differences)) < 2:
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def p_text(p: float) -> str:
    """A p value as text, empty if there is none."""
    return "" if math.isnan(p) else f"{p:.2g}"
