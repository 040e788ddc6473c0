"""Peak training memory against the length of the sequence, by method."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("variant", "method", "label", "model", "batch_size", "seq_len", "checkpointing", "loss", "draw", "bytes")
#: A card of this size is drawn as a line.
CARD_GIB = 24
# Forms of one method share its colour and marker and differ in the dash.
_DASHES: tuple[Any, ...] = ("solid", (0, (3, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def plot(table: pd.DataFrame) -> Figure:
    """Draw one panel without and one with activation checkpointing; one sequence a step, all logits.

    Args:
        table: Tidy table `memory_grid.csv`. Block methods are drawn with the worst draw found.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing or no row fits.
    """
    s.require(table, COLUMNS)
    rows = table[(table["loss"] == "full") & (table["batch_size"] == 1) & (table["draw"] != "mean")]
    if rows.empty:
        raise ValueError("table has no rows with batch_size 1, loss full and a measured draw")
    totals = rows.groupby(["variant", "method", "label", "checkpointing", "seq_len"], sort=False)["bytes"].sum()
    peaks = (totals / 2**30).reset_index()
    # Forms measured at a few lengths alone make no curve.
    lengths = peaks.groupby("variant")["seq_len"].nunique()
    peaks = peaks[peaks["variant"].map(lengths) == lengths.max()]
    variants = main_variants(peaks, num_forms=2)
    names = {False: "no checkpointing", True: "checkpointing"}
    with s.style():
        figure = s.new_figure(2.3 + 0.15 * ((len(variants) + 1) // 2))
        axes = figure.subplots(1, 2, sharey=True)
        handles: dict[str, Any] = {}
        for ax, (checkpointing, title) in zip(axes, names.items(), strict=True):
            card = s.mark_card(ax.axhline, CARD_GIB)
            for variant, (method, label, dash) in variants.items():
                own = peaks[(peaks["variant"] == variant) & (peaks["checkpointing"] == checkpointing)]
                own = own.sort_values("seq_len")
                look = s.look(s.METHODS, method)
                (line,) = ax.plot(own["seq_len"], own["bytes"], color=look.color, marker=look.marker, linestyle=dash)
                handles.setdefault(label, line)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(sorted(peaks["seq_len"].unique())[::2])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_title(title, loc="left")
            ax.set_xlabel("tokens in the sequence")
        axes[0].set_ylabel(f"peak memory of {rows['model'].iloc[0]} (GiB)")
        handles[f"card of {CARD_GIB} GiB"] = card
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)
    return figure


def main_variants(rows: pd.DataFrame, num_forms: int = len(_DASHES)) -> dict[str, tuple[str, str, Any]]:
    """Variants of a table in the order of the methods, at most `num_forms` of each, with method, label and dash."""
    known = rows[["variant", "method", "label"]].drop_duplicates()
    chosen: dict[str, tuple[str, str, Any]] = {}
    num_drawn: Counter[str] = Counter()
    for method in s.in_order(s.METHODS, known["method"]):
        own = known[known["method"] == method]
        if method in ("lora", "dora"):
            own = own[own["variant"].str.contains("-r16")]
        color = s.look(s.METHODS, method).color
        for _, row in own.iloc[:num_forms].iterrows():
            chosen[row["variant"]] = (method, row["label"], _DASHES[num_drawn[color] % len(_DASHES)])
            num_drawn[color] += 1
    return chosen
