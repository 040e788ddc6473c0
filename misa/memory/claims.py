"""What the paper says of memory, beside the grid: the difference in per cent of the other method's peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_OTHERS = ("lora-r16", "lora-r16-lean", "dora-r16", "galore", "badam", "lisa", "adamw")
_OURS = ("misa-1", "misa-3")


def savings(grid: pd.DataFrame, draw: str = "worst") -> pd.DataFrame:
    """Peak of MISA less that of another method, in per cent of the latter; below zero MISA needs less.

    Args:
        grid: Table `memory_grid.csv`; one sequence a step and all logits are compared.
        draw: Block methods by their worst draw, or by their mean over draws, which other methods do not have.

    Returns:
        One row for each method and form of MISA, one column for each checkpointing and sequence length.
    """
    import pandas as pd

    peaks = _peaks(grid, draw)
    pairs = [(ours, other) for ours in _OURS for other in _OTHERS if {ours, other} <= set(peaks.index)]
    changes = [(100 * (peaks.loc[ours] / peaks.loc[other] - 1)).round(1) for ours, other in pairs]
    index = pd.MultiIndex.from_tuples(pairs, names=["MISA", "against"])
    return pd.DataFrame(changes).set_axis(index)


def crossings(grid: pd.DataFrame, draw: str = "worst") -> pd.DataFrame:
    """From which length of the sequence on MISA needs less than each method, and by how much at the longest.

    Args:
        grid: Table `memory_grid.csv`.
        draw: See `savings`.

    Returns:
        One row for each method, form of MISA and checkpointing; the length is missing where MISA needs more at the
        longest sequence.
    """
    import pandas as pd

    rows = []
    for (ours, other), of_pair in savings(grid, draw).iterrows():
        for checkpointing, row in of_pair.dropna().groupby(level="checkpointing"):
            by_length = row.droplevel("checkpointing").sort_index()
            more = by_length.index[by_length >= 0]
            below = by_length.index[by_length.index > (more[-1] if len(more) else -1)]
            rows.append(
                {
                    "MISA": ours,
                    "against": other,
                    "checkpointing": checkpointing,
                    "less from (tokens)": below[0] if len(below) else None,
                    "longest (tokens)": by_length.index[-1],
                    "difference there (%)": by_length.iloc[-1],
                }
            )
    table = pd.DataFrame(rows).set_index(["MISA", "against", "checkpointing"])
    return table.astype({"less from (tokens)": "Int64"})


def largest_saving(grid: pd.DataFrame) -> pd.DataFrame:
    """The setting in which MISA saves most against each method, and the one in which it saves least.

    Args:
        grid: Table `memory_grid.csv`.
    """
    import pandas as pd

    table = savings(grid)
    rows = [
        {
            "MISA": name[0],
            "against": name[1],
            "best (%)": row.min(),
            "best at": _setting(row.idxmin()),
            "worst (%)": row.max(),
            "worst at": _setting(row.idxmax()),
        }
        for name, row in table.iterrows()
    ]
    return pd.DataFrame(rows).set_index(["MISA", "against"])


def _peaks(grid: pd.DataFrame, draw: str) -> pd.DataFrame:
    if draw not in ("worst", "mean"):
        raise ValueError(f"draw is {draw!r}; allowed: worst, mean")
    rows = grid[(grid["loss"] == "full") & (grid["batch_size"] == 1) & ((grid["draw"] == "mean") == (draw == "mean"))]
    found: pd.DataFrame = rows.pivot_table(
        index="variant", columns=["checkpointing", "seq_len"], values="bytes", aggfunc="sum"
    )
    return found


def _setting(column: tuple[bool, int]) -> str:
    return f"{column[1]} tokens, {'checkpointing' if column[0] else 'no checkpointing'}"
