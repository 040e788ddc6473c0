"""Importance scores and sampling probabilities: pure functions over one number per block (tensors of shape `[B]`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


def update(scores: Tensor, counts: Tensor, measured: Tensor, seen: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Moving average of what a round measured (Algorithm 1, line 17).

    Args:
        scores: Stored scores, float64.
        counts: Number of updates each block has had.
        measured: This round's mean squared norm (or mean norm) of each block.
        seen: Which blocks were measured, boolean; the others keep their score.
        rule: The score rule.

    Returns:
        New scores and counts.
    """
    counts = counts + seen
    new = rule.beta * scores + (1 - rule.beta) * measured
    if rule.correction == "compounding":
        new = new / (1 - rule.beta ** counts.clamp(min=1))
    return torch.where(seen, new, scores), counts


def read(scores: Tensor, counts: Tensor, rule: ScoreRule) -> Tensor:
    """Scores as the exponent uses them: bias corrected, and squared where the plain norm is tracked.

    A block that was never measured counts as an average one under exact correction, and as zero otherwise.
    """
    value = scores if rule.squared else scores**2
    if rule.correction != "exact":
        return value
    correction = 1 - rule.beta**counts  # 0 where nothing was measured, so there the quotient is no number
    value = value / (correction if rule.squared else correction**2)
    num_measured = int(counts.count_nonzero())
    return value.nan_to_num(nan=float(value.nansum()) / max(num_measured, 1))


def log_probabilities(scores: Tensor, eta: float, clip: float | None = None) -> Tensor:
    """Logarithm of the sampling probabilities, log softmax(eta * scores), float64.

    The softmax maximises sum_b p_b s_b - KL(p || uniform) / eta over all distributions p (paper, section on importance
    sampling); eta = 0 is uniform. In logarithms, so that a large eta stays greedy instead of underflowing. `clip` is an
    upper bound on eta * score.
    """
    exponent = eta * scores.double()
    if clip is not None:
        exponent = exponent.clamp(max=clip)
    return torch.log_softmax(exponent, dim=0)


def probabilities(scores: Tensor, eta: float | str = 1.0, clip: float | None = None, share: float = 0.5) -> Tensor:
    """Sampling probabilities softmax(eta * scores); `eta="auto"` as in `auto_eta`."""
    value = auto_eta(scores, share) if eta == "auto" else float(eta)
    return log_probabilities(scores, value, clip).exp()


def effective_number(p: Tensor) -> float:
    """Effective number of blocks, 1 / sum p^2: B for the uniform distribution, 1 for a certain one."""
    return float(1 / (p**2).sum())


def auto_eta(scores: Tensor, share: float = 0.5) -> float:
    """The eta at which the effective number of blocks is `share` of all blocks.

    Scores differ by orders of magnitude between models, so that one eta is uniform on one and greedy on another; the
    effective number means the same everywhere. Equal scores give 0. If more than `share` of the blocks have the largest
    score, no eta reaches the target and a large one is returned. A `share` outside (0, 1] is a ValueError.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must lie in (0, 1]")
    spread = float(scores.max() - scores.min())
    if spread <= 0 or not math.isfinite(spread) or share == 1:
        return 0.0
    target = max(share * scores.numel(), 1 + 1e-9)
    low, high = 0.0, 1e-6
    while effective_number(log_probabilities(scores, high / spread).exp()) > target and high < 1e9:
        low, high = high, high * 10
    for _ in range(60):
        middle = (low + high) / 2
        if effective_number(log_probabilities(scores, middle / spread).exp()) > target:
            low = middle
        else:
            high = middle
    return high / spread
