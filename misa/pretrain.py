"""Pre-train a LLaMA of a chosen size from scratch: `python -m misa.pretrain`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from misa.extras import exit_with
from misa.models import MODEL_SIZES, LoadingOptions
from misa.training.command import run_from_words
from misa.training.options import MemoryOptions, MethodOptions, RunOptions
from misa.training.published import translate_pretrain

PROG = "misa.pretrain"
USAGE = "python -m misa.pretrain --model_config SIZE --dataset_path CORPUS --method METHOD --output_dir DIR [options]"


@dataclass
class PretrainOptions:
    """What is pre-trained, on what."""

    _argument_group_name = "model and data"

    model_config: str = field(metadata={"help": f"{', '.join(MODEL_SIZES)}; or a JSON file with a model configuration"})
    dataset_path: str = field(
        metadata={
            "help": "folder with train.jsonl, validation.jsonl (field text) and tokenizer/; any folder of .txt, .md, "
            ".jsonl, .json or .parquet; c4; or a hub id, which is streamed"
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the hub"})
    streaming: bool = field(default=False, metadata={"help": "read local files while training, too"})
    shuffle_buffer: int = field(default=1000, metadata={"help": "documents of a stream that are mixed together"})
    validation_share: float = field(
        default=0.02, metadata={"help": "share of the documents held out, by hash, where there is no validation split"}
    )
    max_malformed: float = field(
        default=0.0, metadata={"help": "share of malformed records that is left out with a warning; more are refused"}
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "folder or hub id of the tokenizer; default: tokenizer/ in dataset_path, T5's for c4, or else one "
            "trained on the text"
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "vocabulary of a tokenizer trained here"})
    max_length: int = field(default=256, metadata={"help": "tokens in one sequence"})
    padding: Literal["none", "max_length"] = field(
        default="none",
        metadata={
            "help": "none: documents follow one another and fill every sequence; max_length: one document a sequence, "
            "cut off and padded, as published"
        },
    )
    tokenized_dir: str | None = field(
        default=None,
        metadata={"help": "folder that keeps tokens between runs; default: misa/ in the cache of datasets"},
    )
    max_eval_tokens: int = field(
        default=65_536, metadata={"help": "tokens of the validation text to evaluate on, from its start"}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "precision of the weights: bfloat16, float16, float32, or auto (bfloat16 where the processor "
            "has it, else float32); most methods keep float32 master copies of what trains"
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None takes it from the process); see `run_from_words`."""
    return run_from_words(
        argv,
        prog=PROG,
        usage=USAGE,
        description=__doc__ or "",
        own=PretrainOptions,
        translate=translate_pretrain,
        make_job=make_job,
        # Blocks are all equally long, and their end tokens are text, not padding.
        defaults={"include_num_input_tokens_seen": "all"},
    )


def make_job(
    run: RunOptions,
    pretrain: PretrainOptions,
    method: MethodOptions,
    training: Any,
    argv: Sequence[str] | None = None,
    loading: LoadingOptions | None = None,
    memory: MemoryOptions | None = None,
) -> Any:
    """Describe a pre-training run for `misa.training.run.carry_out`.

    Args:
        run: Where it lies and how it continues.
        pretrain: Model and data.
        method: Method and its options.
        training: `transformers.TrainingArguments`; its output_dir is the checkpoint folder.
        argv: Command line to record; None takes the process's.
        loading: How model and tokenizer are loaded; None means the defaults.
        memory: What is done to need less memory; None means nothing.

    Raises:
        ValueError: If a file is missing or malformed, or a setting is out of range.
    """
    from misa.data.hub import hub_digest
    from misa.data.pretraining import PretrainingText
    from misa.data.records import files_digest
    from misa.data.text import find_text
    from misa.data.tokens import default_folder
    from misa.models import build_model, load_model, load_tokenizer, model_config, require_size, resolve_dtype
    from misa.training.identity import source_digest
    from misa.training.run import Job, Parts

    loading = loading or LoadingOptions()
    if pretrain.max_eval_tokens < pretrain.max_length:
        raise ValueError(
            f"max_eval_tokens is {pretrain.max_eval_tokens}, allowed is max_length ({pretrain.max_length}) or more"
        )
    source = find_text(pretrain.dataset_path, pretrain.dataset_config)
    streamed = pretrain.streaming or source.hub_id is not None
    if streamed and training.max_steps <= 0:
        raise ValueError(f"max_steps is {training.max_steps}; a stream has no length, so it must be given")
    if streamed:
        # The stream has an order of its own.
        training.train_sampling_strategy = "sequential"
    if pretrain.padding == "max_length":
        training.include_num_input_tokens_seen = "non_padding"
    tokenizer_source = pretrain.tokenizer_name_or_path or source.tokenizer
    files = [*source.train, *source.validation]
    if tokenizer_source and (vocabulary := Path(tokenizer_source) / "tokenizer.json").is_file():
        files.append(vocabulary)
    digest = files_digest(files) if source.hub_id is None else hub_digest(source.hub_id, source.config)
    memory = memory or MemoryOptions()
    settings = {
        **vars(pretrain),
        **vars(loading),
        "tokenizer_name_or_path": tokenizer_source,
        "dtype": resolve_dtype(pretrain.dtype),
        "loss": memory.loss or "full",
        "model_digest": source_digest(pretrain.model_config, run.model_source(None)),
    }

    def make() -> Parts:
        text = PretrainingText(
            source,
            streamed=streamed,
            padding=pretrain.padding,
            max_length=pretrain.max_length,
            max_eval_tokens=pretrain.max_eval_tokens,
            validation_share=pretrain.validation_share,
            max_malformed=pretrain.max_malformed,
            seed=training.seed if training.data_seed is None else training.data_seed,
            shuffle_buffer=pretrain.shuffle_buffer,
            tokenized_dir=Path(pretrain.tokenized_dir or default_folder()),
        )
        tokenizer = load_tokenizer(tokenizer_source or text.train_tokenizer(pretrain.vocab_size), loading)
        config = model_config(
            pretrain.model_config,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and pretrain.max_length > positions:
            raise ValueError(f"max_length is {pretrain.max_length}, allowed is up to the model's {positions}")
        train, validation, measure = text.datasets(tokenizer)

        def metrics(eval_loss: float) -> dict[str, float]:
            return {
                # A diverged loss would overflow.
                "perplexity": math.exp(min(eval_loss, 700.0)),
                "bits_per_byte": measure.bits_per_byte(eval_loss),
                "num_eval_tokens": measure.num_tokens,
            }

        from transformers import default_data_collator

        if (weights := run.model_source(None)) is None:
            model = build_model(config, training.seed, settings["dtype"], loading.attn_implementation)
        else:
            model = load_model(weights, settings["dtype"], loading)
            require_size(model.config, config, f"continue_from is {weights!r}", "model_config")
        return Parts(
            model=model,
            tokenizer=tokenizer,
            train_dataset=train,
            eval_dataset=validation,
            collator=default_data_collator,
            metrics=metrics,
        )

    return Job(
        kind="pretrain",
        run=run,
        method=method,
        memory=memory,
        training=training,
        settings=settings,
        model=Path(pretrain.model_config).stem,
        data=source.name,
        data_digest=digest,
        command=["python", "-m", PROG, *(sys.argv[1:] if argv is None else argv)],
        make=make,
    )


if __name__ == "__main__":
    exit_with(main, "train")
