"""Pre-training text: a corpus with its own tokenizer, and equal blocks of tokens cut from it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from misa.data.records import already_made, read_records, require_split, write_digest, write_records
from misa.files import fingerprint, new_folder, sha256_file, write_text

logger = logging.getLogger(__name__)

DEFAULT_PACKAGES = ("numpy", "scipy", "pandas", "sklearn", "sympy", "networkx", "matplotlib")
DEFAULT_VOCAB_SIZE = 8192
DEFAULT_VALIDATION_SHARE = 0.02

END_TOKEN = "<|endoftext|>"
CACHE_FOLDER = ".tokens"


def make_corpus(
    output_dir: str | Path,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    validation_share: float = DEFAULT_VALIDATION_SHARE,
) -> bool:
    """Write the docstrings of installed packages as a corpus, with a tokenizer trained on its training part.

    Documents are at least 80 characters long and distinct. A document's hash alone decides its split and its place, so
    the corpus is the same wherever the same versions are installed. Written are `train.jsonl` and `validation.jsonl`
    (field text), `tokenizer/` (a byte-level BPE that transformers loads) and `digest.json` (counts, versions and
    licences).

    Args:
        output_dir: Folder to write.
        packages: Names the packages are imported by.
        vocab_size: Size of the vocabulary, 300 or more (256 bytes, the end token, and merges).
        validation_share: Share of the documents that is held out, between 0 and 0.5.

    Returns:
        True if the corpus was made, False if the same corpus was already there.

    Raises:
        ValueError: If a package is not installed, a number is out of range, or the folder holds other data.
    """
    from misa.data.docstrings import docstrings, package_files, package_origin

    if not packages:
        raise ValueError("packages is empty; name at least one installed package")
    if vocab_size < 300:
        raise ValueError(f"vocab_size is {vocab_size}, allowed is 300 or more")
    if not 0 < validation_share < 0.5:
        raise ValueError(f"validation_share is {validation_share}, allowed is a number between 0 and 0.5")
    for package in packages:
        package_files(package)
    origins = {package: package_origin(package) for package in packages}
    settings = {
        "packages": {package: origin["version"] for package, origin in origins.items()},
        "vocab_size": vocab_size,
        "validation_share": validation_share,
    }
    if already_made(output_dir, "corpus", settings):
        return False
    with new_folder(output_dir, last="digest.json") as folder:
        texts = docstrings(list(packages), os.cpu_count() or 1)
        distinct = {hashlib.sha256(text.encode()).digest(): text for text in texts}
        train, validation = [], []
        for digest in sorted(distinct):
            # The last bytes choose the split, because the first ones have already chosen the order.
            held_out = int.from_bytes(digest[-8:]) < validation_share * 2**64
            (validation if held_out else train).append(distinct[digest])
        if not train or not validation:
            raise ValueError(
                f"packages {', '.join(packages)} have only {len(distinct)} documents, too few for two splits"
            )
        write_records(folder / "train.jsonl", ({"text": text} for text in train))
        write_records(folder / "validation.jsonl", ({"text": text} for text in validation))
        train_tokenizer(train, vocab_size).save_pretrained(folder / "tokenizer")
        write_digest(
            folder,
            "corpus",
            settings,
            ("train.jsonl", "validation.jsonl", "tokenizer/tokenizer.json"),
            num_documents={"train": len(train), "validation": len(validation)},
            num_bytes={"train": _num_bytes(train), "validation": _num_bytes(validation)},
            origins=origins,
        )
    return True


def train_tokenizer(texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> Any:
    """Train a byte-level BPE tokenizer, whose end token also pads and begins.

    Args:
        texts: The text to learn merges from.
        vocab_size: Size of the vocabulary with the 256 bytes and the end token.

    Returns:
        A `transformers.PreTrainedTokenizerFast`. It adds no special token by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        # Text is cleaned of nothing: decoding gives back the bytes that were encoded.
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Blocks:
    """Equal pieces of one stream of tokens.

    Attributes:
        input_ids: Token ids, shape [number of blocks, tokens a block], int32.
        num_bytes: Length of the text in the blocks, UTF-8 bytes.
    """

    input_ids: np.ndarray
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all blocks."""
        return int(self.input_ids.size)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a mean loss into bits for each byte of text, which does not depend on the tokenizer.

        Args:
            loss: Mean cross entropy of these blocks, nats a token.
        """
        return loss / math.log(2) * self.num_tokens / self.num_bytes


def load_blocks(
    source: str | Path, split: str, tokenizer: Any, max_length: int, max_tokens: int | None = None
) -> Blocks:
    """Cut a corpus into blocks of equal length: documents in file order, an end token after each, the rest dropped.

    The tokens are kept in a file inside the corpus folder, named by a digest of text and tokenizer, and read from
    there the next time. A folder that cannot be written is no error.

    Args:
        source: Corpus folder with `<split>.jsonl`, field text.
        split: "train" or "validation".
        tokenizer: A transformers tokenizer with an end token.
        max_length: Tokens in one block, at least 2.
        max_tokens: Use only so many tokens from the start; None for all.

    Raises:
        ValueError: If the source lacks the split, a record is malformed, or there is less text than one block.
    """
    path = require_split(source, split)

    def read() -> list[str]:
        return [record["text"] for record in read_records(path, ("text",))]

    tokens = token_stream(sha256_file(path), read, tokenizer, path.parent / CACHE_FOLDER)
    return cut_blocks(tokens, tokenizer, max_length, max_tokens, str(path))


def cut_blocks(
    tokens: np.ndarray, tokenizer: Any, max_length: int, max_tokens: int | None = None, source: str = "the text"
) -> Blocks:
    """Cut a stream of tokens into blocks of equal length; the rest is dropped.

    Args:
        tokens: Token ids, one dimension.
        tokenizer: The tokenizer they come from, to tell how long their text is.
        max_length: Tokens in one block, at least 2.
        max_tokens: Use only so many tokens from the start; None for all.
        source: Name of the text in messages.

    Raises:
        ValueError: If `max_length` is under 2 or there are fewer tokens than one block.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, allowed is 2 or more")
    if max_tokens is not None:
        tokens = tokens[:max_tokens]
    count = len(tokens) // max_length
    if count == 0:
        raise ValueError(f"{source} has {len(tokens)} tokens, fewer than one block of max_length {max_length}")
    kept = np.asarray(tokens[: count * max_length], dtype=np.int32)
    text = tokenizer.decode(kept.tolist(), skip_special_tokens=True)
    return Blocks(kept.reshape(count, max_length), len(text.encode()))


class BlockDataset:
    """Blocks as training items: a dictionary with `input_ids` and `labels`, both of shape [tokens a block].

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        ids = torch.from_numpy(self.blocks.input_ids[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def token_stream(digest: str, read: Callable[[], Sequence[str]], tokenizer: Any, cache: Path | None) -> np.ndarray:
    """Return all tokens of some documents, an end token after each, from the cache if they are there.

    Args:
        digest: Names the documents by their content.
        read: Reads them; not called if the tokens are there.
        tokenizer: A transformers tokenizer with an end token.
        cache: Folder that keeps the tokens; None, or one that cannot be written, keeps nothing.

    Raises:
        ValueError: If the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token) to put between documents")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Only a fast tokenizer can be named by its content.
    kept = None
    if backend is not None and cache is not None:
        name = hashlib.sha256(f"{digest} {backend.to_str()} {tokenizer.eos_token_id}".encode()).hexdigest()
        kept = cache / f"{name[:32]}.npy"
        if kept.is_file():
            if _is_as_written(kept):
                return np.load(kept, mmap_mode="r")
            logger.warning("%s is damaged; tokenizing again", kept)
    tokens = np.fromiter(_token_ids(read(), tokenizer), dtype=np.int32)
    if kept is not None:
        partial = kept.with_name(f"{kept.stem}.{os.getpid()}.partial.npy")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(partial, tokens)
            partial.replace(kept)
            write_text(_written_beside(kept), json.dumps(fingerprint(kept)) + "\n")
        except OSError as error:
            logger.info("tokens are not kept: %s", error)
    return tokens


def _written_beside(tokens: Path) -> Path:
    return tokens.with_suffix(".json")


def _is_as_written(tokens: Path) -> bool:
    try:
        return json.loads(_written_beside(tokens).read_text(encoding="utf-8")) == fingerprint(tokens)
    except (OSError, ValueError):
        return False


def _token_ids(texts: Iterable[str], tokenizer: Any, group: int = 1000) -> Iterator[int]:
    texts = list(texts)
    for start in range(0, len(texts), group):
        for ids in tokenizer(texts[start : start + group], add_special_tokens=False)["input_ids"]:
            yield from ids
            yield tokenizer.eos_token_id


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)
