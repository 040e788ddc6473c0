"""Training and evaluation items of a pre-training run, out of text that is read or streamed, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from misa.data.corpus import BlockDataset, cut_blocks, token_stream
from misa.data.streaming import StreamedText, first_texts, open_streams
from misa.data.text import Documents, PaddedDataset, TextSource, local_documents, packed, tokenizer_for


@dataclass(frozen=True)
class PretrainingText:
    """The text of a run.

    Attributes:
        source: Where it is.
        streamed: Whether it is read while training.
        padding: "none" for packed sequences, "max_length" for one document a sequence, cut off and padded.
        max_length: Tokens in a sequence.
        max_eval_tokens: Tokens of the validation text to evaluate on.
        validation_share: Share of the documents held out where there is no validation split.
        max_malformed: Share of the records of a file, or of a stream so far, that may be malformed and is left out.
        seed: Seed of a stream's order.
        shuffle_buffer: Documents of a stream that are mixed together.
        tokenized_dir: Folder that keeps tokens.
    """

    source: TextSource
    streamed: bool
    padding: str
    max_length: int
    max_eval_tokens: int
    validation_share: float
    max_malformed: float
    seed: int
    shuffle_buffer: int
    tokenized_dir: Path

    @cached_property
    def _local(self) -> tuple[Documents, Documents]:
        return local_documents(self.source, self.validation_share, self.max_malformed)

    def train_tokenizer(self, vocab_size: int) -> Path:
        """Train a tokenizer on the training text and return its folder.

        Args:
            vocab_size: Size of the vocabulary.

        Raises:
            ValueError: If the text is streamed.
        """
        if self.streamed:
            raise ValueError(f"{self.source.name} is streamed, so tokenizer_name_or_path must name a tokenizer")
        return tokenizer_for(self._local[0], vocab_size, self.tokenized_dir)

    def datasets(self, tokenizer: Any) -> tuple[Any, Any, Any]:
        """Return training items, evaluation items, and the text of the latter.

        The text has `num_tokens` and turns a loss into bits with `bits_per_byte`.

        Args:
            tokenizer: A transformers tokenizer.

        Raises:
            ValueError: If the text cannot be read, or there is too little.
        """
        return self._streamed(tokenizer) if self.streamed else self._read(tokenizer)

    def _read(self, tokenizer: Any) -> tuple[Any, Any, Any]:
        train, validation = self._local
        if self.padding == "max_length":
            items = self._padded(train.digest, train, tokenizer, None)
            held_out = self._padded(validation.digest, validation, tokenizer, self.max_eval_tokens)
            return items, held_out, held_out
        blocks = packed(train, tokenizer, self.max_length, self.tokenized_dir)
        apart = packed(validation, tokenizer, self.max_length, self.tokenized_dir, self.max_eval_tokens)
        return BlockDataset(blocks), BlockDataset(apart), apart

    def _padded(self, digest: str, documents: Documents, tokenizer: Any, max_tokens: int | None) -> PaddedDataset:
        return PaddedDataset(
            digest, lambda: documents.texts, tokenizer, self.max_length, self.tokenized_dir, max_tokens
        )

    def _streamed(self, tokenizer: Any) -> tuple[Any, Any, Any]:
        documents, apart, share = open_streams(self.source, self.validation_share)
        texts: Sequence[str] = first_texts(apart, tokenizer, self.max_eval_tokens, share, self.max_malformed)
        stream = StreamedText(
            documents,
            tokenizer,
            self.max_length,
            self.padding,
            self.seed,
            self.shuffle_buffer,
            share,
            self.max_malformed,
        )
        if self.padding == "max_length":
            held_out = PaddedDataset("", lambda: texts, tokenizer, self.max_length, None, self.max_eval_tokens)
            return stream, held_out, held_out
        tokens = token_stream("", lambda: texts, tokenizer, None)
        blocks = cut_blocks(tokens, tokenizer, self.max_length, self.max_eval_tokens, "the validation text")
        return stream, BlockDataset(blocks), blocks
