"""Low-precision weights: master copies, residuals, stochastic rounding, fp16 with a GradScaler."""

import pytest
import torch
from tiny import backward, batch, llama, moved, same, train, weights
from torch import nn

from misa import inner
from misa.gradients import gradient_norm
from misa.inner import FusedAdamW
from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateOptimizer, Settings


def changed_fraction(model, before):
    names = [n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    changed = sum((model.get_parameter(n) != before[n]).sum().item() for n in names)
    return changed / sum(before[n].numel() for n in names)


@pytest.mark.parametrize(("interval", "num_steps"), [(1, 300), (5, 300), (50, 300)])
def test_small_updates_of_bf16_weights_are_not_lost_whatever_the_interval(interval, num_steps):
    """At lr 1e-5 most updates are below the spacing of bf16: the residual carries them from round to round."""
    model = llama(2, torch.bfloat16)
    optimizer = BAdam(model, lr=1e-5, interval=interval, order="ascending")
    full = dict(weights(model))
    for i in range(num_steps):
        # Gradients of one sign, so that what is not lost adds up: 150 steps of 1e-5 cross the spacing of any weight.
        for e in optimizer._on.entries:
            e.param.grad = torch.ones_like(e.param)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.round == (i + 1) // interval
    wide = {n: full[n].float() - num_steps / 2 * 1e-5 for n in full}
    expected = {n: (w.bfloat16() != full[n]).float().mean().item() for n, w in wide.items() if "layers" in n}
    assert min(v for n, v in expected.items() if "norm" not in n) > 0.99
    assert changed_fraction(model, full) > 0.99


def test_short_rounds_without_the_residual_lose_what_it_would_keep():
    def fraction(residual):
        model = llama(2, torch.bfloat16)
        optimizer = BAdam(model, lr=1e-5, interval=1, residual=residual)
        before = weights(model)
        train(model, optimizer, 60)
        return changed_fraction(model, before)

    assert fraction("cpu") > 1.5 * fraction("drop")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_made_again_is_the_one_dropped(dtype):
    model = llama(2, dtype)
    optimizer = BAdam(model, lr=1e-4, interval=2, order="ascending")
    train(model, optimizer, 1)
    backward(model, 1)
    entry = optimizer._on.entries[0]
    with torch.no_grad():
        optimizer._on.step(optimizer._on.with_gradient(), None, None)
    optimizer.zero_grad()
    master = entry.master.clone()
    entry.drop_state(keep_residual=True)
    assert entry.residual.dtype == (torch.int16 if dtype == torch.bfloat16 else torch.bfloat16)
    entry.make_master()
    assert torch.equal(entry.master.to(dtype), entry.param)
    spacing = (entry.master - entry.param.float()).abs().max()
    assert (entry.master - master).abs().max() <= spacing / 128
    assert (entry.master != entry.param.float()).float().mean() > 0.9
    if dtype == torch.bfloat16:
        assert torch.equal(entry.master, master)


def test_residual_of_bf16_gives_the_master_back_bit_for_bit_but_between_two_weights():
    """All lower halves of the bits beside upper ones of every kind: signs, zeros, denormal, largest, infinite."""
    upper = torch.tensor([0x0000, 0x8000, 0x0001, 0x3F80, 0x3F81, 0xBF80, 0x7F7F, 0xFF7F], dtype=torch.int32)
    master = ((upper[:, None] << 16) + torch.arange(2**16, dtype=torch.int32)).view(torch.float32)
    weight = master.bfloat16()
    between = master.view(torch.int32).to(torch.int16) == -(2**15)
    expected = torch.where(between, weight.float(), master)
    residual = inner.cut_residual(master.clone(), weight)
    assert torch.equal(inner.make_master(weight, residual, edited=False), expected)
    assert between.sum() == len(upper)
    again = inner.make_master(weight, residual, edited=True)
    assert torch.equal(again[weight != 0], expected[weight != 0])


def test_residual_of_an_edited_weight_is_forgotten():
    model = llama(2, torch.bfloat16)
    optimizer = BAdam(model, lr=1e-4, interval=1, order="ascending")
    train(model, optimizer, 1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    entry = optimizer._entries[weight]
    assert entry.residual is not None
    with torch.no_grad():
        weight[0], weight[1] = 0.0, 3.0
    entry.make_master()
    assert not entry.master[0].any()
    assert torch.equal(entry.master.bfloat16(), weight)


def test_master_that_fp16_holds_as_zero_is_made_again_by_a_resumed_run():
    def make():
        model = llama(2, torch.float16)
        torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
        return model, BAdam(model, lr=1e-8, interval=1, order="ascending")

    (_, optimizer), (_, other) = make(), make()
    for e in optimizer._on.entries:
        e.param.grad = torch.ones_like(e.param)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    entry = next(e for e in other._entries.values() if e.name == "model.layers.0.self_attn.q_proj.weight")
    entry.make_master()
    assert not entry.param.any()
    assert torch.allclose(entry.master, torch.tensor(-1e-8), rtol=1e-2, atol=0)


def test_fp32_weights_get_no_master_and_are_updated_in_place():
    model = llama(2)
    optimizer = MISA(model, budget=0.3)
    train(model, optimizer, 1)
    assert all(e.master is None and e.target is e.param for e in optimizer._on.entries)


def test_mixed_types_train_together():
    model = llama(2, torch.bfloat16)
    model.model.layers[0].float()
    optimizer = BlockCoordinateOptimizer(model, Settings(order="all", interval=2))
    before = weights(model)
    for i in range(3):
        for e in optimizer._on.entries:
            e.param.grad = torch.full_like(e.param, 1e-2 * (i + 1))
        optimizer.step()
    blocks = {n for b in optimizer.blocks for n, _ in b.params}
    assert moved(before, model) == blocks
    found = optimizer.state_bytes()
    half = sum(b.numel for b in optimizer.blocks) // 2
    assert (found["master"], found["moments"]) == (4 * half, 16 * half)


# ---- the fused rule ------------------------------------------------------------------------------------------------


SHAPES = [(33, 17), (64, 64), (7,), (300, 1001), (3, 5, 9), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [64, 1 << 10, 1 << 18])
@torch.no_grad()
def test_fused_rule_equals_torch_bit_for_bit_for_any_workspace(dtype, chunk, monkeypatch):
    monkeypatch.setitem(inner.CHUNK_NUMEL, "cpu", chunk)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    theirs = [nn.Parameter(p.detach().float().clone()) for p in ours]
    masters = {nn.Parameter(p.detach().float().clone()): p for p in ours} if dtype != torch.float32 else {}
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    rule = FusedAdamW([{"params": list(masters) or ours}], weights=masters, **options)
    expected = torch.optim.AdamW(theirs, fused=True, **options)
    for step in range(5):
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if step == 2 and k == 1 else torch.randn(p.shape).to(dtype)
            q.grad = None if p.grad is None else p.grad.float()
        rule.update(found_inf=torch.tensor(0.0))
        expected.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q.to(dtype))
    for p, q in zip(rule.param_groups[0]["params"], theirs, strict=True):
        for key, value in expected.state[q].items():
            assert torch.equal(rule.state[p][key], value), key


@torch.no_grad()
def test_fused_rule_follows_weights_whose_memory_is_not_in_order():
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(40, 30).bfloat16().t())
    assert not ours.is_contiguous()
    master = nn.Parameter(ours.detach().float())
    theirs = nn.Parameter(ours.detach().float().contiguous())
    rule = FusedAdamW([master], weights={master: ours}, lr=1e-2, weight_decay=0.0)
    expected = torch.optim.AdamW([theirs], fused=True, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(30, 40).bfloat16()
        theirs.grad = ours.grad.float()
        rule.update()
        expected.step()
    assert torch.equal(ours, theirs.bfloat16())


@torch.no_grad()
def test_fused_rule_changes_nothing_where_told_so():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    rule = FusedAdamW([p], lr=1.0)
    rule.update(found_inf=torch.tensor(1.0))
    assert torch.equal(p, torch.ones(4))
    assert rule.state[p]["step"] == 0
    assert not rule.state[p]["exp_avg"].any()


@torch.no_grad()
def test_workspace_is_small_whatever_the_model_and_has_no_memory_between_steps():
    weight = nn.Parameter(torch.zeros(5000, 1000, dtype=torch.bfloat16))
    master = nn.Parameter(weight.detach().float())
    rule = FusedAdamW([master], weights={master: weight}, lr=1e-3)
    weight.grad = torch.ones_like(weight)
    for _ in range(2):
        rule.update()
        assert [room.numel() * 4 for room in rule._plan.rooms] == [16 << 20]
        assert [room.untyped_storage().nbytes() for room in rule._plan.rooms] == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        *[(50, 70), (128,), (4, 30, 20), (), (300, 400), (90000,), (4, 200, 100)],
        *[(700, 700), (800, 700), (600000,), (4, 400, 400)],  # around what is worth a second thread
    ],
)
def test_gradient_norm_is_as_exact_as_its_type(dtype, shape):
    torch.manual_seed(1)
    grad = torch.randn(shape).to(dtype)
    expected = grad.double().norm().item()
    assert gradient_norm(grad) == pytest.approx(expected, rel=2**-8 if dtype == torch.bfloat16 else 1e-5)


def test_gradient_norm_of_scaled_fp16_does_not_overflow():
    grad = torch.full((4, 1000), 6e4, dtype=torch.float16)
    assert gradient_norm(grad) == pytest.approx(6e4 * 4000**0.5, rel=1e-2)


# ---- GradScaler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [MISA, LISA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler_gives_the_weights_and_scores_of_unscaled_training(preset, dtype):
    """A power of two as scale is exact in floating point, so nothing may differ but the rounding of fp16."""
    # A large epsilon, so that the smallest gradients, which fp16 rounds away, do not decide the sign of a step.
    options = {"interval": 2, "eps": 1e-2, **({"budget": 0.3} if preset is MISA else {"num_blocks": 1})}
    model, twin = llama(2, dtype), llama(2, dtype)
    optimizer, plain = preset(model, **options), preset(twin, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    for i in range(5):
        scaler.scale(model(**batch(i)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        train(twin, plain, 1, first=i)
    if dtype == torch.float32:
        assert same(model, twin)
    else:
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)
    assert optimizer.active == plain.active
    assert optimizer.scores == pytest.approx(plain.scores, rel=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler_skips_an_overflow_and_recovers(dtype):
    model = llama(2, dtype)
    optimizer = MISA(model, budget=0.3, interval=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    before = weights(model)
    for i in range(2):
        loss = scaler.scale(model(**batch(i)).loss)
        (loss * (float("inf") if i == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert bool(moved(before, model)) == (i == 1)
    assert optimizer.num_skipped_steps == 1
    assert scaler.get_scale() == 2.0**3


@pytest.mark.parametrize("clips", [True, False])
def test_grad_scaler_with_unscaling_and_clipping_works_on_fp32_weights(clips):
    model, twin = llama(2), llama(2)
    optimizer, plain = (MISA(m, budget=0.3, interval=2, probe_every=1) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    for i in range(4):
        scaler.scale(model(**batch(i)).loss).backward()
        scaler.unscale_(optimizer)
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        train(twin, plain, 1, first=i)
    assert same(model, twin)
    assert optimizer.scores == pytest.approx(plain.scores, rel=1e-5)


def test_grad_scaler_step_without_gradients_is_a_no_op():
    model = llama(2)
    optimizer = MISA(model, budget=0.3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones((), requires_grad=True))
    before = weights(model)
    scaler.step(optimizer)
    assert moved(before, model) == set()
    assert optimizer.num_skipped_steps == 0


def test_grad_scaler_with_step_in_backward_is_refused_in_words():
    model = llama(2)
    optimizer = MISA(model, budget=0.3, step_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch(0)).loss).backward()
    with pytest.raises(ValueError, match="step_in_backward=True: cannot be driven by a GradScaler"):
        scaler.step(optimizer)


def test_probe_of_scaled_gradients_is_unscaled():
    model, twin = llama(2), llama(2)
    optimizer, plain = (MISA(m, budget=0.3, interval=2, probe_every=1) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    for i in range(4):
        scaler.scale(model(**batch(i)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        train(twin, plain, 1, first=i)
    assert same(model, twin)
    assert optimizer.scores == pytest.approx(plain.scores, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scaler_drives_an_inner_optimizer_of_the_callers(dtype):
    model, twin = llama(2, dtype), llama(2, dtype)
    optimizer, plain = (MISA(m, budget=0.3, interval=2, lr=1.0, inner=torch.optim.SGD) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    for i in range(4):
        scaler.scale(model(**batch(i)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        train(twin, plain, 1, first=i)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    if dtype != torch.float16:
        assert same(model, twin)


def test_residual_is_used_up_by_the_master():
    model = llama(2, torch.bfloat16)
    optimizer = BAdam(model, interval=1, order="ascending")
    train(model, optimizer, 3)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert optimizer.state_bytes()["residual"] == 2 * layer
