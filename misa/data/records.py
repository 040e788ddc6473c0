"""Find, read and write JSON records, and say precisely where a file is wrong."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from misa.files import sha256_file, write_text

logger = logging.getLogger(__name__)

Record = dict[str, Any]

DIGEST_FILE = "digest.json"

SUFFIXES = (".jsonl", ".json", ".parquet")

# A file with one of these endings is one document.
DOCUMENT_SUFFIXES = (".txt", ".md")

# How many malformed records a message names one by one.
NUM_NAMED = 3


class StreamError(ValueError):
    """A document of a stream is malformed or cannot be read, which may show in the middle of a run."""


def find_split(source: str | Path, split: str) -> Path | None:
    """Find the file of one split.

    Args:
        source: A folder that holds `<split>.jsonl`, `.json` or `.parquet`, or one such file, then split "train".
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
    for suffix in SUFFIXES:
        if (path := source / f"{split}{suffix}").is_file():
            return path
    return None


def surely_a_path(name: str) -> bool:
    """Say of a file or folder that does not exist that its name can be no hub id ("owner/name").

    It has not two parts, ends like a data file, or lies in a folder that is there.
    """
    path = Path(name)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        return True
    return path.suffix in (*SUFFIXES, *DOCUMENT_SUFFIXES) or path.parent.is_dir()


def require_split(source: str | Path, split: str) -> Path:
    """Like `find_split`, but a missing split is an error that lists what is there.

    Raises:
        ValueError: If the source does not exist or has no such split.
    """
    path = find_split(source, split)
    if path is None:
        present = sorted(entry.name for entry in Path(source).iterdir()) if Path(source).is_dir() else []
        wanted = " or ".join(f"{split}{suffix}" for suffix in SUFFIXES)
        raise ValueError(f"{source} has no {wanted}; it holds {', '.join(present) or 'nothing'}")
    return path


def read_records(path: str | Path, required: Iterable[str], max_malformed: float = 0.0) -> list[Record]:
    """Read a file of JSON objects, one a line (`.jsonl`) or as one list (`.json`), or of rows (`.parquet`).

    Args:
        path: The file, UTF-8.
        required: Fields that every record must have, with text in them.
        max_malformed: Share of the records that may be malformed and is then left out with one warning, 0 to below 1.

    Returns:
        The records in file order.

    Raises:
        ValueError: If the file is missing, empty or unreadable as a whole, or too many records are malformed; the
            message names the file and the line (for a `.json` list the number of the record, for `.parquet` the row,
            counted from 1).
    """
    required = tuple(required)

    def check(record: Record) -> Record:
        require_text(record, required)
        return record

    return sound_records(numbered_records(path), check, max_malformed, str(path))


def require_text(record: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Check that a record has some fields, with text in them.

    Raises:
        ValueError: If a field is missing or holds something else, or half a character.
    """
    for field in fields:
        if field not in record:
            raise ValueError(f"field {field!r} is missing; the record has {', '.join(map(repr, record))}")
        if not isinstance(record[field], str):
            raise ValueError(f"field {field!r} must be text, found {type(record[field]).__name__}")
        require_unicode(field, record[field])


def require_unicode(field: str, value: Any) -> None:
    """Check that a value can be written as UTF-8: JSON can name half of a character (a surrogate), which no text holds.

    Args:
        field: Name of its field.
        value: Text, or anything else that JSON knows.

    Raises:
        ValueError: If it has half a character.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ValueError(f"field {field!r} holds half a character ({half}), which is no text") from None


def numbered_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Read a file and say of each record where it stands.

    Args:
        path: A `.json` list, `.parquet`, or, with any other ending, a file of JSON lines.

    Yields:
        Place ("FILE, line 7") and record; where a line is no JSON, a `ValueError` that says why stands for the record.

    Raises:
        ValueError: If the file is missing or cannot be read as a whole.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data file at {path}")
    readers = {".json": _json_list, ".parquet": _parquet_rows}
    return readers.get(path.suffix, _json_lines)(path)


def sound_records(
    numbered: Iterable[tuple[str, Any]], check: Callable[[Record], Record], max_malformed: float, source: str
) -> list[Record]:
    """Check records one by one, and leave out the malformed ones as long as they are few.

    Args:
        numbered: Place and record, as `numbered_records` gives them.
        check: Returns the record to keep, or raises `ValueError` for a malformed one.
        max_malformed: Largest share of malformed records, 0 to below 1.
        source: Name of the whole in messages.

    Raises:
        ValueError: If there is no record, or too many are malformed; the first few are named.
    """
    require_share(max_malformed)
    records, faults, count = [], [], 0
    for where, record in numbered:
        count += 1
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, found {type(record).__name__}")
            records.append(check(record))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if count == 0:
        raise ValueError(f"{source} holds no records")
    if faults:
        named = "; ".join(faults[:NUM_NAMED]) + ("; ..." if len(faults) > NUM_NAMED else "")
        share = f"{len(faults)} of {count} records malformed"
        if len(faults) > max_malformed * count:
            raise ValueError(f"{named} ({share}, max_malformed allows a share of {max_malformed:g})")
        logger.warning("%s: %s and left out: %s", source, share, named)
    if not records:
        raise ValueError(f"{source} holds no records that are not malformed")
    return records


def require_share(max_malformed: float) -> None:
    """Check a share of malformed records.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 <= max_malformed < 1:
        raise ValueError(f"max_malformed is {max_malformed}, allowed is a share from 0 to below 1")


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines in one move.

    Args:
        path: The file to write.
        records: The records, written in the order given and with the order of their fields.
    """
    return write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def records_digest(records: Sequence[Mapping[str, Any]]) -> str:
    """Return one SHA-256 over records, their fields sorted, in the order given."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


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


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    yield where, ValueError(f"not valid JSON ({error.msg} at column {error.colno})")
                # A number of thousands of digits, or lists in lists without end.
                except (ValueError, RecursionError) as error:
                    yield where, ValueError(f"JSON that cannot be read ({error})")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read ({error})") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of records, found {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield f"{path}, record {number}", record


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        number = 0
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
