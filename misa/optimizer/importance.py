"""Importance scores and sampling probabilities: pure functions over one number per block, arrays of shape `[B]`.

A model has a few hundred blocks at most, and on so few numbers a call of numpy takes a fraction of one of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CORRECTIONS = ("exact", "none", "compounding")


@dataclass(frozen=True)
class ScoreRule:
    """How gradient norms become importance scores.

    Attributes:
        beta: Factor of the moving average, in [0, 1); the paper's beta. Default 0.8, the authors' setting.
        squared: Track the mean squared norm (paper) or the mean norm, squared later (the authors' code).
        per_parameter: Divide the squared norm by the number of elements of the block (paper).
        correction: `"exact"` divides the average by 1 - beta^n for n updates when it is read; `"none"` leaves it
            (Algorithm 1 states no correction); `"compounding"` stores the divided value, as the authors' code does.
        clip: Upper bound on eta * score in the exponent (the authors' `G_clip`), or None.
        per_interval: Divide a round's sum by the interval even if the round was shorter (the authors' code).
    """

    beta: float = 0.8
    squared: bool = True
    per_parameter: bool = True
    correction: str = "exact"
    clip: float | None = None
    per_interval: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: must lie in [0, 1)")
        if self.correction not in CORRECTIONS:
            raise ValueError(f"correction={self.correction!r}: must be one of {', '.join(CORRECTIONS)}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip}: must be positive or None")


PAPER_RULE = ScoreRule(correction="none")
OFFICIAL_RULE = ScoreRule(squared=False, per_parameter=False, correction="compounding", clip=5.0, per_interval=True)


def update(scores: Array, counts: Array, values: Array, measured: Mapping[int, float], rule: ScoreRule) -> None:
    """Moving average of what a round measured (Algorithm 1, line 17), in place.

    `measured` has this round's mean squared norm (or mean norm) of the blocks that got one, by index; the others keep
    their score. `counts` are the updates each block has had, `values` the scores as `corrected`.
    """
    for i, value in measured.items():
        counts[i] += 1
        scores[i] = rule.beta * scores[i] + (1 - rule.beta) * value
        if rule.correction == "compounding":
            scores[i] /= 1 - rule.beta ** counts[i]
        values[i] = corrected(scores[i], counts[i], rule)


def corrected(score: float, count: float, rule: ScoreRule) -> float:
    """A score without its bias, and squared where the plain norm is tracked; 0 for a block never measured."""
    if rule.correction == "exact" and count:
        score = score / (1 - rule.beta**count)
    return score if rule.squared else score**2


def read(values: Array, counts: Array, rule: ScoreRule) -> Array:
    """Scores for the exponent, of those `corrected`; a block never measured is average if these are exact, else 0."""
    num_measured = np.count_nonzero(counts) if rule.correction == "exact" else 0
    return np.where(counts, values, values.sum() / num_measured) if 0 < num_measured < counts.size else values


def log_weights(scores: ArrayLike, eta: float, clip: float | None = None) -> Array:
    """Logarithm of the sampling probabilities softmax(eta * scores), up to a constant: the largest is 0.

    The softmax maximises sum_b p_b s_b - KL(p || uniform) / eta over all distributions p (paper, section on importance
    sampling); eta = 0 is uniform. In logarithms, so that a large eta stays greedy instead of underflowing. `clip` is an
    upper bound on eta * score.
    """
    exponent = eta * np.asarray(scores, dtype=np.float64)
    if clip is not None:
        exponent = np.minimum(exponent, clip)
    exponent -= exponent.max()
    return exponent


def normalized(logarithms: Array) -> Array:
    """Probabilities whose logarithms these are, up to a constant."""
    weights: Array = np.exp(logarithms - logarithms.max())
    weights /= weights.sum()
    return weights


def effective_number(weights: Array) -> float:
    """Effective number of blocks, 1 / sum p^2 for the normalized weights: B if they are equal, 1 if one has all."""
    return float(weights.sum() ** 2 / (weights @ weights))


def auto_eta(scores: ArrayLike, share: float = 0.5) -> float:
    """The eta at which the effective number of blocks is `share` of all blocks.

    Scores differ by orders of magnitude between models, so that one eta is uniform on one and greedy on another; the
    effective number means the same everywhere. Equal scores give 0. If more than `share` of the blocks have the largest
    score, no eta reaches the target and a large one is returned. A `share` outside (0, 1] is a ValueError.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must lie in (0, 1]")
    scores = np.asarray(scores, dtype=np.float64)
    spread = float(scores.max() - scores.min())
    if spread <= 0 or not math.isfinite(spread) or share == 1:
        return 0.0
    target = max(share * scores.size, 1 + 1e-9)
    below = (scores - scores.max()) / spread
    low, high = 0.0, 1e-6
    while effective_number(np.exp(high * below)) > target and high < 1e9:
        low, high = high, high * 10
    for _ in range(60):
        middle = (low + high) / 2
        too_flat = effective_number(np.exp(middle * below)) > target
        low, high = (middle, high) if too_flat else (low, middle)
    return high / spread
