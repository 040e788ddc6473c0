"""The tables of the report as HTML pages, and the page that says where every number comes from."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.files import write_text
from misa.results.ablation import ablation_table
from misa.results.overview import read_overview
from misa.results.paired import paired_table
from misa.results.published import published_table
from misa.results.store import MANIFEST_FILE
from misa.results.tables import SCORE_TABLES, Cell, cell_text, read_tidy, score_table, write_table
from misa.results.tuning import tuning_table

if TYPE_CHECKING:
    import pandas as pd

#: The pages, each `NAME.html`.
PAGES = ("overview", *SCORE_TABLES, "paired", "published", "runs")
#: Study of one question -> what makes its table of `settings.csv`.
STUDIES = {"ablation": ablation_table, "learning_rates": tuning_table, "finetune_rates": tuning_table}
RUNS_HEAD = ("run", "study", "kind", "made", "commit", "package", "data", "torch", "machine")
# Origin of the tables of the full-size model, which come from no run of a sheet.
_GRID_FILE = "memory_grid.json"
_STYLE = (
    "body{font:14px/1.5 sans-serif;margin:1.5em;background:white;color:black}"
    "table{border-collapse:collapse}th,td{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)


def to_html(title: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Write a table as a page of its own: mean ± standard error, the best in bold if it is told apart."""
    lines = ["".join(f"<th>{html.escape(word)}</th>" for word in head)]
    lines += ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    head_tags = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head_tags}</head><body>\n<table>\n{body}\n</table>\n</body></html>\n"


def write_study_table(
    name: str, settings: pd.DataFrame, output_dir: str | Path, page_dir: str | Path | None = None
) -> list[Path]:
    """Write the table of a study of one question, for the report as a page, too.

    Args:
        name: A key of `STUDIES`.
        settings: Tidy table `settings.csv`.
        output_dir: Folder of `NAME.md` and `NAME.tex`.
        page_dir: Folder of `NAME.html`; None writes none.

    Returns:
        The paths written.

    Raises:
        ValueError: If the table is unusable.
    """
    head, rows = STUDIES[name](settings)
    paths = write_table(name, head, rows, output_dir)
    if page_dir is not None:
        paths.append(write_text(Path(page_dir) / f"{name}.html", to_html(name, head, rows)))
    return paths


def runs_table(tables_dir: str | Path, grid_dir: str | Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Say of every run by which code, on what machine and when it was made.

    Args:
        tables_dir: Folder with `MANIFEST.json`, and with a folder for each study of one question, with its own.
        grid_dir: Folder with `memory_grid.json`, if the full-size model was measured. Default: `tables_dir`.

    Returns:
        Column headings, and one row for each run. The study is the name of its folder, "" for the tables themselves.
        Digests and commits show their first eight digits; a `*` behind a commit says that the package differed from it.

    Raises:
        ValueError: If there is no manifest, or a file is no manifest.
    """
    manifest, of_grid = Path(tables_dir, MANIFEST_FILE), Path(grid_dir or tables_dir, _GRID_FILE)
    if not manifest.is_file():
        raise ValueError(f"{manifest} does not exist")
    of_studies = sorted(Path(tables_dir).glob(f"*/{MANIFEST_FILE}"))
    rows = []
    for path in (manifest, *filter(Path.is_file, [of_grid]), *of_studies):
        study = path.parent.name if path in of_studies else ""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if path == of_grid:
                content = {"runs": [{"run": "memory_grid", "kind": "memory", **content["provenance"]}]}
            rows += [_run_row(run, study) for run in content["runs"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} does not say where its tables come from: {error!r}") from None
    return list(RUNS_HEAD), rows


def write_pages(tables_dir: str | Path, output_dir: str | Path, grid_dir: str | Path | None = None) -> list[Path]:
    """Write one page for each of `PAGES`.

    Args:
        tables_dir: Folder of the tidy tables and their manifest.
        output_dir: Folder to write, made if needed.
        grid_dir: Folder of the tables of the full-size model, if it was measured. Default: `tables_dir`.

    Returns:
        The paths written.

    Raises:
        ValueError: If a tidy table or the manifest is missing.
    """
    scores, runs, settings = (read_tidy(tables_dir, name) for name in ("scores", "runs", "settings"))
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str | Cell]]]] = {
        "overview": read_overview(tables_dir, grid_dir),
        **{name: score_table(scores, runs, kind) for name, kind in SCORE_TABLES.items()},
        "paired": paired_table(settings, scores),
        "published": published_table(tables_dir),
        "runs": runs_table(tables_dir, grid_dir),
    }
    return [write_text(Path(output_dir) / f"{name}.html", to_html(name, *tables[name])) for name in PAGES]


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    text = cell_text(cell)
    return f"<b>{text}</b>" if cell.best else text


def _run_row(run: Mapping[str, Any], study: str) -> list[str]:
    machine = run["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return [
        run["run"],
        study,
        run["kind"],
        run["created"][:16].replace("T", " "),
        run["commit"][:8] + ("*" if run["dirty"] else ""),
        run["package_digest"][:8],
        run["data_digest"][:8],
        run["versions"].get("torch", ""),
        f"{machine['num_threads']} of {machine['num_cores']} cores, {machine['processor']}, {memory}, "
        f"{machine['gpu'] or 'no GPU'}",
    ]
