"""The slow twin of `MISA`: Algorithm 1 of arXiv 2511.00056 line by line, the oracle of the fast class.

Every gradient is computed, nothing is frozen, fused, kept in lower precision or read in batches. Numbers in comments
are the paper's line numbers. `variant="default"` differs in three lines, marked so: the inner step is AdamW without
decay, the score's average is corrected for its start at zero, and a block drawn twice in a row keeps its moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from misa.optimizer.blocks import partition


class Round(NamedTuple):
    """What one round of the outer loop did."""

    active: tuple[str, ...]  # names of the sampled blocks
    probabilities: dict[str, float]  # what they were sampled with
    scores: dict[str, float]  # G after the round


def reference_misa(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    num_rounds: int,
    interval: int = 50,
    budget: float = 0.03,
    eta: float = 1.0,
    beta: float = 0.8,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    variant: str = "paper",
) -> Iterator[Round]:
    """Train an fp32 `model` in place, one round at each `next`; yields every round when it is over.

    `loss` returns the loss on mini-batch number 0, 1, ... at the model's present weights; `num_rounds` is the paper's
    N, `interval` T, `budget` delta and `lr` alpha; the other arguments are those of `MISA`.
    """
    paper, (beta1, beta2) = variant == "paper", betas
    generator = torch.Generator().manual_seed(seed)
    blocks = {b.name: dict(b.params) for b in partition(model)}  # 1: partition the model into B modules
    size = {b: sum(p.numel() for p in params.values()) for b, params in blocks.items()}
    total = sum(p.numel() for p in model.parameters())
    p_of = dict.fromkeys(blocks, 1 / len(blocks))  # 2: P = 1/B
    g_of = dict.fromkeys(blocks, 0.0)  # 3: G = 0
    times = dict.fromkeys(blocks, 0)
    m, v, age, batch = {}, {}, {}, 0  # type: dict[str, Tensor], dict[str, Tensor], dict[str, int], int
    for _ in range(num_rounds):  # 4: for n = 1, ..., N
        # 5: sample modules by P without replacement, while the trainable share stays below delta
        u = torch.rand(len(blocks), generator=generator, dtype=torch.float64).tolist()
        clock = {b: -math.log(x) / p_of[b] for b, x in zip(blocks, u, strict=True)}  # rate p: who rings first is drawn
        active: list[str] = []
        for b in sorted(blocks, key=clock.__getitem__):
            if sum(size[a] for a in active) + size[b] <= int(budget * total + 1e-6):
                active.append(b)
        active = [b for b in blocks if b in active]
        params = {name: p for b in active for name, p in blocks[b].items()}
        m = {n: m[n] if n in m and not paper else torch.zeros_like(p) for n, p in params.items()}  # default: kept
        v = {n: v[n] if n in v and not paper else torch.zeros_like(p) for n, p in params.items()}
        age = {n: age.get(n, 0) for n in params}
        bound = dict.fromkeys(params, torch.zeros(()))
        squares = dict.fromkeys(active, 0.0)
        for _ in range(interval):  # 6: for t = 1, ..., T
            grads = torch.autograd.grad(loss(batch), list(params.values()))  # 7, 8: mini-batch, its gradient
            batch += 1
            with torch.no_grad():
                for (n, p), g in zip(params.items(), grads, strict=True):
                    m[n] = beta1 * m[n] + (1 - beta1) * g  # 9
                    v[n] = beta2 * v[n] + (1 - beta2) * g * g  # 10
                    if paper:
                        limited = torch.maximum(v[n], bound[n])  # 11: v~_t = max(v_t, ||v~_{t-1}||_max)
                        bound[n] = limited.max()  # 12
                        p.sub_(lr * m[n] / (limited + eps).sqrt())  # 13
                    else:  # default: AdamW's step
                        age[n] += 1
                        root = (v[n] / (1 - beta2 ** age[n])).sqrt() + eps
                        p.sub_(lr * m[n] / (1 - beta1 ** age[n]) / root)
                for b in active:
                    mine = [g for n, g in zip(params, grads, strict=True) if n in blocks[b]]
                    squares[b] += sum(g.double().square().sum().item() for g in mine) / size[b] / interval
        if paper:  # 16: the momentum that is left
            with torch.no_grad():
                for n, p in params.items():
                    p.sub_(lr * beta1 / (1 - beta1) * m[n] / (v[n] + eps).sqrt())
        for b in active:  # 17: G_b
            g_of[b] = beta * g_of[b] + (1 - beta) * squares[b]
            times[b] += 1
        used = p_of
        read = dict(g_of) if paper else {b: g_of[b] / (1 - beta ** times[b]) for b in blocks if times[b]}  # default
        average = sum(read.values()) / len(read)
        scores = {b: read.get(b, average) for b in blocks}
        weights = torch.tensor(list(scores.values()), dtype=torch.float64).mul(eta).softmax(0).tolist()
        p_of = dict(zip(blocks, weights, strict=True))  # 18: p_b = exp(eta G_b) / sum_j exp(eta G_j)
        yield Round(tuple(active), used, scores)  # 19: the optimizer state of the round is dropped
