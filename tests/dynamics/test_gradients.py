"""Measured gradients against gradients taken one by one, and the command on a real small LLaMA and real text."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from misa.dynamics.batches import load_batches
from misa.dynamics.command import find_snapshots, main, snapshot_step
from misa.dynamics.gradients import block_gradients, layer_indices, matrix_name
from misa.dynamics.staleness import FollowSettings, between, follow
from misa.dynamics.variance import BlockGradients
from misa.optimizer import partition


class Net(nn.Module):
    """Two layers of two matrices, and a head outside the blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(5, 4)}) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x, y):
        for layer in self.layers:
            x = x + layer["b"](torch.tanh(layer["a"](x)))
        return SimpleNamespace(loss=((self.head(x) - y) ** 2).mean())


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Net()
    batches = [{"x": torch.randn(3, 4), "y": torch.randn(3, 1)} for _ in range(5)]
    return model, partition(model), batches


def test_statistics_equal_those_of_gradients_taken_one_by_one(problem):
    model, blocks, batches = problem
    found = block_gradients(model, blocks, batches)
    for b, block in enumerate(blocks):
        parameters = [p for _, p in block.params]
        each = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(model(**batch).loss, parameters)])
                for batch in batches
            ]
        ).double()
        full = each.mean(0)
        np.testing.assert_allclose(found.sq_norm[b], float(full @ full), rtol=1e-5)
        np.testing.assert_allclose(found.batch_sq_norm[:, b], each.square().sum(1), rtol=1e-5)
        np.testing.assert_allclose(found.noise[b], float((each - full).square().sum(1).mean()), rtol=1e-4)
        assert found.numel[b] == block.numel
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.layer.tolist() == [0, 0, 1, 1]


def test_model_is_left_as_it_was(problem):
    model, blocks, batches = problem
    model.layers[0]["a"].weight.requires_grad_(False)
    model.train()
    block_gradients(model, blocks, batches)
    assert not model.layers[0]["a"].weight.requires_grad
    assert model.head.weight.requires_grad
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_names_of_layers_and_matrices(problem):
    _, blocks, _ = problem
    assert [matrix_name(block) for block in blocks] == ["a", "b", "a", "b"]
    assert layer_indices(blocks).tolist() == [0, 0, 1, 1]


def test_no_batches_and_a_zero_gradient_are_refused(problem):
    model, blocks, batches = problem
    with pytest.raises(ValueError, match="batches is empty"):
        block_gradients(model, blocks, [])
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=r"squared norm of the full gradient is 0\.0"):
        block_gradients(model, blocks, batches)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, corpus):
    """An untrained small LLaMA with its tokenizer, and the corpus that the tokenizer comes from."""
    from misa.models import build_model, load_tokenizer, model_config

    root = tmp_path_factory.mktemp("variance")
    tokenizer = load_tokenizer(corpus / "tokenizer")
    folder = root / "checkpoint-3"
    build_model(model_config("2m", vocab_size=len(tokenizer)), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, corpus


def test_command_writes_both_tables_and_the_result(snapshot, tmp_path):
    folder, corpus = snapshot
    words = ["variance", "--model", str(folder), f"again={folder}", "--dataset_path", str(corpus)]
    words += [
        "--num_batches",
        "3",
        "--batch_size",
        "2",
        "--seq_len",
        "32",
        "--budget",
        "0.1",
        "--num_draws",
        "4000",
        "--follow_rounds",
        "2",
        "--interval",
        "4",
    ]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    norms = pd.read_csv(tmp_path / "gradient_norms.csv")
    assert list(norms.columns) == ["snapshot", "step", "block", "layer", "matrix", "numel", "sq_norm", "noise"]
    assert len(norms) == 2 * 4 * 7
    assert set(norms["step"]) == {3}
    assert set(norms["matrix"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    table = pd.read_csv(tmp_path / "variance.csv")
    wide = table.pivot(index=["snapshot", "scheme"], columns="quantity", values="value")
    np.testing.assert_allclose(wide["active_share"], 0.1)
    np.testing.assert_allclose(wide.loc["checkpoint-3"], wide.loc["again"])  # the same model twice
    first = wide.loc["checkpoint-3"]
    np.testing.assert_allclose(first.loc["layer_uniform", "variance"], first.loc["matrix_uniform", "variance"])
    assert first["variance"].idxmin() == "matrix_oracle"
    assert (first["variance_agreement"].abs() < 0.1).all()
    stale = pd.read_csv(tmp_path / "staleness.csv")
    sources = {"round_start", "eta1", "auto", "auto_probed", "uniform", "fresh_eta1", "fresh_auto", "oracle"}
    assert set(stale["source"]) == sources
    assert not stale.duplicated(["snapshot", "step", "policy", "source", "age", "quantity"]).any()
    assert set(stale.loc[stale["source"] == "uniform", "policy"]) == {"eta1", "auto", "auto_probed"}
    assert set(stale.loc[stale["source"] == "round_start", "age"]) == {2, 4}
    by_source = stale[stale["quantity"] == "captured_share"].groupby("source")["value"].mean()
    assert by_source.between(0, 1).all()
    # Scores of all blocks, measured one step ago on other text, know more than those of a first round alone.
    correlation = stale[stale["quantity"] == "rank_correlation"].groupby("source")["value"].mean()
    assert correlation["auto_probed"] > max(0.5, correlation["auto"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["kind"], result["config"]["budget"]) == ("variance", 0.1)
    assert len(result["provenance"]["data_digest"]) == 64


def test_too_long_sequences_and_a_file_in_the_place_of_the_folder_are_refused(snapshot, tmp_path, capsys):
    folder, corpus = snapshot
    words = ["variance", "--model", str(folder), "--dataset_path", str(corpus), "--num_draws", "2"]
    assert main([*words, "--seq_len", "1025", "--output_dir", str(tmp_path)]) == 2
    assert f"seq_len is 1025; {folder} allows at most 1024" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*words, "--output_dir", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert f"output_dir is '{tmp_path / 'file'}'; it must be a folder that can be written" in printed.err
    assert not printed.out  # nothing was measured


def test_batches_do_not_repeat_sequences_and_follow_the_seed(snapshot):
    from misa.models import load_tokenizer

    folder, corpus = snapshot
    tokenizer = load_tokenizer(folder)
    one, other, again = (load_batches(corpus, tokenizer, 3, 2, 16, seed=seed) for seed in (0, 1, 0))
    ids = torch.cat([batch["input_ids"] for batch in one])
    assert len({tuple(row) for row in ids.tolist()}) == 6
    assert torch.equal(ids, torch.cat([batch["input_ids"] for batch in again]))
    assert not torch.equal(ids, torch.cat([batch["input_ids"] for batch in other]))


def test_batches_of_instruction_data_label_the_response_alone(snapshot, tmp_path):
    from misa.models import load_tokenizer

    lines = [
        json.dumps({"instruction": f"Say {word}.", "input": "", "output": word}) for word in ("yes", "no", "so", "on")
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    batches = load_batches(tmp_path, load_tokenizer(snapshot[0]), 2, 2, 256)
    assert len(batches) == 2
    assert all((batch["labels"] == -100).any() and (batch["labels"] != -100).any() for batch in batches)


def test_step_of_a_snapshot(tmp_path):
    numbered, state, plain, run = (tmp_path / name for name in ("checkpoint-50", "state", "plain", "run/model"))
    for folder in (numbered, state, plain, run):
        folder.mkdir(parents=True)
    (state / "trainer_state.json").write_text('{"global_step": 7}')
    (run.parent / "curves.csv").write_text(
        "step,tokens,time_s,metric,value\n10,1,0.5,eval_loss,2.0\n20,2,1.0,eval_loss,1.0\n"
    )
    assert [snapshot_step(folder) for folder in (numbered, state, plain, run)] == [50, 7, -1, 20]
    assert [found.name for found in find_snapshots([str(run), f"x={plain}"])] == ["run", "x"]


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"global_step": null}'])
def test_snapshot_that_does_not_say_its_step_is_named(text, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=r"trainer_state\.json does not say its global_step"):
        snapshot_step(tmp_path)


def test_snapshots_of_a_run_are_found_in_order_and_compared_with_its_end(tmp_path):
    for step in (100, 20):
        (tmp_path / "run" / "snapshots" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "curves.csv").write_text("step,tokens,time_s,metric,value\n200,1,0.5,eval_loss,2.0\n")
    found = find_snapshots([str(tmp_path / "run" / "snapshots"), str(tmp_path / "run" / "model")])
    run = str(tmp_path / "run")
    assert [(snapshot.name, snapshot.step, snapshot.run) for snapshot in found] == [
        ("run-20", 20, run),
        ("run-100", 100, run),
        ("run", 200, run),
    ]


def test_snapshots_of_runs_in_folders_of_one_name_are_told_apart_by_names(tmp_path):
    for study in ("first", "second"):
        (tmp_path / study / "run" / "snapshots" / "step-20").mkdir(parents=True)
        (tmp_path / study / "run" / "model").mkdir()
    words = [f"{name}={tmp_path / study / 'run'}" for name, study in (("a", "first"), ("b", "second"))]
    found = find_snapshots([f"{words[0]}/snapshots", f"{words[1]}/snapshots", f"end={tmp_path}/first/run/model"])
    assert [snapshot.name for snapshot in found] == ["a-20", "b-20", "end"]
    assert found[0].run == found[2].run != found[1].run


def test_rounds_from_an_unknown_step_have_none(problem):
    model, blocks, batches = problem
    settings = FollowSettings(2, 4, 0.5, 1e-3, 0.5, 0)
    rows = list(follow(model, block_gradients(model, blocks, batches), batches, batches, settings, "x", -1))
    assert {row["step"] for row in rows} == {-1}


def test_scores_of_an_earlier_snapshot_are_judged_by_the_gradients_of_a_later_one():
    rng = np.random.default_rng(0)

    def snapshot(scale):
        second = scale[None] * rng.uniform(0.9, 1.1, size=(4, len(scale)))
        return BlockGradients(np.full(6, 10.0), np.arange(6), second, 0.5 * second, 100)

    rising = 10.0 ** np.arange(6)
    same = list(between([("a", 10, snapshot(rising)), ("b", 30, snapshot(2 * rising))], 0.2, 0.5))
    values = {row["quantity"]: row["value"] for row in same}
    assert {(row["snapshot"], row["step"], row["source"], row["age"]) for row in same} == {("b", 30, "snapshot", 20)}
    assert values["rank_correlation"] == pytest.approx(1)
    assert abs(values["captured_lost"]) < 0.1
    turned = list(between([("a", 10, snapshot(rising)), ("b", 30, snapshot(rising[::-1]))], 0.2, 0.5))
    values = {row["quantity"]: row["value"] for row in turned}
    assert values["rank_correlation"] == pytest.approx(-1)
    assert values["captured_lost"] > 0.5
    assert values["variance_gained"] > 1
    # Models of other shapes, and of steps that nothing tells, are no two moments of one run.
    small = BlockGradients(np.ones(2), np.arange(2), np.ones((4, 2)), np.ones((4, 2)), 9)
    assert not list(between([("a", -1, snapshot(rising)), ("b", 30, small), ("c", 40, snapshot(rising))], 0.2, 0.5))


def test_folder_with_an_equals_sign_in_its_path_is_a_folder(tmp_path):
    folder = tmp_path / "lr=0.001" / "checkpoint-10"
    folder.mkdir(parents=True)
    assert [found.name for found in find_snapshots([str(folder), f"x={folder}"])] == ["checkpoint-10", "x"]


def test_tables_hold_the_snapshots_before_one_that_cannot_be_measured(snapshot, tmp_path, capsys):
    folder, corpus = snapshot
    (tmp_path / "empty").mkdir()
    words = ["variance", "--dataset_path", str(corpus), "--output_dir", str(tmp_path), "--num_draws", "2"]
    words += ["--num_batches", "2", "--batch_size", "2", "--seq_len", "8", "--budget", "0.5"]
    assert main([*words, "--model", str(folder), str(tmp_path / "empty")]) == 2
    assert "empty" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "gradient_norms.csv")) == 4 * 7


def test_unrelated_models_in_one_folder_are_no_snapshots_of_one_run(tmp_path):
    for name in ("one", "other", "run/checkpoint-10", "run/checkpoint-20"):
        (tmp_path / name).mkdir(parents=True)
    one, other, *checkpoints = find_snapshots(
        [str(tmp_path / name) for name in ("one", "other", "run/checkpoint-10", "run/checkpoint-20")]
    )
    assert one.run != other.run
    assert [(found.run, found.step) for found in checkpoints] == [(str(tmp_path / "run"), step) for step in (10, 20)]


def test_tables_are_there_when_the_rounds_cannot_be_followed(snapshot, tmp_path, capsys):
    folder, corpus = snapshot
    words = ["variance", "--model", str(folder), "--dataset_path", str(corpus), "--num_draws", "2"]
    words += ["--num_batches", "2", "--batch_size", "2", "--seq_len", "8", "--follow_rounds", "2"]
    # Any expected number of parameters can be drawn, but no matrix fits.
    assert main([*words, "--budget", "1e-4", "--output_dir", str(tmp_path)]) == 2
    assert "budget" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "gradient_norms.csv")) == 4 * 7
    assert (tmp_path / "variance.csv").is_file()
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["norms"], "verb is 'norms'; allowed: variance, rate"),
        (["variance", "--model", "/nowhere"], "model /nowhere is not a folder"),
        (
            ["variance", "--model", ".", "--follow_rounds", "2", "--learning_rate", "nan"],
            "learning_rate is nan; it must be positive and finite",
        ),
        (["variance", "--model", ".", "--budget", "3"], r"budget is 3.0; it must be in (0, 1]"),
        (["variance", "--model", ".", "--num_batches", "1"], "num_batches is 1; it must be at least 2"),
        (["variance", "--model", ".", "--follow_rounds", "1"], "follow_rounds is 1 and interval 10; allowed are 0, or"),
        (["variance", "--model", "a=.", "a=."], "two snapshots have the same name"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(words, message, tmp_path, capsys):
    more = ["--dataset_path", str(tmp_path), "--output_dir", str(tmp_path)] if len(words) > 1 else []
    assert main([*words, *more]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
