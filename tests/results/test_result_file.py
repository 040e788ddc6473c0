"""The result file: what goes in comes out, what is wrong is named, and a kill leaves the old file."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from misa.results import (
    CURVE_COLUMNS,
    CurvePoint,
    Result,
    package_digest,
    provenance,
    read_curves,
    read_result,
    write_curves,
    write_result,
)

# The package exports a function of the same name.
provenance_module = importlib.import_module("misa.results.provenance")


@pytest.fixture(scope="module")
def result() -> Result:
    return Result(
        run="misa-s0",
        kind="finetune",
        method="misa",
        model="tiny",
        data="family",
        seed=0,
        config={"learning_rate": 1e-3, "always_on": ["head"], "interval": None},
        provenance=provenance(["python", "-m", "misa.train"], "0" * 64),
        metrics={"train_loss": 0.1 + 0.2, "diverged": math.nan, "overflown": math.inf},
        peaks={"rss_bytes": 2**33},
        timings={"train_s": 1.5},
        curves="curves.csv",
    )


def test_result_reads_back_as_written(result: Result, tmp_path: Path) -> None:
    write_result(result, tmp_path / "runs" / "a")
    for source in (tmp_path / "runs" / "a", tmp_path / "runs" / "a" / "result.json"):
        back = read_result(source)
        assert back.model_copy(update={"metrics": {}}) == result.model_copy(update={"metrics": {}})
        assert back.metrics["train_loss"] == 0.1 + 0.2
        assert math.isnan(back.metrics["diverged"])
        assert back.metrics["overflown"] == math.inf


def test_result_file_is_plain_json(result: Result, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(write_result(result, tmp_path).read_text(), parse_constant=refuse)
    assert content["schema_version"] == 1
    assert content["provenance"]["versions"]["torch"]
    assert content["config"]["interval"] is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metrics": {"train_loss": "low"}}, "metrics.train_loss"),
        ({"kind": "training"}, "kind"),
        ({"schema_version": 2}, "schema_version"),
        ({"seed": -1}, "seed"),
        ({"run": ""}, "run"),
        ({"peek": {}}, "peek"),
    ],
)
def test_wrong_result_is_refused_by_field(result: Result, tmp_path: Path, change: dict, named: str) -> None:
    path = write_result(result, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as error:
        read_result(path)
    assert str(path) in str(error.value)


def test_missing_and_damaged_results_are_named(result: Result, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no result file at"):
        read_result(tmp_path)
    path = write_result(result, tmp_path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=r"result\.json: the file: Invalid JSON"):
        read_result(tmp_path)
    path.write_bytes(b'{"run": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"result\.json: the file: Invalid JSON"):
        read_result(tmp_path)


def test_failed_write_leaves_the_old_file(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_result(result, tmp_path)
    before = path.read_bytes()

    def full_disk(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_result(result.model_copy(update={"run": "other"}), tmp_path)
    assert path.read_bytes() == before


def test_curves_read_back_exactly(tmp_path: Path) -> None:
    points = [
        CurvePoint(step=1, tokens=100, time_s=0.1 + 0.2, metric="train_loss", value=1 / 3),
        CurvePoint(step=2, tokens=200, time_s=1e-9, metric="eval_loss", value=math.inf),
    ]
    path = write_curves(points, tmp_path / "curves.csv")
    assert path.read_text().splitlines()[0] == ",".join(CURVE_COLUMNS)
    assert read_curves(tmp_path) == points


def test_malformed_curves_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    with pytest.raises(ValueError, match="no curve file"):
        read_curves(path)
    path.write_text("step,value\n1,2\n")
    with pytest.raises(ValueError, match="columns are"):
        read_curves(path)
    path.write_text("step,tokens,time_s,metric,value\n1,2,3,train_loss,4\n1,2,3,train_loss,low\n")
    with pytest.raises(ValueError, match=r"curves.csv: line 3: value:"):
        read_curves(path)
    for damaged in (b"\xff\xfe\x00", b"step,tokens,time_s,metric,value\n" + b"9" * 200_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"curves\.csv: "):
            read_curves(path)


def test_package_digest_sees_content_and_names_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub" / "b.py").write_text("y = 2\n")
    first = package_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n")
    os.utime(tmp_path / "a.py", (0, 0))
    assert package_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert package_digest(tmp_path) != first
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub" / "b.py").rename(tmp_path / "sub" / "c.py")
    assert package_digest(tmp_path) != first


def test_commit_is_of_the_package_s_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    package = tmp_path / "misa"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance_module, "PACKAGE_FOLDER", package)
    assert provenance_module._checkout() == ("", False)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit, dirty = provenance_module._checkout()
    assert len(commit) == 40
    assert not dirty
    (package / "a.py").write_text("x = 2\n")
    assert provenance_module._checkout() == (commit, True)
    # A copy installed below another project's checkout has no commit of its own.
    installed = tmp_path / ".venv" / "misa"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance_module, "PACKAGE_FOLDER", installed)
    assert provenance_module._checkout() == ("", False)


def test_provenance_describes_this_process() -> None:
    import torch

    origin = provenance(["misa"])
    assert origin.versions["torch"] == torch.__version__
    assert origin.machine.num_threads == torch.get_num_threads()
    assert origin.machine.memory_bytes > 2**28
    assert origin.machine.processor
    assert origin.created.endswith("+00:00")
    with pytest.raises(ValueError, match="data_digest"):
        provenance(["misa"], "not a digest")
