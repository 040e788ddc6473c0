"""What libraries do to a model that an optimizer of this package has: PEFT, transformers, `torch.compile`, loggers."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import backward, batch, llama, moved, same, train, weights
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from misa.optimizer import LISA, MISA, BlockCoordinateDesentOptimizer

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3}


def with_lora(model, **config):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **config}
    return get_peft_model(model, LoraConfig(**settings))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def outside_lora(names):
    return [name for name in names if "lora" not in name]


# ---- freezing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [False, True])
def test_model_that_peft_froze_while_the_optimizer_lived_stays_frozen(forget):
    """A notebook binds the next trainer to the name of the last, after PEFT has wrapped the model."""
    model = llama()
    optimizer = MISA(model, lr=1e-2, budget=0.3, interval=3)
    train(model, optimizer, 4)
    model = with_lora(model)
    if forget:
        optimizer = None
        gc.collect()
        assert not outside_lora(trainable(model))
    second = MISA(model, lr=1e-2, budget=0.5, interval=2)
    before = weights(model)
    train(model, second, 8)
    assert moved(before, model)
    assert not outside_lora(moved(before, model))
    del optimizer, second
    gc.collect()
    assert not outside_lora(trainable(model))


def test_adapters_that_peft_switched_on_are_switched_off_again_before_the_next_step():
    """DPO runs its reference pass with adapters disabled; PEFT enables all of them after it."""
    model, twin = with_lora(llama()), with_lora(llama())
    twin.load_state_dict(model.state_dict())
    optimizer = MISA(model, lr=1e-2, budget=0.3, interval=4)
    other = MISA(twin, lr=1e-2, budget=0.3, interval=4)
    for i in range(10):
        with model.disable_adapter(), torch.no_grad():
            model(**batch(i))
        for one, its in ((model, optimizer), (twin, other)):
            backward(one, i)
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            its.step()
            its.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert same(model, twin)


def test_what_someone_switches_on_does_not_train_and_keeps_no_gradient():
    model = llama()
    optimizer = MISA(model, lr=1e-2, budget=0.3, interval=100)
    on = trainable(model)
    model.requires_grad_(True)
    backward(model, 0)
    assert trainable(model) == on
    assert {name for name, p in model.named_parameters() if p.grad is not None} == on
    optimizer.release()
    assert len(trainable(model)) == len(list(model.parameters()))


def test_release_of_an_older_optimizer_leaves_the_blocks_of_the_newer_one():
    model = llama()
    old = MISA(model, lr=1e-2, budget=0.3, interval=3)
    train(model, old, 4)
    new = MISA(model, lr=1e-2, budget=0.3, interval=3, seed=1)
    on = trainable(model)
    backward(model, 0)
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    old.release()
    assert trainable(model) == on
    assert gradients == {name for name, p in model.named_parameters() if p.grad is not None}
    train(model, new, 9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_is_not_watched(twin_of):
    model = llama()
    optimizer = MISA(model, lr=1e-2, budget=0.3, interval=3)
    twin = twin_of(model)
    twin.requires_grad_(True)
    backward(twin, 0)
    assert all(p.grad is not None for p in twin.parameters())
    assert not twin._forward_pre_hooks
    del optimizer


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda m: LISA(m, lr=1e-2), lambda m: MISA(m, lr=1e-2, budget=0.5, interval=2, always_on=("head",))]
)
@pytest.mark.parametrize("family", ["llama", "bert", "peft"])
def test_head_of_a_classifier_is_a_head(family, make):
    if family == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
        model = LlamaForSequenceClassification(LlamaConfig(**SMALL, **heads))
    else:
        model = BertForSequenceClassification(BertConfig(**SMALL, num_attention_heads=4))
    if family == "peft":
        model = with_lora(model, target_modules=["query", "value"], task_type="SEQ_CLS")
    optimizer, before = make(model), weights(model)
    for i in range(4):
        model(input_ids=batch(i)["input_ids"], labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    head = "score.weight" if family == "llama" else "classifier.weight"
    head = "base_model.model.classifier.modules_to_save.default.weight" if family == "peft" else head
    assert head in moved(before, model)


def test_kind_that_matches_nothing_is_warned_of_where_something_is_left_out():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = llama(2).model.layers
            self.last = torch.nn.Linear(32, 3)

    with pytest.warns(UserWarning, match=r"no parameter is of the kind head, and 2 are never trained \(last\.weight"):
        MISA(Two(), budget=0.5, always_on=("head",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MISA(Two(), budget=0.5, always_on=("head", "other"))
        LISA(llama(tie_word_embeddings=True))
    with pytest.warns(UserWarning, match="a head tied to the embeddings is trained with them"):
        MISA(llama(tie_word_embeddings=True), budget=0.5, always_on=("head", "norms"))


# ---- gradients, state, sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), 0.1])
def test_gradient_put_in_place_of_the_measured_one_is_the_one_judged(value):
    model = llama()
    optimizer = MISA(model, lr=1e-2, budget=0.3, interval=4)
    before = weights(model)
    backward(model, 0, scale=1.0 if value != value else float("nan"))
    for p in model.parameters():
        if p.grad is not None:
            p.grad = torch.full_like(p.grad, value)
    optimizer.step()
    assert optimizer.num_skipped_steps == (value != value)
    assert bool(moved(before, model)) == (value == value)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: MISA(m, lr=1e-2, budget=0.5, interval=3),
        lambda m: MISA(m, lr=1e-2, order="all", budget=None, interval=3, inner=torch.optim.Adam),
        lambda m: BlockCoordinateDesentOptimizer(
            torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
            list(m.named_parameters()),
            interval_steps=3,
            param_ratio_limit=0.5,
        ),
    ],
)
def test_looking_at_the_state_changes_nothing(make):
    model, twin = llama(), llama()
    optimizer, other = make(model), make(twin)
    for i in range(8):
        train(model, optimizer, 1, first=i)
        train(twin, other, 1, first=i)
        assert all(isinstance(optimizer.state[p], dict) for g in optimizer.param_groups for p in g["params"])
    assert same(model, twin)
    saved, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert {name: set(values) for name, values in saved.items()} == {n: set(v) for n, v in expected.items()}


@pytest.mark.parametrize("num_steps", [2, 3])
def test_weight_resized_while_it_is_trained_is_refused(num_steps):
    model = llama()
    optimizer = LISA(model, lr=1e-2, num_blocks=1, interval=3)
    train(model, optimizer, num_steps)
    model.resize_token_embeddings(400)
    backward(model, 0)
    with pytest.raises(ValueError, match=r"shape \(400, 32\), and its moments \(64, 32\): it was resized"):
        optimizer.step()


@pytest.mark.parametrize("make", [lambda m: MISA(m, lr=1e-2, budget=0.3, interval=3), lambda m: LISA(m, lr=1e-2)])
def test_compiled_model_is_split_and_saved_as_what_it_compiles(make):
    model, twin = llama(), llama()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = make(compiled), make(twin)
    assert optimizer.active == other.active
    train(compiled, optimizer, 4)
    train(twin, other, 4)
    assert same(model, twin)
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("granularity", ["matrix", "half", "layer"])
def test_names_of_compiled_models_and_layers_are_those_of_plain_ones(granularity):
    options = {"granularity": granularity, "budget": 0.5, "always_on": ("embeddings", "head", "norms")}
    by_layers = llama()
    by_layers.lm_head = torch.compile(by_layers.lm_head, backend="eager")
    for i, layer in enumerate(by_layers.model.layers):
        by_layers.model.layers[i] = torch.compile(layer, backend="eager")
    whole = torch.compile(llama(), backend="eager")
    for compiled, plain in ((by_layers, llama()), (whole.named_parameters(), llama().named_parameters())):
        optimizer, expected = MISA(compiled, **options), MISA(plain, **options)
        assert [b.name for b in optimizer.blocks] == [b.name for b in expected.blocks]
        assert optimizer.active_numel == expected.active_numel
        expected.load_state_dict(optimizer.state_dict())


def test_release_while_all_blocks_are_measured():
    model = llama()
    optimizer = MISA(model, budget=0.1, interval=1, probe_every=1)
    train(model, optimizer, 1)
    optimizer.release()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    backward(model, 1)
    assert all(p.grad is not None for p in model.parameters())
