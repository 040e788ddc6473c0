"""The one style of all figures: width, fonts, and one colour, marker and label for each method, category and scheme.

Colours of methods are mostly those of Okabe and Ito, of stacked categories those of Paul Tol; both stay
distinct in the common forms of colour blindness. Lines differ in marker and dash as well, for print in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Width of a column in print.
COLUMN_WIDTH_IN = 3.3
_RESOLUTION_DPI = 300


@dataclass(frozen=True)
class Look:
    """How one thing is drawn everywhere."""

    label: str
    color: str
    marker: str = "o"
    dash: Any = "solid"


METHODS = {
    "none": Look("base model", "#777777", "x", (0, (1, 1))),
    "adamw": Look("AdamW", "#000000", "s", "solid"),
    "lora": Look("LoRA", "#CC79A7", "D", (0, (5, 1.5))),
    "dora": Look("DoRA", "#882255", "d", (0, (5, 1.5, 1, 1.5))),
    "galore": Look("GaLore", "#56B4E9", "p", (0, (2, 1))),
    "badam": Look("BAdam", "#0072B2", "v", (0, (4, 1.5))),
    "lisa": Look("LISA", "#009E73", "^", (0, (4, 1.5, 1, 1.5))),
    "misa": Look("MISA", "#D55E00", "o", "solid"),
    "misa_uniform": Look("MISA, uniform", "#E69F00", "h", (0, (3, 1))),
    "misa_lora": Look("MISA on LoRA", "#332288", "P", (0, (1, 1))),
}

# A variant has the colour and the marker of its method, and a dash of its own.
VARIANTS = {
    "adamw_bf16": Look("AdamW, pure bf16", METHODS["adamw"].color, "s", (0, (1, 1))),
    "sgd": Look("SGD", METHODS["none"].color, "x", "solid"),
    "galore_layerwise": Look("GaLore, layer by layer", METHODS["galore"].color, "p", (0, (1, 1))),
    "badam_official": Look("BAdam, ascending", METHODS["badam"].color, "v", (0, (1, 1))),
    "lisa_official": Look("LISA, ascending", METHODS["lisa"].color, "^", (0, (1, 1))),
    "misa_paper": Look("MISA, Algorithm 1", METHODS["misa"].color, "o", (0, (3, 1))),
    "misa_official": Look("MISA, authors' code", METHODS["misa"].color, "o", (0, (1, 1))),
}

CATEGORIES = {
    "weights": Look("weights", "#DDDDDD"),
    "gradients": Look("gradients", "#EE8866"),
    "optimizer": Look("optimizer", "#77AADD"),
    "activations": Look("activations", "#117733"),
    "logits": Look("logits and loss", "#AA4499"),
    "temporary": Look("temporary", "#EEDD88"),
}

# A scheme has the colour of the method that draws in this way.
SCHEMES = {
    "layer_cyclic": Look("layer, cyclic", METHODS["badam"].color, "v"),
    "layer_uniform": Look("layer, uniform", METHODS["lisa"].color, "^"),
    "matrix_uniform": Look("matrix, uniform", METHODS["misa_uniform"].color, "h"),
    "matrix_importance_eta1": Look("matrix, importance, $\\eta = 1$", METHODS["misa"].color, "o"),
    "matrix_importance_official": Look("matrix, authors' scores, $\\eta = 1$", METHODS["misa"].color, "X"),
    "matrix_importance_auto": Look("matrix, importance, auto $\\eta$", METHODS["misa"].color, "P"),
    "matrix_oracle": Look("matrix, oracle", METHODS["adamw"].color, "*"),
}

_RC: Any = {
    "figure.dpi": _RESOLUTION_DPI,
    "savefig.dpi": _RESOLUTION_DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "pdf.fonttype": 42,  # fonts that journals accept and that stay text
}


@contextmanager
def style() -> Iterator[None]:
    """Seaborn's `ticks` for paper with this project's settings; what the reader's matplotlibrc says does not count."""
    import seaborn as sns

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**sns.axes_style("ticks"), **sns.plotting_context("paper"), **_RC})
        yield


def new_figure(height_in: float, width_in: float = COLUMN_WIDTH_IN) -> Figure:
    """An empty figure of a width fit for print; to be called inside `style()`.

    Args:
        height_in: Height in inches.
        width_in: Width in inches. Default: one column.

    Returns:
        A figure that belongs to no window and to no pyplot state.
    """
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `STEM.pdf` and `STEM.png`: the same bytes for the same figure, whenever they are written.

    Args:
        figure: The figure.
        stem: Path without ending; its folder is made.

    Returns:
        The two paths.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.png")]
    with style():
        # No dates and no version of the program that drew it.
        figure.savefig(paths[0], metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(paths[1], metadata={"Software": None})
    return paths


def look(kind: dict[str, Look], name: str) -> Look:
    """Look of `name`; a name that has none yet is drawn in grey under its own name."""
    if kind is METHODS and name in VARIANTS:
        return VARIANTS[name]
    return kind.get(name, Look(name.replace("_", " "), "#999999", "."))


def in_order(kind: dict[str, Look], names: Iterable[str]) -> list[str]:
    """The distinct names in the fixed order of the style, unknown ones at the end by alphabet."""
    order = list(kind)
    if kind is METHODS:
        # A variant stands behind the method whose colour it has.
        order = [n for m in METHODS for n in (m, *(v for v in VARIANTS if VARIANTS[v].color == METHODS[m].color))]
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def stack_bars(ax: Any, wide: Any, height: float) -> dict[str, Any]:
    """Draw a horizontal stacked bar for each row, the first one at 0.

    Args:
        ax: Axes.
        wide: A pandas data frame with a column for each category of `CATEGORIES`.
        height: Of a bar, in rows.

    Returns:
        What the legend shows: label of each category -> its bars.
    """
    handles = {}
    start = 0 * wide.iloc[:, 0]
    for category in in_order(CATEGORIES, wide.columns[wide.any()]):
        shown = look(CATEGORIES, category)
        # No edge: it would hide what is thinner than itself.
        handles[shown.label] = ax.barh(
            range(len(wide)), wide[category], left=start, color=shown.color, height=height, linewidth=0
        )
        start = start + wide[category]
    return handles


def mark_card(line: Callable[..., Any], gib: float) -> Any:
    """Mark the memory of a card by a dotted line.

    Args:
        line: `axhline` or `axvline` of the axes.
        gib: Its size.

    Returns:
        The line, for the legend.
    """
    return line(gib, color="#777777", linewidth=0.8, linestyle=(0, (1, 1)), zorder=0.5)


def snapshot_label(name: object, step: float) -> str:
    """Name of a snapshot and its step; the name alone where nobody knows the step (negative)."""
    text = str(name).removeprefix("pretrain-")
    return text if step < 0 else f"{text.removesuffix(f'-{step:.0f}')}, step {step:.0f}"


def require(table: Any, columns: Iterable[str]) -> None:
    """Check that a table can be drawn.

    Args:
        table: A pandas data frame.
        columns: Columns it must have.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"table lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    if table.empty:
        raise ValueError("table has no rows")
