"""Compare two models on the same documents: a paired test, so that what both get right or wrong does not count."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from misa.files import write_text

COMPARISON_FILE = "comparison.csv"
NUM_RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """One row of `comparison.csv`.

    Attributes:
        task: Name of the task.
        metric: Its metric.
        value: Mean of the model over the documents.
        base_value: Mean of the other model.
        difference: value - base_value.
        stderr: Standard error of the difference, over documents.
        p_value: Chance of such a difference, or a larger one, if the models were equally good; two-sided.
        test: `mcnemar_exact` for right or wrong, `permutation` (sign flips of the differences) for other numbers.
        num_documents: Documents that both were scored on.
        num_better: Documents on which the model scores higher.
        num_worse: Documents on which it scores lower.
    """

    task: str
    metric: str
    value: float
    base_value: float
    difference: float
    stderr: float
    p_value: float
    test: str
    num_documents: int
    num_better: int
    num_worse: int


def compare(task: str, metric: str, values: Sequence[float], base_values: Sequence[float]) -> Comparison:
    """Test whether two models differ.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        values: Scores of the model, one for each document.
        base_values: Scores of the other model on the same documents, in the same order.

    Raises:
        ValueError: If there are no documents, or not as many of one as of the other.
    """
    import numpy as np
    from scipy import stats

    if not len(values) or len(values) != len(base_values):
        raise ValueError(f"{task}, {metric}: {len(values)} and {len(base_values)} documents cannot be paired")
    difference = np.asarray(values, dtype=float) - np.asarray(base_values, dtype=float)
    num_better, num_worse = int((difference > 0).sum()), int((difference < 0).sum())
    if set(np.unique([values, base_values])) <= {0.0, 1.0}:
        test = "mcnemar_exact"
        # Under the hypothesis a document on which they differ is a fair coin.
        discordant = num_better + num_worse
        p_value = stats.binomtest(num_better, discordant).pvalue if discordant else 1.0
    else:
        test = "permutation"
        found = stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=NUM_RESAMPLES, rng=np.random.default_rng(0)
        )
        p_value = found.pvalue
    stderr = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return Comparison(
        task,
        metric,
        float(np.mean(values)),
        float(np.mean(base_values)),
        float(difference.mean()),
        float(stderr),
        float(p_value),
        test,
        len(difference),
        num_better,
        num_worse,
    )


def compare_evaluations(harness_file: str | Path, base_file: str | Path) -> list[Comparison]:
    """Compare all tasks and metrics that two evaluations share.

    Args:
        harness_file: `lm_eval.json` of the model.
        base_file: `lm_eval.json` of the other model.

    Raises:
        ValueError: If they share no task, or a task was run on other documents or with other prompts.
    """
    ours, theirs = (json.loads(Path(path).read_text(encoding="utf-8"))["samples"] for path in (harness_file, base_file))
    rows = []
    for task in ours:
        if task not in theirs:
            continue
        for filter_name in dict.fromkeys(sample.get("filter", "none") for sample in ours[task]):
            one, other = (_by_document(samples[task], filter_name) for samples in (ours, theirs))
            if one.keys() != other.keys():
                raise ValueError(
                    f"{task} was not scored on the same prompts: {harness_file} has {len(one)} documents, "
                    f"{base_file} has {len(other)}, {len(one.keys() & other.keys())} of them the same"
                )
            suffix = "" if filter_name == "none" else f"-{filter_name}"
            first = next(iter(one.values()))
            for metric in first["metrics"]:
                pairs = [(_number(one[key][metric]), _number(other[key][metric])) for key in one]
                if all(value is not None for pair in pairs for value in pair):
                    rows.append(compare(task, metric + suffix, *map(list, zip(*pairs, strict=True))))  # type: ignore[arg-type]
    if not rows:
        raise ValueError(f"{harness_file} and {base_file} share no task that can be compared")
    return rows


def write_comparison(rows: Sequence[Comparison], folder: str | Path) -> Path:
    """Write `comparison.csv` into a folder; one row for each task and metric."""
    names = [field.name for field in fields(Comparison)]
    lines = [",".join(names), *(",".join(str(asdict(row)[name]) for name in names) for row in rows)]
    return write_text(Path(folder) / COMPARISON_FILE, "\n".join(lines) + "\n")


def _by_document(samples: Sequence[dict[str, Any]], filter_name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        (sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]): sample
        for sample in samples
        if sample.get("filter", "none") == filter_name
    }


def _number(value: Any) -> float | None:
    """A metric of one document as a number; a pair, such as (nats, bytes) of a perplexity, as its ratio."""
    if isinstance(value, list) and len(value) == 2:
        return float(value[0]) / float(value[1])
    return float(value) if isinstance(value, int | float) else None
