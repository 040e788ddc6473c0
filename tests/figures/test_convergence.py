"""Curves that coincide, and panels that draw other seeds than the rest of their row."""

import matplotlib as mpl
import pandas as pd
from example_tables import convergence

from misa.figures import plot


def finetune():
    table = convergence()
    return table[table["kind"] == "finetune"].assign(machine="a")


def marked(axes):
    """Points with a marker, by colour."""
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    return {line.get_color(): {line.get_xdata()[i] for i in line.get_markevery()} for line in marks}


def test_curves_that_coincide_are_told_apart_by_staggered_hollow_markers_over_broken_lines():
    table = finetune()
    axes = plot("convergence", table.assign(value=3 - table["step"] / 40)).axes[0]
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    lines = [line for line in axes.lines if line.get_marker() == "None"]
    assert len(marks) == len(lines) == 5
    assert {line.get_markerfacecolor() for line in marks} == {"none"}
    solid = {line.get_linestyle() == "-": line.get_zorder() for line in lines}
    assert solid[True] < solid[False] < min(line.get_zorder() for line in marks)
    late = [{step for step in steps if step >= 20} for steps in marked(axes).values()]
    assert all(late)
    assert len(set.union(*late)) == 3  # all the steps there are


def test_every_one_of_few_points_has_a_marker():
    table = finetune()
    axes = plot("convergence", table[table["step"] > 20]).axes[0]
    assert set(map(frozenset, marked(axes).values())) == {frozenset({30, 40})}


def test_panel_of_times_names_its_number_of_seeds_where_they_are_not_those_of_the_row():
    table = finetune()
    titles = [axes.get_title(loc="right") for axes in plot("convergence", table).axes]
    assert titles == ["", "", ""]
    elsewhere = table[table["seed"] == 0].assign(seed=7, machine="b", run="other")
    titles = [axes.get_title(loc="right") for axes in plot("convergence", pd.concat([table, elsewhere])).axes]
    assert titles == ["", "", "2 seeds"]
    one = table[table["seed"] == 0]
    one = pd.concat([one, one.assign(seed=7, machine="b", run="other")])
    assert plot("convergence", one).axes[-1].get_title(loc="right") == "1 seed"


def test_legend_shows_line_and_marker_of_each_method():
    legend = plot("convergence", finetune()).legends[0]
    shown = legend.findobj(mpl.lines.Line2D)
    assert (
        sum(line.get_marker() != "None" for line in shown) == sum(line.get_linestyle() != "None" for line in shown) == 5
    )
