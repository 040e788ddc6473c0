"""What the bytes at the peak are for, by method, at a short and a long sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa.figures import style as s
from misa.figures.memory_sequence import CARD_GIB, main_variants

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("variant", "method", "label", "batch_size", "seq_len", "checkpointing", "loss", "draw", "category", "bytes")
SEQ_LENS = (512, 4096)


def plot(table: pd.DataFrame) -> Figure:
    """Draw stacked bars, one panel for each of `SEQ_LENS`; with checkpointing, one sequence a step, all logits.

    Args:
        table: Tidy table `memory_grid.csv`.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or no row fits.
    """
    s.require(table, COLUMNS)
    rows = table[(table["loss"] == "full") & (table["batch_size"] == 1) & (table["draw"] != "mean")]
    rows = rows[rows["checkpointing"] & rows["seq_len"].isin(SEQ_LENS)]
    if rows.empty:
        raise ValueError(
            f"table has no rows with checkpointing, batch_size 1 and seq_len {' or '.join(map(str, SEQ_LENS))}"
        )
    variants = main_variants(rows)
    labels = [label for _, label, _ in variants.values()]
    lengths = sorted(rows["seq_len"].unique())
    largest = (rows.groupby(["variant", "seq_len"])["bytes"].sum() / 2**30).max()
    with s.style():
        figure = s.new_figure(0.7 + len(lengths) * (0.25 + 0.13 * len(variants)))
        axes = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for ax, length in zip(axes, lengths, strict=True):
            own = rows[rows["seq_len"] == length]
            wide = own.pivot_table(index="variant", columns="category", values="bytes", aggfunc="sum", fill_value=0)
            wide = wide.reindex(list(variants), fill_value=0) / 2**30
            handles |= s.stack_bars(ax, wide, height=0.75)
            for y, total in enumerate(wide.sum(axis="columns")):
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # so that no line crosses the number
                ax.annotate(
                    f"{total:.1f}", (total, y), (3, 0), textcoords="offset points", va="center", fontsize=6, bbox=behind
                )
            card = s.mark_card(ax.axvline, CARD_GIB)
            ax.set_yticks(range(len(labels)), labels)
            ax.tick_params(axis="y", labelsize=6)
            ax.invert_yaxis()
            ax.grid(axis="y", visible=False)
            ax.set_title(f"1 x {length} tokens, checkpointing", loc="left", fontsize=7)
        axes[-1].set_xlim(0, 1.1 * largest)
        axes[-1].set_xlabel(f"peak memory of {rows['model'].iloc[0]} (GiB)")
        handles[f"{CARD_GIB} GiB"] = card
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=4,
            columnspacing=1.2,
            handlelength=1.2,
        )
    return figure
