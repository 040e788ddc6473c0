"""The rate laboratory: problems with exact gradients, the slope, and the command."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from misa.dynamics.command import main
from misa.dynamics.problems import SmallLlama, Waves
from misa.dynamics.rate import fit_slope, mean_sq_norm
from misa.optimizer import partition


@pytest.fixture
def tiny_llama():
    from misa.models import build_model, model_config

    config = model_config("2m", 64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return build_model(config, seed=0)


def test_waves_full_gradient_is_the_mean_of_what_steps_see():
    problem = Waves(seed=1)
    parameters = list(problem.parameters())
    found = [torch.autograd.grad(problem.loss(), parameters) for _ in range(400)]
    mean = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
    spread = float(problem.noise.square().sum()) / 400  # expected squared distance of the mean from the truth
    total = sum(float(g.square().sum()) for g in mean)
    assert total == pytest.approx(problem.full_sq_norm() + spread, rel=0.02)
    assert len(partition(problem)) == 8


def test_waves_are_as_smooth_as_said_and_not_convex():
    problem = Waves(seed=0)
    flat = torch.linspace(-3, 3, sum(p.numel() for p in problem.parameters()), dtype=torch.float64)
    curvature = problem.curvature.double() + 0.25 * 4 * torch.cos(2 * flat)  # of f in its own coordinates
    assert curvature.min() < 0
    assert curvature.max() <= problem.smoothness == pytest.approx(1.9)


def test_llama_full_gradient_is_that_of_the_whole_population_and_leaves_no_trace(tiny_llama):
    model = tiny_llama
    ids = torch.arange(3 * 2 * 8).remainder(64).reshape(3, 2, 8)
    problem = SmallLlama(model, [{"input_ids": x, "labels": x} for x in ids])
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    found = problem.full_sq_norm()
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    frozen.requires_grad_(True)
    every = ids.flatten(0, 1)
    model(input_ids=every, labels=every).loss.backward()  # batches are equally long, so means are equal
    expected = sum(float(p.grad.square().sum()) for block in partition(model) for _, p in block.params)
    assert found == pytest.approx(expected, rel=1e-4)


def test_slope_of_an_exact_power_and_of_noise():
    x = [100, 200, 400, 800]
    value, low, high = fit_slope(x, [3 * k**-0.5 for k in x])
    assert value == pytest.approx(-0.5)
    assert high - low < 1e-6
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        _, low, high = fit_slope(x, [k**-0.5 * np.exp(rng.normal(0, 0.1)) for k in x])
        inside += low < -0.5 < high
    assert 180 < inside < 198
    assert fit_slope([1, 2], [1, 2]).high == np.inf
    with pytest.raises(ValueError, match="has 1 different values"):
        fit_slope([5, 5], [1, 2])
    with pytest.raises(ValueError, match="positive and finite"):
        fit_slope([1, 2], [0, 1])


def test_slope_over_seeds_is_the_mean_of_theirs_with_the_spread_between_them():
    x = [100, 200, 400] * 3
    slopes = (-0.4, -0.5, -0.9)
    y = [k**slope for slope in slopes for k in x[:3]]
    value, low, high = fit_slope(x, y, [0] * 3 + [1] * 3 + [2] * 3)
    assert value == pytest.approx(-0.6)
    half = 4.302652729911275 * np.std(slopes, ddof=1) / 3**0.5  # Student's t with two degrees of freedom
    assert (high - value, value - low) == (pytest.approx(half), pytest.approx(half))
    assert fit_slope(x[:3], y[:3], [0] * 3).value == pytest.approx(-0.4)
    with pytest.raises(ValueError, match="has 1 different values"):
        fit_slope([1, 2, 1, 1], [1, 2, 3, 4], [0, 0, 1, 1])


def test_every_update_counts_as_much_in_the_mean(tiny_llama):
    class Counting(SmallLlama):
        def full_sq_norm(self):
            found.append(super().full_sq_norm())
            return found[-1]

    found = []
    ids = torch.arange(3 * 2 * 8).remainder(64).reshape(3, 2, 8)
    problem = Counting(tiny_llama, [{"input_ids": x, "labels": x} for x in ids])
    mean = mean_sq_norm(problem, 30, 3, 0.05, 0.5, True, seed=0)
    assert len(found) == 30
    assert mean == pytest.approx(sum(found) / 30)


def test_batches_of_other_lengths_weigh_the_same_each(tiny_llama):
    model = tiny_llama
    batches = [{"input_ids": x, "labels": x} for x in (torch.arange(8)[None], torch.arange(20)[None] + 9)]
    found = SmallLlama(model, batches).full_sq_norm()
    sum(model(**batch).loss / 2 for batch in batches).backward()
    expected = sum(float(p.grad.square().sum()) for block in partition(model) for _, p in block.params)
    assert found == pytest.approx(expected, rel=1e-4)


def test_longer_runs_with_smaller_steps_end_nearer_to_a_stationary_point():
    means = [mean_sq_norm(Waves(0), k, 2, 0.3 / k**0.5, 0.5, True, seed=0) for k in (20, 80)]
    assert means[1] < 0.8 * means[0]
    again = mean_sq_norm(Waves(0), 20, 2, 0.3 / 20**0.5, 0.5, True, seed=0)
    assert again == means[0]
    assert mean_sq_norm(Waves(0), 20, 2, 0.3 / 20**0.5, 0.5, False, seed=0) != again


def test_command_writes_the_table_and_the_slopes(corpus, tmp_path):
    words = ["rate", "--dataset_path", str(corpus), "--output_dir", str(tmp_path / "out")]
    words += ["--waves_updates", "4,8", "--llama_updates", "2,4", "--intervals", "1,2", "--num_batches", "2"]
    assert main([*words, "--seq_len", "8"]) == 0
    table = pd.read_csv(tmp_path / "out" / "rate.csv")
    assert len(table) == 2 * 2 * 2 * 2
    assert (table["mean_sq_norm"] > 0).all()
    np.testing.assert_allclose(table["lr"] * np.sqrt(table["num_updates"]), [0.3] * 8 + [0.5] * 8)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["kind"] == "rate"
    assert {f"{p}/T{t}/{m}/slope" for p in ("waves", "llama") for t in (1, 2) for m in ("with", "without")} <= set(
        result["metrics"]
    )


def test_runs_that_diverge_leave_the_table_and_the_other_slopes(corpus, tmp_path, capsys):
    words = ["rate", "--dataset_path", str(corpus), "--output_dir", str(tmp_path), "--llama_lr", "1e30"]
    words += ["--waves_updates", "4,8", "--llama_updates", "2,4", "--intervals", "1", "--num_batches", "2"]
    assert main([*words, "--seq_len", "8"]) == 0
    assert "llama/T1/with: no slope, since these diverged at lr 7.07e+29: 2 updates" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "rate.csv")) == 2 * 2 * 2
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert {name.partition("/")[0] for name in metrics} == {"waves"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--intervals", "1,1"], "intervals is '1,1'; allowed are distinct whole numbers"),
        (["--waves_updates", "ten"], "waves_updates is 'ten'"),
        (["--budget", "0"], "budget is 0.0; it must be in (0, 1]"),
        (["--waves_updates", "10"], "waves_updates is '10'; a slope needs at least 2 numbers"),
        (["--llama_updates", "10"], "llama_updates is '10'; a slope needs at least 2 numbers"),
        (["--output_dir", "/dev/null/x"], "output_dir is '/dev/null/x'; it must be a folder that can be written"),
        (["--llama_lr", "-1"], "llama_lr is -1.0; it must be positive"),
    ],
)
def test_wrong_input_is_named(words, message, tmp_path, capsys):
    assert main(["rate", "--dataset_path", str(tmp_path), "--output_dir", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
