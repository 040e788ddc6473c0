"""Tables in a folder that several commands write, and a kill may stop: whole and with every run, or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from misa.results.__main__ import main
from misa.results.collect import TABLES


@pytest.fixture
def early(results: Path, tmp_path: Path) -> Path:
    """Tables of all results but one run and its scores."""
    late = [results / "runs/misa-s1", results / "evaluations/misa-s1"]
    folders = [str(path.parent) for path in results.rglob("result.json") if path.parent not in late]
    assert main(["collect", *folders, "--output_dir", str(tmp_path / "tables")]) == 0
    return tmp_path / "tables"


def add(results: Path, out: Path) -> list[str]:
    return ["collect", str(results / "runs/misa-s1"), "--output_dir", str(out), "--add"]


@pytest.mark.parametrize("verb", ["add", "collect"])
def test_folder_in_which_another_process_writes_is_refused(
    verb: str, results: Path, early: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in early.iterdir()}
    holding = (
        "import sys, pathlib; from misa.training.lock import FolderLock\n"
        "lock = FolderLock([pathlib.Path(sys.argv[1])]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holding, str(early)]
    words = add(results, early)[: None if verb == "add" else -1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert main(words) == 2
        assert f"{early} is in use by another run" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
        other.communicate()
    assert main(words) == 0


# Every table and the manifest is first written, by a rename of its own, and then moved.
NUM_FILES = len(TABLES) + 1
KILLED = """
import os, pathlib, signal, sys
from misa.results.__main__ import main
left, replace = int(sys.argv[1]), pathlib.Path.replace
def counted(*paths):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)
pathlib.Path.replace = counted
main(sys.argv[2:])
"""


@pytest.mark.parametrize("num_renamed", [4, NUM_FILES, NUM_FILES + 8, 2 * NUM_FILES - 1])
def test_kill_leaves_tables_that_can_be_added_to(
    num_renamed: int, results: Path, early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    main(["collect", *(str(path) for path in results.rglob("result.json")), "--output_dir", str(whole)])
    command = [sys.executable, "-c", KILLED, str(num_renamed), *add(results, early)]
    assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    was_written = num_renamed >= NUM_FILES
    assert main(add(results, early)) == (2 if was_written else 0)
    error = capsys.readouterr().err
    assert ("holds the run misa-s1 of kind finetune already" in error) == was_written
    assert (f"{early} gets the tables of a command that was interrupted there" in error) == was_written
    assert main(["collect", str(results / "evaluations/misa-s1"), "--output_dir", str(early), "--add"]) == 0
    for name in TABLES:
        assert sorted((early / f"{name}.csv").read_text().splitlines()) == sorted(
            (whole / f"{name}.csv").read_text().splitlines()
        )
    assert {path.name for path in early.iterdir()} == {path.name for path in whole.iterdir()}
    one, other = (json.loads((folder / "MANIFEST.json").read_text())["runs"] for folder in (early, whole))
    assert sorted(map(str, one)) == sorted(map(str, other))
