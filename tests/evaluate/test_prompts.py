"""What reaches the model of a prompt."""

from __future__ import annotations

import shutil


def test_long_prompts_are_cut_on_the_left(known, tmp_path) -> None:
    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.model import load_model

    model = load_model(
        ModelFolder(str(known.model)),
        dtype="float32",
        device="cpu",
        batch_size=None,
        max_length=None,
        max_prompt_length=5,
    )
    tokens, mask = model.tok_batch_encode(["one two three four five six seven eight", "one"])
    assert tokens.shape[1] == 5
    assert tokens[0].tolist() == model.tok_encode("one two three four five six seven eight")[-5:]
    assert mask[1].tolist()[0] == 0


def test_prompts_are_not_closed_by_a_tokenizer_that_closes_texts(known, tmp_path) -> None:
    """As in training, where the response follows the prompt; nor what is scored by its log-likelihood."""
    from lm_eval.api.instance import Instance
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from misa.data.instruction import encode, format_prompt
    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.model import load_model

    folder = shutil.copytree(known.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a")["input_ids"][-1] == end[1]
    plain, closing = (
        load_model(
            ModelFolder(str(name)), dtype="float32", device="cpu", batch_size=2, max_length=None, max_prompt_length=50
        )
        for name in (known.model, folder)
    )
    prompts = [format_prompt("Who is Anna?"), "Short."]
    for found, expected in zip(closing.tok_batch_encode(prompts), plain.tok_batch_encode(prompts), strict=True):
        assert found.tolist() == expected.tolist()
    trained = encode({"instruction": "Who is Anna?", "output": ""}, tokenizer, 512)["input_ids"]
    assert closing.tok_encode(prompts[0]) == plain.tok_encode(prompts[0]) == trained[:-1]
    request = Instance("loglikelihood", {}, (prompts[1], " Anna"), 0)
    assert closing.loglikelihood([request], True) == plain.loglikelihood([request], True)
