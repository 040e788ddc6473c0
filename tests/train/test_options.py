"""The options of the training commands."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import typing

import pytest
from transformers import TrainingArguments

from misa.methods import METHODS
from misa.training.options import CommonTrainingOptions


def test_every_training_argument_is_an_option_with_transformers_meaning() -> None:
    """An option shown by --help under `training` must be one of transformers, of the same type."""
    theirs = typing.get_type_hints(TrainingArguments)
    for field in dataclasses.fields(CommonTrainingOptions):
        assert field.name in theirs, field.name


def test_help_is_grouped_and_loads_no_trainer() -> None:
    code = (
        "import sys; from misa.train import main\n"
        "try: main(['--help'])\n"
        "finally:\n"
        "    heavy = ('transformers.trainer', 'accelerate', 'peft')\n"
        "    sys.stderr.write(str([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0
    assert done.stderr == "[]"
    shown = "".join(done.stdout.split())
    assert [name for name in METHODS if name not in shown] == []
    for text in (
        "run:",
        "model and data:",
        "method (an option",
        "training (every other option",
        "--budget",
        "--checkpoint_dir",
    ):
        assert text in done.stdout


def test_commands_are_listed_and_their_help_contradicts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from misa import __main__, evaluate, train
    from misa.memory import command as memory

    assert __main__.main() == 0
    listed = re.findall(r"^python -m misa\.(\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"train", "pretrain", "evaluate", "memory", "blocks"} < set(listed)
    assert all(importlib.util.find_spec(f"misa.{name}") for name in listed)
    for main in (train.main, evaluate.main, memory.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: None)" not in text
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "do not write the trained model into model/ --" in " ".join(capsys.readouterr().out.split())
