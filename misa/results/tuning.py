"""Learning rates: one grid for all methods, what was chosen for each, and putting that into a run sheet."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from misa.files import write_text
from misa.results.sheets import read_sheet
from misa.results.tables import Cell, require_one_kind

if TYPE_CHECKING:
    import pandas as pd

#: Columns that a table `settings.csv` must have for a choice of learning rates.
COLUMNS = ("run", "kind", "data", "method", "seed", "learning_rate", "eval_loss")
# What a row of a sheet without data is trained on, as in `workflows/rules/common.smk`.
BUILT_IN = {"pretrain": "corpus", "finetune": "family"}


class Rates(NamedTuple):
    """Learning rate, and that of what is always on (embeddings, head, norms) where it is another."""

    rate: float
    always_on: float | None = None

    def __str__(self) -> str:
        """Both, as in tables."""
        return f"{self.rate:g}" if self.always_on is None else f"{self.rate:g}, {self.always_on:g}"

    @property
    def place(self) -> tuple[float, float]:
        """Where it stands in tables: one rate for everything first."""
        return (self.always_on or 0.0, self.rate)


class Trained(NamedTuple):
    """What runs that differ in their learning rates alone have in common."""

    data: str
    method: str


def mean_losses(settings: pd.DataFrame) -> dict[Trained, dict[Rates, float]]:
    """Mean final evaluation loss of every method at each of its learning rates, over the seeds that all of them have.

    Args:
        settings: Tidy table `settings.csv` of a scale in which methods on the same data differ in their learning rates
            alone.

    Returns:
        Data and method -> rates -> loss, infinity where a run diverged; rates in the order of tables.

    Raises:
        ValueError: If columns are missing, there are no rows, runs of several kinds, or several of one method, seed and
            learning rate on the same data.
    """
    require_one_kind(settings, COLUMNS)
    outside = settings["always_on_lr"] if "always_on_lr" in settings else [math.nan] * len(settings)
    rates = [
        Rates(float(one), None if math.isnan(float(other)) or float(other) == float(one) else float(other))
        for one, other in zip(settings["learning_rate"], outside, strict=True)
    ]
    if (same := settings.assign(rates=rates).duplicated(["data", "method", "seed", "rates"], keep=False)).any():
        names = ", ".join(map(str, settings.loc[same, "run"]))
        raise ValueError(f"several runs of one method, seed and learning rate on the same data: {names}")
    losses: dict[Trained, dict[Rates, dict[int, float]]] = {}
    last = settings["eval_loss"].astype(float).fillna(math.inf)
    for data, method, seed, rate, loss in zip(
        *(settings[x] for x in ("data", "method", "seed")), rates, last, strict=True
    ):
        losses.setdefault(Trained(data, method), {}).setdefault(rate, {})[seed] = loss
    means = {}
    for trained, own in losses.items():
        shared = set.intersection(*map(set, own.values()))
        means[trained] = {
            rate: fmean(loss for seed, loss in own[rate].items() if seed in shared or not shared)
            for rate in sorted(own, key=lambda rate: rate.place)
        }
    return means


def chosen_rates(settings: pd.DataFrame) -> dict[Trained, Rates]:
    """Learning rates with the lowest mean loss, by data and method; what diverged everywhere is left out."""
    return {
        trained: min(losses, key=losses.__getitem__)
        for trained, losses in mean_losses(settings).items()
        if any(map(math.isfinite, losses.values()))
    }


def tuning_table(settings: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """Build the table of the grid: losses, the chosen rate in bold, and which of it lies at an end of the grid.

    Args:
        settings: See `mean_losses`.

    Returns:
        Column headings and rows.
    """
    from misa.figures.style import METHODS, in_order, look

    means, chosen = mean_losses(settings), chosen_rates(settings)
    columns = sorted({rate for own in means.values() for rate in own}, key=lambda rate: rate.place)
    rows: list[list[str | Cell]] = []
    of_data = {data: [method for other, method in means if other == data] for data, _ in means}
    for trained in (Trained(data, method) for data in sorted(of_data) for method in in_order(METHODS, of_data[data])):
        own = means[trained]
        cells: list[str | Cell] = []
        for rate in columns:
            value = own.get(rate, math.nan)
            is_chosen = chosen.get(trained) == rate
            cells.append(
                "" if math.isnan(value) else Cell(value, best=is_chosen) if math.isfinite(value) else "diverged"
            )
        best = chosen.get(trained)
        ends = [] if best is None else _at_end(best, own)
        label = look(METHODS, trained.method).label
        rows.append([trained.data, label, *cells, "" if best is None else str(best), ", ".join(ends)])
    head = ["trained on", "method", *(f"loss at {rate}" for rate in columns), "chosen", "end of the grid"]
    return head, rows


def apply_rates(sheet: str | Path, settings: pd.DataFrame) -> list[str]:
    """Write the chosen learning rates into the rows of a run sheet of the same kind, data and a known method.

    Args:
        sheet: A TSV file with the columns run, kind and args; changed in place.
        settings: See `mean_losses`.

    Returns:
        Names of the runs whose row was changed.

    Raises:
        ValueError: If the sheet is missing or unusable.
    """
    chosen, kind = chosen_rates(settings), settings["kind"].iloc[0]
    path, rows = Path(sheet), read_sheet(sheet)
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = []
    for number, row in rows:
        # An option and its value may be joined by an equals sign.
        words = [part for word in shlex.split(row["args"]) for part in word.split("=", int(word.startswith("--")))]
        method = words[words.index("--method") + 1] if "--method" in words else ""
        trained = Trained(row.get("data") or BUILT_IN.get(row["kind"], ""), method)
        if row["kind"] != kind or trained not in chosen:
            continue
        where = f"sheet {sheet}, run {row['run']}"
        if _given(words, where) == chosen[trained]:
            continue
        others = re.sub(r" ?--(learning_rate|always_on_lr)[ =]\S+", "", row["args"])
        rate, always_on = chosen[trained]
        words_now = f"--learning_rate {rate:g}" + ("" if always_on is None else f" --always_on_lr {always_on:g}")
        row["args"] = re.sub(r"--method[ =]\S+", rf"\g<0> {words_now}", others, count=1)
        lines[number] = "\t".join(row.values())
        changed.append(row["run"])
    write_text(path, "\n".join(lines) + "\n")
    return changed


def _at_end(best: Rates, tried: Iterable[Rates]) -> list[str]:
    """Which of the two rates is the lowest or highest tried; "yes" of one for everything."""
    of_both = zip(("matrices", "rest"), _both(best), zip(*map(_both, tried), strict=True), strict=True)
    ends = [name for name, value, values in of_both if value in (min(values), max(values))]
    return ["yes"] if ends and best.always_on is None else ends


def _both(rates: Rates) -> tuple[float, float]:
    return (rates.rate, rates.rate if rates.always_on is None else rates.always_on)


def _given(words: list[str], where: str) -> Rates | None:
    """The rates that a command line names, if it names one."""
    found: dict[str, float] = {}
    for name in ("learning_rate", "always_on_lr"):
        if f"--{name}" in words:
            text = words[words.index(f"--{name}") + 1]
            try:
                found[name] = float(text)
            except ValueError:
                raise ValueError(f"{where}: {name} is {text!r}, allowed is a number") from None
    return Rates(found["learning_rate"], found.get("always_on_lr")) if "learning_rate" in found else None
