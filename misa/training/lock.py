"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
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
            while not self._acquire(folder):
                pass

    def _acquire(self, folder: Path) -> bool:
        """Lock one folder; False if the file was taken away, by its last holder, before the lock was there."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK_FILE
        file = path.open("a")
        try:
            # Such a lock is this process's alone; workers that outlive it for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"{folder} is in use by another run: wait for it, or choose another folder") from None
        except OSError:
            # A file system without locks.
            file.close()
            return True
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.close()
            return False
        self._held.append(file)
        return True

    def release(self) -> None:
        """Let others in."""
        for file in self._held:
            path = Path(file.name)
            path.unlink(missing_ok=True)
            file.close()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        self._held = []
