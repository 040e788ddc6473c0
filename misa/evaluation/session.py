"""One evaluation from its arguments to its files: what is checked first, what is kept, what is written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from misa.evaluate import EvaluateArguments
    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.scoring import Score
    from misa.results import Result

HARNESS_FILE = "lm_eval.json"
FINISHED_FOLDER = "finished"
REQUESTS_FOLDER = "requests"
BASE_FOLDER = "base"

# What a run has done that ends with a model.
TRAINING_KINDS = ("finetune", "pretrain")

# Settings in which two evaluations must be the same to be compared.
COMPARED_SETTINGS = ("max_length", "max_seq_length", "dtype", "seed")


def evaluate(arguments: EvaluateArguments, command: Sequence[str]) -> Path:
    """Score a model on its tasks and write `result.json` and `lm_eval.json`; with a base also `comparison.csv`.

    Args:
        arguments: What to score and how.
        command: The command line, for the record.

    Returns:
        Path of the result file.

    Raises:
        ValueError: If a path, a task or a number is wrong; the message names it and what is allowed. If another process
            evaluates into the same folder.
    """
    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.scoring import data_files
    from misa.results import RESULT_FILE, read_result
    from misa.training.lock import FolderLock

    tasks = _checked_tasks(arguments)
    folder = ModelFolder(arguments.model_name_or_path, arguments.offline)
    files = data_files(tasks, arguments.data_dir, arguments.offline, arguments.limit)
    config = _resolve(arguments, tasks, folder, files)
    output = Path(arguments.output_dir)
    is_done = _is_done(output, config)
    if not is_done:
        _require_room(tasks, folder, arguments.max_length)
    # The base first: what is wrong with it should not show after hours of scoring.
    base_file = _base_file(arguments, config, command) if arguments.base else None
    if is_done:
        print(f"{output}: already evaluated with these settings, nothing to do")
        _report(read_result(output), arguments)
    else:
        lock = FolderLock([output])
        lock.acquire()
        try:
            scores = _scores(arguments, tasks, folder, config)
            _write(arguments, folder, config, scores, command)
        finally:
            lock.release()
    if base_file is not None:
        _compare(output, base_file)
    return output / RESULT_FILE


def _require_room(tasks: list[str], folder: ModelFolder, max_length: int | None) -> None:
    """Check before the model is loaded that each task leaves room for a prompt."""
    from lm_eval.models.utils import resolve_max_length

    from misa.evaluation.model import require_room
    from misa.evaluation.scoring import num_generated

    config = folder.config
    most = resolve_max_length(config, default=sys.maxsize)  # a model without positions has no limit
    if max_length is not None and max_length > most:
        raise ValueError(f"max_length is {max_length}, allowed is up to the {most} tokens that the model is made for")
    longest = max_length or resolve_max_length(config)
    for task in tasks:
        require_room(task, num_generated(task), longest)


def _base_file(arguments: EvaluateArguments, config: dict[str, Any], command: Sequence[str]) -> Path:
    """Return the harness's results of the model to compare with, scoring it first if it is no finished evaluation."""
    base = Path(str(arguments.base))
    if base.resolve() == Path(arguments.output_dir).resolve():
        raise ValueError(f"base is {base}, the folder of this evaluation; allowed is another evaluation, or a model")
    if (base / HARNESS_FILE).is_file():
        _require_same(base / HARNESS_FILE, config)
        return base / HARNESS_FILE
    folder = Path(arguments.output_dir) / BASE_FOLDER
    run = f"{arguments.run or Path(arguments.output_dir).resolve().name}-base"
    own = replace(arguments, model_name_or_path=str(base), output_dir=str(folder), run=run, base=None, load_type=None)
    try:
        evaluate(own, command)
    except ValueError as error:
        raise ValueError(f"base {arguments.base}: {error}") from error
    return folder / HARNESS_FILE


def _require_same(base_file: Path, config: dict[str, Any]) -> None:
    """Check that a finished evaluation has a task to compare, scored in the same way on as many documents."""
    from misa.results import read_result

    tasks, limit = config["tasks"], config["limit"]
    try:
        found = json.loads(base_file.read_text(encoding="utf-8"))
        theirs, sizes = list(found["results"]), found["n-samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"base: {base_file} holds no results of an evaluation: {error!r}") from error
    if not set(tasks) & set(theirs):
        raise ValueError(f"base: {base_file} has the tasks {', '.join(theirs)}, and none of {', '.join(tasks)}")
    for task, size in sizes.items():
        wanted = size["original"] if limit is None else min(limit, size["original"])
        if size["effective"] != wanted:
            raise ValueError(
                f"base: {base_file} was not scored on the same prompts: it has {size['effective']} documents of "
                f"{task}, and with limit {limit} there are {wanted}"
            )
    try:
        known = read_result(base_file.parent).config
    except ValueError as error:
        raise ValueError(f"base: {error}") from error
    for name in COMPARED_SETTINGS:
        if known.get(name) != config[name]:
            raise ValueError(
                f"base: {base_file} was scored with {name} {known.get(name)}, and here it is {config[name]}"
            )
    for task in tasks:
        if task in theirs and known.get("task_digests", {}).get(task) != config["task_digests"][task]:
            raise ValueError(f"base: {base_file} was scored by another version of the task {task}; score it again")


def _compare(output: Path, base_file: Path) -> None:
    from misa.evaluation.comparison import compare_evaluations, write_comparison

    rows = compare_evaluations(output / HARNESS_FILE, base_file)
    for row in rows:
        print(
            f"{row.task}/{row.metric}: {row.value:.4g} against {row.base_value:.4g}, difference {row.difference:+.4g} "
            f"± {row.stderr:.2g}, p = {row.p_value:.3g} ({row.test}, {row.num_documents} documents)"
        )
    print(f"written: {write_comparison(rows, output)}")


def _checked_tasks(arguments: EvaluateArguments) -> list[str]:
    """Return the task names; raise for whatever argument is out of range."""
    from misa.evaluation.scoring import expand, group_tasks

    if (arguments.tasks is None) == (arguments.task_name is None):
        raise ValueError("give either tasks or task_name (math, commonsense)")
    if arguments.task_name is None and arguments.protocol != "paper":
        raise ValueError(
            f"protocol is {arguments.protocol}, which goes with task_name; in tasks a name with misa_ is a task of the "
            "paper's protocol, one without of the harness's"
        )
    if arguments.task_name is not None:
        tasks = group_tasks(arguments.task_name, arguments.protocol)
    else:
        tasks = expand([name.strip() for name in str(arguments.tasks).split(",") if name.strip()])
    _batch_size(arguments)
    for name, lowest in (("limit", 1), ("max_length", 2), ("max_seq_length", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} is {value}, allowed is {lowest} or more")
    return tasks


def _batch_size(arguments: EvaluateArguments) -> int | None:
    """Return the number of documents at a time, None for auto."""
    if arguments.batch_size == "auto":
        return None
    if not arguments.batch_size.isdecimal() or int(arguments.batch_size) < 1:
        raise ValueError(f"batch_size is {arguments.batch_size}, allowed is 1 or more, or auto")
    return int(arguments.batch_size)


def _resolve(
    arguments: EvaluateArguments, tasks: list[str], folder: ModelFolder, files: dict[str, list[Path]]
) -> dict[str, Any]:
    """Return every setting of the evaluation, with digests of what a path only names."""
    import torch

    from misa.data.records import files_digest
    from misa.evaluation.scoring import code_digest, task_digest
    from misa.models import first_line

    settings = asdict(arguments)
    settings["device"] = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings["tasks"] = tasks
    settings["batch_size"] = _batch_size(arguments) or "auto"
    settings["dtype"] = folder.resolve_dtype(arguments.dtype)
    try:
        torch.zeros(1, device=settings["device"]).item()
    # Without CUDA, torch asserts.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {settings['device']!r}, allowed is cpu, or cuda or another of torch's that this machine has: "
            f"{first_line(error)}"
        ) from error
    return settings | {
        "model_digest": folder.digest,
        "task_digests": {task: task_digest(task) for task in tasks},
        "code_digests": {task: code_digest(task) for task in tasks},
        "data_digests": {task: files_digest(files[task]) if files[task] else "" for task in tasks},
    }


def _key(config: dict[str, Any], task: str, of_response: bool = False) -> str:
    """Return a digest of all that a task's score, or a single response, depends on; paths stand for their contents."""
    names = (
        "model_digest",
        *(() if of_response else ("limit",)),
        "batch_size",
        "max_length",
        "max_seq_length",
        "dtype",
        "device",
        "seed",
    )
    parts = [config.get(name) for name in names] + [config["task_digests"][task], config["data_digests"][task]]
    parts.append(config.get("code_digests", {}).get(task))
    # A hub id has no digest, so there the name has to do.
    parts.append(task if config["model_digest"] else [task, config["model_name_or_path"]])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_done(output: Path, config: dict[str, Any]) -> bool:
    from misa.results import RESULT_FILE, read_result

    if not (output / RESULT_FILE).is_file() or not (output / HARNESS_FILE).is_file():
        return False
    try:
        json.loads((output / HARNESS_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False  # it was cut off
    result = read_result(output)
    known = result.config
    if known.get("tasks") != config["tasks"] or config["run"] not in (None, result.run):
        return False
    return all(_key(known, task) == _key(config, task) for task in config["tasks"])


def _scores(arguments: EvaluateArguments, tasks: list[str], folder: ModelFolder, config: dict[str, Any]) -> list[Score]:
    """Run the tasks that are not finished yet, keeping each as soon as it is done."""
    from misa.evaluation.scoring import run_task
    from misa.files import write_text

    kept = {
        task: Path(arguments.output_dir) / FINISHED_FOLDER / f"{task}-{_key(config, task)[:16]}.json" for task in tasks
    }
    model = None
    scores = []
    for task in tasks:
        score = _kept_score(kept[task])
        if score is not None:
            print(f"{task}: finished before, taken from {kept[task]}")
        else:
            if model is None:
                from misa.evaluation.model import load_model

                model = load_model(
                    folder,
                    dtype=config["dtype"],
                    device=config["device"],
                    batch_size=_batch_size(arguments),
                    max_length=arguments.max_length,
                    max_prompt_length=arguments.max_seq_length,
                )
            # Responses do not depend on the limit, so a larger one goes on from those of a smaller one.
            name = f"{task}-{_key(config, task, of_response=True)[:16]}"
            requests = Path(arguments.output_dir) / REQUESTS_FOLDER / name
            score = run_task(task, model, arguments.data_dir, arguments.limit, arguments.seed, requests)
            write_text(kept[task], json.dumps(asdict(score), default=str, ensure_ascii=False))
            if arguments.limit is None:
                # No larger limit can want them.
                for path in requests.parent.glob(f"{requests.name}*"):
                    path.unlink()
            # Read back, so that a resumed evaluation gives the same bytes.
            score = _kept_score(kept[task])
            assert score is not None
        scores.append(score)
    return scores


def _kept_score(path: Path) -> Score | None:
    """A score that was kept, or None if there is none, or what is there cannot be read."""
    from misa.evaluation.scoring import Score

    try:
        return Score(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _training_run(folder: ModelFolder) -> Result | None:
    """The run that made the model, if it lies in the folder of one."""
    from misa.results import read_result

    if not folder.folder.exists():  # it is the name of one on a hub
        return None
    try:
        found = read_result(folder.folder.resolve().parent)
    except ValueError:
        return None
    return found if found.kind in TRAINING_KINDS else None


def _write(
    arguments: EvaluateArguments,
    folder: ModelFolder,
    config: dict[str, Any],
    scores: list[Score],
    command: Sequence[str],
) -> Path:
    """Write the harness's answer, then the result file, and print the scores."""
    from misa.evaluation.comparison import COMPARISON_FILE
    from misa.evaluation.scoring import averages, merge_harness
    from misa.files import write_text
    from misa.results import RESULT_FILE, Result, provenance, write_result
    from misa.results.provenance import peak_rss_bytes

    output = Path(arguments.output_dir)
    trained = _training_run(folder)
    data_digest = hashlib.sha256("".join(config["data_digests"].values()).encode()).hexdigest()
    result = Result(
        run=arguments.run or output.resolve().name,
        kind="evaluate",
        method=trained.method if trained else "none",
        model=trained.model if trained else Path(folder.base).absolute().name,
        data=Path(arguments.data_dir).resolve().name if arguments.data_dir else "hub",
        seed=trained.seed if trained else arguments.seed,
        config=config
        | {
            "base_run": trained.run if trained else "",
            "task_versions": {score.task: score.version for score in scores},
            "prompt_hashes": {score.task: score.prompt_hash for score in scores},
        },
        provenance=provenance(command, data_digest),
        metrics={f"{score.task}/{name}": value for score in scores for name, value in score.metrics.items()}
        | averages(scores),
        peaks={"rss_bytes": float(peak_rss_bytes())},
        timings={f"{score.task}/evaluate_s": score.evaluate_s for score in scores}
        | {"evaluate_s": sum(score.evaluate_s for score in scores)},
    )
    merged = merge_harness([score.harness for score in scores])
    # After a kill between two files, those of an earlier evaluation must not stand beside new ones.
    for name in (RESULT_FILE, COMPARISON_FILE):
        (output / name).unlink(missing_ok=True)
    write_text(output / HARNESS_FILE, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    path = write_result(result, output)
    for name, value in sorted(result.metrics.items()):
        print(f"{name}: {value:.6g}")
    print(f"written: {path}")
    _report(result, arguments)
    return path


def _report(result: Result, arguments: EvaluateArguments) -> None:
    """Send the scores to Weights & Biases, if that is asked for; the files are complete without it."""
    if arguments.report_to != "wandb":
        return
    try:
        import wandb
    except ImportError:
        print("report_to is wandb, which is not installed (pip install wandb): the scores are in the files alone")
        return
    with wandb.init(project="misa", name=f"evaluate-{result.run}", config=result.config) as run:
        run.log(result.metrics)
