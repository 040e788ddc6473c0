"""The bounded rule of Algorithm 1 by itself."""

import torch
from tiny import backward, llama, moved, weights
from torch import nn

from misa.inner import BoundedAdam
from misa.optimizer import MISA


def bounded(*shape, **options):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    group = {"params": [p], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, **options}
    return p, BoundedAdam([group])


def test_bounded_rule_changes_nothing_where_told_so():
    p, one = bounded(3, 4)
    p.grad = torch.randn(3, 4)
    one.update()
    before = [p.detach().clone(), *(v.clone() for v in one.state[p].values())]
    p.grad = torch.full((3, 4), 5.0)
    one.update(found_inf=torch.tensor(1.0))
    p.grad = torch.full((3, 4), float("nan"))
    one.update(found_inf=torch.tensor(1.0))
    for old, new in zip(before, [p, *one.state[p].values()], strict=True):
        assert torch.equal(old, new)


def test_bounded_rule_decays():
    p, one = bounded(3, 4, weight_decay=0.5)
    start = p.detach().clone()
    p.grad = torch.zeros(3, 4)
    one.update()
    torch.testing.assert_close(p.detach(), 0.95 * start)


def test_bounded_rule_unscales():
    (p, one), (q, other) = bounded(3, 4), bounded(3, 4)
    p.grad = torch.randn(3, 4)
    q.grad = p.grad * 16
    one.update()
    other.update(grad_scale=torch.tensor(16.0))
    assert torch.equal(p, q)


def test_bounded_rule_ends_a_round_without_gradients_of_some():
    model = llama(1)
    optimizer = MISA(model, budget=1.0, interval=2, variant="paper")
    lonely = model.model.layers[0].mlp.up_proj.weight
    before = weights(model)
    for i in range(2):
        backward(model, i)
        lonely.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.round == 1
    assert "model.layers.0.mlp.up_proj.weight" not in moved(before, model)
