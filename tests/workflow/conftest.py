"""Running snakemake on this repository's Snakefile, in whatever folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def snakemake(repository: Path) -> Snakemake:
    """Call snakemake with some words in some folder (default: the repository) and return the finished process.

    Standard error is appended to `stdout`, where snakemake splits what belongs together.
    """

    def call(*words: str | Path, folder: Path = repository, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "--snakefile", repository / "Snakefile"]
        return subprocess.run(
            [str(word) for word in [*command, "--directory", folder, *words]],
            # Without a folder of its own the whole repository would be the working folder of a stray run.
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def tiny(repository: Path) -> Path:
    """The configuration of the smallest scale."""
    return repository / "tests" / "workflow" / "tiny.yaml"


@pytest.fixture
def sets(repository: Path, tmp_path: Path) -> Path:
    """A folder with a training file, of no records, for each real set that a scale trains on."""
    folder = tmp_path / "sets"
    folder.mkdir()
    for path in (repository / "workflows" / "config").glob("*.yaml"):
        for mix in yaml.safe_load(path.read_text())["mixes"].values():
            for name in mix["sets"]:
                (folder / f"{name}_train.json").write_text("[]")
    return folder
