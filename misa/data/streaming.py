"""Pre-training text that is read while training: from the hub, or from files too large to be read first.

Documents are mixed chunk by chunk: so many of them are read, and put in an order drawn from seed, epoch and number of
the chunk. Unlike a buffer that is refilled one by one, a chunk has a beginning, where reading can be taken up again:
the position of a run is a place in the stream, and going on does not read everything before it again.
"""

from __future__ import annotations

import copy
import glob
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from misa.data.hub import load_hub
from misa.data.records import DOCUMENT_SUFFIXES, NUM_NAMED, StreamError, require_share, require_text
from misa.data.text import TextSource, encode_padded, is_held_out, padded_item
from misa.models import first_line

logger = logging.getLogger(__name__)

# Places in the stream that are remembered: more than there are batches fetched ahead.
NUM_PLACES = 256


def open_streams(source: TextSource, share: float) -> tuple[Any, Any, float]:
    """Open the training and validation documents of a source as streams.

    Args:
        source: Local files, all of one kind, or a data set of the hub.
        share: Share of the documents to hold out, by hash, where there is no validation split.

    Returns:
        Training stream, validation stream, and the share to leave out of the first and to take from the second (0 if
        they are splits of their own). Streams are `datasets.IterableDataset` with the field text.

    Raises:
        ValueError: If the hub cannot give the text, files are of several kinds or cannot be read, or the first document
            has no text.
    """
    if source.hub_id is not None:
        splits = load_hub(source.hub_id, source.config, streaming=True)
        if "train" not in splits:
            raise ValueError(f"{source.hub_id} has no split train; it has {', '.join(splits)}")
        train, validation = splits["train"], splits.get("validation")
    else:
        train = _open_files(source.train)
        validation = _open_files(source.validation) if source.validation else None
    if validation is None and not 0 < share < 0.5:
        raise ValueError(f"validation_share is {share}, allowed is a number between 0 and 0.5")
    first: dict[str, Any] = next(_readable(train, source.name), {})
    _Sieve(0.0, source.name).text(first.get("text"), 1)
    return train, train if validation is None else validation, share if validation is None else 0.0


def _open_files(files: Sequence[Any]) -> Any:
    import datasets

    suffixes = {path.suffix for path in files}
    if len(suffixes) > 1:
        raise ValueError(f"streaming reads files of one kind, found {', '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    names = [glob.escape(str(path)) for path in files]  # they are taken for patterns
    kind, options = "parquet" if suffix == ".parquet" else "json", {}
    if suffix in DOCUMENT_SUFFIXES:
        kind, options = "text", {"sample_by": "document"}
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)
    except Exception as error:
        raise _unreadable(", ".join(map(str, files)), error) from error


def _readable(documents: Iterable[Any], where: str) -> Iterator[Any]:
    """Pass documents or batches on; what goes wrong in reading them becomes a `StreamError`."""
    try:
        yield from documents
    except Exception as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> StreamError:
    # What a reader of `datasets` raises depends on the kind of file; of an empty one it is this.
    reason = "it is empty" if isinstance(error, StopIteration) else first_line(error)
    return StreamError(f"{where} cannot be read: {reason}")


class _Sieve:
    """Leaves out documents without text as long as they are few.

    Args:
        max_malformed: Largest share of them, 0 to below 1.
        source: Name of the stream in messages.
        count: Documents that were read before.
    """

    def __init__(self, max_malformed: float, source: str, count: int = 0) -> None:
        self.max_malformed = max_malformed
        self.source = source
        self.count = count
        self.num_faults = 0
        self.named: list[str] = []

    def text(self, value: Any, number: int) -> str | None:
        """Return the text of the document with a number, or None if it is left out; raise if none may be."""
        self.count += 1
        try:
            require_text({"text": value}, ("text",))
        except ValueError as error:
            fault = f"{self.source}, document {number}: {error}"
            if not self.max_malformed:
                raise StreamError(fault) from None
            if not self.num_faults:
                logger.warning("%s; left out, as are others like it", fault)
            self.num_faults += 1
            self.named = [*self.named, fault][:NUM_NAMED]
            return None
        return str(value)

    def judge(self) -> None:
        """Raise if too many of the documents so far were left out."""
        if self.num_faults > self.max_malformed * self.count:
            raise StreamError(
                f"{'; '.join(self.named)} ({self.num_faults} of {self.count} documents malformed, "
                f"max_malformed allows a share of {self.max_malformed:g})"
            )


def first_texts(documents: Any, tokenizer: Any, max_tokens: int, share: float, max_malformed: float = 0.0) -> list[str]:
    """Return documents from the start of a stream that together have at least so many tokens.

    Args:
        documents: The stream.
        tokenizer: Counts the tokens.
        max_tokens: Tokens wanted.
        share: Take only documents that belong to this share, by hash; 0 takes all.
        max_malformed: Share of the documents read that may be malformed and is left out with a warning.

    Raises:
        ValueError: If the stream has no such document, cannot be read, or too many documents are malformed.
    """
    texts, count, sieve = [], 0, _Sieve(max_malformed, "validation text")
    for number, record in enumerate(_readable(documents, "validation text"), start=1):
        text = sieve.text(record.get("text"), number)
        if text is None or (share and not is_held_out(text, share)):
            continue
        texts.append(text)
        count += len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        if count >= max_tokens:
            break
    sieve.judge()
    if not texts:
        raise ValueError(f"the stream holds no document to evaluate on (validation_share {share})")
    return texts


class StreamedText(torch.utils.data.IterableDataset[dict[str, Any]]):
    """An endless stream of training items, the same for every method and number of workers.

    Of several worker processes the first does all the work: each could only read everything and drop most of it.

    Args:
        documents: A `datasets.IterableDataset` with the field text.
        tokenizer: A transformers tokenizer with an end token.
        max_length: Tokens in an item.
        padding: "none": documents follow one another, an end token after each, and are cut into full items;
            "max_length": one document an item, cut off and padded.
        seed: Seed of the order.
        buffer: Documents in a chunk that are mixed together, at least 1.
        share: Leave out this share of the documents, by hash; 0 leaves out none.
        max_malformed: Share of the documents read so far that may be malformed, 0 to below 1; they are left out with
            one warning. A file that is not of its kind, such as a line that is no JSON, is refused all the same.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any,
        max_length: int,
        padding: str = "none",
        seed: int = 0,
        buffer: int = 1000,
        share: float = 0.0,
        max_malformed: float = 0.0,
    ) -> None:
        if buffer < 1:
            raise ValueError(f"shuffle_buffer is {buffer}, allowed is 1 or more")
        require_share(max_malformed)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token) to put between documents")
        self.documents = documents
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.padding = padding
        self.seed = seed
        self.buffer = buffer
        self.share = share
        self.max_malformed = max_malformed
        self._start = self._place(None, epoch=0, chunk=0, number=0, carry=[])
        self._places: deque[dict[str, Any]] = deque([self._start], maxlen=NUM_PLACES)
        self._skip = 0

    def position(self, num_items: int) -> dict[str, Any]:
        """Return where the stream stands after so many items, in types that JSON keeps.

        In the process that reads, it names the chunk the last item came from; elsewhere, where reading began.

        Args:
            num_items: Items taken from the beginning of the whole run.
        """
        place = max(
            (place for place in (self._start, *self._places) if place["number"] <= num_items),
            key=lambda place: place["number"],
        )
        return {**place, "skip": num_items - place["number"]}

    def resume(self, position: dict[str, Any]) -> None:
        """Let the next iteration begin at a place.

        Args:
            position: What `position` gave.
        """
        self._skip = position["skip"]
        self._start = {name: value for name, value in position.items() if name != "skip"}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id > 0:
            return iter(())
        return itertools.islice(self._items(), self._skip, None)

    def _items(self) -> Iterator[dict[str, Any]]:
        place = self._start
        self._places.clear()
        number, epoch, chunk, carry = place["number"], place["epoch"], place["chunk"], list(place["carry"])
        stands = place["documents"]
        sieve = _Sieve(self.max_malformed, "streamed text", count=chunk * self.buffer)
        while True:
            # A new object: one that has been read keeps its place.
            reader = self.documents.select_columns(["text"])
            if stands is not None:
                reader.load_state_dict(copy.deepcopy(stands))
            whole, before = chunk == 0, (number, len(carry))
            # Unlike plain iteration, `iter` does not deal the files out to worker processes.
            for batch in _readable(reader.iter(self.buffer), "streamed text"):
                self._places.append(self._place(stands, epoch, chunk, number, list(carry)))
                # The reader stands behind this chunk, so this is where the next one begins.
                stands = copy.deepcopy(reader.state_dict())
                first = chunk * self.buffer + 1
                read = [sieve.text(value, index) for index, value in enumerate(batch["text"], start=first)]
                sieve.judge()
                texts = [text for text in read if text is not None]
                for item in self._chunk_items(texts, epoch, chunk, carry):
                    number += 1
                    yield item
                chunk += 1
            if whole and before == (number, len(carry)):
                raise StreamError("the stream holds no document to train on")
            epoch, chunk, stands = epoch + 1, 0, None

    def _chunk_items(self, texts: list[str], epoch: int, chunk: int, carry: list[int]) -> Iterator[dict[str, Any]]:
        """Yield the items of one chunk; `carry` holds the tokens of an unfinished item before and after."""
        # Mixed by hand, since neighbouring numbers must not share an order.
        seed = (self.seed * 1_000_003 + epoch * 7_919 + chunk * 104_729 + 17) % 2**63
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        mixed = [texts[index] for index in order]
        if self.share:
            mixed = [text for text in mixed if not is_held_out(text, self.share)]
        if not mixed:
            return
        if self.padding == "max_length":
            for ids in encode_padded(mixed, self.tokenizer, self.max_length):
                if len(ids) > 1:
                    yield padded_item(ids, self.max_length, self.tokenizer.pad_token_id)
            return
        for ids in self.tokenizer(mixed, add_special_tokens=False)["input_ids"]:
            carry += [*ids, self.tokenizer.eos_token_id]
            while len(carry) >= self.max_length:
                block = torch.tensor(carry[: self.max_length])
                del carry[: self.max_length]
                yield {"input_ids": block, "labels": block}

    @staticmethod
    def _place(
        documents: dict[str, Any] | None, epoch: int, chunk: int, number: int, carry: list[int]
    ) -> dict[str, Any]:
        return {"documents": documents, "epoch": epoch, "chunk": chunk, "number": number, "carry": carry}
