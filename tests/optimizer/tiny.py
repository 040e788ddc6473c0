"""Small real models and batches that the optimizer's tests share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(num_layers=3, dtype=torch.float32, seed=0, **config):
    """A Llama of 7 matrices a layer: 32 x 32, 16 x 32 and 48 x 32; 7,680 block parameters a layer."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype)


def batch(seed, num_rows=4, length=8):
    tokens = torch.randint(0, 64, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def backward(model, seed, scale=1.0):
    loss = model(**batch(seed)).loss
    (loss * scale).backward()
    return loss.detach()


def train(model, optimizer, num_steps, first=0):
    """Steps on the batches `first`, `first + 1`, ...; what every test calls ordinary training."""
    for i in range(first, first + num_steps):
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    """Names of the parameters that differ from an earlier copy."""
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def same(first, second):
    """Whether two models have bitwise equal weights."""
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def names_on(optimizer):
    """Names of the parameters in the active blocks."""
    return {n for b in optimizer.blocks if b.name in optimizer.active for n, _ in b.params}
