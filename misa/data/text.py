"""Pre-training text: where it is, how it is split, and as sequences that are packed or padded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from misa.data.corpus import Blocks, cut_blocks, token_stream, train_tokenizer
from misa.data.packing import IGNORED
from misa.data.records import DOCUMENT_SUFFIXES, SUFFIXES, files_digest, find_split, read_records, surely_a_path
from misa.data.tokens import cached_tokens, tokenizer_digest
from misa.files import broken, new_cache_entry

# The pre-training set of the published runs, and the tokenizer they used with it.
C4 = ("allenai/c4", "en", "google-t5/t5-base")


@dataclass(frozen=True)
class TextSource:
    """Where pre-training text is.

    Attributes:
        name: Short name, for the result.
        train: Local training files, or none if the text comes from the hub.
        validation: Local validation files; without any, a share of the documents is held out.
        tokenizer: Folder or hub id of the tokenizer that belongs to the text, if there is one.
        hub_id: Repository on the hub, or None.
        config: Configuration there.
    """

    name: str
    train: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    tokenizer: str | None = None
    hub_id: str | None = None
    config: str | None = None


def find_text(dataset_path: str, config: str | None = None) -> TextSource:
    """Find pre-training text.

    Args:
        dataset_path: A corpus folder (`train.*`, maybe `validation.*` and `tokenizer/`), any folder of .txt, .md,
            .jsonl, .json or .parquet files (the last three with the field text), one such file, "c4", or a hub id.
            Parquet pieces as the hub keeps them (`data/train-00000-of-00001.parquet`) are read by split.
        config: Configuration of a data set of the hub.

    Raises:
        ValueError: If there is no text.
    """
    if not dataset_path:  # as of a variable that is not set; it would be the folder that is worked in
        raise ValueError("dataset_path is empty; it must name a file, a folder or a data set")
    path = Path(dataset_path)
    tokenizer = str(path / "tokenizer") if (path / "tokenizer").is_dir() else None
    if path.is_file():
        return TextSource(path.stem, (path,))
    if path.is_dir():
        train, validation = find_split(path, "train"), find_split(path, "validation")
        if train is not None:
            return TextSource(path.name, (train,), (validation,) if validation else (), tokenizer)
        # As the hub keeps them; other splits are no training text.
        pieces = tuple(sorted(path.glob("**/train-*.parquet")))
        if pieces and len({piece.parent for piece in pieces}) == 1:
            apart = tuple(sorted(pieces[0].parent.glob("validation-*.parquet")))
            return TextSource(path.resolve().name, pieces, apart, tokenizer)
        files = tuple(
            file
            for file in sorted(path.rglob("*"), key=lambda file: file.as_posix())
            if file.suffix in (*DOCUMENT_SUFFIXES, *SUFFIXES) and file.is_file() and _is_text(file.relative_to(path))
        )
        if not files:
            kinds = ", ".join((*DOCUMENT_SUFFIXES, *SUFFIXES))
            raise ValueError(f"{path} has no train.jsonl, train.json or train.parquet, nor any text ({kinds})")
        return TextSource(path.resolve().name, files, tokenizer=tokenizer)
    if dataset_path == "c4":
        return TextSource("c4", tokenizer=C4[2], hub_id=C4[0], config=config or C4[1])
    if surely_a_path(dataset_path):
        raise ValueError(f"data source {path} is neither a folder nor a file, nor a hub id (owner/name), nor c4")
    return TextSource(path.name, hub_id=dataset_path, config=config)


def _is_text(path: Path) -> bool:
    """Leave out hidden files, and the tokenizer, whose files are JSON."""
    return not any(part.startswith(".") or part == "tokenizer" for part in path.parts)


def is_held_out(text: str, share: float) -> bool:
    """Say whether a document belongs to the validation split, by its SHA-256 alone.

    Args:
        text: The document.
        share: Share of the documents held out.
    """
    # The last bytes, as `make_corpus` takes them.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[-8:]) < share * 2**64


@dataclass(frozen=True)
class Documents:
    """One split of local text, read when it is needed.

    Attributes:
        files: Its files.
        digest: Digest of files, split and what may be malformed.
        share: Share held out of the files, 0 if they are all of this split.
        held_out: Whether this is the part held out.
        max_malformed: Share of the records of one file that may be malformed.
    """

    files: tuple[Path, ...]
    digest: str = field(repr=False)
    share: float = 0.0
    held_out: bool = False
    max_malformed: float = 0.0

    @cached_property
    def texts(self) -> list[str]:
        """The documents in the order of files and lines.

        Raises:
            ValueError: If a file cannot be read, too many records are malformed, or nothing is left.
        """
        texts = [text for path in self.files for text in _read(path, self.max_malformed)]
        if self.share:
            texts = [text for text in texts if is_held_out(text, self.share) == self.held_out]
        if not texts:
            part = "held out" if self.held_out else "left to train on"
            raise ValueError(
                f"no document of {len(self.files)} files is {part} at validation_share {self.share}; give another "
                "share, or a file of validation text"
            )
        return texts


def local_documents(source: TextSource, share: float, max_malformed: float = 0.0) -> tuple[Documents, Documents]:
    """Return the training and validation documents of local files.

    Args:
        source: Where they are.
        share: Share of the documents held out, by hash, where there is no validation file; between 0 and 0.5.
        max_malformed: Share of the records of one file that may be malformed and is left out with a warning.

    Raises:
        ValueError: If the share is out of range.
    """
    # What is allowed belongs to the digest: kept tokens must not hide records that are now to be refused.
    digest = f"{files_digest(source.train)} {max_malformed}"
    if source.validation:
        apart = f"{files_digest(source.validation)} {max_malformed}"
        return (
            Documents(source.train, digest, max_malformed=max_malformed),
            Documents(source.validation, apart, max_malformed=max_malformed),
        )
    if not 0 < share < 0.5:
        raise ValueError(f"validation_share is {share}, allowed is a number between 0 and 0.5")
    splits = [
        Documents(source.train, f"{digest} {share} {held_out}", share, held_out, max_malformed)
        for held_out in (False, True)
    ]
    return splits[0], splits[1]


def _read(path: Path, max_malformed: float) -> list[str]:
    if path.suffix not in DOCUMENT_SUFFIXES:
        return [record["text"] for record in read_records(path, ("text",), max_malformed)]
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def tokenizer_for(documents: Documents, vocab_size: int, tokenized_dir: Path) -> Path:
    """Train a byte-level BPE on the training documents, or find the one trained before.

    Args:
        documents: The training split.
        vocab_size: Size of the vocabulary, 300 or more.
        tokenized_dir: Folder that keeps it.

    Returns:
        Its folder.

    Raises:
        ValueError: If the vocabulary is too small, or the folder cannot be written.
    """
    if vocab_size < 300:
        raise ValueError(f"vocab_size is {vocab_size}, allowed is 300 or more")
    name = hashlib.sha256(f"{documents.digest} {vocab_size}".encode()).hexdigest()[:32]
    folder = tokenized_dir / f"tokenizer-{name}"
    if broken(folder):
        tokenizer = train_tokenizer(documents.texts, vocab_size)
        try:
            with new_cache_entry(folder) as partial:
                tokenizer.save_pretrained(partial)
        except OSError as error:
            raise ValueError(
                f"tokenized_dir is {str(tokenized_dir)!r}, and must keep the tokenizer: {error}"
            ) from error
    return folder


def packed(
    documents: Documents, tokenizer: Any, max_length: int, cache: Path | None, max_tokens: int | None = None
) -> Blocks:
    """Cut a split into blocks of equal length: documents in order, an end token after each, the rest dropped.

    Args:
        documents: The split.
        tokenizer: A transformers tokenizer with an end token.
        max_length: Tokens in a block, at least 2.
        cache: Folder that keeps the tokens, or None.
        max_tokens: Use only so many tokens from the start; None for all.

    Raises:
        ValueError: If the text cannot be read or is shorter than one block.
    """
    tokens = token_stream(documents.digest, lambda: documents.texts, tokenizer, cache)
    return cut_blocks(tokens, tokenizer, max_length, max_tokens, ", ".join(map(str, documents.files[:3])))


def encode_padded(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Turn documents into one sequence each, cut off at `max_length`, as the published pre-training does.

    Special tokens are those the tokenizer adds by itself; the end token follows where there is room for it.

    Args:
        texts: The documents.
        tokenizer: A transformers tokenizer.
        max_length: Longest sequence, in tokens.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    end = tokenizer.eos_token_id
    return [
        ids if len(ids) == max_length or (ids and ids[-1] == end) or end is None else [*ids, end] for ids in encoded
    ]


def padded_item(ids: Sequence[int], max_length: int, pad_token_id: int) -> dict[str, Any]:
    """Return a training item: `input_ids`, `attention_mask` and `labels`, each of shape [max_length].

    Args:
        ids: The tokens, at most `max_length`.
        max_length: Length to pad to.
        pad_token_id: Id to pad with; its labels are ignored, those of an equal end token inside `ids` are not.
    """
    import torch

    missing = max_length - len(ids)
    return {
        "input_ids": torch.tensor([*ids, *[pad_token_id] * missing]),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
        "labels": torch.tensor([*ids, *[IGNORED] * missing]),
    }


class PaddedDataset:
    """Documents as training items, one each, of equal length.

    Args:
        digest: Names the documents by their content.
        read: Reads them; not called if their tokens are kept.
        tokenizer: A transformers tokenizer with a padding token.
        max_length: Length of an item, in tokens.
        tokenized_dir: Folder that keeps the tokens, or None.
        max_tokens: Use only documents from the start that together have so many tokens; None for all.

    Attributes:
        num_tokens: Tokens that are not padding.
        num_bytes: Length of their text, UTF-8 bytes.
    """

    def __init__(
        self,
        digest: str,
        read: Callable[[], Sequence[str]],
        tokenizer: Any,
        max_length: int,
        tokenized_dir: Path | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token, so documents cannot be padded")
        identity = tokenizer_digest(tokenizer)
        key = {"texts": digest, "tokenizer": identity, "max_length": max_length, "padding": "max_length"}

        def sequences() -> Iterator[dict[str, list[int]]]:
            texts = read()
            for start in range(0, len(texts), 1000):
                for ids in encode_padded(texts[start : start + 1000], tokenizer, max_length):
                    # A single token predicts nothing.
                    if len(ids) > 1:
                        yield {"input_ids": ids}

        rows = cached_tokens(tokenized_dir if identity else None, key, sequences)
        count, self.num_tokens = 0, 0
        lengths = [len(ids) for ids in rows["input_ids"]] if len(rows) else []
        for length in lengths:
            if max_tokens is not None and count and self.num_tokens + length > max_tokens:
                break
            count, self.num_tokens = count + 1, self.num_tokens + length
        if count == 0:
            raise ValueError("no document is longer than one token")
        self.rows = rows.select(range(count))
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return padded_item(self.rows[index]["input_ids"], self.max_length, self.tokenizer.pad_token_id)

    @cached_property
    def num_bytes(self) -> int:
        """Length of the text, UTF-8 bytes."""
        texts = self.tokenizer.batch_decode(list(self.rows["input_ids"]), skip_special_tokens=True)
        return sum(len(text.encode()) for text in texts)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a mean loss, nats a predicted token, into bits for each byte of text.

        The first token of a document is given and not predicted.

        Args:
            loss: Mean cross entropy.
        """
        return loss / math.log(2) * (self.num_tokens - len(self)) / self.num_bytes
