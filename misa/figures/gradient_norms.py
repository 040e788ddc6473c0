"""Gradient norms of the matrices inside each layer: they differ by much more inside a layer than between layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("snapshot", "step", "block", "layer", "matrix", "sq_norm")


def plot(table: pd.DataFrame) -> Figure:
    """Draw the norm of the full-batch gradient of every matrix, one line for each layer, one panel for each snapshot.

    Args:
        table: Tidy table `gradient_norms.csv`; at most the first and the last two snapshots by step are drawn.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or there are no rows.
    """
    s.require(table, COLUMNS)
    import matplotlib as mpl
    import numpy as np
    import seaborn as sns
    from matplotlib.colors import ListedColormap, Normalize

    snapshots = list(table.sort_values("step", kind="stable")[["step", "snapshot"]].drop_duplicates().values.tolist())
    if len(snapshots) > 3:
        snapshots = [snapshots[0], *snapshots[-2:]]
    matrices = list(dict.fromkeys(table["matrix"]))
    num_layers = int(table["layer"].max()) + 1
    with s.style():
        figure = s.new_figure(0.35 + 1.35 * len(snapshots))
        axes = figure.subplots(len(snapshots), 1, sharex=True, squeeze=False)[:, 0]
        # Without its light end, which is hard to see on white paper.
        colors = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.88, 256)))
        scale = Normalize(0, max(1, num_layers - 1))
        for ax, (step, name) in zip(axes, snapshots, strict=True):
            rows = table[(table["snapshot"] == name) & (table["step"] == step)]
            rows = rows.assign(norm=rows["sq_norm"] ** 0.5, place=rows["matrix"].map(matrices.index))
            sns.lineplot(
                rows,
                x="place",
                y="norm",
                hue="layer",
                palette=colors,
                hue_norm=scale,
                errorbar=None,
                legend=False,
                linewidth=0.8,
                marker="o",
                markersize=2.5,
                markeredgewidth=0,
                ax=ax,
            )
            ax.set_yscale("log")
            ax.set_ylabel("gradient norm")
            ax.set_title(s.snapshot_label(name, step), loc="left")
        axes[-1].set_xticks(range(len(matrices)), [m.removesuffix("_proj") for m in matrices])
        axes[-1].set_xlabel("weight matrix")
        bar = figure.colorbar(mpl.cm.ScalarMappable(scale, colors), ax=list(axes), label="layer", aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        last = num_layers - 1
        bar.set_ticks(range(num_layers) if num_layers <= 8 else sorted({0, last // 4, last // 2, 3 * last // 4, last}))
    return figure
