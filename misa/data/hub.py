"""Data sets of the hub, and a clear word at once where the hub cannot be reached."""

from __future__ import annotations

import hashlib
import json
from typing import Any

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

    Args:
        hub_id: Repository.
        config: Configuration of the data set.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        revision = HfApi().dataset_info(hub_id, timeout=TIMEOUT_S).sha
    # Without a hub, what an earlier run has downloaded may still be there.
    except (HfHubHTTPError, httpx.HTTPError, OSError):
        revision = None
    return hashlib.sha256(json.dumps([hub_id, config, revision]).encode()).hexdigest()


def _require_hub(hub_id: str) -> None:
    """Ask once, with a short limit: the library's own retries would take minutes to learn that there is no network."""
    import httpx
    from huggingface_hub import constants

    httpx.head(f"{constants.ENDPOINT}/datasets/{hub_id}", timeout=TIMEOUT_S, follow_redirects=True)
