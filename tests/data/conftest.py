"""Small corpora and tokenizers, made by the real code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from misa.data.corpus import train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind.",
    "Naïve café owners in Zürich paid 1234 €; 中文 and emoji 🙂 survive the round trip, too.",
    'def step(self):\n    """Take a step."""\n\treturn self.lr * self.grad  # two  spaces\n',
] * 5


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of 400 tokens."""
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small family-relations folder."""
    from misa.data.reasoning import make_family

    folder = tmp_path_factory.mktemp("data") / "family"
    assert make_family(folder, num_train=300, num_test=100, seed=3)
    return folder
