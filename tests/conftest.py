"""What all tests share: a quiet environment, and what is skipped where a machine lacks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported: waiting threads sleep, or two test processes on two cores take ten times as long.
for name, value in {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of_gpu = [item for item in items if "gpu" in item.keywords]
    if of_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in of_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with public benchmark files (see its README), outside the repository; most machines do not have it."""
    folder = Path(os.environ.get("MISA_DATA_DIR") or ROOT.parent / "shared" / "data")
    if not (folder / "math").is_dir():
        pytest.skip(f"no benchmark data at {folder}; set MISA_DATA_DIR to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def package_index() -> None:
    """Skip where pip reaches no package index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "setuptools", "--disable-pip-version-check"]
    try:
        asked = subprocess.run([*command, "--retries", "0"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index does not answer")
    if asked.returncode != 0:
        pytest.skip(f"no package index: {asked.stderr.strip().splitlines()[-1:]}")
