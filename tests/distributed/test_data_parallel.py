"""Data parallel training in 2 and 4 processes gives the weights of one process with the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, OF_FOUR, train_all
from failures import all_failures

DATA_PARALLEL = "data parallel, with or without DDP"
REFUSED = "Refused before the first step, in words that name what works"

TRIED = [(2, case) for case in CASES] + [(4, case) for case in OF_FOUR]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return train_all(tuple(CASES))


@pytest.fixture(scope="module")
def several(together: Callable[..., list[Any]]) -> dict[int, list[dict[str, dict[str, Any]]]]:
    return {2: together(2, train_all, tuple(CASES)), 4: together(4, train_all, OF_FOUR)}


@pytest.fixture(scope="module")
def failures(together: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, all_failures, str(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.support(DATA_PARALLEL)
@pytest.mark.parametrize(("size", "case"), TRIED)
def test_weights_equal_those_of_one_process(
    alone: dict[str, dict[str, Any]], several: dict[int, list[dict[str, dict[str, Any]]]], size: int, case: str
) -> None:
    expected, found = alone[case], several[size][0][case]
    assert found["drawn"] == expected["drawn"]
    assert found["trained"] == expected["trained"] > 0
    bf16 = next(iter(expected["weights"].values())).dtype == torch.bfloat16
    tolerance = {"rtol": 2**-7, "atol": 3e-3} if bf16 else {"rtol": 0.0, "atol": 1e-6}
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **tolerance)
    # Gradients of bf16 weights are rounded before they are averaged.
    assert found["scores"] == pytest.approx(expected["scores"], rel=0.05 if bf16 else 1e-4)


@pytest.mark.parametrize(("size", "case"), TRIED)
def test_all_processes_have_the_same_weights_and_draws(
    several: dict[int, list[dict[str, dict[str, Any]]]], size: int, case: str
) -> None:
    first, *others = (found[case] for found in several[size])
    for other in others:
        assert other["drawn"] == first["drawn"]  # each has a seed of its own
        assert all(torch.equal(other["weights"][name], weight) for name, weight in first["weights"].items())
    assert all(found[case]["random state"] for found in several[size])


@pytest.mark.support(DATA_PARALLEL, "drift of a process stops the run")
def test_drift_stops_the_run_and_names_weight_and_process(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        assert found["drift"].startswith("RuntimeError: the weights of the processes have drifted apart: 1 of 21")
        assert "model.layers.1.mlp.up_proj.weight, on process 1." in found["drift"]


def test_processes_with_other_models_are_refused(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        assert "differ between process 0 and process 1" in found["other_models"]


@pytest.mark.support(REFUSED, "DDP with `static_graph`, a communication hook or mixed precision of its own")
@pytest.mark.parametrize("name", ["static_graph", "static_graph_later", "communication_hook", "mixed_precision"])
def test_wrapper_settings_that_cannot_work_are_refused_before_the_first_step(
    failures: list[dict[str, Any]], name: str
) -> None:
    for found in failures:
        assert found[name].startswith("ValueError: DistributedDataParallel")
        assert "use DistributedDataParallel(model) without it, or no wrapper at all" in found[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one_of_two_groups", "ValueError: DistributedDataParallel(process_group=...): it holds 1 of 2 processes"),
        (
            "head_of_somebody_else",
            "ValueError: DistributedDataParallel: it holds parameters that the optimizer was not",
        ),
        (
            "made_before_the_group",
            "RuntimeError: the optimizer was made for 1 processes, and there are 2: make it after",
        ),
    ],
)
def test_processes_that_would_train_apart_are_refused(failures: list[dict[str, Any]], name: str, words: str) -> None:
    for found in failures:
        assert found[name].startswith(words)


def test_wrapper_of_a_released_optimizer_says_so(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        alone, with_another = found["released"]
        assert "the optimizer that averaged its gradients was released; wrap the model anew" in alone
        assert with_another == ""


def test_expanded_buffer_is_that_of_the_first_process(failures: list[dict[str, Any]]) -> None:
    assert all(found["expanded_buffer"] for found in failures)


def test_checkpoint_of_a_wrapped_model_loads_into_a_bare_one(failures: list[dict[str, Any]]) -> None:
    assert all(found["checkpoint"] for found in failures)


def test_wrong_checkpoints_are_refused_and_leave_the_model_as_it_was(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        said, unchanged = zip(*found["wrong checkpoints"], strict=True)
        assert all(unchanged)
        assert all(words.startswith("ValueError: ") for words in said)
        assert "does not belong to this model: 9 tensors differ; first model.layers.2." in said[0]
        assert "first lm_head.weight, whose shape was [64, 32] and is [70, 32]" in said[1]
        assert all("does not belong to this model" in words for words in said[2:])


def test_model_is_saved_as_a_whole_while_its_optimizer_lives(failures: list[dict[str, Any]]) -> None:
    assert all(found["saved_as_a_whole"] for found in failures)


def test_buckets_of_the_wrapper_are_freed(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        assert found["wrapper_is_alive"] == (True, False)


def test_wrapper_that_cannot_rest_must_find_unused_parameters(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        refused, right_with_it = found["without_switch"]
        assert "use find_unused_parameters=True, or no wrapper at all" in refused
        assert right_with_it


@pytest.mark.support(DATA_PARALLEL, "copies of the optimizer")
def test_copy_of_an_optimizer_trains_on(failures: list[dict[str, Any]]) -> None:
    assert all(found["copies"] for found in failures)


def test_gradients_of_active_blocks_alone_are_sent(failures: list[dict[str, Any]]) -> None:
    for found in failures:
        sent, accumulating, active = found["bytes_sent"]
        assert active <= sent <= 1.01 * active
        assert accumulating == 0
