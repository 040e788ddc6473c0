"""Mean squared full gradient against the number of block updates, and its slope beside the published rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa.figures import style as s

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("problem", "momentum_step", "interval", "seed", "num_updates", "mean_sq_norm")
_TITLES = {"waves": "Quadratic with waves", "llama": "Small LLaMA"}
_MARKERS = "osD^v"
# Slopes that scatter have intervals that would hide all others.
_SLOPES = (-1.25, 0.25)


def plot(table: pd.DataFrame) -> Figure:
    """Draw, for each problem, the geometric means over seeds, and the slope of every setting with its 95% interval.

    The slope of a line of geometric means is the mean of the seeds' slopes, which `fit_slope` gives. An interval that
    goes on beyond the panel ends in an arrow.

    Args:
        table: Tidy table `rate.csv`.

    Returns:
        The figure.

    Raises:
        ValueError: If columns are missing, there are no rows, or a setting has runs of one length only.
    """
    s.require(table, COLUMNS)
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from misa.dynamics.rate import EXPECTED_SLOPE, fit_slope

    problems = [name for name in _TITLES if (table["problem"] == name).any()]
    problems += sorted(set(table["problem"]) - set(problems))
    intervals = sorted(table["interval"].unique())
    # From dark to light as rounds get longer, none of them the colour of a method.
    colors = colormaps["plasma"]([0.85 * i / max(len(intervals) - 1, 1) for i in range(len(intervals))])
    with s.style():
        figure = s.new_figure(0.55 + 1.6 * len(problems))
        axes = figure.subplots(len(problems), 2, squeeze=False, width_ratios=(1.25, 1))
        handles: dict[str, Any] = {}
        for (curves, slopes), problem in zip(axes, problems, strict=True):
            own = table[table["problem"] == problem]
            for i, interval in enumerate(intervals):
                look: Any = {"color": colors[i], "marker": _MARKERS[i % len(_MARKERS)]}
                for with_step, dash, fill in ((True, "solid", "full"), (False, (0, (3, 1)), "none")):
                    rows = own[(own["interval"] == interval) & (own["momentum_step"] == with_step)]
                    if rows.empty:
                        continue
                    means = np.exp(np.log(rows.set_index("num_updates")["mean_sq_norm"]).groupby(level=0).mean())
                    (line,) = curves.plot(means.index, means, linestyle=dash, fillstyle=fill, **look)
                    if with_step:
                        handles[f"T = {interval}"] = line
                    found = fit_slope(*(rows[name].tolist() for name in ("num_updates", "mean_sq_norm", "seed")))
                    y = i + (-0.17 if with_step else 0.17)
                    error = [[found.value - found.low], [found.high - found.value]]
                    slopes.errorbar(found.value, y, xerr=error, capsize=2, markersize=3.5, fillstyle=fill, **look)
                    for end, is_cut, marker in (
                        (_SLOPES[0], found.low < _SLOPES[0], 4),
                        (_SLOPES[1], found.high > _SLOPES[1], 5),
                    ):
                        if is_cut:
                            slopes.plot(end, y, marker=marker, color=colors[i], markersize=4, clip_on=False)
            ends = sorted(own["num_updates"].unique())
            level = max(line.get_ydata().max() for line in curves.get_lines()) * 1.15
            guide = [level * (x / ends[0]) ** EXPECTED_SLOPE for x in (ends[0], ends[-1])]
            guides = {"color": "#777777", "linewidth": 0.8, "linestyle": (0, (1, 1))}
            handles["slope -1/2"] = curves.plot([ends[0], ends[-1]], guide, **guides)[0]
            curves.set_xscale("log")
            curves.set_yscale("log")
            curves.set_xticks(ends)
            curves.xaxis.set_major_formatter(ScalarFormatter())
            curves.xaxis.set_minor_formatter(NullFormatter())
            curves.set_ylabel("mean of $\\|\\nabla f\\|^2$")
            curves.set_title(_TITLES.get(problem, problem), loc="left")
            slopes.set_title("Slope", loc="left")
            slopes.axvline(EXPECTED_SLOPE, **guides)
            slopes.set_yticks(range(len(intervals)), [f"T = {interval}" for interval in intervals])
            slopes.set_ylim(len(intervals) - 0.5, -0.5)
            slopes.set_xlim(*_SLOPES)
            slopes.grid(axis="y", visible=False)
        axes[-1][0].set_xlabel("block updates K")
        axes[-1][1].set_xlabel("slope, 95% interval")
        for label, dash, fill in (("with line 16", "solid", "full"), ("without", (0, (3, 1)), "none")):
            (handles[label],) = axes[0][0].plot([], [], color="#555555", linestyle=dash, marker="o", fillstyle=fill)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure
