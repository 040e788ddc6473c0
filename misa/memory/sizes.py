"""Amounts of memory in words: `24GiB`, and the other way round."""

from __future__ import annotations

import re

GIB = 2**30
_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str, name: str = "memory") -> int:
    """Read an amount of memory.

    Args:
        text: A number with a unit, such as 24GiB, 24 GB or 900MiB.
        name: What it is called in messages.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) *([A-Za-z]+)", text.strip())
    if not found or found[2].lower() not in _UNITS or not float(found[1]):
        raise ValueError(f"{name} is {text!r}; it must be an amount with a unit, such as 24GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def in_gib(num_bytes: float) -> str:
    """An amount in GiB with two decimals, or, below a tenth of one, in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.2f} MiB"
