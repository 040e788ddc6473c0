"""What all tests share: a quiet environment, and what is skipped where a machine lacks it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# Before torch is imported: waiting threads sleep, or two test processes on two cores take ten times as long.
# Whatever the caller's environment says, no test asks a hub.
os.environ |= {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with a slow test begin first, so that no process has one left when the others are done.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    of_gpu = [item for item in items if "gpu" in item.keywords]
    if of_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in of_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ---- the README's table of what works between processes --------------------------------------------------------------

SUPPORT: dict[str, dict[str, bool]] = {}  # way of sharing a model -> what is shown -> whether its tests passed
# Ways that are columns of the table; what is shown of others is a list below it.
COLUMNS = ("data parallel, with or without DDP", "data parallel, `shard_state`", "FSDP2 (`fully_shard`)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", metavar="FILE", help="write the table of what works between processes into this file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--support") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--support FILE: only without -n, since each process sees a part of the tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, object, object]:
    report = yield
    marker = item.get_closest_marker("support")
    if marker is not None and (call.when == "call" or call.excinfo is not None):
        way, *what = marker.args
        shown = what[0] if what else item.callspec.params["case"]  # type: ignore[attr-defined]
        together = shown.split(" + ")
        rows = SUPPORT.setdefault(COLUMNS[1] if "shard_state" in together else way, {})
        for name in together:
            if name != "shard_state":
                rows[name] = rows.get(name, True) and call.excinfo is None
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--support")
    if path is None:
        return
    cells = {True: "yes", False: "FAILS", None: ""}
    lines = [f"| shown by tests | {' | '.join(COLUMNS)} |", f"| --- |{' :-: |' * len(COLUMNS)}"]
    for name in dict.fromkeys(name for way in COLUMNS for name in SUPPORT.get(way, {})):
        found = (cells[SUPPORT.get(way, {}).get(name)] for way in COLUMNS)
        lines.append(f"| {name} | {' | '.join(found)} |")
    for way in (way for way in SUPPORT if way not in COLUMNS):
        names = (name if good else f"{name} (FAILS)" for name, good in SUPPORT[way].items())
        lines += ["", f"{way}: {'; '.join(names)}."]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


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
