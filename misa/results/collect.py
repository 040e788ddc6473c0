"""From many result files to the tidy tables that figures, score tables and notebooks open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.results.io import RESULT_FILE, read_curves, read_result

if TYPE_CHECKING:
    import pandas as pd

    from misa.results.schema import Result

_RUN_COLUMNS = ("run", "kind", "method", "seed", "model", "data")
#: Columns of each table. `runs` has further ones, from the metrics, peaks and timings of its runs.
TABLES: dict[str, tuple[str, ...]] = {
    "convergence": (
        *("kind", "data", "machine", "run", "method", "seed"),
        *("step", "tokens", "time_s", "metric", "value"),
    ),
    "scores": (
        *("run", "method", "seed", "task", "metric", "value", "stderr"),
        *("num_documents", "task_version", "prompt_hash"),
    ),
    "memory": ("method", "model", "batch_size", "seq_len", "checkpointing", "category", "bytes", "moment"),
    "variance": ("snapshot", "step", "scheme", "quantity", "value"),
    "gradient_norms": ("snapshot", "step", "block", "layer", "matrix", "numel", "sq_norm", "noise"),
    "staleness": ("snapshot", "step", "policy", "source", "age", "quantity", "value"),
    "rate": ("problem", "momentum_step", "interval", "seed", "num_updates", "lr", "mean_sq_norm"),
    "settings": (
        *("run", "kind", "method", "seed", "data", "learning_rate", "always_on_lr", "include"),
        *("granularity", "budget", "num_blocks", "interval", "eta", "state_policy", "per_parameter", "probe_every"),
        *("order", "first_pass", "sample_last"),
        *("num_steps", "eval_loss", "train_s"),
    ),
    "runs": (*_RUN_COLUMNS, "machine"),
}
# Tables that the command which measured them writes beside its result, whose rows do not name it: kind of the result,
# and the columns that were measured. The others say what was measured, which no two rows share.
COPIED: dict[str, tuple[str, frozenset[str]]] = {
    "memory": ("memory", frozenset(["bytes"])),
    "variance": ("variance", frozenset(["value"])),
    "gradient_norms": ("variance", frozenset(["numel", "sq_norm", "noise"])),
    "staleness": ("variance", frozenset(["value"])),
    "rate": ("rate", frozenset(["lr", "mean_sq_norm"])),
}
MEASUREMENTS = frozenset(kind for kind, _ in COPIED.values())


@dataclass(frozen=True)
class Found:
    """A result and the folder it lies in."""

    result: Result
    folder: Path


def find_results(paths: Iterable[str | Path]) -> list[Found]:
    """Read results.

    Args:
        paths: Result files, folders that hold one, or folders above such folders.

    Returns:
        The results in the order of kind and run name.

    Raises:
        ValueError: If a path holds none, a file is malformed, or two results have the same kind and run name, of
            scores that of the scored run; but a run may be scored in several parts, on tasks of their own.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_file():
            files[path.resolve()] = None
            continue
        inside = [path / RESULT_FILE] if (path / RESULT_FILE).is_file() else sorted(path.rglob(RESULT_FILE))
        if not inside:
            raise ValueError(f"no {RESULT_FILE} at or below {path}")
        files.update(dict.fromkeys(file.resolve() for file in inside))
    found: list[tuple[str, str, str, Found]] = []
    taken: dict[tuple[str, str, str], Path] = {}
    for file in files:
        result = read_result(file)
        tasks = (result.kind == "evaluate" and result.config.get("tasks")) or ("",)
        for task in tasks:
            key = (result.kind, scored_run(result) if task else result.run, task)
            if key in taken:
                both = f"{taken[key]}, {file.parent}"
                which = f" with the task {task}" if task else ""
                raise ValueError(f"two results of kind {result.kind} are of the run {key[1]}{which}: {both}")
            taken[key] = file.parent
        found.append((result.kind, result.run, min(tasks), Found(result, file.parent)))
    return [item for *_, item in sorted(found, key=lambda entry: entry[:3])]


def collect(found: Sequence[Found]) -> dict[str, pd.DataFrame]:
    """Build every table of `TABLES`; those without rows have their columns alone.

    Args:
        found: The results.

    Returns:
        Table name -> data frame.

    Raises:
        ValueError: If a file that a result names is missing or malformed, or two results measured the same.
    """
    import pandas as pd

    rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
    for item in found:
        result = item.result
        rows["runs"].append(_run_row(result))
        if result.kind in ("finetune", "pretrain"):
            rows["settings"].append(_settings_row(result))
        if result.kind in ("finetune", "pretrain") and result.curves is not None:
            rows["convergence"] += _curve_rows(item)
        if result.kind == "evaluate":
            rows["scores"] += _score_rows(result)
        for table, (kind, _) in COPIED.items():
            if result.kind == kind:
                rows[table] += _copied_rows(item.folder / f"{table}.csv", TABLES[table])
    # An explicit order of columns, so that a table without rows has them too.
    tables = {name: pd.DataFrame(rows[name], columns=_columns(name, rows[name])) for name in TABLES}
    for name, table in tables.items():
        require_distinct(name, table)
    return tables


def require_distinct(name: str, table: pd.DataFrame) -> None:
    """Refuse a table of measurements in which one was taken twice: figures would add the two up."""
    if name not in COPIED:
        return
    told = [column for column in TABLES[name] if column in table and column not in COPIED[name][1]]
    twice = table[table.duplicated(told)]
    if len(twice):
        which = ", ".join(f"{column} {value}" for column, value in twice.iloc[0][told].items())
        raise ValueError(f"table {name} would have two measurements of {which}; give one of the results alone")


def digest_warnings(found: Sequence[Found]) -> list[str]:
    """Say which runs were made by different code: results that are compared should come from one package.

    Args:
        found: The results.

    Returns:
        One message for each digest if there are several, else nothing.
    """
    groups: dict[str, list[str]] = {}
    for item in found:
        groups.setdefault(item.result.provenance.package_digest, []).append(f"{item.result.kind} {item.result.run}")
    if len(groups) < 2:
        return []
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"package digest {digest[:12]}: {', '.join(runs)}" for digest, runs in ordered]


def _run_row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(result, name) for name in _RUN_COLUMNS}
    row["machine"] = _device(result)
    for group in (result.metrics, result.peaks, result.timings):
        # Names with a slash belong to one task, method or snapshot; they have tables of their own.
        row |= {name: value for name, value in group.items() if "/" not in name}
    return row


def _device(result: Result) -> str:
    """What a run computed on, whose times compare with no other's."""
    return result.provenance.machine.gpu or result.provenance.machine.processor


def _settings_row(result: Result) -> dict[str, Any]:
    """What a training run was told, and how it ended; None where a method has no such setting or leaves it open."""
    told = {**result.config.get("method_settings", {}), "learning_rate": result.config.get("learning_rate")}
    ended = {**result.metrics, **result.timings}
    known = {name: getattr(result, name) for name in ("run", "kind", "method", "seed", "data")}
    row = {name: known.get(name, ended.get(name, told.get(name))) for name in TABLES["settings"]}
    return {name: ", ".join(value) if isinstance(value, list) else value for name, value in row.items()}


def _curve_rows(item: Found) -> list[Mapping[str, Any]]:
    result = item.result
    columns = {
        "kind": result.kind,
        "data": result.data,
        "machine": _device(result),
        "run": result.run,
        "method": result.method,
        "seed": result.seed,
    }
    points = read_curves(item.folder / str(result.curves))
    return [columns | point.model_dump() for point in points]


def scored_run(result: Result) -> str:
    """The run whose model was scored; the base model has only the evaluation's own name."""
    return result.config.get("base_run") or result.run


def _score_rows(result: Result) -> list[Mapping[str, Any]]:
    versions, hashes = result.config.get("task_versions", {}), result.config.get("prompt_hashes", {})
    rows: list[Mapping[str, Any]] = []
    for name, value in result.metrics.items():
        task, slash, metric = name.rpartition("/")
        if not slash or metric.startswith("num_") or metric.endswith("_stderr"):
            continue  # sizes and errors are no scores; they stand beside one
        rows.append(
            {
                "run": scored_run(result),
                "method": result.method,
                "seed": result.seed,
                "task": task,
                "metric": metric,
                "value": value,
                "stderr": result.metrics.get(f"{name}_stderr"),
                "num_documents": _whole(result.metrics.get(f"{task}/num_documents")),
                "task_version": str(versions.get(task, "")),
                "prompt_hash": str(hashes.get(task, "")),
            }
        )
    return rows


def _copied_rows(path: Path, columns: tuple[str, ...]) -> list[Mapping[str, Any]]:
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"the result at {path.parent} lacks its table {path.name}")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    if missing := [column for column in columns if column not in table.columns]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    rows: list[Mapping[str, Any]] = table[list(columns)].to_dict("records")
    return rows


def _columns(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = dict.fromkeys(TABLES[name])
    for row in rows:
        columns.update(dict.fromkeys(row))
    return list(columns)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
