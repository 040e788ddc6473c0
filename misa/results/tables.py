"""Score tables in Markdown and LaTeX, from the tidy tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from misa.files import write_text
from misa.results.published import published_cell

if TYPE_CHECKING:
    import pandas as pd

#: Name of each score table -> kind of training run it tells of.
SCORE_TABLES = {"scores": "finetune", "pretraining": "pretrain"}
BASE_METHOD = "none"
#: Metrics worth showing, most telling first. A task with none of them shows the first that it has.
SHOWN_METRICS = ("exact_match", "relation_match", "acc_norm", "acc", "bits_per_byte", "perplexity")
_NEEDED = {
    "scores": ("run", "method", "seed", "task", "metric", "value", "stderr", "num_documents"),
    "runs": ("run", "kind", "method", "seed", "model", "data"),
    "settings": ("run", "kind", "method", "seed", "data", "eval_loss"),
}
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "ppl")


@dataclass(frozen=True)
class Cell:
    """One number of a table, with its standard error (not a number if unknown) and whether it leads its column."""

    value: float
    stderr: float = math.nan
    best: bool = False


def higher_is_better(metric: str) -> bool:
    """Whether larger values of a metric are better, told from its name: not for losses and perplexities."""
    return not any(word in metric for word in _LOWER_IS_BETTER)


def with_series(table: pd.DataFrame) -> pd.DataFrame:
    """Say which runs differ in their seed alone, so that only these are averaged.

    Args:
        table: Has the columns run, method and seed, perhaps data and task; of one kind of run.

    Returns:
        The table with a column series: the method's name, or, for a method of which several runs share a seed (an
        ablation), data and task, the run's name without its ending `-s<seed>`.
    """
    keys = [name for name in ("method", "seed", "data", "task") if name in table]
    runs = table[["run", *keys]].drop_duplicates()
    several = set(runs.loc[runs.duplicated(keys), "method"])
    series = [
        str(run).removesuffix(f"-s{seed}") if method in several else method
        for run, method, seed in zip(table["run"], table["method"], table["seed"], strict=True)
    ]
    return table.assign(series=series)


def of_shared_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the seeds that all series have, if there are any, so that their means are over the same data.

    Args:
        table: Has the columns series (see `with_series`), seed and method; the base model stays in any case.
    """
    is_base = table["method"] == BASE_METHOD
    seeds = [set(own["seed"]) for _, own in table[~is_base].groupby("series")]
    shared = set.intersection(*seeds) if seeds else set()
    return table[is_base | table["seed"].isin(shared)] if shared else table


def series_label(series: str, method: str) -> str:
    """What a series is called in tables and figures: the method's label, or its own name if it is no whole method."""
    from misa.figures.style import METHODS, look

    return look(METHODS, method).label if series == method else series


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean score over seeds, not a number where one of them diverged.

    The standard error of one run is the harness's own, over documents. Of several runs it is the larger of that and the
    standard error of the mean over seeds: all seeds are scored on the same documents, so more seeds do not shrink what
    comes from the choice of documents.

    Args:
        scores: Tidy table `scores.csv`, perhaps with a column data: what the runs were trained on.

    Returns:
        One row for each task, metric, series (see `with_series`) and data: method, value, stderr, num_seeds,
        num_documents, higher_is_better.
    """
    import pandas as pd

    rows = []
    keys = ["task", "metric", "series", *(["data"] if "data" in scores else [])]
    for key, group in with_series(scores).groupby(keys, sort=False):
        of_documents = group["stderr"].astype(float).mean()
        values = group["value"].where(group["value"].map(math.isfinite))
        of_seeds = values.sem()  # not a number for one
        known = [error for error in (of_documents, of_seeds) if not math.isnan(error)]
        rows.append(
            {
                **dict(zip(keys, key, strict=True)),
                "method": group["method"].iloc[0],
                "value": values.mean(skipna=False),
                "stderr": max(known) if known else math.nan,
                "num_seeds": len(group),
                "num_documents": group["num_documents"].max() if "num_documents" in group else math.nan,
                "higher_is_better": higher_is_better(group["metric"].iloc[0]),
            }
        )
    return pd.DataFrame(
        rows, columns=[*keys, "method", "value", "stderr", "num_seeds", "num_documents", "higher_is_better"]
    )


def shown(scores: pd.DataFrame, num_metrics: int) -> pd.DataFrame:
    """Keep the most telling metrics of each task.

    Args:
        scores: Tidy table `scores.csv`.
        num_metrics: At most so many metrics of each task, in the order of `SHOWN_METRICS`.

    Returns:
        Rows of `scores`, task by task in the order of their first appearance.
    """
    import pandas as pd

    parts = []
    for _, rows in scores.groupby("task", sort=False):
        present = list(dict.fromkeys(rows["metric"]))
        chosen = [metric for metric in SHOWN_METRICS if metric in present][:num_metrics] or present[:1]
        parts += [rows[rows["metric"] == metric] for metric in chosen]
    return pd.concat(parts) if parts else scores


def scores_of_kind(scores: pd.DataFrame, runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Scores of the trained models of one kind, and of the base model on the same tasks.

    Args:
        scores: Tidy table `scores.csv`.
        runs: Table `runs.csv`.
        kind: "finetune" or "pretrain".

    Returns:
        Rows of `scores`.
    """
    trained = scores["run"].isin(runs.loc[runs["kind"] == kind, "run"])
    base = (scores["method"] == BASE_METHOD) & scores["task"].isin(scores.loc[trained, "task"])
    return scores[trained | base]


def mark_best(cells: Sequence[Cell], higher: bool) -> list[Cell]:
    """Mark the best of a column, if it leads the next by more than two standard errors of their difference.

    Args:
        cells: A column; the standard errors of the two best must be known for a mark.
        higher: Whether larger is better.

    Returns:
        The cells, at most one of them marked.
    """
    order = sorted(range(len(cells)), key=lambda i: -cells[i].value if higher else cells[i].value)
    if len(order) < 2:
        return list(cells)
    first, second = cells[order[0]], cells[order[1]]
    separated = abs(first.value - second.value) > 2 * math.hypot(first.stderr, second.stderr)
    return [Cell(cell.value, cell.stderr, best=separated and i == order[0]) for i, cell in enumerate(cells)]


def read_tidy(tables_dir: str | Path, name: str) -> pd.DataFrame:
    """Read `scores.csv`, `runs.csv` or `settings.csv` of a folder of tidy tables, with the columns all need.

    Raises:
        ValueError: If it is missing, or a column is.
    """
    from misa.figures import read_table

    return read_table(Path(tables_dir) / f"{name}.csv", _NEEDED[name])


def score_table(scores: pd.DataFrame, runs: pd.DataFrame, kind: str) -> tuple[list[str], list[list[str | Cell]]]:
    """Build a score table: a row for each data set and method, a column for each task and metric, then time and state.

    A column of published numbers follows a task where the same was published for one of the models and methods. Times
    are averaged over the runs on one machine, with a column for each where there are several.

    Args:
        scores: Tidy table `scores.csv`.
        runs: Table `runs.csv`.
        kind: Kind of training run.

    Returns:
        Column headings, and rows whose first cells are the data trained on, if there are several, and the method's
        label, and whose other cells are numbers, "", or "diverged" for a score that is not finite.
    """
    from misa.figures.style import METHODS, in_order

    chosen = shown(scores_of_kind(scores, runs, kind), 2)
    trained = runs[(runs["kind"] == kind) & runs["run"].isin(chosen["run"])]
    # The base model was trained on none of them; it stands first.
    data_of = dict(zip(trained["run"], trained["data"].astype(str), strict=True))
    chosen = with_series(chosen.assign(data=chosen["run"].map(data_of).fillna("")))
    line_of = dict(zip(chosen["run"], zip(chosen["data"], chosen["series"], strict=True), strict=True))
    trained = trained.assign(line=trained["run"].map(line_of))
    summary = summarise(chosen)
    summary["line"] = list(zip(summary["data"], summary["series"], strict=True))
    methods = dict(zip(summary["line"], summary["method"], strict=True))
    order = in_order(METHODS, methods.values())
    lines = sorted(methods, key=lambda line: (line[0], order.index(methods[line]), line[1]))
    seeds = summary.groupby("line")["num_seeds"].max()
    about = trained.groupby("line")[["model", "data"]].first().to_dict("index")
    head = ["method", "runs"]
    columns: list[list[str | Cell]] = [
        [series_label(line[1], methods[line]) for line in lines],
        [str(seeds[line]) for line in lines],
    ]
    if len(set(data_of.values())) > 1:
        head.insert(0, "trained on")
        columns.insert(0, [data for data, _ in lines])
    for (task, metric), rows in summary.groupby(["task", "metric"], sort=False):
        by_line = rows.set_index("line")
        percent = 100.0 if is_share(metric, by_line["value"]) else 1.0
        scored = [line for line in lines if line in by_line.index]
        present = [line for line in scored if math.isfinite(by_line.at[line, "value"])]
        cells = [Cell(percent * by_line.at[line, "value"], percent * by_line.at[line, "stderr"]) for line in present]
        marked = dict(zip(present, mark_best(cells, higher_is_better(metric)), strict=True))
        columns.append([marked.get(line, "diverged" if line in scored else "") for line in lines])
        prefix = "" if task == metric or metric in task else f"{task.replace('_', ' ')}: "
        head.append(f"{prefix}{metric.replace('_', ' ')}{' (%)' if percent > 1 else ''}")
        beside = [published_cell(methods[s], task=task, metric=metric, **about[s]) if s in about else "" for s in lines]
        if any(beside):
            columns.append(list(beside))
            head.append("published")
    machines = dict(iter(trained.groupby("machine", sort=False))) if "machine" in trained else {"": trained}
    for machine, own in machines.items():
        if "train_s" in own:
            columns.append(_means(own, "train_s", lines))
            head.append(f"training (s), {machine}" if len(machines) > 1 else "training (s)")
    if "state_bytes" in trained:
        columns.append(_means(trained, "state_bytes", lines, 2**20))
        head.append("optimizer state (MiB)")
    return head, [list(row) for row in zip(*columns, strict=True)]


def require_one_kind(settings: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table `settings.csv` can be compared row by row.

    Args:
        settings: The table.
        columns: Columns it must have, kind among them.

    Raises:
        ValueError: If a column is missing, there are no rows, or runs of several kinds.
    """
    from misa.figures.style import require

    require(settings, columns)
    if settings["kind"].nunique() > 1:
        raise ValueError(f"the table must have runs of one kind, found {', '.join(settings['kind'].unique())}")


def to_markdown(head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Write a table as Markdown: mean ± standard error, the best in bold if it is told apart."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([_markdown(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Write a table as LaTeX (needs the package booktabs)."""
    body = "".join(" & ".join(_latex(cell) for cell in row) + r" \\" + "\n" for row in rows)
    heading = " & ".join(_escape(word) for word in head)
    return (
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{heading} \\\\\n\\midrule\n{body}"
        "\\bottomrule\n\\end{tabular}\n"
    )


def write_table(
    name: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]], output_dir: str | Path, empty: str = ""
) -> list[Path]:
    """Write a table as `NAME.md` and `NAME.tex`.

    Args:
        name: Its name.
        head: Column headings.
        rows: The rows.
        output_dir: Folder to write, made if needed.
        empty: What the files say in place of a table without rows.

    Returns:
        The paths written.
    """
    texts = {".md": to_markdown(head, rows), ".tex": to_latex(head, rows)}
    return [
        write_text(Path(output_dir) / f"{name}{suffix}", text if rows or not empty else empty)
        for suffix, text in texts.items()
    ]


def write_score_tables(tables_dir: str | Path, output_dir: str | Path) -> list[Path]:
    """Write `scores.md`, `scores.tex`, `pretraining.md` and `pretraining.tex`.

    Args:
        tables_dir: Folder with `scores.csv` and `runs.csv`.
        output_dir: Folder to write, made if needed.

    Returns:
        The paths written. A table without any score says so in one line.

    Raises:
        ValueError: If a tidy table is missing.
    """
    scores, runs = (read_tidy(tables_dir, name) for name in ("scores", "runs"))
    paths = []
    for name, kind in SCORE_TABLES.items():
        empty = f"No scores of kind {kind} yet.\n"
        paths += write_table(name, *score_table(scores, runs, kind), output_dir, empty)
    return paths


def is_share(metric: str, values: pd.Series) -> bool:
    """Whether a metric is a share of documents, which is shown in percent: better when higher, and from 0 to 1."""
    return higher_is_better(metric) and bool(((values >= 0) & (values <= 1)).all())


def _means(runs: pd.DataFrame, name: str, lines: Sequence[tuple[str, str]], unit: float = 1) -> list[str | Cell]:
    means = (runs.groupby("line")[name].mean() / unit).dropna().to_dict()
    return [Cell(means[line]) if line in means else "" for line in lines]


def _format(cell: Cell) -> tuple[str, str]:
    """A number with its error to two digits of the error, or three digits in all where there is none."""
    if math.isnan(cell.stderr) or cell.stderr <= 0:
        digits = max(0, 2 - math.floor(math.log10(abs(cell.value)))) if cell.value else 0
        return f"{cell.value:.{digits}f}", ""
    digits = max(0, 1 - math.floor(math.log10(cell.stderr)))
    return f"{cell.value:.{digits}f}", f"{cell.stderr:.{digits}f}"


def cell_text(cell: Cell, best: str = "") -> str:
    """A number as plain text; `best` stands on both sides of a value that leads its column."""
    value, error = _format(cell)
    value = f"{best}{value}{best}" if cell.best else value
    return f"{value} ± {error}" if error else value


def _markdown(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell_text(cell, best="**")


def _latex(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return _escape(cell)
    value, error = _format(cell)
    value = rf"\mathbf{{{value}}}" if cell.best else value
    return rf"${value} \pm {error}$" if error else f"${value}$"


def _escape(text: str) -> str:
    for character in "&%_#$":
        text = text.replace(character, f"\\{character}")
    return text
