"""Peak training memory by category, one stacked bar for each method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("method", "model", "batch_size", "seq_len", "checkpointing", "category", "bytes", "moment")
_SETTING = ["model", "batch_size", "seq_len", "checkpointing"]


def plot(table: pd.DataFrame) -> Figure:
    """Draw the bytes that are live at each method's peak, one panel for each setting.

    Args:
        table: Tidy table `memory.csv`; rows whose moment is `peak` are drawn.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or no row tells of the peak.
    """
    s.require(table, COLUMNS)
    peaks = table[table["moment"] == "peak"]
    if peaks.empty:
        raise ValueError("table has no rows with moment peak")
    settings = peaks[_SETTING].drop_duplicates().to_dict("records")
    largest = peaks.groupby([*_SETTING, "method"])["bytes"].sum().max()
    unit, size = ("GiB", 2**30) if largest >= 2**31 else ("MiB", 2**20)
    panels = []
    for setting in settings:
        rows = peaks[(peaks[list(setting)] == list(setting.values())).all(axis=1)]
        panels.append((setting, rows, s.in_order(s.METHODS, rows["method"])))
    heights = [len(methods) + 1 for _, _, methods in panels]
    with s.style():
        figure = s.new_figure(0.8 + 0.17 * sum(heights) + 0.2 * len(panels))
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        handles: dict[str, Any] = {}
        for ax, (setting, rows, methods) in zip(axes, panels, strict=True):
            wide = rows.pivot_table(index="method", columns="category", values="bytes", aggfunc="sum", fill_value=0)
            wide = wide.reindex(methods) / size
            handles |= s.stack_bars(ax, wide, height=0.7)
            for y, total in enumerate(wide.sum(axis="columns")):
                ax.text(total, y, f" {total:,.3g}" if total < 1000 else f" {total:,.0f}", va="center", fontsize=6.5)
            ax.set_yticks(range(len(methods)), [s.look(s.METHODS, method).label for method in methods])
            ax.invert_yaxis()
            ax.grid(axis="y", visible=False)
            recompute = ", checkpointing" if setting["checkpointing"] else ""
            sequences = f"{setting['batch_size']} x {setting['seq_len']} tokens"
            ax.set_title(f"{setting['model']}, {sequences}{recompute}", loc="left", fontsize=7)
        axes[-1].set_xlim(0, 1.12 * largest / size)  # room for the totals
        axes[-1].set_xlabel(f"peak memory ({unit})")
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, handlelength=1.2)
    return figure
