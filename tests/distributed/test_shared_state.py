"""State shared out in data parallel training: the weights of a run without it, a share of its bytes, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shared_cases
import torch
from shared_cases import CASES
from test_fully_shard import require_same

from misa.optimizer import Settings

Found = dict[str, Any]
SHARED = "data parallel, `shard_state`"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def two(together: Callable[..., list[Any]], folder: str) -> list[Found]:
    return together(2, shared_cases.together, folder)


@pytest.fixture(scope="module")
def others(together: Callable[..., list[Any]], folder: str, two: list[Found]) -> dict[int, Found]:
    """Gone on from the checkpoints of two processes, in one and in three, of which the last has fewer rows."""
    return {1: shared_cases.resumed(folder), 3: together(3, shared_cases.resumed, folder)[0]}


def require_equal(found: Found, expected: Found) -> None:
    assert (found["active"], found["scores"]) == (expected["active"], expected["scores"])
    assert all(torch.equal(found["weights"][n], weight) for n, weight in expected["weights"].items())


@pytest.mark.support(SHARED)
@pytest.mark.parametrize("case", [name for name in CASES if name != "bf16, no masters"])
def test_weights_are_those_of_a_run_that_shares_nothing(two: list[Found], case: str) -> None:
    for found in two:
        require_equal(found[case], found[case]["without"])


@pytest.mark.support(SHARED, "bf16, no masters")
def test_rounding_of_shared_moments_is_near_that_of_whole_ones(two: list[Found]) -> None:
    # Processes draw other random bits than one would, so weights are one spacing of bf16 apart here and there.
    for found in two:
        require_equal(found["bf16, no masters"], two[0]["bf16, no masters"])
        for name, weight in found["bf16, no masters"]["without"]["weights"].items():
            torch.testing.assert_close(found["bf16, no masters"]["weights"][name], weight, rtol=2**-6, atol=3e-3)


@pytest.mark.support(SHARED, "a share of the bytes")
@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_its_share(two: list[Found], case: str) -> None:
    for found in two:
        held, whole = found[case]["bytes"], found[case]["whole bytes"]
        assert {kind: 2 * num for kind, num in held.items()} == whole
        assert held["moments"] > 0
        assert (held["master"] > 0) == (held["residual"] > 0) == (case == "bf16")
        assert (held["kept"] > 0) == (case == "kept on the CPU")


@pytest.mark.support(SHARED, "resumed bit for bit")
def test_resumed_run_is_the_same_bit_for_bit(two: list[Found]) -> None:
    for (name, _), found in two[0]["resumed"].items():
        require_equal(found, two[0][name])


@pytest.mark.support(SHARED, "resumed on another number of processes")
@pytest.mark.parametrize("size", [1, 3])
def test_resumed_run_on_another_number_of_processes_is_the_same(
    two: list[Found], others: dict[int, Found], size: int
) -> None:
    for (name, _), found in others[size].items():
        require_same(found, two[0][name], "bf16" if name.startswith("bf16") else name)


def test_state_of_one_process_alone_is_not_handed_out(two: list[Found]) -> None:
    for found in two:
        for case in CASES:
            for name in ("refused", "refused after a step"):
                assert found[case][name].startswith("RuntimeError: shard_state=True: each process holds a part")


@pytest.mark.support(SHARED, "copies of the optimizer")
@pytest.mark.parametrize("case", CASES)
def test_copy_of_the_optimizer_trains_on(two: list[Found], case: str) -> None:
    for found in two:
        require_equal(found[case]["copy"], found[case])


@pytest.mark.parametrize("case", CASES)
def test_weights_that_get_other_memory_in_a_round_train_on(two: list[Found], case: str) -> None:
    for found in two:
        require_equal(found[case]["moved"], found[case])


@pytest.mark.parametrize("options", [{"inner": torch.optim.SGD}, {"state_format": "8bit"}])
def test_rules_that_look_beyond_an_element_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shard_state=True: needs AdamW"):
        Settings(budget=0.3, shard_state=True, **options)
