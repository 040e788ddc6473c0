"""Wrap a loaded model for the harness, without a question to the network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from misa.evaluation.folder import ModelFolder


class Model(HFLM):
    """A loaded causal LM for the harness.

    Two things differ from `HFLM`: nothing is looked up on a hub, and the windows of all documents are scored in one
    pass, sorted by length, where `HFLM` pads each batch to its longest and draws a progress bar for each.

    Attributes:
        num_scored_tokens: Tokens predicted by the last `loglikelihood_rolling`.
    """

    num_scored_tokens = 0

    def get_model_info(self) -> dict[str, Any]:
        """Return size and dtype for the harness's record."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each document, nats."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        self.num_scored_tokens = sum(len(continuation) for _, _, continuation in windows)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, answers, strict=True):
            totals[owner] += value
        return totals


def load_model(folder: ModelFolder, *, dtype: str, device: str, batch_size: int, max_length: int | None) -> Model:
    """Load model and tokenizer.

    Args:
        folder: What to load.
        dtype: "auto" (as saved), "bfloat16", "float16" or "float32".
        device: Where to compute, such as "cpu" or "cuda".
        batch_size: Documents at a time.
        max_length: Longest context in tokens; None takes the model's own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The harness's warnings are about a model that is given as an object, which is what is meant here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model: Any = AutoModelForCausalLM.from_pretrained(folder.base, dtype=dtype)
    if folder.is_adapter:
        from peft import PeftModel

        # Not merged: merging rounds the sum to the dtype of the base, which is not the model that was trained.
        model = PeftModel.from_pretrained(model, folder.name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer)
    return Model(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        # Sums of thousands of log-likelihoods need more digits than bf16 has.
        softmax_dtype="float32",
        # Documents are distinct, so a cache of equal contexts only costs time.
        logits_cache=False,
    )
