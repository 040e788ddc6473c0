"""The built-in corpus: docstrings without imports, a tokenizer that loses nothing, and blocks of tokens."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from misa.data import __main__ as command
from misa.data import corpus, docstrings
from misa.data.corpus import Blocks, load_blocks, make_corpus
from misa.data.records import read_records, write_records

SOURCE = '''
"""Module text that is certainly long enough to count as a document, because it goes on and on."""
import nothing_that_exists

raise RuntimeError("importing this runs code")

class Thing:
    """Class text that is certainly long enough to count as a document, because it goes on and on.

        Indented further
    than the rest.
    """

    def short(self):
        """Too short."""

    async def long(self):
        """Method text that is certainly long enough to count as a document, as it goes on and on."""

if True:
    def conditional():
        """Conditional text that is certainly long enough to count as a document, as it goes on."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported."""
    root = tmp_path / "site" / "sample_package_of_text"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (root / "code.py").write_text(SOURCE)
    (root / "broken.py").write_text("def (:\n")
    (root / "tests" / "test_code.py").write_text(SOURCE.replace("text", "test text"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_docstrings_are_read_without_import(package: Path) -> None:
    found = docstrings.docstrings(["sample_package_of_text"])
    assert [text.split()[0] for text in found] == ["Module", "Class", "Method", "Conditional"]
    assert found[1].endswith("\n\n    Indented further\nthan the rest.")
    assert "sample_package_of_text" not in sys.modules
    assert docstrings.docstrings(["sample_package_of_text"], num_workers=2) == found


def test_half_characters_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""' + "Text with half a pair: \\ud83d. " * 5 + '"""\n')
    assert docstrings.file_docstrings(tmp_path / "a.py") == []


def test_origin_names_distribution_version_and_licence() -> None:
    assert docstrings.package_origin("sklearn")["distribution"] == "scikit-learn"
    assert "BSD" in docstrings.package_origin("numpy")["licence"]
    assert docstrings.package_origin("numpy")["version"] == np.__version__


@pytest.mark.parametrize("name", ["no_such_package", "numpy.linalg", "", "sys"])
def test_packages_without_source_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"package '{name}'"):
        make_corpus(tmp_path / "corpus", [name])
    assert not (tmp_path / "corpus").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "corpus"
    assert make_corpus(folder, ["networkx"], vocab_size=1000, validation_share=0.1)
    return folder


def test_corpus_is_distinct_and_disjoint_and_says_what_it_is(folder: Path) -> None:
    train, validation = (
        [record["text"] for record in read_records(folder / f"{split}.jsonl", ["text"])]
        for split in ("train", "validation")
    )
    assert len(set(train) | set(validation)) == len(train) + len(validation) > 1000
    assert min(map(len, train + validation)) >= 80
    assert 0.07 < len(validation) / len(train + validation) < 0.13
    digest = json.loads((folder / "digest.json").read_text())
    assert digest["num_documents"] == {"train": len(train), "validation": len(validation)}
    assert digest["origins"]["networkx"]["licence"] == "BSD-3-Clause"
    assert digest["files"]["train.jsonl"] == hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()


def test_corpus_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    assert make_corpus(tmp_path / "again", ["networkx"], 1000, 0.1)
    for name in ("train.jsonl", "validation.jsonl", "tokenizer/tokenizer.json", "digest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert not make_corpus(tmp_path / "again", ["networkx"], 1000, 0.1)
    with pytest.raises(ValueError, match="vocab_size is 1000 there and 500 here"):
        make_corpus(tmp_path / "again", ["networkx"], 500, 0.1)


def test_saved_tokenizer_loads_and_loses_nothing(folder: Path) -> None:
    from misa.models import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    assert len(tokenizer) == 1000
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id is not None
    for text in ("  two  spaces\n\ttab", "naïve 中文 🙂", "a\r\nb", "x ( y ) , don 't"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


def test_blocks_are_the_documents_in_order_with_ends_between(folder: Path, tokenizer: Any) -> None:
    texts = [record["text"] for record in read_records(folder / "validation.jsonl", ["text"])]
    blocks = load_blocks(folder, "validation", tokenizer, 64)
    stream = blocks.input_ids.reshape(-1).tolist()
    assert blocks.input_ids.shape[1] == 64
    decoded = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert decoded[:-1] == texts[: len(decoded) - 1]
    assert texts[len(decoded) - 1].startswith(decoded[-1])
    assert blocks.num_bytes == len("".join(decoded).encode())
    few = load_blocks(folder, "validation", tokenizer, 64, max_tokens=200)
    assert few.num_tokens == 192
    assert np.array_equal(few.input_ids, blocks.input_ids[:3])


def test_tokens_are_kept_and_used_only_for_the_same_text(tmp_path: Path, tokenizer: Any) -> None:
    write_records(tmp_path / "train.jsonl", [{"text": "some text " * 50}])
    first = load_blocks(tmp_path, "train", tokenizer, 16)
    (cache,) = (tmp_path / corpus.CACHE_FOLDER).glob("*.npy")
    stamp = cache.stat().st_mtime_ns
    assert np.array_equal(load_blocks(tmp_path, "train", tokenizer, 16).input_ids, first.input_ids)
    assert cache.stat().st_mtime_ns == stamp
    for size in (40, 0):
        cache.write_bytes(cache.read_bytes()[:size])
        assert np.array_equal(load_blocks(tmp_path, "train", tokenizer, 16).input_ids, first.input_ids)
    write_records(tmp_path / "train.jsonl", [{"text": "other text " * 50}])
    assert not np.array_equal(load_blocks(tmp_path, "train", tokenizer, 16).input_ids, first.input_ids)
    write_records(tmp_path / "train.jsonl", [{"text": "few"}])
    with pytest.raises(ValueError, match="fewer than one block of max_length 16"):
        load_blocks(tmp_path, "train", tokenizer, 16)


def test_bits_per_byte_of_uniform_bytes_is_eight() -> None:
    blocks = Blocks(np.zeros((2, 10), dtype=np.int32), num_bytes=20)
    assert blocks.bits_per_byte(math.log(256)) == pytest.approx(8)


def test_command_makes_data_and_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["family", "--num_train", "20", "--num_test", "5", "--seed", "1", "--output_dir", str(tmp_path / "f")]
    assert command.main(words) == 0
    assert "20 training and 5 test records" in capsys.readouterr().out
    assert command.main(words) == 0
    assert "already there" in capsys.readouterr().out
    assert command.main([*words, "--num_test", "6"]) == 2
    assert "num_test is 5 there and 6 here" in capsys.readouterr().err
    assert command.main(["corpus", "--packages", "nope", "--output_dir", str(tmp_path / "c")]) == 2
    assert "package 'nope' is not installed" in capsys.readouterr().err
