"""Published numbers beside ours: `published.csv` holds them, each with its source; nothing in it was measured here.

A published number stands in a column of its own where task, model and method are the same, and in the table
`published.md` in any case, there with what was measured here in the same setting, if anything was.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED_FILE = Path(__file__).with_name("published.csv")
#: Tasks of this name scored by the paper's protocol; the published numbers are of no other.
PREFIX = "misa_"
#: Peaks measured at the published setting, by `python -m misa.memory --compare`; below the folder of the tables.
MEMORY_FILE = "published/memory_compare.csv"
HEAD = ("source", "model", "setting", "measure", "method", "published", "measured here")


@cache
def published() -> pd.DataFrame:
    """All published numbers.

    Returns:
        Columns source, place (in the source, if known), model, setting, label (the method as published), method (key
        of `misa.methods.METHODS`, if it is there), task, metric, unit, and value as it was printed.
    """
    import pandas as pd

    return pd.read_csv(PUBLISHED_FILE, dtype=str, keep_default_na=False)


def same_model(ours: str, theirs: str) -> bool:
    """Whether two names mean one model: letters and digits count alone, and what stands before a name does not."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in (ours, theirs)]
    return plain[0].endswith(plain[1])


def published_cell(method: str, model: str, task: str, metric: str, data: str = "") -> str:
    """Find the published number that a score can be compared with.

    Args:
        method: Key of `misa.methods.METHODS`.
        model: Name of our model.
        task: Our task.
        metric: Our metric.
        data: What the model was pre-trained on.

    Returns:
        The number and its source, or "".
    """
    rows = published()
    rows = rows[(rows["method"] == _base(method)) & (rows["task"] == _their_task(task, metric, data))]
    for row in rows.to_dict("records"):
        if same_model(model, row["model"]):
            return f"{row['value']} ({', '.join(filter(None, (row['source'].partition(' (')[0], row['place'])))})"
    return ""


def published_table(tables_dir: str | Path) -> tuple[list[str], list[list[str]]]:
    """Build the table of all published numbers.

    Args:
        tables_dir: Folder of the tidy tables. What was measured is read from its `scores.csv` and `runs.csv`, the same
            two in `benchmarks/`, and `MEMORY_FILE`, as far as they are there.

    Returns:
        Column headings, and one row for each number.
    """
    folder = Path(tables_dir)
    scores = _measured_scores(folder) | _measured_scores(folder / "benchmarks")
    memory = _measured_memory(folder / MEMORY_FILE)
    rows = []
    for row in published().to_dict("records"):
        ours = ""
        if row["metric"] == "memory":
            # The published setting names the card first, which has no part in the bytes of tensors.
            ours = memory.get((row["model"], row["setting"].partition(", ")[2], row["method"]), "")
        for (method, model, task), value in scores.items():
            if (method, task) == (row["method"], row["task"]) and same_model(model, row["model"]):
                ours = f"{value * (100 if row['unit'] == '%' else 1):.4g}"
        measure = row["metric"] if row["task"] == "training" else f"{row['task']}, {row['metric']}"
        source = ", ".join(filter(None, (row["source"], row["place"])))
        unit = f" ({row['unit']})" if row["unit"] else ""
        rows.append([source, row["model"], row["setting"], measure + unit, row["label"], row["value"], ours])
    return list(HEAD), rows


def write_published_table(tables_dir: str | Path, output_dir: str | Path) -> list[Path]:
    """Write `published.md` and `published.tex`.

    Args:
        tables_dir: See `published_table`.
        output_dir: Folder to write, made if needed.

    Returns:
        The paths written.
    """
    from misa.results.tables import write_table

    return write_table("published", *published_table(tables_dir), output_dir)


def _base(method: str) -> str:
    return method.removesuffix("_official").removesuffix("_paper")


def _their_task(task: str, metric: str, data: str) -> str:
    if task.startswith(PREFIX) and metric == "acc":
        return task.removeprefix(PREFIX)
    return data if data and metric == "perplexity" else "none"


def _measured_scores(folder: Path) -> dict[tuple[str, str, str], float]:
    """Mean over seeds of what has a published counterpart: method, model, task -> value."""
    from misa.results.tables import read_tidy

    files = [folder / f"{name}.csv" for name in ("scores", "runs")]
    if not all(file.is_file() for file in files):
        return {}
    scores, runs = (read_tidy(folder, name) for name in ("scores", "runs"))
    # Its training, if it has any, knows the text that a run was trained on, and stands first in any order of rows.
    runs = runs.sort_values("kind", key=lambda kind: kind == "evaluate", kind="stable")
    about = runs.drop_duplicates("run").set_index("run")[["model", "data"]].astype(str).T.to_dict()
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in scores.to_dict("records"):
        model, data = about.get(row["run"], {"model": "", "data": ""}).values()
        task = _their_task(row["task"], row["metric"], data)
        if published_cell(row["method"], model, row["task"], row["metric"], data):
            found.setdefault((_base(row["method"]), model, task), []).append(row["value"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def _measured_memory(path: Path) -> dict[tuple[str, str, str], str]:
    """Peak in GB by model, setting and method."""
    from misa.figures import read_table
    from misa.figures.style import METHODS

    if not path.is_file():
        return {}
    keys = ["model", "checkpointing", "batch_size", "seq_len", "method"]
    table = read_table(path, [*keys, "moment", "bytes"])
    found = {}
    for (model, checkpointing, batch, length, label), rows in table[table["moment"] == "peak"].groupby(keys):
        setting = f"{'checkpointing, ' if checkpointing else ''}{batch} x {length} tokens"
        method = next((name for name, look in METHODS.items() if label.startswith(look.label)), label)
        found[model, setting, method] = f"{rows['bytes'].sum() / 1e9:.1f}"
    return found
