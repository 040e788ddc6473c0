"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other processes out of the folders of a run, until it is released or this process ends, however it does.

    Args:
        folders: Made if need be; what is empty at the end is removed.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = list(dict.fromkeys(folder.resolve() for folder in folders))
        self._held: list[Any] = []

    def acquire(self) -> None:
        """Lock the folders.

        Raises:
            ValueError: If another process holds one.
            OSError: If one cannot be made or written to.
        """
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK_FILE).open("a")
            try:
                # Such a lock is this process's alone; workers that outlive it for a moment do not hold it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                raise ValueError(f"{folder} is in use by another run: wait for it, or choose another folder") from None
            except OSError:
                # A file system without locks.
                file.close()
                continue
            self._held.append(file)

    def release(self) -> None:
        """Let others in."""
        for file in self._held:
            path = Path(file.name)
            path.unlink(missing_ok=True)
            file.close()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        self._held = []
