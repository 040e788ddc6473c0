"""Find, read and write JSON records, and say precisely where a file is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from misa.files import sha256_file, write_text

Record = dict[str, Any]

DIGEST_FILE = "digest.json"


def find_split(source: str | Path, split: str) -> Path | None:
    """Find the file of one split.

    Args:
        source: A folder that holds `<split>.jsonl` or `<split>.json`, or one such file, which is then split "train".
        split: Name of the split, such as "train", "validation" or "test".

    Returns:
        The file, or None if the source has no such split.

    Raises:
        ValueError: If the source does not exist.
    """
    source = Path(source)
    if source.is_file():
        return source if split == "train" else None
    if not source.is_dir():
        raise ValueError(f"data source {source} is neither a folder nor a file")
    for suffix in (".jsonl", ".json"):
        if (path := source / f"{split}{suffix}").is_file():
            return path
    return None


def require_split(source: str | Path, split: str) -> Path:
    """Like `find_split`, but a missing split is an error that lists what is there.

    Raises:
        ValueError: If the source does not exist or has no such split.
    """
    path = find_split(source, split)
    if path is None:
        present = sorted(entry.name for entry in Path(source).iterdir()) if Path(source).is_dir() else []
        raise ValueError(f"{source} has no {split}.jsonl or {split}.json; it holds {', '.join(present) or 'nothing'}")
    return path


def read_records(path: str | Path, required: Iterable[str]) -> list[Record]:
    """Read a file of JSON objects, one a line (`.jsonl`) or as one list (`.json`).

    Args:
        path: The file, UTF-8.
        required: Fields that every record must have, with text in them.

    Returns:
        The records in file order.

    Raises:
        ValueError: If the file is missing, empty, not JSON, or a record lacks a field; the message names the file and
            the line (for a `.json` list the number of the record, counted from 1).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data file at {path}")
    required = tuple(required)
    records = []
    for where, record in _json_list(path) if path.suffix == ".json" else _json_lines(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        for field in required:
            if field not in record:
                raise ValueError(f"{where}: field {field!r} is missing; the record has {', '.join(map(repr, record))}")
            if not isinstance(record[field], str):
                raise ValueError(f"{where}: field {field!r} must be text, found {type(record[field]).__name__}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines in one move.

    Args:
        path: The file to write.
        records: The records, written in the order given and with the order of their fields.
    """
    return write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def files_digest(paths: Iterable[str | Path]) -> str:
    """Return one SHA-256 over the names and contents of several files, in the order given."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def write_digest(folder: Path, kind: str, settings: Record, files: Iterable[str], **details: Any) -> None:
    """Write `digest.json`, which says what a generated data folder holds and that it is complete.

    Args:
        folder: The folder, whose other files are already written.
        kind: What the data is, such as "family".
        settings: The settings it was made with; the same settings again are recognised by them.
        files: Names of its data files, from which the digest is taken.
        **details: More to record, such as counts, versions, licences.
    """
    names = list(files)
    digest = {
        "kind": kind,
        "settings": settings,
        **details,
        "files": {name: sha256_file(folder / name) for name in names},
        "digest": files_digest(folder / name for name in names),
    }
    write_text(folder / DIGEST_FILE, json.dumps(digest, indent=2, ensure_ascii=False) + "\n")


def already_made(folder: str | Path, kind: str, settings: Record) -> bool:
    """Say whether a folder already holds exactly the data asked for, by its `digest.json` and the files themselves.

    Args:
        folder: The folder to look at; it need not exist.
        kind: What the data is.
        settings: The settings asked for.

    Returns:
        True if the data is there and whole, False if there is none.

    Raises:
        ValueError: If the folder holds other data, or files that were changed since they were written.
    """
    folder = Path(folder)
    if not (folder / DIGEST_FILE).is_file():
        return False
    try:
        digest = json.loads((folder / DIGEST_FILE).read_text(encoding="utf-8"))
        found = {"kind": digest["kind"], **digest["settings"]}
        files = digest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / DIGEST_FILE} is malformed: {error!r}; remove the folder to make it anew"
        ) from error
    asked = {"kind": kind, **settings}
    if found != asked:
        changed = ", ".join(
            f"{name} is {found.get(name)!r} there and {asked.get(name)!r} here"
            for name in sorted(found.keys() | asked.keys())
            if found.get(name) != asked.get(name)
        )
        raise ValueError(f"{folder} holds other data: {changed}; remove the folder or choose another")
    for name, sha256 in files:
        if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
            raise ValueError(f"{folder / name} is missing or was changed; remove the folder to make it anew")
    return True


def _json_lines(path: Path) -> Iterable[tuple[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json_list(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of records, found {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield f"{path}, record {number}", record
