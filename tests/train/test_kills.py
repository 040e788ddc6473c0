"""Twenty kills at random moments of a run, then the same command again: the same weights and the same curves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from misa.results import read_curves
from misa.training.checkpoints import STAGING_FOLDER

from .conftest import outcome

pytestmark = pytest.mark.slow

NUM_KILLS = 20
NUM_STEPS = 60

METHODS = {
    "misa": {"method": "misa", "budget": 0.2, "interval": 4},
    "badam": {"method": "badam", "interval": 4},
    "lisa": {"method": "lisa", "interval": 4, "num_blocks": 1},
    "lora": {"method": "lora", "lora_r": 4, "lora_dropout": 0.2},
}

# Imports the libraries once, then runs each command in a process of its own: what is killed is a real process.
SERVER = """
import gc, json, os, sys, tempfile
import peft, torch, transformers.trainer
from misa import methods, pretrain
from misa.models import build_model, model_config
from misa.training import progress, run, trainer
with tempfile.TemporaryDirectory() as folder:
    # transformers makes tables of its models when it first saves one.
    build_model(model_config("2m", 64), 0).save_pretrained(folder)
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        try:
            status = pretrain.main(order["words"])
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 9
        sys.stderr.flush()
        os._exit(status)
    print(json.dumps({"pid": child}), flush=True)
    print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
"""


class Server:
    """Starts training processes that can be killed without importing everything again."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def start(self, words: list[str], log: Path) -> int:
        """Start a command and return its process."""
        assert self._process.stdin is not None
        log.unlink(missing_ok=True)
        self._process.stdin.write(json.dumps({"words": words, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> int:
        """Wait for the command's end and return its exit status, negative for a signal."""
        return int(self._answer()["status"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def step_reached(log: Path) -> int:
    """The last step that a run has logged since it was started."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("step ")]
    except FileNotFoundError:
        return 0
    return int(lines[-1].split()[1].partition("/")[0]) if lines else 0


def kill(server: Server, process: int, folder: Path, log: Path, step: int, delay_s: float) -> bool:
    """Kill a run some time after one of its steps; False if it had ended."""
    deadline = time.monotonic() + 120
    while step_reached(log) < step and not (folder / "result.json").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    time.sleep(delay_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = server.wait()
    assert status in (0, -signal.SIGKILL), log.read_text()
    return status != 0


@pytest.mark.parametrize("method", METHODS)
def test_twenty_kills_change_nothing(
    server: Server, pretrain_words: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    options = {**METHODS[method], "max_steps": NUM_STEPS, "save_steps": 2, "logging_steps": 1}
    log = tmp_path / "log.txt"
    server.start(pretrain_words("whole", **options), log)
    assert server.wait() == 0, log.read_text()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    step_s = max(point.time_s for point in read_curves(whole)) / NUM_STEPS
    rng = random.Random(method)
    # Each kill waits for a step of the run and then for a random part of a few steps and saves. The last ten steps are
    # left out, so that hardly a run ends before its kill; kills while results are written are tested in `test_resume`.
    moments = sorted((step, rng.uniform(0.0, 5 * step_s)) for step in rng.choices(range(NUM_STEPS - 10), k=NUM_KILLS))
    caught_saving = 0
    for step, delay_s in moments:
        while not kill(server, server.start(pretrain_words("killed", **options), log), killed, log, step, delay_s):
            assert outcome(killed) == outcome(whole)
            shutil.rmtree(killed)
        caught_saving += (killed / "checkpoints" / STAGING_FOLDER).exists()
    print(f"{method}: {caught_saving} of {NUM_KILLS} kills fell into saving")
    server.start(pretrain_words("killed", **options), log)
    assert server.wait() == 0, log.read_text()
    assert "continuing from" in log.read_text()
    assert outcome(killed) == outcome(whole)
