"""Ablations: every setting against the common one, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from misa.results.paired import holm, mean_and_error, p_text, p_value
from misa.results.tables import Cell, require_one_kind

if TYPE_CHECKING:
    import pandas as pd

#: Columns that a table `settings.csv` must have to be compared.
COLUMNS = ("run", "kind", "method", "seed", "eval_loss")
#: Settings that an ablation changes, in the order of tables and figures, with their names there.
FACTORS = {
    "method": "variant",
    "granularity": "blocks",
    "include": "matrices",
    "order": "order",
    "first_pass": "first pass",
    "sample_last": "longest idle",
    "eta": "eta",
    "budget": "delta",
    "interval": "T",
    "state_policy": "state",
    "per_parameter": "score by size",
    "probe_every": "fresh scores",
    "learning_rate": "learning rate",
}
# How blocks are drawn, but for eta; and what belongs to a variant.
_OF_DRAWS = ("order", "per_parameter", "probe_every")
_OF_VARIANTS = ("first_pass", "sample_last")
_BY_DEFAULT = "default"


def compare_settings(settings: pd.DataFrame) -> pd.DataFrame:
    """Compare every setting with the common one, from which the others differ in the fewest places.

    Args:
        settings: Tidy table `settings.csv`, runs of one kind.

    Returns:
        One row for each setting, the common one first: factor (what differs, comma separated; "" for the common
        setting), label (such as "T = 50"), num_seeds, loss (mean over its seeds, not finite if one of them diverged),
        differences (from the common setting, one for each seed with a loss of both; none for the common setting itself
        and for one with a run that diverged), and from_uniform (the same from the setting with uniform draws, eta 0,
        and all else alike; none where there is no such setting, and for itself).

    Raises:
        ValueError: If columns are missing, there are no rows, runs of several kinds, or several of one setting and
            seed.
    """
    import pandas as pd

    require_one_kind(settings, COLUMNS)
    factors = [name for name in FACTORS if name in settings.columns]
    plain = settings.assign(**{name: settings[name].map(_plain) for name in factors})
    if (same := plain.duplicated([*factors, "seed"], keep=False)).any():
        names = ", ".join(map(str, plain.loc[same, "run"]))
        raise ValueError(f"several runs of one setting and seed: {names}")
    groups = plain.groupby(factors, sort=False)
    losses = {tuple(key): own.set_index("seed")["eval_loss"].astype(float) for key, own in groups}
    common = min(losses, key=lambda key: sum(_num_different(key, other) for other in losses))
    usual = dict(zip(factors, common, strict=True))
    as_uniform = {name: usual[name] for name in _OF_DRAWS if name in usual} | {"eta": "0"}
    rows: list[dict[str, Any]] = []
    for key, loss in losses.items():
        own = dict(zip(factors, key, strict=True))
        different = {name: value for name, value in own.items() if value != usual[name]}
        if "method" in different:  # another variant has options of its own; those it lacks are no difference
            left = {k: v for k, v in different.items() if k not in _OF_VARIANTS and v != _BY_DEFAULT}
            different = {"method": different["method"], **left}
        rows.append(
            {
                "factor": ", ".join(different),
                "label": "; ".join(_label(name, value) for name, value in different.items()) or "common setting",
                "num_seeds": len(loss),
                "loss": float(loss.mean(skipna=False)),
                "differences": _paired(losses, key, common),
                "from_uniform": _paired(losses, key, tuple((own | as_uniform)[name] for name in factors)),
            }
        )
    order = ["", *FACTORS]
    rows.sort(key=lambda row: (_place(order, row["factor"]), _number(row["label"]), row["label"]))
    return pd.DataFrame(rows)


def ablation_table(settings: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """Build the table of `compare_settings`.

    Of differences it has the mean, its standard error, a paired t test's p, and that after Holm's correction for the
    column. Of a setting with a run without a finite loss, that it diverged.
    """
    head = ["setting", "runs", "eval loss (nats/token)", "minus common setting's, paired by seed", "p", "p (Holm)"]
    head += ["minus uniform draws', paired by seed", "p", "p (Holm)"]
    found = compare_settings(settings)
    rows: list[list[str | Cell]] = []
    for row in found.to_dict("records"):
        loss = Cell(row["loss"]) if math.isfinite(row["loss"]) else "diverged"
        rows.append([row["label"], str(row["num_seeds"]), loss])
    for column in ("differences", "from_uniform"):
        for row_of_table, cells in zip(rows, _differences(found[column].tolist()), strict=True):
            row_of_table += cells
    return head, rows


def _paired(
    losses: dict[tuple[str, ...], pd.Series[float]], one: tuple[str, ...], other: tuple[str, ...]
) -> list[float]:
    """Differences of the losses of two settings over the seeds that both have; none where the first diverged."""
    if one == other or other not in losses or not losses[one].map(math.isfinite).all():
        return []
    return [value for value in (losses[one] - losses[other]).tolist() if math.isfinite(value)]


def _differences(column: Sequence[list[float]]) -> list[list[str | Cell]]:
    ps = [p_value(values) for values in column]
    means = [Cell(*mean_and_error(values)) if values else "" for values in column]
    return [[mean, p_text(p), p_text(after)] for mean, p, after in zip(means, ps, holm(ps), strict=True)]


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
