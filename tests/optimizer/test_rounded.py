"""Weights without master copies: stochastic rounding, moments of fp32, bf16 and 8 bits, work in pieces."""

import io

import pytest
import torch
from tiny import backward, llama, same, train
from torch import nn

from misa import inner, rounded
from misa.memory.tracker import MemoryTracker
from misa.optimizer import MISA, BlockCoordinateOptimizer, Settings
from misa.rounded import BLOCK, RoundedAdamW, round_stochastically_

LARGE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # matrices of 4096 elements and more


def rule(weight, moments, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return RoundedAdamW([weight], generator=generator, moments=moments, **{**inner.ADAM, "lr": 1e-2})


def bf16_weight(*shape):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape).bfloat16())


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    value = torch.full((20000,), 1.0 + 2**-9)  # a quarter of the way between two bf16 numbers
    out = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically_(out, value, generator)
    assert set(out.float().tolist()) == {1.0, 1.0 + 2**-7}
    assert out.float().mean().item() == pytest.approx(1.0 + 2**-9, abs=2e-4)
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), float("-inf")])
    out = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically_(out, exact, generator)
    assert torch.equal(out.float(), exact)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_formats_without_a_master_lose_no_update_on_average(state_format):
    model = llama(2, torch.bfloat16)
    optimizer = BlockCoordinateOptimizer(model, Settings(order="all", interval=50, state_format=state_format), lr=1e-5)
    weight = optimizer._on.entries[0].param
    before = weight.detach().float().clone()
    for _ in range(100):
        for e in optimizer._on.entries:
            e.param.grad = torch.ones_like(e.param)
        optimizer.step()
    change = (weight.detach().float() - before).mean().item()
    assert change == pytest.approx(-100 * 1e-5, rel=0.1)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_formats_without_a_master_lower_the_loss_like_the_one_with(state_format):
    def loss(fmt):
        model = llama(2, torch.bfloat16)
        optimizer = MISA(model, budget=0.4, interval=4, lr=5e-3, state_format=fmt)
        for _ in range(20):
            value = backward(model, 0)
            optimizer.step()
            optimizer.zero_grad()
        return value.item()

    assert loss(state_format) == pytest.approx(loss("master"), abs=0.05)


def test_formats_without_a_master_refuse_fp16_at_construction():
    with pytest.raises(ValueError, match=r"state_format='bf16': needs bf16 or fp32 weights.*float16"):
        MISA(llama(1, torch.float16), budget=0.3, state_format="bf16")


# ---- work in pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [BLOCK, 4 * BLOCK])
def test_pieces_change_nothing_where_the_weight_alone_is_rounded(chunk, monkeypatch):
    weights = [bf16_weight(40, 64), bf16_weight(40, 64)]
    rules = [rule(weight, "fp32") for weight in weights]
    for _ in range(3):
        grad = torch.randn(40, 64).bfloat16()
        for k, (weight, one) in enumerate(zip(weights, rules, strict=True)):
            monkeypatch.setitem(inner.CHUNK_NUMEL, "cpu", chunk if k else 1 << 18)
            weight.grad = grad.clone()
            one.update()
    assert torch.equal(*weights)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(rules[0].state[weights[0]][name], rules[1].state[weights[1]][name])


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_step_makes_copies_of_one_piece_alone(moments, monkeypatch):
    monkeypatch.setitem(inner.CHUNK_NUMEL, "cpu", 1 << 12)
    weight = bf16_weight(1 << 9, 1 << 9)
    one = rule(weight, moments)
    weight.grad = torch.randn(weight.shape).bfloat16()
    one.update()
    tracker = MemoryTracker()
    tracker.watch("weights", [weight, weight.grad, list(one.state[weight].values())])
    held = tracker.live_bytes
    with tracker, tracker.phase("step"):
        one.update()
    assert tracker.peak.total_bytes - held <= 64 * (1 << 12)


def test_weight_whose_memory_is_not_in_order_is_updated():
    weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.bfloat16).t())
    one = rule(weight, "8bit")
    weight.grad = torch.ones(64, 128, dtype=torch.bfloat16)
    one.update()
    assert (weight < 0).all()


# ---- moments of 8 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_codes_are_near_their_value_and_right_on_average(name):
    torch.manual_seed(0)
    value = torch.randn(64 * BLOCK) * torch.logspace(-4, 4, 64).repeat_interleave(BLOCK)
    value = value if name == "exp_avg" else value * value
    levels, generator = rounded._levels(name, value.device), torch.Generator().manual_seed(0)
    mean = torch.zeros_like(value)
    for _ in range(100):
        codes, scale = rounded._encode(value, levels, name == "exp_avg_sq", generator)
        decoded = rounded._decode(codes, scale, levels)
        assert ((decoded / value - 1).abs() < 0.15).all()
        mean += decoded / 100
    assert (mean / value - 1).abs().mean() < 0.01
    zero, _ = rounded._encode(torch.zeros(BLOCK), levels, name == "exp_avg_sq", generator)
    assert not levels[zero.int()].any()


def test_square_far_below_its_block_does_not_become_zero():
    levels = rounded._levels("exp_avg_sq", torch.device("cpu"))
    value = torch.cat([torch.ones(1), torch.full((BLOCK - 1,), 1e-20)])
    codes, scale = rounded._encode(value, levels, True, torch.Generator().manual_seed(0))
    assert (rounded._decode(codes, scale, levels) > 0).all()


def test_eight_bit_moments_take_two_bytes_and_their_scales():
    model = llama(2, torch.bfloat16, **LARGE)
    optimizer = MISA(model, budget=0.4, interval=4, state_format="8bit")
    train(model, optimizer, 1)
    assert optimizer.state_bytes()["moments"] == pytest.approx(optimizer.active_numel * (2 + 8 / BLOCK), rel=0.01)


def test_run_with_eight_bit_moments_resumes_bit_for_bit():
    def make(seed=0):
        model = llama(2, torch.bfloat16, seed, **LARGE)
        return model, MISA(model, budget=0.4, interval=3, lr=1e-3, state_format="8bit")

    model, optimizer = make()
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 4, first=4)
    file.seek(0)
    again, other = make(seed=9)
    weights, state = torch.load(file)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, other, 4, first=4)
    assert same(model, again)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_skipped_step_changes_nothing(moments):
    weight = bf16_weight(64, 64)
    one = rule(weight, moments)
    weight.grad = torch.randn(64, 64).bfloat16()
    one.update()
    before = [weight.detach().clone(), *(value.clone() for value in one.state[weight].values())]
    weight.grad = torch.randn(64, 64).bfloat16()
    one.update(found_inf=torch.tensor(1.0))
    for old, new in zip(before, [weight, *one.state[weight].values()], strict=True):
        assert torch.equal(old, new)


def test_seed_decides_the_rounding():
    def run(seed):
        model = llama(1, torch.bfloat16)
        train(model, MISA(model, budget=1.0, interval=5, state_format="bf16", seed=seed), 2)
        return model

    assert same(run(3), run(3))
    assert not same(run(3), run(4))


def test_eight_bit_moments_of_a_size_that_fills_no_blocks():
    weight = nn.Parameter(torch.zeros(65, 65, dtype=torch.bfloat16))
    one = rounded.RoundedAdamW([weight], generator=torch.Generator(), moments="8bit", **{**inner.ADAM, "lr": 1e-2})
    weight.grad = torch.ones(65, 65, dtype=torch.bfloat16)
    one.update()
    assert (weight < 0).all()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_rounded_rule_unscales(moments):
    found = []
    for scale in (None, torch.tensor(16.0)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 64).bfloat16())
        one = rounded.RoundedAdamW(
            [weight],
            generator=torch.Generator().manual_seed(0),
            moments=moments,
            **{**inner.ADAM, "eps": 1.0, "lr": 1.0},
        )
        weight.grad = torch.randn(64, 64).bfloat16() * (1 if scale is None else scale)
        one.update(grad_scale=scale)
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
def test_fp32_weights_are_not_rounded(state_format):
    model, twin = llama(1), llama(1)
    train(model, MISA(model, budget=1.0, state_format=state_format), 1)
    train(twin, MISA(twin, budget=1.0), 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
