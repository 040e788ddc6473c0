"""Settings of the engine that are refused, and budgets that some blocks cannot meet."""

import warnings

import pytest
import torch
from tiny import llama
from torch import nn

from misa.optimizer import MISA, Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"interval": 0}, "interval=0"),
        ({"interval": 2.5}, "interval=2.5"),
        ({"interval": None}, "interval=None: must be a whole number"),
        ({"round_warmup": None}, "round_warmup=None: must be a whole number"),
        ({"eta": -1.0}, "eta=-1.0"),
        ({"eta": "big"}, "eta='big'"),
        ({"eta": "auto", "variant": "official"}, "eta='auto': a score with clip=5.0 needs a number"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"variant": "mine"}, "variant='mine'"),
        ({"granularity": "module"}, "granularity='module'"),
        ({"order": "random"}, "order='random'"),
        ({"state_policy": "lose"}, "state_policy='lose'"),
        ({"state_format": "fp8"}, "state_format='fp8'"),
        ({"state_format": "inner"}, "state_format='inner'"),
        ({"residual": "gpu"}, "residual='gpu'"),
        ({"always_on": ("heads",)}, "'heads'"),
        ({"always_on": ("head",), "always_on_lr": -1.0}, "always_on_lr=-1.0"),
        ({"always_on_lr": 1e-3}, "needs always_on"),
        ({"sample_last": -1}, "sample_last=-1"),
        ({"probe_every": -1}, "probe_every=-1"),
        ({"probe_every": 1, "step_in_backward": True}, "probe_every"),
        ({"effective_share": 0.0}, "effective_share=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": "1e-4"}, "lr='1e-4': must be a number"),  # what YAML makes of 1e-4
        ({"lr": None}, "lr=None: must be a number"),
        ({"budget": "0.03"}, "budget='0.03'"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"inner": torch.optim.SGD, "state_format": "bf16"}, "state_format='bf16'"),
        ({"inner_kwargs": {"amsgrad": True}}, "inner_kwargs={'amsgrad': True}: needs an inner optimizer"),
        ({"num_block": 3}, "unknown option num_block"),
    ],
)
def test_setting_out_of_range_raises_naming_field_and_value(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        MISA(llama(1), **options)


def test_both_or_neither_of_budget_and_num_blocks_raises():
    with pytest.raises(ValueError, match="exactly one"):
        Settings()
    with pytest.raises(ValueError, match="exactly one"):
        Settings(budget=0.1, num_blocks=1)


def test_budget_that_no_block_fits_raises_with_the_smallest_that_works():
    with pytest.raises(ValueError, match=r"budget=0\.001: no block fits") as caught:
        MISA(llama(), budget=0.001)
    least = float(str(caught.value).rpartition(" ")[2])
    with pytest.warns(UserWarning, match="would admit all") as named:
        assert MISA(llama(), budget=least).active
    enough = float(str(named[0].message).partition("; budget=")[2].partition(" ")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MISA(llama(), budget=enough)
    with pytest.raises(ValueError, match="no block fits"):
        MISA(llama(), budget=least * 0.99)


def test_blocks_that_never_fit_are_named():
    with pytest.warns(UserWarning, match=r"will never be trained.*gate_proj.*would admit all"):
        optimizer = MISA(llama(), budget=0.035)
    assert optimizer.active


def test_budget_is_a_share_of_what_the_caller_left_trainable():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    optimizer = MISA(model, budget=0.25)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert 0 < optimizer.active_numel <= adapters / 4


def test_budget_that_floating_point_cuts_short_admits_its_block():
    model = nn.Sequential(nn.Linear(29, 1, bias=False), nn.Linear(71, 1, bias=False))
    with pytest.warns(UserWarning, match="would admit all"):
        assert MISA(model, budget=0.29).active == ("0",)


@pytest.mark.parametrize(("options", "message"), [({"eta": float("inf")}, "eta=inf"), ({"eps": -1e-8}, "eps=-1e-08")])
def test_infinite_eta_and_negative_eps_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MISA(llama(1), **options)
