"""Several records in one sequence, so that fewer tokens are padding.

Positions begin anew with each record. Where a batch has no `attention_mask` and no cache, transformers (5.23) reads the
borders off `position_ids` and keeps attention inside a record: with the implementations eager, sdpa and flex by a mask,
with FlashAttention by its variable-length kernel. That holds for models whose masks come from
`transformers.masking_utils`, such as LLaMA, Mistral and Qwen; in a model with code of its own for masks, a record could
see the ones before it in its sequence, so `require_apart` refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

# Labels with this value carry no loss, in torch and in transformers.
IGNORED = -100

# Sequences that are filled at the same time: more waste less room, fewer stay closer to the order of the records.
NUM_OPEN = 64

Sequence = dict[str, list[int]]


def pack(items: Iterable[Sequence], max_length: int) -> Iterator[Sequence]:
    """Fill sequences with whole items, each into the first open sequence that has room for it.

    The first token of an item gets no label, since what stands before it belongs to another one. The result depends on
    the items and their order alone.

    Args:
        items: Dictionaries with `input_ids` and `labels`, none longer than `max_length`.
        max_length: Longest sequence, in tokens.

    Yields:
        `input_ids`, `labels` and `position_ids`, and `num_records`, a list of one number.
    """
    opened: list[Sequence] = []
    for item in items:
        length = len(item["input_ids"])
        sequence = next((open_ for open_ in opened if len(open_["input_ids"]) + length <= max_length), None)
        if sequence is None:
            if len(opened) == NUM_OPEN:
                # The fullest one is the least likely to take another item.
                yield opened.pop(max(range(NUM_OPEN), key=lambda index: len(opened[index]["input_ids"])))
            sequence = {"input_ids": [], "labels": [], "position_ids": [], "num_records": [0]}
            opened.append(sequence)
        sequence["input_ids"] += item["input_ids"]
        sequence["labels"] += [IGNORED, *item["labels"][1:]]
        sequence["position_ids"] += range(length)
        sequence["num_records"][0] += 1
    yield from opened


def require_apart(model: Any) -> None:
    """Check on two records of eight tokens that a model answers a packed record as it does the record alone.

    Nothing is checked of FlashAttention before the model is on a GPU, where alone it runs.

    Args:
        model: A transformers causal LM.

    Raises:
        ValueError: If it does not: it does not read the borders between records off their positions.
    """
    import torch

    if "flash" in str(model.config._attn_implementation) and model.device.type == "cpu":
        return
    length, was_training = 8, model.training
    ids = (torch.arange(1, 2 * length + 1, device=model.device) % model.config.get_text_config().vocab_size)[None]
    positions = torch.arange(length, device=model.device).repeat(2)[None]
    # Dropout would make any two answers differ.
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, length:].float()
        alone = model(input_ids=ids[:, length:], position_ids=positions[:, length:], use_cache=False).logits
    model.train(was_training)
    # Far above what rounding makes of it, far below what a record in sight does.
    tolerance = math.sqrt(torch.finfo(alone.dtype).eps) * float(alone.abs().max())
    if float((packed - alone.float()).abs().max()) > tolerance:
        raise ValueError(
            f"packing is True, but a model of type {model.config.model_type} does not keep packed records apart; "
            "allowed is a model whose attention reads their borders off position_ids, such as LLaMA, Mistral or Qwen; "
            "leave out --packing"
        )
