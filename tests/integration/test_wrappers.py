"""Wrappers under which switching blocks would be silently wrong are refused in words."""

import pytest
import torch
from tiny import llama
from torch import nn

from misa.optimizer import MISA, partition


def test_fsdp1_is_refused_in_words_that_name_what_works(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = FullyShardedDataParallel(llama(1), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FSDP1.*train on one device"):
            MISA(model, budget=0.3)
    finally:
        torch.distributed.destroy_process_group()


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's class, which needs a GPU build to install; only its name is looked at."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_deepspeed_is_refused_in_words_that_name_what_works():
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO.*train on one device"):
        MISA(DeepSpeedEngine(llama(1)), budget=0.3)


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
