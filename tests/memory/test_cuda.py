"""The prediction beside what CUDA's allocator counts, where there is a GPU."""

import json

import pytest
import torch

from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario
from misa.pretrain import main as pretrain
from misa.results import read_result

FORMS = [
    {"method": "adamw"},
    {"method": "lora"},
    {"method": "badam"},
    {"method": "misa", "options": {"budget": 0.1}},
    {"method": "misa", "options": {"budget": 0.1}, "state_format": "bf16"},
    {"method": "misa", "options": {"budget": 0.1}, "state_format": "8bit", "lean_activations": True},
]


def workspaces():
    """Bytes that PyTorch keeps for matrix products, once for each thread: that of the program and of the backward."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    factor = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (factor @ factor).sum().backward()
    del factor
    return torch.cuda.memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("fields", FORMS, ids=str)
@pytest.mark.parametrize(("checkpointing", "loss"), [(0, "full"), (ALL_LAYERS, "chunked")])
def test_prediction_is_near_what_cuda_allocates(fields, checkpointing, loss, record_property):
    scenario = Scenario("130m", batch_size=8, seq_len=1024, checkpointing=checkpointing, loss=loss, **fields)
    predicted = Laboratory(scenario).measure().peak.total_bytes + workspaces()
    measured = Laboratory(scenario, real=True, device="cuda").run_on_device(1).peak_bytes
    record_property("predicted_bytes", predicted)
    record_property("measured_bytes", measured)
    assert abs(measured - predicted) < 0.03 * measured + 8 * 2**20


@pytest.mark.gpu
def test_training_inside_a_memory_budget_stays_there(tmp_path):
    text = "\n".join(json.dumps({"text": f"number {i} of many words " * 20}) for i in range(400))
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    words = ["--model_config", "130m", "--dataset_path", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    words += ["--vocab_size", "300", "--max_length", "1024", "--max_eval_tokens", "1024", "--max_steps", "6"]
    words += ["--dtype", "bfloat16", "--per_device_train_batch_size", "8", "--interval", "2", "--budget", "0.1"]
    assert pretrain(["--save_model", "false", "--memory_budget", "2GiB", *words]) == 0
    peaks = read_result(tmp_path / "run").peaks
    difference = peaks["measured_bytes"] - peaks["predicted_bytes"] - workspaces()
    assert abs(difference) < 0.03 * peaks["measured_bytes"] + 8 * 2**20
