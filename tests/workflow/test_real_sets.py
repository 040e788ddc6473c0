"""Runs on real sets: made anew when the sets change, and only then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

RECORD = {"instruction": "2 + 2?", "input": "", "output": "4", "answer": "4"}
TARGETS = ("results/tiny/data/math/digest.json", "results/tiny/evaluations/base-math/result.json")


@pytest.fixture
def study(snakemake, tiny: Path, tmp_path: Path):
    """Plan the mix and the scores of the base model in a folder where both are done."""
    config = yaml.safe_load(tiny.read_text())
    mix = {"sets": ["gsm8k"], "train": "", "evaluate": "--tasks misa_svamp"}
    config |= {"mixes": {"math": mix}, "sheet": "own.tsv", "variance": config["variance"] | {"runs": []}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "own.tsv").write_text("run\tkind\tdata\targs\nnew\tfinetune\tmath\t--method misa\n")
    for name in ("gsm8k_train", "gsm8k_test", "svamp_test"):
        path = tmp_path / "sets" / "math" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([RECORD]))
    (tmp_path / "results" / "inputs" / "models" / "tiny").mkdir(parents=True)
    for name in (*TARGETS, "results/tiny/data/math/train.jsonl", "results/tiny/evaluations/base-math/lm_eval.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def call(data_dir: str, *words: str) -> str:
        words = (*TARGETS, *words, "--configfile", "own.yaml", "--config", f"data_dir={data_dir}")
        done = snakemake(*words, folder=tmp_path)
        assert done.returncode == 0, done.stdout
        return done.stdout

    call("sets", "--touch", "--cores", "1", "--forceall")
    return call


def test_same_sets_in_another_folder_make_nothing_anew(study, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "sets", tmp_path / "elsewhere")
    assert "Nothing to be done" in study("elsewhere", "-n")


@pytest.mark.parametrize(
    ("changed", "anew", "kept"),
    [
        ("gsm8k_train", "fine-tuning data", "scores of"),
        ("gsm8k_test", "fine-tuning data", "scores of"),
        ("svamp_test", "scores of base-math", "fine-tuning data"),
    ],
)
def test_changed_set_is_used_anew(study, tmp_path: Path, changed: str, anew: str, kept: str) -> None:
    (tmp_path / "sets" / "math" / f"{changed}.json").write_text(json.dumps([RECORD, RECORD | {"input": "more"}]))
    planned = study("sets", "-n")
    assert anew in planned
    assert kept not in planned


def test_missing_set_stops_before_any_job(study, snakemake, tmp_path: Path) -> None:
    (tmp_path / "sets" / "math" / "gsm8k_train.json").unlink()
    words = (TARGETS[0], "-n", "--configfile", "own.yaml", "--config", "data_dir=sets")
    done = snakemake(*words, folder=tmp_path)
    assert done.returncode != 0
    assert "must hold one training file of gsm8k" in done.stdout
