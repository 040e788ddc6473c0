"""What the commands need beside torch and numpy, the only packages that the optimizer asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_with(main: Callable[[], int], extra: str) -> None:
    """Run a command and leave the process; a line says what to install where a package is missing.

    Args:
        main: The command; returns the exit status.
        extra: Optional dependencies of `pyproject.toml` that hold all it needs.

    Raises:
        SystemExit: Always; with status 2 if a package is missing.
    """
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        if (error.name or "misa").partition(".")[0] == "misa":
            raise
        print(f"error: {error}; install with: pip install 'misa-optimizer[{extra}]'", file=sys.stderr)
        sys.exit(2)
