"""`--loss chunked` in the training commands: the same curve, and no logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from misa import pretrain
from misa.results import read_curves, read_result


@pytest.mark.parametrize("method", ["misa", "lora"])
def test_chunked_loss_trains_as_the_full_one(finetune: Callable[..., int], tmp_path: Path, method: str) -> None:
    options = {"budget": 0.2, "interval": 2} if method == "misa" else {"lora_r": 4}
    assert finetune("full", method=method, **options) == 0
    assert finetune("chunked", method=method, loss="chunked", **options) == 0
    full, chunked = (
        [point.value for point in read_curves(tmp_path / name) if point.metric in ("train_loss", "eval_loss")]
        for name in ("full", "chunked")
    )
    assert chunked == pytest.approx(full, rel=1e-4)
    assert read_result(tmp_path / "chunked").config["loss"] == "chunked"


def test_pretraining_takes_it_too(pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    for loss in ("full", "chunked"):
        assert pretrain.main(pretrain_words(loss, method="adamw", loss=loss)) == 0
    full, chunked = (read_result(tmp_path / loss).metrics["eval_loss"] for loss in ("full", "chunked"))
    assert chunked == pytest.approx(full, rel=1e-4)


def test_other_losses_are_refused(finetune: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("x", method="misa", loss="none") == 2
    assert "--loss: invalid choice: 'none'" in capsys.readouterr().err
