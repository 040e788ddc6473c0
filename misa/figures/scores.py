"""Scores of the evaluated models, one panel for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("run", "method", "seed", "task", "metric", "value", "stderr")


def plot(table: pd.DataFrame) -> Figure:
    """Draw the mean score of every method with two standard errors, one panel for each task.

    The mean is over the seeds that all methods in the panel have. A panel shows the task's most telling metric (see
    `misa.results.tables.SHOWN_METRICS`). How the standard error is taken over several seeds,
    `misa.results.tables.summarise` says.

    Args:
        table: Tidy table `scores.csv`.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or there are no rows.
    """
    s.require(table, COLUMNS)
    import pandas as pd

    from misa.results.tables import is_share, of_shared_seeds, series_label, shown, summarise, with_series

    named = with_series(shown(table, 1))
    summary = pd.concat([summarise(of_shared_seeds(rows)) for _, rows in named.groupby("task", sort=False)])
    panels = [(key, rows.set_index("series")) for key, rows in summary.groupby(["task", "metric"], sort=False)]
    # More than two would make a column longer than a page.
    num_columns = 1 if len(panels) < 3 else 2
    lines = [panels[i : i + num_columns] for i in range(0, len(panels), num_columns)]
    heights = [max(len(rows) for _, rows in line) + 0.6 for line in lines]
    with s.style():
        figure = s.new_figure(0.35 + 0.19 * sum(heights) + 0.38 * len(lines), num_columns * s.COLUMN_WIDTH_IN)
        axes = figure.subplots(len(lines), num_columns, squeeze=False, height_ratios=heights).ravel()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, ((task, metric), rows) in zip(axes, panels, strict=False):
            names = _names(rows)
            unit = 100 if is_share(metric, rows["value"]) else 1
            for y, name in enumerate(names):
                row, look = rows.loc[name], s.look(s.METHODS, rows.at[name, "method"])
                error = None if row["stderr"] != row["stderr"] else 2 * unit * row["stderr"]
                if error is not None and unit > 1:  # no share lies below 0, whatever its error says
                    error = [[min(error, unit * row["value"])], [error]]
                ax.errorbar(
                    unit * row["value"],
                    y,
                    xerr=error,
                    color=look.color,
                    marker=look.marker,
                    capsize=2,
                    markersize=4,
                    clip_on=False,
                )
            ax.set_yticks(range(len(names)), [series_label(name, rows.at[name, "method"]) for name in names])
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            better = "higher is better" if rows["higher_is_better"].iloc[0] else "lower is better"
            ax.set_title(task.replace("_", " "), loc="left")
            percent = " (%)" if unit > 1 else ""
            ax.set_xlabel(f"{metric.replace('_', ' ')}{percent}, {better}")
            if unit > 1:
                ax.set_xlim(left=max(0, ax.get_xlim()[0]))
    return figure


def _names(rows: pd.DataFrame) -> list[str]:
    order = s.in_order(s.METHODS, rows["method"])
    return sorted(rows.index, key=lambda name: (order.index(rows.at[name, "method"]), name))
