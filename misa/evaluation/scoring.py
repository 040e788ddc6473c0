"""Run one task of the harness and turn its answer into flat metrics."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.data import formats, instruction
from misa.data.instruction import read_instructions
from misa.data.records import Record, numbered_records, read_records, require_split, sound_records
from misa.evaluation.standard import OF_BENCHMARK, STANDARD_TASKS, files_of, local_config, task_folder
from misa.tasks.answers import require_answer
from misa.tasks.benchmarks import BENCHMARKS, find_test, read_test
from misa.tasks.documents import normalise

if TYPE_CHECKING:
    from misa.evaluation.model import Model

TASK_FOLDER = Path(__file__).resolve().parents[1] / "tasks"

# Tasks that read a folder written by `misa.data`, and the split they read.
SPLITS = {"misa_family": "test", "perplexity": "validation"}

PREFIX = "misa_"
FAMILIES = ("math", "commonsense")


@dataclass(frozen=True)
class Score:
    """What one task gave.

    Attributes:
        task: Name of the task.
        version: Version of the task, from its YAML file.
        metrics: `<metric>`, `<metric>_stderr` and `num_documents`.
        evaluate_s: Seconds spent.
        harness: The harness's own result, untouched.
        prompt_hash: SHA-256 over the harness's hashes of all prompts, in order.
    """

    task: str
    version: str
    metrics: dict[str, float]
    evaluate_s: float
    harness: dict[str, Any]
    prompt_hash: str = ""


def task_names() -> list[str]:
    """Return the names of all tasks: ours in alphabetic order, then those of the harness."""
    # A name with an underscore before it is a part that others include.
    ours = {path.stem for path in TASK_FOLDER.glob("[!_]*.yaml")} - {f"{PREFIX}{family}" for family in FAMILIES}
    return [*sorted(ours), *STANDARD_TASKS]


def group_tasks(family: str, protocol: str) -> list[str]:
    """Return the tasks of a family under a protocol.

    Args:
        family: math or commonsense.
        protocol: "paper" (the prompts, decoding and extraction of the paper) or "harness" (the harness's own tasks).
    """
    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.family == family]
    if protocol == "paper":
        return [f"{PREFIX}{name}" for name in names]
    return [OF_BENCHMARK.get(name, name) for name in names]


def expand(names: Sequence[str]) -> list[str]:
    """Replace the groups `misa_math` and `misa_commonsense` by their tasks; drop repetitions.

    Raises:
        ValueError: If a name is unknown.
    """
    tasks: dict[str, None] = {}
    for name in names or [""]:
        family = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and family in FAMILIES:
            tasks.update(dict.fromkeys(group_tasks(family, "paper")))
        elif name in task_names():
            tasks[name] = None
        else:
            groups = [f"{PREFIX}{family}" for family in FAMILIES]
            raise ValueError(f"tasks has {name!r}, allowed are {', '.join([*task_names(), *groups])}")
    return list(tasks)


def task_digest(task: str) -> str:
    """Return one SHA-256 over what defines a task: its YAML files and the code they share, or the harness's files."""
    digest = hashlib.sha256()
    if task in STANDARD_TASKS:
        paths = sorted(task_folder(task).rglob("*.yaml"))
    else:
        shared = ("documents",) if task in SPLITS else ("_math", "_commonsense", "benchmarks", "answers", "hub")
        paths = [path for path in sorted(TASK_FOLDER.iterdir()) if path.stem in (task, *shared) and path.is_file()]
        if task not in SPLITS:
            # Its converters word the questions of the hub.
            paths.append(Path(formats.__file__))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def code_digest(task: str) -> str:
    """Return one SHA-256 over the code that a score depends on beside the task: prompts, search, the harness."""
    digest = hashlib.sha256(metadata.version("lm_eval").encode())
    names = ("beams", "model", "scoring", "standard")
    paths = [Path(instruction.__file__), *(Path(__file__).with_name(f"{name}.py") for name in names)]
    if task in STANDARD_TASKS:
        paths += sorted(task_folder(task).rglob("*.py"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_files(
    tasks: Sequence[str], data_dir: str | None, offline: bool = False, limit: int | None = None
) -> dict[str, list[Path]]:
    """Return the local files that each task reads; none for a task whose data comes from the hub.

    Args:
        tasks: Names of tasks.
        data_dir: Folder with the data, or None for the hub.
        offline: Refuse the hub.
        limit: Documents of a task that are scored, from the first; None for all.

    Raises:
        ValueError: If the folder or a file is missing; the message says where it comes from. If a record is malformed,
            or no response could be scored against its answer.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"data_dir {data_dir}: no such folder")
    files: dict[str, list[Path]] = {}
    for task in tasks:
        if data_dir is None and task in SPLITS:
            raise ValueError(f"data_dir is not given, but {task} reads {SPLITS[task]}.jsonl, written by misa.data")
        if data_dir is None and offline:
            raise ValueError(f"offline, but data_dir is not given: the data of {task} would come from {_hub_id(task)}")
        if data_dir is None:
            files[task] = []
        elif task in SPLITS:
            files[task] = [require_split(data_dir, SPLITS[task])]
        elif task in STANDARD_TASKS:
            files[task] = files_of(task, data_dir)
        else:
            files[task] = [find_test(task.removeprefix(PREFIX), data_dir)]
        if data_dir is not None:
            _require_answers(task, data_dir, limit)
    return files


def _require_answers(task: str, data_dir: str, limit: int | None) -> None:
    """Refuse what no response can be scored against, which would show after all are generated, or not at all."""
    if task in STANDARD_TASKS:
        read_test(STANDARD_TASKS[task].dataset, data_dir, STANDARD_TASKS[task].row)
    elif task not in SPLITS:
        scorer = str(_yaml(task).get("process_results")).rpartition(".")[2]
        read_test(task.removeprefix(PREFIX), data_dir, functools.partial(require_answer, scorer=scorer))
    elif SPLITS[task] == "test":
        path = require_split(data_dir, "test")
        read_instructions(path)
        sound_records(numbered_records(path), _require_words, 0.0, str(path))
    else:
        path = require_split(data_dir, "validation")
        if not any(record["text"] for record in read_records(path, ("text",))[:limit]):
            raise ValueError(f"{path} has no text in {'any record' if limit is None else f'the first {limit} records'}")


def _require_words(record: Record) -> Record:
    """Check the answer of a question that is answered in words; without one its output stands for it."""
    field = "answer" if "answer" in record else "output"
    if not isinstance(record[field], str) or not normalise(record[field]):
        raise ValueError(f"field {field!r} is {record[field]!r}, allowed is text with a letter or digit in it")
    return record


def num_generated(task: str) -> int:
    """Return how many tokens a response may have, 0 for a task that generates none.

    For a task of the harness that needs the hub it is 0, too: what it generates stands in files that the harness
    finds by itself.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    if task in STANDARD_TASKS and not STANDARD_TASKS[task].yaml:
        return 0
    config = _yaml(task)
    if config["output_type"] != "generate_until":
        return 0
    return int(normalize_gen_kwargs(config["generation_kwargs"])["max_gen_toks"])


def _yaml(task: str) -> dict[str, Any]:
    """The file of a task, with what it includes; functions by their names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    is_standard = task in STANDARD_TASKS
    path = task_folder(task) / STANDARD_TASKS[task].yaml if is_standard else TASK_FOLDER / f"{task}.yaml"
    return dict(load_yaml(path, resolve_func=False))


def _hub_id(task: str) -> str:
    from misa.tasks.hub import SOURCES

    source = SOURCES.get(task.removeprefix(PREFIX))
    return f"https://huggingface.co/datasets/{source.hub_id}" if source else "the hub"


def run_task(
    task: str, model: Model, data_dir: str | None, limit: int | None, seed: int, cache: Path | None = None
) -> Score:
    """Score a model on one task.

    Args:
        task: Name of the task, one of `task_names()`.
        model: The loaded model.
        data_dir: Folder the task reads; None for the hub.
        limit: Number of documents from the start of the data; None for all.
        seed: Seed of whatever the harness draws (worked examples; nothing else is drawn).
        cache: Where responses are kept while the task runs, so that it goes on after an interruption.

    Raises:
        ValueError: If the data folder lacks what the task reads, or the kept responses cannot be read.
    """
    import sqlite3

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from torch.utils import collect_env

    # The harness asks a dozen programs about the machine for every task; once for all tasks is enough.
    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)

    # The harness's other tasks are left out: indexing thousands of files takes half a minute.
    is_standard = task in STANDARD_TASKS
    folder = task_folder(task) if is_standard and data_dir is None else TASK_FOLDER
    metadata = {} if data_dir is None else {"data_dir": data_dir}
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    start = time.perf_counter()
    try:
        found = simple_evaluate(
            model=model,
            tasks=[local_config(task, data_dir) if is_standard and data_dir is not None else task],
            task_manager=manager,
            batch_size=model.batch_size,
            limit=limit,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            use_cache=None if cache is None else str(cache),
        )
    except sqlite3.Error as error:
        raise ValueError(
            f"the responses kept in {cache}* cannot be used ({error}): remove these files to generate them again"
        ) from error
    evaluate_s = time.perf_counter() - start
    metrics = flat_metrics(found["results"][task])
    # A group, such as mmlu, has samples of its parts only.
    samples = [sample for part in found["samples"].values() for sample in part]
    metrics["num_documents"] = float(sum(sizes["effective"] for sizes in found["n-samples"].values()))
    if task == "perplexity":
        metrics |= perplexity_metrics(samples, sum(model.num_tokens(sample["doc"]["text"]) for sample in samples))
    hashes = "".join(str(sample["prompt_hash"]) for sample in samples)
    version = str(found["versions"].get(task, ""))
    return Score(task, version, metrics, evaluate_s, found, hashlib.sha256(hashes.encode()).hexdigest())


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


def averages(scores: Sequence[Score]) -> dict[str, float]:
    """Return the averages of the paper: over the sets of a family, each with the same weight.

    Args:
        scores: Of any tasks.

    Returns:
        `misa_math/acc` and `misa_commonsense/acc` with standard errors, each only if all its tasks are there.
    """
    by_task = {score.task: score.metrics for score in scores}
    found = {}
    for family in FAMILIES:
        tasks = group_tasks(family, "paper")
        if all(task in by_task for task in tasks):
            group = f"{PREFIX}{family}"
            found[f"{group}/acc"] = sum(by_task[task]["acc"] for task in tasks) / len(tasks)
            errors = [by_task[task].get("acc_stderr", math.nan) for task in tasks]
            found[f"{group}/acc_stderr"] = math.hypot(*errors) / len(tasks)
            found[f"{group}/num_documents"] = sum(by_task[task]["num_documents"] for task in tasks)
    return found


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
