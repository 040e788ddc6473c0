"""What every torch optimizer does: the same tests on torch's AdamW and on ours."""

import copy
import pickle

import pytest
import torch
from tiny import backward, batch, llama, moved, same, train, weights
from torch.optim import lr_scheduler

from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateOptimizer, Settings

MAKERS = {
    "torch": lambda named, **kw: torch.optim.AdamW(list(named), weight_decay=0.0, **kw),
    "misa": lambda named, **kw: MISA(list(named), budget=0.3, interval=3, **kw),
    "paper": lambda named, **kw: MISA(list(named), budget=0.3, interval=3, variant="paper", **kw),
    "official": lambda named, **kw: MISA(list(named), budget=0.3, interval=3, variant="official", **kw),
    "badam": lambda named, **kw: BAdam(list(named), interval=3, **kw),
    "lisa": lambda named, **kw: LISA(list(named), interval=3, num_blocks=1, **kw),
}
everyone = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@everyone
def test_loss_falls(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(backward(model, 0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


@everyone
def test_deepcopy_continues_alike_and_apart(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    train(model, optimizer, 4)
    twin, copied = copy.deepcopy((model, optimizer))
    before = weights(model)
    train(twin, copied, 4, first=4)
    assert moved(before, model) == set()
    train(model, optimizer, 4, first=4)
    assert same(model, twin)
    assert type(copied) is type(optimizer)


@everyone
def test_pickle_round_trip_continues_alike(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    train(model, optimizer, 4)
    twin, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 4, first=4)
    train(twin, loaded, 4, first=4)
    assert same(model, twin)


@everyone
def test_deepcopy_under_a_scheduler_steps_the_copy(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    lr_scheduler.LinearLR(optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    before = weights(model)
    train(twin, copied, 1)
    assert moved(before, model) == set()
    assert moved(before, twin)


@everyone
def test_step_hooks_are_called_once_a_step_and_see_the_optimizer(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    calls = []
    pre = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    train(model, optimizer, 2)
    pre.remove()
    train(model, optimizer, 1)
    assert calls == [("pre", optimizer), ("post", optimizer)] * 2 + [("post", optimizer)]


@everyone
def test_state_dict_hooks_are_called_and_may_change_the_result(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(state.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert calls == ["pre", 1, "loaded"]
    assert state["mine"] == 1


@everyone
def test_added_group_is_trained_with_its_own_learning_rate(make):
    model = llama()
    head = model.lm_head.weight
    optimizer = make(((n, p) for n, p in model.named_parameters() if p is not head), lr=1e-2)
    train(model, optimizer, 1)
    before = head.detach().clone()
    optimizer.add_param_group({"params": [("lm_head.weight", head)], "lr": 1e-4})
    train(model, optimizer, 4, first=1)
    assert optimizer.param_groups[-1]["lr"] == 1e-4
    assert 0 < (head - before).abs().max() < 1e-2  # at the first group's rate one step would move as far
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [("again", head)]})


def test_added_group_in_the_middle_of_a_round_changes_neither_draw_nor_scores():
    def run(add):
        model = llama()
        head = model.lm_head.weight
        named = [(n, p) for n, p in model.named_parameters() if p is not head]
        optimizer = MISA(named, budget=0.3, interval=3, lr=0.0)
        train(model, optimizer, 1)
        if add:
            optimizer.add_param_group({"params": [("lm_head.weight", head)]})
        train(model, optimizer, 2, first=1)
        return optimizer.scores, optimizer.active

    assert run(True) == run(False)


@everyone
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears(make, set_to_none):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)
    backward(model, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else (g is None or not g.any()) for g in grads)
    assert set_to_none or any(g is not None for g in grads)


@everyone
def test_closure_value_is_returned(make):
    model = llama()
    optimizer = make(model.named_parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch(0)).loss
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure))
    assert optimizer.step() is None


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[1e-2, 1e-3], total_steps=10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_moves_weights_by_the_rates_it_reports_in_every_group(name):
    """The rate used inside a step is that of the weight's group, at every step, switches included."""
    model = llama()
    named = list(model.named_parameters())
    groups = [
        {"params": [x for x in named if "mlp" in x[0]], "lr": 1e-2},
        {"params": [x for x in named if "mlp" not in x[0]], "lr": 1e-3},
    ]
    optimizer = MISA(groups, budget=0.5, interval=2, betas=(0.0, 0.0), eps=0.0)
    scheduler = SCHEDULERS[name](optimizer)
    for i in range(9):
        before = weights(model)
        rates = [group["lr"] for group in optimizer.param_groups]
        # Without averages, epsilon and decay Adam's step is the learning rate itself, up or down.
        for group in optimizer.param_groups:
            group["betas"] = (0.0, 0.0)
        train(model, optimizer, 1, first=i)
        for n, p in model.named_parameters():
            step = (p - before[n]).abs().max().item()
            assert step == 0 or step == pytest.approx(rates["mlp" not in n], rel=1e-2)
        scheduler.step(*([1.0] if name == "plateau" else []))
        if name != "plateau":
            assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_at_full_budget_equal_torch_adamw_bit_for_bit(dtype):
    """With every block on and each group's own lr and decay, a step is torch's fused AdamW (on fp32 masters)."""
    model, twin = llama(dtype=dtype), llama(dtype=dtype)

    def split(m, wrap=lambda n, p: (n, p)):
        named = [(n, p) for n, p in m.named_parameters() if "layers" in n and p.ndim == 2]
        return [
            {"params": [wrap(n, p) for n, p in named if "mlp" in n], "lr": 1e-3, "weight_decay": 0.3},
            {"params": [wrap(n, p) for n, p in named if "mlp" not in n], "lr": 5e-3, "weight_decay": 0.0},
        ]

    masters = {}

    def master(n, p):
        masters[n] = torch.nn.Parameter(p.detach().clone().float())
        return masters[n]

    expected = torch.optim.AdamW(split(twin, master), fused=True)
    optimizer = BlockCoordinateOptimizer(split(model), Settings(order="all", interval=4))
    for i in range(6):
        backward(twin, i)
        for n, p in twin.named_parameters():
            if n in masters:
                masters[n].grad = p.grad.float()
        expected.step()
        twin.zero_grad()
        with torch.no_grad():
            for n, p in masters.items():
                twin.get_parameter(n).copy_(p)
        train(model, optimizer, 1, first=i)
    assert moved(weights(twin), model) == set()


def test_weight_decay_moves_active_weights_alone():
    model, twin = llama(), llama()
    decayed = MISA(model, budget=0.3, interval=2, lr=0.1, weight_decay=0.5, eps=1e30)  # eps leaves the decay alone
    MISA(twin, budget=0.3, interval=2)
    on = {e.name for e in decayed._on.entries}
    train(model, decayed, 1)
    for n, p in model.named_parameters():
        expected = twin.get_parameter(n) * (0.95 if n in on else 1)
        torch.testing.assert_close(p, expected)


def test_model_gets_no_decay_on_parameters_of_one_dimension():
    optimizer = LISA(llama(), weight_decay=0.1)
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in vectors["params"])


def test_always_on_parameters_may_have_a_rate_of_their_own():
    model, twin = llama(), llama()
    optimizer = LISA(model, lr=1e-3, weight_decay=0.1, always_on_lr=1e-2)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert sorted(rates) == [(1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.0), (1e-2, 0.1)]
    always = [p for n, p in model.named_parameters() if ".layers." not in n]
    assert {id(p) for g in optimizer.param_groups if g["lr"] == 1e-2 for p in g["params"]} == {id(p) for p in always}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert sorted(scheduler.get_last_lr()) == [5e-4, 5e-4, 5e-3, 5e-3]
    train(model, optimizer, 3)
    resumed = LISA(twin, lr=1.0, always_on_lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"always_on_lr=0\.01: needs a model; give"):
        LISA(list(llama().named_parameters()), always_on_lr=1e-2)


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW([x for _, x in p]), lambda p: MISA(list(p), budget=0.3)])
def test_copies_have_no_hooks(make):

    model = llama(1)
    optimizer = make(model.named_parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for twin, copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        train(twin, copied, 1)
    assert calls == []
