"""Instruction data: the prompt, the tokens, and batches whose loss falls on the response alone.

The prompt is Stanford Alpaca's, in both of its forms. It is written here once; training and the evaluation tasks
import it, so that a model is asked in the words it was trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from misa.data.records import Record, read_records

logger = logging.getLogger(__name__)

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION_HEADING = "### Instruction:"
INPUT_HEADING = "### Input:"
RESPONSE_HEADING = "### Response:"

# Labels with this value carry no loss, in torch and in transformers.
IGNORED = -100

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
    records = read_records(path, REQUIRED_FIELDS)
    for number, record in enumerate(records, start=1):
        if to_learn and not record["output"].strip():
            raise ValueError(f"{path}, record {number}: field 'output' is empty, so there is nothing to learn")
        if not isinstance(record.get("input") or "", str):
            raise ValueError(f"{path}, record {number}: field 'input' must be text")
    return records


def encode(record: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Turn a record into token ids and labels.

    The prompt's labels are `IGNORED`. The response is followed by the tokenizer's end token, which has a label like
    any other: where padding and end share one id (as in SmolLM2), masking by that id would leave the end unlearned.

    Args:
        record: Fields `instruction`, `output`, optionally `input`.
        tokenizer: A transformers tokenizer with an end token.
        max_length: Tokens kept, counted from the start.

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
        "labels": [*[IGNORED] * len(prompt), *response][:max_length],
    }


class InstructionDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Instruction records as tokens.

    Records whose prompt alone fills `max_length` have nothing to learn from; they are left out, with one warning that
    counts them.

    Args:
        records: Records as `read_instructions` gives them.
        tokenizer: A transformers tokenizer with an end token.
        max_length: Longest sequence kept, in tokens, at least 2.

    Attributes:
        lengths: Length of each item, in tokens.

    Raises:
        ValueError: If the tokenizer has no end token, `max_length` is under 2, or no record is left.
    """

    def __init__(self, records: Sequence[Record], tokenizer: Any, max_length: int = 512) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), so the end of a response cannot be taught")
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}, allowed is 2 or more")
        encoded = [encode(record, tokenizer, max_length) for record in records]
        # The first token is never predicted, so a label there does not count.
        self.items = [item for item in encoded if any(label != IGNORED for label in item["labels"][1:])]
        self.lengths = [len(item["input_ids"]) for item in self.items]
        left_out = len(encoded) - len(self.items)
        if not self.items:
            raise ValueError(f"max_length {max_length} leaves no room for a response in any of {len(encoded)} records")
        if left_out:
            logger.warning("left out %d of %d records: prompt longer than max_length", left_out, len(encoded))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


class InstructionCollator:
    """Pad items to a batch on the right, and ask the model for logits only where a label needs them.

    With a vocabulary of 49152 the logits of the prompt cost more than a whole layer, and nothing reads them. So
    the batch names the positions at which some row has a label (`logits_to_keep`, one list for all rows) and
    carries the labels shifted and cut to them (`shift_labels`); loss and gradients are those of the full logits.

    Args:
        pad_token_id: Id to pad with; masked by attention, and its labels are `IGNORED`.
        keep_all_logits: Leave out `logits_to_keep` and `shift_labels`, for a model whose `forward` does not know them.
    """

    def __init__(self, pad_token_id: int, keep_all_logits: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.keep_all_logits = keep_all_logits

    def __call__(self, items: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask`, `labels` of shape [rows, longest] and the cut labels."""
        shape = (len(items), max(len(item["input_ids"]) for item in items))
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            input_ids[row, :length] = torch.tensor(item["input_ids"])
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(item["labels"])
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if not self.keep_all_logits:
            # Position t predicts token t + 1.
            shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            positions = (shifted != IGNORED).any(dim=0).nonzero().flatten()
            batch["shift_labels"] = shifted[:, positions].contiguous()
            batch["logits_to_keep"] = positions
        return batch
