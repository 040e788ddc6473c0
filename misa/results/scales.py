"""What each scale of the workflow takes: its training runs, what a job occupies, and the hours that were measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.results.readme import duration, read_times
from misa.results.sheets import read_sheet
from misa.results.tables import write_table

if TYPE_CHECKING:
    import pandas as pd

HEAD = ("scale", "training runs", "a job takes", "measured")
KINDS = ("pretrain", "finetune")
#: The scale that `make reproduce` runs; its whole chain is timed.
TIMED = ("laptop", "make reproduce")


def scale_row(config: Mapping[str, Any], sheet: list[dict[str, str]], runs: pd.DataFrame | None) -> list[str]:
    """One row of the table.

    Args:
        config: The scale.
        sheet: Rows of its sheet.
        runs: Table `runs.csv` of committed results, or None.

    Returns:
        Cells for `HEAD`: the last says how many of these runs are among the results, and the hours that their training
        and scoring took on each machine, added up as if one job ran at a time. Runs of other scales have the same
        names, and other numbers of steps.
    """
    steps = {row["run"]: _num_steps(config, row) for row in sheet}
    takes = f"{config['gpus']} GPU" if config["gpus"] else "all cores"
    if not config["gpus"] and config["threads"]:
        takes = "one core" if config["threads"] == 1 else f"{config['threads']} cores"
    found = []
    if runs is not None:
        trained = runs[runs["kind"].isin(KINDS) & (runs["num_steps"] == runs["run"].map(steps))]
        own = runs[runs["run"].isin(trained["run"])]
        for machine, there in own.groupby("machine"):
            seconds = sum(float(there[name].sum()) for name in ("wall_s", "evaluate_s") if name in there)
            number = int((trained["machine"] == machine).sum())
            found.append(f"{number} run{'s' if number != 1 else ''}, {duration(seconds)} on {machine}")
    return [f"`{config['scale']}`", str(len(sheet)), takes, "; ".join(found) or "none"]


def _num_steps(config: Mapping[str, Any], row: Mapping[str, str]) -> float:
    """Steps of a run of the sheet, by the last option that says so; not a number for whole epochs."""
    options = [config[row["kind"]]["args"], config["mixes"].get(row.get("data", ""), {}).get("train", ""), row["args"]]
    *_, last = [math.nan, *re.findall(r"--max_steps (\d+)", " ".join(options))]
    return float(last)


def write_scales(configs_dir: str | Path, tables_dir: str | Path, output_dir: str | Path) -> list[Path]:
    """Write `scales.md` and `scales.tex`.

    Args:
        configs_dir: Folder of the scales' configurations; sheets are named in them from two folders above.
        tables_dir: Folder of committed tables, with those of a study in a folder of its name, and `timings.json`.
        output_dir: Folder to write, made if needed.

    Returns:
        The paths written.

    Raises:
        ValueError: If there is no configuration, or one is no YAML or lacks a key, or a sheet is unusable.
    """
    import yaml

    from misa.figures import read_table

    rows: list[list[str]] = []
    for path in sorted(Path(configs_dir).glob("*.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds {type(config).__name__}, allowed are names with their values")
        if missing := sorted({"scale", "study", "sheet", "threads", "gpus", "mixes", *KINDS} - config.keys()):
            raise ValueError(f"{path} has no {', '.join(missing)}")
        own = [row for _, row in read_sheet(Path(configs_dir).parents[1] / config["sheet"])]
        folder = Path(tables_dir) if config["study"] == "headline" else Path(tables_dir) / config["study"]
        table = folder / "runs.csv"
        row = scale_row(config, own, read_table(table) if table.is_file() else None)
        if config["scale"] == TIMED[0]:
            entry = read_times(Path(tables_dir) / "timings.json").get(TIMED[1])
            row[-1] = f"the whole chain, {duration(entry['seconds'])} on {entry['processor']}" if entry else "none"
        rows.append(row)
    if not rows:
        raise ValueError(f"{configs_dir} has no configuration (*.yaml)")
    return write_table("scales", HEAD, rows, output_dir)
