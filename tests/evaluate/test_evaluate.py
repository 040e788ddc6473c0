"""Scores come from the real harness on a real (small) model, with no network and no mocks."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from misa import evaluate
from misa.results import read_result


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_learnt_answers_score_full_and_untrained_model_zero(known, words, tmp_path: Path) -> None:
    """Training's prompt and the task's are the same, and left padding changes nothing: every answer comes back."""
    assert evaluate.main(words()) == 0
    result = read_result(tmp_path / "out")
    assert result.kind == "evaluate"
    assert result.metrics["misa_family/exact_match"] == 1.0
    assert result.metrics["misa_family/num_documents"] == 6
    assert result.config["task_versions"] == {"misa_family": "1.0"}
    assert evaluate.main(words(model_name_or_path=known.untrained, output_dir=tmp_path / "before")) == 0
    assert read_result(tmp_path / "before").metrics["misa_family/exact_match"] == 0.0


def test_batch_size_changes_no_response(words, tmp_path: Path) -> None:
    responses = {}
    for batch_size in (1, 6):
        out = tmp_path / str(batch_size)
        assert evaluate.main(words(batch_size=batch_size, output_dir=out)) == 0
        samples = json.loads((out / "lm_eval.json").read_text())["samples"]["misa_family"]
        responses[batch_size] = [sample["resps"] for sample in samples]
    assert responses[1] == responses[6]


def test_auto_scores_as_many_texts_at_a_time_as_the_memory_holds_logits_of(
    known, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of long texts and a large vocabulary are larger than the model by far."""
    import psutil

    from misa.evaluation.model import SCORED_DOCUMENTS, Model

    shapes = []
    call = Model._model_call
    monkeypatch.setattr(Model, "_model_call", lambda self, ids: shapes.append(ids.shape) or call(self, ids))
    texts = [f"{number} is a text of its own. " * 5 for number in range(40)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {}
    for available in (10**10, 10**7):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
        shapes.clear()
        out = tmp_path / str(available)
        assert evaluate.main(words(tasks="perplexity", data_dir=tmp_path, batch_size="auto", output_dir=out)) == 0
        found[available] = read_result(out).metrics["perplexity/loss"]
        most = max(num_texts for num_texts, _ in shapes)
        vocab_size = json.loads((known.model / "config.json").read_text())["vocab_size"]
        # In fp32, and their logarithms.
        assert all(2 * 4 * num_texts * length * vocab_size < available / 2 for num_texts, length in shapes)
        assert most == SCORED_DOCUMENTS if available == 10**10 else 1 < most < SCORED_DOCUMENTS
    assert found[10**7] == pytest.approx(found[10**10], rel=1e-5)


def test_model_without_attention_answers_at_the_default_batch_size(known, words, tmp_path: Path) -> None:
    """It has no keys and values whose bytes could be counted."""
    from transformers import MambaConfig, MambaForCausalLM

    folder = shutil.copytree(known.model, tmp_path / "mamba")
    config = json.loads((folder / "config.json").read_text())
    sizes = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **sizes)).save_pretrained(folder)
    assert evaluate.main(words(model_name_or_path=folder, batch_size="auto")) == 0
    assert read_result(tmp_path / "out").metrics["misa_family/num_documents"] == 6


def test_answer_is_as_long_as_the_task_allows_whatever_the_model_brings(known, words, tmp_path: Path) -> None:
    folder = shutil.copytree(known.untrained, tmp_path / "talkative")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 40}))
    found = []
    for name, model in (("plain", known.untrained), ("talkative", folder)):
        assert evaluate.main(words(model_name_or_path=model, output_dir=tmp_path / "out" / name, limit=2)) == 0
        samples = json.loads((tmp_path / "out" / name / "lm_eval.json").read_text())["samples"]["misa_family"]
        found.append([sample["resps"] for sample in samples])
    assert found[0] == found[1]


def test_adapter_is_scored_over_its_base(known, words, tmp_path: Path) -> None:
    """An adapter that does nothing scores like its base, one that disturbs it does not; a moved pair is found."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(known.model, tmp_path / "moved" / "base")
    for name, scale in (("idle", 0.0), ("wild", 5.0)):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(known.model), LoraConfig(r=4, target_modules="all-linear")
        )
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=1.0).mul_(scale)
        model.peft_config["default"].base_model_name_or_path = "../base"
        model.save_pretrained(tmp_path / "moved" / name)
        out = tmp_path / f"out-{name}"
        assert evaluate.main(words(model_name_or_path=tmp_path / "moved" / name, output_dir=out)) == 0
    assert read_result(tmp_path / "out-idle").metrics["misa_family/exact_match"] == 1.0
    assert read_result(tmp_path / "out-wild").metrics["misa_family/exact_match"] < 1.0


@pytest.mark.parametrize("max_length", [16, 256])
def test_perplexity_is_that_of_the_model(known, words, tmp_path: Path, max_length: int) -> None:
    """Each document alone, each token predicted once: compared with the loss that the model itself returns."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = words(tasks="perplexity", max_length=max_length, batch_size=2)
    assert evaluate.main(arguments) == 0
    metrics = read_result(tmp_path / "out").metrics
    tokenizer = AutoTokenizer.from_pretrained(known.model)
    model = AutoModelForCausalLM.from_pretrained(known.model).eval()
    total, num_tokens, num_bytes = 0.0, 0, 0
    for line in (known.data / "validation.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        num_tokens += len(ids) - 1
        num_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, max_length):
            # The last window reaches back, so that it has all the context that fits; old tokens are not scored again.
            stop = min(start + max_length, len(ids) - 1)
            first = max(0, stop - max_length) if start else 0
            window = torch.tensor([ids[first : stop + 1]])
            with torch.no_grad():
                logits = model(window[:, :-1]).logits.log_softmax(-1)
            gained = logits.gather(-1, window[:, 1:, None])[0, :, 0]
            total -= gained[start - first :].sum().item()
    assert metrics["perplexity/num_tokens"] == num_tokens
    assert metrics["perplexity/num_bytes"] == num_bytes
    assert metrics["perplexity/loss"] == pytest.approx(total / num_tokens, rel=1e-4)
    assert metrics["perplexity/perplexity"] == pytest.approx(math.exp(total / num_tokens), rel=1e-3)
    assert metrics["perplexity/bits_per_byte"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-4)
    assert metrics["perplexity/bits_per_byte_stderr"] > 0


def test_text_that_looks_like_a_list_is_scored_as_it_stands(words, tmp_path: Path) -> None:
    texts = ["A text.", "[1, 2]", '["a"]', "[]", "{{text}}"]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert evaluate.main(words(tasks="perplexity", data_dir=tmp_path)) == 0
    metrics = read_result(tmp_path / "out").metrics
    assert metrics["perplexity/num_bytes"] == sum(map(len, texts))
    samples = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["samples"]["perplexity"]
    assert [sample["arguments"] for sample in samples] == [[[text]] for text in texts]


def test_finished_task_is_not_run_again(known, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import misa.evaluation.scoring as scoring

    ran = []
    run_task = scoring.run_task
    monkeypatch.setattr(scoring, "run_task", lambda task, *rest: ran.append(task) or run_task(task, *rest))
    assert evaluate.main(words()) == 0
    written = (tmp_path / "out" / "result.json").read_bytes()
    assert evaluate.main(words()) == 0
    assert ran == ["misa_family"]
    assert (tmp_path / "out" / "result.json").read_bytes() == written
    # A second task joins, the first one is kept; one harness file holds both.
    assert evaluate.main(words(tasks="misa_family,perplexity")) == 0
    assert ran == ["misa_family", "perplexity"]
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text())["results"].keys() == {
        "misa_family",
        "perplexity",
    }
    # Without its result, as after a kill, the command makes the same one out of what is finished.
    metrics = read_result(tmp_path / "out").metrics
    (tmp_path / "out" / "result.json").unlink()
    assert evaluate.main(words(tasks="misa_family,perplexity")) == 0
    assert read_result(tmp_path / "out").metrics == metrics
    assert ran == ["misa_family", "perplexity"]
    # Another limit, other data or another model is another evaluation.
    assert evaluate.main(words(limit=3)) == 0
    assert read_result(tmp_path / "out").metrics["misa_family/num_documents"] == 3
    assert evaluate.main(words(model_name_or_path=known.untrained, limit=3)) == 0
    assert read_result(tmp_path / "out").metrics["misa_family/exact_match"] == 0.0
    assert len(ran) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "gsm9k"}, "tasks has 'gsm9k', allowed are misa_aqua"),
        ({"tasks": ","}, "allowed are"),
        ({"model_name_or_path": "./nowhere/model"}, "./nowhere/model: no such folder"),
        ({"data_dir": "nowhere"}, "data_dir nowhere: no such folder"),
        ({"batch_size": 0}, "batch_size is 0, allowed is 1 or more"),
        ({"limit": 0}, "limit is 0"),
        ({"device": "abacus"}, "device is 'abacus'"),
        (
            {"device": "cuda:99"},
            "device is 'cuda:99', allowed is cpu, or cuda or another of torch's that this machine has",
        ),
        (
            {"max_length": 16},
            "max_length is 16 (without one: the model's), allowed is more than the 16 tokens that misa",
        ),
        (
            {"base": "nope"},
            "base nope: model_name_or_path nope gives no model, allowed is a folder with config.json or",
        ),
        (
            {"model_name_or_path": "nope"},
            "model_name_or_path nope gives no model, allowed is a folder with config.json",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(words, capsys, tmp_path: Path, changes: dict, message: str) -> None:
    assert evaluate.main(words(**changes)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_model_and_data_of_another_kind_are_named(known, words, capsys, tmp_path: Path) -> None:
    assert evaluate.main(words(model_name_or_path=known.data)) == 2
    assert "neither config.json nor adapter_config.json" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert evaluate.main(words(data_dir=empty)) == 2
    assert "no test.jsonl" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/model"}')
    assert evaluate.main(words(model_name_or_path=adapter)) == 2
    assert "names the base model /gone/model, which is not there" in capsys.readouterr().err


def test_offline_refuses_what_only_a_hub_has(words, capsys) -> None:
    assert evaluate.main([*words(model_name_or_path="owner/model"), "--offline"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_real_items_of_the_same_form_are_read(known, words, real_data: Path, tmp_path: Path) -> None:
    """A list of public test items (answers in `answer`) goes through the same task."""
    data = tmp_path / "boolq"
    data.mkdir()
    (data / "test.json").write_text((real_data / "commonsense" / "boolq_test.json").read_text())
    assert evaluate.main(words(data_dir=data, limit=2)) == 0
    samples = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["samples"]["misa_family"]
    assert [sample["target"] for sample in samples] == [sample["doc"]["answer"] for sample in samples]
    assert {sample["target"] for sample in samples} <= {"true", "false"}


def test_help_names_the_tasks(capsys) -> None:
    from misa.evaluation.scoring import task_names

    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*task_names(), "--limit", "--batch_size", "--offline"])


def test_digest_names_whatever_transformers_reads(tmp_path: Path) -> None:
    """Older formats count where they are read; beside newer ones, which are read instead, they make no other model."""
    from misa.data.records import files_digest
    from misa.evaluation.folder import ModelFolder

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    seen = set()
    for name in ("pytorch_model.bin", "merges.txt"):
        for content in ("one", "two"):
            (folder / name).write_text(content)
            seen.add(ModelFolder(str(folder)).digest)
    assert len(seen) == 4
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text("new")
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert ModelFolder(str(folder)).digest == files_digest(folder / name for name in names)


def test_digest_of_an_adapter_counts_its_weights_and_its_base_on_a_hub(tmp_path: Path) -> None:
    from misa.evaluation.folder import ModelFolder

    seen = set()
    for base in ("owner/one", "owner/two"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        for weights in ("one", "two"):
            (tmp_path / "adapter_model.safetensors").write_text(weights)
            seen.add(ModelFolder(str(tmp_path)).digest)
    assert len(seen) == 4
    assert "" not in seen
    assert ModelFolder("owner/one").digest == ""
