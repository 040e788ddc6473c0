"""Wrap a loaded model for the harness, without a question to the network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import psutil
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from misa.evaluation.beams import SHARED_ATTENTION, beam_search, can_search
from misa.evaluation.folder import ModelFolder
from misa.models import first_line

# Documents scored between two entries in the request cache.
ROLLING_DOCUMENTS = 256

# More documents at a time than this hardly go faster.
MOST_DOCUMENTS = {"cpu": 64, "cuda": 256}

# The same where nothing is generated.
SCORED_DOCUMENTS = 32


class Model(HFLM):
    """A loaded causal LM for the harness.

    What differs from `HFLM`: nothing is looked up on a hub; the windows of many documents are scored in one pass,
    sorted by length, where `HFLM` draws a progress bar for each document; beams are searched by `beam_search`; `auto`
    takes a batch size that fits without trying; and a tokenizer that closes every text with the end token does not
    close prompts, as in training.

    Attributes:
        auto_batch_size: Choose the batch size anew for each set of prompts.
        max_prompt_length: Prompts of generated answers are cut on the left to so many tokens; None cuts only what
            does not fit into the model.
    """

    auto_batch_size = False
    max_prompt_length: int | None = None

    def get_model_info(self) -> dict[str, Any]:
        """Return size and dtype for the harness's record."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each document, nats."""
        totals = []
        for start in range(0, len(requests), ROLLING_DOCUMENTS):
            some = requests[start : start + ROLLING_DOCUMENTS]
            totals += self._rolling(some, disable_tqdm)
            for request, total in zip(some, totals[start:], strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _rolling(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[float]:
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, answers, strict=True):
            totals[owner] += value
        return totals

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens that are predicted when a text is scored: all of it, given a start token."""
        return len(self.tok_encode(text, add_special_tokens=False))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt.

        Raises:
            ValueError: If the longest continuation leaves no room for a prompt.
        """
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        num_new = max((setting["max_gen_toks"] for setting in settings), default=0)
        require_room("the task", num_new, self.max_length)
        if self.auto_batch_size and requests:
            longest = max(len(self.tok_encode(request.args[0])) for request in requests)
            beams = max(setting.get("num_beams", 1) for setting in settings)
            size = cache_bytes(self.model, (longest + num_new) * beams)
            self.batch_size_per_gpu = documents_that_fit(size, self.device, MOST_DOCUMENTS.get(self.device.type, 32))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        if self.auto_batch_size and requests:
            longest = max(len(context) + len(continuation) for _, context, continuation in requests)
            # Logits of all tokens as the model gives them, widened to fp32, and their logarithms.
            num_logits = min(longest, self.max_length) * self.model.config.get_text_config().vocab_size
            size = num_logits * (self.model.dtype.itemsize + 8)
            self.batch_size_per_gpu = documents_that_fit(size, self.device, SCORED_DOCUMENTS)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return found

    @cached_property
    def _closes_texts(self) -> bool:
        """Whether the tokenizer by itself puts the end token behind a text."""
        end = self.tokenizer.eos_token_id
        return end is not None and self.tokenizer("a")["input_ids"][-1:] == [end]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Encode a text, without an end token that the tokenizer puts behind it."""
        tokens: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        if self._closes_texts and add_special_tokens is not False and tokens[-1:] == [self.tokenizer.eos_token_id]:
            return tokens[:-1]
        return tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts, cut on the left to `max_prompt_length`, and pad them to one length."""
        # An end token that is dropped afterwards takes no room.
        extra = int(self._closes_texts)
        limits = [limit + extra for limit in (left_truncate_len, self.max_prompt_length) if limit is not None]
        tokens, mask = super().tok_batch_encode(strings, padding_side, min(limits, default=None), truncation)
        if extra and padding_side == "left" and bool((tokens[:, -1] == self.tokenizer.eos_token_id).all()):
            return tokens[:, :-1], mask[:, :-1]
        return tokens, mask

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        num_beams = generation_kwargs.get("num_beams", 1)
        if num_beams == 1 or generation_kwargs.get("do_sample"):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        if not can_search(self.model):
            # The harness's stopping rules count documents, not beams; the text is cut at the stop words afterwards.
            return super()._model_generate(context, max_length, [], **generation_kwargs)
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return beam_search(
            self.model,
            context,
            generation_kwargs["attention_mask"],
            num_beams=num_beams,
            num_new=max_length - context.shape[1],
            end_ids=ends if isinstance(ends, list) else [ends],
            pad_id=self.tokenizer.pad_token_id,
        )


def require_room(task: str, num_new: int, max_length: int) -> None:
    """Check that a prompt has room beside what is generated.

    Args:
        task: Its name.
        num_new: Tokens that a response may have.
        max_length: Longest context in tokens.

    Raises:
        ValueError: If it has none.
    """
    if num_new >= max_length:
        raise ValueError(
            f"max_length is {max_length} (without one: the model's), allowed is more than the {num_new} tokens that "
            f"{task} may generate"
        )


def cache_bytes(model: Any, num_tokens: int) -> int:
    """Return the bytes of keys and values of some tokens, 0 for a model that keeps none, such as Mamba.

    Args:
        model: A transformers model.
        num_tokens: Number of tokens, those of all beams together.
    """
    config = model.config.get_text_config()
    all_heads = getattr(config, "num_attention_heads", 0)
    if not all_heads:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * num_tokens)


def documents_that_fit(bytes_of_document: int, device: Any, most: int) -> int:
    """Return how many documents to take at a time: what half of the free memory holds, within a bound.

    Args:
        bytes_of_document: What one document needs at most.
        device: Where the model computes.
        most: The bound.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, min(most, free // 2 // max(1, bytes_of_document)))


def load_model(
    folder: ModelFolder,
    *,
    dtype: str,
    device: str,
    batch_size: int | None,
    max_length: int | None,
    max_prompt_length: int | None = None,
) -> Model:
    """Load model and tokenizer.

    Args:
        folder: What to load.
        dtype: "auto" (as saved), "bfloat16", "float16" or "float32".
        device: Where to compute, such as "cpu" or "cuda".
        batch_size: Documents at a time; None chooses.
        max_length: Longest context in tokens; None takes the model's own.
        max_prompt_length: Longest prompt of a generated answer in tokens; None sets no limit.

    Raises:
        ValueError: If it cannot be loaded, weights are missing, or the tokenizer has no end token.
    """
    # The harness's warnings are about a model that is given as an object, which is what is meant here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    named = f"model_name_or_path {folder.name_or_path}"
    try:
        model, tokenizer, missing = _load(folder, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what libraries raise for damaged files has no class in common
        raise ValueError(f"{named} cannot be loaded: {first_line(error) or type(error).__name__}") from error
    if missing:
        raise ValueError(f"{named} lacks {len(missing)} weights of the model: {', '.join(missing[:3])}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{named}: its tokenizer has no end token (eos_token), with which prompts and answers end")
    loaded = Model(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        batch_size=batch_size or SCORED_DOCUMENTS,
        max_length=max_length,
        # Sums of thousands of log-likelihoods need more digits than bf16 has.
        softmax_dtype="float32",
        # Documents are distinct, so a cache of equal contexts only costs time.
        logits_cache=False,
    )
    loaded.auto_batch_size = batch_size is None
    loaded.max_prompt_length = max_prompt_length
    return loaded


def _load(folder: ModelFolder, dtype: str) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer, and the weights that no file holds, which would be random numbers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, of_file = folder.source
    model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **of_file)
    missing = sorted(found["missing_keys"])
    # The task says how long an answer may be; what a model brings would count instead.
    model.generation_config.max_new_tokens = None
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(SHARED_ATTENTION)
    if folder.is_adapter:
        from peft import PeftModel

        # Not merged: merging rounds the sum to the dtype of the base, which is not the model that was trained.
        model = PeftModel.from_pretrained(model, folder.name_or_path)
        missing += model.load_adapter(folder.name_or_path, "default").missing_keys  # loading anew tells what lacks
    return model, AutoTokenizer.from_pretrained(source if of_file else folder.tokenizer, **of_file), missing
