"""Features together: adapters with checkpointing and a reference pass, nested stacks, inner optimizers of any make."""

import warnings

import pytest
import torch
from tiny import backward, batch, llama, moved, same, train, weights
from torch import nn

from misa.optimizer import LISA, MISA, BAdam, partition, state


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reference_pass_without_adapters_between_forward_and_backward(checkpointing):
    """As in preference tuning; leaving `disable_adapter` switches all adapters on."""
    model = with_adapters(llama(2))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = MISA(model, budget=0.3)
    for step in range(3):
        loss = model(**batch(step)).loss
        with torch.no_grad(), model.disable_adapter():
            reference = model(**batch(step)).loss
        (loss - reference).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            f"{b}.weight" for b in optimizer.active
        }
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_checkpointing_that_is_turned_off_and_on_recomputes_from_the_lowest_active_layer_up_again():
    def counts(disturb):
        model = llama(4)
        optimizer = BAdam(model, order="descending")
        model.gradient_checkpointing_enable()
        model.train()
        found = [0] * 4
        disturb(model)
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: found.__setitem__(i, found[i] + 1))
        backward(model, 0)
        assert optimizer.active
        return found

    def evaluate(model):
        model.gradient_checkpointing_disable()
        with torch.no_grad():
            model(**batch(0))
        model.gradient_checkpointing_enable()

    def train_and_evaluate(model):
        backward(model, 0)
        evaluate(model)

    assert counts(lambda model: None) == counts(evaluate) == counts(train_and_evaluate) == [1, 1, 1, 2]


def test_gradients_of_before_are_dropped_where_nothing_trains():
    model = llama(2)
    backward(model, 0)
    optimizer = MISA(model, budget=0.2)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.zero_grad()
    backward(model, 1)
    own = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == own


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(16, 16)
        self.mlp = nn.Linear(16, 16)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_inside_one_member_of_a_numbered_container(bias):
    stack = nn.Sequential(*[Part() for _ in range(4)])
    model = nn.Sequential(nn.Embedding(50, 16), stack, nn.Linear(16, 50, bias=bias))
    assert [b.name for b in partition(model, "layer")] == [f"1.{i}" for i in range(4)]
    assert [b.name for b in partition(model)] == [f"1.{i}.{name}" for i in range(4) for name in ("attn", "mlp")]


def test_layers_with_numbered_containers_of_their_own_are_still_the_layers():
    def layer(num_experts):
        part = Part()
        part.experts = nn.ModuleList(Part() for _ in range(num_experts))
        return part

    for numbers in ((2,), (2, 2), (3, 3, 2)):
        model = nn.ModuleDict({"layers": nn.ModuleList(layer(n) for n in numbers)})
        assert [b.name for b in partition(model, "layer")] == [f"layers.{i}" for i in range(len(numbers))]


def test_layers_of_several_kinds_with_experts_in_one_of_them_are_still_the_layers():
    def layer(num_experts):
        part = nn.ModuleDict({"q": nn.Linear(8, 8, bias=False)})
        part["mlp"] = nn.ModuleDict({"gate": nn.Linear(8, 4, bias=False)}) if num_experts else nn.Linear(8, 8)
        if num_experts:
            part["mlp"]["experts"] = nn.ModuleList(Part() for _ in range(num_experts))
        return part

    for kinds in ((0, 4), (0, 4, 0, 4)):
        model = nn.ModuleDict({"layers": nn.ModuleList(map(layer, kinds))})
        for frozen in model["layers"][:-2]:
            frozen.requires_grad_(False)
        blocks = partition(model)
        last = len(kinds) - 1
        assert {b.layer for b in blocks} == {f"layers.{last - 1}", f"layers.{last}"}
        assert len(blocks) == 2 + 2 + 4 * 2
        inside = {p for b in blocks for _, p in b.params}
        assert inside == {p for p in model.parameters() if p.requires_grad}


def test_layers_of_a_model_that_is_the_only_member_with_parameters():
    """As SentenceTransformer has it: `Sequential(transformer, pooling)`."""
    for granularity in ("matrix", "half", "layer"):
        names = [b.name for b in partition(nn.Sequential(llama(2), nn.Identity()), granularity)]
        assert names == [f"0.{b.name}" for b in partition(llama(2), granularity)]


def test_halves_of_a_layer_that_holds_all_in_one_child():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    names = [b.name for b in partition(T5ForConditionalGeneration(config), "half")]
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            assert {f"{stack}.block.{layer}.first", f"{stack}.block.{layer}.second"} <= set(names)


def test_wrapped_layers_are_split_and_saved_as_what_they_wrap():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    plain, wrapped = llama(2), llama(2)
    apply_activation_checkpointing(wrapped, check_fn=lambda m: type(m).__name__ == "LlamaDecoderLayer")
    for granularity in ("matrix", "half", "layer"):
        assert [b.name for b in partition(plain, granularity)] == [b.name for b in partition(wrapped, granularity)]
    one, other = MISA(plain, budget=0.2), MISA(wrapped, budget=0.2)
    train(plain, one, 2)
    other.load_state_dict(one.state_dict())


def test_weights_of_one_byte_and_their_scales_are_in_no_block():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn))
            self.weight_scale_inv = nn.Parameter(torch.ones(2, 2))

    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"q": Quantized(), "k": nn.Linear(4, 4)}) for _ in "ab")}
    )
    assert [b.name for b in partition(model)] == ["layers.0.k", "layers.1.k"]


class Complex(nn.Module):
    """A layer with a complex weight, as spectral ones have."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.spectrum = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat) / 8)

    def forward(self, x):
        return self.a(x) + torch.fft.ifft(torch.fft.fft(x) @ self.spectrum).real


def test_weights_that_cannot_be_trained_are_named_and_off_while_others_train():
    model = nn.Sequential(*[Complex() for _ in range(3)])
    with pytest.warns(UserWarning, match=r"3 parameters stay as they are \(0\.spectrum, 1\.spectrum, 2\.spectrum\)"):
        optimizer = MISA(model, num_blocks=1)
    for i in range(2):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        assert len([p for p in model.parameters() if p.grad is not None]) == 2  # weight and bias of one block
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    assert all(p.requires_grad for p in model.parameters())


def test_parameter_that_a_model_returns_collects_no_hooks():
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.layers = nn.ModuleList(Part() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer.mlp(layer.attn(x))
            return x, self.scale

    model = Returning()
    optimizer = MISA(model, budget=0.9, always_on=("other",))
    for _ in range(3):
        x, scale = model(torch.ones(2, 16))
        (x * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not model.scale._backward_hooks


def test_exclude_may_name_what_is_in_no_block():
    model = llama(2)
    optimizer = MISA(model, budget=0.3, exclude=["lm_head", "*norm*", "model.embed_tokens.weight"])
    assert [b.name for b in optimizer.blocks] == [b.name for b in partition(model)]
    with pytest.raises(ValueError, match="exclude: pattern 'lm_haed' matches no parameter"):
        partition(model, exclude=["lm_haed"])
    with pytest.raises(ValueError, match="matches nothing that can be a block"):
        partition(model, include=["*norm*"])


def test_probabilities_are_equal_where_scores_do_not_count():
    model = llama(3)
    optimizer = LISA(model, num_blocks=1, interval=2, eta=1e6)
    train(model, optimizer, 8)
    assert set(optimizer.probabilities.values()) == {1 / 3}


def test_state_kept_on_the_cpu_goes_there_wherever_it_was_loaded(monkeypatch):
    model = llama(2)
    optimizer = BAdam(model, interval=2, order="ascending", state_policy="cpu")
    train(model, optimizer, 3)
    places = []
    monkeypatch.setattr(state, "moved", lambda values, device, copy: places.append(device) or dict(values))
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(places) == {"cpu", torch.device("cpu")}  # by policy, and where the weight is


class Counting(torch.optim.Optimizer):
    """Counts steps in its groups, as some optimizers of other packages do."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", [torch.zeros_like(p)])[0]
                m.lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * m / (1 - 0.9 ** group["step"]))


@pytest.mark.parametrize("stop", [2, 5, 7])
@pytest.mark.parametrize("policy", ["drop", "cpu"])
def test_inner_optimizer_with_state_in_its_groups_and_in_lists_continues_bit_for_bit(stop, policy):
    def make(model):
        return MISA(model, lr=0.1, budget=0.2, interval=5, inner=Counting, state_policy=policy)

    model, twin = llama(2), llama(2)
    optimizer = make(model)
    train(model, optimizer, stop)
    if stop == 2:
        assert optimizer.state_bytes()["moments"] == 4 * optimizer.active_numel
    twin.load_state_dict(model.state_dict())
    other = make(twin)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 6, first=stop)
    train(twin, other, 6, first=stop)
    assert same(model, twin)


def test_inner_optimizer_with_state_in_its_groups_counts_on_when_a_group_is_added():
    model, twin = llama(2), llama(2)
    for m in (model, twin):
        optimizer = MISA(m, lr=0.1, budget=0.2, interval=5, inner=Counting)
        train(m, optimizer, 2)
        if m is model:
            optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(3, 3)))]})
        train(m, optimizer, 2, first=2)
    assert same(model, twin)


def test_inner_optimizers_that_cannot_serve_are_refused_in_words():
    class Taken(Counting):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["master"] = torch.zeros_like(p)

    with pytest.raises(ValueError, match=r"LBFGS.*needs a closure"):
        MISA(llama(2), budget=0.3, inner=torch.optim.LBFGS)
    model = llama(2)
    optimizer = MISA(model, budget=0.3, inner=Taken)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="keeps state under the name 'master'"):
        optimizer.state_dict()


def test_small_rates_on_low_precision_weights_without_masters_are_warned_of():
    def make(lr, dtype):
        return MISA(llama(2, dtype), lr=lr, budget=0.3, inner=torch.optim.AdamW, state_format="inner")

    with pytest.warns(UserWarning, match="updates smaller than half the spacing"):
        make(1e-6, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(1e-3, torch.bfloat16)
        make(1e-6, torch.float32)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_states_of_8_bits_do_not_depend_on_the_default_type(default):
    models = [llama(2, torch.bfloat16, hidden_size=64, intermediate_size=128) for _ in range(2)]
    train(models[0], MISA(models[0], budget=0.2, state_format="8bit"), 2)
    before = weights(models[1])
    torch.set_default_dtype(default)
    try:
        train(models[1], MISA(models[1], budget=0.2, state_format="8bit"), 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert moved(before, models[1])
    assert same(*models)


def test_record_leaves_files_beside_it_alone(tmp_path):
    (tmp_path / "run.tmp").write_text("mine")
    (tmp_path / "run.jsonl").touch()
    model = llama(2)
    train(model, LISA(model, num_blocks=1, interval=1, record=str(tmp_path / "run.jsonl")), 1)
    assert (tmp_path / "run.tmp").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl", "run.tmp"]


def test_numbers_of_what_trains_are_those_of_a_count_by_hand():
    model = llama(2)
    optimizer = MISA(model, budget=0.2, interval=2, always_on=("norms",))
    always = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert always > 0
    sizes, seen = [], set()
    for step in range(9):
        on = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        sizes.append(sum(on.values()))
        seen |= set(on)
        ever = sum(p.numel() for n, p in model.named_parameters() if n in seen)
        assert optimizer.trained_numel == {"now": sizes[-1], "most": max(sizes), "ever": ever}
        train(model, optimizer, 1, first=step)
    twin = llama(2)
    other = MISA(twin, budget=0.2, interval=2, always_on=("norms",))
    other.load_state_dict(optimizer.state_dict())
    assert other.trained_numel == optimizer.trained_numel
