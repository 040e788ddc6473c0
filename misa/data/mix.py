"""Mixes of real instruction sets: several sets as one training file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from misa.data.records import SUFFIXES, already_made, files_digest, write_digest, write_records
from misa.data.sources import InstructionSource, find_instructions, question_of, read_questions
from misa.files import new_folder

FIELDS = ("instruction", "input", "output", "answer")


def make_mix(output_dir: str | Path, sets: Sequence[str], data_dir: str | None = None, seed: int = 0) -> bool:
    """Write the training records of several sets, shuffled, as `train.jsonl` and `digest.json`.

    Every question (instruction and input) of every set is in it once, with its last answer. Left out are questions that
    stand, character for character, in a test file beside a training file (`arc_easy_test.json` beside
    `arc_easy_train.json`): some public sets overlap with their own tests.

    Args:
        output_dir: Folder to write.
        sets: Names of known sets, see `misa.data.sources.KNOWN`.
        data_dir: Folder with local copies; None asks the hub.
        seed: Seed of the order.

    Returns:
        True if the data was made, False if the same data was already there.

    Raises:
        ValueError: If a set is named twice or cannot be found, or the folder holds other data.
    """
    if not sets or len(set(sets)) < len(sets):
        raise ValueError(f"sets is {', '.join(sets) or 'empty'}; name at least one, and none twice")
    found = [find_instructions(name, data_dir) for name in sets]
    read = [source.read(with_validation=False) for source in found]
    digests = {name: digest for name, (_, _, digest) in zip(sets, read, strict=True)}
    tests = [path for source in found for path in _test_files(source)]
    settings = {"sets": list(sets), "sources": digests, "tests": files_digest(tests), "seed": seed}
    if already_made(output_dir, "mix", settings):
        return False
    tested = {question for path in tests for question in read_questions(path)}
    records = {question_of(record): record for records, _, _ in read for record in records}
    kept = [record for question, record in records.items() if question not in tested]
    random.Random(seed).shuffle(kept)
    counts = {name: len(records) for name, (records, _, _) in zip(sets, read, strict=True)}
    with new_folder(output_dir, last="digest.json") as folder:
        lines = [{field: record[field] for field in FIELDS if field in record} for record in kept]
        write_records(folder / "train.jsonl", lines)
        left_out = sum(counts.values()) - len(kept)
        write_digest(folder, "mix", settings, ("train.jsonl",), records=counts, left_out=left_out)
    return True


def _test_files(source: InstructionSource) -> list[Path]:
    """Test files that lie beside local training files."""
    return [
        beside
        for path in source.train
        if "train" in path.stem
        for suffix in SUFFIXES
        if (beside := path.with_name(path.stem.replace("train", "test") + suffix)).is_file()
    ]
