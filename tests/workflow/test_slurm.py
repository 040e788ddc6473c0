"""The profile for a SLURM cluster: what it runs, by a dry run, and the job that the plugin submits for it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

# Stands for the cluster: notes what is submitted, and refuses it.
SBATCH = """#!/bin/sh
echo "$@" >> "{notes}"
cat >> "{notes}"
echo "no cluster here" >&2
exit 1
"""


@pytest.fixture(scope="module")
def profile(repository: Path) -> Path:
    return repository / "workflows" / "profiles" / "slurm"


def test_jobs_of_several_gpus_run_a_process_for_each(snakemake, tiny: Path, profile: Path, tmp_path: Path) -> None:
    words = ("-n", "--printshellcmds", "--configfile", tiny, "--workflow-profile", profile, "--config", "gpus=2")
    done = snakemake(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    commands = [line for line in done.stdout.splitlines() if line.startswith("Shell command: ")]
    training = [line for line in commands if re.search(r"-m misa\.(train|pretrain) ", line)]
    assert len(training) == 4
    for line in training:
        assert line.startswith("Shell command: torchrun --standalone --nproc_per_node=2 -m misa.")
        assert "--per_device_train_batch_size 2 " in line  # of the 4 in the configuration
    assert sum("torchrun" in line for line in commands) == 4


def test_sequences_that_processes_cannot_share_are_refused(snakemake, tiny: Path, tmp_path: Path) -> None:
    done = snakemake("-n", "--configfile", tiny, "--config", "gpus=7", folder=tmp_path)
    assert done.returncode != 0
    assert "gpus is 7: it must divide gradient_accumulation_steps or per_device_train_batch_size" in done.stdout


def test_submitted_job_asks_the_cluster_for_gpus_memory_and_time(
    snakemake, tiny: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, commands = tmp_path / "submitted.txt", tmp_path / "commands"
    commands.mkdir()
    scripts = {"sbatch": SBATCH.format(notes=notes), "sacctmgr": "#!/bin/sh\necho us\n", "sacct": "#!/bin/sh\n"}
    for name, script in scripts.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    corpus = tmp_path / "results" / "tiny" / "data" / "corpus"
    corpus.mkdir(parents=True)
    for name in ("train.jsonl", "validation.jsonl", "digest.json"):
        (corpus / name).touch()
    account = ("--default-resources", "slurm_account=us", "slurm_partition=fast", "mem_mb=8000", "runtime=60")
    account += ("--slurm-init-seconds-before-status-checks", "1")  # instead of 40
    words = ("--configfile", tiny, "--workflow-profile", profile, "--retries", "0", *account, "--config", "gpus=2")
    target = "results/tiny/runs/pretrain-misa/result.json"
    done = snakemake(target, *words, folder=tmp_path)
    assert "no cluster here" in done.stdout, done.stdout
    asked = " ".join(shlex.split(notes.read_text()))
    for option in ("-A us", "-p fast", "--mem 64000", "-t 2880", "--gpus=2"):
        assert option in asked, asked
    assert re.search(r"--cpus-per-(task|gpu)=", asked), asked
    assert "--executor slurm-jobstep" in asked, asked
