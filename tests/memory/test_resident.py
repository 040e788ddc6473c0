"""The tracker against what the operating system says the process holds: a witness without the tracker's blind spots."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc, json
from pathlib import Path
from misa.integration.chunked_loss import ChunkedLoss
from misa.memory.command import make_optimizer
from misa.memory.step import enable_checkpointing, measure_step, random_batch, training_step
from misa.methods import METHODS, build
from misa.models import build_model, model_config

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

# GaLore is left out: its singular value decomposition has a workspace inside the kernel, which no tracker sees.
# A round outlasts the test, so that both witnesses see a step of the same blocks.
endless = {"budget": 0.1, "interval": 1000, "first_pass": False}
forms = [(name, False) for name in METHODS if not name.startswith("galore")] + [("adamw", True)]
found = {}
for name, is_lean in forms:
    model = build_model(model_config("7m", vocab_size=16000), 0, "bfloat16")
    if is_lean:
        ChunkedLoss(model)
    built = build(name, model, lr=1e-5, options={k: v for k, v in endless.items() if k in METHODS[name].defaults})
    if is_lean:
        enable_checkpointing(built.model)
    built.model.train()
    # A lean step is larger, so that workspaces of kernels stay small beside it on every processor.
    optimizer, batch = make_optimizer(built), random_batch(16000, 48 if is_lean else 8, 128)
    # Makes the optimizer's state; workspaces of the libraries are there for good after the first large step of a shape.
    training_step(built.model, optimizer, random_batch(16000, 1, 16) if found and not is_lean else batch)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    training_step(built.model, optimizer, batch)
    grown = status("VmHWM") - before
    memory = measure_step(built.model, optimizer, batch)
    end = memory.moments["step_end"].by_category
    found[f"{name}{', chunked loss and checkpointing' if is_lean else ''}"] = [
        grown, memory.peak.total_bytes - end["weights"] - end["optimizer"]
    ]
    del model, built, optimizer
    gc.collect()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_tracked_growth_in_a_step_equals_resident_set_growth(repository: Path):
    # Small thresholds make the allocator hand memory back, so that the resident set follows what is live.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=repository, capture_output=True, text=True, check=True
    )
    for name, (resident, tracked) in json.loads(done.stdout.splitlines()[-1]).items():
        assert tracked == pytest.approx(resident, rel=0.01), name
