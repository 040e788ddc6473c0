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
# Numbers that the permutation test holds at a time: 16 MB, and no p value depends on it.
MOST_SIGNS = 2_000_000

# The one metric whose samples hold a pair: the log-likelihood of a document in nats, and its bytes.
BITS_PER_BYTE = "bits_per_byte"


@dataclass(frozen=True)
class Comparison:
    """One row of `comparison.csv`.

    Attributes:
        task: Name of the task.
        metric: Its metric.
        value: Mean of the model over the documents; of bits_per_byte over their bytes.
        base_value: Mean of the other model.
        difference: value - base_value.
        stderr: Standard error of the difference, over documents.
        p_value: Chance of such a difference, or a larger one, if the models were equally good; two-sided.
        test: `mcnemar_exact` for right or wrong, `permutation` (sign flips of the differences) for other numbers.
        num_documents: Documents that both were scored on.
        num_better: Documents on which the model scores better: higher, or lower where the metric is a loss.
        num_worse: Documents on which it scores worse.
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


def compare(
    task: str,
    metric: str,
    values: Sequence[float],
    base_values: Sequence[float],
    weights: Sequence[float] | None = None,
    higher_is_better: bool = True,
) -> Comparison:
    """Test whether two models differ.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        values: Scores of the model, one for each document.
        base_values: Scores of the other model on the same documents, in the same order.
        weights: How much each document counts, more than 0, such as its bytes; None means all the same.
        higher_is_better: Whether a higher score is a better one.

    Raises:
        ValueError: If there are no documents, or not as many of one as of the other.
    """
    import numpy as np
    from scipy import stats

    if not len(values) or len(values) != len(base_values):
        raise ValueError(f"{task}, {metric}: {len(values)} and {len(base_values)} documents cannot be paired")
    difference = np.asarray(values, dtype=float) - np.asarray(base_values, dtype=float)
    num_higher, num_lower = int((difference > 0).sum()), int((difference < 0).sum())
    num_better, num_worse = (num_higher, num_lower) if higher_is_better else (num_lower, num_higher)
    shares = np.ones(len(difference)) if weights is None else np.asarray(weights, dtype=float) / np.mean(weights)
    mean = float((shares * difference).mean())
    if set(np.unique([values, base_values])) <= {0.0, 1.0}:
        test = "mcnemar_exact"
        # Under the hypothesis a document on which they differ is a fair coin.
        discordant = num_better + num_worse
        p_value = stats.binomtest(num_better, discordant).pvalue if discordant else 1.0
    else:
        test = "permutation"
        found = stats.permutation_test(
            (shares * difference,),
            np.mean,
            permutation_type="samples",
            n_resamples=NUM_RESAMPLES,
            batch=max(1, MOST_SIGNS // len(difference)),
            rng=np.random.default_rng(0),
        )
        p_value = found.pvalue
    stderr = math.nan
    if len(difference) > 1:
        # Of a ratio, linearised; with equal weights the standard deviation over the root of their number.
        squares = (shares * (difference - mean)) ** 2
        stderr = math.sqrt(squares.sum() / (len(difference) - 1)) / math.sqrt(len(difference))
    return Comparison(
        task,
        metric,
        float((shares * values).mean()),
        float((shares * base_values).mean()),
        mean,
        stderr,
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
    found, base = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (harness_file, base_file))
    rows = []
    for task, samples in found["samples"].items():
        if task not in base["samples"]:
            continue
        for filter_name in dict.fromkeys(sample.get("filter", "none") for sample in samples):
            one, other = (_by_document(some, filter_name) for some in (samples, base["samples"][task]))
            if one.keys() != other.keys():
                raise ValueError(
                    f"{task} was not scored on the same prompts: {harness_file} has {len(one)} documents, "
                    f"{base_file} has {len(other)}, {len(one.keys() & other.keys())} of them the same"
                )
            suffix = "" if filter_name == "none" else f"-{filter_name}"
            directions = found.get("higher_is_better", {}).get(task, {})
            for metric in next(iter(one.values()))["metrics"]:
                pairs = [(one[key][metric], other[key][metric]) for key in one]
                weights = None
                if metric == BITS_PER_BYTE:
                    # A document without a byte has no rate.
                    pairs = [pair for pair in pairs if pair[0][1]]
                    weights = [num_bytes for (_, num_bytes), _ in pairs]
                    pairs = [(_bits_per_byte(*value), _bits_per_byte(*base_value)) for value, base_value in pairs]
                if pairs and all(isinstance(value, int | float) for pair in pairs for value in pair):
                    values, base_values = ([pair[which] for pair in pairs] for which in (0, 1))
                    higher_is_better = directions.get(metric) is not False
                    rows.append(compare(task, metric + suffix, values, base_values, weights, higher_is_better))
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


def _bits_per_byte(log_likelihood: float, num_bytes: int) -> float:
    return -log_likelihood / math.log(2) / num_bytes
