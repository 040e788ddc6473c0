"""Training inside a stated memory: what is chosen, what it takes, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MistralConfig

from misa import pretrain
from misa.memory.fit import measure_worst
from misa.memory.scenario import Laboratory, Scenario
from misa.models import load_tokenizer, model_config
from misa.results import read_result
from misa.training import run

from .conftest import Killed

SIZES = {"budget": 0.2, "interval": 2, "max_length": 256, "per_device_train_batch_size": 4, "max_eval_tokens": 256}
WORDS = {**SIZES, "model_config": "2m", "dtype": "bfloat16", "max_steps": 3, "save_steps": 1}


@pytest.fixture(scope="module")
def limit(small: Path) -> int:
    """Bytes between the worst draw as it is and with two layers checkpointed."""
    config = model_config("2m", vocab_size=len(load_tokenizer(small / "corpus" / "tokenizer")))
    scenario = Scenario("2m", "misa", {"budget": 0.2}, 4, 256, loss="chunked", lean_activations=True)
    laboratory = Laboratory(scenario, rounding_bytes=1, config=config, on_accelerator=False)
    return sum(measure_worst(laboratory, checkpointing=num).peak.total_bytes for num in (0, 2)) // 2


def test_run_stays_inside_its_memory_and_near_its_prediction_also_when_killed(
    pretrain_words: Callable[..., list[str]],
    limit: int,
    kill_at: Callable[[int | None], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = {**WORDS, "memory_budget": f"{limit}B"}
    assert pretrain.main(pretrain_words("whole", **words)) == 0
    result = read_result(tmp_path / "whole")
    plan, peaks = result.config["memory_plan"], result.peaks
    assert plan["loss"] == "chunked"
    assert plan["lean_activations"]
    assert plan["checkpointing"] != 0
    assert result.config["method_settings"]["budget"] == 0.2
    assert peaks["budget_bytes"] == limit
    assert peaks["measured_bytes"] <= limit
    assert peaks["measured_bytes"] == pytest.approx(peaks["predicted_bytes"], rel=0.03)
    assert "memory budget: trains 20% at a time, chunked loss" in caplog.text
    assert "- chunked loss: never holds all logits" in caplog.text
    assert "memory: predicted" in caplog.text

    kill_at(2)
    with pytest.raises(Killed):
        pretrain.main(pretrain_words("killed", **words))
    kill_at(None)
    assert pretrain.main(pretrain_words("killed", **words)) == 0
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_result(tmp_path / "killed").peaks["predicted_bytes"] == peaks["predicted_bytes"]


def test_kill_while_writing_the_model_loses_nothing_of_what_was_measured(
    finetune: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"budget": 0.3, "max_steps": 3, "memory_budget": "1GiB"}
    assert finetune("whole", **options) == 0

    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "new_folder", killed)
        with pytest.raises(Killed):
            finetune("killed", **options)
    assert finetune("killed", **options) == 0
    whole, killed_peaks = (read_result(tmp_path / name).peaks for name in ("whole", "killed"))
    for name in ("predicted_bytes", "measured_bytes"):
        assert killed_peaks[name] == whole[name] > 0


def test_start_from_a_checkpoint_of_another_run_measures_its_own_memory(
    finetune: Callable[..., int], tmp_path: Path
) -> None:
    options = {"budget": 0.3, "max_steps": 3}
    assert finetune("plain", "--keep_checkpoints", **options) == 0
    large = {"memory_budget": "1GiB", "per_device_train_batch_size": 16}
    assert finetune("large", "--keep_checkpoints", **options, **large) == 0
    options |= {"max_steps": 6, "memory_budget": "1GiB"}
    for name in ("plain", "large"):
        start = tmp_path / name / "checkpoints" / "checkpoint-3"
        assert finetune(f"{name}-on", continue_from=start, **options) == 0
    peaks = {name: read_result(tmp_path / name).peaks["measured_bytes"] for name in ("large", "plain-on", "large-on")}
    assert peaks["plain-on"] < peaks["large"]
    assert peaks["large-on"] < peaks["large"]


def test_padded_batches_take_what_is_predicted_and_train_the_same(
    pretrain_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Right padding needs no mask; with one, more would be kept than is predicted."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=1, **sizes)
    (tmp_path / "grouped.json").write_text(config.to_json_string())
    words = {**WORDS, "model_config": tmp_path / "grouped.json", "dtype": "float32", "padding": "max_length"}
    assert pretrain.main(pretrain_words("masked", **words)) == 0
    assert pretrain.main(pretrain_words("planned", memory_budget="1GiB", **words)) == 0
    masked, planned = (read_result(tmp_path / name) for name in ("masked", "planned"))
    for name in ("train_loss", "eval_loss"):
        assert planned.metrics[name] == pytest.approx(masked.metrics[name], rel=1e-5)
    assert planned.metrics["num_tokens"] == masked.metrics["num_tokens"] < 3 * 4 * 256
    assert planned.peaks["measured_bytes"] == pytest.approx(planned.peaks["predicted_bytes"], rel=0.01)


def test_levers_alone_change_no_number(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("plain", method="misa", budget=0.3, max_steps=3) == 0
    assert finetune("lean", "--lean_activations", method="misa", budget=0.3, max_steps=3, checkpoint_layers=1) == 0
    plain, lean = (read_result(tmp_path / name) for name in ("plain", "lean"))
    assert lean.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=1e-6)
    assert lean.config["checkpoint_layers"] == 1
    assert "memory_plan" not in lean.config


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({"memory_budget": "100KiB", "budget": 0.3}, (), "is too little for model with 4 x 512 tokens; the least"),
        ({"memory_budget": "100KiB", "budget": 0.3, "loss": "full"}, (), "(budget 0.3, full loss, lean activations,"),
        ({"memory_budget": "24"}, (), "memory_budget is '24'; it must be an amount with a unit"),
        ({"memory_budget": ""}, (), "memory_budget is ''; it must be an amount with a unit"),
        (
            {"memory_budget": "1GiB", "method": "lora"},
            (),
            "chooses for block methods; method lora is none",
        ),
        ({"memory_budget": "1GiB"}, ("--bf16",), "memory_budget: cannot predict autocast (bf16)"),
        ({"memory_budget": "1GiB"}, ("--packing",), "memory_budget: cannot predict its masks; leave out packing"),
        ({"memory_budget": "1GiB", "attn_implementation": "eager"}, (), "attention that keeps its scores (eager)"),
        ({"memory_budget": "1GiB", "probe_every": 1}, (), "cannot predict the pass that measures all blocks"),
        ({"memory_budget": "1GiB", "state_policy": "keep"}, (), "cannot predict the states of blocks that went off"),
        ({"memory_budget": "1GiB", "label_smoothing_factor": 0.1}, (), "cannot predict the loss of smoothed labels"),
        ({"memory_budget": "1GiB", "max_length": 4096}, (), "seq_len is 4096; model allows at most 2048"),
        ({"checkpoint_layers": -1}, (), "checkpoint_layers is -1, allowed is 0 or more"),
        (
            {"checkpoint_layers": 1},
            ("--activation_checkpointing",),
            "checkpoint_layers is 1, and gradient_checkpointing",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, object],
    words: tuple[str, ...],
    message: str,
    finetune: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune("refused", *words, **options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_masks_of_a_window_are_refused(
    pretrain_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They, and the keys and values repeated for them, are kept beside what is predicted."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = tmp_path / "window.json"
    words = {**WORDS, "model_config": config, "memory_budget": "1GiB"}
    config.write_text(MistralConfig(num_key_value_heads=1, sliding_window=256, **sizes).to_json_string())
    assert pretrain.main(pretrain_words("long", **words)) == 2
    assert "cannot predict the masks of attention in a window of 256 tokens" in capsys.readouterr().err
    assert pretrain.main(pretrain_words("short", **words | {"max_length": 255})) == 0
    peaks = read_result(tmp_path / "short").peaks
    assert peaks["measured_bytes"] == pytest.approx(peaks["predicted_bytes"], rel=0.03)


def test_draws_that_do_with_fewer_layers_stay_inside_the_budget_too():
    from transformers import AutoConfig

    from misa.memory.fit import plan
    from misa.memory.scenario import ALL_LAYERS, Scenario
    from misa.training.memory import MemoryWatch
    from misa.training.meter import Meter

    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=8000, num_key_value_heads=4, **sizes)
    scenario = Scenario(model="small", method="misa", options={"budget": 0.03}, batch_size=4, seq_len=1024)
    limit = 175 << 20
    chosen = plan(scenario, limit, config=config)
    assert chosen.scenario.checkpointing == ALL_LAYERS  # the worst draw needs all
    watch = MemoryWatch(chosen.laboratory.model, chosen, Meter(), None, limit)
    laboratory, layers = chosen.laboratory, set()
    for draw in laboratory.sample(8):
        watch._set_layers(tuple(laboratory.blocks[i].name for i in draw))
        laboratory.switch_to(draw)
        assert laboratory.measure(checkpointing=watch._layers).peak.total_bytes <= limit
        layers.add(watch._layers)
    assert layers > {ALL_LAYERS}  # and others do not
