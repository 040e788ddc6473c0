"""FSDP2: sharded parameters, moments and masters give the weights of one process, and load onto other numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sharded_cases
import torch
from sharded_cases import CASES

Found = dict[str, Any]
FSDP2 = "FSDP2 (`fully_shard`)"


@pytest.fixture(scope="module")
def alone() -> Found:
    return sharded_cases.alone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def two(together: Callable[..., list[Any]], folder: str) -> list[Found]:
    return together(2, sharded_cases.together, folder)


@pytest.fixture(scope="module")
def four(together: Callable[..., list[Any]], folder: str, two: list[Found]) -> Found:
    """Gone on from the checkpoints of two processes."""
    return together(4, sharded_cases.resumed, folder)[0]


def require_same(found: Found, expected: Found, case: str) -> None:
    assert found["active"] == expected["active"]
    low = case in ("bf16", "mixed precision")
    tolerance = {"rtol": 2**-7, "atol": 3e-3} if low else {"rtol": 0.0, "atol": 1e-6}
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **tolerance)
    assert found["scores"] == pytest.approx(expected["scores"], rel=0.05 if low else 1e-4)


@pytest.mark.support(FSDP2)
@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_one_process(alone: Found, two: list[Found], case: str) -> None:
    for found in two:
        require_same(found[case], alone[case], case)


@pytest.mark.support(FSDP2, "a share of the bytes")
def test_each_process_holds_its_part_of_the_state(alone: Found, two: list[Found]) -> None:
    for case in ("matrix blocks", "bf16"):
        whole = alone[case]["bytes"]
        for kind in ("moments", "master", "residual"):
            parts = [found[case]["bytes"][kind] for found in two]
            assert max(parts) <= whole["moments"] * 0.55
        assert two[0][case]["as DTensors"]
    assert two[0]["bf16"]["bytes"]["master"] > 0


@pytest.mark.support(FSDP2, "resumed bit for bit")
def test_resumed_run_is_the_same_bit_for_bit(two: list[Found]) -> None:
    for name, found in two[0]["resumed"].items():
        whole = two[0][name]
        assert found["active"] == whole["active"]
        assert found["scores"] == whole["scores"]
        assert all(torch.equal(found["weights"][n], weight) for n, weight in whole["weights"].items())


@pytest.mark.support(FSDP2, "resumed on another number of processes")
def test_resumed_run_on_more_processes_is_the_same(two: list[Found], four: Found) -> None:
    for name, found in four.items():
        require_same(found, two[0][name], name)


@pytest.mark.support(
    "Refused before the first step, in words that name what works",
    'FSDP2 with `step_in_backward`, 8-bit moments or `variant="paper"`',
)
def test_what_needs_whole_gradients_is_refused(two: list[Found]) -> None:
    assert "step_in_backward=True: not with fully_shard" in two[0]["step in backward"]
    assert "state_format='8bit': not with fully_shard" in two[0]["8bit"]
    assert "inner=BoundedAdam (variant='paper'): not with fully_shard" in two[0]["bound"]


def test_model_sharded_in_part_is_refused(two: list[Found]) -> None:
    assert "call fully_shard on every layer and on the model" in two[0]["partly"]


def test_gradient_of_a_skipped_step_is_forgotten(two: list[Found]) -> None:
    assert two[0]["finite after a skipped step"]
