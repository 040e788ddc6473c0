"""The committed counts of bytes meet their bars, and what is written about them follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distributed, scaling


@pytest.fixture(scope="module")
def report(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "benchmarks" / "results" / "distributed.json").read_text())


def test_traffic_and_buckets_fall_with_the_budget(report: dict[str, Any], repository: Path) -> None:
    bars = distributed.bars(report["rows"])
    assert {bar["budget"] for bar in bars} == {0.03, 0.1, 0.25}
    assert all(bar["value"] <= distributed.LIMIT for bar in bars)
    text = (repository / "benchmarks" / "results" / "distributed.md").read_text()
    assert text == distributed.table({**report, "bars": bars})


def test_plan_for_many_gpus_follows_from_the_counts(repository: Path, tmp_path: Path) -> None:
    measured = repository / "benchmarks" / "results" / "distributed.json"
    assert scaling.main(["--measured", str(measured), "--output", str(tmp_path / "scaling.md")]) == 0
    assert (tmp_path / "scaling.md").read_text() == (repository / "docs" / "scaling.md").read_text()
