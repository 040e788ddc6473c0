"""Freezing: what one scale has made becomes what is committed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from misa.memory.grid import TABLES as GRID_TABLES
from misa.results.collect import TABLES


@pytest.mark.parametrize(
    ("target", "scale", "source", "frozen", "names"),
    [
        ("freeze", "laptop", "tables", "data", [*(f"{name}.csv" for name in TABLES), "MANIFEST.json"]),
        ("freeze", "tune", "tables", "data/tune", ["runs.csv", "settings.csv", "MANIFEST.json"]),
        (
            *("freeze_memory_grid", "laptop", "memory_grid", "data"),
            [*(f"{name}.csv" for name in GRID_TABLES), "memory_grid.json"],
        ),
    ],
)
def test_freeze_copies_what_is_there_over_what_is_committed(
    snakemake, tmp_path: Path, target: str, scale: str, source: str, frozen: str, names: list[str]
) -> None:
    made, committed = tmp_path / "results" / scale / source, tmp_path / "paper_figures" / frozen
    made.mkdir(parents=True)
    committed.mkdir(parents=True)
    for name in {*names, "convergence.csv"}:
        (made / name).write_text(f"new {name}")
        os.utime(made / name, (1, 1))
    for name in names:
        (committed / name).write_text("old, and younger")
    done = snakemake(target, "--cores", "1", "--config", f"scale={scale}", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert {path.name: path.read_text() for path in committed.iterdir()} == {name: f"new {name}" for name in names}


def test_freeze_makes_nothing_and_says_what_is_missing(snakemake, tmp_path: Path) -> None:
    for target, missing in (("freeze", "tables/runs.csv"), ("freeze_memory_grid", "memory_grid/memory_grid.csv")):
        done = snakemake(target, "-n", "--config", "scale=tune", folder=tmp_path)
        assert done.returncode != 0
        assert f"results/tune/{missing} does not exist" in done.stdout


def test_cached_cannot_freeze(snakemake, repository: Path) -> None:
    done = snakemake("freeze", "-n", "--config", "results=cached", folder=repository)
    assert done.returncode != 0
    assert "MissingRuleException" in done.stdout
