"""Means, errors and intervals of paired differences."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from misa.results.paired import half_interval, holm, mean_and_error, paired_table
from misa.results.tables import Cell


def test_interval_of_three_values_is_that_of_students_t() -> None:
    """The 97.5% point of t with two degrees of freedom is 4.302653 (any table of it)."""
    values = [1.0, 2.0, 6.0]
    assert half_interval(values) == pytest.approx(4.302653 * mean_and_error(values)[1], rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert math.isnan(half_interval([1.0]))


def test_holm_corrects_for_the_number_of_known_p_values() -> None:
    """Sorted they are .005, .01, .03, .04, so times 4, 3, 2, 1, and none below the one before."""
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005])[3:] == pytest.approx([0.06, 0.02])
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_losses_and_accuracies_are_paired_by_seed() -> None:
    runs = [(m, s) for m in ("lora", "misa") for s in (0, 1, 2)]
    settings = pd.DataFrame(
        {
            "run": [f"{m}-s{s}" for m, s in runs],
            "kind": "finetune",
            "data": "d",
            "method": [m for m, _ in runs],
            "seed": [s for _, s in runs],
            "eval_loss": [2.0, 3.0, 4.0, 1.0, 1.5, 3.5],
        }
    )
    right = {"lora": (0.5, 0.6, 0.6), "misa": (0.4, 0.3, 0.5)}
    rows = [
        (f"{m}-s{s}", m, s, task, "acc", right[m][s] + more, 0.01)
        for m, s in runs
        for task, more in (("one", 0.1), ("two", -0.1))
    ]
    rows = rows[:-1]  # the last run was not scored on both, so its mean would be of other tasks
    scores = pd.DataFrame(rows, columns=["run", "method", "seed", "task", "metric", "value", "stderr"])
    head, (lora, base) = paired_table(settings, scores)
    assert len(head) == len(lora) == len(base)
    values = [round(cell.value, 6) if isinstance(cell, Cell) else cell for cell in lora]
    assert values[:5] == ["d", "LoRA", "3", 3.0, 1.0]
    assert values[7:10] == ["3", round(170 / 3, 6), 20.0]
    assert base[7] == "2"
    assert "mean accuracy (%)" not in paired_table(settings, scores.assign(metric="bits_per_byte"))[0]
