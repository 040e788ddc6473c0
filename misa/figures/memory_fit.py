"""The most tokens of a training step that fit on one card, by method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("variant", "method", "label", "model", "limit_bytes", "loss", "num_tokens")


def plot(table: pd.DataFrame) -> Figure:
    """Draw two bars for each form of a method: with all logits, and with the chunked loss; both with checkpointing.

    Args:
        table: Tidy table `memory_fit.csv`.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or there are no rows.
    """
    s.require(table, COLUMNS)
    known = table[["variant", "method", "label"]].drop_duplicates()
    order = [v for m in s.in_order(s.METHODS, known["method"]) for v in known[known["method"] == m]["variant"]]
    wide = table.pivot_table(index="variant", columns="loss", values="num_tokens", aggfunc="max", fill_value=0)
    wide = wide.reindex(order)
    labels = known.set_index("variant").loc[order, "label"]
    largest = max(wide.max().max(), 1)
    with s.style():
        figure = s.new_figure(0.9 + 0.2 * len(order))
        ax = figure.subplots()
        for offset, loss, color, label in (
            (-0.19, "full", "#BBBBBB", "all logits"),
            (0.19, "chunked", s.CATEGORIES["logits"].color, "chunked loss"),
        ):
            if loss not in wide:
                continue
            ax.barh([y + offset for y in range(len(order))], wide[loss], height=0.36, color=color, label=label)
            for y, num in enumerate(wide[loss]):
                text = f" {num:,.0f}" if num else " none"
                ax.text(num, y + offset, text, va="center", fontsize=6)
        ax.set_yticks(range(len(order)), list(labels))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlim(0, 1.18 * largest)
        gib = table["limit_bytes"].max() / 2**30
        ax.set_xlabel(f"tokens of a step that fit in {gib:g} GiB\n({table['model'].iloc[0]}, checkpointing)")
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.2)
    return figure
