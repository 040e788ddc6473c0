"""Packed and padded sequences: the loss and gradients of the records one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from misa.data.instruction import IGNORED, InstructionCollator, InstructionDataset, encode
from misa.data.packing import NUM_OPEN, pack, require_apart

RECORDS = [
    {"instruction": f"Write the word {word} {count} times.", "input": "", "output": f"{word} " * count}
    for count, word in enumerate(("red", "green", "blue", "old", "new"), start=1)
]


@pytest.fixture(params=["eager", "sdpa"])
def model(tokenizer: Any, request: pytest.FixtureRequest) -> Any:
    from transformers import LlamaConfig

    from misa.models import build_model

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=request.param,
    )
    return build_model(config, seed=0)


def loss_and_gradients(model: Any, batches: list[Any], num_labels: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(num_labels)).loss
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_packed_records_do_not_see_each_other(model: Any, tokenizer: Any, train_on_inputs: bool) -> None:
    alone = InstructionDataset(RECORDS, tokenizer, 512, train_on_inputs=train_on_inputs)
    together = InstructionDataset(RECORDS, tokenizer, 512, train_on_inputs=train_on_inputs, packing=True)
    assert len(together) < len(alone)
    collate = InstructionCollator(tokenizer.pad_token_id)
    num_labels = sum(label != IGNORED for item in alone.items for label in item["labels"][1:])
    expected = loss_and_gradients(model, [collate([item]) for item in alone.items], num_labels)
    batch = collate([together[index] for index in range(len(together))])
    assert "attention_mask" not in batch
    loss, gradients = loss_and_gradients(model, [batch], num_labels)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)
    # The borders carry this: without positions the records would see each other.
    del batch["position_ids"]
    assert loss_and_gradients(model, [batch], num_labels)[0] != pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_that_keeps_records_apart_may_pack(model: Any, dtype: str) -> None:
    model.to(getattr(torch, dtype)).train()
    require_apart(model)
    assert model.training


@pytest.mark.parametrize("name", ["opt", "bloom", "mpt", "falcon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_that_does_not_keep_records_apart_may_not_pack(name: str, dtype: str) -> None:
    """Models with masks of their own, some with positions of their own."""
    from transformers import AutoConfig

    from misa.models import build_model

    sizes = {
        "opt": {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 2, "init_std": 0.3},
        "bloom": {"hidden_size": 32, "n_head": 2, "initializer_range": 0.3},
        "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "initializer_range": 0.3},
        "falcon": {"hidden_size": 32, "num_attention_heads": 2, "alibi": True, "initializer_range": 0.3},
    }
    layers = {} if name == "mpt" else {"num_hidden_layers": 2}
    model = build_model(AutoConfig.for_model(name, vocab_size=64, **layers, **sizes[name]), seed=0, dtype=dtype)
    with pytest.raises(ValueError, match=f"packing is True, but a model of type {name} does not keep packed records"):
        require_apart(model)


def test_padding_to_max_length_changes_no_loss(model: Any, tokenizer: Any) -> None:
    items = [encode(record, tokenizer, 256) for record in RECORDS]
    packed = list(pack(items, 512))
    for rows in (items, [{name: row[name] for name in ("input_ids", "labels", "position_ids")} for row in packed]):
        longest = InstructionCollator(tokenizer.pad_token_id)(rows)
        full = InstructionCollator(tokenizer.pad_token_id, pad_to=512)(rows)
        assert full["input_ids"].shape == (len(rows), 512)
        assert longest["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)
        with torch.no_grad():
            torch.testing.assert_close(model(**full).loss, model(**longest).loss, rtol=1e-5, atol=0)


def test_packing_keeps_every_item_whole() -> None:
    rng = random.Random(0)
    items = []
    for number in range(500):
        ids = [number] * rng.randint(2, 100)
        items.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    sequences = list(pack(items, 128))
    seen: list[int] = []
    for sequence in sequences:
        assert len(sequence["input_ids"]) == len(sequence["labels"]) == len(sequence["position_ids"]) <= 128
        starts = [index for index, position in enumerate(sequence["position_ids"]) if position == 0]
        assert sequence["num_records"] == [len(starts)]
        for start, end in zip(starts, [*starts[1:], len(sequence["input_ids"])], strict=True):
            (number,) = set(sequence["input_ids"][start:end])
            assert end - start == len(items[number]["input_ids"])
            assert sequence["labels"][start] == IGNORED
            assert sequence["position_ids"][start:end] == list(range(end - start))
            seen.append(number)
    assert sorted(seen) == list(range(500))
    tokens = sum(len(item["input_ids"]) for item in items)
    # Nearly full, but for those still open at the end.
    assert len(sequences) <= 1.1 * tokens / 128 + NUM_OPEN / 4
    assert list(pack(items, 128)) == sequences


def test_training_on_inputs_gives_every_token_a_label(tokenizer: Any) -> None:
    for record in RECORDS:
        item = encode(record, tokenizer, 512, train_on_inputs=True)
        assert item["labels"] == item["input_ids"]
        assert encode(record, tokenizer, 512)["input_ids"] == item["input_ids"]
