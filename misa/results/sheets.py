"""Run sheets, read as `workflows/rules/common.smk` reads them, which must not import this package."""

from __future__ import annotations

from pathlib import Path


def read_sheet(sheet: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of a run sheet, each with the number of its line, from 0.

    Args:
        sheet: Tab separated, names of the columns first; empty lines and those that begin with # are no rows.

    Raises:
        ValueError: If the sheet is missing, empty or lacks a column, or a row has another number of cells.
    """
    path = Path(sheet)
    if not path.is_file():
        raise ValueError(f"sheet {sheet} does not exist")
    columns: list[str] = []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines()):
        if not line.strip() or line.startswith("#"):
            continue
        cells = line.split("\t")
        if not columns:
            columns = cells
            continue
        if len(cells) != len(columns):
            raise ValueError(f"sheet {sheet}, line {number + 1}: {len(cells)} cells, and {len(columns)} columns")
        row = dict(zip(columns, map(str.strip, cells), strict=True))
        if not {"run", "kind", "args"} <= row.keys():
            raise ValueError(f"sheet {sheet} lacks one of the columns run, kind, args")
        rows.append((number, row))
    if not columns:
        raise ValueError(f"sheet {sheet} is empty")
    return rows
