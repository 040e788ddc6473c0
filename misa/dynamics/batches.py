"""A fixed population of mini-batches out of a corpus or an instruction data set."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch

# Documents of a corpus are in a random order, so batches come from its beginning; from a piece this many times as long
# as needed, so that the seed has something to choose from.
_CHOICE = 4


def load_batches(
    dataset_path: str | Path,
    tokenizer: Any,
    num_batches: int,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    split: str = "train",
) -> list[dict[str, torch.Tensor]]:
    """Draw batches without repetition: blocks of text of a corpus, or padded instruction records.

    Args:
        dataset_path: Folder with `<split>.jsonl`; records have the field text (corpus), or instruction and output.
        tokenizer: A transformers tokenizer.
        num_batches: Number of batches.
        batch_size: Sequences in a batch.
        seq_len: Tokens in a block of text; longest instruction record.
        seed: Of the draw.
        split: Name of the split.

    Returns:
        Keyword arguments of a causal language model's forward pass, with labels.

    Raises:
        ValueError: If the data is missing or malformed, or holds fewer sequences than asked for.
    """
    from misa.data.records import read_records, require_split
    from misa.data.sampling import SeededSampler

    for name, value in (("num_batches", num_batches), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    path = require_split(dataset_path, split)
    needed = num_batches * batch_size
    is_corpus = "text" in read_records_head(path)
    dataset: Any
    if is_corpus:
        from misa.data.corpus import BlockDataset, load_blocks

        dataset = BlockDataset(load_blocks(dataset_path, split, tokenizer, seq_len, _CHOICE * needed * seq_len))
    else:
        from misa.data.instruction import REQUIRED_FIELDS, InstructionDataset

        dataset = InstructionDataset(read_records(path, REQUIRED_FIELDS), tokenizer, seq_len)
    if len(dataset) < needed:
        raise ValueError(
            f"{path} holds {len(dataset)} sequences of {seq_len} tokens; num_batches {num_batches} x batch_size "
            f"{batch_size} needs {needed}"
        )
    order = list(islice(SeededSampler(len(dataset), seed), needed))
    collate = _collator(tokenizer, is_corpus)
    groups = [order[i : i + batch_size] for i in range(0, needed, batch_size)]
    return [collate([dataset[index] for index in group]) for group in groups]


def read_records_head(path: Path) -> dict[str, Any]:
    """First record of a file, to tell what kind of data it is."""
    import json

    from misa.data.records import read_records

    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as stream:
            try:
                record = json.loads(next((line for line in stream if line.strip()), "{}"))
            except ValueError as error:
                raise ValueError(f"{path}: the first line is not valid JSON ({error})") from error
        return record if isinstance(record, dict) else {}
    return read_records(path, ())[0]


def _collator(tokenizer: Any, is_corpus: bool) -> Any:
    if is_corpus:
        return torch.utils.data.default_collate
    from misa.data.instruction import InstructionCollator

    return InstructionCollator(tokenizer.pad_token_id)
