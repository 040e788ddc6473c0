"""The prediction beside what CUDA's allocator counts, where there is a GPU."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from misa.integration.chunked_loss import ChunkedLoss
from misa.memory.command import make_optimizer
from misa.memory.fake import ATTENTION, register_attention
from misa.memory.models import configuration
from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario
from misa.memory.step import checkpoint_layers, random_batch, training_step
from misa.methods import METHODS, build


def allocated(scenario):
    """Largest `max_memory_allocated` of a step in the steady state."""
    register_attention()
    config = configuration(scenario.model)
    options = {"dtype": torch.bfloat16, "attn_implementation": ATTENTION}
    model = AutoModelForCausalLM.from_config(config, **options).to("cuda").train()
    if scenario.loss == "chunked":
        ChunkedLoss(model)
    interval = {"interval": 10**6} if "interval" in METHODS[scenario.method].defaults else {}
    built = build(scenario.method, model, lr=1e-5, options={**scenario.options, **interval})
    checkpoint_layers(built.model, scenario.checkpointing)
    optimizer = make_optimizer(built)
    batch = random_batch(config.vocab_size, scenario.batch_size, scenario.seq_len)
    batch = {name: tensor.to("cuda") for name, tensor in batch.items()}
    for _ in range(2):
        training_step(built.model, optimizer, batch)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training_step(built.model, optimizer, batch)
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adamw", "lora", "badam", "misa"])
@pytest.mark.parametrize(("checkpointing", "loss"), [(0, "full"), (ALL_LAYERS, "chunked")])
def test_prediction_is_near_what_cuda_allocates(method, checkpointing, loss, record_property):
    scenario = Scenario("130m", method, batch_size=4, seq_len=512, checkpointing=checkpointing, loss=loss)
    predicted = Laboratory(scenario).measure().peak.total_bytes
    measured = allocated(scenario)
    record_property("predicted_bytes", predicted)
    record_property("measured_bytes", measured)
    # Workspaces of matrix products are allocated there, some 8 to 32 MiB, and not predicted.
    assert abs(measured - predicted) < 0.03 * measured + 40 * 2**20
