"""Peak training memory of MISA against its budget, with BAdam's one layer as the line to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("method", "model", "budget", "seq_len", "draw", "weights_bytes", "bytes")


def plot(table: pd.DataFrame) -> Figure:
    """Draw one panel for each sequence length; with checkpointing, one sequence a step, all logits.

    Args:
        table: Tidy table `memory_sweep.csv`.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or there are no rows.
    """
    s.require(table, COLUMNS)
    lengths = sorted(table["seq_len"].unique())
    with s.style():
        figure = s.new_figure(2.3)
        axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        for ax, length in zip(axes, lengths, strict=True):
            for method, draw, line in (("misa", "worst", "solid"), ("misa", "mean", "dotted")):
                own = table[(table["method"] == method) & (table["seq_len"] == length) & (table["draw"] == draw)]
                own = own.sort_values("budget")
                look = s.look(s.METHODS, method)
                label = f"{look.label}, {'worst draw' if draw == 'worst' else 'mean over draws'}"
                marker = look.marker if draw == "worst" else None
                sizes = (100 * own["budget"], own["bytes"] / 2**30)
                # The mean is little less: drawn over the other line, in black.
                color = look.color if draw == "worst" else "#000000"
                ax.plot(*sizes, color=color, marker=marker, linestyle=line, label=label)
            look = s.look(s.METHODS, "badam")
            own = table[(table["method"] == "badam") & (table["seq_len"] == length) & (table["draw"] == "worst")]
            for _, row in own.iterrows():
                ax.axhline(row["bytes"] / 2**30, color=look.color, linestyle=look.dash, label="BAdam, one layer")
                ax.plot(100 * row["budget"], row["bytes"] / 2**30, color=look.color, marker=look.marker)
            weights = table["weights_bytes"].max() / 2**30
            ax.axhline(weights, color="#777777", linewidth=0.8, linestyle=(0, (1, 1)), label="weights alone")
            ax.set_xscale("log")
            ax.set_xticks([1, 3, 10, 25], ["1", "3", "10", "25"])
            ax.minorticks_off()
            ax.set_xlabel("budget (% of parameters)")
            ax.set_title(f"1 x {length} tokens", loc="left", fontsize=7)
        axes[0].set_ylabel(f"peak memory of {table['model'].iloc[0]},\nwith checkpointing (GiB)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
