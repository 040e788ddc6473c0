"""What others do to weights, gradients and the model between two steps, or before and after there is an optimizer."""

import gc
import warnings
import weakref

import pytest
import torch
from tiny import backward, llama, moved, names_on, same, train, weights
from torch import nn

from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateDesentOptimizer, ScoreRule

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def there_and_back(model):
    """As `model.cpu()` and `model.cuda()` do: the parameters stay, their memory does not."""
    for p in model.parameters():
        p.data = p.data.clone()


def through_a_vector(model):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())


@dtypes
@pytest.mark.parametrize("change", [there_and_back, through_a_vector])
@pytest.mark.parametrize(
    "make",
    [
        lambda m: MISA(m, lr=1e-2, budget=0.3, interval=6),
        lambda m: MISA(m, lr=1e-2, budget=0.3, interval=6, variant="paper"),
        lambda m: MISA(m, lr=1e-2, budget=0.3, interval=6, step_in_backward=True),
        lambda m: LISA(m, lr=1e-2, num_blocks=1, interval=6),
        lambda m: BAdam(m, lr=1e-2, interval=6),
    ],
    ids=["misa", "paper", "in backward", "lisa", "badam"],
)
def test_weights_that_get_other_memory_in_a_round_train_on_bit_for_bit(make, change, dtype):
    model, twin = llama(dtype=dtype), llama(dtype=dtype)
    optimizer, other = make(model), make(twin)
    train(model, optimizer, 3)
    train(twin, other, 3)
    change(model)
    train(model, optimizer, 5, first=3)
    train(twin, other, 5, first=3)
    assert same(model, twin)


def test_weight_of_another_type_than_its_moments_is_refused_in_words():
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=6)
    train(model, optimizer, 2)
    model.to(torch.bfloat16)
    backward(model, 2)
    with pytest.raises(ValueError, match=r"a weight became torch.bfloat16 .* make the optimizer after that"):
        optimizer.step()
    optimizer.zero_grad()
    train(model.to(torch.float32), optimizer, 2)


@dtypes
def test_weights_put_in_place_of_the_active_ones_are_taken_over(dtype):
    model = llama(dtype=dtype)
    optimizer = MISA(model, lr=0.0, budget=0.3, interval=6)
    train(model, optimizer, 2)
    for p in model.parameters():
        p.data = torch.full_like(p, 0.5)
    train(model, optimizer, 2, first=2)
    assert all((p == 0.5).all() for p in model.parameters())


@pytest.mark.parametrize("make", [MISA, LISA, BAdam])
def test_gradient_that_becomes_nan_after_the_backward_pass_skips_the_step(make):
    model = llama()
    optimizer = make(model, lr=1e-2)
    train(model, optimizer, 1)
    before = weights(model)
    backward(model, 1)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.fill_(float("nan"))
    optimizer.step()
    assert moved(before, model) == set()
    assert optimizer.num_skipped_steps == 1


@pytest.mark.parametrize("make", [MISA, LISA, BAdam])
def test_gradient_cleared_of_nan_after_the_backward_pass_is_applied(make):
    model = llama()
    optimizer = make(model, lr=1e-2)
    before = weights(model)
    backward(model, 0, scale=float("nan"))
    for p in model.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_(nan=1.0)
    optimizer.step()
    assert moved(before, model) >= names_on(optimizer)
    assert optimizer.num_skipped_steps == 0
    assert all(torch.isfinite(torch.tensor(list(optimizer.scores.values()))))


def test_gradient_that_was_discarded_leaves_no_trace():
    def run(discard):
        model = llama()
        optimizer = MISA(model, lr=1e-2, budget=0.3, interval=4, probe_every=1)
        for i in range(8):
            if discard:
                backward(model, 100 + i, scale=float("nan"))
                optimizer.zero_grad(set_to_none=False)
            backward(model, i)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.scores, optimizer.active, optimizer.num_skipped_steps

    assert run(True) == run(False)


def test_model_is_as_found_once_its_optimizer_is_forgotten():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    optimizer = MISA(model, budget=0.3, interval=2)
    train(model, optimizer, 3)
    assert {n: p.requires_grad for n, p in model.named_parameters()} != before
    del optimizer
    gc.collect()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_optimizer_forgotten_after_its_successor_was_made_changes_nothing():
    model = llama()
    optimizer = MISA(model, budget=0.3, seed=1)
    optimizer = MISA(model, budget=0.3, seed=2)
    gc.collect()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names_on(optimizer)


def test_layers_frozen_after_an_optimizer_was_forgotten_stay_frozen():
    peft = pytest.importorskip("peft")
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=1)
    train(model, optimizer, 2)
    del optimizer
    gc.collect()
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    optimizer = MISA(adapted, budget=0.5, interval=1)
    assert all("lora" in b.name for b in optimizer.blocks)
    before = weights(adapted)
    train(adapted, optimizer, 4)
    assert all("lora" in name for name in moved(before, adapted))


def test_parameter_that_was_off_for_good_can_be_added_later():
    model = llama()
    optimizer = MISA(model, lr=1e-2, budget=0.3)
    train(model, optimizer, 1)
    before = weights(model)
    optimizer.add_param_group({"params": [("lm_head.weight", model.lm_head.weight)]})
    train(model, optimizer, 1, first=1)
    assert "lm_head.weight" in moved(before, model)


def test_groups_may_hand_over_their_parameters_one_by_one():
    model, twin = llama(), llama()
    optimizer = MISA([{"params": model.named_parameters(), "lr": 1e-2}], budget=0.3, interval=2)
    other = MISA([{"params": list(twin.named_parameters()), "lr": 1e-2}], budget=0.3, interval=2)
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert same(model, twin)


def test_two_parameters_with_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two of them have the name 'model.embed_tokens.weight'"):
        MISA([*llama(seed=0).named_parameters(), *llama(seed=1).named_parameters()], budget=0.3)


def test_loss_that_does_not_reach_the_active_blocks_is_said_once():
    model = llama()
    optimizer = MISA(model, budget=0.3, interval=3)
    unused = nn.Parameter(torch.ones(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(25):
            unused.sum().backward()
            optimizer.step()
    assert len(caught) == 1
    assert "10 steps in a row found no gradient" in str(caught[0].message)
    assert optimizer.active[0] in str(caught[0].message)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"variant": "paper"}, {}),
        ({}, {"variant": "paper"}),
        ({"inner": torch.optim.SGD}, {}),
        ({"state_format": "bf16"}, {}),
        ({"state_format": "fp32"}, {"state_format": "8bit"}),
    ],
)
def test_state_of_another_inner_rule_is_refused(before, after):
    model = llama(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.3, **before)
    train(model, optimizer, 1)
    other = MISA(llama(dtype=torch.bfloat16), budget=0.3, **after)
    with pytest.raises(ValueError, match="inner optimizer and state_format were"):
        other.load_state_dict(optimizer.state_dict())


def test_state_with_other_groups_is_refused():
    def grouped(*layers):
        named = list(llama().named_parameters())
        fast = [(n, p) for n, p in named if any(layer in n for layer in layers)]
        slow = [(n, p) for n, p in named if not any(layer in n for layer in layers)]
        return MISA([{"params": fast, "lr": 0.1}, {"params": slow, "lr": 1e-6}], budget=0.3)

    saved = grouped("layers.0", "layers.1").state_dict()
    grouped("layers.0", "layers.1").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"group 0 of parameters differs in \d+, first model.layers.1"):
        grouped("layers.0").load_state_dict(saved)


def test_rate_held_in_a_tensor_is_not_shared_with_the_state_it_was_loaded_from():
    optimizer, other = MISA(llama(), budget=0.3), MISA(llama(), budget=0.3)
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"].fill_(5.0)
    assert other.param_groups[0]["lr"] == 1.0


def test_default_device_is_not_where_the_draw_is_made():
    model = llama()
    with torch.device("meta"):
        optimizer = MISA(model, budget=0.3, interval=1)
        assert BAdam(llama(), interval=1).active
    train(model, optimizer, 2)


def test_budget_takes_the_place_of_a_number_of_layers():
    assert len(LISA(llama(6), budget=0.6, always_on=()).active) > 2
    assert len(BAdam(llama(6), budget=0.6).active) > 1
    with pytest.raises(ValueError, match="budget and num_blocks: give exactly one"):
        MISA(llama(), budget=0.5, num_blocks=1)
    with pytest.raises(ValueError, match=r"beta=0\.5: give it in score="):
        MISA(llama(), score=ScoreRule(beta=0.9), beta=0.5)


def test_scheduler_of_the_authors_base_optimizer_sets_the_rate():
    model = llama()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = BlockCoordinateDesentOptimizer(base, list(model.named_parameters()), interval_steps=3)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=1, gamma=0.5)
    for i in range(2):
        base.step()  # without gradients, for the scheduler's sake
        train(model, optimizer, 1, first=i)
        schedule.step()
    train(model, optimizer, 1, first=2)
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 4
    plain = torch.optim.Rprop(model.parameters(), lr=1e-3)  # which knows no weight decay
    assert BlockCoordinateDesentOptimizer(plain, list(model.named_parameters())).param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("options", [{"variant": "paper"}, {"inner": torch.optim.SGD}])
def test_distributed_checkpoint_between_two_rounds_loads_without_inner_state(tmp_path, options):
    from misa.distributed import checkpoint

    model, twin = llama(), llama(seed=1)
    optimizer = MISA(model, budget=0.3, interval=3, **options)
    other = MISA(twin, budget=0.3, interval=3, **options)
    train(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process needs no process group
        checkpoint.save(tmp_path / "saved", model, optimizer)
        checkpoint.load(tmp_path / "saved", twin, other)
    train(model, optimizer, 4, first=3)
    train(twin, other, 4, first=3)
    assert same(model, twin)


def test_probe_of_a_forgotten_optimizer_leaves_the_gradients_of_others_alone():
    model = llama()
    optimizer = MISA(model, budget=0.1, interval=1, probe_every=1)
    train(model, optimizer, 2)
    del optimizer
    gc.collect()
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("in_backward", [False, True])
def test_masters_of_a_forgotten_optimizer_are_freed(in_backward):
    model = llama(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.3, step_in_backward=in_backward)
    train(model, optimizer, 2)
    masters = [weakref.ref(e.master) for e in optimizer._on.entries]
    del optimizer
    gc.collect()
    assert not any(master() is not None for master in masters)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_model_is_freed_with_its_last_name_and_waits_for_no_collector(checkpointed):
    model = llama()
    if checkpointed:
        model.gradient_checkpointing_enable()
    optimizer = MISA(model, budget=0.3, interval=2)
    train(model, optimizer, 3)
    gc.collect()
    gc.disable()
    try:
        parameters = [weakref.ref(p) for p in model.parameters()]
        del optimizer, model
        assert not any(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()


def test_forgotten_optimizer_that_steps_in_the_backward_pass_steps_no_more():
    model = llama()
    optimizer = MISA(model, budget=0.3, step_in_backward=True)
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    before = weights(model)
    backward(model, 1)
    assert moved(before, model) == set()
    assert all(p.grad is not None for p in model.parameters())


def test_idle_steps_between_others_are_not_warned_of():

    model = llama()
    optimizer = MISA(model, budget=0.3, interval=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(12):
            optimizer.step()
            train(model, optimizer, 1, first=i)
