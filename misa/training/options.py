"""Options of the training commands, readable by `--help` without loading torch or transformers' Trainer."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn


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


@dataclass
class MethodOptions:
    """Which method trains, and its own options; an option left out keeps the method's default."""

    _argument_group_name = "method"

    method: str = _option("misa", "adamw, lora, badam, lisa, misa or misa_uniform")
    budget: float | None = _option(None, "share of all parameters that is trained at a time, the paper's delta")
    interval: int | None = _option(None, "steps before the next blocks are drawn, the paper's T")
    eta: str | None = _option(None, "sharpness of the importance sampling: a number, 0 for uniform, or auto")
    granularity: Literal["matrix", "half", "layer"] | None = _option(None, "how the model is split into blocks")
    always_on: str | None = _option(None, "trained at all times on top: comma list of embeddings, head, norms")
    variant: str | None = _option(None, "reading of MISA: default, paper or official")
    lora_r: int | None = _option(None, "rank of the adapters")
    lora_alpha: float | None = _option(None, "scale of the adapters")
    lora_dropout: float | None = _option(None, "dropout before the adapters")

    def given(self) -> dict[str, Any]:
        """Return the method's options that were given, in the types the methods take.

        Raises:
            ValueError: If eta is neither a number nor "auto".
        """
        options = {name: value for name, value in vars(self).items() if name != "method" and value is not None}
        if "eta" in options and options["eta"] != "auto":
            try:
                options["eta"] = float(options["eta"])
            except ValueError:
                raise ValueError(f"eta is {options['eta']!r}, allowed is a number from 0 up, or auto") from None
        if "always_on" in options:
            options["always_on"] = tuple(name.strip() for name in options["always_on"].split(",") if name.strip())
        return options


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


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Name each option once, and no default where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        option = next(option for option in action.option_strings if option.startswith("--"))
        values = self._format_args(action, "VALUE")
        return f"{option} {values}" if values else option


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
    fields["output_dir"] = run.checkpoint_dir or f"{run.output_dir}/checkpoints"
    allowed = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    return (*options, TrainingArguments(**{name: value for name, value in fields.items() if name in allowed}))


def _parser(types: Sequence[type], **settings: Any) -> Any:
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        """Report an error to the caller, since the usage of 150 options would bury it."""

        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return Parser(types, allow_abbrev=False, formatter_class=_Formatter, **settings)
