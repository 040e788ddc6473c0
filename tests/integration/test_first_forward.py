"""Activation checkpointing that skips the frozen prefix, and compiled models."""

import copy
import pickle
import warnings

import pytest
import torch
from tiny import backward, batch, llama, train

from misa.optimizer import MISA, BAdam


def only(model, layer, matrix="mlp.up_proj"):
    return MISA(model, budget=1.0, include=[f"model.layers.{layer}.{matrix}"], lr=0.0)


def forward_counts(model, run):
    counts = [0] * len(model.model.layers)
    handles = []
    for k, layer in enumerate(model.model.layers):

        def count(*_, k=k):
            counts[k] += 1

        handles.append(layer.mlp.register_forward_pre_hook(count))
    run()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("keywords", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("before", [True, False], ids=["enabled before", "enabled after"])
def test_checkpointing_recomputes_only_from_the_lowest_active_layer_up(keywords, before):
    for layer in range(4):
        model = llama(4).train()
        if before:
            model.gradient_checkpointing_enable(keywords)
        optimizer = only(model, layer)
        if not before:
            model.gradient_checkpointing_enable(keywords)
        counts = forward_counts(model, lambda m=model: backward(m, 0))
        assert counts == [1] * layer + [2] * (4 - layer)
        assert optimizer.active


@pytest.mark.parametrize("keywords", [None, {"use_reentrant": True}])
def test_gradient_of_every_block_equals_the_one_without_checkpointing(keywords):
    plain, saving = llama(3).train(), llama(3).train()
    saving.gradient_checkpointing_enable(keywords)
    backward(plain, 0)
    optimizer = MISA(saving, interval=1, lr=0.0, num_blocks=1, order="ascending")
    for _ in range(21):
        (block,) = optimizer.active
        backward(saving, 0)
        found = {n: p.grad for n, p in saving.named_parameters() if p.grad is not None}
        assert list(found) == [f"{block}.weight"]
        torch.testing.assert_close(found[f"{block}.weight"], plain.get_parameter(f"{block}.weight").grad)
        optimizer.step()
        optimizer.zero_grad()


def test_released_model_is_checkpointed_as_before():
    model, untouched = llama(3).train(), llama(3).train()
    for m in (model, untouched):
        m.gradient_checkpointing_enable({"use_reentrant": True})
    optimizer = only(model, 2)
    backward(model, 0)
    optimizer.step()
    optimizer.release()
    model.zero_grad()
    for m in (model, untouched):
        for p in m.model.embed_tokens.parameters():
            p.requires_grad_(False)
    counts = [forward_counts(m, lambda m=m: backward(m, 0)) for m in (model, untouched)]
    assert counts == [[2, 2, 2]] * 2
    assert all(p.grad is not None for p in model.model.layers.parameters())
    function = model.model.layers[0]._gradient_checkpointing_func
    assert function.keywords == {"use_reentrant": True}


def test_model_without_checkpointing_is_left_alone():
    model = llama(2).train()
    before = copy.deepcopy({n: set(vars(m)) for n, m in model.named_modules()})
    optimizer = only(model, 1)
    backward(model, 0)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert len(model._forward_pre_hooks) == 2  # that watch what is switched on, and checkpointing
    optimizer.release()
    assert not model._forward_pre_hooks


def test_model_that_has_not_run_yet_can_be_pickled_and_copied():
    model = llama(2)
    optimizer = only(model, 1)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        backward(twin, 0)
        assert not twin._forward_pre_hooks
    assert model._forward_pre_hooks
    assert optimizer.active


# ---- torch.compile -------------------------------------------------------------------------------------------------


def compiled(model, how):
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        return model
    if how == "in place":
        model.compile(backend="aot_eager")
        return model
    return torch.compile(model, backend="aot_eager", fullgraph=how == "full graph")


@pytest.mark.parametrize("how", ["layers", "wrapper", "full graph", "in place"])
def test_compiled_gradients_equal_eager_ones_for_every_active_set_and_a_warning_says_what_to_do(how):
    torch._dynamo.reset()
    model, eager = (llama(2 if how == "layers" else 1) for _ in range(2))
    optimizer = MISA(model, interval=1, lr=0.0, num_blocks=1, order="ascending")
    fast = compiled(model, how)
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3):
            (block,) = optimizer.active
            eager.zero_grad()
            backward(eager, i)
            fast(**batch(i)).loss.backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert list(found) == [f"{block}.weight"]
            torch.testing.assert_close(found[f"{block}.weight"], eager.get_parameter(f"{block}.weight").grad)
            optimizer.step()
            optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - num_graphs <= 2 * 3
    messages = [str(w.message) for w in caught if "torch.compile makes a new graph" in str(w.message)]
    assert len(messages) == 1
    assert "recompile_limit" in messages[0]
    assert ("layer.compile()" in messages[0]) == (how != "layers")


def test_compiled_model_whose_blocks_never_switch_is_not_warned_of():
    torch._dynamo.reset()
    model = torch.compile(llama(1), backend="eager")
    optimizer = MISA(model, budget=1.0, interval=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile makes")
        train(model, optimizer, 2)
    assert optimizer.round == 2


@pytest.mark.slow
def test_compiled_layers_make_a_bounded_number_of_graphs():
    """A layer has one graph for each of its blocks, one for blocks below it and one for blocks above it."""
    torch._dynamo.reset()
    model, eager = llama(2), llama(2)
    optimizer = MISA(model, interval=1, lr=0.0, num_blocks=1, order="ascending")
    compiled(model, "layers")
    limits = {"recompile_limit": 32, "accumulated_recompile_limit": 32}
    numbers = []
    with torch._dynamo.config.patch(**limits), warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile makes")  # with the limits raised nothing to warn of
        for i in range(28):
            (block,) = optimizer.active
            eager.zero_grad()
            backward(eager, i)
            model(**batch(i)).loss.backward()
            grad = model.get_parameter(f"{block}.weight").grad
            torch.testing.assert_close(grad, eager.get_parameter(f"{block}.weight").grad)
            optimizer.step()
            optimizer.zero_grad()
            numbers.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert numbers[13] - numbers[0] <= 14 + 2 * 2
    assert numbers[27] == numbers[13]


def test_model_that_is_not_compiled_gets_no_warning():
    model = llama(2)
    optimizer = BAdam(model, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 3)
