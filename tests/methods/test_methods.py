"""The table of compared methods."""

import copy
import io
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from misa.methods import METHODS, build


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_optimizer(built):
    cls, kwargs = built.optimizer_cls_and_kwargs
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        return cls([p for p in built.model.parameters() if p.requires_grad], **kwargs)
    return cls()(built.model, **kwargs)


def train(built, num_steps, seed=1):
    optimizer = make_optimizer(built)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        tokens = torch.randint(0, 8, (4, 12), generator=generator)
        loss = built.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIONS = {name: {"budget": 0.4, "interval": 5} for name in METHODS if name.startswith("misa")}
OPTIONS |= {name: {"galore_r": 8, "galore_update_every": 7} for name in METHODS if name.startswith("galore")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(METHODS))
def test_method_lowers_the_loss(name, dtype):
    built = build(name, tiny_model(dtype), lr=1e-2, seed=3, options=OPTIONS.get(name, {}))
    losses = train(built, 40)
    # Random untrained embeddings bound what a frozen head can reach; a wrong update does not get near this.
    assert sum(losses[-5:]) / 5 < sum(losses[:2]) / 2 - 0.15


def test_adamw_equals_torch_bit_for_bit():
    ours, theirs = tiny_model(), tiny_model()
    hyper = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-7}
    built = build("adamw", ours, **hyper)
    train(built, 10)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], **hyper, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        tokens = torch.randint(0, 8, (4, 12), generator=generator)
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", ["adamw", "galore", "galore_layerwise", "badam", "lisa", "misa", "misa_official"])
def test_what_is_in_no_layer_may_have_a_rate_of_its_own(name):
    options = {**OPTIONS.get(name, {}), "always_on_lr": 1e-2}
    if name in ("badam", "misa", "misa_official"):
        options["always_on"] = ("embeddings", "head", "norms")
    built = build(name, tiny_model(), lr=0.0, options=options)
    before = copy.deepcopy(built.model)
    train(built, 2)
    for (path, p), q in zip(built.model.named_parameters(), before.parameters(), strict=True):
        # The norms inside the layers belong to the layers where these are the blocks, and to the rest elsewhere.
        if "norm" not in path or path == "model.norm.weight":
            assert torch.equal(p, q) == (".layers." in path), path


def test_uniform_method_draws_uniformly():
    built = build("misa_uniform", tiny_model(), lr=1e-2, options={"budget": 0.4, "interval": 2})
    cls, kwargs = built.optimizer_cls_and_kwargs
    optimizer = cls()(built.model, **kwargs)
    assert len(set(optimizer.probabilities.values())) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "must be one of adamw"),
        ("adamw", {"budget": 0.1}, "has no option budget; its options are: always_on_lr"),
        ("lora", {"lora_rank": 8}, "lora_r"),
        ("misa", {"budget": 1.5}, r"budget=1.5: must lie in \(0, 1\]"),
        ("misa", {"variant": "papper"}, "must be one of default, paper, official"),
        ("misa_official", {"variant": "paper"}, "misa_official: has no option variant"),
        ("misa", {"budget": 0.1, "num_blocks": 2}, "budget is 0.1, num_blocks 2: give one of them"),
        ("misa", {"effective_share": 0.3}, "effective_share=0.3: goes with eta=auto, not eta=1.0"),
        ("misa", {"inner": "adam"}, "inner='adam': must be one of adamw, sgd"),
        ("galore", {"galore_r": 0}, "galore_r=0: must be at least 1"),
        ("galore", {"always_on_lr": -1.0}, "always_on_lr=-1.0: must be finite and not negative"),
        ("galore", {"lora_r": 4}, "has no option lora_r"),
    ],
)
def test_bad_option_is_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(build(name, tiny_model(), lr=1e-3, options=options))


def trained_names(name, options):
    built = build(name, tiny_model(), lr=1e-2, options=options)
    optimizer = make_optimizer(built)
    return optimizer, {n for n, p in built.model.named_parameters() if p.requires_grad}


def test_authors_baselines_train_one_layer_after_the_other():
    for name, always in (("badam_official", set()), ("lisa_official", {"model.embed_tokens.weight", "lm_head.weight"})):
        optimizer, on = trained_names(name, {})
        assert optimizer.settings.interval == 50
        assert optimizer.active == ("model.layers.0",)
        assert {n for n in on if ".layers." not in n} == always


def test_misa_over_lora_draws_adapter_matrices_under_a_share_of_them():
    optimizer, on = trained_names("misa_lora", {"budget": 0.2, "lora_r": 4, "lora_target": "q_proj, v_proj"})
    assert len(optimizer.blocks) == 3 * 2 * 2
    assert all(
        "lora_" in block.name and ("q_proj" in block.name or "v_proj" in block.name) for block in optimizer.blocks
    )
    total = sum(p.numel() for block in optimizer.blocks for _, p in block.params)
    assert 0 < optimizer.active_numel <= 0.2 * total
    assert on
    assert all("lora_" in name for name in on)


def test_dora_trains_lengths_beside_adapters():
    built = build("dora", tiny_model(), lr=1e-2, options={"lora_r": 4})
    kinds = {n.rpartition(".lora_")[2].partition(".")[0] for n, p in built.model.named_parameters() if p.requires_grad}
    assert kinds == {"A", "B", "magnitude_vector"}


def test_variants_by_name_are_the_presets():
    for name in ("paper", "official"):
        ours, theirs = tiny_model(), tiny_model()
        options = {"budget": 0.4, "interval": 3}
        train(build(f"misa_{name}", ours, lr=1e-2, seed=5, options=options), 8)
        train(build("misa", theirs, lr=1e-2, seed=5, options={**options, "variant": name}), 8)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)), name


def test_method_badam_equals_the_package_but_for_its_faults():
    """Step for step equal to `badam` 1.4, with its documented faults switched off or allowed for.

    - weight decay of the user is replaced by the optimizer's default: 0 in both;
    - the first block gets one step less than the interval: ours starts one step into the round;
    - it makes master copies of fp32 weights too: that changes the memory, not the weights;
    - embeddings, head and final norm are in no block of it either, so they stay as they are in both.
    """
    from badam import BlockOptimizer

    ours, theirs = tiny_model(), tiny_model()
    built = build("badam_official", ours, lr=1e-2, options={"interval": 3})
    optimizer = make_optimizer(built)
    optimizer._step_in_round = optimizer._num_steps = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = BlockOptimizer(
            base_optimizer=torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True),
            named_parameters_list=list(theirs.named_parameters()),
            switch_block_every=3,
            switch_mode="ascending",
        )
    generator = torch.Generator().manual_seed(1)
    for step in range(11):
        tokens = torch.randint(0, 8, (4, 12), generator=generator)
        for model, stepper in ((ours, optimizer), (theirs, other)):
            model(input_ids=tokens, labels=tokens).loss.backward()
            stepper.step()
            stepper.zero_grad()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q), (step, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["galore", "galore_layerwise"])
def test_resumed_galore_is_bit_identical(name, dtype):
    """Through a file that `torch.load` accepts with its safe defaults; cut before, at and after a new projection."""
    options = {"galore_r": 8, "galore_update_every": 3}
    whole = tiny_model(dtype)
    expected = train(build(name, whole, lr=1e-2, options=options), 8)
    for cut in (1, 3, 5):
        model = tiny_model(dtype)
        built = build(name, model, lr=1e-2, options=options)
        optimizer = make_optimizer(built)
        losses = steps(model, optimizer, range(cut))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = tiny_model(dtype)
        resumed.load_state_dict(model.state_dict())
        optimizer = make_optimizer(build(name, resumed, lr=1e-2, options=options))
        optimizer.load_state_dict(torch.load(file))
        losses += steps(resumed, optimizer, range(cut, 8))
        assert losses == expected
        for (key, p), q in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(p, q[1]), (cut, key)


def steps(model, optimizer, numbers, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 8, (4, 12), generator=generator) for _ in range(max(numbers) + 1)]
    losses = []
    for i in numbers:
        loss = model(input_ids=batches[i], labels=batches[i]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_galore_by_layers_is_galore_with_one_gradient_at_a_time():
    models = {}
    for name in ("galore", "galore_layerwise"):
        models[name] = tiny_model()
        built = build(name, models[name], lr=1e-2, options=OPTIONS[name])
        assert built.steps_in_backward == (name != "galore")
        steps(models[name], make_optimizer(built), range(9))
    first, second = (model.state_dict() for model in models.values())
    assert all(torch.equal(first[key], second[key]) for key in first)
    built = build("galore_layerwise", models["galore"], lr=1e-2, options=OPTIONS["galore"])
    make_optimizer(built)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    built.model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is None for p in built.model.parameters())


def test_galore_holds_moments_of_the_projected_size_and_the_projections():
    small = make_optimizer(built := build("galore", tiny_model(), lr=1e-2, options={"galore_r": 4}))
    steps(built.model, small, range(2))
    inside = [p for block in built.model.model.layers for p in block.parameters() if p.ndim == 2]
    outside = [p for p in built.model.parameters() if not any(p is q for q in inside)]
    assert small.state_bytes() == {
        "moments": 8 * (sum(4 * max(p.shape) for p in inside) + sum(p.numel() for p in outside)),
        "projections": 4 * sum(4 * min(p.shape) for p in inside),
    }


def test_pure_bf16_adamw_keeps_no_masters():
    built = build("adamw_bf16", tiny_model(torch.float32), lr=1e-2)
    optimizer = make_optimizer(built)
    steps(built.model, optimizer, range(1))
    assert {p.dtype for p in built.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for s in optimizer.state.values() for k, t in s.items() if k != "step"} == {torch.bfloat16}


def test_sgd_is_torch_s():
    ours = tiny_model()
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(build("sgd", ours, lr=0.1))
    steps(ours, optimizer, range(4))
    steps(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), range(4))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
