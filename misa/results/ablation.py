"""Ablations: every setting against the common one, paired by seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from misa.results.paired import p_text, p_value
from misa.results.tables import Cell, require_one_kind

if TYPE_CHECKING:
    import pandas as pd

#: Settings that an ablation changes, in the order of tables and figures, with their names there.
FACTORS = {
    "method": "variant",
    "granularity": "blocks",
    "include": "matrices",
    "eta": "eta",
    "budget": "delta",
    "interval": "T",
    "state_policy": "state",
    "per_parameter": "score by size",
    "probe_every": "fresh scores",
    "learning_rate": "learning rate",
}
_BY_DEFAULT = "default"


def compare_settings(settings: pd.DataFrame) -> pd.DataFrame:
    """Compare every setting with the common one, from which the others differ in the fewest places.

    Args:
        settings: Tidy table `settings.csv`, runs of one kind.

    Returns:
        One row for each setting, the common one first: factor (what differs, comma separated; "" for the common
        setting), label (such as "T = 50"), num_seeds, loss (mean over its seeds), difference (mean over the seeds that
        both have), stderr of the difference (not a number for one seed), p_value (paired t test), train_s; and
        differences, a list with one number for each seed.

    Raises:
        ValueError: If there are no rows, or runs of several kinds.
    """
    import pandas as pd

    require_one_kind(settings)
    factors = [name for name in FACTORS if name in settings.columns]
    plain = settings.assign(**{name: settings[name].map(_plain) for name in factors})
    groups = {tuple(key): own for key, own in plain.groupby(factors, sort=False)}
    common = min(groups, key=lambda key: sum(_num_different(key, other) for other in groups))
    base = groups[common].set_index("seed")["eval_loss"].astype(float)
    rows = []
    for key, own in groups.items():
        different = {name: value for name, value, usual in zip(factors, key, common, strict=True) if value != usual}
        if "method" in different:  # another variant has options of its own; those it lacks are no difference
            different = {k: v for k, v in different.items() if k == "method" or v != _BY_DEFAULT}
        loss = own.set_index("seed")["eval_loss"].astype(float)
        paired = (loss - base).dropna()
        rows.append(
            {
                "factor": ", ".join(different),
                "label": "; ".join(_label(name, value) for name, value in different.items()) or "common setting",
                "num_seeds": len(loss),
                "loss": float(loss.mean()),
                "difference": float(paired.mean()),
                "stderr": float(paired.sem()),
                "p_value": p_value(paired.tolist()) if key != common else math.nan,
                "train_s": float(own["train_s"].mean()),
                "differences": paired.tolist(),
            }
        )
    order = ["", *FACTORS]
    rows.sort(key=lambda row: (_place(order, row["factor"]), _number(row["label"]), row["label"]))
    return pd.DataFrame(rows)


def ablation_table(settings: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """Build the table of `compare_settings`."""
    rows: list[list[str | Cell]] = []
    for row in compare_settings(settings).to_dict("records"):
        is_common = row["factor"] == ""
        difference: str | Cell = "" if is_common else Cell(row["difference"], row["stderr"])
        rows.append(
            [
                row["label"],
                str(row["num_seeds"]),
                Cell(row["loss"]),
                difference,
                p_text(row["p_value"]),
                Cell(row["train_s"]),
            ]
        )
    head = ["setting", "runs", "eval loss (nats/token)", "difference, paired by seed", "p", "training (s)"]
    return head, rows


def _plain(value: object) -> str:
    """A setting as text, the same whether it was read as a number or as text; what a method leaves open as default."""
    if value is None or value != value:
        return _BY_DEFAULT
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value)


def _label(name: str, value: str) -> str:
    from misa.figures.style import METHODS, look

    return look(METHODS, value).label if name == "method" else f"{FACTORS[name]} = {value}"


def _num_different(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _place(order: list[str], factor: str) -> tuple[int, int]:
    """Single factors in their order, combinations after the first of theirs."""
    first, *others = factor.split(", ")
    return order.index(first), len(others)


def _number(label: str) -> float:
    try:
        return float(label.rpartition("= ")[2])
    except ValueError:
        return math.inf
