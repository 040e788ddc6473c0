"""Write files and folders so that a kill at any moment leaves none of them half done."""

from __future__ import annotations

import csv
import filecmp
import glob
import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits.

    Args:
        path: The file to read; it is read in pieces, so its size does not matter.
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: str | Path) -> list[int]:
    """Return size and CRC-32 of a file: a check against damage, at the speed of reading."""
    checksum, length = 0, 0
    with Path(path).open("rb") as stream:
        while chunk := stream.read(2**22):
            checksum, length = zlib.crc32(chunk, checksum), length + len(chunk)
    return [length, checksum]


# The list of a folder's files, written last.
SEAL_FILE = "complete.json"


def seal(folder: Path) -> None:
    """Write the list of a folder's files with size and checksum, which says that it is whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE)
    listed = {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}
    write_text(folder / SEAL_FILE, json.dumps(listed, indent=1) + "\n")


def broken(folder: Path, required: Iterable[str] = (), only: tuple[str, ...] = ("",)) -> str | None:
    """Say what is wrong with a folder that was to be sealed.

    Args:
        folder: The folder.
        required: Files that must be in its list; of some joined by "|", one.
        only: Endings of the files that are looked at.

    Returns:
        The fault in words, or None if every file is there as it was written.
    """
    try:
        files = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        for name, written in files.items():
            if not name.endswith(only):
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if fingerprint(folder / name) != written:
                return f"{name} was cut or changed"
    except FileNotFoundError:
        return f"{SEAL_FILE} is missing, so it was never finished"
    except (ValueError, AttributeError):
        return f"{SEAL_FILE} is damaged"
    missing = [names for names in required if not any(name in files for name in names.split("|"))]
    return f"{', '.join(names.split('|')[0] for names in missing)} was not saved" if missing else None


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in one move: a reader sees the old file or the whole new one.

    Args:
        path: The file to write; its folder is made if needed.
        text: The content, written as UTF-8 with the line ends given.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        # Without this a power cut could leave the new name on an empty file.
        os.fsync(stream.fileno())
    partial.replace(path)
    return path


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Path:
    """Write a tidy table in one move; numbers keep every digit.

    Args:
        path: The file to write; its folder is made if needed.
        columns: Names of the columns, in order.
        rows: One mapping for each row; a missing column is left empty.

    Returns:
        The path written.

    Raises:
        ValueError: If a row has a column that is not named.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, text.getvalue())


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder against all who do the same, until this process ends at the latest; False if another has done so.

    True without such locks, too: on many file systems that are mounted over a network, and on Windows.
    """
    with ExitStack() as opened:
        is_ours = True
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            is_ours = False
        except (ImportError, OSError):
            pass
        yield is_ours


def _version(path: Path) -> tuple[int, int] | None:
    """What is another after every write of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def new_folder(path: str | Path, last: str) -> Iterator[Path]:
    """Fill a folder under a temporary name and give it its own name at the end.

    If the block raises, the target is left as it was. Where the target already exists (a workflow makes the folders
    of its outputs beforehand), the files are moved into it one by one, `last` at the end, so the presence of `last`
    always means that the folder is whole. Several processes may fill the same folder at the same time, each under a
    name of its own: the first to end gives it its content, and the others must have made the same.

    Args:
        path: The folder to make.
        last: Name of the file inside it that marks it as complete.

    Yields:
        The temporary folder, empty, to be filled by the caller.

    Raises:
        ValueError: If another process has meanwhile put something else into the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.partial")
    with ExitStack() as held:
        with _locked(path.parent, wait=True):
            for left in path.parent.glob(f".{glob.escape(path.name)}.*partial"):
                # Its lock is free if the process that filled it is gone.
                with _locked(left, wait=False) as is_free:
                    if is_free:
                        shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            held.enter_context(_locked(partial, wait=False))
        before = _version(path / last)
        try:
            yield partial
            with _locked(path.parent, wait=True):
                if _version(path / last) in (None, before):
                    _put(partial, path, last)
                elif not _holds(path, partial):
                    raise ValueError(
                        f"{path} was written by another process meanwhile, with other content; choose another folder"
                    )
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, path: Path, last: str) -> None:
    """Give a filled folder its name, or move what is in it into the one of that name."""
    if path.is_dir() and any(path.iterdir()):
        (path / last).unlink(missing_ok=True)
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == last):
            target = path / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            entry.replace(target)
    else:
        # A rename onto an empty folder is allowed and atomic.
        partial.rename(path)


def _holds(folder: Path, other: Path) -> bool:
    """Whether a folder holds all files of another, byte for byte."""
    names = [path.relative_to(other) for path in other.rglob("*") if path.is_file()]
    return all((folder / name).is_file() and filecmp.cmp(folder / name, other / name, shallow=False) for name in names)


# A folder of a killed process is left behind; nobody writes one for longer than this.
_STALE_S = 24 * 3600


@contextmanager
def new_cache_entry(path: str | Path) -> Iterator[Path]:
    """Fill and seal a folder that several processes may make at the same time, each with the same content.

    Each fills a folder of its own and renames it at the end. Whoever comes second finds the name taken and throws its
    copy away; a broken folder under that name gives way instead.

    Args:
        path: The folder to make.

    Yields:
        The temporary folder, empty, to be filled by the caller.

    Raises:
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    own = f".{path.name}.{os.getpid()}-{time.monotonic_ns()}"
    partial, damaged = path.with_name(f"{own}.partial"), path.with_name(f"{own}.damaged")
    partial.mkdir()
    try:
        yield partial
        seal(partial)
        if path.exists() and broken(path):
            path.rename(damaged)
        try:
            partial.rename(path)
        except OSError:
            if broken(path):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
