"""How a run can fail, apart from wrong input; kept where importing it loads nothing."""

from __future__ import annotations


class DivergedError(RuntimeError):
    """A loss is not a finite number; the message names the step and the records."""
