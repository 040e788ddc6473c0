"""Loss against steps, tokens and training time, one row of panels for each kind of run and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("kind", "run", "method", "seed", "step", "tokens", "time_s", "metric", "value")
_METRICS = {"eval_loss": "eval loss", "train_loss": "training loss"}
_TITLES = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}
# Axis -> column, label, and what one unit of the label is.
_AXES = {"step": ("steps", 1), "tokens": ("tokens (1000)", 1000), "time_s": ("training time (s)", 1)}


def plot(table: pd.DataFrame) -> Figure:
    """Draw the loss of every method: mean over the seeds that all have, band from the lowest to the highest of them.

    Seeds of one method see the same steps; tokens and time of a point are their means. Times are those of runs on one
    machine, the one with most methods, and of the seeds that all methods have there; where these are not the seeds of
    the row, their number stands above the panel. Curves may coincide: broken lines lie over solid ones, and markers,
    which are hollow, are staggered where curves have many points. The axis of losses spans the second half of the runs,
    where methods differ; what lies above comes earlier. Losses that are not finite are left out.

    Args:
        table: Tidy table `convergence.csv`. Drawn is the evaluation loss, and the training loss for a kind of run
            that was not evaluated on the way. A column data, if there is one, splits the kinds; without a column
            machine all runs count as of one.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or no row holds a loss.
    """
    s.require(table, COLUMNS)
    import numpy as np

    from misa.results.tables import of_shared_seeds, series_label, with_series

    losses = table[table["metric"].isin(list(_METRICS))]
    if losses.empty:
        raise ValueError(f"table has no rows with metric {' or '.join(_METRICS)}")
    panels = _panels(losses.assign(**{name: "" for name in ("data", "machine") if name not in losses}))
    order = s.in_order(s.METHODS, losses["method"])
    with s.style():
        figure = s.new_figure(0.45 + 1.5 * len(panels))
        axes = figure.subplots(len(panels), len(_AXES), sharey="row", squeeze=False)
        handles: dict[tuple[int, str], Any] = {}
        for row, (title, of_kind) in zip(axes, panels.items(), strict=True):
            metric = next(name for name in _METRICS if (of_kind["metric"] == name).any())
            of_all = with_series(of_kind[of_kind["metric"] == metric])
            of_kind = of_shared_seeds(of_all)
            late = of_kind[of_kind["step"] >= of_kind["step"].max() / 2]["value"]
            late = late[np.isfinite(late)]
            machine = of_kind.groupby("machine", sort=False)["series"].nunique().idxmax()
            timed = of_shared_seeds(of_all[of_all["machine"] == machine])
            for ax, (column, (_, unit)) in zip(row, _AXES.items(), strict=True):
                curves = (timed if column == "time_s" else of_kind).groupby(["method", "series"])
                for i, ((method, series), drawn) in enumerate(curves):
                    look = s.look(s.METHODS, method)
                    points = drawn.groupby("step")[["tokens", "time_s", "value"]].agg(["mean", "min", "max"])
                    x = points.index if column == "step" else points[column]["mean"] / unit
                    value = points["value"]
                    (line,) = ax.plot(
                        *(x, value["mean"]),
                        color=look.color,
                        linestyle=look.dash,
                        zorder=2 if look.dash == "solid" else 3,
                    )
                    (marks,) = ax.plot(
                        *(x, value["mean"]),
                        color=look.color,
                        linestyle="none",
                        marker=look.marker,
                        markersize=4,
                        markerfacecolor="none",
                        markeredgewidth=0.8,
                        markevery=_marked(len(points), i, len(curves)),
                        zorder=4,
                    )
                    ax.fill_between(x, value["min"], value["max"], color=look.color, alpha=0.2, linewidth=0)
                    handles.setdefault((order.index(method), series_label(series, method)), (line, marks))
            if len(late):
                margin = 0.05 * (late.max() - late.min()) or 0.05
                row[0].set_ylim(late.min() - margin, late.max() + margin)
            row[0].set_ylabel(f"{_METRICS[metric]} (nats/token)")
            row[0].set_title(title, loc="left")
            for ax, (label, _) in zip(row, _AXES.values(), strict=True):
                ax.set_xlabel(label)
                ax.set_xlim(left=0)
                ax.locator_params(axis="x", nbins=3)
            if (seeds := set(timed["seed"])) != set(of_kind["seed"]):
                row[-1].set_title(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}", loc="right", size="medium")
        keys = sorted(handles)
        lines, labels = [handles[key] for key in keys], [label for _, label in keys]
        # Four short names fit beside each other, or three of any length.
        widest = 4 if max(map(len, labels)) <= 12 else 3
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), widest))
    return figure


def _panels(losses: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of each kind, known kinds first, by title; a kind with several data sets is split."""
    kinds = [kind for kind in _TITLES if (losses["kind"] == kind).any()]
    kinds += sorted(set(losses["kind"]) - set(kinds))
    panels = {}
    for kind in kinds:
        of_kind = losses[losses["kind"] == kind]
        for data in dict.fromkeys(of_kind["data"]):
            named = f": {data}" if of_kind["data"].nunique() > 1 else ""
            panels[f"{_TITLES.get(kind, kind)}{named}"] = of_kind[of_kind["data"] == data]
    return panels


def _marked(num_points: int, curve: int, num_curves: int) -> list[int]:
    """Points of a curve that have a marker: all of few; of as many as there are curves, one in each half, staggered."""
    every = num_points // 2 + 1 if num_points >= num_curves else 1
    return list(range(num_points))[-1 - curve * every // num_curves :: -every]
