"""Loss against steps and against training time, one row of panels for each kind of run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("kind", "run", "method", "seed", "step", "time_s", "metric", "value")
_METRICS = {"eval_loss": "eval loss", "train_loss": "training loss"}
_TITLES = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}


def plot(table: pd.DataFrame) -> Figure:
    """Draw the loss of every method: mean over seeds, band from the lowest to the highest seed.

    Args:
        table: Tidy table `convergence.csv`. Drawn is the evaluation loss, and the training loss for a kind of run
            that was not evaluated on the way.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or no row holds a loss.
    """
    s.require(table, COLUMNS)
    from misa.results.tables import series_label, with_series

    losses = table[table["metric"].isin(list(_METRICS))]
    if losses.empty:
        raise ValueError(f"table has no rows with metric {' or '.join(_METRICS)}")
    kinds = [kind for kind in _TITLES if (losses["kind"] == kind).any()]
    kinds += sorted(set(losses["kind"]) - set(kinds))
    order = s.in_order(s.METHODS, losses["method"])
    with s.style():
        figure = s.new_figure(0.45 + 1.6 * len(kinds))
        axes = figure.subplots(len(kinds), 2, sharey="row", squeeze=False)
        handles: dict[tuple[int, str], Any] = {}
        for row, kind in zip(axes, kinds, strict=True):
            of_kind = losses[losses["kind"] == kind]
            metric = next(name for name in _METRICS if (of_kind["metric"] == name).any())
            of_kind = with_series(of_kind[of_kind["metric"] == metric])
            for (method, series), rows in of_kind.groupby(["method", "series"]):
                steps = rows.groupby("step")[["time_s", "value"]].agg(["mean", "min", "max"]).sort_index()
                look = s.look(s.METHODS, method)
                for ax, x in zip(row, (steps.index, steps["time_s"]["mean"]), strict=True):
                    every = max(1, len(steps) // 6)
                    (line,) = ax.plot(
                        *(x, steps["value"]["mean"]),
                        color=look.color,
                        linestyle=look.dash,
                        marker=look.marker,
                        markevery=every,
                    )
                    ax.fill_between(
                        *(x, steps["value"]["min"], steps["value"]["max"]), color=look.color, alpha=0.2, linewidth=0
                    )
                    handles.setdefault((order.index(method), series_label(series, method)), line)
            row[0].set_ylabel(f"{_METRICS[metric]} (nats/token)")
            row[0].set_title(_TITLES.get(kind, kind), loc="left")
            for ax, label in zip(row, ("steps", "training time (s)"), strict=True):
                ax.set_xlabel(label)
                ax.set_xlim(left=0)
        keys = sorted(handles)
        lines, labels = [handles[key] for key in keys], [label for _, label in keys]
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure
