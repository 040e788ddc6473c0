"""All schemes at one budget: closed form, Monte Carlo, and the draws that the optimizers really make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from misa.dynamics.variance import (
    SCHEMES,
    BlockGradients,
    draw_of,
    explained_share,
    monte_carlo,
    quantities,
    unbiased_quantities,
    variance_parts,
)

# The optimizers' sampler draws one set at a time.
MOST_REAL_DRAWS = 10_000


def real_draws(
    scheme: str,
    gradients: BlockGradients,
    budget: float,
    num_draws: int,
    seed: int,
    effective_share: float = 0.5,
) -> dict[str, float]:
    """What the optimizers' own sampler applies: sets that never exceed the budget, not sets that meet it on average.

    The sampler ranks blocks at random and fills the budget greedily, so its inclusion probabilities have no closed
    form, and a block larger than the budget is never drawn.

    Args:
        scheme: One of `SCHEMES`; the oracle's weights are drawn from like importance.
        gradients: What was measured.
        budget: Share of all parameters.
        num_draws: Draws to count.
        seed: Of the sampler.
        effective_share: See `draw_of`.

    Returns:
        `real_active_share`, `real_captured_share`, `real_applied_bias_sq` and `real_applied_mse` (over the squared norm
        of the full gradient, as the shares are), `real_explained_share`, `real_relative_variance` (of the estimator
        that weighs by these probabilities; left out where a block was never drawn), and the `unbiased_quantities` as
        `real_unbiased_...`; all from the counted inclusion probabilities. Nothing if no unit fits.
    """
    from misa.optimizer.sampling import BlockSampler

    draw = draw_of(scheme, gradients, budget, effective_share)
    numel = np.bincount(draw.units, weights=gradients.numel).astype(np.int64)
    limit = int(budget * gradients.num_parameters + 1e-6)
    if numel.min() > limit:
        return {}
    order = "shuffled" if draw.systematic else "importance"
    sampler = BlockSampler(numel.tolist(), order, max_numel=limit, seed=seed)
    log_p = np.log(np.maximum(draw.weights, 1e-300))
    counts = np.zeros(len(numel))
    for _ in range(num_draws):
        counts[list(sampler.draw(log_p))] += 1
    inclusion = (counts / num_draws)[draw.units]
    total = float(gradients.sq_norm.sum())
    mse = (1 - inclusion) * gradients.sq_norm + inclusion * gradients.noise
    found = {
        "real_active_share": float((inclusion * gradients.numel).sum()) / gradients.num_parameters,
        "real_captured_share": float((inclusion * gradients.sq_norm).sum()) / total,
        "real_applied_bias_sq": float(((1 - inclusion) ** 2 * gradients.sq_norm).sum()) / total,
        "real_applied_mse": float(mse.sum()) / total,
        "real_explained_share": explained_share(gradients.sq_norm, gradients.second_moment, inclusion),
        "real_relative_variance": sum(variance_parts(gradients, inclusion)) / total,
        **{f"real_{name}": value for name, value in unbiased_quantities(gradients, inclusion).items()},
    }
    return {name: value for name, value in found.items() if np.isfinite(value)}


def compare(
    gradients: BlockGradients,
    budget: float,
    schemes: Sequence[str] = SCHEMES,
    num_draws: int = 100_000,
    seed: int = 0,
    effective_share: float = 0.5,
) -> dict[str, dict[str, float]]:
    """All quantities of all schemes at one budget, closed form and Monte Carlo.

    Args:
        gradients: What was measured.
        budget: Share of all parameters.
        schemes: Names out of `SCHEMES`.
        num_draws: Monte Carlo steps of each scheme.
        seed: Of the Monte Carlo; every scheme gets its own stream, so that adding one changes no other.
        effective_share: See `draw_of`.

    Returns:
        Scheme name -> quantity -> value; see `quantities`, `monte_carlo` and `real_draws`, and `variance_agreement` and
        `applied_mse_agreement`, the relative difference of the Monte Carlo value from the closed form.
    """
    table = {}
    for scheme in schemes:
        draw = draw_of(scheme, gradients, budget, effective_share)
        generator = np.random.default_rng([seed, SCHEMES.index(scheme)])
        row = quantities(gradients, draw) | monte_carlo(gradients, draw, num_draws, generator)
        for name in ("variance", "applied_mse"):
            row[f"{name}_agreement"] = row[f"{name}_mc"] / row[name] - 1
        row |= real_draws(scheme, gradients, budget, min(num_draws, MOST_REAL_DRAWS), seed, effective_share)
        table[scheme] = row
    return table
