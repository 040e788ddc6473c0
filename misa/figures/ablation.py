"""Every setting of an ablation against the common one: difference of the evaluation loss, paired by seed."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_FAR = 3  # times what eight of ten differences stay within


def plot(table: pd.DataFrame) -> Figure:
    """Draw the difference of every setting from the common one; right is worse.

    Faint points are seeds, full ones means with the 95% interval of the paired difference, where there are several
    seeds. A mean far beyond the others is a number at the edge.

    Args:
        table: Tidy table `settings.csv`, runs of one kind.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing, there are no rows, nothing differs, or no difference is finite.
    """
    import numpy as np

    from misa.results.ablation import compare_settings
    from misa.results.paired import half_interval

    rows = compare_settings(table)
    common = rows[rows["factor"] == ""]
    # What diverged, or shares no seed with it, cannot be shown.
    rows = rows[rows["differences"].map(len) > 0].reset_index(drop=True)
    if rows.empty:
        raise ValueError("all runs of the table have the same setting, or diverged")
    gaps = (rows["factor"] != rows["factor"].shift()).cumsum() - 1
    places = [i + 0.5 * gap for i, gap in enumerate(gaps)]
    with s.style():
        figure = s.new_figure(0.75 + 0.145 * (places[-1] + 1))
        ax = figure.subplots()
        color = s.METHODS["misa"].color
        means, widths = rows["differences"].map(fmean), rows["differences"].map(half_interval)
        most = _FAR * np.quantile(np.abs(means), 0.8)
        for y, mean, width, differences in zip(places, means, widths, rows["differences"], strict=True):
            if abs(mean) > most:
                side, align = (0.98, "right") if mean > 0 else (0.02, "left")
                text = f"{mean:+.2f} $\\rightarrow$" if mean > 0 else f"$\\leftarrow$ {mean:+.2f}"
                ax.text(side, y, text, color=color, ha=align, va="center", transform=ax.get_yaxis_transform())
                continue
            ax.plot(differences, [y] * len(differences), ".", color=color, alpha=0.35, markersize=4)
            ax.errorbar(mean, y, xerr=width, color=color, marker="o", markersize=3.5, capsize=2)
        ax.axvline(0, color="#777777", linewidth=0.8, linestyle=(0, (1, 1)))
        ax.set_yticks(
            places, [label.replace("eta =", "$\\eta$ =").replace("delta =", "$\\delta$ =") for label in rows["label"]]
        )
        ax.set_ylim(places[-1] + 0.7, -0.7)
        ax.grid(axis="y", visible=False)
        # Both belong to the whole figure: long names leave the axes too narrow for them.
        legend = "right is worse; faint: each seed, bars: 95% interval"
        figure.supxlabel(f"eval loss minus the common setting's (nats/token)\n{legend}", size="medium")
        loss, seeds = common["loss"].iloc[0], common["num_seeds"].iloc[0]
        words = f"{loss:.3f} nats/token" if math.isfinite(loss) else "diverged"
        title = f"Common setting: {words}, {seeds} seed{'s' if seeds > 1 else ''}"
        figure.suptitle(title, x=0.02, ha="left", size="medium")
    return figure
