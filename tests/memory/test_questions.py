"""`python -m misa.memory --model ...`: answers about models that are not there."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from misa.memory.answers import explain, largest_budget
from misa.memory.command import main
from misa.memory.fit import measure_worst
from misa.memory.grid import TABLES
from misa.memory.grid import main as grid_main
from misa.memory.scenario import Laboratory, Scenario

CONFIG = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture
def write(tmp_path):
    """Write a configuration: `CONFIG` with some fields changed."""

    def write(**fields):
        path = tmp_path / f"{fields.get('model_type', 'small')}.json"
        path.write_text(json.dumps({**CONFIG, **fields}))
        return str(path)

    return write


@pytest.fixture
def small(write):
    return write()


def test_worst_draw_is_no_better_than_the_one_at_hand(small, monkeypatch):
    scenario = Scenario(small, "misa", {"budget": 0.1}, seq_len=64)
    monkeypatch.setattr("misa.memory.draws.Draws.worst", lambda self: (20,))  # the last matrix alone
    draw = explain(scenario)["draw"]
    assert draw["worst"] == draw["used"]
    assert draw["worst_bytes"] == draw["used_bytes"]


def test_explains_a_peak_in_words_and_in_json(small, capsys):
    words = ["--model", small, "--method", "misa", "--budget", "0.1", "--batch-size", "2", "--seq-len", "256"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("peak ", "weights", "worst draw found", "mean of 200 draws", "would lower it", "--loss chunked"):
        assert part in text
    assert main([*words, "--checkpointing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == sum(found["by_category"].values())
    assert found["scenario"]["checkpointing"] == -1
    assert found["draw"]["worst_bytes"] >= found["draw"]["used_bytes"]
    assert found["closed_form"]["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.03)


@pytest.mark.parametrize(
    ("method", "options", "draw"),
    [
        ("misa", ["--num_blocks", "2"], 2),
        ("misa", ["--budget", "0.3", "--include", "*.mlp.*"], None),
        ("lisa", ["--always_on", "none"], 2),
        ("lora", ["--lora_target", "q_proj,v_proj"], None),
        ("galore", ["--galore_r", "4"], None),
    ],
)
def test_options_of_methods_are_asked_about(method, options, draw, small, capsys):
    words = ["--model", small, "--method", method, "--seq-len", "64", "--json"]
    main(words)
    by_default = json.loads(capsys.readouterr().out)
    assert main([*words, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by_category"]["optimizer"] != by_default["by_category"]["optimizer"]
    if draw:
        assert len(found["draw"]["used"]) == draw
    if "--include" in options:
        assert all(".mlp." in name for name in found["draw"]["used"])
    if closed := found.get("closed_form"):
        assert closed["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.03)


def test_json_says_what_runs(small, capsys):
    words = ["--model", small, "--seq-len", "64", "--json", "--method"]
    engine = ["--state_format", "8bit", "--step_in_backward", "true", "--interval", "7"]
    assert main([*words, "misa_official", "--budget", "0.3", *engine]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    expected = {"state_format": "8bit", "step_in_backward": True, "interval": 7, "first_pass": True, "budget": 0.3}
    assert expected.items() <= settings.items()


def test_json_counts_the_parameters_of_the_model_without_adapters(small, capsys):
    found = []
    for method in ("adamw", "lora"):
        assert main(["--model", small, "--seq-len", "64", "--json", "--method", method]) == 0
        found.append(json.loads(capsys.readouterr().out)["num_params"])
    assert found[0] == found[1]


def test_number_of_blocks_asked_for_is_planned_with(small, capsys):
    words = ["--model", small, "--num_blocks", "4", "--seq-len", "64", "--json"]
    assert main(words) == 0
    drawn = json.loads(capsys.readouterr().out)["draw"]
    # As many of the largest matrices take more than as many of the first layer's small ones.
    assert drawn["worst_bytes"] > drawn["used_bytes"]
    assert main([*words, "--memory_budget", "1GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scenario"]["options"] == {"num_blocks": 4}
    assert found["peak_bytes"] == pytest.approx(drawn["worst_bytes"], rel=0.03)


@pytest.mark.parametrize(
    "options",
    [["--method", "misa", "--budget", "0.1", "--seq-len", "1024"], ["--method", "badam", "--seq-len", "4096"]],
    ids=["misa", "badam"],
)
def test_levers_named_lower_the_peak_named(options, write, capsys):
    # So many layers that the draw at hand and the worst one are far apart.
    words = ["--model", write(num_hidden_layers=8), *options, "--json"]
    main(words)
    before = json.loads(capsys.readouterr().out)
    assert len(before["would_lower"]) >= 4
    for lever in before["would_lower"]:
        main([*words, *lever["change"].split()])
        saved = before["peak_bytes"] - json.loads(capsys.readouterr().out)["peak_bytes"]
        assert saved == pytest.approx(lever["saves_bytes"], abs=0.03 * before["peak_bytes"]), lever["change"]
        if lever is before["would_lower"][0]:
            assert saved == pytest.approx(lever["saves_bytes"], rel=0.1)


def test_lever_of_all_layers_replaces_the_layers_given(small, capsys):
    words = ["--model", small, "--method", "badam", "--seq-len", "4096", "--checkpoint_layers", "1", "--json"]
    main(words)
    changes = [lever["change"] for lever in json.loads(capsys.readouterr().out)["would_lower"]]
    assert "--loss chunked --checkpointing instead of --checkpoint_layers" in changes


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("method", ["adamw", "badam", "misa"])
def test_models_that_the_formula_does_not_cover_are_measured_without_it(method, kind, write, capsys):
    words = ["--model", write(model_type=kind), "--method", method, "--seq-len", "64"]
    if method == "misa":
        words += ["--budget", "0.5"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] > 0
    assert found["no_closed_form"].startswith(f"no closed form for method {method} on {kind} models; it covers adamw,")
    assert not {"closed_form", "would_lower"} & set(found)
    assert "worst" not in found.get("draw", {})
    assert main(words) == 0
    assert f"what would lower it: no closed form for method {method} on {kind}" in capsys.readouterr().out


def test_models_that_the_formula_does_not_cover_are_compared_and_filled_by_the_draw_at_hand(write, tmp_path, capsys):
    words = ["--model", write(model_type="mixtral"), "--seq-len", "64", "--variants", "adamw,misa-25", "--output_dir"]
    assert main([*words, str(tmp_path), "--compare"]) == 0
    assert "a draw at hand, others may take more (no closed form for this model): MISA 25%" in capsys.readouterr().out
    assert main([*words[:-1], "--fit", "40MiB", "--json"]) == 0
    adamw, misa, budget = json.loads(capsys.readouterr().out)
    assert (adamw["draw"], misa["draw"]) == ("all", "at hand")
    assert budget["largest_budget"] is None
    assert main([*words[:4], "--memory_budget", "1GiB"]) == 2
    assert (
        "memory_budget: chooses by the closed form; no closed form for method misa on mixtral"
        in capsys.readouterr().err
    )


def test_largest_budget_is_the_largest_that_is_measured_to_fit(small):
    base = Scenario(small, seq_len=512)
    worst = measure_worst(Laboratory(replace(base, options={"budget": 0.25}))).peak.total_bytes
    assert largest_budget(base, worst) == 0.25
    assert largest_budget(base, worst - 1) == 0.2
    assert largest_budget(base, worst // 10) == 0


def test_compares_methods_and_draws_them(small, tmp_path, capsys):
    words = ["--model", small, "--compare", "--variants", "lora-r8,misa-25", "--seq_len", "64"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "LoRA r8, fp32 adapters" in text
    table = pd.read_csv(tmp_path / "out" / "memory_compare.csv")
    assert set(table["method"]) == {"LoRA r8, fp32 adapters", "MISA 25%"}
    for ending in ("pdf", "png"):
        assert (tmp_path / "out" / f"memory_compare.{ending}").stat().st_size > 1000


def test_says_what_fits(small, capsys):
    assert main(["--model", small, "--fit", "60MiB", "--variants", "misa-25,badam", "--checkpointing", "--json"]) == 0
    misa, badam, budget = json.loads(capsys.readouterr().out)
    for found in (misa, badam):
        assert found["num_tokens"] > 128
        assert found["peak_bytes"] <= 60 * 2**20
        assert found["num_tokens"] == found["batch_size"] * found["seq_len"]
        assert not found["at_least"]
    assert 0 < budget["largest_budget"] <= 0.5


def test_what_fits_is_asked_of_models_with_few_positions_too(write, monkeypatch, capsys):
    """The default length is that of the largest budget alone."""
    monkeypatch.setattr("misa.memory.fit._MAX_TOKENS", 256)
    words = ["--model", write(max_position_embeddings=128), "--fit", "1GiB", "--variants"]
    assert main([*words, "badam", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["batch_size"], found["seq_len"]) == (2, 128)
    assert main([*words, "badam,misa-25"]) == 2
    shown = capsys.readouterr()
    assert "seq_len is 512" in shown.err
    assert not shown.out


def test_what_fits_is_said_to_be_at_least_where_the_search_ended(small, monkeypatch, capsys):
    monkeypatch.setattr("misa.memory.fit._MAX_TOKENS", 256)
    words = ["--model", small, "--fit", "60MiB", "--variants", "misa-25", "--checkpointing"]
    assert main([*words, "--json"]) == 0
    misa, budget = json.loads(capsys.readouterr().out)
    assert (misa["num_tokens"], misa["at_least"]) == (256, True)
    assert budget["at_least"] == (budget["largest_budget"] == 0.5)
    assert main([*words[:3], "1GiB", *words[4:]]) == 0
    text = capsys.readouterr().out
    assert "at least    256 tokens" in text
    assert "largest budget at 1 x 512 tokens: at least 0.500" in text


@pytest.mark.parametrize("method", ["badam_official", "lisa_official", "misa_official"])
def test_memory_budget_chooses_for_methods_as_published(method, small, capsys):
    words = ["--model", small, "--method", method, "--seq_len", "64", "--memory_budget", "1GiB"]
    assert main([*words, *(["--budget", "0.3"] if method.startswith("misa") else [])]) == 0
    assert "with the worst draw" in capsys.readouterr().out


def test_memory_budget_chooses_and_says_why(small, capsys):
    words = ["--model", small, "--seq_len", "1024", "--budget", "0.1", "--memory_budget"]
    assert main([*words, "60MiB"]) == 0
    text = capsys.readouterr().out
    assert "budget         0.1" in text
    assert "fits: " in text
    assert main([*words, "5MiB"]) == 2
    assert "memory_budget: 5.00 MiB is too little" in capsys.readouterr().err


def test_loss_given_stays_beside_a_memory_budget_also_the_default_one(small, capsys):
    words = ["--model", small, "--seq_len", "1024", "--budget", "0.1", "--json", "--memory_budget"]
    main([*words, "1GiB"])
    least = json.loads(capsys.readouterr().out)["peak_bytes"]
    losses = []
    for given in ([], ["--loss", "full"]):
        assert main([*words, f"{least - 1}B", *given]) == 0
        losses.append(json.loads(capsys.readouterr().out)["scenario"]["loss"])
    assert losses == ["chunked", "full"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llama3-9b"], "model is 'llama3-9b'; allowed: llama3-8b"),
        (["--model", "llama3-8b", "--seq-len", "8193"], "seq_len is 8193; llama3-8b allows at most 8192"),
        (["--model", "llama3-8b", "--method", "adam"], "method is 'adam'; allowed: adamw"),
        (["--model", "7m", "--budget", "1.5"], "budget=1.5: must lie in (0, 1]"),
        (["--model", "7m", "--budget", "1e-6"], "no block fits"),
        (["--model", "7m", "--fit", "24"], "fit is '24'; it must be an amount with a unit"),
        (["--model", "7m", "--fit", ""], "fit is ''; it must be an amount with a unit"),
        (["--model", "7m", "--memory_budget", ""], "memory_budget is ''; it must be an amount with a unit"),
        (["--model", ""], "model is ''; allowed: llama3-8b"),
        (["--model", "7m", "--fit", "1GiB", "--compare"], "compare and fit: ask one question at a time"),
        (["--model", "7m", "--compare", "--variants", "lora"], "variants is 'lora'; allowed, comma separated: adamw"),
        (["--model", "7m", "--method", "lora", "--memory_budget", "1GiB"], "chooses for block methods"),
        (
            ["--model", "7m", "--method", "misa_paper", "--memory_budget", "1GiB"],
            "memory_budget: chooses by the closed form; no closed form for method misa_paper on llama models",
        ),
        (["--model", "7m", "--memory_budget", ".GiB"], "memory_budget is '.GiB'; it must be an amount with a unit"),
        (["--model", "7m", "--checkpoint_layers", "-3"], "checkpoint_layers is -3; it must be at least 0"),
        (
            ["--model", "7m", "--checkpoint_layers", "2", "--checkpointing"],
            "checkpoint_layers is 2, and gradient_checkpointing means all layers; give one of them",
        ),
        (["--model", "7m", "--interval", "0"], "interval is 0; it must be at least 1"),
        (["--model", "7m", "--num_blocks", "0"], "num_blocks is 0; it must be at least 1"),
        (["--model", "7m", "--method", "lora", "--galore_r", "4"], "method lora: has no option galore_r"),
        (["--model", "7m", "--lora_target", "q", "--method", "lora"], "lora_target is 'q': 'q' is no linear layer"),
        (["--model", "7m", "--method", "lora", "--lora_alpha", "0"], "lora_alpha is 0; it must be at least 1"),
        (["--model", "7m", "--methods", "lora"], "methods is given; it does nothing without model_name_or_path"),
        (["--model", "7m", "--seed", "1"], "seed is given; it does nothing without model_name_or_path"),
        (["--model", "7m", "--variants", "lora-r8"], "variants is given; it does nothing without compare or fit"),
        (["--model", "7m", "--output_dir", "."], "output_dir is given; it does nothing without compare or"),
        (["--model", "7m", "--compare", "--budget", "0.1"], "budget is given; compare and fit take the methods in"),
        (["--model", "7m", "--fit", "1GiB", "--variants", "badam", "--seq_len", "8"], "seq_len is given; fit needs it"),
        (["--model", "7m", "--fit", "1GiB", "--method", "lora"], "method is given; compare and fit take the methods"),
        (["--model", "7m", "--compare", "--output_dir", "/dev/null/x"], "output_dir is '/dev/null/x'; it must be a"),
        (["--seq_len", "8"], "give either --model, to simulate, or --model_name_or_path"),
        (["--model_name_or_path", "2m"], "output_dir is missing"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "is of type t5; it must be a causal language model"),
        ({"hidden_size": -5}, "is not a model configuration: hidden_size is -5; it must be at least 1"),
        ({**CONFIG, "num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads, 4"),
        ({**CONFIG, "num_key_value_heads": 0}, "num_key_value_heads is 0; it must divide num_attention_heads, 4"),
        ({**CONFIG, "hidden_act": "nope"}, "hidden_act is 'nope'; allowed: gelu"),
        ({**CONFIG, "model_type": "falcon"}, "models of type falcon cannot be simulated, since their attention"),
    ],
)
def test_wrong_configurations_are_named(fields, message, tmp_path, capsys):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(fields))
    assert main(["--model", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert str(path) in error
    assert len(error.splitlines()) == 1


def test_grid_part_that_cannot_be_written_is_an_error_in_words(small, monkeypatch, capsys):
    monkeypatch.setattr("misa.memory.grid.SEQ_LENS", (128,))
    monkeypatch.setattr("misa.memory.grid.LIMIT", "128MiB")
    assert grid_main(["part", "--part", "badam", "--model", small, "--output", "/dev/null/x.json"]) == 2
    assert "python -m misa.memory.grid: error: [Errno" in capsys.readouterr().err


def test_grid_parts_become_tables(write, tmp_path, monkeypatch):
    small = write(max_position_embeddings=2100)
    monkeypatch.setattr("misa.memory.grid.SEQ_LENS", (128, 256, 512))
    monkeypatch.setattr("misa.memory.grid.LIMIT", "128MiB")
    parts = []
    for name in ("misa-25", "sweep", "levers"):
        parts.append(str(tmp_path / f"{name}.json"))
        monkeypatch.setattr("misa.memory.grid.SWEEP", (0.1, 0.25))
        monkeypatch.setattr("misa.memory.grid.LEVERS_BUDGET", 0.1)
        assert grid_main(["part", "--part", name, "--model", small, "--output", parts[-1]]) == 0
    assert grid_main(["join", *parts, "--output_dir", str(tmp_path / "tables")]) == 0
    for name, columns in TABLES.items():
        table = pd.read_csv(tmp_path / "tables" / f"{name}.csv")
        assert tuple(table.columns) == columns
        assert len(table)
    fits = pd.read_csv(tmp_path / "tables" / "memory_fit.csv")
    assert (fits["num_tokens"] == fits["batch_size"] * fits["seq_len"]).all()
    assert (fits["num_tokens"] % 128).any()  # full sequences would be longer than the model allows
    grid = pd.read_csv(tmp_path / "tables" / "memory_grid.csv")
    assert set(grid["draw"]) == {"worst", "mean"}
    assert set(json.loads((tmp_path / "tables" / "memory_grid.json").read_text())["parts"]) == {
        "misa-25",
        "sweep",
        "levers",
    }
    assert grid_main(["part", "--part", "sgd9", "--output", str(tmp_path / "x.json")]) == 2
