"""The table of compared methods."""

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


OPTIONS = {"misa": {"budget": 0.4, "interval": 5}, "misa_uniform": {"budget": 0.4, "interval": 5}}


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


def test_uniform_method_draws_uniformly():
    built = build("misa_uniform", tiny_model(), lr=1e-2, options={"budget": 0.4, "interval": 2})
    cls, kwargs = built.optimizer_cls_and_kwargs
    optimizer = cls()(built.model, **kwargs)
    assert len(set(optimizer.probabilities.values())) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "must be one of adamw"),
        ("adamw", {"budget": 0.1}, "has no option budget; its options are: none"),
        ("lora", {"lora_rank": 8}, "lora_r"),
        ("misa", {"budget": 1.5}, r"budget=1.5: must lie in \(0, 1\]"),
        ("misa", {"variant": "papper"}, "must be one of default, paper, official"),
    ],
)
def test_bad_option_is_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(build(name, tiny_model(), lr=1e-3, options=options))
