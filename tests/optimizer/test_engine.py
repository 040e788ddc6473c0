"""Rounds, what is on and what is off, and the steps in between."""

import random

import numpy
import pytest
import torch
from tiny import backward, batch, llama, moved, names_on, train, weights

from misa.optimizer import LISA, MISA, BAdam

PRESETS = [
    (MISA, {"budget": 0.2, "interval": 3}),
    (MISA, {"budget": 0.2, "interval": 3, "variant": "paper"}),
    (MISA, {"budget": 0.2, "interval": 3, "variant": "official"}),
    (BAdam, {"interval": 3}),
    (LISA, {"interval": 3, "num_blocks": 1}),
]
IDS = ["misa", "paper", "official", "badam", "lisa"]


# ---- rounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("preset", [MISA, BAdam, LISA])
def test_round_lasts_exactly_interval_steps(preset, interval):
    model = llama()
    optimizer = preset(model, interval=interval, **({"budget": 0.2} if preset is MISA else {}))
    for step in range(1, 3 * interval + 1):
        before = optimizer.active
        train(model, optimizer, 1, first=step)
        assert optimizer.round == step // interval
        if step % interval:
            assert optimizer.active == before


def test_official_first_pass_takes_one_step_a_round_and_then_falls_back_into_step():
    """The authors' code draws anew each step until all blocks were used, then at multiples of the interval."""
    model = llama()
    optimizer = MISA(model, budget=0.25, interval=10, variant="official")
    used, ends, all_used = set(optimizer.active), [], None
    for step in range(1, 31):
        finished = optimizer.round
        train(model, optimizer, 1, first=step)
        if optimizer.round > finished:
            ends.append(step)
            used |= set(optimizer.active)
        if all_used is None and len(used) == 21:
            all_used = step
    assert 1 < all_used < 10
    assert ends == [*range(1, all_used + 1), 10, 20, 30]


@pytest.mark.parametrize(("preset", "options"), PRESETS, ids=IDS)
def test_off_blocks_are_bit_identical_and_without_gradient_or_state(preset, options):
    model = llama()
    optimizer = preset(model, weight_decay=0.1, **options)
    for i in range(8):
        before, on = weights(model), {e.name for e in optimizer._on.entries}
        backward(model, i)
        assert {n for n, p in model.named_parameters() if p.grad is not None} == on
        assert {n for n, p in model.named_parameters() if p.requires_grad} == on
        optimizer.step()
        assert moved(before, model) == on
        held = {n for n, p in model.named_parameters() if optimizer.state.get(p)}
        assert held <= {e.name for e in optimizer._on.entries}
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_every_block_trains_once_drawn_and_none_before():
    model = llama()
    start, optimizer = weights(model), MISA(model, budget=0.1, interval=1, eta=0.0)
    ever: set[str] = set()
    for i in range(60):
        ever |= names_on(optimizer)
        train(model, optimizer, 1, first=i)
        assert moved(start, model) == ever
    assert len(ever) == 21


@pytest.mark.parametrize(("preset", "options"), [(MISA, {"budget": 0.2}), (LISA, {"num_blocks": 1})])
def test_active_numel_counts_what_is_trained(preset, options):
    model = llama()
    optimizer = preset(model, **options)
    assert optimizer.active_numel == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_probabilities_are_named_and_sum_to_one():
    model = llama()
    optimizer = MISA(model, budget=0.2, interval=2, eta="auto")
    train(model, optimizer, 6)
    assert list(optimizer.probabilities) == [b.name for b in optimizer.blocks]
    assert sum(optimizer.probabilities.values()) == pytest.approx(1)
    assert len(set(optimizer.probabilities.values())) > 1


def test_scores_are_the_mean_squared_norm_per_parameter_of_the_round():
    model, twin = llama(), llama()
    optimizer = MISA(model, budget=1.0, interval=3, lr=0.0, beta=0.0)
    squares = dict.fromkeys((b.name for b in optimizer.blocks), 0.0)
    for i in range(3):
        twin.zero_grad()
        backward(twin, i)
        for name in squares:
            squares[name] += twin.get_submodule(name).weight.grad.double().square().sum().item() / 3
    train(model, optimizer, 3)
    sizes = {b.name: b.numel for b in optimizer.blocks}
    assert optimizer.scores == pytest.approx({n: s / sizes[n] for n, s in squares.items()}, rel=1e-5)


# ---- steps ---------------------------------------------------------------------------------------------------------


def run_accumulated(num_micro, clip=None, num_steps=7, **options):
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=3, **options)
    for step in range(num_steps):
        rows = batch(step)["input_ids"].chunk(num_micro)
        for tokens in rows:
            (model(input_ids=tokens, labels=tokens).loss / num_micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_accumulation_over_micro_batches_equals_one_batch():
    whole, one = run_accumulated(1)
    parts, four = run_accumulated(4)
    assert one.round == four.round == 2
    assert one.active == four.active
    assert four.scores == pytest.approx(one.scores, rel=1e-4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_the_first_round_do_not_depend_on_clipping(dtype):
    def scores(clip):
        model = llama(dtype=dtype)
        optimizer = MISA(model, budget=0.3, interval=1, lr=1e-3)
        backward(model, 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return optimizer.scores

    assert scores(1e-3) == scores(1e9)
    assert max(scores(1e9).values()) > 0


def test_nan_in_one_gradient_skips_the_whole_step_and_counts_it():
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=2)
    train(model, optimizer, 1)
    before, one = weights(model), optimizer._on.entries[0].param
    handle = one.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan")))
    backward(model, 1)
    handle.remove()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.num_skipped_steps == 1
    assert moved(before, model) == set()
    assert optimizer.round == 1  # a skipped step is a step of the round
    assert all(0 <= score < float("inf") for score in optimizer.scores.values())
    train(model, optimizer, 1, first=2)
    assert moved(before, model)
    assert optimizer.num_skipped_steps == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_loss_that_is_not_finite_leaves_weights_and_moments_alone(bad):
    model = llama(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.3, interval=5)
    train(model, optimizer, 2)
    before, held = weights(model), optimizer.state_dict()
    backward(model, 2, scale=bad)
    optimizer.step()
    optimizer.zero_grad()
    assert moved(before, model) == set()
    assert optimizer.num_skipped_steps == 1
    for name, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, held["state"][name][key]), (name, key)


def test_step_without_gradients_is_a_no_op():
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=2)
    before = weights(model)
    for _ in range(5):
        optimizer.step()
    assert moved(before, model) == set()
    assert optimizer.round == 0
    assert optimizer.num_skipped_steps == 0
    assert sum(optimizer.state_bytes().values()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_active_parameter_without_gradient_is_skipped(dtype):
    model = llama(dtype=dtype)
    optimizer = MISA(model, budget=1.0, interval=5, weight_decay=0.1)
    before = weights(model)
    lonely = "model.layers.1.mlp.up_proj.weight"
    for i in range(4):
        backward(model, i)
        if i != 2:
            model.get_parameter(lonely).grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert (lonely in moved(before, model)) == (i >= 2)
    assert optimizer.num_skipped_steps == 0
    assert model.get_parameter(lonely) in optimizer.state


def test_outside_edits_of_weights_are_followed():
    model = llama(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.3, interval=50, lr=0.0)
    train(model, optimizer, 2)
    weight = optimizer._on.entries[0].param
    kept = optimizer._on.entries[0].master[1:].clone()
    with torch.no_grad():
        weight[0] = 0
    train(model, optimizer, 2)
    assert not weight[0].any()
    assert torch.equal(optimizer._on.entries[0].master[1:], kept)


def test_loaded_weights_are_followed():
    model, other = llama(dtype=torch.bfloat16), llama(dtype=torch.bfloat16, seed=7)
    optimizer = MISA(model, budget=0.3, interval=50, lr=0.0)
    train(model, optimizer, 2)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, 1)
    assert moved(weights(other), model) == set()


def test_closure_is_called_with_gradients_and_its_value_returned():
    model = llama()
    optimizer = MISA(model, budget=0.3)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch(0)).loss
        loss.backward()
        return loss

    before = weights(model)
    first = optimizer.step(closure)
    assert first.item() == pytest.approx(llama()(**batch(0)).loss.item())
    assert moved(before, model)


def test_training_leaves_the_global_random_state_alone():
    model = llama(dtype=torch.bfloat16)
    torch.manual_seed(11)
    numpy_state = numpy.random.get_state
    before = torch.get_rng_state(), random.getstate(), numpy_state()[1].tolist()
    for options in ({}, {"state_format": "bf16"}, {"variant": "official"}, {"probe_every": 1}):
        optimizer = MISA(model, budget=0.2, interval=2, **options)
        train(model, optimizer, 5)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.release()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy_state()[1].tolist())


def test_seed_decides_the_draws_alone():
    def draws(seed, global_seed):
        model = llama()
        torch.manual_seed(global_seed)
        optimizer = MISA(model, budget=0.2, interval=1, lr=0.0, seed=seed)
        seen = []
        for i in range(6):
            seen.append(optimizer.active)
            train(model, optimizer, 1, first=i)
        return seen

    assert draws(3, 0) == draws(3, 1)
    assert draws(3, 0) != draws(4, 0)


def test_release_frees_everything_and_restores_requires_grad():
    model = llama(dtype=torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    optimizer = MISA(model, budget=0.3, interval=2)
    train(model, optimizer, 3)
    optimizer.release()
    assert sum(optimizer.state_bytes().values()) == 0
    assert not optimizer.state
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not model._forward_pre_hooks


# ---- step_in_backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("preset", "options"), PRESETS, ids=IDS)
def test_step_in_backward_equals_ordinary_stepping_and_frees_gradients(preset, options, dtype):
    model, twin = llama(dtype=dtype), llama(dtype=dtype)
    ordinary = preset(twin, weight_decay=0.1, **options)
    optimizer = preset(model, weight_decay=0.1, step_in_backward=True, **options)
    for i in range(8):
        backward(model, i)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        train(twin, ordinary, 1, first=i)
        assert optimizer.active == ordinary.active
    assert optimizer.scores == ordinary.scores
    assert moved(weights(twin), model) == set()


def test_step_in_backward_refuses_accumulation_in_words():
    model = llama()
    optimizer = MISA(model, budget=0.3, step_in_backward=True)
    backward(model, 0)
    assert optimizer.active
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        backward(model, 1)


def test_step_in_backward_skips_a_gradient_that_is_not_finite():
    model = llama()
    optimizer = MISA(model, budget=0.3, step_in_backward=True)
    before = weights(model)
    backward(model, 0, scale=float("nan"))
    optimizer.step()
    assert moved(before, model) == set()
    assert optimizer.num_skipped_steps == 1


# ---- probe ---------------------------------------------------------------------------------------------------------


def test_probe_refreshes_all_scores_and_leaves_no_inactive_gradient():
    model, twin = llama(), llama()
    optimizer = MISA(model, budget=0.1, interval=2, lr=0.0, beta=0.0, probe_every=1)
    for i in range(2):
        backward(model, i)
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names_on(optimizer)
        drawn = optimizer.active
        optimizer.step()
        optimizer.zero_grad()
    assert all(not p.requires_grad for n, p in model.named_parameters() if n not in names_on(optimizer))
    backward(twin, 1)
    for block in optimizer.blocks:
        if block.name not in drawn:
            expected = twin.get_submodule(block.name).weight.grad.square().mean().item()
            assert optimizer.scores[block.name] == pytest.approx(expected, rel=1e-5)
    assert all(score > 0 for score in optimizer.scores.values())


def test_probe_holds_one_gradient_at_a_time():
    model = llama(num_layers=4)
    optimizer = MISA(model, budget=0.05, interval=1, probe_every=1)
    off = [p for n, p in model.named_parameters() if p.requires_grad and n not in names_on(optimizer)]
    assert len(off) == 28 - len(names_on(optimizer))
    peaks = []
    for p in off:
        p.register_post_accumulate_grad_hook(lambda _: peaks.append(sum(q.grad is not None for q in off)))
    backward(model, 0)
    assert len(peaks) == len(off)
    assert max(peaks) == 0  # our hook, which runs first, has freed it already


def test_probe_changes_neither_weights_nor_draws_of_inactive_blocks():
    model = llama()
    optimizer = MISA(model, budget=0.1, interval=2, probe_every=2, weight_decay=0.1)
    for i in range(8):
        before, on = weights(model), names_on(optimizer)
        train(model, optimizer, 1, first=i)
        assert moved(before, model) == on


def test_step_in_backward_counts_steps_whose_gradients_were_cleared_first():
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=2, step_in_backward=True)
    for i in range(4):
        backward(model, i)
        optimizer.zero_grad()
        optimizer.step()
    assert optimizer.round == 2
