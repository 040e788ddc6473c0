"""How old importance scores may be: rank correlation with fresh ones, and the squared gradient that draws capture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("snapshot", "step", "source", "age", "quantity", "value")
# What scores are drawn by, from no knowledge to all of it; of fixed and automatic eta in the colours of their schemes.
_SOURCES = {
    "uniform": ("uniform", "matrix_uniform"),
    "eta1": ("kept, $\\eta = 1$", "matrix_importance_eta1"),
    "fresh_eta1": ("fresh, $\\eta = 1$", "matrix_importance_eta1"),
    "auto": ("kept, auto $\\eta$", "matrix_importance_auto"),
    "auto_probed": ("probed, auto $\\eta$", "matrix_importance_auto"),
    "fresh_auto": ("fresh, auto $\\eta$", "matrix_importance_auto"),
    "oracle": ("true norms", "matrix_oracle"),
}
# The first is wide and pale, so that it shows beneath another at the same height.
_KEPT: dict[str, dict[str, Any]] = {
    "eta1": {"linestyle": "solid", "linewidth": 4, "alpha": 0.3},
    "auto": {"linestyle": "dashed", "linewidth": 1},
    "auto_probed": {"linestyle": (0, (4, 1, 1, 1)), "linewidth": 1},
}
_AGES = {"round_start": "inside a round", "snapshot": "between snapshots"}


def plot(table: pd.DataFrame) -> Figure:
    """Draw the rank correlation by age and by how scores are kept, and the share captured by draws by each.

    Above, points and horizontal lines are means, and whiskers run from the lowest to the highest value of an age.
    Below, faint points are single measurements, and vertical bars their means.

    Args:
        table: Tidy table `staleness.csv`.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or there are no rows.
    """
    s.require(table, COLUMNS)
    from matplotlib.ticker import NullFormatter

    correlation = table[table["quantity"] == "rank_correlation"]
    captured = table[(table["quantity"] == "captured_share") & table["source"].isin(list(_SOURCES))]
    sources = [name for name in _SOURCES if (captured["source"] == name).any()]
    with s.style():
        figure = s.new_figure(2.0 + 0.2 * len(sources))
        top, bottom = figure.subplots(2, 1, height_ratios=(1.2, max(1.0, 0.22 * len(sources))))
        for (source, label), marker, color in zip(_AGES.items(), "os", ("#000000", "#777777"), strict=True):
            own = correlation[correlation["source"] == source].groupby("age")["value"].agg(["mean", "min", "max"])
            if len(own):
                error = [own["mean"] - own["min"], own["max"] - own["mean"]]
                top.errorbar(own.index, own["mean"], yerr=error, label=label, color=color, marker=marker, capsize=2)
        for source, line in _KEPT.items():
            own = correlation[correlation["source"] == source]["value"]
            if len(own):
                label, scheme = _SOURCES[source]
                top.axhline(own.mean(), color=s.look(s.SCHEMES, scheme).color, label=label, **line)
        if len(correlation) and (correlation["age"] > 0).any():
            top.set_xscale("log")
            ages = sorted(set(correlation.loc[correlation["age"] > 0, "age"]))
            top.set_xticks(ages, _tick_labels(ages))
            top.xaxis.set_minor_formatter(NullFormatter())
        top.set_xlabel("age of the scores (steps)")
        top.set_ylabel("rank correlation\nwith fresh scores")
        top.set_ylim(min(0.0, correlation["value"].min() - 0.05) if len(correlation) else 0, 1.05)
        handles, labels = top.get_legend_handles_labels()
        known = sorted(zip(labels, handles, strict=True), key=lambda item: item[0] not in _AGES.values())
        figure.legend(
            [handle for _, handle in known], [label for label, _ in known], loc="outside upper center", ncols=2
        )
        for y, source in enumerate(sources):
            values: Any = 100 * captured.loc[captured["source"] == source, "value"]
            look = s.look(s.SCHEMES, _SOURCES[source][1])
            bottom.plot(values, [y] * len(values), marker=".", color=look.color, linestyle="none", alpha=0.4)
            bottom.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=look.color, linewidth=2)
        bottom.set_yticks(range(len(sources)), [_SOURCES[source][0] for source in sources])
        bottom.set_ylim(len(sources) - 0.5, -0.5)
        bottom.set_xlim(left=0)
        bottom.grid(axis="y", visible=False)
        bottom.set_xlabel("captured $\\|g\\|^2$ (%)")
    return figure


def _tick_labels(ages: Sequence[float]) -> list[str]:
    """Labels of rising ages on a logarithmic axis, in a second line where the first is full, none where both are."""
    last = {"": 0.0, "\n": 0.0}
    labels = []
    for age in ages:
        line = next((line for line in last if age >= 1.5 * last[line]), None)
        labels.append("" if line is None else f"{line}{age:g}")
        if line is not None:
            last[line] = age
    return labels
