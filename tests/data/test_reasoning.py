"""Generated questions: seeded, distinct, and no test question among the training ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from misa.data import reasoning
from misa.data.instruction import read_instructions
from misa.data.reasoning import SEED_DISTANCE, make_family


def questions(path: Path) -> list[str]:
    return [record["instruction"] for record in read_instructions(path)]


def test_splits_are_distinct_and_disjoint(family: Path) -> None:
    train, test = questions(family / "train.jsonl"), questions(family / "test.jsonl")
    assert len(train) == len(set(train)) == 300
    assert len(test) == len(set(test)) == 100
    assert not set(train) & set(test)


def test_answers_are_what_the_generator_scores_as_right(family: Path) -> None:
    import reasoning_gym

    first = json.loads((family / "digest.json").read_text())["seeds"]["test"]
    dataset = reasoning_gym.create_dataset("family_relationships", seed=first, size=200)
    entries = {dataset[i]["question"]: dataset[i] for i in range(200)}
    for record in read_instructions(family / "test.jsonl"):
        assert record["output"] == record["answer"]
        assert dataset.score_answer(record["answer"], entries[record["instruction"]]) == 1.0


def test_same_seed_gives_the_same_files_and_another_seed_other_questions(family: Path, tmp_path: Path) -> None:
    assert make_family(tmp_path / "again", 300, 100, seed=3)
    for name in ("train.jsonl", "test.jsonl", "digest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (family / name).read_bytes()
    assert make_family(tmp_path / "other", 300, 100, seed=4)
    other = set(questions(tmp_path / "other" / "train.jsonl")) | set(questions(tmp_path / "other" / "test.jsonl"))
    assert not other & (set(questions(family / "train.jsonl")) | set(questions(family / "test.jsonl")))


def test_neighbouring_generator_seeds_would_leak() -> None:
    """Item i draws from Random(seed + i): the reason for the distance between the splits' seeds."""
    import reasoning_gym

    near = [reasoning_gym.create_dataset("family_relationships", seed=seed, size=50) for seed in (7, 8)]
    assert [near[0][i]["question"] for i in range(1, 50)] == [near[1][i]["question"] for i in range(49)]
    assert SEED_DISTANCE >= 10_000_000


def test_present_data_is_kept_and_other_data_is_refused(family: Path) -> None:
    before = (family / "train.jsonl").stat().st_mtime_ns
    assert not make_family(family, 300, 100, seed=3)
    assert (family / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="num_train is 300 there and 301 here"):
        make_family(family, 301, 100, seed=3)


@pytest.mark.parametrize(("name", "values"), [("num_train", (0, 1, 0)), ("num_test", (1, -1, 0)), ("seed", (1, 1, -1))])
def test_numbers_out_of_range_are_named(tmp_path: Path, name: str, values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        make_family(tmp_path / "x", *values)
    assert list(tmp_path.iterdir()) == []


def test_other_data_made_in_the_folder_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = reasoning._distinct_items

    def draw_late(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reasoning, "_distinct_items", draw)
            make_family(tmp_path / "x", 3, 2, seed=4)  # as another process does
        return draw(*args, **kwargs)

    monkeypatch.setattr(reasoning, "_distinct_items", draw_late)
    with pytest.raises(ValueError, match="x was written by another process meanwhile, with other content"):
        make_family(tmp_path / "x", 3, 2, seed=3)
    assert not make_family(tmp_path / "x", 3, 2, seed=4)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
