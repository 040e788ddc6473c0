"""What snakemake plans, by dry runs: cached and fresh results, and every scale."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from misa.figures import FIGURES
from misa.files import sha256_file
from misa.memory.grid import TABLES as GRID_TABLES
from misa.results.collect import TABLES
from misa.results.pages import PAGES
from misa.results.pages import STUDIES as STUDY_PAGES

SCALES = ("laptop", "workstation", "paper")
# Of the same shape, with sheets of their own for one question each.
STUDIES = ("evidence", "ablation", "tune", "finetune_rates")
COMPUTING = {"base_model", "family", "corpus", "pretrain", "finetune", "memory", "variance", "rate", "collect"}
# Each study of one question has a table, and the ablation a figure.
DRAWING = {"figure": len(FIGURES), "score_tables": 1, "study_table": 3, "report_pages": 1, "all": 1}
OF_VARIANCE = ("gradient_variance", "gradient_norms", "staleness")
OF_GRID = [name for name, table in FIGURES.items() if Path(table).stem in GRID_TABLES]


def planned(output: str) -> dict[str, int]:
    """Number of planned jobs by rule, from the table that a dry run prints."""
    _, found, table = output.partition("Job stats:\n")
    assert found, output
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", table.partition("\n\n")[0], re.MULTILINE))
    return {name: int(count) for name, count in jobs.items() if name != "total"}


def sheet(repository: Path, scale: str, with_real_sets: bool = False) -> list[dict[str, str]]:
    """Rows of a sheet; those on real sets are planned only where there is a folder with them."""
    with (repository / "workflows" / "config" / f"{scale}.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [row for row in rows if with_real_sets or not row.get("data")]


@pytest.mark.parametrize("scale", SCALES)
def test_fresh_plans_the_whole_chain(snakemake, repository: Path, tmp_path: Path, scale: str) -> None:
    done = snakemake("-n", "--quiet", "rules", "--config", f"scale={scale}", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    kinds = Counter(row["kind"] for row in sheet(repository, scale))
    grid = yaml.safe_load((repository / "workflows" / "config" / f"{scale}.yaml").read_text())["memory_grid"]
    drawn = len(FIGURES) - (0 if grid["in_all"] else len(OF_GRID)) - 1
    planned_grid = {"memory_grid_part": len(grid["parts"]), "memory_grid_tables": 1} if grid["in_all"] else {}
    assert planned(done.stdout) == {
        **dict.fromkeys(COMPUTING, 1),
        **planned_grid,
        **kinds,
        "evaluate_pretrained": kinds["pretrain"],
        "evaluate_finetuned": kinds["finetune"] + 1,
        "score_tables": 1,
        "report_pages": 1,
        "all": 1,
        "figure": drawn,
    }


@pytest.mark.parametrize(("scale", "extra"), [("ablation", 1), ("tune", 0)])
def test_study_of_one_question_has_a_table_of_its_own(
    snakemake, repository: Path, tmp_path: Path, scale: str, extra: int
) -> None:
    done = snakemake("-n", "--quiet", "rules", "--config", f"scale={scale}", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    jobs = planned(done.stdout)
    assert jobs["pretrain"] == len(sheet(repository, scale)) > 20
    assert jobs["study_table"] == 1
    assert jobs["figure"] == len(FIGURES) - len(OF_GRID) - 1 + extra


def test_scale_without_pretraining_measures_no_variance(snakemake, repository, tmp_path, sets) -> None:
    words = ("-n", "--quiet", "rules", "--config", "scale=finetune_rates", f"data_dir={sets}")
    done = snakemake(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    jobs = planned(done.stdout)
    rows = sheet(repository, "finetune_rates", with_real_sets=True)
    assert jobs["finetune"] == len(rows) > 40
    assert jobs["study_table"] == 1
    assert "pretrain" not in jobs
    assert "variance" not in jobs
    assert jobs["figure"] == len(FIGURES) - len(OF_GRID) - 1 - len(OF_VARIANCE)


def test_folder_with_real_sets_adds_its_runs(snakemake, repository, tmp_path, sets) -> None:
    words = ("-n", "--quiet", "rules", "--config", "scale=workstation", f"data_dir={sets}")
    done = snakemake(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    rows = sheet(repository, "workstation", with_real_sets=True)
    kinds = Counter(row["kind"] for row in rows)
    # The base model is scored on everything that is fine-tuned on.
    data = {row.get("data") or "family" for row in rows if row["kind"] == "finetune"}
    jobs = planned(done.stdout)
    assert jobs["mix"] == len(data - {"family"}) > 0
    assert jobs.get("family", 0) == len(data & {"family"})
    assert {kind: jobs[kind] for kind in kinds} == kinds
    assert jobs["evaluate_finetuned"] == kinds["finetune"] + len(data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scale=workstation", "data_dir=nowhere"), "data_dir is 'nowhere', which is no folder"),
        (("scale=finetune_rates",), "train on real sets: name their folder by --config data_dir=FOLDER"),
    ],
)
def test_real_sets_that_are_not_there_stop_before_any_job(snakemake, tmp_path: Path, words, message: str) -> None:
    done = snakemake("-n", "--config", *words, folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stdout


def test_memory_grid_needs_no_run(snakemake, repository: Path, tmp_path: Path) -> None:
    done = snakemake("memory_grid", "-n", "--quiet", "rules", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    parts = yaml.safe_load((repository / "workflows" / "config" / "laptop.yaml").read_text())["memory_grid"]["parts"]
    assert planned(done.stdout) == {
        "memory_grid_part": len(parts),
        "memory_grid_tables": 1,
        "figure": len(OF_GRID),
        "memory_grid": 1,
    }


@pytest.mark.parametrize("scale", SCALES)
def test_memory_grid_measures_every_form_of_every_method(repository: Path, scale: str) -> None:
    from misa.memory.grid import EXTRA_PARTS
    from misa.memory.variants import VARIANTS

    grid = yaml.safe_load((repository / "workflows" / "config" / f"{scale}.yaml").read_text())["memory_grid"]
    assert set(grid["parts"]) == {*VARIANTS, *EXTRA_PARTS}
    schema = yaml.safe_load((repository / "workflows" / "schemas" / "config.schema.yaml").read_text())
    allowed = schema["properties"]["memory_grid"]["properties"]["parts"]["items"]["enum"]
    assert sorted(allowed) == sorted(grid["parts"])


def test_default_is_fresh_at_laptop_scale(snakemake, tmp_path: Path) -> None:
    done = snakemake("-n", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "results/laptop/runs/finetune-misa/result.json" in done.stdout


def test_laptop_has_misa_and_its_rivals(repository: Path) -> None:
    names = {row["run"] for row in sheet(repository, "laptop")}
    assert names >= {"pretrain-adamw", "pretrain-misa", "finetune-misa", "finetune-lora"}


def test_cached_plans_no_training(snakemake, tmp_path: Path) -> None:
    others = ("benchmarks/scores", "tune/settings", "finetune_rates/settings")
    tables = [f"{name}.csv" for name in (*TABLES, *GRID_TABLES, *others)]
    for name in {*tables, "MANIFEST.json", "memory_grid.json", "timings.json", *FIGURES.values()}:
        table = tmp_path / "paper_figures" / "data" / name
        table.parent.mkdir(parents=True, exist_ok=True)
        table.touch()
    done = snakemake("-n", "--quiet", "rules", "--config", "results=cached", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert planned(done.stdout) == DRAWING | {"benchmark_tables": 1, "scales_table": 1}


def test_deleted_figure_comes_back_byte_for_byte(snakemake, repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "paper_figures", tmp_path / "paper_figures")
    figure = tmp_path / "paper_figures" / "memory_delta.png"
    figure.unlink()
    words = ("--cores", "2", "--config", "results=cached", "--quiet", "rules")
    done = snakemake("paper_figures/memory_delta.png", *words, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert figure.read_bytes() == (repository / "paper_figures" / "memory_delta.png").read_bytes()


def test_committed_tables_are_those_that_were_collected(repository: Path) -> None:
    manifests = list((repository / "paper_figures" / "data").rglob("MANIFEST.json"))
    assert len(manifests) > 3
    for manifest in manifests:
        tables = json.loads(manifest.read_text())["tables"]
        there = [name for name in tables if (manifest.parent / name).is_file()]
        assert {"settings.csv", "scores.csv"} & set(there)
        for name in there:
            assert sha256_file(manifest.parent / name) == tables[name]["sha256"], manifest.parent / name


@pytest.mark.parametrize("name", ["memory", "memory_fit"])
def test_table_edited_by_hand_is_not_drawn(snakemake, repository: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(repository / "paper_figures", tmp_path / "paper_figures")
    table = tmp_path / "paper_figures" / "data" / f"{name}.csv"
    last = re.findall(r"\d+", table.read_text())[-1]
    head, _, tail = table.read_text().rpartition(last)
    table.write_text(f"{head}{int(last) + 1}{tail}")
    before = (tmp_path / "paper_figures" / f"{name}.png").read_bytes()
    done = snakemake("--cores", "1", "--config", "results=cached", folder=tmp_path)
    assert done.returncode != 0
    assert f"{name}.csv was changed since it was collected" in done.stdout
    assert (tmp_path / "paper_figures" / f"{name}.png").read_bytes() == before


def test_changed_code_of_figures_and_tables_makes_them_anew(snakemake, repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "paper_figures", tmp_path / "paper_figures")
    words = ("-n", "--config", "results=cached")
    for path in (tmp_path / "paper_figures").rglob("*.*"):
        # Tables older than what is made of them, and the code younger than either.
        os.utime(path, (1, 1) if path.parts[-2] != "paper_figures" and path.suffix in (".csv", ".json") else (2, 2))
    # It stands in the table of published numbers.
    (tmp_path / "paper_figures" / "data" / "published" / "memory_compare.csv").touch()
    done = snakemake(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert planned(done.stdout) == DRAWING | {"benchmark_tables": 1, "scales_table": 1}
    drawn = ("figures/memory.py", "figures/memory_sequence.py", "figures/style.py", "dynamics/rate.py")
    laid_out = [f"results/{name}" for name in ("published.csv", "tables.py", "ablation.py", "overview.py", "scales.py")]
    for path in (*drawn, *laid_out):
        assert str(repository / "misa" / path) in done.stdout
    assert "paper_figures/data/published/memory_compare.csv" in done.stdout


@pytest.mark.parametrize(("scale", "shown"), [("laptop", False), ("workstation", True)])
def test_memory_grid_is_shown_where_the_scale_makes_it(snakemake, tmp_path: Path, scale: str, shown: bool) -> None:
    done = snakemake("-n", "-p", "--config", f"scale={scale}", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    for verb in ("tables", "pages"):
        (command,) = re.findall(rf"python -m misa\.results {verb} .*", done.stdout)
        assert (f"--memory_grid results/{scale}/memory_grid " in command) == shown


@pytest.mark.parametrize("words", [(), ("--config", "results=cached")])
def test_another_folder_than_the_checkout_is_refused(repository: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "snakemake", "-n", "--snakefile", str(repository / "Snakefile"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "run snakemake in the checkout, or with --directory" in done.stdout + done.stderr


def test_all_that_the_report_shows_is_planned(snakemake, repository: Path, tmp_path: Path) -> None:
    """The pages are committed nowhere, and the tables beside them are."""
    shutil.copytree(repository / "paper_figures", tmp_path / "paper_figures")
    done = snakemake("-n", "--config", "results=cached", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    for page in (*PAGES, *STUDY_PAGES):
        assert f"results/cached/pages/{page}.html" in done.stdout


def test_every_figure_has_a_caption(repository: Path) -> None:
    captions = (repository / "workflows" / "report" / "figure.rst").read_text()
    assert set(re.findall(r'^  "(\w+)": "', captions, re.MULTILINE)) == set(FIGURES)
    others = list((repository / "workflows" / "report").glob("*.rst"))
    assert len(others) > 5
    assert not [path.name for path in others if len(path.read_text().split()) < 10]


def test_tables_and_figures_are_those_of_the_package(repository: Path) -> None:
    common = (repository / "workflows" / "rules" / "common.smk").read_text()
    drawn = re.search(r"FIGURE_TABLES = (\{.*?\n\})", common, re.DOTALL)
    tables = re.search(r"ALL_TABLES = (\[.*?\])", common, re.DOTALL)
    assert drawn
    assert tables
    assert yaml.safe_load(drawn[1].replace("\n", " ")) == {name: Path(csv).stem for name, csv in FIGURES.items()}
    assert sorted(yaml.safe_load(tables[1].replace("\n", " "))) == sorted(TABLES)


def test_second_run_beside_the_first_is_refused(snakemake, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / ".snakemake").mkdir()
    with (tmp_path / ".snakemake" / "running.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = snakemake("family", "--cores", "1", "--configfile", tiny, folder=tmp_path)
    assert done.returncode != 0
    assert "another snakemake is running" in done.stdout
    assert not (tmp_path / "results" / "tiny" / "data" / "family" / "digest.json").exists()


def test_job_left_over_from_a_killed_run_is_ended(snakemake, tmp_path: Path, tiny: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    left_over = []
    for folder, words in (
        (here, ("misa.train", "results/tiny/runs/finetune-misa")),
        (here, ("misa.train", "results/laptop/runs/finetune-misa")),
        (elsewhere, ("misa.train", "results/tiny/runs/finetune-misa")),
        # By hand, in the same folder.
        (None, ("misa.train", "results/tiny/runs/finetune-misa")),
    ):
        for path in (here, elsewhere):
            path.mkdir(exist_ok=True)
        command = [sys.executable, "-c", "import time; time.sleep(100)", "-m", *words]
        mark = {} if folder is None else {"MISA_WORKFLOW": str(folder)}
        left_over.append(subprocess.Popen(command, cwd=folder or here, env=os.environ | mark))
    try:
        done = snakemake("family", "--cores", "1", "--configfile", tiny, folder=here)
        assert done.returncode == 0, done.stdout
        assert left_over[0].wait(timeout=10) == -signal.SIGKILL
        assert f"ending process {left_over[0].pid}," in done.stdout
        assert [process.poll() for process in left_over[1:]] == [None, None, None]
    finally:
        for process in left_over:
            process.kill()
            process.wait()


@pytest.mark.parametrize("scale", [*SCALES, *STUDIES, "tiny"])
def test_arguments_are_those_of_the_commands(repository: Path, scale: str) -> None:
    """A misspelt option in a configuration must not wait for the job that uses it, hours later."""
    from transformers import HfArgumentParser

    from misa.dynamics.command import VarianceArguments
    from misa.evaluate import EvaluateArguments
    from misa.evaluation.scoring import task_names
    from misa.memory.arguments import MemoryArguments
    from misa.methods import METHODS
    from misa.pretrain import PretrainOptions
    from misa.train import FinetuneOptions
    from misa.training.options import CommonTrainingOptions, MemoryOptions, MethodOptions, RunOptions, parse

    folder = repository / ("tests/workflow" if scale == "tiny" else "workflows/config")
    config = yaml.safe_load((folder / f"{scale}.yaml").read_text())
    paths = {"finetune": ["--model_name_or_path", "m"], "pretrain": []}
    for row in csv.DictReader((folder / f"{scale}.tsv").open(newline=""), delimiter="\t"):
        own = FinetuneOptions if row["kind"] == "finetune" else PretrainOptions
        mix = config["mixes"].get(row.get("data"), {}).get("train", "")
        words = shlex.split(f"{config[row['kind']]['args']} {mix} {row['args']}")
        _, _, method, *_ = parse(
            (RunOptions, own, MethodOptions, MemoryOptions, CommonTrainingOptions),
            # bf16 is refused where there is no GPU, unless the CPU is asked for.
            [*paths[row["kind"]], "--dataset_path", "d", "--output_dir", "o", *words, "--use_cpu", "true"],
            prog="",
            usage="",
            description="",
        )
        assert method.given().keys() <= METHODS[method.method].defaults.keys()
    for arguments in (*config["evaluate"].values(), *(mix["evaluate"] for mix in config["mixes"].values())):
        words = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *shlex.split(arguments)]
        (settings,) = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses(words)
        assert set(settings.tasks.split(",")) <= set(task_names())
    words = ["--model_name_or_path", "m", "--output_dir", "o", *shlex.split(config["memory"]["args"])]
    HfArgumentParser(MemoryArguments).parse_args_into_dataclasses(words)[0].method_names()
    words = ["--model", "m", "--dataset_path", "d", "--output_dir", "o", *shlex.split(config["variance"]["args"])]
    HfArgumentParser(VarianceArguments).parse_args_into_dataclasses(words)
