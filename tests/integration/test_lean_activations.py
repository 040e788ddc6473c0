"""Norms and gated products that are computed again: the same numbers, fewer bytes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from misa.integration.lean_activations import LeanActivations
from misa.memory.step import checkpoint_layers, measure_step, random_batch

NAMES = {
    "all": lambda name: True,
    "norms": lambda name: "norm" in name,
    "one down_proj": lambda name: "layers.1.mlp.down" in name,
    "one gate_proj": lambda name: "layers.1.mlp.gate" in name,
    "one q_proj": lambda name: "layers.1.self_attn.q" in name,
}


def llama(dtype=torch.bfloat16):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(dtype).train()


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains", NAMES)
def test_gradients_are_those_of_the_plain_model_bit_for_bit(trains):
    model, batch = llama(), random_batch(64, 2, 300)  # more tokens than a piece holds
    for name, p in model.named_parameters():
        p.requires_grad_(NAMES[trains](name))
    expected = gradients(model, batch)
    lean = LeanActivations(model)
    for num in (0, 2):
        checkpoint_layers(model, num)
        found = gradients(copy.deepcopy(model), batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    lean.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_less_is_kept_for_the_backward_pass():
    model, batch = llama(), random_batch(64, 4, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    for _ in range(2):
        kept.append(measure_step(model, optimizer, batch).moments["forward_end"].by_category["activations"])
        lean = LeanActivations(model)
    lean.remove()
    tokens = 4 * 256
    # Each layer: the fp32 inputs of two norms become bf16 ones, normalized inputs, activated gate and product go.
    least = 3 * tokens * (2 * 2 * 32 + 2 * 2 * 32 + 2 * 2 * 48)
    assert kept[0] - kept[1] >= least


def test_adapters_on_top_keep_their_gradients():
    batch, found = random_batch(64, 2, 8), []
    for is_lean in (False, True):
        model = llama(torch.float32)
        if is_lean:
            LeanActivations(model)
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        found.append(gradients(adapted, batch))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_other_feed_forward_layers_are_refused():
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    with pytest.raises(ValueError, match="lean_activations: this model has no feed-forward layer like LLaMA's"):
        LeanActivations(GPT2LMHeadModel(config))
