"""What counts as the right answer, and how the harness's numbers are read."""

from __future__ import annotations

import pytest

from misa.evaluation.scoring import FAMILIES, TASK_FOLDER, flat_metrics, merge_harness, task_names
from misa.evaluation.standard import STANDARD_TASKS
from misa.tasks.documents import RELATIONS, normalise, score_relation


@pytest.mark.parametrize(
    ("response", "answer", "exact", "relation"),
    [
        ("mother", "mother", 1.0, 1.0),
        ("\n Mother.\nBecause she is.", "mother", 1.0, 1.0),
        ('"mother-in-law"', "mother-in-law", 1.0, 1.0),
        ("mother-in-law", "mother", 0.0, 0.0),
        ("grandmother", "mother", 0.0, 0.0),
        ("The answer is mother", "mother", 0.0, 1.0),
        ("The father or the mother", "mother", 0.0, 0.0),
        ("Anna is Ben's mother, not his aunt.", "mother", 0.0, 1.0),
        ("", "mother", 0.0, 0.0),
    ],
)
def test_response_is_scored_strictly_and_by_the_relation_it_names(response, answer, exact, relation) -> None:
    assert score_relation({"answer": answer}, [response]) == {"exact_match": exact, "relation_match": relation}


def test_relations_are_those_of_the_generator() -> None:
    from reasoning_gym.graphs.family_relationships import Relationship

    assert {relation.value for relation in Relationship} == RELATIONS


def test_normalise_keeps_inner_punctuation() -> None:
    assert normalise("  \n (Sister-in-law)! \n more") == "sister-in-law"


def test_metrics_lose_the_filter_name_and_what_is_no_number() -> None:
    found = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc,strict": 0.25, "acc_stderr,strict": "N/A"}
    assert flat_metrics(found) == {"acc": 0.5, "acc_stderr": 0.1, "acc-strict": 0.25}


def test_merged_harness_results_keep_every_task() -> None:
    one, two = ({"results": {name: {"acc,none": 1}}, "versions": {name: 1.0}, "date": name} for name in ("a", "b"))
    assert merge_harness([one, two]) == {
        "results": {**one["results"], **two["results"]},
        "versions": {"a": 1.0, "b": 1.0},
        "date": "b",
    }


def test_every_task_file_is_found() -> None:
    files = {path.stem for path in TASK_FOLDER.glob("[!_]*.yaml")}
    ours = {name for name in task_names() if name not in STANDARD_TASKS}
    assert files == ours | {f"misa_{family}" for family in FAMILIES}


def test_half_precision_that_is_only_emulated_gives_way_to_float32(tmp_path, monkeypatch) -> None:
    import misa.models
    from misa.evaluation.folder import ModelFolder

    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    folder = ModelFolder(str(tmp_path))
    for native, expected in (("bfloat16", "bfloat16"), ("float32", "float32")):
        monkeypatch.setattr(misa.models, "resolve_dtype", lambda _, native=native: native)
        assert folder.resolve_dtype("auto") == expected
        assert folder.resolve_dtype("bfloat16") == "bfloat16"
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    monkeypatch.setattr(misa.models, "resolve_dtype", lambda _: "bfloat16")
    assert folder.resolve_dtype("auto") == "float32"
