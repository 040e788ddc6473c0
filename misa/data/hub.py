"""Data sets of the hub, and a clear word at once where the hub cannot be reached."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from misa.data.tokens import default_folder
from misa.files import write_text

TIMEOUT_S = 5


def load_hub(hub_id: str, config: str | None = None, streaming: bool = False) -> Any:
    """Load a data set of the hub, all of its splits.

    With HF_HUB_OFFLINE=1 only what an earlier run has downloaded is found. Code of a data set is never run.

    Args:
        hub_id: Repository, "owner/name".
        config: Configuration of the data set; None for its default.
        streaming: Read while training instead of downloading first.

    Returns:
        `datasets.DatasetDict`, or `datasets.IterableDatasetDict` if streamed.

    Raises:
        ValueError: If it cannot be had; the message names the repository and the way without a hub.
    """
    import datasets
    from huggingface_hub import constants

    try:
        if not constants.is_offline_mode():
            _require_hub(hub_id)
        return datasets.load_dataset(hub_id, config, streaming=streaming)
    # Loading fails in many ways: no network, no such repository, no access, a loading script, a damaged file.
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        offline = " (HF_HUB_OFFLINE=1)" if constants.is_offline_mode() else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the hub does not give {hub_id}{offline}: {reason}; give a local file or folder instead"
        ) from error


def hub_digest(hub_id: str, config: str | None) -> str:
    """Return a digest that names a data set of the hub at its present revision.

    A revision is remembered beside the tokens, and taken from there when the hub does not answer: what an earlier run
    has downloaded is of that revision, and a run that goes on without a network is still the same one.

    Args:
        hub_id: Repository.
        config: Configuration of the data set.
    """
    from huggingface_hub import HfApi

    # That of its HTTP library, which is not the same one in all versions.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    remembered = default_folder() / "revisions" / hashlib.sha256(hub_id.encode()).hexdigest()[:32]
    try:
        revision = HfApi().dataset_info(hub_id, timeout=TIMEOUT_S).sha
    except (HTTPError, OSError):
        revision = remembered.read_text(encoding="utf-8") if remembered.is_file() else None
    else:
        # A cache that cannot be written is no error.
        with contextlib.suppress(OSError):
            write_text(remembered, str(revision))
    return hashlib.sha256(json.dumps([hub_id, config, revision]).encode()).hexdigest()


def _require_hub(hub_id: str) -> None:
    """Ask once, with a short limit: the library's own retries would take minutes to learn that there is no network."""
    from huggingface_hub import constants, get_session

    get_session().head(f"{constants.ENDPOINT}/datasets/{hub_id}", timeout=TIMEOUT_S, follow_redirects=True)
