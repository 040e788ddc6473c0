"""Checks of the numbers that a user gives."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def check_number(
    name: str,
    value: Any,
    words: str = "must be finite and not negative",
    positive: bool = False,
    most: float = math.inf,
) -> None:
    """Refuse what is no finite number from 0 on.

    Args:
        name: Of the setting.
        value: What was given for it; a tensor of one element is a number, too.
        words: What is allowed.
        positive: Whether 0 is refused as well.
        most: The largest number allowed.

    Raises:
        ValueError: If it is not allowed, naming the setting and the value.
    """
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r}: text is no number (YAML takes 1e-4 for text, and 1.0e-4 for a number)")
    number = float(value) if isinstance(value, Real | Tensor) else math.nan
    if not (0 <= number <= most and math.isfinite(number)) or (positive and number == 0):
        raise ValueError(f"{name}={value}: {words}")
