r"""The rate of convergence: the mean squared full gradient of a run against its number of block updates.

The claim (arXiv 2511.00056): with a step size in proportion to \(1/\sqrt K\), the mean over a run's \(K\) block
updates of \(\lVert\nabla f\rVert^2\) falls like \(1/\sqrt K\), for any number \(T\) of steps in a round. So there
is one run for every \(K\), each with its own constant step size \(\alpha = \alpha_0 / \sqrt K\), and the slope of
the means in logarithms is compared with -1/2. A block update is one inner step on the blocks that are on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from misa.dynamics.problems import Problem

#: Slope that the claim asks for.
EXPECTED_SLOPE = -0.5


class Slope(NamedTuple):
    """Slope of a line through points in logarithms, with its 95% confidence interval."""

    value: float
    low: float
    high: float


def mean_sq_norm(
    problem: Problem, num_updates: int, interval: int, lr: float, budget: float, momentum_step: bool, seed: int
) -> float:
    r"""Run Algorithm 1 and average the squared full gradient over the run.

    Args:
        problem: What to minimise, in its first state.
        num_updates: \(K\), inner steps in all.
        interval: \(T\), inner steps in a round.
        lr: \(\alpha\), the same in the whole run.
        budget: Share of the parameters in blocks that is drawn; the paper's \(\delta\) counts all parameters.
        momentum_step: Whether a round ends with the momentum that is left (Algorithm 1, line 16).
        seed: Of the blocks drawn.

    Returns:
        Mean of \(\lVert\nabla f(\theta_k)\rVert^2\) over \(k = 0 .. K-1\). Every one is measured: of a part of them,
        the first, which is large, would weigh more in shorter runs, and the slope would be that of its weight.
    """
    from misa.optimizer import MISA, partition

    in_blocks = sum(block.numel for block in partition(problem.model))
    share = budget * in_blocks / sum(p.numel() for p in problem.model.parameters())
    optimizer = MISA(
        # Not the model, whose off parameters would stay off while the full gradient is measured.
        *(list(problem.model.named_parameters()), lr, share, interval),
        variant="paper",
        inner_kwargs={"momentum_step": momentum_step},
        seed=seed,
    )
    total = 0.0
    for _ in range(num_updates):
        total += problem.full_sq_norm()
        problem.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    return total / num_updates


def fit_slope(x: Sequence[float], y: Sequence[float], seeds: Sequence[int] | None = None, level: float = 0.95) -> Slope:
    """Least-squares slope of log y against log x, with Student's confidence interval.

    Args:
        x: Positive, at least two different values (for each seed).
        y: Positive.
        seeds: Of each point. Runs with one seed start at one place, so points of one seed are no independent ones:
            with several seeds the slope is the mean of theirs, and the interval is that of this mean. With one, or
            None, the interval says how far the points are from a line, and nothing of other seeds.
        level: Of the confidence interval.

    Returns:
        The slope; its interval is infinite if there are only two points.

    Raises:
        ValueError: If there are fewer than two different x, or a number is not positive and finite.
    """
    from scipy import stats

    values = np.array([x, y], dtype=np.float64)
    if not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError("x and y must be positive and finite to have logarithms")
    points = np.log(values)
    of_seed = np.zeros(points.shape[1]) if seeds is None else np.asarray(seeds)
    fits = []
    for seed in np.unique(of_seed):
        own = points[:, of_seed == seed]
        if len(np.unique(own[0])) < 2:
            raise ValueError(f"x has {len(np.unique(own[0]))} different values; a slope needs at least 2")
        fits.append(stats.linregress(*own))
    if len(fits) > 1:
        found = np.array([fit.slope for fit in fits])
        value, error, freedom = float(found.mean()), float(stats.sem(found)), len(fits) - 1
    else:
        value, error, freedom = float(fits[0].slope), float(fits[0].stderr), points.shape[1] - 2
    half = error * float(stats.t.ppf((1 + level) / 2, freedom)) if freedom > 0 else math.inf
    return Slope(value, value - half, value + half)
