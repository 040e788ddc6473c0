"""The whole chain at its smallest: killed once, finished by the same command, then frozen and drawn from the cache."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from misa.figures import FIGURES
from misa.results import read_curves, read_result
from misa.results.pages import PAGES

pytestmark = pytest.mark.slow

RUNS = {
    "pretrain-adamw": "pretrain",
    "pretrain-misa": "pretrain",
    "finetune-misa": "finetune",
    "finetune-lora": "finetune",
}


def make_base_model(folder: Path) -> None:
    """Two million random weights and a tokenizer of 300 tokens, in place of the model that would be fetched."""
    from misa.data.corpus import train_tokenizer
    from misa.models import build_model, model_config

    tokenizer = train_tokenizer(
        ["Below is an instruction that describes a task: mother, father, sister, brother."], 300
    )
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build_model(model_config("2m", vocab_size=len(tokenizer), **tokens), seed=0, dtype="bfloat16")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def kill_once_training(command: list[str], folder: Path, timeout_s: float = 120) -> None:
    """Start the chain and kill snakemake as soon as a run has begun; the run itself goes on without its parent."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + timeout_s
        while not any((folder / "scratch" / "tiny").glob("*/run.json")):
            assert process.poll() is None, "the chain ended before a run began"
            assert time.monotonic() < deadline, "no run began"
            time.sleep(0.1)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def study(tmp_path_factory, repository: Path, tiny: Path) -> tuple[Path, str]:
    """A folder with the finished study, and what snakemake printed while finishing it."""
    folder = tmp_path_factory.mktemp("study")
    make_base_model(folder / "results" / "inputs" / "models" / "tiny")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(repository / "Snakefile")]
    command += ["--directory", str(folder), "--cores", "2", "--configfile", str(tiny)]
    kill_once_training(command, folder)
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "results" / "tiny" / "tables" / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_run_has_a_result(study) -> None:
    folder = study[0] / "results" / "tiny"
    for run, kind in RUNS.items():
        result = read_result(folder / "runs" / run)
        assert (result.run, result.kind) == (run, kind)
        assert result.method == run.partition("-")[2]
        assert result.metrics["eval_loss"] > 0
        assert result.provenance.package_digest
        assert result.provenance.machine.num_threads >= 1
        assert {point.metric for point in read_curves(folder / "runs" / run)} >= {"train_loss", "eval_loss"}
    digests = {read_result(folder / "runs" / run).provenance.data_digest for run in RUNS}
    assert len(digests) == 2, "runs of one kind train on the same data"
    assert not list((study[0] / "scratch" / "tiny").glob("*/checkpoint-*")), "finished runs keep no checkpoints"


def test_every_model_is_scored(study) -> None:
    folder = study[0] / "results" / "tiny" / "evaluations"
    for run in ["base", *RUNS]:
        result = read_result(folder / run)
        task = "perplexity" if run.startswith("pretrain") else "misa_family"
        assert result.kind == "evaluate"
        assert result.config["base_run"] == ("" if run == "base" else run)
        assert result.metrics[f"{task}/num_documents"] == (8 if task == "perplexity" else 12)
        assert json.loads((folder / run / "lm_eval.json").read_text())["results"].keys() == {task}


def test_tables_hold_every_run(study) -> None:
    folder = study[0]
    rows = table(folder, "runs")
    names = {(row["kind"], row["run"]) for row in rows}
    assert names >= {(kind, run) for run, kind in RUNS.items()}
    assert {row["run"] for row in table(folder, "scores")} == {"base", *RUNS}
    assert {row["run"] for row in table(folder, "convergence")} == set(RUNS)
    assert {row["method"] for row in table(folder, "memory")} == {"adamw", "misa"}
    assert {row["snapshot"] for row in table(folder, "variance")} == {"pretrain-misa", "pretrain-misa-3"}
    assert table(folder, "gradient_norms")
    scores = (folder / "results" / "tiny" / "tables" / "scores.md").read_text()
    assert "MISA" in scores
    assert "LoRA" in scores


def test_figures_and_report_are_there(study) -> None:
    folder = study[0] / "results"
    # The figures of full-size models are a target of their own at this scale (`memory_grid.in_all`).
    # So are those of a study of one question.
    for name in (name for name in FIGURES if name != "ablation" and not name.startswith("memory_")):
        assert (folder / "tiny" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "tiny" / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    report = (folder / "tiny" / "report.html").read_text()
    for name in ["convergence.png", *(f"{page}.html" for page in PAGES)]:
        assert name in report


def test_run_leaves_committed_results_alone(study) -> None:
    made = {path.name for path in study[0].iterdir()} - {".snakemake"}
    assert made == {"results", "scratch"}


def test_second_run_does_nothing(study, snakemake, tiny: Path) -> None:
    folder = study[0]
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}
    done = snakemake("--cores", "2", "--configfile", tiny, folder=folder)
    assert done.returncode == 0, done.stdout
    assert "Nothing to be done" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")} == before


def test_longer_run_is_planned_anew_with_what_follows(study, snakemake, tiny: Path, repository: Path) -> None:
    sheet = (repository / "tests" / "workflow" / "tiny.tsv").read_text()
    changed = sheet.replace("--method lora --lora_r 4", "--method lora --lora_r 8")
    assert changed != sheet
    (study[0] / "changed.tsv").write_text(changed)
    words = ("-n", "--configfile", tiny, "--config", "sheet=changed.tsv")
    done = snakemake(*words, folder=study[0])
    (study[0] / "changed.tsv").unlink()
    assert done.returncode == 0, done.stdout
    assert "fine-tuning finetune-lora" in done.stdout
    assert "scores of finetune-lora" in done.stdout
    assert "finetune-misa " not in done.stdout.replace("scores of finetune-misa", "")
    assert "pre-training" not in done.stdout


def test_frozen_tables_draw_the_same_figures(study, snakemake, tiny: Path) -> None:
    folder = study[0]
    done = snakemake("freeze", "--cores", "2", "--configfile", tiny, folder=folder)
    assert done.returncode == 0, done.stdout
    manifest = json.loads((folder / "paper_figures" / "data" / "MANIFEST.json").read_text())
    assert {row["run"] for row in manifest["runs"]} >= {"base", *RUNS}
    target = "paper_figures/convergence.png"
    done = snakemake(target, "--cores", "2", "--configfile", tiny, "--config", "results=cached", folder=folder)
    assert done.returncode == 0, done.stdout
    assert "fine-tuning" not in done.stdout
    fresh = folder / "results" / "tiny" / "figures" / "convergence.png"
    assert (folder / target).read_bytes() == fresh.read_bytes()
