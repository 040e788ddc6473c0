"""The fresh-score pass: all blocks measured in the last step of a round."""

import pytest
from tiny import backward, llama, train

from misa.optimizer import MISA, ScoreRule


def test_probe_of_a_bad_step_leaves_the_scores_as_they_were():
    model = llama()
    optimizer = MISA(model, budget=0.1, interval=1, probe_every=1)
    train(model, optimizer, 1)
    before = optimizer.scores
    backward(model, 1, scale=float("nan"))
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.scores == before
    train(model, optimizer, 1, first=2)
    assert optimizer.scores != before


def test_probe_is_of_every_second_round():
    model = llama()
    optimizer = MISA(model, budget=0.1, interval=2, probe_every=2)
    num_on = []
    for i in range(8):
        num_on.append(sum(p.requires_grad for p in model.parameters()))
        train(model, optimizer, 1, first=i)
    assert [n == 21 for n in num_on] == [False, False, False, True] * 2


@pytest.mark.parametrize("per_parameter", [False, True])
def test_probe_of_plain_norms(per_parameter):
    model, twin = llama(), llama()
    rule = ScoreRule(beta=0.0, squared=False, per_parameter=per_parameter)
    optimizer = MISA(model, budget=0.1, interval=1, lr=0.0, score=rule, probe_every=1)
    train(model, optimizer, 1)
    backward(twin, 0)
    for name, score in optimizer.scores.items():
        squares = twin.get_submodule(name).weight.grad.square()
        assert score == pytest.approx((squares.mean() if per_parameter else squares.sum()).item(), rel=1e-5)
