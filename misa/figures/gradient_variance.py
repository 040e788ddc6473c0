"""Variance of the gradient estimate and gradient captured, by sampling scheme at one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("snapshot", "step", "scheme", "quantity", "value")
_MARKERS = "osD^vP"


def plot(table: pd.DataFrame) -> Figure:
    """Draw, for each scheme and snapshot, relative variance and share of the squared gradient captured.

    Whiskers: two standard errors of the Monte Carlo variance around its own value; 5 to 95 % of the draws for the
    captured share. The budget stands in the label of the second panel.

    Args:
        table: Tidy table `variance.csv` with the quantities relative_variance, variance, variance_mc,
            variance_mc_stderr, captured_share, captured_share_q05, captured_share_q95 and active_share.

    Returns:
        The figure.

    Raises:
        ValueError: If columns or quantities are missing.
    """
    s.require(table, COLUMNS)
    wide = table.pivot_table(index=["step", "snapshot", "scheme"], columns="quantity", values="value", dropna=False)
    needed = ("relative_variance", "variance", "variance_mc", "variance_mc_stderr", "captured_share")
    s.require(wide, (*needed, "captured_share_q05", "captured_share_q95", "active_share"))
    wide = wide.dropna(subset=["relative_variance"])
    snapshots = list(dict.fromkeys(wide.index.droplevel("scheme")))
    schemes = s.in_order(s.SCHEMES, wide.index.get_level_values("scheme"))
    with s.style():
        figure = s.new_figure(0.75 + 0.2 * len(schemes) + 0.07 * len(schemes) * len(snapshots))
        left, right = figure.subplots(1, 2, sharey=True)
        handles: dict[str, Any] = {}
        for i, (step, name) in enumerate(snapshots):
            offset = 0.0 if len(snapshots) == 1 else (i / (len(snapshots) - 1) - 0.5) * 0.5
            for y, scheme in enumerate(schemes):
                if (step, name, scheme) not in wide.index:
                    continue
                row, look = wide.loc[(step, name, scheme)], s.look(s.SCHEMES, scheme)
                marker = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 3.5, "color": look.color}
                scale = row["relative_variance"] / row["variance"]  # one over the squared norm of the full gradient
                left.errorbar(
                    *(row["variance_mc"] * scale, y + offset),
                    xerr=2 * row["variance_mc_stderr"] * scale,
                    color="#555555",
                    elinewidth=0.8,
                    capsize=3.5,
                    capthick=0.8,
                )
                left.plot(row["relative_variance"], y + offset, **marker, linestyle="none")
                low, high = 100 * row["captured_share_q05"], 100 * row["captured_share_q95"]
                right.plot([low, high], [y + offset] * 2, color=look.color, linewidth=0.8)
                right.plot(100 * row["captured_share"], y + offset, **marker)
            label = s.snapshot_label(name, step)
            handles[label] = left.plot([], [], marker=marker["marker"], color="#555555", linestyle="none")[0]
        if wide["relative_variance"].max() > 20 * wide["relative_variance"].min():
            left.set_xscale("log")
        else:
            left.set_xlim(left=0)
        # Two lines, or the names would take half of the width.
        labels = [s.look(s.SCHEMES, scheme).label for scheme in schemes]
        labels = [",\n".join(label.rsplit(", ", 1)) if label.count(", ") > 1 else label for label in labels]
        left.set_yticks(range(len(schemes)), labels)
        left.set_ylim(len(schemes) - 0.5, -0.5)
        left.set_xlabel("variance / $\\|g\\|^2$")
        active = wide["active_share"]
        share = f"{100 * active.max():.3g} %" if active.max() - active.min() < 1e-3 else "the budget"
        right.set_xlabel(f"captured $\\|g\\|^2$ (%)\nat {share} of parameters")
        right.set_xlim(left=0)
        for ax in (left, right):
            if ax.get_xscale() == "linear":
                ax.locator_params(axis="x", nbins=4)
            ax.grid(axis="y", visible=False)
        figure.legend(
            *(list(handles.values()), list(handles)),
            loc="outside lower center",
            ncols=min(2, len(handles)),
            title="left, grey: two standard errors of simulated draws;\nright, lines: 90% of the draws",
            title_fontsize=6.5,
        )
    return figure
