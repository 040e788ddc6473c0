"""Weights, gradients and moments that lie in memory in different orders, or with gaps, train as any others."""

import pytest
import torch
from tiny import same
from torch import nn

from misa import inner
from misa.optimizer import MISA

CHANNELS_LAST, PLAIN = torch.channels_last, torch.contiguous_format
formats = pytest.mark.parametrize("state_format", ["master", "fp32", "bf16", "8bit"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def convolutions(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleList([nn.Conv2d(16, 32, 3) for _ in range(3)]).to(dtype)


def optimizer_of(model, state_format="master"):
    return MISA(model, lr=1e-2, weight_decay=0.1, num_blocks=2, interval=4, state_format=state_format)


def steps(model, optimizer, first, num_steps, memory_format=None):
    """Gradients as a backward pass leaves them, in the order of their weights, or in an order of their own."""
    for i in range(first, first + num_steps):
        for number, p in enumerate(model.parameters()):
            if p.requires_grad:
                drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + number)).to(p.dtype)
                p.grad = torch.empty_like(p).copy_(drawn)
                if memory_format is not None and p.ndim == 4:
                    p.grad = drawn.to(memory_format=memory_format)
        optimizer.step()
        optimizer.zero_grad()


@formats
@dtypes
@pytest.mark.parametrize("to", [CHANNELS_LAST, PLAIN])
def test_order_in_memory_that_changes_in_a_round_changes_nothing(state_format, dtype, to, monkeypatch):
    if state_format == "master" or (state_format, dtype) == ("fp32", torch.float32):
        # Weights in their usual order are updated piece by piece; random rounding would draw otherwise for pieces.
        monkeypatch.setitem(inner.CHUNK_NUMEL, "cpu", 1024)
    before = PLAIN if to is CHANNELS_LAST else CHANNELS_LAST
    changed, left = (convolutions(dtype).to(memory_format=before) for _ in "ab")
    ours, other = optimizer_of(changed, state_format), optimizer_of(left, state_format)
    steps(changed, ours, 0, 2)
    changed.to(memory_format=to)
    steps(changed, ours, 2, 2)
    steps(left, other, 0, 4)
    assert same(changed, left)


def test_state_goes_on_with_weights_in_another_order():
    model, resumed = convolutions(), convolutions().to(memory_format=CHANNELS_LAST)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 0, 2)
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, 2, 4)
    steps(resumed, again, 2, 4)
    assert same(model, resumed)


@formats
def test_gradient_put_there_in_another_order_is_read_by_its_indices(state_format):
    model, twin = convolutions(), convolutions()
    steps(model, optimizer_of(model, state_format), 0, 3, CHANNELS_LAST)
    steps(twin, optimizer_of(twin, state_format), 0, 3)
    assert same(model, twin)


@formats
@dtypes
def test_weight_that_is_a_slice_trains_alone(state_format, dtype):
    twin = nn.ModuleList([nn.Linear(60, 60, bias=False) for _ in range(3)]).to(dtype)
    sliced = nn.ModuleList([nn.Linear(60, 60, bias=False) for _ in range(3)]).to(dtype)
    wholes = [torch.ones(60, 100, dtype=dtype) for _ in twin]
    for whole, part, layer in zip(wholes, sliced, twin, strict=True):
        whole[:, :60] = layer.weight.detach()
        part.weight = nn.Parameter(whole[:, :60])
    steps(sliced, optimizer_of(sliced, state_format), 0, 6)
    steps(twin, optimizer_of(twin, state_format), 0, 6)
    assert same(sliced, twin)
    assert all(bool((whole[:, 60:] == 1).all()) for whole in wholes)
