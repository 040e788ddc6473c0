"""Options of the training commands, readable by `--help` without loading torch or transformers' Trainer."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from misa.help_text import HelpFormatter


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunOptions:
    """Where a run goes and how it continues."""

    _argument_group_name = "run"

    output_dir: str = field(metadata={"help": "folder for result.json, curves.csv and model/"})
    run: str | None = _option(None, "name of the run; default: name of the output folder")
    checkpoint_dir: str | None = _option(
        None, "folder for checkpoints, from which the same command continues; default: checkpoints/ in output_dir"
    )
    keep_checkpoints: bool = _option(False, "keep the checkpoints of a finished run")
    overwrite_output_dir: bool = _option(False, "start again where a finished run, or one with other settings, lies")
    continue_from: str | None = _option(
        None, "start from this: a checkpoint of a run (weights, step and moments), or a model folder (weights alone)"
    )
    save_model: bool = _option(True, "write the trained model into model/")
    snapshot_steps: str | None = _option(
        None, "write the weights after these steps into snapshots/ in output_dir: comma list, or none"
    )
    stop_on_nan: bool = _option(True, "stop with an error at the first loss that is not a finite number")
    tags: str | None = _option(None, "words to find the run by, kept in its result file")

    def __post_init__(self) -> None:
        """Refuse an empty name, as of a variable that is not set."""
        for name in ("output_dir", "checkpoint_dir", "continue_from"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; it must name a folder")

    def model_source(self, default: str | None) -> str | None:
        """Where the first weights come from: `continue_from`, unless it is a checkpoint, which is loaded later.

        Args:
            default: What to load otherwise.

        Raises:
            ValueError: If `continue_from` is no folder.
        """
        if self.continue_from is None:
            return default
        if not Path(self.continue_from).is_dir():
            raise ValueError(f"continue_from is {self.continue_from!r}, which is no folder")
        return default if self.is_checkpoint() else self.continue_from

    def is_checkpoint(self) -> bool:
        """Whether `continue_from` is a checkpoint, with step and optimizer, and not a model folder."""
        return self.continue_from is not None and (Path(self.continue_from) / "trainer_state.json").is_file()


@dataclass
class MethodOptions:
    """Which method trains, and its own options; an option left out keeps the method's default."""

    _argument_group_name = "method (an option left out keeps the method's default: docs/guide/finetune.md)"

    method: str = _option(
        "misa",
        "adamw, adamw_bf16, sgd, lora, dora, galore, galore_layerwise, badam, lisa, misa, misa_uniform, misa_lora; as "
        "published: misa_paper, misa_official, badam_official, lisa_official",
    )
    budget: float | None = _option(None, "share of all parameters that is trained at a time, the paper's delta")
    interval: int | None = _option(None, "steps before the next blocks are drawn, the paper's T")
    round_warmup: int | None = _option(None, "first steps of every round at a lower learning rate; default: 0")
    eta: str | None = _option(None, "sharpness of the importance sampling: a number, 0 for uniform, or auto")
    granularity: Literal["matrix", "half", "layer"] | None = _option(None, "how the model is split into blocks")
    include: str | None = _option(None, "what is split into blocks: comma list of patterns of names, as *.self_attn.*")
    exclude: str | None = _option(None, "what is in no block and stays as it is: comma list of patterns")
    always_on: str | None = _option(None, "trained at all times on top: comma list of embeddings, head, norms; or none")
    always_on_lr: float | None = _option(None, "learning rate of embeddings, head, norms, if not that of the blocks")
    variant: str | None = _option(None, "reading of MISA: default, paper or official")
    num_blocks: int | None = _option(None, "blocks that are trained at a time, instead of a budget")
    order: str | None = _option(None, "how blocks are drawn: importance, uniform, ascending, descending or shuffled")
    effective_share: float | None = _option(None, "with eta auto: share of the blocks that is likely to be drawn")
    beta: float | None = _option(None, "factor of the moving average of the importance scores")
    per_parameter: bool | None = _option(None, "divide a block's score by its size; default: yes")
    clip: float | None = _option(None, "upper bound on eta times score in the authors' code, their G_clip")
    first_pass: bool | None = _option(None, "draw every block once before importance counts")
    sample_last: int | None = _option(None, "longest-idle blocks forced into each draw")
    probe_every: int | None = _option(None, "rounds between two measurements of all blocks; 0 never")
    state_policy: str | None = _option(None, "moments of what goes off: drop, reset, cpu or keep")
    state_format: str | None = _option(
        None, "for bf16 weights: master; or without one, rounded stochastically: moments of fp32, bf16 or 8bit"
    )
    residual: str | None = _option(None, "what a bf16 weight cannot hold of its master: cpu (kept there) or drop")
    step_in_backward: bool | None = _option(None, "apply each gradient as soon as it is ready, and free it")
    shard_state: bool | None = _option(
        None, "in data parallel training, let each process keep the moments of a share of what is on"
    )
    inner: str | None = _option(None, "what happens to the active blocks: adamw or sgd")
    record: str | None = _option(
        None, "JSONL file that gets a line for every finished round: blocks, probabilities, scores, norms, bytes"
    )
    lora_r: int | None = _option(None, "rank of the adapters")
    lora_alpha: float | None = _option(None, "scale of the adapters")
    lora_dropout: float | None = _option(None, "dropout before the adapters")
    lora_target: str | None = _option(None, "linear layers with adapters: all, or names, comma separated")
    galore_r: int | None = _option(None, "rank of the projected gradients")
    galore_alpha: float | None = _option(None, "scale of the update that is projected back")
    galore_update_every: int | None = _option(None, "steps between two new projections")

    def given(self) -> dict[str, Any]:
        """Return the method's options that were given, in the types the methods take.

        Raises:
            ValueError: If eta is neither a number nor "auto".
        """
        from misa.methods import from_words

        return from_words({name: value for name, value in vars(self).items() if name != "method" and value is not None})


@dataclass
class MemoryOptions:
    """What a run does to need less memory, or how much it may take."""

    _argument_group_name = "memory"

    memory_budget: str | None = _option(
        None,
        "for block methods: choose loss, lean activations, checkpointed layers, optimizer states and the budget of the "
        "method so that a step fits into this much, as 24GiB, and say why; what is given otherwise stays",
    )
    loss: Literal["full", "chunked"] | None = _option(
        None, "full, or chunked: never holds the logits of all tokens while training; the same loss; default: full"
    )
    checkpoint_layers: int | None = _option(
        None, "recompute so many layers in the backward pass, the lowest that train; activation_checkpointing: all"
    )
    lean_activations: bool = _option(False, "norms and gated products keep little and are computed again")

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.checkpoint_layers is not None and self.checkpoint_layers < 0:
            raise ValueError(f"checkpoint_layers is {self.checkpoint_layers}, allowed is 0 or more")

    def given(self) -> dict[str, Any]:
        """The options that ask for something."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


@dataclass
class CommonTrainingOptions:
    """The options of `transformers.TrainingArguments` used most, under their names there.

    Where a default differs from transformers', the reason stands beside it in `parse`.
    """

    _argument_group_name = "training (every other option of transformers.TrainingArguments works too)"

    learning_rate: float = _option(5e-5, "largest learning rate")
    max_steps: int = _option(-1, "optimizer steps; overrides num_train_epochs")
    num_train_epochs: float = _option(3.0, "passes over the training data")
    per_device_train_batch_size: int = _option(8, "sequences in one forward pass")
    gradient_accumulation_steps: int = _option(1, "forward passes in one optimizer step")
    lr_scheduler_type: str = _option("linear", "linear, cosine, constant, constant_with_warmup, ...")
    warmup_steps: float = _option(0, "steps of warm-up, or, below 1, their share")
    weight_decay: float = _option(0.0, "decoupled weight decay")
    adam_beta1: float = _option(0.9, "decay of Adam's first moment")
    adam_beta2: float = _option(0.999, "decay of Adam's second moment")
    adam_epsilon: float = _option(1e-8, "Adam's epsilon")
    max_grad_norm: float = _option(1.0, "clip gradients to this norm; 0 does not clip")
    seed: int = _option(42, "seed of data order, new weights, dropout and sampling")
    bf16: bool = _option(False, "compute in bfloat16 (autocast) whatever the weights are")
    activation_checkpointing: bool = _option(False, "recompute activations in the backward pass to save memory")
    train_sampling_strategy: str = _option("group_by_length", "group_by_length, random or sequential")
    logging_steps: float = _option(10, "steps between two points of the training curve")
    eval_strategy: str = _option("no", "steps or epoch: evaluate on the way, too; at the end it is always done")
    eval_steps: float | None = _option(None, "steps between two evaluations; default: logging_steps")
    eval_on_start: bool = _option(False, "evaluate before the first step")
    per_device_eval_batch_size: int = _option(8, "sequences in one forward pass of an evaluation")
    save_steps: float = _option(50, "steps between two checkpoints")
    save_total_limit: int | None = _option(2, "checkpoints kept; with 2, one is left if the newest is damaged")


# Options of TrainingArguments that others default to, but that do not suit these commands.
OTHER_DEFAULTS: dict[str, Any] = {
    # Nothing is sent anywhere unless asked for.
    "report_to": "none",
    "logging_first_step": True,
    # transformers would replace a NaN loss by the mean so far: a diverged run must look diverged.
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "non_padding",
}


# The least that makes sense, where transformers says so late, in other words, or never.
LEAST: dict[str, int] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "eval_accumulation_steps": 1,
    "neftune_noise_alpha": 0,
    "label_smoothing_factor": 0,
    "logging_steps": 0,
    "eval_steps": 0,
}


def require_sense(fields: dict[str, Any]) -> None:
    """Check options of `transformers.TrainingArguments` that it does not check itself.

    Args:
        fields: Options by name.

    Raises:
        ValueError: If one is out of range, or would be ignored.
    """
    for name, least in LEAST.items():
        if fields[name] is not None and not fields[name] >= least:  # also of what is no number
            raise ValueError(f"{name} is {fields[name]}, allowed is {least} or more")
    if fields["learning_rate"] == math.inf:
        raise ValueError("learning_rate is inf, allowed are finite numbers from 0")
    if fields["max_steps"] != -1 and fields["max_steps"] < 1:
        raise ValueError(f"max_steps is {fields['max_steps']}, allowed is 1 or more, or -1 for num_train_epochs")
    if fields["max_steps"] == -1 and not 0 < fields["num_train_epochs"] < math.inf:
        raise ValueError(f"num_train_epochs is {fields['num_train_epochs']}, allowed is more than 0")
    if fields["label_smoothing_factor"] > 1:
        raise ValueError(f"label_smoothing_factor is {fields['label_smoothing_factor']}, allowed is 0 to 1")
    orders = ("group_by_length", "random", "sequential")
    if fields["train_sampling_strategy"] not in orders:
        raise ValueError(
            f"train_sampling_strategy is {fields['train_sampling_strategy']!r}, allowed is {', '.join(orders)}"
        )
    if fields["metric_for_best_model"] not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model is {fields['metric_for_best_model']!r}, allowed is loss, which alone is measured "
            "while training"
        )
    if fields.get("resume_from_checkpoint"):
        raise ValueError(
            "resume_from_checkpoint is not needed: the same command goes on by itself; "
            "continue_from starts from a checkpoint of another run"
        )


def parse(
    types: Sequence[type],
    argv: Sequence[str] | None,
    *,
    prog: str,
    usage: str,
    description: str,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Parse a command line into options and `transformers.TrainingArguments`.

    `--help` and errors of the first group come before transformers' Trainer is loaded, which takes seconds.

    Args:
        types: Option dataclasses; `RunOptions` and `CommonTrainingOptions` must be among them.
        argv: Arguments after the program name; None takes them from the process.
        prog: Program name in messages.
        usage: Usage line.
        description: First paragraph of the help text.
        defaults: Defaults of this command for options of `TrainingArguments`, over those of `OTHER_DEFAULTS`.

    Returns:
        One object for each of `types` and, last, the `TrainingArguments`, whose output_dir is the checkpoint folder.

    Raises:
        ValueError: If an option is unknown or missing, or its value is not allowed.
        SystemExit: After `--help`.
    """
    parser = _parser(types, prog=prog, usage=usage, description=description)
    known = {option for action in parser._actions for option in action.option_strings}
    *options, remaining = parser.parse_args_into_dataclasses(
        list(argv) if argv is not None else None, return_remaining_strings=True, look_for_args_file=False
    )
    run = next(option for option in options if isinstance(option, RunOptions))
    common = next(option for option in options if isinstance(option, CommonTrainingOptions))

    import torch
    from transformers import TrainingArguments

    from misa.integration.wrappers import refuse_launched

    parser = _parser([TrainingArguments], prog=prog)
    accelerator = torch.accelerator.is_available()
    # Pinned memory speeds up copies to an accelerator, and is a warning without one. The processor must be asked for
    # by name, or bf16 is refused there.
    machine = {"dataloader_pin_memory": accelerator, "use_cpu": not accelerator}
    others = {**machine, **OTHER_DEFAULTS, **(defaults or {})}
    # Not the values themselves: argparse would put text through the type of its option, which may be another.
    parser.set_defaults(**dict.fromkeys(others))
    known |= {option for action in parser._actions for option in action.option_strings}
    values, unknown = parser.parse_known_args(remaining)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], sorted(known), n=1)
        raise ValueError(f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    fields = {**vars(values), **vars(common)}
    fields |= {name: value for name, value in others.items() if fields[name] is None}
    require_sense(fields)
    refuse_launched(fields.get("deepspeed"), fields.get("fsdp"))
    fields["output_dir"] = run.checkpoint_dir or f"{run.output_dir}/checkpoints"
    allowed = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    training = TrainingArguments(**{name: value for name, value in fields.items() if name in allowed})
    require_reporters(training)
    return (*options, training)


def require_reporters(training: Any) -> None:
    """Make sure that what a run is to report to is installed; find that out now, not after loading.

    Args:
        training: `transformers.TrainingArguments`.

    Raises:
        ValueError: If a package is missing.
    """
    packages = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}
    for name in training.report_to:
        names = packages.get(name, ())
        if names and not any(importlib.util.find_spec(package) for package in names):
            raise ValueError(
                f"report_to is {name!r}, which is not installed: pip install {names[0]}, or --report_to none"
            )
    if others := set(training.report_to) - packages.keys():
        from transformers.integrations import get_available_reporting_integrations

        if missing := sorted(others - set(get_available_reporting_integrations())):
            raise ValueError(f"report_to is {missing[0]!r}, which is not installed; --report_to none goes without")
    if "wandb" in training.report_to and training.project != "huggingface":
        # wandb reads its project from here alone.
        os.environ["WANDB_PROJECT"] = training.project


def _parser(types: Sequence[type], **settings: Any) -> Any:
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        """Report an error to the caller, since the usage of 150 options would bury it."""

        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return Parser(types, allow_abbrev=False, formatter_class=HelpFormatter, **settings)
