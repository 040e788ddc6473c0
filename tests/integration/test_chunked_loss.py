"""The chunked loss against transformers' own: same loss, same gradients, less memory."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from misa.integration.chunked_loss import ChunkedLoss, linear_cross_entropy
from misa.memory.tracker import MemoryTracker


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=211, **{**sizes, **changes})).train()


def batch():
    tokens = torch.randint(211, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ignored", [0, 7, 50])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_function_equals_cross_entropy_and_its_gradients(chunk, ignored):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(31, 8, generator=generator).requires_grad_()
    targets = torch.randint(31, (50,), generator=generator)
    targets[:ignored] = -100
    total = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    (3 * total).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (3 * expected).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(found, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_items", [None, 20, torch.tensor(20)])
@pytest.mark.parametrize("tied", [False, True])
def test_model_trains_as_with_its_own_loss(num_items, tied):
    model = tiny(tie_word_embeddings=tied)
    own = model(**batch(), num_items_in_batch=num_items).loss
    own.backward()
    expected = gradients(model)
    model.zero_grad()
    ChunkedLoss(model, chunk_tokens=8)
    output = model(**batch(), num_items_in_batch=num_items)
    output.loss.backward()
    assert output.logits is None
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(own.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_bf16_loss_is_as_exact_as_the_models_own():
    model = tiny().to(torch.bfloat16)
    own = model(**batch()).loss
    ChunkedLoss(model, chunk_tokens=8)
    assert model(**batch()).loss.item() == pytest.approx(own.item(), rel=1e-5)


def test_frozen_head_gets_no_gradient_and_evaluation_keeps_its_logits():
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    handle = ChunkedLoss(model)
    model(**batch()).loss.backward()
    assert model.lm_head.weight.grad is None
    model.eval()
    evaluated = model(**batch())
    assert evaluated.logits.shape == (3, 17, 211)
    assert model.train()(input_ids=batch()["input_ids"]).logits.shape == (3, 17, 211)
    handle.remove()
    trained = model(**batch())
    assert trained.logits is not None
    assert trained.loss.item() == pytest.approx(evaluated.loss.item(), rel=1e-6)


def test_no_more_than_a_chunk_of_logits_is_alive():
    tokens, features, classes, chunk = 256, 8, 4000, 16
    hidden, weight = torch.randn(tokens, features, requires_grad=True), torch.randn(classes, features)
    with MemoryTracker() as tracker:
        linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.long), chunk_tokens=chunk).backward()
    # The weight, one chunk, the input and its gradient, small numbers.
    assert tracker.peak.total_bytes < 1.2 * chunk * classes * 4 + 2 * hidden.nbytes + weight.nbytes


def test_what_it_cannot_serve_is_refused():
    model = tiny()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="loss=chunked: this model changes its logits \\(final_logit_softcapping\\)"):
        ChunkedLoss(model)
    with pytest.raises(ValueError, match="chunk_tokens is 0; it must be at least 1"):
        ChunkedLoss(tiny(), 0)
    with pytest.raises(ValueError, match="needs a causal language model"):
        ChunkedLoss(nn.Linear(2, 2))
