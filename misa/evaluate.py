"""Score a model on tasks of lm-evaluation-harness: `python -m misa.evaluate`.

Two protocols: `paper` is the authors' (Alpaca prompt, beams of 4, answers read out of the text), `harness` the
harness's own tasks. Each task is a YAML file. A task that is finished is kept in the output folder and not run again
with the same model, data and settings; one that was cut off goes on from the responses it has. With --base a second
model is scored on the same documents and compared by a paired test.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from misa.evaluation.folder import ModelFolder
from misa.extras import exit_with
from misa.models import first_line

LOAD_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass
class EvaluateArguments:
    """Settings of one evaluation."""

    model_name_or_path: str = field(
        metadata={"help": "checkpoint folder, PEFT adapter folder (its base is found), GGUF file, or hub id"}
    )
    output_dir: str = field(metadata={"help": "folder for result.json and lm_eval.json"})
    tasks: str | None = field(default=None, metadata={"help": "@TASKS@"})
    task_name: str | None = field(
        default=None, metadata={"help": "a family of tasks instead of --tasks", "choices": ["math", "commonsense"]}
    )
    protocol: str = field(default="paper", metadata={"help": "what --task_name means", "choices": ["paper", "harness"]})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "local folder with the tasks' data: DATASET/test.json as in LLM-Adapters, or "
            "FAMILY/DATASET_test.json; test.jsonl for misa_family, validation.jsonl for perplexity (default: the hub)"
        },
    )
    run: str | None = field(default=None, metadata={"help": "name of this evaluation (default: the output folder's)"})
    base: str | None = field(
        default=None,
        metadata={"help": "another model, or the output folder of its evaluation: compare with it by a paired test"},
    )
    limit: int | None = field(default=None, metadata={"help": "score only so many documents of each task"})
    batch_size: str = field(
        default="auto", metadata={"help": "documents at a time, padded on the left to the longest; auto: what fits"}
    )
    max_length: int | None = field(default=None, metadata={"help": "longest context in tokens (default: the model's)"})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "longest prompt of a generated answer in tokens; cut on the left"}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the weights; auto: as saved, but float32 for a half precision that is only emulated here",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_type: str | None = field(
        default=None, metadata={"help": "the same by its short name", "choices": ["fp16", "bf16", "fp32"]}
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... (default: cuda if there is one)"})
    seed: int = field(default=0, metadata={"help": "seed of the worked examples; answers draw nothing"})
    offline: bool = field(default=False, metadata={"help": "never ask a hub; implied when everything is local"})
    report_to: str = field(
        default="none", metadata={"help": "where the scores go besides the files", "choices": ["none", "wandb"]}
    )

    def __post_init__(self) -> None:
        if self.load_type is not None:
            named = LOAD_TYPES.get(self.load_type)
            if self.dtype not in ("auto", named):
                raise ValueError(f"load_type is {self.load_type} and dtype is {self.dtype}, give one of them")
            self.dtype = named or self.dtype


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0 if the result is there afterwards, 2 if something asked for is wrong, 130 if it was interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _go_offline(words)
    from transformers import HfArgumentParser

    from misa.evaluation.session import evaluate
    from misa.help_text import HelpFormatter

    parser = HfArgumentParser(
        EvaluateArguments, prog="python -m misa.evaluate", description=__doc__, formatter_class=HelpFormatter
    )
    _name_tasks(parser)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=words)
        evaluate(arguments, ["python", "-m", "misa.evaluate", *words])
    except (ValueError, OSError) as error:
        # Messages of the libraries run over many lines; the first one says what is wrong.
        print(f"misa.evaluate: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("misa.evaluate: interrupted; the same command goes on from the responses that are there", file=sys.stderr)
        return 130
    return 0


def _go_offline(words: Sequence[str]) -> None:
    """Keep the libraries from asking a hub if everything is local; they read these variables when imported."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model_name_or_path", "--model-name-or-path", default="")
    parser.add_argument("--data_dir", "--data-dir", default="")
    parser.add_argument("--base")
    parser.add_argument("--offline", nargs="?", const="true", default="false")
    known, _ = parser.parse_known_args(words)
    is_offline = known.offline.lower() in ("yes", "true", "t", "y", "1")  # as the parser of transformers reads it
    models = [known.model_name_or_path, *([known.base] if known.base else [])]
    if is_offline or (known.data_dir and all(map(_is_local, models))):
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _is_local(model: str) -> bool:
    """Whether a model is on this machine, of an adapter its base as well."""
    try:
        return Path(model).exists() and Path(ModelFolder(model).base).exists()
    except ValueError:
        return Path(model).exists()  # an evaluation, say; what is wrong with a model is said later


def _name_tasks(parser: object) -> None:
    """Put the names of the tasks into the help, where they cannot go out of date."""
    from misa.evaluation.scoring import FAMILIES, PREFIX, task_names

    groups = ", ".join(f"{PREFIX}{family}" for family in FAMILIES)
    names = f"task names, separated by commas: {', '.join(task_names())}; or the groups {groups}"
    for action in parser._actions:  # type: ignore[attr-defined]
        if action.dest == "tasks":
            action.help = names


if __name__ == "__main__":
    exit_with(main, "eval")
