"""Fine-tune a causal language model on instructions: `python -m misa.train`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from misa.extras import exit_with
from misa.models import LoadingOptions
from misa.training.command import run_from_words
from misa.training.options import MemoryOptions, MethodOptions, RunOptions
from misa.training.published import TASKS, translate_train

logger = logging.getLogger(__name__)

PROG = "misa.train"
USAGE = "python -m misa.train --model_name_or_path MODEL --dataset_path DATA --method METHOD --output_dir DIR [options]"


@dataclass
class FinetuneOptions:
    """What is fine-tuned, on what."""

    _argument_group_name = "model and data"

    model_name_or_path: str = field(metadata={"help": "folder, hub id or GGUF file of the model"})
    dataset_path: str = field(
        metadata={
            "help": "a file or folder with train.jsonl, .json or .parquet (fields instruction, output and, optionally, "
            "input, or those of a known set); a known set by name (alpaca-gpt4, math10k, commonsense170k, gsm8k, "
            "mawps, svamp, aqua, boolq, piqa, social_i_qa, hellaswag, winogrande, arc_easy, arc_challenge, "
            "openbookqa); or a hub id"
        }
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder with a local copy of the known set, so that the hub is not asked"}
    )
    max_malformed: float = field(
        default=0.0, metadata={"help": "share of malformed records that is left out with a warning; more are refused"}
    )
    train_on_inputs: bool = field(
        default=False, metadata={"help": "learn the prompts, too, instead of the responses alone"}
    )
    max_length: int = field(default=512, metadata={"help": "longest sequence kept, in tokens"})
    padding: Literal["longest", "max_length"] = field(
        default="longest", metadata={"help": "pad a batch to its longest sequence, or always to max_length"}
    )
    packing: bool = field(
        default=False, metadata={"help": "put several records into one sequence; attention stays inside a record"}
    )
    tokenized_dir: str | None = field(
        default=None,
        metadata={"help": "folder that keeps tokens between runs; default: misa/ in the cache of datasets"},
    )
    validation_samples: int = field(
        default=0,
        metadata={"help": "records for the evaluation loss: out of validation.jsonl if there is one, else held out"},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "precision of the weights: bfloat16, float16, float32, or auto (bfloat16 where the processor "
            "has it, else float32); most methods keep float32 master copies of what trains"
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "folder or hub id of the tokenizer; default: the model's"}
    )
    task_name: str | None = field(
        default=None, metadata={"help": "what the data are: math and commonsense have test sets for evaluate_at_last"}
    )
    evaluate_at_last: bool = field(
        default=False, metadata={"help": "score the trained model on the test sets of task_name, into evaluation/"}
    )
    evaluation_data_dir: str | None = field(
        default=None, metadata={"help": "folder with these test sets; default: dataset_path"}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None takes it from the process); see `run_from_words`."""
    return run_from_words(
        argv,
        prog=PROG,
        usage=USAGE,
        description=__doc__ or "",
        own=FinetuneOptions,
        translate=translate_train,
        make_job=make_job,
    )


def make_job(
    run: RunOptions,
    finetune: FinetuneOptions,
    method: MethodOptions,
    training: Any,
    argv: Sequence[str] | None = None,
    loading: LoadingOptions | None = None,
    memory: MemoryOptions | None = None,
) -> Any:
    """Describe a fine-tuning run for `misa.training.run.carry_out`.

    Args:
        run: Where it lies and how it continues.
        finetune: Model and data.
        method: Method and its options.
        training: `transformers.TrainingArguments`; its output_dir is the checkpoint folder.
        argv: Command line to record; None takes the process's.
        loading: How model and tokenizer are loaded; None means the defaults.
        memory: What is done to need less memory; None means nothing.

    Raises:
        ValueError: If a file is missing or malformed, or a setting is out of range.
    """
    from misa.data.instruction import InstructionCollator, InstructionDataset
    from misa.data.packing import require_apart
    from misa.data.sources import find_instructions, question_of
    from misa.data.tokens import default_folder
    from misa.models import load_model, load_tokenizer, resolve_dtype
    from misa.training.identity import source_digest
    from misa.training.run import Job, Parts

    loading = loading or LoadingOptions()
    evaluation = _evaluation(run, finetune) if finetune.evaluate_at_last else None
    if finetune.validation_samples < 0:
        raise ValueError(f"validation_samples is {finetune.validation_samples}, allowed is 0 or more")
    source = find_instructions(finetune.dataset_path, finetune.data_dir)
    records, apart, digest = source.read(finetune.validation_samples > 0, finetune.max_malformed)
    held_out = (apart or records)[: finetune.validation_samples]
    if finetune.validation_samples > len(apart or records[1:]):
        left = "" if apart else ", and one must be left to train on"
        raise ValueError(
            f"validation_samples is {finetune.validation_samples}, but there are {len(apart or records)} records to "
            f"take them from{left}"
        )
    if not apart:
        rest, asked = records[finetune.validation_samples :], {question_of(record) for record in held_out}
        records = [record for record in rest if question_of(record) not in asked]
        if not records:
            raise ValueError(
                f"validation_samples is {finetune.validation_samples}, and the other {len(rest)} records ask the same, "
                "so that none is left to train on"
            )
        if len(records) < len(rest):
            logger.warning(
                "left out %d of %d records to train on: they ask what a held-out one asks",
                len(rest) - len(records),
                len(rest),
            )
    weights = run.model_source(finetune.model_name_or_path)
    sources = (finetune.model_name_or_path, finetune.tokenizer_name_or_path, weights)
    memory = memory or MemoryOptions()
    settings = {**vars(finetune), **vars(loading), "dtype": resolve_dtype(finetune.dtype)}
    settings |= {"loss": memory.loss or "full", "model_digest": source_digest(*sources)}

    def make() -> Parts:
        if finetune.tokenizer_name_or_path is None:
            tokenizer = load_tokenizer(finetune.model_name_or_path, loading)
        else:
            # Revision and GGUF file are the model's.
            own = replace(loading, revision=None, gguf_file=None)
            tokenizer = load_tokenizer(finetune.tokenizer_name_or_path, own)
        model = load_model(weights, settings["dtype"], loading)
        if finetune.packing:
            require_apart(model)

        def dataset(records: Any) -> InstructionDataset:
            return InstructionDataset(
                records,
                tokenizer,
                finetune.max_length,
                train_on_inputs=finetune.train_on_inputs,
                packing=finetune.packing,
                tokenized_dir=finetune.tokenized_dir or default_folder(),
            )

        train, validation = dataset(records), dataset(held_out) if held_out else None
        padded = finetune.max_length if finetune.padding == "max_length" else None
        longest = padded or max(max(part.lengths) for part in (train, validation) if part is not None)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"max_length is {finetune.max_length}, and there are sequences of {longest} tokens; allowed is up to "
                f"the model's {limit}"
            )
        if evaluation is not None and limit is not None:
            _require_context(str(finetune.task_name), limit)
        return Parts(
            model=model,
            tokenizer=tokenizer,
            train_dataset=train,
            eval_dataset=validation,
            collator=InstructionCollator(
                tokenizer.pad_token_id,
                # Smoothed labels have a loss of their own, which wants them all.
                keep_all_logits=not _cuts_logits(model) or training.label_smoothing_factor > 0,
                pad_to=padded,
            ),
        )

    return Job(
        kind="finetune",
        run=run,
        method=method,
        memory=memory,
        training=training,
        settings=settings,
        model=Path(finetune.model_name_or_path).name,
        data=source.name,
        data_digest=digest,
        command=["python", "-m", PROG, *(sys.argv[1:] if argv is None else argv)],
        make=make,
        evaluation=evaluation,
    )


def _evaluation(run: RunOptions, finetune: FinetuneOptions) -> list[str]:
    """Words of the `misa.evaluate` command for the trained model, once it is clear that it will find its data.

    Raises:
        ValueError: If the task is unknown, or its data are not there.
    """
    from misa.evaluation.scoring import data_files, expand
    from misa.training.folders import EVALUATION_FOLDER

    if not run.save_model:
        raise ValueError("evaluate_at_last needs the trained model: it contradicts save_model false")
    task = TASKS.get(finetune.task_name or "")
    if task is None:
        raise ValueError(f"evaluate_at_last: task_name is {finetune.task_name!r}, allowed is {', '.join(TASKS)}")
    folder = finetune.evaluation_data_dir or finetune.dataset_path
    try:
        data_files(expand([task]), folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"evaluate_at_last: {error}; name the folder with --evaluation_data_dir") from error
    output = Path(run.output_dir)
    return [
        *("--model_name_or_path", str(output / "model"), "--tasks", task, "--data_dir", str(folder)),
        *("--output_dir", str(output / EVALUATION_FOLDER), "--max_seq_length", str(finetune.max_length)),
    ]


def _require_context(task_name: str, limit: int) -> None:
    """Refuse a model whose context has no room for the answers it is to be scored by."""
    from misa.evaluation.model import require_room
    from misa.evaluation.scoring import expand, num_generated

    try:
        for task in expand([TASKS[task_name]]):
            require_room(task, num_generated(task), limit)
    except ValueError as error:
        raise ValueError(f"evaluate_at_last: {error}") from error


def _cuts_logits(model: Any) -> bool:
    """Say whether a model can leave out the logits that no label needs."""
    import inspect

    return "logits_to_keep" in inspect.signature(model.forward).parameters


if __name__ == "__main__":
    exit_with(main, "train")
