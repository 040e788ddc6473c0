"""The engine on models of many kinds: fused, tied, mixtures of experts, adapters, frozen parts."""

import pytest
import torch
from tiny import llama, moved, names_on, train, weights
from torch import nn

from misa.optimizer import LISA, MISA, BlockCoordinateOptimizer, Settings


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    return Phi3ForCausalLM(config)


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def tied():
    return llama(tie_word_embeddings=True)


def peft_llama():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gpt2, phi3, qwen3_moe, tied, peft_llama])
def test_kind_of_model_trains_what_is_on_and_nothing_else(make, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    optimizer = MISA(model, budget=0.3, interval=2, lr=1e-2)
    start, ever = weights(model), set()
    for i in range(8):
        before, on = weights(model), names_on(optimizer)
        ever |= on
        train(model, optimizer, 1, first=i)
        assert moved(before, model) == on
    assert moved(start, model) == ever


def test_tied_head_that_is_always_on_trains_once_and_stays_tied():
    model = tied()
    optimizer = LISA(model, num_blocks=1, interval=2)
    before = weights(model)
    train(model, optimizer, 3)
    assert "model.embed_tokens.weight" in moved(before, model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_integer_parameters_are_left_alone():
    model = llama()
    model.model.layers[0].extra = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    optimizer = MISA(model, budget=0.3, interval=1)
    train(model, optimizer, 3)
    optimizer.release()
    assert not model.model.layers[0].extra.requires_grad


def test_frozen_by_the_user_stays_frozen():
    model = llama()
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    optimizer = MISA(model, budget=0.3, interval=1)
    before = weights(model)
    train(model, optimizer, 6)
    assert not any("layers.0." in n for n in moved(before, model))
    optimizer.release()
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())


def test_all_order_trains_every_block_always():
    model = llama()
    optimizer = BlockCoordinateOptimizer(model, Settings(order="all", interval=2), lr=1e-3)
    assert len(optimizer.active) == 21
    train(model, optimizer, 3)
    assert len(optimizer.active) == 21


def test_sparse_gradients_are_refused_in_words():
    model = nn.Sequential(nn.Embedding(64, 8, sparse=True), *(nn.Linear(8, 8) for _ in range(3)))
    MISA(model, num_blocks=1)  # off, they are in nobody's way
    optimizer = LISA(model, granularity="matrix", always_on=["embeddings"])
    model(torch.arange(6)).square().sum().backward()
    with pytest.raises(ValueError, match=r"a gradient is sparse.*sparse=False"):
        optimizer.step()
