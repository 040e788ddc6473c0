"""What the optimizer holds: bytes after every switch, state dictionaries, exact resume."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import backward, llama, moved, same, train, weights

from misa.optimizer import LISA, MISA, BAdam

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def held(optimizer):
    """Every tensor reachable from the optimizer's entries and state, in bytes, step counters apart."""
    tensors = {}
    for e in optimizer._entries.values():
        for value in (e.master, e.residual, *(e.saved or {}).values(), *optimizer.state.get(e.param, {}).values()):
            if torch.is_tensor(value) and value.ndim:
                tensors[value.data_ptr()] = value
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ---- bytes ---------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (MISA, {"budget": 0.2}),
        (MISA, {"budget": 0.2, "variant": "paper"}),
        (MISA, {"budget": 0.2, "variant": "official"}),
        (BAdam, {}),
        (LISA, {"num_blocks": 1}),
    ],
)
def test_state_bytes_are_exact_after_every_switch(preset, options, dtype):
    """12 bytes an active parameter for bf16 weights, 8 for fp32, at most 2 an ever-used one as residual, else none."""
    model = llama(dtype=dtype)
    optimizer = preset(model, interval=2, **options)
    per_parameter = 8 if dtype == torch.float32 else 12
    ever = set()
    for i in range(9):
        ever |= {e.param for e in optimizer._on.entries if e.block >= 0}
        finished = optimizer.round
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()
        found = optimizer.state_bytes()
        assert sum(found.values()) == held(optimizer)
        residual = found.pop("residual")
        if dtype == torch.float32:
            assert residual == 0
        else:
            inactive = sum(p.numel() for p in ever - {e.param for e in optimizer._on.entries})
            assert residual <= 2 * sum(p.numel() for p in ever)
            assert residual >= 2 * inactive
        if optimizer.round == finished or options.get("variant") != "paper":
            assert sum(found.values()) == per_parameter * optimizer.active_numel
        else:  # just switched: this rule makes its moments at its first step
            assert sum(found.values()) == (per_parameter - 8) * optimizer.active_numel


@pytest.mark.parametrize(
    ("options", "bytes_per_parameter"),
    [
        ({"state_format": "master"}, {"master": 4, "moments": 8, "residual": 0, "kept": 0}),
        ({"state_format": "fp32"}, {"master": 0, "moments": 8, "residual": 0, "kept": 0}),
        ({"state_format": "bf16"}, {"master": 0, "moments": 4, "residual": 0, "kept": 0}),
        ({"inner": torch.optim.SGD}, {"master": 4, "moments": 0, "residual": 0, "kept": 0}),
        (
            {"inner": torch.optim.SGD, "inner_kwargs": {"momentum": 0.9}, "state_format": "inner"},
            {"master": 0, "moments": 2, "residual": 0, "kept": 0},
        ),
    ],
)
def test_state_bytes_of_a_format_are_exact(options, bytes_per_parameter):
    model = llama(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.2, interval=5, **options)
    train(model, optimizer, 2)
    assert optimizer.state_bytes() == {k: n * optimizer.active_numel for k, n in bytes_per_parameter.items()}


@pytest.mark.parametrize("policy", ["cpu", "keep"])
def test_kept_state_waits_until_the_block_is_drawn_again(policy):
    model = llama(dtype=torch.bfloat16)
    optimizer = BAdam(model, interval=2, order="ascending", state_policy=policy)
    train(model, optimizer, 6)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert optimizer.active == ("model.layers.0",)
    found = optimizer.state_bytes()
    assert found["kept"] == 12 * 2 * layer
    assert found["moments"] == 8 * layer
    assert found["residual"] == 0
    train(model, optimizer, 1, first=6)
    steps = {int(optimizer.state[e.param]["step"]) for e in optimizer._on.entries}
    assert steps == {3}


def test_dropped_residual_leaves_nothing_behind():
    model = llama(dtype=torch.bfloat16)
    optimizer = BAdam(model, interval=1, order="ascending", residual="drop")
    train(model, optimizer, 3)
    numel = optimizer.active_numel
    assert optimizer.state_bytes() == {"master": 4 * numel, "moments": 8 * numel, "residual": 0, "kept": 0}


# ---- state dictionaries --------------------------------------------------------------------------------------------


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file


def loaded(file):
    file.seek(0)
    return torch.load(file)  # with its defaults: weights_only=True


def plain(value):
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (torch.Tensor, int, float, str, bool)


@DTYPES
def test_state_dict_is_plain_and_keyed_by_parameter_name(dtype):
    model = llama(dtype=dtype)
    optimizer = LISA(model, num_blocks=1, interval=2)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    assert plain(state)
    assert set(state["state"]) <= {n for n, _ in model.named_parameters()}
    assert "model.embed_tokens.weight" in state["state"]
    assert loaded(saved(optimizer)).keys() == state.keys()


def resumed(make, file):
    model, state = make[0](), loaded(file)
    optimizer = make[1](model)
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state)
    return model, optimizer


RESUMED = {
    "misa": (MISA, {"budget": 0.2}),
    "auto": (MISA, {"budget": 0.2, "eta": "auto", "sample_last": 1}),
    "paper": (MISA, {"budget": 0.2, "variant": "paper"}),
    "official": (MISA, {"budget": 0.5, "variant": "official"}),
    "badam": (BAdam, {}),
    "badam two": (BAdam, {"order": "descending", "num_blocks": 2}),
    "lisa": (LISA, {"num_blocks": 1}),
    "half": (MISA, {"granularity": "half", "budget": 0.5, "always_on": ("norms",)}),
    "cpu": (MISA, {"budget": 0.2, "state_policy": "cpu"}),
    "keep": (MISA, {"budget": 0.2, "state_policy": "keep"}),
    "reset": (MISA, {"budget": 0.5, "state_policy": "reset", "residual": "drop"}),
    "fp32": (MISA, {"budget": 0.2, "state_format": "fp32"}),
    "bf16": (MISA, {"budget": 0.2, "state_format": "bf16"}),
    "sgd": (MISA, {"budget": 0.2, "inner": torch.optim.SGD, "inner_kwargs": {"momentum": 0.9}}),
    "adafactor": (MISA, {"budget": 0.2, "inner": torch.optim.Adafactor}),
    "in backward": (MISA, {"budget": 0.2, "step_in_backward": True}),
    "probe": (MISA, {"budget": 0.2, "probe_every": 2}),
}


@DTYPES
@pytest.mark.parametrize(("preset", "options"), RESUMED.values(), ids=RESUMED)
def test_resume_after_every_step_continues_bit_for_bit(preset, options, dtype):
    """Stop after any of the first 2T steps, go on with a new model and a new optimizer."""
    interval, num_steps = 3, 10
    make = (lambda: llama(2, dtype), lambda m: preset(m, lr=1e-3, weight_decay=0.1, interval=interval, **options))
    model = make[0]()
    optimizer = make[1](model)
    files, actives = {}, []
    for k in range(1, num_steps + 1):
        train(model, optimizer, 1, first=k)
        actives.append(optimizer.active)
        if k <= 2 * interval:
            files[k] = io.BytesIO()
            torch.save({**optimizer.state_dict(), "model": model.state_dict()}, files[k])
    for k, file in files.items():
        other, again = resumed(make, file)
        for step in range(k + 1, num_steps + 1):
            train(other, again, 1, first=step)
            assert again.active == actives[step - 1], (k, step)
        assert same(other, model), k
        assert again.scores == optimizer.scores
        assert again.state_bytes() == optimizer.state_bytes()


def test_resume_continues_with_the_groups_and_their_schedule():
    def make():
        model = llama(2)
        named = list(model.named_parameters())
        groups = [{"params": named[:8], "lr": 1e-2}, {"params": named[8:], "lr": 1e-3, "weight_decay": 0.2}]
        optimizer = MISA(groups, budget=0.3, interval=3)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    def go(model, optimizer, scheduler, steps):
        for i in steps:
            train(model, optimizer, 1, first=i)
            scheduler.step()

    model, optimizer, scheduler = make()
    go(model, optimizer, scheduler, range(4))
    files = [io.BytesIO() for _ in range(3)]
    for file, thing in zip(files, (model, optimizer, scheduler), strict=True):
        torch.save(thing.state_dict(), file)
    go(model, optimizer, scheduler, range(4, 9))
    other, again, schedule = make()
    for file, thing in zip(files, (other, again, schedule), strict=True):
        thing.load_state_dict(loaded(file))
    go(other, again, schedule, range(4, 9))
    assert same(model, other)
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_resume_in_a_new_process_continues_bit_for_bit(tmp_path):
    model = llama(2, torch.bfloat16)
    optimizer = MISA(model, budget=0.2, interval=3)
    train(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "4.pt")
    train(model, optimizer, 4, first=4)
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tiny import llama, train
from misa.optimizer import MISA
model = llama(2, torch.bfloat16, seed=5)
optimizer = MISA(model, budget=0.2, interval=3)
state = torch.load("4.pt")
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
train(model, optimizer, 4, first=4)
torch.save(model.state_dict(), "8.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], check=True, cwd=tmp_path)
    parts = torch.load(tmp_path / "8.pt")
    assert all(torch.equal(p, parts[n]) for n, p in model.state_dict().items())


def test_loading_copies_so_that_training_on_does_not_change_the_saved_state():
    model = llama(2, torch.bfloat16)
    optimizer = MISA(model, budget=0.3, interval=5)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    before = {n: {k: v.clone() for k, v in values.items()} for n, values in state["state"].items()}
    train(model, optimizer, 2, first=2)
    for name, values in before.items():
        for key, value in values.items():
            assert torch.equal(value, state["state"][name][key]), (name, key)


def test_loading_into_the_middle_of_another_round_leaves_nothing_of_it():
    model = llama(2, torch.bfloat16)
    optimizer = MISA(model, budget=0.2, interval=3)
    train(model, optimizer, 1)
    state, copy, bytes_then = optimizer.state_dict(), weights(model), optimizer.state_bytes()
    state = loaded(saved(optimizer))
    train(model, optimizer, 7, first=1)
    model.load_state_dict(copy)
    optimizer.load_state_dict(state)
    assert optimizer.state_bytes() == bytes_then
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {e.name for e in optimizer._on.entries}
    train(model, optimizer, 5, first=1)
    other = llama(2, torch.bfloat16)
    train(other, MISA(other, budget=0.2, interval=3), 6)
    assert same(model, other)


# ---- the wrong model -----------------------------------------------------------------------------------------------


def swapped():
    """Two modules of one shape registered in the other order: torch would load each one's state into the other."""
    model = llama(2)
    attention = model.model.layers[0].self_attn
    k, v = attention._modules.pop("k_proj"), attention._modules.pop("v_proj")
    attention._modules["v_proj"], attention._modules["k_proj"] = v, k
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llama(3), "7 blocks are new in this model: model.layers.2.self_attn.q_proj"),
        (lambda: llama(1), "7 blocks are missing from this model: model.layers.1.self_attn.q_proj"),
        (lambda: llama(2, intermediate_size=64), r"mlp.gate_proj was .*\[48, 32\].* and is .*\[64, 32\]"),
        (lambda: llama(2, torch.bfloat16), "torch.float32.* and is .*torch.bfloat16"),
        (swapped, "the same but in another order, first at model.layers.0.self_attn.k_proj"),
        (lambda: llama(2, vocab_size=128), r"always on was .*\[64, 32\].* and is .*\[128, 32\]"),
    ],
    ids=["one layer more", "one less", "other width", "other type", "swapped", "other vocabulary"],
)
def test_state_of_another_model_is_refused_with_the_difference(make, message):
    model = llama(2)
    optimizer = MISA(model, budget=0.2, always_on=("head",))
    train(model, optimizer, 1)
    other = MISA(make(), budget=0.3, always_on=("head",))
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())


def test_state_of_another_optimizer_is_refused_in_words():
    model = llama(2)
    with pytest.raises(ValueError, match="not one of a BlockCoordinateOptimizer"):
        MISA(model, budget=0.2).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_refused_state_leaves_the_optimizer_as_it_was():
    model, twin = llama(2), llama(2)
    optimizer, other = MISA(model, budget=0.2, interval=2), MISA(twin, budget=0.2, interval=2)
    train(model, optimizer, 1)
    train(twin, other, 1)
    with pytest.raises(ValueError, match="does not belong"):
        optimizer.load_state_dict(MISA(llama(3), budget=0.2).state_dict())
    train(model, optimizer, 3, first=1)
    train(twin, other, 3, first=1)
    assert moved(weights(model), twin) == set()


def test_refused_groups_leave_the_rates_as_they_were():
    def grouped(num_fast, rate):
        named = list(llama().named_parameters())
        number = [int(n.split(".")[2]) if "layers" in n else -1 for n, _ in named]
        parts = [
            [x for x, k in zip(named, number, strict=True) if test(k)]
            for test in (lambda k: k < 0, lambda k: 0 <= k < num_fast, lambda k: k >= num_fast)
        ]
        return MISA([{"params": part, "lr": rate} for part in parts], budget=0.3)

    other = grouped(2, 1e-3)
    with pytest.raises(ValueError, match="group 1 of parameters differs"):
        other.load_state_dict(grouped(1, 1e-1).state_dict())
    assert [g["lr"] for g in other.param_groups] == [1e-3] * 3
