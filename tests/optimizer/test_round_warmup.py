"""What a switch does to the size of a step, under every state policy, and the warm-up that tempers it."""

import pytest
import torch
from tiny import backward, llama, same, train

from misa.optimizer import LISA, MISA, BAdam

INTERVAL, LR = 5, 1e-3


def relative_steps(optimizer, model, num_steps):
    """Root mean square of what each step changed of the active weights, in learning rates."""
    found = []
    for i in range(num_steps):
        before = [(e.param, e.param.detach().clone()) for e in optimizer._on.entries]
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        changes = torch.cat([(p.detach() - old).flatten() for p, old in before])
        found.append(changes.square().mean().sqrt().item() / LR)
    return found


@pytest.mark.parametrize(
    ("policy", "full_after_switch"), [("drop", True), ("reset", True), ("cpu", False), ("keep", False)]
)
def test_step_after_a_switch_is_a_full_one_where_moments_are_new(policy, full_after_switch):
    """Two blocks in turns: the third round has the first block again, with new moments or with its own."""
    model = llama(2)
    optimizer = BAdam(model, lr=LR, order="ascending", interval=INTERVAL, state_policy=policy)
    sizes = relative_steps(optimizer, model, 3 * INTERVAL)
    assert sizes[0] == pytest.approx(1.0, abs=0.01)  # Adam's first step: the sign of the gradient
    assert sizes[INTERVAL] == pytest.approx(1.0, abs=0.01)
    assert (sizes[2 * INTERVAL] > 0.98) == full_after_switch


@pytest.mark.parametrize("policy", ["drop", "reset", "cpu", "keep"])
def test_round_warmup_starts_every_round_with_small_steps(policy):
    model, plain_model = llama(2), llama(2)
    options = {"lr": LR, "order": "ascending", "interval": INTERVAL, "state_policy": policy}
    sizes = relative_steps(BAdam(model, round_warmup=3, **options), model, 3 * INTERVAL)
    plain = relative_steps(BAdam(plain_model, **options), plain_model, 3 * INTERVAL)
    assert sizes[0] == pytest.approx(0.25, abs=0.01)
    for first in (0, INTERVAL, 2 * INTERVAL):
        # The same gradients would give these ratios exactly; weights that moved less have others.
        ratios = [a / b for a, b in zip(sizes[first : first + 3], plain[first : first + 3], strict=True)]
        assert ratios == pytest.approx([0.25, 0.5, 0.75], rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_warmup_is_adamw_started_again_in_every_round_with_a_rising_rate(dtype):
    """Bit for bit, under a schedule of the learning rate of its own."""
    model, twin = llama(1, dtype), llama(1, dtype)
    optimizer = MISA(
        model, lr=LR, budget=1.0, interval=INTERVAL, round_warmup=3, state_policy="reset", residual="drop",
        always_on=("embeddings", "head", "norms"), weight_decay=0.1,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for i in range(3 * INTERVAL):
        train(model, optimizer, 1, first=i)
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == schedule.get_last_lr()  # the schedule's, not the factor's
    for first in range(0, 3 * INTERVAL, INTERVAL):
        params = list(twin.parameters())
        masters = [p.detach().float().clone().requires_grad_() for p in params]
        groups = [
            {"params": [m for m in masters if m.ndim >= 2], "weight_decay": 0.1},
            {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, fused=True)
        for t in range(INTERVAL):
            for group in adamw.param_groups:
                group["lr"] = LR * (1 / (1 + first + t)) * min(1.0, (t + 1) / 4)
            backward(twin, first + t)
            for p, m in zip(params, masters, strict=True):
                m.grad = p.grad.float()
            adamw.step()
            for p, m in zip(params, masters, strict=True):
                p.data.copy_(m.detach())
                p.grad = None
    assert same(model, twin)


@pytest.mark.parametrize("preset", [MISA, LISA])
def test_round_warmup_applied_in_the_backward_pass_and_continued_is_the_same(preset):
    model, twin, third = llama(2), llama(2), llama(2)
    options = {"lr": LR, "interval": INTERVAL, "round_warmup": 2, "num_blocks": 1}
    optimizer, other = preset(model, **options), preset(twin, step_in_backward=True, **options)
    train(model, optimizer, 6)
    third.load_state_dict(model.state_dict())
    again = preset(third, **options)
    again.load_state_dict(optimizer.state_dict())  # within the second warm-up
    train(model, optimizer, 6, first=6)
    train(third, again, 6, first=6)
    train(twin, other, 12)
    assert same(model, twin)
    assert same(model, third)


def test_round_warmup_reaches_another_inner_optimizer():
    model, plain_model = llama(1), llama(1)
    options = {"lr": 0.1, "budget": 0.3, "interval": INTERVAL, "inner": torch.optim.SGD}
    before = [p.detach().clone() for p in model.parameters()]
    for other, warmup in ((model, 4), (plain_model, 0)):
        train(other, MISA(other, round_warmup=warmup, **options), 1)
    for start, p, q in zip(before, model.parameters(), plain_model.parameters(), strict=True):
        assert torch.allclose((p - start) * 5, q - start, atol=1e-6)
    assert not same(model, plain_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_warmup": -1}, "round_warmup=-1: must be a whole number of at least 0"),
        ({"round_warmup": 5, "interval": 5}, "round_warmup=5: must be less than interval=5"),
        ({"round_warmup": 1, "inner": torch.optim.SGD, "inner_kwargs": {"lr": 1.0}}, "round_warmup: acts on"),
    ],
)
def test_round_warmup_out_of_range_raises(options, message):
    with pytest.raises(ValueError, match=message):
        MISA(llama(1), **options)


@pytest.mark.parametrize("inner", [None, torch.optim.SGD])
def test_round_warmup_of_a_rate_held_in_a_tensor_leaves_that_as_it_is(inner):
    rate = 2.0**-10  # exact in fp32
    model, twin = llama(2), llama(2)
    options = {"budget": 0.3, "interval": 4, "round_warmup": 3, "inner": inner}
    optimizer = MISA(model, lr=torch.tensor(rate), **options)
    train(model, optimizer, 9)
    assert optimizer.param_groups[0]["lr"] == rate
    train(twin, MISA(twin, lr=rate, **options), 9)
    assert same(model, twin)
