"""Collected tables in a folder, with a manifest of what they hold and where it comes from: written, and added to."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.files import sha256_file, write_text
from misa.results.collect import (
    COPIED,
    MEASUREMENTS,
    TABLES,
    Found,
    collect,
    digest_warnings,
    find_results,
    require_distinct,
    scored_run,
)

if TYPE_CHECKING:
    import pandas as pd

    from misa.results.schema import Result

MANIFEST_FILE = "MANIFEST.json"
# Where new tables are written, and the name that their folder gets when all are: then they are moved one by one, and
# what a kill left there is moved by the next command.
_PARTIAL, _WHOLE = ".tables.partial", ".tables.whole"


def run(paths: Iterable[str | Path], folder: str | Path, *, add: bool = False, replace: bool = False) -> list[Path]:
    """Collect results into tables; warn on standard error if they come from different code.

    Args:
        paths: See `find_results`.
        folder: Folder to write.
        add: Add to the tables that are there, instead of writing them anew. Default False.
        replace: The same, in the place of runs of the same name. Default False.

    Returns:
        The paths written.

    Raises:
        ValueError: See `find_results`, `collect`, `write_tables` and `add_to_tables`.
    """
    found = find_results(paths)
    warnings = digest_warnings(found)
    if warnings:
        print("warning: these results were made by different versions of the package:", file=sys.stderr)
        for warning in warnings:
            print(f"  {warning}", file=sys.stderr)
    if add or replace:
        return add_to_tables(collect(found), found, folder, replace=replace)
    return write_tables(collect(found), found, folder)


def write_tables(tables: Mapping[str, pd.DataFrame], found: Sequence[Found], folder: str | Path) -> list[Path]:
    """Write each table as CSV, and `MANIFEST.json`, which says by digest what they hold and from which runs they come.

    The same results give the same bytes. After a kill at any moment the tables are the old ones, or the next command
    that writes or adds to them ends what this one had begun.

    Args:
        tables: From `collect`.
        found: The results they were collected from.
        folder: Folder to write, made if needed.

    Returns:
        The paths written, the manifest last.

    Raises:
        ValueError: If another process writes tables in the folder.
    """
    with _held(Path(folder)):
        return _put(Path(folder), tables, [_manifest_row(item.result) for item in found])


def add_to_tables(
    tables: Mapping[str, pd.DataFrame], found: Sequence[Found], folder: str | Path, *, replace: bool = False
) -> list[Path]:
    """Add rows to the tables of a folder, whose own results need not be at hand; its other rows stay as they are.

    Args:
        tables: From `collect`; those that the folder does not hold are left out.
        found: The results they were collected from.
        folder: Folder with tables and their `MANIFEST.json`.
        replace: Put results in the place of those of the same kind and name; a measurement only where it is the one of
            its kind. Default False.

    Returns:
        The paths written, the manifest last.

    Raises:
        ValueError: If the folder has no manifest, a table is not the one that the manifest describes, or a run is
            there already and not to be replaced; but a run may be scored on further tasks. If scores to be replaced
            are on more tasks than those given, a measurement would be there twice, or another process writes tables in
            the folder.
    """
    with _held(Path(folder)):
        return _put(Path(folder), *_joined(tables, found, Path(folder), replace))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing tables in a folder; end first what a killed one had begun."""
    from misa.training.lock import FolderLock

    lock = FolderLock([folder])
    lock.acquire()
    try:
        if (folder / _WHOLE).is_dir():
            print(f"note: {folder} gets the tables of a command that was interrupted there", file=sys.stderr)
            _move(folder)
        yield
    finally:
        shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
        lock.release()


def _put(folder: Path, tables: Mapping[str, pd.DataFrame], runs: list[dict[str, Any]]) -> list[Path]:
    """Write tables and the manifest that describes them."""
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    described = {}
    for name, table in tables.items():
        path = write_text(partial / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        described[path.name] = {"sha256": sha256_file(path), "rows": len(table)}
    write_text(partial / MANIFEST_FILE, json.dumps({"tables": described, "runs": runs}, indent=2) + "\n")
    partial.rename(folder / _WHOLE)
    _move(folder)
    return [folder / name for name in (*described, MANIFEST_FILE)]


def _move(folder: Path) -> None:
    """Move tables that are all written, and their manifest last, to their places."""
    for path in sorted((folder / _WHOLE).iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        path.replace(folder / path.name)
    (folder / _WHOLE).rmdir()


def _joined(
    tables: Mapping[str, pd.DataFrame], found: Sequence[Found], folder: Path, replace: bool
) -> tuple[dict[str, pd.DataFrame], list[dict[str, Any]]]:
    """The tables of a folder and the rows of its manifest with those of the results; see `add_to_tables`."""
    import pandas as pd

    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: only tables that were collected can be added to")
    manifest = _read_manifest(path)
    there = Counter((run["kind"], run["run"]) for run in manifest["runs"])
    of_kind = Counter(run["kind"] for run in manifest["runs"])
    gone = {_key(item.result) for item in found} if replace else set()
    for item in found:
        kind, name = item.result.kind, item.result.run
        if there[kind, name] and kind in MEASUREMENTS and (not replace or of_kind[kind] > 1):
            raise ValueError(f"{folder} holds the result {name} of kind {kind} already, whose rows do not name it")
        if there[kind, name] > 1 and replace:
            raise ValueError(
                f"{folder} holds {there[kind, name]} results of kind {kind} called {name}: which to replace?"
            )
        if there[kind, name] and kind != "evaluate" and not replace:
            raise ValueError(f"{folder} holds the run {name} of kind {kind} already")
    joined = {}
    for name, described in manifest["tables"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != described["sha256"]:
            raise ValueError(f"{folder / name} is not the table that {path} describes")
        added = tables[Path(name).stem].to_csv(index=False, lineterminator="\n")
        # As text, so that no digit changes.
        old, new = (pd.read_csv(text, dtype=str, keep_default_na=False) for text in (folder / name, StringIO(added)))
        if name == "scores.csv":
            again = set(zip(new["run"], new["task"], strict=True)) & set(zip(old["run"], old["task"], strict=True))
            if again and not replace:
                tasks = ", ".join(sorted({task for _, task in again}))
                raise ValueError(f"{folder} holds scores of the same run on {tasks} already")
            # `loc`, as an empty list of its own would choose no columns.
            old = old.loc[[key not in again for key in zip(old["run"], old["task"], strict=True)]]
            scored = {scored_run(i.result) for i in found if i.result.kind == "evaluate" and _key(i.result) in there}
            if replace and (left := sorted(set(old["task"][old["run"].isin(scored)]))):
                raise ValueError(
                    f"{folder} holds scores on {', '.join(left)}, too, of what is to be replaced, which would be left "
                    "without their origin; give results on all these tasks"
                )
        elif any(there[key] and key[0] == COPIED.get(Path(name).stem, ("",))[0] for key in gone):
            old = new.iloc[:0]  # also where its columns have changed since
        elif gone and {"kind", "run"} <= set(old):
            old = old.loc[[key not in gone for key in zip(old["kind"], old["run"], strict=True)]]
        table = pd.concat([old, new], ignore_index=True)
        require_distinct(Path(name).stem, table)
        joined[Path(name).stem] = table
    runs = [run for run in manifest["runs"] if (run["kind"], run["run"]) not in gone]
    return joined, runs + [_manifest_row(item.result) for item in found]


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of tables, with what is read of it in its place."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = [(run["kind"], run["run"]) for run in manifest["runs"]]
        known += [(TABLES[Path(name).stem], table["sha256"]) for name, table in manifest["tables"].items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of collected tables ({type(error).__name__}: {error})") from error
    return manifest


def _key(result: Result) -> tuple[str, str]:
    return result.kind, result.run


def _manifest_row(result: Result) -> dict[str, Any]:
    origin = result.provenance
    return {
        "run": result.run,
        "kind": result.kind,
        "created": origin.created,
        "package_digest": origin.package_digest,
        "commit": origin.commit,
        "dirty": origin.dirty,
        "data_digest": origin.data_digest,
        "versions": origin.versions,
        "machine": origin.machine.model_dump(),
    }
