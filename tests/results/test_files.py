"""Folders that appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from misa.files import new_folder, write_text


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with new_folder(target, last="done") as folder:
        write_text(folder / "weights", "w")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["weights"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "model", last="done") as folder:
            write_text(folder / "weights", "w")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    write_text(tmp_path / ".model.1-2.partial" / "half", "h")
    with new_folder(tmp_path / "model", last="done") as folder:
        write_text(folder / "done", "d")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["done"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("occupied", [False, True])
def test_existing_folder_is_filled(tmp_path: Path, occupied: bool) -> None:
    target = tmp_path / "model"
    target.mkdir()
    if occupied:
        write_text(target / "done", "old")
        write_text(target / "part" / "old", "old")
        write_text(target / "log.txt", "kept")
    with new_folder(target, last="done") as folder:
        write_text(folder / "done", "new")
        write_text(folder / "part" / "new", "new")
    assert (target / "done").read_text() == "new"
    assert [path.name for path in (target / "part").iterdir()] == ["new"]
    assert (target / "log.txt").exists() == occupied
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("occupied", [False, True])
def test_folder_filled_twice_at_once_is_that_of_the_first_to_end(tmp_path: Path, occupied: bool) -> None:
    target = tmp_path / "model"
    if occupied:
        write_text(target / "done", "old")

    def fill(content: str) -> None:
        with new_folder(target, last="done") as folder:
            with new_folder(target, last="done") as other:
                for name in ("done", "part/a"):
                    write_text(other / name, "new")
            write_text(folder / "done", "new")
            write_text(folder / "part" / "a", content)

    fill("new")
    with pytest.raises(ValueError, match="model was written by another process meanwhile, with other content"):
        fill("other")
    assert (target / "done").read_text() == (target / "part" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folder_of_another_process_is_left_alone_until_it_is_dead(tmp_path: Path) -> None:
    code = (
        "import sys; from misa.files import new_folder\n"
        "with new_folder(sys.argv[1], 'done') as folder:\n"
        "    (folder / 'done').write_text('d'); print(folder, flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "model")]

    def fill() -> None:
        with new_folder(tmp_path / "model", last="done") as folder:
            write_text(folder / "done", "d")

    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        partial = Path(process.stdout.readline().strip())
        fill()
        assert (partial / "done").is_file()
        process.kill()
    assert partial.is_dir()
    fill()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
