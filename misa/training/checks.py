"""What can be wrong between the settings of a run and what it trains with, found before training."""

from __future__ import annotations

from typing import Any


def check_parts(parts: Any, arguments: Any) -> None:
    """Refuse settings that the model, the tokenizer or the data cannot meet.

    Args:
        parts: `misa.training.run.Parts`.
        arguments: `transformers.TrainingArguments`.

    Raises:
        ValueError: Naming the setting.
    """
    from transformers.trainer_utils import has_length

    if parts.eval_dataset is None and (arguments.eval_strategy != "no" or arguments.eval_on_start):
        strategy = getattr(arguments.eval_strategy, "value", arguments.eval_strategy)
        asked = "eval_on_start is True" if strategy == "no" else f"eval_strategy is {strategy}"
        raise ValueError(f"{asked}, but nothing is held out: give validation_samples")
    _require_vocabulary(parts)
    if arguments.dataloader_drop_last and has_length(parts.train_dataset):
        at_once = arguments.train_batch_size * arguments.world_size
        if (num := len(parts.train_dataset)) < at_once:
            raise ValueError(f"dataloader_drop_last: {num} training sequences make no batch of {at_once}")


def _require_vocabulary(parts: Any) -> None:
    """Refuse a tokenizer that knows more tokens than the model; those that were added to it may never occur."""
    tokenizer, embeddings = parts.tokenizer, parts.model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None:
        return
    special = [i for i in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if (needed := max([tokenizer.vocab_size, *(i + 1 for i in special)])) > rows:
        raise ValueError(f"the tokenizer has {needed} tokens, and the model embeds {rows}: they do not belong together")


def check_schedule(arguments: Any) -> None:
    """Make the schedule of the learning rate once, for what is wrong with it is found nowhere else before training."""
    import torch
    from transformers import get_scheduler

    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    kind, settings = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(kind, nothing, num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs=settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"lr_scheduler_type is {getattr(kind, 'value', kind)}, lr_scheduler_kwargs {settings}: {error}"
        ) from error


def require_one_pass(method: str, arguments: Any) -> None:
    """Refuse what cannot be had where gradients are applied and freed in the backward pass."""
    if arguments.world_size > 1 and method == "galore_layerwise":
        raise ValueError(f"method {method} applies gradients before processes have exchanged them; use galore")
    reason = f"method {method} applies each gradient in the backward pass, so"
    if arguments.gradient_accumulation_steps > 1:
        raise ValueError(
            f"{reason} gradients cannot be accumulated: gradient_accumulation_steps is "
            f"{arguments.gradient_accumulation_steps}, allowed is 1"
        )
    if arguments.max_grad_norm:
        raise ValueError(
            f"{reason} they cannot be clipped together: max_grad_norm is {arguments.max_grad_norm}, allowed is 0"
        )
