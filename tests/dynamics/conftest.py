"""What the laboratories measure, at its smallest."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of this project's own dependencies, with a tokenizer of 512 tokens."""
    from misa.data.corpus import make_corpus

    folder = tmp_path_factory.mktemp("laboratory") / "corpus"
    make_corpus(folder, packages=["networkx"], vocab_size=512, validation_share=0.1)
    return folder
