"""Beam search in batches gives the answers of `transformers` one by one."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from misa.evaluation import beams
from misa.evaluation.beams import SHARED_ATTENTION, beam_search, can_search

PAD, END, VOCAB_SIZE = 0, 3, 12


@pytest.fixture(scope="module", params=[(2, 0.3, 3), (4, 0.6, 2)], ids=["grouped heads", "plain heads"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """A random model of few tokens, with weights under which some texts end early and others do not."""
    num_heads, weight_range, seed = request.param
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_heads,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=END,
        initializer_range=weight_range,
    )
    return LlamaForCausalLM(config).eval()


def prompts(lengths: list[int], common: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random prompts that share their first tokens; alone, and as a batch padded on the left with its mask."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(4, VOCAB_SIZE, (common,), generator=generator)
    alone = [torch.cat([start, torch.randint(4, VOCAB_SIZE, (length,), generator=generator)]) for length in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(
        [prompt.flip(0) for prompt in alone], batch_first=True, padding_value=PAD
    ).flip(1)
    size = torch.tensor([len(prompt) for prompt in alone])
    mask = (torch.arange(batch.shape[1]) >= batch.shape[1] - size[:, None]).long()
    return alone, batch, mask


def one_by_one(model: LlamaForCausalLM, alone: list[torch.Tensor], num_beams: int, num_new: int) -> list[list[int]]:
    """What `generate` answers to each prompt by itself, without what follows the end token."""
    return [
        until_end(
            model.generate(
                prompt[None], num_beams=num_beams, max_new_tokens=num_new, do_sample=False, pad_token_id=PAD
            )[0, len(prompt) :].tolist()
        )
        for prompt in alone
    ]


def search(model: LlamaForCausalLM, batch: torch.Tensor, mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`beam_search`, with its attention for as long as it runs."""
    model.set_attn_implementation(SHARED_ATTENTION)
    try:
        return beam_search(model, batch, mask, pad_id=PAD, **settings)
    finally:
        model.set_attn_implementation("sdpa")


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("common", [0, 6])
@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize(("num_new", "leaving"), [(1, 0.125), (24, 0.125), (24, 1.0)])
def test_batch_gives_the_answers_of_generate(
    model, monkeypatch: pytest.MonkeyPatch, num_beams: int, num_new: int, leaving: float, common: int
) -> None:
    monkeypatch.setattr(beams, "LEAVING_SHARE", leaving)
    alone, batch, mask = prompts([3, 9, 1, 5, 5, 12, 2, 7, 4, 8, 6, 10], common)
    expected = one_by_one(model, alone, num_beams, num_new)
    if num_new > 1:
        # The test means something only if some end early and leave the batch, and some do not.
        assert len({len(answer) for answer in expected}) > 1
        assert any(answer[-1] == END for answer in expected)
    found = search(model, batch, mask, num_beams=num_beams, num_new=num_new, end_ids=[END])
    assert found.shape == (len(alone), batch.shape[1] + num_new)
    assert torch.equal(found[:, : batch.shape[1]], batch)
    assert [
        until_end(answer[batch.shape[1] :].tolist())[: len(e)] for answer, e in zip(found, expected, strict=True)
    ] == expected


@pytest.mark.gpu
def test_batch_gives_the_answers_of_generate_on_a_gpu(model) -> None:
    alone, batch, mask = prompts([3, 9, 1, 5, 5, 12, 2, 7, 4, 8, 6, 10], 6)
    on_gpu = copy.deepcopy(model).to("cuda")
    expected = one_by_one(on_gpu, [prompt.to("cuda") for prompt in alone], 4, 24)
    found = search(on_gpu, batch.to("cuda"), mask.to("cuda"), num_beams=4, num_new=24, end_ids=[END])
    assert [
        until_end(answer[batch.shape[1] :].tolist())[: len(e)] for answer, e in zip(found, expected, strict=True)
    ] == expected


def test_several_end_tokens_all_end(model) -> None:
    alone, batch, mask = prompts([3, 9, 1, 5])
    ends = [END, 7, 8]
    expected = [
        model.generate(
            prompt[None], num_beams=3, max_new_tokens=16, do_sample=False, pad_token_id=PAD, eos_token_id=ends
        )[0, len(prompt) :].tolist()
        for prompt in alone
    ]
    found = search(model, batch, mask, num_beams=3, num_new=16, end_ids=ends)
    assert [answer[batch.shape[1] :].tolist()[: len(e)] for answer, e in zip(found, expected, strict=True)] == expected


def test_models_with_windows_or_another_attention_are_not_searched(model) -> None:
    from transformers import Gemma2Config

    assert not can_search(model)
    plain = LlamaConfig(num_hidden_layers=2, attn_implementation=SHARED_ATTENTION)
    windowed = Gemma2Config(num_hidden_layers=2, sliding_window=4, attn_implementation=SHARED_ATTENTION)
    default = GenerationConfig()
    assert can_search(SimpleNamespace(config=plain, generation_config=default))
    assert not can_search(SimpleNamespace(config=windowed, generation_config=default))


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 4], "max_length": 64}, True),
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "early_stopping": False, "length_penalty": 1}, True),
        ({"repetition_penalty": 1.05}, False),
        ({"no_repeat_ngram_size": 2}, False),
        ({"length_penalty": 0.0}, False),
        ({"early_stopping": True}, False),
        ({"bad_words_ids": [[5]]}, False),
        ({"min_new_tokens": 4}, False),
        ({"suppress_tokens": [5]}, False),
    ],
)
def test_models_with_rules_of_their_own_for_generation_are_not_searched(settings: dict[str, Any], can: bool) -> None:
    config = LlamaConfig(num_hidden_layers=2, attn_implementation=SHARED_ATTENTION)
    assert can_search(SimpleNamespace(config=config, generation_config=GenerationConfig(**settings))) == can
