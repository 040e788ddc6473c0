"""`python -m misa.figures`: draw a figure, or all of them, from tidy tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from misa.extras import exit_with
from misa.figures import FIGURES, plot, read_table


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        Exit status: 0, or 2 for wrong input or a path that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m misa.figures",
        description="Draw figures as PDF and PNG. The same table gives the same bytes.",
    )
    parser.add_argument("name", choices=[*FIGURES, "all"], help="which figure, or all whose table has rows")
    parser.add_argument("--table", help="CSV file (default: the figure's table in --data_dir)")
    parser.add_argument(
        "--output",
        help="path without ending; .pdf or .png at its end is taken off (default: the figure's name in --output_dir)",
    )
    parser.add_argument("--data_dir", "--data-dir", default="paper_figures/data", help="folder of the tables")
    parser.add_argument("--output_dir", "--output-dir", default="paper_figures", help="folder of the figures")
    options = parser.parse_args(arguments)
    try:
        if options.name == "all" and (options.table or options.output):
            raise ValueError("--table and --output go with one figure; with all, give --data_dir and --output_dir")
        drawn = 0
        for name in FIGURES if options.name == "all" else [options.name]:
            table = Path(options.table or Path(options.data_dir) / FIGURES[name])
            # A fresh run of a study has its tables in no folder of the study's name. With all, they may be of no study.
            beside = Path(options.data_dir) / table.name
            if options.name != "all" and not options.table and not table.is_file() and beside.is_file():
                table = beside
            if options.name == "all" and (fault := _fault(table)):
                print(f"{name}: skipped, {table} {fault}", file=sys.stderr)
                continue
            stem = Path(options.output or Path(options.output_dir) / name)
            _draw(name, table, stem.with_suffix("") if stem.suffix in (".pdf", ".png") else stem)
            drawn += 1
        if not drawn:
            tables = ", ".join(FIGURES.values())
            raise ValueError(f"{options.data_dir} holds none of the tables {tables}, or none with rows")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _fault(table: Path) -> str:
    """Why a table has nothing to draw; empty if it has."""
    if not table.is_file():
        return "does not exist"
    return "has no rows" if read_table(table).empty else ""


def _draw(name: str, table: Path, stem: Path) -> None:
    from misa.figures.style import save

    try:
        figure = plot(name, read_table(table))
    except ValueError as error:
        raise ValueError(f"{name} from {table}: {error}") from None
    for path in save(figure, stem):
        print(path)


if __name__ == "__main__":
    exit_with(main, "figures")
