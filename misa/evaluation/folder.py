"""Find what is to be scored, and say what is wrong with it before anything is loaded."""

from __future__ import annotations

import json
import re
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

from misa.data.records import files_digest
from misa.models import first_line

ADAPTER_CONFIG = "adapter_config.json"

# What transformers reads of a model folder: its files, and, where those on the left are missing, older ones. What it
# does not read, such as the optimizer's state beside a checkpoint, makes no other model.
READ_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
READ_INSTEAD = {"*.safetensors": ("*.bin", "*.pt"), "tokenizer.json": ("*.txt",)}

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelFolder:
    """A checkpoint folder, a PEFT adapter folder, a GGUF file, or a hub id, checked before anything is loaded.

    Args:
        name_or_path: What to load.
        offline: Refuse what is not on this machine.

    Raises:
        ValueError: If it is neither a folder with a `config.json` or `adapter_config.json`, nor a GGUF file, nor a
            permitted hub id.
    """

    def __init__(self, name_or_path: str, offline: bool = False) -> None:
        self.name_or_path = name_or_path
        self.folder = Path(name_or_path)
        self.base = name_or_path
        if self.is_gguf:
            return
        if not self.folder.is_dir():
            if self.folder.exists():
                raise ValueError(f"model_name_or_path {name_or_path} is a file, neither a model folder nor GGUF")
            if not HUB_ID.fullmatch(name_or_path):
                raise ValueError(f"model_name_or_path {name_or_path}: no such folder")
            if offline and not in_hub_cache(name_or_path):
                raise ValueError(
                    f"model_name_or_path {name_or_path}: no such folder, and offline; it would come from "
                    f"https://huggingface.co/{name_or_path}"
                )
        elif self.is_adapter:
            self.base = self._base_of_adapter()
        elif not (self.folder / "config.json").is_file():
            raise ValueError(f"model_name_or_path {name_or_path} has neither config.json nor {ADAPTER_CONFIG}")

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, whose weights are dequantised."""
        return self.folder.suffix == ".gguf" and self.folder.is_file()

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter instead of a whole model."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def source(self) -> tuple[str, dict[str, str]]:
        """What `from_pretrained` reads, of an adapter its base: a folder or hub id, and further arguments."""
        return (str(self.folder.parent), {"gguf_file": self.folder.name}) if self.is_gguf else (self.base, {})

    @property
    def config(self) -> Any:
        """Configuration of the model, of an adapter that of its base.

        Raises:
            ValueError: If it cannot be read, or the hub does not give it.
        """
        from transformers import AutoConfig

        source, of_file = self.source
        try:
            return AutoConfig.from_pretrained(source, **of_file)
        except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(
                f"model_name_or_path {self.name_or_path} gives no model, allowed is a folder with config.json or "
                f"{ADAPTER_CONFIG}, a GGUF file, or a hub id: {first_line(error)}"
            ) from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything on this machine that can change a score, or "" for a model of a hub.

        A base on a hub counts by its name, which the adapter's configuration holds.
        """
        if self.is_gguf:
            return files_digest([self.folder])
        if not self.folder.is_dir():
            return ""
        folders = dict.fromkeys((Path(self.base), self.folder))
        return files_digest(path for folder in folders for path in model_files(folder))

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer lies; an adapter folder may leave it to its base."""
        has_own = (self.folder / "tokenizer_config.json").is_file() or not self.folder.is_dir()
        return self.name_or_path if has_own else self.base

    def resolve_dtype(self, dtype: str) -> str:
        """Return the dtype to compute in.

        Args:
            dtype: A dtype, or "auto": that of the saved weights, but float32 in place of a half precision that this
                machine would only emulate, several times slower.
        """
        from misa.models import resolve_dtype

        if dtype == "auto" and self.is_gguf:
            return resolve_dtype("auto")
        if dtype != "auto" or not (Path(self.base) / "config.json").is_file():
            return dtype
        config = _read_object(Path(self.base) / "config.json")
        saved = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return saved if saved == "float32" or resolve_dtype("auto") != "float32" else "float32"

    def _base_of_adapter(self) -> str:
        path = self.folder / ADAPTER_CONFIG
        base = _read_object(path).get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ValueError(f"{path} does not name the base model: base_model_name_or_path is {base!r}")
        # A base that was moved together with its adapter is found by its path relative to the adapter.
        for candidate in (Path(base), self.folder / base):
            if (candidate / "config.json").is_file():
                return str(candidate)
        if not HUB_ID.fullmatch(base):
            raise ValueError(f"{path} names the base model {base}, which is not there")
        return base


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object, but {type(found).__name__}")
    return found


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder with a model, an adapter or a tokenizer that can change what it answers.

    Args:
        folder: The folder; one that is not there has none.
    """
    patterns = list(READ_FILES)
    for pattern, older in READ_INSTEAD.items():
        if not any(folder.glob(pattern)):
            patterns += older
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def in_hub_cache(hub_id: str) -> bool:
    """Say whether a model was fetched from the hub before and lies in its cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
