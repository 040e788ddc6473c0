"""Figures: one pure function `plot(table) -> Figure` each, in one style.

`FIGURES` names them all with the tidy table each is drawn from.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: Name of each figure -> name of the table it is drawn from. The module of the same name holds its `plot`.
FIGURES = {
    "convergence": "convergence.csv",
    "gradient_variance": "variance.csv",
    "gradient_norms": "gradient_norms.csv",
    "staleness": "staleness.csv",
    "rate": "rate.csv",
    "ablation": "ablation/settings.csv",
    "memory": "memory.csv",
    "memory_sequence": "memory_grid.csv",
    "memory_stacked": "memory_grid.csv",
    "memory_delta": "memory_sweep.csv",
    "memory_fit": "memory_fit.csv",
    "scores": "scores.csv",
}


CACHED_TABLES = "paper_figures/data"

#: Columns that hold numbers in every tidy table that has them; an empty cell is a missing one.
NUMBERS = frozenset(
    [
        *("value", "stderr", "seed", "step", "bytes", "eval_loss", "train_s", "num_documents", "tokens", "time_s"),
        *("batch_size", "seq_len", "num_tokens", "limit_bytes", "weights_bytes", "state_bytes"),
        *("numel", "sq_norm", "noise", "age", "interval", "num_updates", "lr", "mean_sq_norm"),
        *("learning_rate", "always_on_lr"),
    ]
)
#: Columns that say what a row is about, in which no cell of any tidy table may be empty.
NAMES = frozenset(
    [
        *("run", "kind", "method", "task", "metric", "category", "moment", "checkpointing", "batch_size", "seq_len"),
        *("snapshot", "block", "matrix", "scheme", "quantity", "source", "problem", "momentum_step", "num_updates"),
    ]
)


def plot(name: str, table: pd.DataFrame) -> Figure:
    """Draw a figure by name.

    Args:
        name: Key of `FIGURES`.
        table: Its tidy table.

    Returns:
        The figure.

    Raises:
        ValueError: If the name is unknown or the table does not fit.
    """
    if name not in FIGURES:
        raise ValueError(f"figure is {name!r}; allowed: {', '.join(FIGURES)}")
    figure: Figure = import_module(f"misa.figures.{name}").plot(table)
    return figure


def cached_table(name: str) -> pd.DataFrame:
    """Read a table of the cached results, `paper_figures/data/NAME.csv` of the checkout around the working directory.

    Args:
        name: A table, such as "scores" or "runs", or a figure, which means the table it is drawn from.

    Returns:
        The table.

    Raises:
        ValueError: If the working directory lies in no checkout, or there is no such table.
    """
    return read_table(_checkout() / CACHED_TABLES / FIGURES.get(name, f"{name}.csv"))


def cached_text(name: str) -> str:
    """Read a table for readers, `paper_figures/tables/NAME.md` of the checkout around the working directory.

    Args:
        name: A table, such as "paired" or "published".

    Returns:
        Its Markdown.

    Raises:
        ValueError: If the working directory lies in no checkout, or there is no such table.
    """
    path = _checkout() / "paper_figures/tables" / f"{name}.md"
    if not path.is_file():
        raise ValueError(f"table {path} does not exist")
    return path.read_text(encoding="utf-8")


def plot_cached(name: str) -> Figure:
    """Draw a figure from its cached table; see `cached_table` and `plot`."""
    return plot(name, cached_table(name))


def plot_all(name: str, tables: Iterable[pd.DataFrame]) -> Figure:
    """Draw one figure from several tables of the same columns; see `plot`."""
    import pandas as pd

    return plot(name, pd.concat(tables, ignore_index=True))


def _checkout() -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / CACHED_TABLES).is_dir():
            return folder
    raise ValueError(f"no folder {CACHED_TABLES} at or above {here}; run this inside a checkout of the project")


def read_table(path: str | Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Read a tidy table.

    Args:
        path: A CSV file.
        columns: Columns it must have. Default: whatever it has will do.

    Returns:
        The table.

    Raises:
        ValueError: If there is no such file, it holds nothing, a column is missing, a number is none, or a row does not
            say what it is about.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"table {path} does not exist")
    try:
        # "none" is a method (the base model), so only empty cells are missing values.
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    except pd.errors.EmptyDataError:
        raise ValueError(f"table {path} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"table {path} is no CSV file: {error}") from None
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"table {path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table))}")
    for column in NUMBERS.intersection(table):
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = table[column][numbers.isna() & table[column].notna() & (table[column] != "nan")]
        if len(wrong):
            # The first row stands in the second line.
            raise ValueError(
                f"table {path}, line {wrong.index[0] + 2}: {column} is {wrong.iloc[0]!r}, allowed is a number"
            )
    for column in NAMES.intersection(table):
        empty = table.index[table[column].isna()]
        if len(empty):
            raise ValueError(f"table {path}, line {empty[0] + 2}: {column} is empty")
    return table
