"""Several records in one sequence, so that fewer tokens are padding.

Positions begin anew with each record. Where a batch has no `attention_mask` and no cache, transformers (5.23) reads the
borders off `position_ids` and keeps attention inside a record: with the implementations eager, sdpa and flex by a mask,
with FlashAttention by its variable-length kernel. That holds for models whose masks come from
`transformers.masking_utils`, such as LLaMA, Mistral and Qwen; in a model with code of its own for masks, a record can
see the ones before it in its sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
