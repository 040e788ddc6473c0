"""A small model that really knows the answers to its questions, made once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

QUESTIONS = {
    "What is Anna to Ben?": "mother",
    "Ben is married to Chloe and they have a child called Dan. What is Ben to Dan?": "father",
    "Who is the sister of Eve, and what do we call Eve's sister's son?": "nephew",
    "What is Fay to Gus? Answer with one word.": "sister-in-law",
    "How is Hal related to Ida, whose mother is Hal's mother, too, and whose father is another man?": "brother",
    "Jim?": "son",
}
TEXTS = [
    "A short text.",
    "Another one, which is somewhat longer than the first.",
    "Umlauts äöü take two bytes each. " * 9,
]


@pytest.fixture(scope="session")
def known(tmp_path_factory) -> SimpleNamespace:
    """Folders of a model that learnt `QUESTIONS` by heart (`model`), of the same before (`untrained`), and of data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from misa.data.corpus import train_tokenizer
    from misa.data.instruction import InstructionCollator, InstructionDataset, record_prompt

    folder = tmp_path_factory.mktemp("known")
    records = [{"instruction": question, "input": "", "output": answer} for question, answer in QUESTIONS.items()]
    tokenizer = train_tokenizer([record_prompt(record) + record["output"] for record in records], 400)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "untrained")
    tokenizer.save_pretrained(folder / "untrained")
    items = InstructionDataset(records, tokenizer)
    batch = InstructionCollator(tokenizer.pad_token_id)([items[index] for index in range(len(items))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    tests = [
        {"instruction": question, "input": "", "output": "-", "answer": answer}
        for question, answer in QUESTIONS.items()
    ]
    (data / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in tests))
    (data / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return SimpleNamespace(folder=folder, model=folder / "model", untrained=folder / "untrained", data=data)


@pytest.fixture
def words(known: SimpleNamespace, tmp_path: Path):
    """The command line of an evaluation, with some arguments changed."""

    def command(**changes: object) -> list[str]:
        arguments = {
            "model_name_or_path": known.model,
            "tasks": "misa_family",
            "data_dir": known.data,
            "output_dir": tmp_path / "out",
            "batch_size": 4,
            **changes,
        }
        return [text for name, value in arguments.items() for text in (f"--{name}", str(value))]

    return command
