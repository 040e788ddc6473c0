"""Pre-training text out of any folder: what is read, how it is split, and one document a sequence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from misa.data.packing import IGNORED
from misa.data.records import write_records
from misa.data.sources import find_instructions
from misa.data.text import (
    PaddedDataset,
    encode_padded,
    find_text,
    is_held_out,
    local_documents,
    packed,
    padded_item,
    tokenizer_for,
)

TEXTS = [f"Document {number} tells of the {number}th fox and its {number % 7} cubs." for number in range(200)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text files of all kinds, and files that are none."""
    import datasets

    root = tmp_path / "texts"
    (root / "sub" / ".hidden").mkdir(parents=True)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    (root / "sub" / ".hidden" / "x.txt").write_text("hidden")
    (root / "image.png").write_bytes(b"\x89PNG")
    (root / "a.txt").write_text(TEXTS[0] + "\n\nSecond part.")
    (root / "sub" / "b.md").write_text(TEXTS[1])
    write_records(root / "c.jsonl", ({"text": text} for text in TEXTS[2:80]))
    (root / "d.json").write_text(json.dumps([{"text": text} for text in TEXTS[80:100]]))
    datasets.Dataset.from_list([{"text": text} for text in TEXTS[100:]]).to_parquet(root / "e.parquet")
    return root


def test_every_kind_of_text_file_is_read(folder: Path) -> None:
    source = find_text(str(folder))
    assert [path.name for path in source.train] == ["a.txt", "c.jsonl", "d.json", "e.parquet", "b.md"]
    train, validation = local_documents(source, 0.1)
    assert len(train.texts) + len(validation.texts) == 200
    assert set(train.texts) | set(validation.texts) == {TEXTS[0] + "\n\nSecond part.", *TEXTS[1:]}
    assert not set(train.texts) & set(validation.texts)
    assert 8 <= len(validation.texts) <= 35
    assert find_text(str(folder / "c.jsonl")).train == (folder / "c.jsonl",)


def test_a_document_keeps_its_split_when_others_come(folder: Path) -> None:
    before = local_documents(find_text(str(folder)), 0.1)[1].texts
    (folder / "a0.txt").write_text("A new document.")
    after = local_documents(find_text(str(folder)), 0.1)[1].texts
    assert [text for text in after if text != "A new document."] == before
    assert sum(is_held_out(text, 0.1) for text in TEXTS) <= sum(is_held_out(text, 0.3) for text in TEXTS) < 100


def test_built_in_corpus_is_split_by_the_same_rule(tmp_path: Path) -> None:
    from misa.data.corpus import make_corpus
    from misa.data.records import read_records

    make_corpus(tmp_path, ["networkx"], vocab_size=400, validation_share=0.1)
    for split, expected in (("train", False), ("validation", True)):
        texts = [record["text"] for record in read_records(tmp_path / f"{split}.jsonl", ["text"])]
        assert {is_held_out(text, 0.1) for text in texts} == {expected}


def test_tokenizer_is_trained_once(folder: Path, tmp_path: Path) -> None:
    from misa.models import load_tokenizer

    train, _ = local_documents(find_text(str(folder)), 0.1)
    made = tokenizer_for(train, 320, tmp_path / "tokens")
    stamp = (made / "tokenizer.json").stat().st_mtime_ns
    assert len(load_tokenizer(made)) == 320
    assert tokenizer_for(train, 320, tmp_path / "tokens") == made
    assert (made / "tokenizer.json").stat().st_mtime_ns == stamp
    assert tokenizer_for(train, 330, tmp_path / "tokens") != made
    with pytest.raises(ValueError, match="vocab_size is 100, allowed is 300 or more"):
        tokenizer_for(train, 100, tmp_path)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_share_out_of_range_is_refused(folder: Path, share: float) -> None:
    with pytest.raises(ValueError, match=f"validation_share is {share}, allowed is a number between 0 and 0.5"):
        local_documents(find_text(str(folder)), share)


def test_a_share_too_small_to_hold_anything_out_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no document of 5 files is held out at validation_share 1e-09"):
        _ = local_documents(find_text(str(folder)), 1e-9)[1].texts


def test_folder_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has no train\.jsonl, .*nor any text \(\.txt, \.md, \.jsonl, "):
        find_text(str(tmp_path))
    for missing in (
        "./nowhere",
        "nowhere",
        "/a/b",
        "d/nofile.txt",
        "d/nofile.jsonl",
        "folder/nothing",
    ):
        with pytest.raises(ValueError, match="is neither a folder nor a file, nor a hub id"):
            find_text(missing)


def test_name_that_is_empty_is_refused() -> None:
    """It would be the folder that is worked in."""
    for find in (find_text, find_instructions):
        with pytest.raises(ValueError, match="dataset_path is empty"):
            find("")


def test_pieces_of_the_hub_are_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        for number in range(2):
            (tmp_path / "data" / f"{split}-0000{number}-of-00002.parquet").touch()
    source = find_text(str(tmp_path))
    for split, files in (("train", source.train), ("validation", source.validation)):
        assert [file.name for file in files] == [f"{split}-0000{number}-of-00002.parquet" for number in range(2)]


def test_c4_is_the_published_one() -> None:
    source = find_text("c4")
    assert (source.hub_id, source.config, source.tokenizer) == ("allenai/c4", "en", "google-t5/t5-base")
    assert find_text("allenai/c4", "realnewslike").config == "realnewslike"


def test_malformed_text_is_named(folder: Path) -> None:
    (folder / "c.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    train, _ = local_documents(find_text(str(folder)), 0.1)
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2: field 'text' is missing"):
        _ = train.texts
    assert "x" in local_documents(find_text(str(folder)), 1e-9, max_malformed=0.5)[0].texts
    (folder / "a.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text"):
        _ = local_documents(find_text(str(folder)), 0.1)[0].texts


def test_one_document_a_sequence_cut_and_padded(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["short", "a much longer text " * 20]
    dataset = PaddedDataset("x", lambda: texts, tokenizer, 16)
    for index, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:16]
        item = dataset[index]
        assert {name: tuple(value.shape) for name, value in item.items()} == {
            "input_ids": (16,),
            "attention_mask": (16,),
            "labels": (16,),
        }
        assert item["input_ids"].tolist() == [*ids, *[tokenizer.pad_token_id] * (16 - len(ids))]
        assert item["attention_mask"].tolist() == [1] * len(ids) + [0] * (16 - len(ids))
        # The end is learned, though padding has the same id.
        assert item["labels"].tolist() == [*ids, *[IGNORED] * (16 - len(ids))]
    assert dataset.num_tokens == sum(int(dataset[index]["attention_mask"].sum()) for index in range(2))


def test_a_tokenizer_s_own_end_is_not_doubled(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.eos_token,
    )
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    short, long = encode_padded(["short", "a much longer text " * 20], own, 16)
    assert short.count(tokenizer.eos_token_id) == long.count(tokenizer.eos_token_id) == 1
    assert len(long) == 16
    assert long[-1] == tokenizer.eos_token_id


def test_padded_bits_count_predicted_tokens_alone(tokenizer: Any) -> None:
    texts = ["The quick brown fox", "jumps over"]
    dataset = PaddedDataset("x", lambda: texts, tokenizer, 64)
    predicted = sum(int((dataset[index]["labels"][1:] != IGNORED).sum()) for index in range(2))
    bits = dataset.bits_per_byte(2.0)
    assert bits == pytest.approx(2.0 / math.log(2) * predicted / sum(len(text.encode()) for text in texts))


def test_padding_does_not_change_the_loss(tokenizer: Any) -> None:
    from misa.models import build_model, model_config

    model = build_model(model_config("2m", vocab_size=len(tokenizer)), seed=0)
    ids = [*tokenizer("The quick brown fox")["input_ids"], tokenizer.eos_token_id]
    losses = []
    for length in (len(ids), 40):
        item = padded_item(ids, length, tokenizer.pad_token_id)
        with torch.no_grad():
            losses.append(model(**{name: value[None] for name, value in item.items()}).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_packed_text_is_its_documents_with_ends_between(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    train, _ = local_documents(find_text(str(folder)), 0.1)
    blocks = packed(train, tokenizer, 32, tmp_path / "tokens")
    decoded = tokenizer.decode(blocks.input_ids.reshape(-1).tolist()).split(tokenizer.eos_token)
    assert decoded[:-1] == train.texts[: len(decoded) - 1]
    again, _ = local_documents(find_text(str(folder)), 0.1)
    assert (packed(again, tokenizer, 32, tmp_path / "tokens").input_ids == blocks.input_ids).all()
    # Kept tokens make reading needless.
    assert "texts" not in vars(again)
