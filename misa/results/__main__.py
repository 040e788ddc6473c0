"""`python -m misa.results`: collect results into tables, write score tables, fill the README's generated sections."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from misa.extras import exit_with

TABLES_DIR = "paper_figures/tables"
# Tables of studies of one question.
STUDY_VERBS = {
    "ablation": "an ablation -> table of paired differences",
    "learning_rates": "a grid of learning rates of pre-training -> table of the chosen ones",
    "finetune_rates": "a grid of learning rates of fine-tuning -> table of the chosen ones",
}
TIMES_FILE = "paper_figures/data/timings.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        Exit status: 0; 1 if `readme --check` finds the file out of date; 2 for wrong input or a path that cannot be
        written.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.verb == "collect":
        from misa.results.store import run

        _print(run(options.results, options.output_dir, add=options.add, replace=options.replace))
    elif options.verb == "tables":
        from misa.results.overview import write_overview
        from misa.results.paired import write_paired_table
        from misa.results.published import write_published_table
        from misa.results.tables import write_score_tables

        _print(write_score_tables(options.tables, options.output_dir))
        _print(write_paired_table(options.tables, options.output_dir))
        _print(write_published_table(options.tables, options.output_dir))
        _print(write_overview(options.tables, options.output_dir, options.memory_grid))
    elif options.verb == "pages":
        from misa.results.pages import write_pages

        _print(write_pages(options.tables, options.output_dir, options.memory_grid))
    elif options.verb in STUDY_VERBS:
        from misa.figures import read_table
        from misa.results.pages import write_study_table
        from misa.results.tuning import apply_rates

        settings = read_table(options.table)
        sheets = getattr(options, "sheets", ())
        if missing := [sheet for sheet in sheets if not Path(sheet).is_file()]:
            raise ValueError(f"sheet {missing[0]} does not exist")
        _print(write_study_table(options.verb, settings, options.output_dir, options.page_dir))
        for sheet in sheets:
            print(f"{sheet}: {', '.join(apply_rates(sheet, settings)) or 'no row changed'}")
    elif options.verb == "benchmarks":
        from misa.results.benchmarks import write_benchmark_table

        _print(write_benchmark_table(options.tables, options.output_dir))
    elif options.verb == "scales":
        from misa.results.scales import write_scales

        _print(write_scales(options.configs, options.tables, options.output_dir))
    elif options.verb == "time":
        from misa.results.readme import record_time

        _print([record_time(options.command, options.seconds, options.output)])
    else:
        from misa.results.readme import update_readme

        stale = [
            page for page in options.pages if not update_readme(page, options.tables, options.times, options.check)
        ]
        if options.check and stale:
            print(f"{', '.join(stale)}: out of date; run the same command without --check", file=sys.stderr)
            return 1
        for page in options.pages:
            print(f"{page}: {'updated' if page in stale else 'up to date'}")
    return 0


def _print(paths: list[Path]) -> None:
    for path in paths:
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m misa.results", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    collect = verbs.add_parser("collect", help="result files -> tidy tables (CSV) and MANIFEST.json")
    collect.add_argument("results", nargs="+", help="result.json files, or folders at or below which they lie")
    collect.add_argument("--output_dir", "--output-dir", required=True, help="folder of the tables")
    existing = collect.add_mutually_exclusive_group()
    existing.add_argument(
        "--add", action="store_true", help="add rows to the tables in that folder, which stay as they are"
    )
    existing.add_argument(
        "--replace",
        action="store_true",
        help="the same, but runs take the place of those of the same name, a measurement that of the one of its "
        "kind; scores stay unless the evaluation is given, too",
    )
    tables = verbs.add_parser(
        "tables", help="tidy tables -> overview, scores, paired differences, published numbers, in Markdown and LaTeX"
    )
    tables.add_argument("--tables", required=True, help="folder with scores.csv, runs.csv and settings.csv")
    tables.add_argument("--output_dir", "--output-dir", default=TABLES_DIR, help="folder to write (%(default)s)")
    for verb, what in STUDY_VERBS.items():
        one = verbs.add_parser(verb, help=f"settings.csv of {what}")
        one.add_argument("--table", required=True, help="the file settings.csv")
        one.add_argument("--output_dir", "--output-dir", default=TABLES_DIR, help="folder to write (%(default)s)")
        one.add_argument("--page_dir", "--page-dir", help="folder for a page of the report (default: none is written)")
        if verb != "ablation":
            one.add_argument("--sheets", nargs="*", default=[], help="run sheets whose rows get the chosen rates")
    pages = verbs.add_parser("pages", help="the same tables, and where all runs come from, as HTML pages of the report")
    pages.add_argument("--tables", required=True, help="folder of the tidy tables and their MANIFEST.json")
    pages.add_argument("--output_dir", "--output-dir", required=True, help="folder to write")
    for one in (tables, pages):
        one.add_argument(
            "--memory_grid", "--memory-grid", help="folder of memory_grid.csv and .json (default: that of the tables)"
        )
    benchmarks = verbs.add_parser("benchmarks", help="tidy tables -> table of the paper's benchmarks, both protocols")
    benchmarks.add_argument("--tables", required=True, help="folder with scores.csv")
    benchmarks.add_argument("--output_dir", "--output-dir", default=TABLES_DIR, help="folder to write (%(default)s)")
    scales = verbs.add_parser("scales", help="scales of the workflow -> table of their runs and measured hours")
    scales.add_argument("--configs", default="workflows/config", help="folder of configurations (%(default)s)")
    scales.add_argument("--tables", default="paper_figures/data", help="folder of committed tables (%(default)s)")
    scales.add_argument("--output_dir", "--output-dir", default=TABLES_DIR, help="folder to write (%(default)s)")
    readme = verbs.add_parser("readme", help="fill the generated sections of Markdown files")
    readme.add_argument("pages", nargs="+", metavar="FILE", help="the files, such as README.md docs/*.md docs/*/*.md")
    readme.add_argument("--tables", default=TABLES_DIR, help="folder with the score tables (%(default)s)")
    readme.add_argument("--times", default=TIMES_FILE, help="file of measured times (%(default)s)")
    readme.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    timing = verbs.add_parser("time", help="record how long a command took on this machine")
    timing.add_argument("command", help="the command, such as 'make test'")
    timing.add_argument("seconds", type=float, help="its wall time")
    timing.add_argument("--output", default=TIMES_FILE, help="file of measured times (%(default)s)")
    return parser


if __name__ == "__main__":
    exit_with(main, "figures")
