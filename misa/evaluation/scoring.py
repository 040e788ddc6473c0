"""Run one task of the harness and turn its answer into flat metrics."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.data.records import require_split

if TYPE_CHECKING:
    from misa.evaluation.model import Model

TASK_FOLDER = Path(__file__).resolve().parents[1] / "tasks"

# The file that a task reads from the data folder; a task not named here reads the test split.
SPLITS = {"perplexity": "validation"}


@dataclass(frozen=True)
class Score:
    """What one task gave.

    Attributes:
        task: Name of the task.
        version: Version of the task, from its YAML file.
        metrics: `<metric>`, `<metric>_stderr` and `num_documents`.
        evaluate_s: Seconds spent.
        harness: The harness's own result, untouched.
    """

    task: str
    version: str
    metrics: dict[str, float]
    evaluate_s: float
    harness: dict[str, Any]


def task_names() -> list[str]:
    """Return the names of all tasks, in alphabetic order."""
    return sorted(path.stem for path in TASK_FOLDER.glob("*.yaml"))


def task_digest(task: str) -> str:
    """Return one SHA-256 over a task's YAML file and the Python file the tasks share."""
    digest = hashlib.sha256()
    for path in (TASK_FOLDER / f"{task}.yaml", TASK_FOLDER / "documents.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_files(tasks: list[str], data_dir: str) -> dict[str, Path]:
    """Return the file that each task reads.

    Args:
        tasks: Names of tasks.
        data_dir: Folder with the data.

    Raises:
        ValueError: If the folder or a file is missing; the message says what the folder holds.
    """
    if not Path(data_dir).is_dir():
        raise ValueError(f"data_dir {data_dir}: no such folder")
    return {task: require_split(data_dir, SPLITS.get(task, "test")) for task in tasks}


def run_task(task: str, model: Model, data_dir: str, limit: int | None, seed: int) -> Score:
    """Score a model on one task.

    Args:
        task: Name of the task, one of `task_names()`.
        model: The loaded model.
        data_dir: Folder the task reads.
        limit: Number of documents from the start of the data; None for all.
        seed: Seed of whatever the harness draws (greedy tasks draw nothing).

    Raises:
        ValueError: If the data folder lacks what the task reads.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # The harness's own tasks are left out: indexing thousands of files takes half a minute.
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data_dir": data_dir})
    start = time.perf_counter()
    found = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,
        batch_size=model.batch_size,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    evaluate_s = time.perf_counter() - start
    metrics = flat_metrics(found["results"][task])
    metrics["num_documents"] = float(found["n-samples"][task]["effective"])
    if task == "perplexity":
        metrics |= perplexity_metrics(found["samples"][task], model.num_scored_tokens)
    return Score(task, str(found["versions"][task]), metrics, evaluate_s, found)


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Turn the harness's "exact_match,none" into "exact_match"; another filter's name stays behind a dash.

    Args:
        results: The harness's results of one task.

    Returns:
        Numbers by metric, and `<metric>_stderr` where the harness gives one.
    """
    metrics = {}
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if comma and isinstance(value, int | float):
            stem, stderr = (name.removesuffix("_stderr"), "_stderr") if name.endswith("_stderr") else (name, "")
            metrics[stem + ("" if filter_name == "none" else f"-{filter_name}") + stderr] = float(value)
    return metrics


def perplexity_metrics(samples: list[dict[str, Any]], num_tokens: int) -> dict[str, float]:
    """Return the perplexity for each token, which the harness leaves out because it depends on the tokenizer.

    Args:
        samples: The harness's samples, each with the log-likelihood of a document in nats.
        num_tokens: Tokens predicted in all documents.

    Returns:
        loss (nats a token), perplexity, num_tokens, num_bytes, and the standard error of bits_per_byte over documents
        (linearised ratio estimator; 0 for one document).
    """
    nats = [-float(sample["filtered_resps"][0]) for sample in samples]
    sizes = [len(sample["doc"]["text"].encode()) for sample in samples]
    num_bytes, num_documents = sum(sizes), len(samples)
    loss, rate = sum(nats) / num_tokens, sum(nats) / num_bytes
    squares = sum((value - rate * size) ** 2 for value, size in zip(nats, sizes, strict=True))
    variance = squares * num_documents / max(1, num_documents - 1)
    return {
        "bits_per_byte_stderr": math.sqrt(variance) / num_bytes / math.log(2),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "num_tokens": float(num_tokens),
        "num_bytes": float(num_bytes),
    }


def merge_harness(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the harness's results of several tasks into what one call with all of them gives.

    Entries by task name are joined; everything else (model, versions, machine) is that of the last one.

    Args:
        found: Results as the harness returned them, one task each.
    """
    merged: dict[str, Any] = {}
    by_task = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "samples", "group_subtasks")
    for one in found:
        merged |= {name: {**merged.get(name, {}), **value} if name in by_task else value for name, value in one.items()}
    return merged
