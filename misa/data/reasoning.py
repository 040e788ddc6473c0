"""Generated reasoning tasks: seeded, offline, with disjoint training and test items."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from misa.data.records import Record, already_made, write_digest, write_records
from misa.files import new_folder

# Item i of a generator draws from Random(seed + i), so neighbouring seeds share nearly all of their items: a test set
# made with seed + 1 would be the training set moved by one. Seeds this far apart cannot meet.
SEED_DISTANCE = 10_000_000

# Which share of a split may be asked for again because its items were repeats or overlaps.
MAX_REPEATED_SHARE = 0.5

FAMILY = "family_relationships"


def make_family(output_dir: str | Path, num_train: int, num_test: int, seed: int = 0) -> bool:
    """Write family-relations questions as `train.jsonl`, `test.jsonl` and `digest.json`.

    Each question is a short story about a family of 4 to 8 people and asks for one relation; the answer is one word.
    Records have the fields instruction, input (empty), output and answer (equal to output). No question occurs twice,
    in one split or across them. Generator: reasoning-gym, `family_relationships`.

    Args:
        output_dir: Folder to write.
        num_train: Number of training records, at least 1.
        num_test: Number of test records, at least 1.
        seed: Seed of the pair of splits, 0 to 999,999.

    Returns:
        True if the data was made, False if the same data was already there.

    Raises:
        ValueError: If a number is out of range, or the folder holds other data.
    """
    for name, value, low, high in (
        ("num_train", num_train, 1, SEED_DISTANCE // 2),
        ("num_test", num_test, 1, SEED_DISTANCE // 2),
        ("seed", seed, 0, 999_999),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, allowed is {low} to {high}")
    version = importlib.metadata.version("reasoning_gym")
    settings = {"num_train": num_train, "num_test": num_test, "seed": seed, "reasoning_gym": version}
    if already_made(output_dir, "family", settings):
        return False
    # Two splits, each a whole distance apart, so that no seed of any pair meets another one's.
    first = 2 * seed * SEED_DISTANCE
    with new_folder(output_dir, last="digest.json") as folder:
        train = _distinct_items(FAMILY, first, num_train, taken=set())
        test = _distinct_items(FAMILY, first + SEED_DISTANCE, num_test, taken={item["instruction"] for item in train})
        write_records(folder / "train.jsonl", train)
        write_records(folder / "test.jsonl", test)
        write_digest(
            folder,
            "family",
            settings,
            ("train.jsonl", "test.jsonl"),
            generator=f"reasoning-gym {version}, {FAMILY}, Apache-2.0",
            seeds={"train": first, "test": first + SEED_DISTANCE},
        )
    return True


def _distinct_items(name: str, seed: int, count: int, taken: set[str]) -> list[Record]:
    """Draw items one after the other, leaving out every question seen before or in `taken`."""
    import reasoning_gym

    limit = min(SEED_DISTANCE, int(count / (1 - MAX_REPEATED_SHARE)) + 100)
    dataset = reasoning_gym.create_dataset(name, seed=seed, size=limit)
    seen = set(taken)
    items: list[Record] = []
    for index in range(limit):
        item = dataset[index]
        question, answer = item["question"].strip(), item["answer"].strip()
        if question in seen:
            continue
        seen.add(question)
        items.append({"instruction": question, "input": "", "output": answer, "answer": answer})
        if len(items) == count:
            return items
    raise ValueError(f"{name} gives only {len(items)} distinct questions where {count} were asked for")
