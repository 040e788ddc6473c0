"""Folders that appear whole or not at all."""

from __future__ import annotations

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
    write_text(tmp_path / ".model.partial" / "half", "h")
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
