"""Wrappers under which switching blocks would be silently wrong are refused in words."""

import pytest
import torch
from tiny import llama
from torch import nn

from misa.integration.trainer import TrainerOptimizer
from misa.optimizer import MISA, partition


@pytest.mark.support("Refused before the first step, in words that name what works", "FSDP1 (flat parameters)")
def test_fsdp1_is_refused_in_words_that_name_what_works(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = FullyShardedDataParallel(llama(1), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FSDP1.*DistributedDataParallel.*fully_shard"):
            MISA(model, budget=0.3)
    finally:
        torch.distributed.destroy_process_group()


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's class, which needs a GPU build to install; only its name is looked at."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.support("Refused before the first step, in words that name what works", "DeepSpeed ZeRO")
def test_deepspeed_is_refused_in_words_that_name_what_works():
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO.*DistributedDataParallel.*fully_shard"):
        MISA(DeepSpeedEngine(llama(1)), budget=0.3)


@pytest.mark.support("Refused before the first step, in words that name what works", "DeepSpeed ZeRO")
def test_parameters_partitioned_by_zero_3_are_refused():
    model = llama(1)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        MISA(model, budget=0.3)


def test_refused_model_is_left_as_it_was():
    model = DeepSpeedEngine(llama(1))
    with pytest.raises(ValueError, match="DeepSpeed"):
        MISA(model, budget=0.3)
    assert all(p.requires_grad for p in model.parameters())
    assert len(partition(model)) == 7


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_trainer_under_accelerates_deepspeed_or_fsdp_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=rf"^{name}: .*use torchrun with the plain model"):
        TrainerOptimizer()(llama(1), lr=1e-3, budget=0.3)
