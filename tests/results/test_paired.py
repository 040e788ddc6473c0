"""Means, errors and intervals of paired differences."""

from __future__ import annotations

import math

import pytest

from misa.results.paired import half_interval, mean_and_error


def test_interval_of_three_values_is_that_of_students_t() -> None:
    """The 97.5% point of t with two degrees of freedom is 4.302653 (any table of it)."""
    values = [1.0, 2.0, 6.0]
    assert half_interval(values) == pytest.approx(4.302653 * mean_and_error(values)[1], rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert math.isnan(half_interval([1.0]))
