"""Scores and probabilities."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from misa.dynamics.variance import importance_weights
from misa.optimizer import importance
from misa.optimizer.importance import OFFICIAL_RULE, PAPER_RULE, ScoreRule

scores = st.lists(st.floats(0, 1e3), min_size=1, max_size=12).map(np.array)
etas = st.floats(1e-6, 1e4)


@given(scores, etas)
def test_probabilities_sum_to_one(s, eta):
    p = importance_weights(s, eta)
    assert p.sum().item() == pytest.approx(1)
    assert (p >= 0).all()


@given(scores, st.floats(1e-3, 10), st.integers(0, 10**6))
def test_probabilities_maximise_the_stated_objective(s, eta, seed):
    """The softmax maximises sum_b p_b s_b - KL(p || uniform) / eta."""

    def objective(p):
        kl = (p * np.log(np.maximum(p * len(p), 1e-300))).sum()
        return (p * s).sum() - kl / eta

    generator = np.random.default_rng(seed)
    best = objective(importance_weights(s, eta))
    for _ in range(5):
        other = generator.random(len(s)) ** 3 + 1e-12
        assert objective(other / other.sum()) <= best + 1e-9 * (1 + abs(best))


@given(scores, etas, st.floats(0, 100))
def test_probabilities_do_not_change_when_all_scores_shift(s, eta, shift):
    np.testing.assert_allclose(
        importance_weights(s + shift, eta), importance_weights(s, eta), rtol=1e-6, atol=1e-8 * (1 + eta)
    )


def test_eta_zero_is_uniform():
    assert importance_weights(np.array([1.0, 5.0, 9.0, 0.0]), 0.0).tolist() == [0.25] * 4


def test_large_eta_is_greedy():
    p = importance_weights(np.array([1.0, 1.1, 0.9]), 1e6)
    assert p.tolist() == [0, 1, 0]


def test_clip_bounds_the_exponent():
    p = importance_weights(np.array([0.0, 100.0]), 1.0, clip=5.0)
    assert (p[1] / p[0]).item() == pytest.approx(math.exp(5))


@given(st.lists(st.floats(0, 1), min_size=4, max_size=30, unique=True), st.floats(0.3, 0.95), st.floats(1e-8, 1e8))
@settings(deadline=None)
def test_auto_eta_reaches_the_wanted_effective_number_at_every_scale(values, share, scale):
    s = np.array(values)
    if float(s.max() - s.min()) < 1e-3:
        return
    s = s * scale
    reached = importance.effective_number(importance_weights(s, "auto", effective_share=share))
    top = int((s >= s.max() * (1 - 1e-9)).sum())
    assert reached == pytest.approx(max(share * len(values), top), rel=1e-3)


def test_auto_eta_of_equal_scores_is_zero():
    assert importance.auto_eta(np.ones(5)) == 0


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_auto_eta_share_out_of_range_raises(share):
    with pytest.raises(ValueError, match="share"):
        importance.auto_eta(np.ones(3), share)


def averaged(rule, values):
    """Score of one block after each of these measurements, and what it is read as."""
    score, count, read, out = np.zeros(1), np.zeros(1), np.zeros(1), []
    for value in values:
        importance.update(score, count, read, {0: value}, rule)
        out.append(importance.read(read, count, rule).item())
    return out


def test_exact_correction_reports_a_constant_as_itself():
    assert averaged(ScoreRule(), [3.0] * 6) == pytest.approx([3.0] * 6)


def test_exact_correction_of_the_plain_norm_reports_the_square_of_a_constant():
    assert averaged(ScoreRule(squared=False), [3.0] * 4) == pytest.approx([9.0] * 4)


def test_paper_rule_is_the_plain_moving_average_of_line_17():
    assert averaged(PAPER_RULE, [1.0, 2.0, 4.0]) == pytest.approx([0.2, 0.56, 1.248])


def test_official_rule_compounds_its_bias_correction():
    """The authors' code divides in place: a constant norm of 1 is reported as about 10 at the 7th update."""
    norms = [x**0.5 for x in averaged(OFFICIAL_RULE, [1.0] * 7)]
    expected, g = [], 0.0
    for n in range(1, 8):
        g = (0.2 + 0.8 * g) / (1 - 0.8**n)
        expected.append(g)
    assert norms == pytest.approx(expected)
    assert 9 < norms[-1] < 11


def test_blocks_that_were_not_seen_keep_their_score():
    scores, counts = np.array([1.0, 2.0]), np.array([1.0, 1.0])
    importance.update(scores, counts, np.zeros(2), {1: 7.0}, PAPER_RULE)
    assert scores[0] == 1
    assert scores[1] == pytest.approx(3)
    assert counts.tolist() == [1, 2]


def test_block_never_measured_counts_as_an_average_one():
    rule = ScoreRule(beta=0.0)
    assert importance.read(np.array([2.0, 0.0, 4.0]), np.array([1.0, 0.0, 1.0]), rule).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("field", "value"), [("beta", 1.0), ("beta", -0.1), ("correction", "some"), ("clip", 0.0), ("clip", -1.0)]
)
def test_score_rule_out_of_range_raises_naming_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        ScoreRule(**{field: value})


@given(
    st.lists(st.dictionaries(st.integers(0, 5), st.floats(0, 1e3), max_size=3), min_size=1, max_size=8),
    st.sampled_from([ScoreRule(), ScoreRule(squared=False), PAPER_RULE, OFFICIAL_RULE]),
)
def test_values_kept_up_to_date_are_those_of_scores_and_counts(rounds, rule):
    scores, counts, values = np.zeros((3, 6))
    for measured in rounds:
        importance.update(scores, counts, values, measured, rule)
        anew = [importance.corrected(score, count, rule) for score, count in zip(scores, counts, strict=True)]
        assert values.tolist() == anew
