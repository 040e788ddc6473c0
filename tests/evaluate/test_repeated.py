"""An evaluation that is made again, of another model, by other code, or after a kill; and models that are damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from misa import evaluate
from misa.evaluation import scoring, session
from misa.results import Result, provenance, read_result, write_result


@pytest.fixture
def error(capsys):
    """The last line on standard error of a command that must end with status 2."""

    def line(words: list[str]) -> str:
        assert evaluate.main(words) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return line


@pytest.fixture
def copied(known, tmp_path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(known.model, tmp_path / "copied"))


def finetuned(folder: Path) -> Result:
    result = Result(
        run="misa-s3", kind="finetune", method="misa", model="tiny", data="family", seed=3, config={},
        provenance=provenance(["misa.train"], ""), metrics={}, peaks={}, timings={},
    )  # fmt: skip
    write_result(result, folder)
    return result


def test_base_must_be_another_evaluation(known, words, error, tmp_path) -> None:
    assert evaluate.main(words()) == 0
    said = error(words(model_name_or_path=known.untrained, base=tmp_path / "out"))
    assert "base is" in said
    assert "the folder of this evaluation; allowed is another evaluation, or a model" in said


def test_kill_between_two_files_leaves_no_mixed_evaluation(known, words, tmp_path, monkeypatch, capsys) -> None:
    assert evaluate.main(words(base=known.untrained)) == 0
    assert (tmp_path / "out" / "comparison.csv").is_file()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("misa.results.write_result", interrupt)
        assert evaluate.main(words(model_name_or_path=known.untrained)) == 130
    assert {path.name for path in (tmp_path / "out").glob("*.*")} == {"lm_eval.json"}
    assert evaluate.main(words()) == 0
    assert "taken from" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert found["results"]["misa_family"]["exact_match,none"] == 1.0


@pytest.mark.parametrize("damaged", ["finished", "lm_eval.json"])
@pytest.mark.parametrize("text", ["[]", '{"task": '])
def test_what_cannot_be_read_is_made_again(words, tmp_path, damaged, text) -> None:
    assert evaluate.main(words()) == 0
    (kept,) = (tmp_path / "out" / "finished").iterdir()
    before = (tmp_path / "out" / "lm_eval.json").read_bytes()
    if damaged == "finished":
        kept.write_text(text)
        (tmp_path / "out" / "result.json").unlink()
    else:
        (tmp_path / "out" / "lm_eval.json").write_text('{"task": ')
    assert evaluate.main(words()) == 0
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text())["results"] == json.loads(before)["results"]


def test_score_by_other_code_is_made_again(words, tmp_path, capsys, monkeypatch) -> None:
    assert evaluate.main(words()) == 0
    assert evaluate.main(words()) == 0
    assert "nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(scoring, "code_digest", lambda task: "other prompts")
    assert evaluate.main(words()) == 0
    out = capsys.readouterr().out
    assert "nothing to do" not in out
    assert "taken from" not in out


def test_code_of_harness_tasks_counts() -> None:
    assert scoring.code_digest("misa_family") == scoring.code_digest("misa_gsm8k")
    assert scoring.code_digest("hellaswag") != scoring.code_digest("winogrande")  # each has functions beside its files


def test_finished_evaluation_gets_another_name_and_is_reported(words, tmp_path, capsys) -> None:
    assert evaluate.main(words()) == 0
    assert evaluate.main(words(run="other")) == 0
    assert "taken from" in capsys.readouterr().out
    assert read_result(tmp_path / "out").run == "other"
    assert evaluate.main(words(report_to="wandb")) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "wandb, which is not installed" in out


def test_only_the_folder_of_a_training_run_says_which_run_made_a_model(copied, words, tmp_path, monkeypatch) -> None:
    parent = tmp_path / "run"
    parent.mkdir()
    shutil.move(copied, parent / "model")
    for text in ('{"score": 3}', None):
        if text is None:
            assert evaluate.main(words(output_dir=parent)) == 0  # another evaluation
        else:
            (parent / "result.json").write_text(text)
        assert evaluate.main(words(model_name_or_path=parent / "model", output_dir=tmp_path / f"out-{text}")) == 0
        assert read_result(tmp_path / f"out-{text}").config["base_run"] == ""
    finetuned(parent)
    monkeypatch.chdir(parent / "model")
    assert evaluate.main(words(model_name_or_path=".", output_dir=tmp_path / "inside")) == 0
    found = read_result(tmp_path / "inside")
    assert (found.config["base_run"], found.method, found.seed) == ("misa-s3", "misa", 3)
    (parent / "result.json").unlink()
    assert evaluate.main(words(model_name_or_path=".", output_dir=tmp_path / "inside", run="again")) == 0
    assert read_result(tmp_path / "inside").model == "model"


def test_name_on_a_hub_has_no_training_run(tmp_path, monkeypatch) -> None:
    from misa.evaluation.folder import ModelFolder

    finetuned(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert session._training_run(ModelFolder("gpt2")) is None


@pytest.mark.parametrize(("is_adapter", "num_missing"), [(False, 9), (True, 14)])
def test_weights_that_are_missing_are_no_random_numbers(is_adapter, num_missing, copied, words, error, tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    path = copied / "model.safetensors"
    if is_adapter:
        base = AutoModelForCausalLM.from_pretrained(copied)
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(path.parent)
    kept = {name: tensor for name, tensor in load_file(path).items() if ".layers.1." not in name}
    save_file(kept, path, {"format": "pt"})
    said = error(words(model_name_or_path=path.parent))
    assert f"model_name_or_path {path.parent} lacks {num_missing} weights of the model: " in said
    assert "model.layers.1." in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.safetensors", "", "cannot be loaded"),
        ("config.json", "[]", "config.json holds no object, but list"),
        ("config.json", '{"model_type": ', "config.json is no JSON file"),
        ("tokenizer.json", '{"version": ', "cannot be loaded"),
        ("adapter_config.json", '{"base_model_name_or_path": null}', "base_model_name_or_path is None"),
        ("adapter_config.json", "[]", "adapter_config.json holds no object"),
    ],
)
def test_damaged_model_is_named_in_a_line(copied, words, error, name, text, message) -> None:
    (copied / name).write_text(text)
    said = error(words(model_name_or_path=copied))
    assert message in said
    assert str(copied) in said


def test_damaged_gguf_file_is_named_in_a_line(words, error, tmp_path) -> None:
    (tmp_path / "half.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert f"model_name_or_path {tmp_path / 'half.gguf'} gives no model" in error(
        words(model_name_or_path=tmp_path / "half.gguf")
    )


def test_tokenizer_without_an_end_token_is_refused(copied, words, error) -> None:
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        values = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps({k: v for k, v in values.items() if "eos" not in k}))
    assert "its tokenizer has no end token" in error(words(model_name_or_path=copied))


def test_context_beyond_the_model_and_documents_without_text_are_refused(known, words, error, tmp_path) -> None:
    assert "max_length is 1025, allowed is up to the 1024 tokens" in error(words(max_length=1025))
    shutil.copytree(known.data, tmp_path / "data")
    (tmp_path / "data" / "validation.jsonl").write_text('{"text": ""}\n{"text": "hello there"}\n')
    asked = {"tasks": "perplexity", "data_dir": tmp_path / "data"}
    assert "validation.jsonl has no text in the first 1 records" in error(words(**asked, limit=1))
    assert evaluate.main(words(**asked, limit=2)) == 0


@pytest.mark.parametrize(
    ("given", "offline"),
    [
        ({}, True),
        ({"base": "org/base"}, False),
        ({"base": "organisation/base", "offline": "yes"}, True),
        ({"model_name_or_path": "org/model"}, False),
        ({"model_name_or_path": "org/model", "offline": "no"}, False),
        ({"model_name_or_path": "org/model", "offline": "n"}, False),
        ({"model_name_or_path": "adapter"}, False),
    ],
)
def test_hub_is_left_alone_only_if_nothing_comes_from_it(words, tmp_path, monkeypatch, given, offline) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    monkeypatch.setattr(os, "environ", {})
    evaluate._go_offline(words(**given))
    assert ("HF_HUB_OFFLINE" in os.environ) == offline
