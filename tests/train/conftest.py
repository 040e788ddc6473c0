"""A model, instructions and a corpus small enough that a whole training run takes a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from misa.data.corpus import train_tokenizer
from misa.data.records import write_records
from misa.models import build_model
from misa.training.trainer import Schedule

WORDS = (
    *("red", "green", "blue", "round", "square", "heavy", "light", "old", "new"),
    *("fast", "slow", "warm", "cold", "near", "far", "one", "two", "three"),
)


class Killed(BaseException):
    """Stands for a kill at a chosen moment: nothing in the package catches it."""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with model/, instructions/ and corpus/."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("small")
    rng = random.Random(0)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    texts = [sentence(20, 60) for _ in range(120)]
    tokenizer = train_tokenizer([*texts, "### Instruction: ### Response: Below is an instruction"], 320)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    build_model(config, seed=1).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "tiny.json").write_text(config.to_json_string())
    write_records(
        root / "instructions" / "train.jsonl",
        ({"instruction": sentence(2, 30), "output": sentence(1, 5)} for _ in range(24)),
    )
    write_records(root / "corpus" / "train.jsonl", ({"text": text} for text in texts[:100]))
    write_records(root / "corpus" / "validation.jsonl", ({"text": text} for text in texts[100:]))
    tokenizer.save_pretrained(root / "corpus" / "tokenizer")
    return root


@pytest.fixture
def finetune(small: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `misa.train` for 9 steps of 4 records (5 steps an epoch), with checkpoints every 3."""
    from misa import train

    def run(name: str, *words: Any, **options: Any) -> int:
        defaults = {
            "model_name_or_path": small / "model",
            "dataset_path": small / "instructions",
            "output_dir": tmp_path / name,
            "tokenized_dir": tmp_path / "tokens",
            "dtype": "float32",
            "validation_samples": 4,
            "learning_rate": 1e-2,
            "max_steps": 9,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 3,
            "seed": 0,
        }
        return train.main(command_line({**defaults, **options}, words))

    return run


@pytest.fixture
def pretrain_words(small: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Words of a `misa.pretrain` command."""

    def words(name: str, *more: Any, **options: Any) -> list[str]:
        defaults = {
            "model_config": small / "tiny.json",
            "dataset_path": small / "corpus",
            "output_dir": tmp_path / name,
            "tokenized_dir": tmp_path / "tokens",
            "max_length": 32,
            "max_eval_tokens": 320,
            "learning_rate": 1e-2,
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "logging_steps": 3,
            "save_steps": 4,
            "seed": 0,
        }
        return command_line({**defaults, **options}, more)

    return words


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Kill the next run after a step, before anything of that step is logged or saved; None kills no more."""
    original = Schedule.on_step_end

    def choose(step: int | None) -> None:
        def on_step_end(self: Schedule, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step:
                raise Killed
            return original(self, args, state, control, **kwargs)

        monkeypatch.setattr(Schedule, "on_step_end", on_step_end)

    return choose


def command_line(options: dict[str, Any], words: tuple[Any, ...]) -> list[str]:
    pairs = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return [*pairs, *map(str, words)]


def outcome(folder: Path) -> tuple[dict[str, bytes], list[tuple[int, int, str, float]]]:
    """Return what must not depend on interruptions: the bytes of all weights, and the curves without their times."""
    from misa.results import read_curves

    weights = {path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))}
    assert weights
    return weights, [(p.step, p.tokens, p.metric, p.value) for p in read_curves(folder)]
