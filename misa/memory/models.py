"""Shapes of the models whose memory can be counted without having them: their configurations, kept here.

The values are those of the published `config.json` files; no hub is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from misa.models import MODEL_SIZES, model_config, require_causal

# Vocabulary, hidden size, feed-forward size, layers, query heads, key and value heads, longest sequence.
_SHAPES: dict[str, tuple[str, int, int, int, int, int, int, int]] = {
    "llama3-8b": ("llama", 128_256, 4096, 14_336, 32, 32, 8, 8192),
    "llama2-7b": ("llama", 32_000, 4096, 11_008, 32, 32, 32, 4096),
    "mistral-7b": ("mistral", 32_000, 4096, 14_336, 32, 32, 8, 32_768),
    "qwen2.5-7b": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 131_072),
    "tinyllama-1.1b": ("llama", 32_000, 2048, 5632, 22, 32, 4, 2048),
    "llama2-70b": ("llama", 32_000, 8192, 28_672, 80, 64, 8, 4096),
}

#: Names that `configuration` knows besides folders and files.
MODEL_NAMES = (*_SHAPES, *MODEL_SIZES)


def configuration(name_or_path: str) -> Any:
    """Return the configuration of a model.

    Args:
        name_or_path: One of `MODEL_NAMES`, a model's folder, or a JSON configuration. Of a folder nothing but
            `config.json` is read.

    Returns:
        A transformers configuration, without a key and value cache.

    Raises:
        ValueError: If it is none of them, or no causal language model, or no model can be built of it.
    """
    from transformers import AutoConfig

    path = Path(name_or_path)
    if name_or_path in _SHAPES:
        kind, vocabulary, hidden, feed_forward, layers, heads, key_heads, positions = _SHAPES[name_or_path]
        fields: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": False,
        }
        if kind == "mistral":
            fields["sliding_window"] = None  # as from version 0.2 on
        config = AutoConfig.for_model(kind, **fields)
    elif name_or_path in MODEL_SIZES or path.is_file():
        config = model_config(name_or_path)
    elif (path / "config.json").is_file():
        config = model_config(str(path / "config.json"))
    else:
        raise ValueError(
            f"model is {name_or_path!r}; allowed: {', '.join(MODEL_NAMES)}, a model's folder, or a JSON configuration"
        )
    require_causal(config, name_or_path)
    _require_sense(config, name_or_path)
    config.use_cache = False
    return config


def _require_sense(config: Any, name: str) -> None:
    """Check what transformers takes without a word, and fails on in the middle of a step."""
    from transformers.activations import ACT2FN

    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads is not None and shared is not None and (shared < 1 or heads % shared):
        raise ValueError(f"model {name}: num_key_value_heads is {shared}; it must divide num_attention_heads, {heads}")
    for field in ("hidden_act", "hidden_activation", "activation_function"):
        if (value := getattr(config, field, None)) is not None and value not in ACT2FN:
            raise ValueError(f"model {name}: {field} is {value!r}; allowed: {', '.join(ACT2FN)}")


def longest_sequence(config: Any) -> int | None:
    """Tokens that the model's positions allow, or None where the configuration does not say."""
    return getattr(config, "max_position_embeddings", None)
