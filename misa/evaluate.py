"""Score a model on tasks of lm-evaluation-harness: `python -m misa.evaluate`.

Each task is a YAML file in `misa/tasks` that reads a local folder. A task that is finished is kept in the output
folder and not run again with the same model, data and settings, so a command that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from misa.evaluation.model import ModelFolder
    from misa.evaluation.scoring import Score

HARNESS_FILE = "lm_eval.json"
FINISHED_FOLDER = "finished"


@dataclass
class EvaluateArguments:
    """Settings of one evaluation."""

    model_name_or_path: str = field(
        metadata={"help": "checkpoint folder, PEFT adapter folder (its base is found), or hub id"}
    )
    tasks: str = field(metadata={"help": "task names, separated by commas: misa_family, perplexity"})
    output_dir: str = field(metadata={"help": "folder for result.json and lm_eval.json"})
    data_dir: str | None = field(
        default=None, metadata={"help": "folder with the tasks' data: test.jsonl, or validation.jsonl for perplexity"}
    )
    run: str | None = field(default=None, metadata={"help": "name of this evaluation (default: the output folder's)"})
    limit: int | None = field(default=None, metadata={"help": "score only so many documents of each task"})
    batch_size: int = field(default=16, metadata={"help": "documents at a time, padded on the left to the longest"})
    max_length: int | None = field(default=None, metadata={"help": "longest context in tokens (default: the model's)"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the weights; auto: as saved, but float32 for a half precision that is only emulated here",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... (default: cuda if there is one)"})
    seed: int = field(default=0, metadata={"help": "seed; greedy tasks draw nothing"})
    offline: bool = field(default=False, metadata={"help": "never ask a hub; implied when everything is local"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0 if the result is there afterwards, 2 if something asked for is wrong.
    """
    from transformers import HfArgumentParser

    from misa.training.published import translate_evaluate

    parser = HfArgumentParser(EvaluateArguments, prog="python -m misa.evaluate", description=__doc__)
    try:
        words = translate_evaluate(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"misa.evaluate: error: {error}", file=sys.stderr)
        return 2
    (arguments,) = parser.parse_args_into_dataclasses(args=words)
    try:
        evaluate(arguments, ["python", "-m", "misa.evaluate", *(sys.argv[1:] if argv is None else argv)])
    except (ValueError, OSError) as error:
        # Messages of the libraries run over many lines; the first one says what is wrong.
        print(f"misa.evaluate: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def evaluate(arguments: EvaluateArguments, command: Sequence[str]) -> Path:
    """Score a model on its tasks and write `result.json` and `lm_eval.json`.

    Args:
        arguments: What to score and how.
        command: The command line, for the record.

    Returns:
        Path of the result file.

    Raises:
        ValueError: If a path, a task or a number is wrong; the message names it and what is allowed.
    """
    # Set before the first import of a library that reads these: what is local asks nobody.
    if arguments.offline or Path(arguments.model_name_or_path).is_dir():
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.scoring import data_files
    from misa.results import RESULT_FILE

    tasks = _checked_tasks(arguments)
    if arguments.data_dir is None:
        raise ValueError("data_dir is missing: name the folder with the tasks' data")
    folder = ModelFolder(arguments.model_name_or_path, arguments.offline)
    files = data_files(tasks, arguments.data_dir)
    config = _resolve(arguments, tasks, folder, files)
    output = Path(arguments.output_dir)
    if _is_done(output, config):
        print(f"{output}: already evaluated with these settings, nothing to do")
        return output / RESULT_FILE
    scores = _scores(arguments, tasks, folder, config)
    return _write(arguments, folder, config, scores, command)


def _checked_tasks(arguments: EvaluateArguments) -> list[str]:
    """Return the task names; raise for whatever argument is out of range."""
    from misa.evaluation.scoring import task_names

    tasks = list(dict.fromkeys(name.strip() for name in arguments.tasks.split(",") if name.strip()))
    allowed = ", ".join(task_names())
    for task in tasks or [""]:
        if task not in task_names():
            raise ValueError(f"tasks has {task!r}, allowed are {allowed}")
    for name, lowest in (("batch_size", 1), ("limit", 1), ("max_length", 2), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} is {value}, allowed is {lowest} or more")
    return tasks


def _resolve(
    arguments: EvaluateArguments, tasks: list[str], folder: ModelFolder, files: dict[str, Path]
) -> dict[str, Any]:
    """Return every setting of the evaluation, with digests of what a path only names."""
    import torch

    from misa.data.records import files_digest
    from misa.evaluation.scoring import task_digest

    settings = asdict(arguments)
    settings["device"] = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings["tasks"] = tasks
    settings["dtype"] = folder.resolve_dtype(arguments.dtype)
    try:
        torch.device(settings["device"])
    except RuntimeError as error:
        raise ValueError(f"device is {settings['device']!r}, allowed is cpu, cuda or another of torch's") from error
    return settings | {
        "model_digest": folder.digest,
        "task_digests": {task: task_digest(task) for task in tasks},
        "data_digests": {task: files_digest([files[task]]) for task in tasks},
    }


def _key(config: dict[str, Any], task: str) -> str:
    """Return a digest of all that a task's score depends on; paths stand for their contents."""
    names = ("model_digest", "limit", "batch_size", "max_length", "dtype", "device", "seed")
    parts = [config[name] for name in names] + [config["task_digests"][task], config["data_digests"][task]]
    # A hub id has no digest, so there the name has to do.
    parts.append(task if config["model_digest"] else [task, config["model_name_or_path"]])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_done(output: Path, config: dict[str, Any]) -> bool:
    from misa.results import RESULT_FILE, read_result

    if not (output / RESULT_FILE).is_file() or not (output / HARNESS_FILE).is_file():
        return False
    known = read_result(output).config
    if known.get("tasks") != config["tasks"]:
        return False
    return all(_key(known, task) == _key(config, task) for task in config["tasks"])


def _scores(arguments: EvaluateArguments, tasks: list[str], folder: ModelFolder, config: dict[str, Any]) -> list[Score]:
    """Run the tasks that are not finished yet, keeping each as soon as it is done."""
    from misa.evaluation.scoring import Score, run_task
    from misa.files import write_text

    kept = {
        task: Path(arguments.output_dir) / FINISHED_FOLDER / f"{task}-{_key(config, task)[:16]}.json" for task in tasks
    }
    model = None
    scores = []
    for task in tasks:
        if kept[task].is_file():
            print(f"{task}: finished before, taken from {kept[task]}")
        else:
            if model is None:
                from misa.evaluation.model import load_model

                model = load_model(
                    folder,
                    dtype=config["dtype"],
                    device=config["device"],
                    batch_size=arguments.batch_size,
                    max_length=arguments.max_length,
                )
            score = run_task(task, model, arguments.data_dir, arguments.limit, arguments.seed)
            write_text(kept[task], json.dumps(asdict(score), default=str, ensure_ascii=False))
        # Read back even when it was just made, so that a resumed evaluation gives the same bytes.
        scores.append(Score(**json.loads(kept[task].read_text(encoding="utf-8"))))
    return scores


def _write(
    arguments: EvaluateArguments,
    folder: ModelFolder,
    config: dict[str, Any],
    scores: list[Score],
    command: Sequence[str],
) -> Path:
    """Write the harness's answer, then the result file, and print the scores."""
    import resource

    from misa.evaluation.scoring import merge_harness
    from misa.files import write_text
    from misa.results import RESULT_FILE, Result, provenance, read_result, write_result

    output = Path(arguments.output_dir)
    trained = read_result(folder.folder.parent) if (folder.folder.parent / RESULT_FILE).is_file() else None
    data_digest = hashlib.sha256("".join(config["data_digests"].values()).encode()).hexdigest()
    result = Result(
        run=arguments.run or output.resolve().name,
        kind="evaluate",
        method=trained.method if trained else "none",
        model=trained.model if trained else Path(folder.base).name,
        data=Path(arguments.data_dir).resolve().name,
        seed=trained.seed if trained else arguments.seed,
        config=config
        | {
            "base_run": trained.run if trained else "",
            "task_versions": {score.task: score.version for score in scores},
        },
        provenance=provenance(command, data_digest),
        metrics={f"{score.task}/{name}": value for score in scores for name, value in score.metrics.items()},
        # Linux counts in KiB.
        peaks={"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0},
        timings={f"{score.task}/evaluate_s": score.evaluate_s for score in scores}
        | {"evaluate_s": sum(score.evaluate_s for score in scores)},
    )
    merged = merge_harness([score.harness for score in scores])
    write_text(output / HARNESS_FILE, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    path = write_result(result, output)
    for name, value in sorted(result.metrics.items()):
        print(f"{name}: {value:.6g}")
    print(f"written: {path}")
    return path


if __name__ == "__main__":
    sys.exit(main())
