"""Tokens kept on disk under a digest of all they depend on, so that a second start does not tokenize."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from misa.files import broken, new_cache_entry, write_text

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000


def default_folder() -> Path:
    """Return the folder for tokens where none is given: `misa` in the cache of Hugging Face datasets."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "misa"


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return a digest of a tokenizer's content, or None for a slow one, which cannot be named by its content.

    Args:
        tokenizer: A transformers tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # Truncation and padding are settings of the last call, not of the vocabulary.
    content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def cached_tokens(
    folder: str | Path | None, key: dict[str, Any], make: Callable[[], Iterator[dict[str, list[int]]]]
) -> Any:
    """Return token sequences as an Arrow table on disk, tokenizing only if no one has before.

    Two processes may make the same entry at once: each writes its own copy, and the first to finish gives it its name.
    A damaged entry is made anew. A folder that cannot be written is no error.

    Args:
        folder: Where entries lie; None keeps the table in memory and nothing on disk.
        key: All that the tokens depend on, in types that JSON knows.
        make: Makes the sequences, dictionaries of lists of equal length.

    Returns:
        A `datasets.Dataset` with one row a sequence.
    """
    if folder is None:
        return _table(make())
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    entry = Path(folder) / name
    if (found := _load(entry)) is not None:
        return found
    made = _table(make())
    try:
        with new_cache_entry(entry) as partial:
            _save(made, partial)
            write_text(partial / "key.json", json.dumps(key, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        logger.info("tokens are not kept: %s", error)
    return made


def _table(sequences: Iterator[dict[str, list[int]]]) -> Any:
    import datasets

    parts = []
    # Python's integers take eight times the room, so they are not gathered all at once.
    while rows := list(itertools.islice(sequences, _ROWS_AT_ONCE)):
        features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in rows[0]})
        parts.append(datasets.Dataset.from_list(rows, features=features))
    return datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_dict({})


def _save(table: Any, folder: Path) -> None:
    """Write a table without a progress bar, which would break up the log."""
    from datasets.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        table.save_to_disk(folder)
    finally:
        if shown:
            bars.enable_progress_bar()


def _load(entry: Path) -> Any:
    import datasets

    if not entry.is_dir():
        return None
    if (problem := broken(entry)) is None:
        return datasets.load_from_disk(str(entry))
    logger.warning("%s is damaged; tokenizing again (%s)", entry, problem)
    return None
