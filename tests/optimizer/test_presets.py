"""The published methods: against the slow twin, and every sentence "reduces to X when ..." as a test."""

import copy
import math
import warnings

import pytest
import torch
from tiny import backward, batch, llama, moved, same, train, weights
from torch import nn

from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateOptimizer
from misa.reference import reference_misa

# ---- the slow twin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "default"])
@pytest.mark.parametrize("seed", range(8))
def test_fast_class_equals_the_slow_twin(seed, variant):
    options = {
        "budget": (0.1, 0.2, 0.35, 0.6)[seed % 4],
        "interval": (3, 2, 5)[seed % 3],
        "eta": (0.0, 1e4, 1e5)[seed % 3],
        "beta": (0.8, 0.5)[seed % 2],
        "betas": (0.8, 0.9),
        "lr": 1e-3,
        "eps": 1e-6,
        "seed": seed,
        "variant": variant,
    }
    model, twin = llama(2, seed=seed), llama(2, seed=seed)
    optimizer = MISA(model, **options)
    step = 0
    for finished in reference_misa(twin, lambda i: twin(**batch(i)).loss, num_rounds=4, **options):
        assert optimizer.active == finished.active
        assert optimizer.probabilities == pytest.approx(finished.probabilities, rel=1e-3)
        train(model, optimizer, options["interval"], first=step)
        step += options["interval"]
        assert optimizer.scores == pytest.approx(finished.scores, rel=1e-3)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert moved(weights(llama(2, seed=seed)), model)


def test_twin_in_double_precision_agrees_with_its_own_formulas_on_one_matrix():
    """One block, one step, by hand: m = (1 - b1) g, v = (1 - b2) g^2, both steps along m / sqrt(v + eps)."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    start = model[0].weight.detach().clone()
    x = torch.tensor([[3.0, -4.0]])
    next(reference_misa(model, lambda i: model(x).sum(), 1, interval=1, budget=1.0, lr=0.1, eps=0.0))
    step = 0.1 * 0.1 / math.sqrt(0.001) * torch.tensor([[1.0, -1.0]])  # |m| / sqrt(v) = (1 - b1) / sqrt(1 - b2)
    bounded = 0.1 * 0.1 * torch.tensor([[3.0, -4.0]]) / (math.sqrt(0.001) * torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(model[0].weight.detach(), start - bounded - 9 * step)


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_budget_is_adamw(dtype):
    """With a budget of 100% MISA is torch's fused AdamW, bit for bit (on fp32 masters where weights are bf16)."""
    model, twin = llama(dtype=dtype), llama(dtype=dtype)
    optimizer = MISA(model, budget=1.0, interval=3, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    names = [n for b in optimizer.blocks for n, _ in b.params]
    masters = {n: nn.Parameter(twin.get_parameter(n).detach().float().clone()) for n in names}
    expected = torch.optim.AdamW(masters.values(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    for i in range(9):
        train(model, optimizer, 1, first=i)
        backward(twin, i)
        for n, master in masters.items():
            master.grad = twin.get_parameter(n).grad.float()
        expected.step()
        twin.zero_grad()
        with torch.no_grad():
            for n, master in masters.items():
                twin.get_parameter(n).copy_(master)
    assert optimizer.round == 3
    assert same(model, twin)


def cyclic_loop(model, order, interval, num_steps, lr):
    """Block-coordinate descent over layers as one would write it down: a fresh AdamW for every layer in turn."""
    layers = list(model.model.layers)
    for step in range(num_steps):
        if step % interval == 0:
            layer = layers[order[step // interval % len(layers)]]
            inner = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0, fused=True)
        backward(model, step)
        inner.step()
        model.zero_grad()


@pytest.mark.parametrize(("order", "turns"), [("ascending", [0, 1, 2]), ("descending", [2, 1, 0])])
def test_layer_blocks_drawn_in_a_cycle_are_badam(order, turns):
    """With layers as blocks and a cyclic draw the engine is BAdam."""
    model, twin = llama(), llama()
    optimizer = BAdam(model, lr=1e-3, interval=2, order=order)
    train(model, optimizer, 9)
    cyclic_loop(twin, turns, 2, 9, lr=1e-3)
    assert same(model, twin)


def test_misa_with_badams_settings_is_badam():
    """MISA with layer blocks, a cyclic draw and one block a round is BAdam."""
    model, twin = llama(), llama()
    options = {"granularity": "layer", "order": "ascending", "num_blocks": 1}
    train(model, MISA(model, interval=2, **options), 7)
    train(twin, BAdam(twin, interval=2, order="ascending"), 7)
    assert same(model, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_badam_of_the_package_index_does_the_same_but_for_its_faults(dtype):
    """Step for step equal to `badam` 1.4, allowing for what it gets wrong.

    - its first block gets K - 1 steps, so ours starts one step into the round;
    - weight decay given by the user is replaced by the optimizer's default, so both are 0 here;
    - what a bf16 weight cannot hold of its master is thrown away at each switch, so residual="drop";
    - it makes masters of fp32 weights too, which changes nothing but the memory.
    """
    from badam import BlockOptimizer

    interval = 3
    model, twin = llama(dtype=dtype), llama(dtype=dtype)
    optimizer = BAdam(model, lr=1e-3, interval=interval, order="ascending", residual="drop")
    optimizer._step_in_round = optimizer._num_steps = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = BlockOptimizer(
            base_optimizer=torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0, fused=True),
            named_parameters_list=list(twin.named_parameters()),
            switch_block_every=interval,
            switch_mode="ascending",
        )
    for i in range(11):
        train(model, optimizer, 1, first=i)
        backward(twin, i)
        theirs.step()
        twin.zero_grad()
        assert same(model, twin), i
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in twin.named_parameters() if p.requires_grad
    }


def test_uniform_layers_with_embeddings_and_head_always_on_are_lisa():
    """With layers as blocks, a uniform draw, and embeddings and head always on, the engine is LISA."""
    model, twin = llama(4), llama(4)
    optimizer = LISA(model, lr=1e-3, interval=2, num_blocks=2, seed=4)
    others = [twin.model.embed_tokens, twin.model.norm, twin.lm_head]
    always = torch.optim.AdamW([p for m in others for p in m.parameters()], lr=1e-3, weight_decay=0.0, fused=True)
    inner, drawn, kept = {}, set(), 0
    for i in range(12):
        if i % 2 == 0:
            before = drawn
            drawn = {int(name.rpartition(".")[2]) for name in optimizer.active}
            kept += len(before & drawn)
            inner = {
                k: inner[k]
                if k in before
                else torch.optim.AdamW(twin.model.layers[k].parameters(), lr=1e-3, weight_decay=0.0, fused=True)
                for k in drawn
            }
        assert len(drawn) == 2
        backward(twin, i)
        for step in (always, *inner.values()):
            step.step()
        twin.zero_grad()
        train(model, optimizer, 1, first=i)
    assert same(model, twin)
    assert kept  # some layer was drawn twice in a row and kept its moments


def draws(num_rounds, **options):
    model = llama()
    optimizer = MISA(model, interval=1, lr=0.0, num_blocks=1, **options)
    seen = []
    for i in range(num_rounds):
        train(model, optimizer, 1, first=i % 3)
        seen.append(optimizer.active[0])
    return seen, optimizer


def test_eta_zero_is_uniform():
    """With eta = 0 every block is drawn alike, whatever the gradients: the draws are those of the uniform order."""
    seen, optimizer = draws(30, eta=0.0)
    assert set(optimizer.probabilities.values()) == {1 / 21}
    assert len(set(optimizer.scores.values())) > 1
    assert seen == draws(30, order="uniform")[0]


def test_large_eta_is_greedy():
    """With a large eta the block of the largest score is drawn every time."""
    seen, optimizer = draws(40, eta=1e12, probe_every=1)
    best = max(optimizer.scores, key=optimizer.scores.get)
    assert optimizer.probabilities[best] == 1
    assert seen[-1] == best
    assert len(set(seen[5:])) <= 3


def test_eta_auto_keeps_the_effective_number_of_blocks():
    _, optimizer = draws(25, eta="auto", effective_share=0.4, probe_every=1)
    p = torch.tensor(list(optimizer.probabilities.values()))
    assert (1 / p.square().sum()).item() == pytest.approx(0.4 * 21, rel=1e-3)


# ---- variants and defaults -----------------------------------------------------------------------------------------


def test_paper_drops_the_state_every_round_also_of_a_block_drawn_twice():
    model = llama(1)
    optimizer = MISA(model, budget=1.0, interval=2, variant="paper")
    train(model, optimizer, 2)
    assert sum(optimizer.state_bytes().values()) == 0
    assert len(optimizer.active) == 7


def test_paper_without_line_16_stops_where_the_inner_steps_end():
    plain, full = llama(1), llama(1)
    option = {"budget": 1.0, "interval": 2, "variant": "paper"}
    train(plain, MISA(plain, inner_kwargs={"momentum_step": False}, **option), 2)
    train(full, MISA(full, **option), 2)
    assert moved(weights(plain), full)


def test_default_keeps_the_moments_of_a_block_drawn_twice_in_a_row():
    model = llama(1)
    optimizer = MISA(model, budget=1.0, interval=2)
    train(model, optimizer, 5)
    assert {int(optimizer.state[e.param]["step"]) for e in optimizer._on.entries} == {5}


def test_official_scores_are_those_of_the_authors_formula():
    """Mean norm over the interval, EMA 0.8 with its compounding correction, exp(min(5, eta G^2))."""
    model = llama()
    optimizer = MISA(model, budget=1.0, interval=4, eta=3.0, variant="official", lr=0.0)
    norms = dict.fromkeys((b.name for b in optimizer.blocks), 0.0)
    g, twin, lengths = dict(norms), llama(), []
    step = 0
    for n in range(1, 4):
        length, finished = 0, optimizer.round
        cur = dict.fromkeys(norms, 0.0)
        while optimizer.round == finished:
            twin.zero_grad()
            backward(twin, step)
            for name in cur:
                cur[name] += twin.get_submodule(name).weight.grad.norm().item() / 4  # over the interval, always
            train(model, optimizer, 1, first=step)
            step, length = step + 1, length + 1
        lengths.append(length)
        g = {name: (0.2 * cur[name] + 0.8 * g[name]) / (1 - 0.8**n) for name in g}
        weight = {name: math.exp(min(5.0, 3.0 * x * x)) for name, x in g.items()}
        total = sum(weight.values())
        assert optimizer.probabilities == pytest.approx({k: w / total for k, w in weight.items()}, rel=1e-4)
    assert lengths == [4, 4, 4]


def test_unknown_option_is_refused_and_the_allowed_are_named():
    with pytest.raises(ValueError, match=r"unknown option intervall: allowed are .*interval"):
        MISA(llama(1), intervall=3)


@pytest.mark.parametrize("preset", [MISA, BAdam, LISA])
def test_settings_of_a_preset_are_readable_and_frozen(preset):
    optimizer = preset(llama(), num_blocks=1)
    assert optimizer.settings.interval == {MISA: 50, BAdam: 50, LISA: 20}[preset]
    with pytest.raises(AttributeError):
        optimizer.settings.interval = 3


# ---- inner optimizers ----------------------------------------------------------------------------------------------

INNERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Muon, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.NAdam, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "kwargs"), INNERS, ids=[i[0].__name__ for i in INNERS])
def test_inner_optimizer_steps_as_it_does_alone_and_its_state_is_freed(inner, kwargs, dtype):
    model, twin = llama(dtype=dtype), llama(dtype=dtype)
    optimizer = MISA(model, budget=0.3, interval=3, lr=1e-3, inner=inner, inner_kwargs=kwargs)
    active = optimizer.active
    masters = {n: nn.Parameter(twin.get_submodule(n).weight.detach().float().clone()) for n in active}
    alone = inner(masters.values(), lr=1e-3, weight_decay=0.0, **kwargs)
    for i in range(3):
        train(model, optimizer, 1, first=i)
        backward(twin, i)
        for n, master in masters.items():
            master.grad = twin.get_submodule(n).weight.grad.float()
        alone.step()
        twin.zero_grad()
        with torch.no_grad():
            for n, master in masters.items():
                twin.get_submodule(n).weight.copy_(master)
    for n in active:
        assert torch.equal(model.get_submodule(n).weight, twin.get_submodule(n).weight), n
    on = {e.param for e in optimizer._on.entries}
    for e in optimizer._entries.values():
        assert e.param in on or (e.saved is None and e.master is None)


def test_inner_optimizer_keeps_what_its_own_arguments_say():
    model = llama()
    optimizer = MISA(
        model, budget=0.3, lr=1.0, inner=torch.optim.SGD, inner_kwargs={"lr": 1e-3, "weight_decay": 0.5}, interval=9
    )
    before, entry = weights(model), optimizer._on.entries[0]
    backward(model, 0)
    expected = before[entry.name] - 1e-3 * (entry.param.grad + 0.5 * before[entry.name])
    optimizer.step()
    torch.testing.assert_close(entry.param.detach(), expected)


def test_inner_optimizer_follows_a_scheduler_and_skips_nan():
    model = llama()
    optimizer = MISA(model, budget=0.3, lr=1e-2, inner=torch.optim.SGD)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(model, optimizer, 1, first=1)
    assert moved(before, model) == set()
    optimizer.param_groups[0]["lr"] = 1e-2
    backward(model, 2, scale=float("nan"))
    optimizer.step()
    assert moved(before, model) == set()
    assert optimizer.num_skipped_steps == 1


def test_copy_of_the_settings_makes_the_same_optimizer():
    model, twin = llama(), llama()
    first = MISA(model, budget=0.2, interval=2, eta="auto")
    second = BlockCoordinateOptimizer(twin, copy.deepcopy(first.settings))
    train(model, first, 5)
    train(twin, second, 5)
    assert same(model, twin)


def test_last_momentum_step_reaches_bf16_weights():
    model, plain = llama(1, torch.bfloat16), llama(1, torch.bfloat16)
    options = {"budget": 1.0, "interval": 2, "variant": "paper", "lr": 1e-2}
    full = MISA(model, **options)
    train(model, full, 2)
    train(plain, MISA(plain, inner_kwargs={"momentum_step": False}, **options), 2)
    assert moved(weights(plain), model) == {e.name for e in full._on.entries}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_algorithm_1_on_bf16_weights_is_that_on_their_masters(dtype):
    model, twin = llama(1, dtype), llama(1, dtype).float()
    options = {"budget": 1.0, "interval": 2, "variant": "paper", "lr": 1e-2}
    first, second = MISA(model, **options), MISA(twin, **options)
    for i in range(2):
        for its in (first, second):
            for e in its._on.entries:
                e.param.grad = torch.full_like(e.param, 0.5 - i * 0.125)
            its.step()
            its.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype))


def test_official_sum_of_a_short_round_is_divided_by_the_interval():
    model, twin = llama(), llama()
    optimizer = MISA(model, budget=0.25, interval=10, variant="official")
    drawn = optimizer.active
    backward(twin, 0)
    train(model, optimizer, 1)
    assert optimizer.round == 1
    for name in drawn:
        norm = twin.get_submodule(name).weight.grad.norm().item()
        assert optimizer.scores[name] == pytest.approx((norm / 10) ** 2, rel=1e-4)


def test_reset_is_also_of_what_is_always_on():
    model = llama(1)
    optimizer = MISA(model, budget=1.0, interval=2, state_policy="reset", always_on=("head",))
    train(model, optimizer, 3)
    assert {int(optimizer.state[e.param]["step"]) for e in optimizer._on.entries} == {1}
    assert model.lm_head.weight in optimizer.state
