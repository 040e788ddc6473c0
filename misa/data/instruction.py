"""Instruction data: the prompt, the tokens, and batches whose loss falls on the response alone.

The prompt is Stanford Alpaca's, in both of its forms. It is written here once; training and the evaluation tasks
import it, so that a model is asked in the words it was trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from misa.data.packing import IGNORED, pack
from misa.data.records import (
    Record,
    numbered_records,
    records_digest,
    require_text,
    require_unicode,
    sound_records,
)
from misa.data.tokens import cached_tokens, tokenizer_digest

logger = logging.getLogger(__name__)

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION_HEADING = "### Instruction:"
INPUT_HEADING = "### Input:"
RESPONSE_HEADING = "### Response:"

# Part of the name of kept tokens: to be raised with every change of the prompt or of `encode`.
TEMPLATE_VERSION = 1

REQUIRED_FIELDS = ("instruction", "output")


def format_prompt(instruction: str, input: str = "") -> str:
    """Return the prompt that a response is to follow.

    Args:
        instruction: What is asked.
        input: Further context, or "" for none.

    Returns:
        Text that ends in the response heading and a line break; the response follows directly.
    """
    instruction, context = instruction.strip(), input.strip()
    if context:
        parts = [PREAMBLE_WITH_INPUT, f"{INSTRUCTION_HEADING}\n{instruction}", f"{INPUT_HEADING}\n{context}"]
    else:
        parts = [PREAMBLE, f"{INSTRUCTION_HEADING}\n{instruction}"]
    return "\n\n".join([*parts, f"{RESPONSE_HEADING}\n"])


def record_prompt(record: Mapping[str, Any]) -> str:
    """Return the prompt of a record with the fields `instruction` and, optionally, `input`."""
    return format_prompt(record["instruction"], record.get("input") or "")


def read_instructions(path: str | Path, to_learn: bool = False) -> list[Record]:
    """Read instruction records: fields `instruction` and `output`, optionally `input` and `answer`.

    Args:
        path: A `.jsonl` file or a `.json` list.
        to_learn: Refuse empty outputs. Public test files have some: they hold a model's old output beside the answer.

    Raises:
        ValueError: If the file or a record is malformed; the message names the file and the line or record.
    """

    def check(record: Record) -> Record:
        require_text(record, REQUIRED_FIELDS)
        if to_learn and not record["output"].strip():
            raise ValueError("field 'output' is empty, so there is nothing to learn")
        if not isinstance(record.get("input") or "", str):
            raise ValueError("field 'input' must be text")
        require_unicode("input", record.get("input") or "")
        return record

    return sound_records(numbered_records(path), check, 0.0, str(path))


def encode(
    record: Mapping[str, Any], tokenizer: Any, max_length: int, train_on_inputs: bool = False
) -> dict[str, list[int]]:
    """Turn a record into token ids and labels.

    The prompt's labels are `IGNORED`. The response is followed by the tokenizer's end token, which has a label like
    any other: where padding and end share one id (as in SmolLM2), masking by that id would leave the end unlearned.

    Args:
        record: Fields `instruction`, `output`, optionally `input`.
        tokenizer: A transformers tokenizer with an end token.
        max_length: Tokens kept, counted from the start.
        train_on_inputs: Give the prompt labels, too.

    Returns:
        `input_ids` and `labels` of equal length, at most `max_length`.
    """
    prompt = tokenizer(record_prompt(record))["input_ids"]
    response = tokenizer(record["output"].strip(), add_special_tokens=False)["input_ids"]
    # A tokenizer may itself close every text with the end token, which must not stand between prompt and response.
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    response = [*response, tokenizer.eos_token_id]
    return {
        "input_ids": [*prompt, *response][:max_length],
        "labels": [*(prompt if train_on_inputs else [IGNORED] * len(prompt)), *response][:max_length],
    }


class InstructionDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Instruction records as tokens.

    Records whose prompt alone fills `max_length` have nothing to learn from; they are left out, with one warning that
    counts them.

    Args:
        records: Records as `read_instructions` gives them.
        tokenizer: A transformers tokenizer with an end token.
        max_length: Longest sequence kept, in tokens, at least 2.
        train_on_inputs: Learn the prompts, too, instead of the responses alone.
        packing: Put several records into one sequence, see `misa.data.packing`.
        tokenized_dir: Folder that keeps the tokens between runs; None keeps them in memory alone.

    Attributes:
        items: The sequences, each a dictionary of lists.
        lengths: Length of each sequence, in tokens.

    Raises:
        ValueError: If the tokenizer has no end token, `max_length` is under 2, or no record is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        max_length: int = 512,
        train_on_inputs: bool = False,
        packing: bool = False,
        tokenized_dir: str | Path | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), so the end of a response cannot be taught")
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}, allowed is 2 or more")

        def sequences() -> Iterator[dict[str, list[int]]]:
            encoded = (encode(record, tokenizer, max_length, train_on_inputs) for record in records)
            # The first token is never predicted, so a label there does not count.
            kept = (item for item in encoded if any(label != IGNORED for label in item["labels"][1:]))
            return pack(kept, max_length) if packing else ({**item, "num_records": [1]} for item in kept)

        identity = tokenizer_digest(tokenizer) if tokenized_dir is not None else None
        key = {
            "records": records_digest(records) if identity else None,
            "tokenizer": identity,
            "template_version": TEMPLATE_VERSION,
            "max_length": max_length,
            "train_on_inputs": train_on_inputs,
            "packing": packing,
        }
        table = cached_tokens(tokenized_dir if identity else None, key, sequences)
        if len(table) == 0:
            raise ValueError(f"max_length {max_length} leaves no room for a response in any of {len(records)} records")
        left_out = len(records) - sum(count for (count,) in table["num_records"])
        self.items = table.remove_columns("num_records")
        self.lengths = [len(ids) for ids in self.items["input_ids"]]
        if left_out:
            logger.warning("left out %d of %d records: prompt longer than max_length", left_out, len(records))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


class InstructionCollator:
    """Pad items to a batch on the right, and ask the model for logits only where a label needs them.

    With a vocabulary of 49152 the logits of the prompt cost more than a whole layer, and nothing reads them. So
    the batch names the positions at which some row has a label (`logits_to_keep`, one list for all rows) and
    carries the labels shifted and cut to them (`shift_labels`); loss and gradients are those of the full logits.

    Packed items bring `position_ids` that begin anew with each record. Their batch has no `attention_mask`: from the
    positions alone transformers builds one that keeps the records apart.

    Args:
        pad_token_id: Id to pad with; masked by attention, and its labels are `IGNORED`.
        keep_all_logits: Leave out `logits_to_keep` and `shift_labels`, for a model whose `forward` does not know them.
        pad_to: Length of every batch, in tokens; None for that of its longest item.
    """

    def __init__(self, pad_token_id: int, keep_all_logits: bool = False, pad_to: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.keep_all_logits = keep_all_logits
        self.pad_to = pad_to

    def __call__(self, items: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` or `position_ids`, `labels` of shape [rows, length], and cut labels."""
        length = max(self.pad_to or 0, *(len(item["input_ids"]) for item in items))
        batch: dict[str, Any] = {
            "input_ids": self._padded(items, "input_ids", length, lambda missing: [self.pad_token_id] * missing),
            "labels": self._padded(items, "labels", length, lambda missing: [IGNORED] * missing),
        }
        if "position_ids" in items[0]:
            # The padding counts as one more record, which nothing attends to and which has no labels.
            batch["position_ids"] = self._padded(items, "position_ids", length, lambda missing: list(range(missing)))
            # With a cache of keys and values, transformers does not look for borders in the positions.
            batch["use_cache"] = False
        else:
            ones = [{"mask": [1] * len(item["input_ids"])} for item in items]
            batch["attention_mask"] = self._padded(ones, "mask", length, lambda missing: [0] * missing)
        if not self.keep_all_logits:
            # Position t predicts token t + 1.
            shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
            positions = (shifted != IGNORED).any(dim=0).nonzero().flatten()
            batch["shift_labels"] = shifted[:, positions].contiguous()
            batch["logits_to_keep"] = positions
        return batch

    @staticmethod
    def _padded(
        items: Sequence[Mapping[str, list[int]]], name: str, length: int, padding: Callable[[int], list[int]]
    ) -> torch.Tensor:
        return torch.tensor([[*item[name], *padding(length - len(item[name]))] for item in items])
