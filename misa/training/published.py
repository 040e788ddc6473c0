"""The flags of the authors' programs, translated into this package's options before they are parsed.

One table for each program says what a flag means here; what depends on several flags, such as which method is meant,
follows below. A line in the authors' style (one that chooses the method by their flags) also gets their defaults.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from misa.training.translation import Flag, Line, boolean, count, one_of, only_safetensors, share, whole

logger = logging.getLogger(__name__)

LOAD_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# The authors' task names and the groups of `misa.tasks`.
TASKS = {"math": "misa_math", "commonsense": "misa_commonsense"}
OPTIMS = ("adamw_hf", "adamw_torch", "adamw_torch_fused")


# Names that transformers has dropped.
DROPPED = {
    "evaluation_strategy": Flag("eval_strategy"),
    "warmup_ratio": Flag("warmup_steps", share),
    "no_cuda": Flag("use_cpu", boolean),
    "group_by_length": Flag("train_sampling_strategy", lambda text: "group_by_length" if boolean(text) else "random"),
    "save_safetensors": Flag("", only_safetensors),
}

# The flags of their block-coordinate descent, in both programs.
BLOCKS = {
    "bcd_activated_layers": Flag(None, int, "1"),
    "bcd_interval_steps": Flag(None, int, "50"),
    "bcd_update_order": Flag(None, str, "misa"),
    "granularity": Flag(None, one_of({"module": "matrix", "layer": "layer", "half": "half"}), "layer", shared=True),
    "param_ratio_limit": Flag(None, float, "0.03"),
    "sample_last": Flag(None, int, "0", shared=True),
    "misa_eta": Flag(None, float, "1.0"),
    "G_clip": Flag(None, float, "5.0"),
    "include_embedding_and_lm_head": Flag(None, boolean, "False"),
}
TRAIN = {
    **DROPPED,
    **BLOCKS,
    "max_seq_length": Flag("max_length"),
    "load_type": Flag("dtype", one_of(LOAD_TYPES)),
    "save_model_at_last": Flag("save_model", boolean),
    "use_bcd": Flag(None, boolean),
    "use_lora": Flag(None, boolean),
    "use_dora": Flag(None, boolean),
    "use_galore": Flag(None, boolean),
    "mix_lora": Flag(None, boolean),
    "optim": Flag(None),
}

PRETRAIN = {
    **DROPPED,
    **BLOCKS,
    "granularity": Flag(None, BLOCKS["granularity"].convert, "module", shared=True),
    "param_ratio_limit": Flag(None, float, "1.0"),
    "use_hf_model": Flag("", boolean),
    "single_gpu": Flag(None, boolean),
    "batch_size": Flag("per_device_train_batch_size", int),
    "gradient_accumulation": Flag("gradient_accumulation_steps", int),
    "total_batch_size": Flag(None, int),
    "num_training_steps": Flag("max_steps", int, "10000"),
    "max_train_tokens": Flag(None, count),
    "warmup_steps": Flag("warmup_steps", str, "1000"),
    "eval_every": Flag("eval_steps", int, "5000"),
    "save_every": Flag("save_steps", int, "10000"),
    "save_dir": Flag("output_dir"),
    "workers": Flag("dataloader_num_workers", int),
    "seed": Flag("seed", int, "0"),
    "name": Flag("run_name"),
    "wandb_run_name": Flag("run_name"),
    "wandb_project": Flag("project"),
    "optimizer": Flag(None),
    "lr": Flag("learning_rate", str, "1e-4"),
    "scheduler": Flag(None, str, "cosine"),
    "min_lr_ratio": Flag(None, float, "0.1"),
    "beta1": Flag("adam_beta1"),
    "beta2": Flag("adam_beta2"),
    "eps": Flag("adam_epsilon"),
    "weight_decay": Flag("weight_decay", str, "0"),
    "grad_clipping": Flag("max_grad_norm", str, "0"),
    "galore_rank": Flag(None, int, "256"),
    "optim": Flag(None),
}


def translate_train(words: Sequence[str]) -> list[str]:
    """Translate the line of `misa.train`.

    Args:
        words: Arguments after the program name.

    Returns:
        The same line in this package's options.

    Raises:
        ValueError: If flags contradict each other or a value is not allowed.
    """
    line = Line(words, TRAIN)
    switches = ("use_bcd", "use_lora", "use_dora", "use_galore", "mix_lora")
    in_their_style = any(name in line.given for name in switches)
    on = [name for name in switches if line.says(name)]
    refuse_together(line, on)
    if "use_bcd" in on:
        if {"use_lora", "mix_lora"} & set(on):
            _adapters(line)
        _blocks(line, over_adapters="use_lora" in on or "mix_lora" in on)
    else:
        refuse_block_flags(line, "--use_bcd True", excused="use_bcd" in line.given)
        if "use_galore" in on:
            line.set("method", "galore", "use_galore True")
            for name, default in (("galore_r", 16), ("galore_alpha", 1.0)):
                if name not in line.own:
                    line.set(name, default, "use_galore True")
        elif on:
            line.set("method", "dora" if "use_dora" in on else "lora", f"{on[-1]} True")
            _adapters(line)
    _optim(line, in_their_style and not on)
    return report_somewhere(line.words(in_their_style), in_their_style)


def translate_pretrain(words: Sequence[str]) -> list[str]:
    """Translate the line of `misa.pretrain`; arguments, result and errors as for `translate_train`."""
    line = Line(words, PRETRAIN)
    optimizer = line.given.get("optimizer")
    allowed = ("adamw", "bcd-optimizer", "galore", "galore-layerwise")
    if optimizer is not None and optimizer not in allowed:
        raise ValueError(f"--optimizer is {optimizer!r}: allowed is {', '.join(allowed)}")
    if optimizer == "bcd-optimizer":
        _blocks(line)
    else:
        refuse_block_flags(line, "--optimizer bcd-optimizer", excused=False)
    if optimizer == "adamw":
        # Theirs keeps no master copies beside bf16 weights.
        from misa.models import resolve_dtype

        dtype = line.own.get("dtype", "float32")
        pure = resolve_dtype(LOAD_TYPES.get(dtype, dtype)) == "bfloat16"
        line.set("method", "adamw_bf16" if pure else "adamw", "optimizer adamw")
    elif optimizer in ("galore", "galore-layerwise"):
        line.set("method", optimizer.replace("-", "_"), f"optimizer {optimizer}")
        line.set("galore_r", line.value("galore_rank"), "galore_rank")
    elif "galore_rank" in line.given:
        line.set("galore_r", line.given["galore_rank"], "galore_rank")
    if line.says("single_gpu") and world_size() > 1:
        raise ValueError(f"--single_gpu and {world_size()} processes contradict each other")
    in_their_style = optimizer is not None
    _batch(line)
    if in_their_style:
        line.ours.setdefault("eval_strategy", "steps")
        if "dataset_path" not in line.own:
            line.ours["dataset_path"] = "c4"
        if "padding" not in line.own:
            # Theirs pads each document to the full length.
            line.ours["padding"] = "max_length"
    elif "eval_every" in line.given:
        line.set("eval_strategy", "steps", "eval_every")
    if in_their_style or "scheduler" in line.given or "min_lr_ratio" in line.given:
        _scheduler(line)
    _optim(line, False)
    return report_somewhere(line.words(in_their_style), in_their_style)


def refuse_together(line: Line, on: Sequence[str]) -> None:
    """Refuse switches that choose two methods at once.

    Args:
        line: The line.
        on: Switches that are on.

    Raises:
        ValueError: Naming both flags.
    """
    fits = ({"use_bcd", "use_lora"}, {"use_bcd", "mix_lora"}, {"use_lora", "mix_lora"}, {"use_lora", "use_dora"})
    for i, first in enumerate(on):
        for second in on[i + 1 :]:
            if {first, second} not in fits:
                raise ValueError(f"--{first} True and --{second} True contradict each other")
    if "mix_lora" in on and "use_bcd" not in on:
        raise ValueError("--mix_lora True needs --use_bcd True: it makes the LoRA matrices the blocks")
    if on and "method" in line.own:
        raise ValueError(f"--{on[0]} True and --method {line.own['method']} contradict each other: give one of them")


def refuse_block_flags(line: Line, missing: str, excused: bool) -> None:
    """Refuse flags of block-coordinate descent without it, unless it was switched off expressly."""
    flags = [name for name in BLOCKS if name in line.given and not BLOCKS[name].shared]
    if flags and not excused:
        raise ValueError(f"--{flags[0]} needs {missing}; with --method, use the options of this package (--help)")
    for name, flag in BLOCKS.items():
        if flag.shared and name in line.given and not (excused and "method" not in line.own):
            line.set(name, line.given[name], name)


def _blocks(line: Line, over_adapters: bool = False) -> None:
    """Their block-coordinate descent: which of our methods, and with what."""
    if "method" in line.own:
        raise ValueError(f"--method {line.own['method']} and the published choice of blocks contradict each other")
    if "order" in line.own:
        raise ValueError(
            f"--order {line.own['order']} goes with --method; with --use_bcd True it is --bcd_update_order"
        )
    order, blocks = line.value("bcd_update_order"), line.value("granularity")
    orders = {"misa": None, "random": "uniform", "ascending": "ascending", "descending": "descending"}
    if order not in orders:
        raise ValueError(f"--bcd_update_order is {order!r}: allowed is {', '.join(orders)}")
    always = line.value("include_embedding_and_lm_head")
    weighted = order in ("misa", "random")
    if over_adapters:
        method, blocks = "misa_lora", "matrix"
    elif weighted:
        method = "misa_official" if order == "misa" else "misa_uniform"
    else:
        method = "lisa_official" if always else "badam_official"
    chosen: dict[str, Any] = {"method": method, "granularity": blocks, "interval": line.value("bcd_interval_steps")}
    # Over adapters too, a cyclic order counts blocks and a weighted one fills the limit.
    if weighted and blocks == "matrix":
        chosen["budget"] = line.value("param_ratio_limit")
        chosen["sample_last"] = line.value("sample_last")
    else:
        chosen["num_blocks"] = line.value("bcd_activated_layers")
        if order == "misa":
            chosen["sample_last"] = line.value("sample_last")
    if order == "misa":
        chosen |= {"eta": line.value("misa_eta"), "clip": line.value("G_clip")}
    elif not weighted or over_adapters:
        chosen["order"] = orders[order]
    if method == "misa_lora" and order != "misa":
        chosen["first_pass"] = False
        chosen.setdefault("sample_last", 0)
    chosen["always_on"] = "embeddings,head" if always and not over_adapters else "none"
    for option, value in chosen.items():
        line.set(option, value, _source(option))


def _source(option: str) -> str:
    """The published flag behind one of our options, for messages."""
    flags = {"interval": "bcd_interval_steps", "budget": "param_ratio_limit", "num_blocks": "bcd_activated_layers"}
    flags |= {"eta": "misa_eta", "clip": "G_clip", "always_on": "include_embedding_and_lm_head"}
    return flags.get(option, "bcd_update_order" if option in ("method", "order") else option)


def _adapters(line: Line) -> None:
    """Their defaults for adapters."""
    for name, default in (("lora_r", 8), ("lora_alpha", 16), ("lora_dropout", 0.05)):
        if name not in line.own:
            line.ours[name] = default


def _optim(line: Line, full: bool) -> None:
    """Their base optimizer: AdamW, or plain gradient descent, of the whole model or inside the blocks."""
    optim = line.given.get("optim")
    if optim is not None and optim not in (*OPTIMS, "sgd"):
        raise ValueError(
            f"--optim is {optim!r}, but the optimizer is chosen by --method; allowed is {', '.join(OPTIMS)} or sgd"
        )
    method = line.own.get("method", line.ours.get("method"))
    if method is None and (full or optim is not None):
        # Theirs trains the whole model unless another flag says otherwise.
        line.set("method", "sgd" if optim == "sgd" else "adamw", f"optim {optim}" if optim else "use_bcd False")
    elif optim == "sgd" and method != "sgd":
        line.set("inner", "sgd", "optim sgd")


def _batch(line: Line) -> None:
    """Accumulation from the total batch, steps from the total tokens."""

    def read(flag: str, option: str, default: int | None) -> int | None:
        if flag in line.given:
            return whole(flag, line.given[flag])
        return whole(option, line.own[option]) if option in line.own else default

    batch = read("batch_size", "per_device_train_batch_size", 8) or 8
    accumulation = read("gradient_accumulation", "gradient_accumulation_steps", None)
    total = line.given.get("total_batch_size")
    if total is not None:
        if "batch_size" not in line.given and "per_device_train_batch_size" not in line.own:
            batch = math.gcd(total, batch * world_size()) // world_size() or 1
            line.set("per_device_train_batch_size", batch, "total_batch_size")
        at_once = batch * world_size()
        if total < 1 or at_once < 1 or total % at_once:
            text = f" x {world_size()} processes" if world_size() > 1 else ""
            raise ValueError(f"--total_batch_size {total} is not a multiple of --batch_size {batch}{text}")
        if accumulation is not None and accumulation * at_once != total:
            raise ValueError(
                f"--total_batch_size {total}, --batch_size {batch} and --gradient_accumulation {accumulation} "
                "contradict each other"
            )
        accumulation = total // at_once
        line.set("gradient_accumulation_steps", accumulation, "total_batch_size")
    tokens = line.given.get("max_train_tokens")
    if tokens is not None:
        if "num_training_steps" in line.given or "max_steps" in line.own:
            raise ValueError("--max_train_tokens and --num_training_steps contradict each other: give one of them")
        per_step = batch * world_size() * (accumulation or 1) * whole("max_length", line.own.get("max_length", 256))
        if tokens < per_step:
            raise ValueError(f"--max_train_tokens is {tokens}, allowed is one step of {per_step} tokens or more")
        line.set("max_steps", tokens // per_step, "max_train_tokens")


def _scheduler(line: Line) -> None:
    """Their learning-rate schedules; the cosine ends at a share of the largest rate."""
    scheduler, ratio = line.value("scheduler"), line.value("min_lr_ratio")
    names = {"linear": "linear", "cosine": "cosine_with_min_lr", "cosine_restarts": "cosine_with_restarts"}
    if scheduler not in names:
        raise ValueError(f"--scheduler is {scheduler!r}: allowed is {', '.join(names)}")
    if scheduler != "cosine" and line.given.get("min_lr_ratio"):
        raise ValueError(f"--min_lr_ratio {ratio} and --scheduler {scheduler} contradict each other: it ends at 0")
    if not 0 <= ratio <= 1:
        raise ValueError(f"--min_lr_ratio is {ratio}: allowed is 0 to 1")
    line.set("lr_scheduler_type", names[scheduler], f"scheduler {scheduler}")
    if scheduler == "cosine":
        line.set("lr_scheduler_kwargs", f'{{"min_lr_rate":{ratio}}}', "min_lr_ratio")


def world_size() -> int:
    """Processes of this run, as `torch.distributed.run` states them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def report_somewhere(words: list[str], in_their_style: bool) -> list[str]:
    """Let a line in the authors' style run without wandb: their lines all report to it."""
    from importlib.util import find_spec

    if in_their_style and "--report_to" in words:
        at = words.index("--report_to") + 1
        if words[at : at + 1] == ["wandb"] and find_spec("wandb") is None:
            logger.warning("wandb is not installed (pip install wandb): this run reports to its own files only")
            words[at] = "none"
    return words
