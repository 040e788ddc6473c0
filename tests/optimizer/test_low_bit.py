"""Moments of 8 bits, by torchao's optimizers as the inner rule."""

import io

import pytest
import torch
from tiny import llama, same, train

from misa.optimizer import MISA

optim = pytest.importorskip("torchao.optim", reason="needs torchao: pip install 'misa-optimizer[low-bit]'")

BLOCK = 256  # elements that share a scale


def make(dtype=torch.float32, **options):
    model = llama(2, dtype, hidden_size=64, intermediate_size=128)
    chosen = {"budget": 0.4, "interval": 2, "lr": 1e-3, "inner": optim.AdamW8bit} | options
    return model, MISA(model, **chosen)


def quantized_bytes(numel):
    """Of one moment: codes, scales, and a table of 256 numbers; small tensors stay what they are."""
    return numel + numel // BLOCK * 4 + 256 * 4 if numel >= 4096 else None


@pytest.mark.parametrize(("dtype", "state_format"), [(torch.float32, "master"), (torch.bfloat16, "inner")])
def test_state_bytes_count_quantized_moments_as_they_lie_in_memory(dtype, state_format):
    model, optimizer = make(dtype, state_format=state_format)
    train(model, optimizer, 1)
    held = [e.param for e in optimizer._on.entries]
    size = torch.finfo(dtype).bits // 8
    expected = sum(2 * (quantized_bytes(p.numel()) or size * p.numel()) for p in held)
    assert optimizer.state_bytes() == {"master": 0, "moments": expected, "residual": 0, "kept": 0}
    assert any(p.numel() >= 4096 for p in held)


def test_masters_of_bf16_weights_may_have_quantized_moments():
    model, optimizer = make(torch.bfloat16)
    train(model, optimizer, 1)
    numel = optimizer.active_numel
    assert optimizer.state_bytes()["master"] == 4 * numel
    assert optimizer.state_bytes()["moments"] < 4 * numel


def test_eight_bit_moments_follow_the_schedule_and_lower_the_loss():
    model, optimizer = make(lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = []
    for step in range(4):
        batch = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        assert optimizer._on._inners == [] or float(optimizer._on._inners[0].param_groups[0]["lr"]) == pytest.approx(
            3e-3 / (1 + step)
        )
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_run_with_eight_bit_moments_resumes_bit_for_bit():
    model, optimizer = make(interval=3)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 4, first=4)
    file.seek(0)
    again, other = make(interval=3, seed=9)
    weights, state = torch.load(file)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, other, 4, first=4)
    assert same(model, again)
