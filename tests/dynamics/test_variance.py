"""Closed forms against exact enumeration of every draw and every mini-batch."""

import itertools

import numpy as np
import pytest

from misa.dynamics.comparison import compare, real_draws
from misa.dynamics.variance import (
    SCHEMES,
    BlockGradients,
    Draw,
    draw_of,
    explained_share,
    importance_weights,
    inclusion_probabilities,
    monte_carlo,
    quantities,
    sample,
    unbiased_quantities,
)


def problem(num_layers=2, per_layer=3, num_batches=4, seed=0):
    """Explicit gradients of every batch: list of [N, n_b] arrays, and their reduction."""
    rng = np.random.default_rng(seed)
    numel = rng.integers(1, 6, size=num_layers * per_layer)
    scale = 10 ** rng.uniform(-1.5, -0.2, size=len(numel))
    gradients = [
        s * (rng.normal(size=n) + rng.normal(size=(num_batches, n))) for n, s in zip(numel, scale, strict=True)
    ]
    reduced = BlockGradients(
        numel=numel.astype(float),
        layer=np.repeat(np.arange(num_layers), per_layer),
        batch_sq_norm=np.stack([(g**2).sum(1) for g in gradients], axis=1),
        batch_inner=np.stack([g @ g.mean(0) for g in gradients], axis=1),
        num_parameters=int(numel.sum()) + 7,
    )
    return gradients, reduced


def enumerate_draws(draw):
    """Every set of units with its probability, for independent draws."""
    for on in itertools.product([False, True], repeat=len(draw.unit_probability)):
        probability = np.prod(np.where(on, draw.unit_probability, 1 - draw.unit_probability))
        yield np.array(on)[draw.units], probability


def exact(gradients, draw):
    """Mean, variance, captured gradient, and error of the unweighted estimator, by going through everything."""
    full = np.concatenate([g.mean(0) for g in gradients])
    num_batches = len(gradients[0])
    mean, variance, captured, mse = np.zeros_like(full), 0.0, 0.0, 0.0
    for on, probability in enumerate_draws(draw):
        captured += probability * sum((g.mean(0) ** 2).sum() for g, b in zip(gradients, on, strict=True) if b)
        for i in range(num_batches):
            share = probability / num_batches
            estimate = np.concatenate([g[i] * b / p for g, b, p in zip(gradients, on, draw.inclusion, strict=True)])
            applied = np.concatenate([g[i] * b for g, b in zip(gradients, on, strict=True)])
            mean += share * estimate
            variance += share * ((estimate - full) ** 2).sum()
            mse += share * ((applied - full) ** 2).sum()
    return full, mean, variance, captured, mse


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "layer_cyclic"])
@pytest.mark.parametrize("budget", [0.1, 0.6])
def test_closed_forms_equal_exact_enumeration(scheme, budget):
    gradients, reduced = problem()
    draw = draw_of(scheme, reduced, budget)
    full, mean, variance, captured, mse = exact(gradients, draw)
    found = quantities(reduced, draw)
    np.testing.assert_allclose(mean, full, rtol=1e-9)  # unbiased
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-9)
    np.testing.assert_allclose(found["captured"], captured, rtol=1e-9)
    np.testing.assert_allclose(found["applied_mse"], mse, rtol=1e-9)
    np.testing.assert_allclose(found["variance"], found["variance_sampling"] + found["variance_noise"])


def test_cyclic_draw_has_the_marginals_of_the_uniform_one_and_takes_layers_in_turn():
    _, reduced = problem(num_layers=5)
    draw = draw_of("layer_cyclic", reduced, 0.5)
    on = sample(draw, 40_000, np.random.default_rng(0))
    np.testing.assert_allclose(on.mean(axis=0), draw.inclusion, atol=0.01)
    # In turn: the number of layers on at once differs by at most one.
    counts = on[:, np.unique(draw.units, return_index=True)[1]].sum(axis=1)
    assert set(counts) <= {int(np.floor(draw.unit_probability.sum())), int(np.ceil(draw.unit_probability.sum()))}
    assert (
        quantities(reduced, draw)["variance"] == quantities(reduced, draw_of("layer_uniform", reduced, 0.5))["variance"]
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_monte_carlo_agrees_with_the_closed_form(scheme):
    _, reduced = problem(num_layers=4)
    draw = draw_of(scheme, reduced, 0.3)
    simulated = monte_carlo(reduced, draw, 60_000, np.random.default_rng(1))
    closed = quantities(reduced, draw)
    assert abs(simulated["variance_mc"] - closed["variance"]) < 4 * simulated["variance_mc_stderr"]
    assert simulated["captured_share_mc"] == pytest.approx(closed["captured_share"], abs=0.01)


def test_monte_carlo_and_closed_form_agree_within_one_percent():
    _, reduced = problem(num_layers=4, num_batches=8)
    for scheme, row in compare(reduced, 0.3, num_draws=100_000).items():
        assert abs(row["variance_agreement"]) < 0.01, scheme
        assert abs(row["applied_mse_agreement"]) < 0.01, scheme
        assert row["captured_share_mc"] == pytest.approx(row["captured_share"], rel=0.01)
        assert row["applied_bias_sq_mc"] == pytest.approx(row["applied_bias_sq"], rel=0.01)


def test_authors_scores_are_squared_mean_norms_under_a_bound():
    gradients, reduced = problem()
    norms = np.array([np.sqrt((g**2).sum(1)).mean() for g in gradients])
    np.testing.assert_allclose(reduced.official_scores, norms**2)
    weights = draw_of("matrix_importance_official", reduced, 0.1).weights
    np.testing.assert_allclose(weights, np.exp(norms**2) / np.exp(norms**2).sum())
    large = BlockGradients(
        reduced.numel, reduced.layer, 1e6 * reduced.batch_sq_norm, 1e6 * reduced.batch_inner, reduced.num_parameters
    )
    clipped = draw_of("matrix_importance_official", large, 0.1).weights
    assert clipped.max() / clipped.min() <= np.exp(5) * (1 + 1e-9)


def test_real_draws_stay_under_the_budget_and_count_what_they_apply():
    _, reduced = problem(num_layers=4)
    total = reduced.sq_norm.sum()
    for scheme in SCHEMES:
        found = real_draws(scheme, reduced, 0.5, 400, seed=0)
        assert 0.3 < found["real_active_share"] <= 0.5
        assert 0 < found["real_captured_share"] < 1
        assert found["real_applied_bias_sq"] <= found["real_applied_mse"]
    everything = real_draws("matrix_uniform", reduced, 1.0, 10, seed=0)
    assert everything["real_captured_share"] == pytest.approx(1)
    assert everything["real_applied_mse"] == pytest.approx(reduced.noise.sum() / total)
    # No whole layer fits.
    smallest = np.bincount(reduced.layer, weights=reduced.numel).min()
    assert real_draws("layer_uniform", reduced, 0.9 * smallest / reduced.num_parameters, 10, seed=0) == {}


def test_explained_share_is_that_of_the_best_step_length():
    gradients, reduced = problem()
    draw = draw_of("matrix_importance_auto", reduced, 0.3)
    full = np.concatenate([g.mean(0) for g in gradients])

    def error(length):
        total = 0.0
        for on, probability in enumerate_draws(draw):
            for i in range(len(gradients[0])):
                applied = np.concatenate([g[i] * b for g, b in zip(gradients, on, strict=True)])
                total += probability / len(gradients[0]) * ((length * applied - full) ** 2).sum()
        return total / (full**2).sum()

    best = min(error(length) for length in np.linspace(0, 2, 401))
    assert quantities(reduced, draw)["explained_share"] == pytest.approx(1 - best, abs=1e-4)
    # Whatever the length of the gradients.
    scaled = BlockGradients(
        reduced.numel, reduced.layer, 9 * reduced.batch_sq_norm, 9 * reduced.batch_inner, reduced.num_parameters
    )
    pi = draw.inclusion
    shares = [explained_share(each.sq_norm, each.second_moment, pi) for each in (reduced, scaled)]
    assert shares[0] == pytest.approx(shares[1])


def test_unbiased_sums_are_right_on_average_where_those_of_a_few_batches_are_not():
    rng = np.random.default_rng(0)
    means = [np.full(n, s) for n, s in ((3, 0.5), (5, 0.2), (4, 0.1))]
    numel = np.array([len(m) for m in means], dtype=float)
    pi = np.array([0.6, 0.3, 0.2])
    found, naive = [], []
    for _ in range(4000):
        gradients = [m + rng.normal(size=(4, len(m))) for m in means]
        reduced = BlockGradients(
            numel,
            np.arange(3),
            np.stack([(g**2).sum(1) for g in gradients], axis=1),
            np.stack([g @ g.mean(0) for g in gradients], axis=1),
            12,
        )
        found.append(reduced.unbiased_sq_norm)
        naive.append(reduced.sq_norm)
    truth = np.array([(m**2).sum() for m in means])
    np.testing.assert_allclose(np.mean(found, axis=0), truth, atol=0.05)
    assert (np.mean(naive, axis=0) > truth + 0.5).all()
    # With exact moments they are those of the estimator on fresh batches.
    exact_moments = BlockGradients(numel, np.arange(3), np.zeros((2, 3)), np.zeros((2, 3)), 12)
    exact_moments.batch_sq_norm[:] = truth + numel
    exact_moments.batch_inner[:] = truth + numel / 2  # of two batches, each with a noise of one a number
    values = unbiased_quantities(exact_moments, pi)
    assert values["unbiased_relative_variance"] == pytest.approx(
        (((truth + numel) / pi).sum() - truth.sum()) / truth.sum()
    )
    expected = ((1 - pi) * truth + pi * numel).sum() / truth.sum()
    assert values["unbiased_applied_mse"] == pytest.approx(expected)
    noise_alone = BlockGradients(numel, np.arange(3), np.ones((2, 3)), np.full((2, 3), 0.25), 12)
    assert unbiased_quantities(noise_alone, pi) == {}


def test_real_variance_is_that_of_the_counted_probabilities():
    _, reduced = problem(num_layers=4)
    found = real_draws("matrix_uniform", reduced, 1.0, 10, seed=0)
    assert found["real_relative_variance"] == pytest.approx(reduced.noise.sum() / reduced.sq_norm.sum())
    assert "real_relative_variance" not in real_draws("matrix_uniform", reduced, 0.2, 1, seed=0)  # not all were drawn


def test_budget_is_met_exactly_by_every_scheme():
    _, reduced = problem(num_layers=4)
    for scheme in SCHEMES:
        assert quantities(reduced, draw_of(scheme, reduced, 0.25))["active_share"] == pytest.approx(0.25)


def test_uniform_layers_and_matrices_have_equal_variance_but_not_equal_spread():
    _, reduced = problem(num_layers=4)
    table = compare(reduced, 0.25, ["layer_uniform", "matrix_uniform"], num_draws=20_000)
    assert table["layer_uniform"]["variance"] == pytest.approx(table["matrix_uniform"]["variance"])
    assert table["matrix_uniform"]["captured_share_std"] < table["layer_uniform"]["captured_share_std"]


def test_oracle_has_the_least_variance_of_all_draws_at_the_budget():
    _, reduced = problem(num_layers=3)
    budget = 0.3
    best = quantities(reduced, draw_of("matrix_oracle", reduced, budget))["variance"]
    for scheme in SCHEMES:
        assert best <= quantities(reduced, draw_of(scheme, reduced, budget))["variance"] * (1 + 1e-12)
    rng = np.random.default_rng(3)
    for _ in range(300):
        weights = rng.exponential(size=len(reduced.numel))
        pi = inclusion_probabilities(weights, reduced.numel, budget * reduced.num_parameters)
        units = np.arange(len(pi))
        assert best <= quantities(reduced, Draw(units, pi, False, weights / weights.sum()))["variance"] * (1 + 1e-12)


def test_everything_drawn_leaves_the_noise_of_the_mini_batch_alone():
    _, reduced = problem()
    found = quantities(reduced, draw_of("matrix_uniform", reduced, 1.0))
    assert found["variance_sampling"] == 0
    assert found["variance"] == pytest.approx(reduced.noise.sum())
    assert found["captured_share"] == pytest.approx(1)
    assert found["active_share"] < 1  # parameters outside the blocks are never drawn


def test_inclusion_probabilities_saturate_at_one_and_meet_the_budget():
    weights, numel = np.array([100.0, 1.0, 1.0, 0.0]), np.array([5.0, 5.0, 10.0, 3.0])
    pi = inclusion_probabilities(weights, numel, 8.0)
    np.testing.assert_allclose(pi, [1, 0.2, 0.2, 0])
    np.testing.assert_allclose(inclusion_probabilities(weights, numel, 1e9), [1, 1, 1, 0])


def test_importance_uses_the_optimizers_softmax():
    scores = np.array([0.0, 1.0, 2.0])
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(importance_weights(scores, 1.0), expected)
    auto = importance_weights(np.array([1.0, 2.0, 3.0, 10.0]) * 1e-9, "auto", 0.5)
    assert 1 / (auto**2).sum() == pytest.approx(2.0, rel=1e-3)


def test_same_seed_same_table():
    _, reduced = problem()
    assert compare(reduced, 0.3, num_draws=100, seed=4) == compare(reduced, 0.3, num_draws=100, seed=4)
    assert compare(reduced, 0.3, num_draws=100, seed=4) != compare(reduced, 0.3, num_draws=100, seed=5)


def test_wrong_input_is_named():
    _, reduced = problem()
    with pytest.raises(ValueError, match="scheme is 'layers'; allowed: layer_cyclic"):
        draw_of("layers", reduced, 0.1)
    with pytest.raises(ValueError, match=r"budget is 0; it must be in \(0, 1\]"):
        draw_of("layer_uniform", reduced, 0)
    with pytest.raises(ValueError, match="num_draws is 1"):
        monte_carlo(reduced, draw_of("layer_uniform", reduced, 0.1), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="weights must be finite"):
        inclusion_probabilities(np.array([np.nan]), np.array([1.0]), 1.0)
