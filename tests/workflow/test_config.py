"""Configurations and run sheets: what is refused and in which words, and what arrives as it was written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from misa.methods import METHODS


def test_typo_on_the_command_line_stops_before_any_job(snakemake, tmp_path: Path) -> None:
    done = snakemake("--cores", "1", "--config", "reslts=cached", folder=tmp_path)
    assert done.returncode != 0
    assert "'reslts' was unexpected" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("place", "wrong"),
    [((), "reslts"), (("family",), "num_trian"), (("variance",), "run")],
)
def test_typo_in_a_file_stops_before_any_job(snakemake, repository, tmp_path, place, wrong) -> None:
    config = yaml.safe_load((repository / "workflows" / "config" / "laptop.yaml").read_text())
    section = config
    for key in place:
        section = section[key]
    section[wrong] = 1
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(config))
    done = snakemake("--cores", "1", "--configfile", file, folder=tmp_path)
    assert done.returncode != 0
    assert f"'{wrong}' was unexpected" in done.stdout
    assert not (tmp_path / "results").exists()


def test_missing_and_impossible_values_are_named(snakemake, repository: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((repository / "workflows" / "config" / "laptop.yaml").read_text())
    file = tmp_path / "wrong.yaml"
    for change, message in (
        ({"family": {"num_train": 0, "num_test": 1, "seed": 0}}, "0 is less than the minimum of 1"),
        ({"family": {"num_train": 1, "seed": 0}}, "'num_test' is a required property"),
        ({"variance": {"runs": ["pretrain-nobody"], "snapshot_steps": "none", "args": ""}}, "names 'pretrain-nobody'"),
    ):
        file.write_text(yaml.safe_dump(config | change))
        done = snakemake("-n", "--configfile", file, folder=tmp_path)
        assert done.returncode != 0
        assert message in done.stdout


def test_names_that_the_package_does_not_know_are_refused(snakemake, repository: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((repository / "workflows" / "config" / "laptop.yaml").read_text())
    mix = {"sets": ["gsm9k"], "train": "", "evaluate": ""}
    (tmp_path / "mias.tsv").write_text("run\tkind\targs\nnew\tfinetune\t--method mias\n")
    for change, message in (
        ({"memory_grid": config["memory_grid"] | {"parts": ["misa-3x"]}}, "'misa-3x' is not one of"),
        (
            {"memory_grid": config["memory_grid"] | {"model": "llama9"}},
            "memory_grid.model: 'llama9', allowed: llama3",
        ),
        ({"corpus": config["corpus"] | {"packages": ["numpyy"]}}, "corpus.packages: 'numpyy', which is not installed"),
        ({"mixes": {"math": mix}}, "mixes.math.sets: 'gsm9k', allowed: alpaca-gpt4"),
        ({"sheet": "mias.tsv"}, "method of run new: 'mias', allowed: "),
    ):
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config | change))
        done = snakemake("-n", "--configfile", "wrong.yaml", folder=tmp_path)
        assert done.returncode != 0
        assert message in done.stdout
    methods = re.search(r"'mias', allowed: (.*)", done.stdout)
    assert methods
    assert set(methods[1].split(", ")) == set(METHODS)


def test_file_with_a_part_of_the_keys(snakemake, tmp_path: Path) -> None:
    """It replaces those of its scale; with the section `pretrain` it needs every key, and is told so."""
    (tmp_path / "own.yaml").write_text("family: {num_train: 77}")
    done = snakemake("family", "-n", "-p", "--configfile", "own.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "--num_train 77 --num_test 220" in done.stdout
    (tmp_path / "own.yaml").write_text("pretrain: {args: ''}")
    done = snakemake("-n", "--configfile", "own.yaml", folder=tmp_path)
    assert done.returncode != 0
    message = "'scale' is a required property; a file with the section pretrain stands for itself and needs every key"
    assert message in done.stdout


def test_unknown_scale_lists_the_known_ones(snakemake, tmp_path: Path) -> None:
    done = snakemake("-n", "--config", "scale=desktop", folder=tmp_path)
    assert done.returncode != 0
    assert "'desktop', allowed: ablation, evidence, finetune_rates, laptop, paper, tune, workstation" in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetune-new\tfinetun\t--method misa", "'finetun' is not one of"),
        ("base\tfinetune\t--method misa", "does not match"),
        ("base-math\tfinetune\t--method misa", "does not match"),
        ("pretrain-misa\tpretrain\t--method misa", "'pretrain-misa' occurs twice"),
        ("finetune-new\tfinetune", "2 cells, and the first line names 3, with tabs between: run, kind, args"),
        ("new\tfinetune\t--method misa\tmath", "4 cells, and the first line names 3"),
    ],
)
def test_mistake_in_the_sheet_is_named(snakemake, repository, tmp_path, line, message) -> None:
    config = yaml.safe_load((repository / "workflows" / "config" / "laptop.yaml").read_text())
    rows = (repository / config["sheet"]).read_text()
    (tmp_path / "sheet.tsv").write_text(f"{rows}{line}\n")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config | {"sheet": "sheet.tsv"}))
    done = snakemake("-n", "--configfile", tmp_path / "wrong.yaml", folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stdout
    number = len(rows.splitlines()) + 1
    assert "occurs twice" in message or f"sheet.tsv, line {number}" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "sheet.tsv has no rows: it needs a line of names"),
        (b"run\tkind\targs\n# nothing\n", "sheet.tsv has no rows"),
        (b"run\tkind\targs\nnew\tfinetune\t--method \xff\n", "sheet.tsv is no text in UTF-8"),
        (b"run\tkind\targs\twhat\nnew\tfinetune\t\t1\n", "('what' was unexpected); allowed: run, kind, args, data"),
    ],
)
def test_sheet_that_is_none_is_named(snakemake, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sheet.tsv").write_bytes(content)
    done = snakemake("-n", "--config", "sheet=sheet.tsv", folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stdout


def test_words_of_a_row_arrive_as_they_are(snakemake, tmp_path: Path, tiny: Path) -> None:
    """Also those with a number sign or a quotation mark, which a reader of tables could take for something else."""
    config = yaml.safe_load(tiny.read_text())
    words = "--method misa --note a#b --other '#3' --learning_rate 0.5"
    (tmp_path / "own.tsv").write_text(f"# first\nrun\tkind\targs\n\nnew\tfinetune\t{words}\n#last\tpretrain\tx\n")
    own = config | {"sheet": "own.tsv", "variance": config["variance"] | {"runs": []}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    done = snakemake("-n", "-p", "--configfile", tmp_path / "own.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{words} --run new" in done.stdout
    assert "last" not in done.stdout


def test_run_may_be_called_like_a_rule(snakemake, tmp_path: Path, tiny: Path) -> None:
    config = yaml.safe_load(tiny.read_text())
    names = ("memory", "rate", "family", "collect", "score_tables")
    rows = "".join(f"{name}\tfinetune\t--method misa\n" for name in names)
    (tmp_path / "own.tsv").write_text(f"run\tkind\targs\n{rows}")
    own = config | {"sheet": "own.tsv", "variance": config["variance"] | {"runs": []}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    done = snakemake("-n", "-p", "--configfile", tmp_path / "own.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    logs = re.findall(r"> (\S+\.log) 2>&1", done.stdout)
    assert len(logs) > len(names)
    assert len(logs) == len(set(logs))


def test_unknown_data_of_a_row_is_named(snakemake, repository: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((repository / "workflows" / "config" / "laptop.yaml").read_text())
    (tmp_path / "sheet.tsv").write_text("run\tkind\tdata\targs\nnew\tfinetune\tmaths\t--method misa\n")
    mixes = {"math": {"sets": ["gsm8k"], "train": "", "evaluate": ""}}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config | {"sheet": "sheet.tsv", "mixes": mixes}))
    done = snakemake("-n", "--configfile", tmp_path / "wrong.yaml", folder=tmp_path)
    assert done.returncode != 0
    assert "data of run new is 'maths', allowed: math" in done.stdout
