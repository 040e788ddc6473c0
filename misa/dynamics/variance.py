r"""What a choice of sampling scheme does to the gradient: pure functions on a few numbers for each block.

The gradient of a population of \(N\) mini-batches is split into blocks \(b = 1..B\) (one weight matrix each) with
\(n_b\) parameters. Mini-batch \(i\) gives \(g_{i,b}\), the full batch \(g_b = \frac1N \sum_i g_{i,b}\), and

- \(G_b = \lVert g_b \rVert^2\), the squared norm of the full gradient,
- \(s_b = \frac1N \sum_i \lVert g_{i,b} \rVert^2\), the second moment,
- \(\sigma_b^2 = s_b - G_b\), the mini-batch noise (exactly the population's variance, so never negative).

A scheme draws a set of blocks; block \(b\) is in it with probability \(\pi_b\). Every scheme is compared at the same
budget \(\delta\): the expected number of parameters drawn is that share of all \(P\) parameters of the model,
\(\sum_b \pi_b n_b = \delta P\). The unbiased estimator from one draw and one mini-batch, drawn independently, weighs
each block by its inverse probability (Horvitz-Thompson): \(\hat g_b = 1[b \in S]\, g_{i,b} / \pi_b\).

Blocks do not overlap, so its variance \(E\lVert \hat g - g \rVert^2 = \sum_b s_b / \pi_b - G_b\) depends on the
\(\pi_b\) alone, not on which blocks are drawn together. Uniform draws of layers and of matrices thus have the *same*
variance at the same budget; they differ in how much the captured gradient varies from draw to draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Every scheme that is compared, in the order in which tables and figures show them.
SCHEMES = (
    "layer_cyclic",
    "layer_uniform",
    "matrix_uniform",
    "matrix_importance_eta1",
    "matrix_importance_official",
    "matrix_importance_auto",
    "matrix_oracle",
)


@dataclass(frozen=True)
class BlockGradients:
    r"""Gradients of a population of mini-batches, reduced to what the variance needs.

    Attributes:
        numel: \(n_b\), parameters of each block, shape `[B]`.
        layer: Index of the layer each block lies in, shape `[B]`.
        batch_sq_norm: \(\lVert g_{i,b} \rVert^2\), shape `[N, B]`.
        batch_inner: \(\langle g_{i,b}, g_b \rangle\), shape `[N, B]`; its mean over the batches is \(G_b\).
        num_parameters: \(P\), all parameters of the model, those outside the blocks included.
    """

    numel: Array
    layer: NDArray[np.int64]
    batch_sq_norm: Array
    batch_inner: Array
    num_parameters: int

    @property
    def sq_norm(self) -> Array:
        r"""\(G_b\), shape `[B]`."""
        return np.asarray(self.batch_inner.mean(axis=0))

    @property
    def unbiased_sq_norm(self) -> Array:
        r"""\(G_b - \sigma_b^2 / (N - 1)\), shape `[B]`: of the data that the batches are a sample of.

        The mean gradient of \(N\) batches still has noise in it, which adds \(1/N\) of a batch's to its squared norm.
        What is left is unbiased, and below zero where it is lost in the noise; its sums over blocks are less so.
        """
        return np.asarray(self.sq_norm - self.noise / (len(self.batch_sq_norm) - 1))

    @property
    def second_moment(self) -> Array:
        r"""\(s_b\), shape `[B]`."""
        return np.asarray(self.batch_sq_norm.mean(axis=0))

    @property
    def noise(self) -> Array:
        r"""\(\sigma_b^2 = s_b - G_b\), shape `[B]`."""
        return np.maximum(self.second_moment - self.sq_norm, 0.0)

    @property
    def scores(self) -> Array:
        r"""The paper's scaled importance score at fixed weights: \(s_b / n_b\), shape `[B]`.

        It is what the moving average of mean squared mini-batch gradient norms tends to when the weights stand still.
        """
        return self.second_moment / self.numel

    @property
    def official_scores(self) -> Array:
        r"""The authors' code's score at fixed weights: the squared mean norm, not scaled by size; shape `[B]`."""
        return np.asarray(np.sqrt(self.batch_sq_norm).mean(axis=0) ** 2)


@dataclass(frozen=True)
class Draw:
    r"""How blocks are drawn: units that go on and off together, each with its probability.

    Attributes:
        units: Index of the unit each block belongs to, shape `[B]`.
        unit_probability: Probability that a unit is drawn, shape `[U]`.
        systematic: False: units are drawn independently of one another. True: in turn, from a random place in the
            cycle: unit \(u\) is on if a whole number lies in \([r + c_{u-1}, r + c_u)\), where \(c\) is the running
            sum of the probabilities and \(r\) is uniform in [0, 1).
        weights: The scheme's selection probabilities \(p_u\), before the budget turns them into inclusion
            probabilities; they sum to 1. Shape `[U]`.
    """

    units: NDArray[np.int64]
    unit_probability: Array
    systematic: bool
    weights: Array

    @property
    def inclusion(self) -> Array:
        r"""\(\pi_b\), shape `[B]`."""
        return self.unit_probability[self.units]


def inclusion_probabilities(weights: Array, numel: Array, budget_numel: float) -> Array:
    r"""Probabilities \(\pi_u = \min(1, c\, w_u)\), with \(c\) such that \(\sum_u \pi_u n_u\) is the budget.

    Args:
        weights: \(w_u \ge 0\), shape `[U]`, not all zero.
        numel: \(n_u\), shape `[U]`.
        budget_numel: Expected number of parameters in a draw.

    Returns:
        \(\pi\), shape `[U]`; all ones if the budget holds everything with a positive weight.

    Raises:
        ValueError: If the budget is not positive, or a weight is negative or not finite, or all are zero.
    """
    if not budget_numel > 0:
        raise ValueError(f"budget_numel is {budget_numel}; it must be positive")
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.any(weights > 0):
        raise ValueError("weights must be finite and not negative, and at least one positive")
    full = np.zeros(len(weights), dtype=bool)
    positive = weights > 0
    while (positive & ~full).any():
        scale = (budget_numel - numel[full].sum()) / (weights * numel)[~full].sum()
        over = ~full & (scale * weights >= 1)
        if not over.any():
            return np.where(full, 1.0, scale * weights)
        full |= over
    return full.astype(np.float64)


def draw_of(scheme: str, gradients: BlockGradients, budget: float, effective_share: float = 0.5) -> Draw:
    r"""The draw of a scheme at a budget.

    - `layer_cyclic`: whole layers in turn (BAdam); over a cycle each is on for the same share of the rounds.
    - `layer_uniform`: each layer on independently, all with the same probability (LISA's draw without its always-on
      parameters).
    - `matrix_uniform`: the same for matrices.
    - `matrix_importance_eta1`: matrices, weights \(p = \mathrm{softmax}(\eta s_b / n_b)\) with \(\eta = 1\), the
      paper's default.
    - `matrix_importance_official`: the same by the scores of the authors' code, \(\mathrm{softmax}(\min(5, \eta \bar
      n_b^2))\) with \(\eta = 1\) and the mean norm \(\bar n_b = \frac1N \sum_i \lVert g_{i,b} \rVert\). That is where
      these scores end after many updates: their correction of the bias, applied anew at every update, makes earlier
      ones several times larger and their draws more uneven. The authors pre-train with \(\eta = 500\).
    - `matrix_importance_auto`: as the paper's with the \(\eta\) at which \(1 / \sum p^2\) is `effective_share` of all
      blocks.
    - `matrix_oracle`: weights \(\sqrt{s_b / n_b}\) from the true second moments. It has the least variance of all
      draws at the budget (Lagrange multiplier on \(\sum_b s_b / \pi_b\)): the bound the others can approach.

    Args:
        scheme: One of `SCHEMES`.
        gradients: What was measured.
        budget: \(\delta\), share of all parameters, in (0, 1].
        effective_share: For `matrix_importance_auto`, in (0, 1].

    Returns:
        The draw.

    Raises:
        ValueError: If the scheme is unknown or the budget out of range.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; allowed: {', '.join(SCHEMES)}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}; it must be in (0, 1], a share of all parameters")
    if scheme.startswith("layer"):
        units = np.unique(gradients.layer, return_inverse=True)[1].astype(np.int64)
    else:
        units = np.arange(len(gradients.numel), dtype=np.int64)
    num_units = int(units.max()) + 1
    numel = np.bincount(units, weights=gradients.numel, minlength=num_units).astype(np.float64)
    weights = np.full(num_units, 1 / num_units)
    if scheme == "matrix_oracle":
        weights = np.sqrt(gradients.scores)
        weights = weights / weights.sum()
    elif scheme == "matrix_importance_official":
        from misa.optimizer.importance import OFFICIAL_RULE

        weights = importance_weights(gradients.official_scores, 1.0, clip=OFFICIAL_RULE.clip)
    elif scheme.startswith("matrix_importance"):
        weights = importance_weights(gradients.scores, 1.0 if scheme.endswith("eta1") else "auto", effective_share)
    probability = inclusion_probabilities(weights, numel, budget * gradients.num_parameters)
    return Draw(units, probability, scheme == "layer_cyclic", weights)


def importance_weights(
    scores: Array, eta: float | str, effective_share: float = 0.5, clip: float | None = None
) -> Array:
    r"""\(p = \mathrm{softmax}(\eta \cdot \mathrm{scores})\), by the code the optimizer itself uses; shape `[B]`."""
    from misa.optimizer.importance import auto_eta, log_weights, normalized

    value = auto_eta(scores, effective_share) if eta == "auto" else float(eta)
    return normalized(log_weights(scores, value, clip))


def variance_parts(gradients: BlockGradients, inclusion: Array) -> tuple[float, float]:
    r"""Closed-form variance of the unbiased estimator, in its two parts.

    Args:
        gradients: What was measured.
        inclusion: \(\pi_b > 0\) wherever \(s_b > 0\), shape `[B]`.

    Returns:
        \(\sum_b G_b (1/\pi_b - 1)\), from the draw, and \(\sum_b \sigma_b^2 / \pi_b\), from the mini-batch; infinite
        if a block that has a gradient is never drawn.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        sampling = np.where(gradients.sq_norm > 0, gradients.sq_norm * (1 / inclusion - 1), 0.0)
        noise = np.where(gradients.noise > 0, gradients.noise / inclusion, 0.0)
    return float(sampling.sum()), float(noise.sum())


def explained_share(sq_norm: Array, second_moment: Array, inclusion: Array) -> float:
    r"""Share of the squared full gradient that the best multiple of an applied step explains.

    \(1 - \min_c E\lVert c\, 1_S g_i - g \rVert^2 / \lVert g \rVert^2 = (\sum_b \pi_b G_b)^2 / (\sum_b G_b \sum_b
    \pi_b s_b)\). The learning rate is such a multiple. With \(c = 1\) instead (`applied_mse`), where batches are
    noisier than the gradient is long, the best draw is that of nothing.

    Args:
        sq_norm: \(G_b\), shape `[B]`.
        second_moment: \(s_b\), shape `[B]`.
        inclusion: \(\pi_b\), shape `[B]`, not all zero.
    """
    return float((inclusion * sq_norm).sum() ** 2 / (sq_norm.sum() * (inclusion * second_moment).sum()))


def unbiased_quantities(gradients: BlockGradients, inclusion: Array) -> dict[str, float]:
    r"""What a draw does to gradients of the data that the batches are a sample of, by unbiased sums.

    Args:
        gradients: What was measured.
        inclusion: \(\pi_b\), shape `[B]`.

    Returns:
        `unbiased_relative_variance`, `unbiased_captured_share`, `unbiased_applied_mse` (over the squared norm) and
        `unbiased_explained_share`: as those of the batches alone, but with `unbiased_sq_norm` for \(G_b\), and the
        second moments as they are. Nothing if there is one batch, or noise is all that was measured.
    """
    if len(gradients.batch_sq_norm) < 2 or (total := float((g := gradients.unbiased_sq_norm).sum())) <= 0:
        return {}
    moments = gradients.second_moment
    with np.errstate(divide="ignore"):
        variance = float(np.where(moments > 0, moments / inclusion, 0.0).sum()) - total
    return {
        "unbiased_relative_variance": variance / total,
        "unbiased_captured_share": float((inclusion * g).sum()) / total,
        "unbiased_applied_mse": float((g + inclusion * (moments - 2 * g)).sum()) / total,
        "unbiased_explained_share": explained_share(g, moments, inclusion),
    }


def quantities(gradients: BlockGradients, draw: Draw) -> dict[str, float]:
    r"""Every closed-form quantity of a draw.

    Returns:
        - `variance`: \(E\lVert\hat g - g\rVert^2\) of the unbiased estimator; `variance_sampling` and `variance_noise`
          are its parts (see `variance_parts`); `relative_variance` is it over \(\lVert g\rVert^2 = \sum_b G_b\).
        - `captured`: \(E\sum_{b\in S} G_b = \sum_b \pi_b G_b\), squared full gradient in the drawn blocks, and
          `captured_share`, that over \(\lVert g\rVert^2\).
        - `applied_bias_sq` and `applied_mse`: for what the optimizers really apply, the drawn blocks' mini-batch
          gradients without weights: \(\sum_b (1-\pi_b)^2 G_b\) and
          \(E\lVert 1_S g_i - g\rVert^2 = \sum_b (1-\pi_b) G_b + \pi_b \sigma_b^2\).
        - `explained_share`: what the best multiple of it explains, see there.
        - `population_noise`: share of \(\lVert g\rVert^2\) that is there because the population is but a sample:
          \(\sum_b \sigma_b^2 / (N-1)\) over it; and the `unbiased_quantities`.
        - `effective_blocks`: \(1/\sum_u p_u^2\) over the scheme's units: number of layers for a uniform draw of layers.
        - `active_share`: \(\sum_b \pi_b n_b / P\), which is the budget unless everything is always drawn.
    """
    inclusion = draw.inclusion
    total = float(gradients.sq_norm.sum())
    sampling, noise = variance_parts(gradients, inclusion)
    captured = float((inclusion * gradients.sq_norm).sum())
    return {
        "variance": sampling + noise,
        "variance_sampling": sampling,
        "variance_noise": noise,
        "relative_variance": (sampling + noise) / total,
        "captured": captured,
        "captured_share": captured / total,
        "applied_bias_sq": float(((1 - inclusion) ** 2 * gradients.sq_norm).sum()),
        "applied_mse": float(((1 - inclusion) * gradients.sq_norm + inclusion * gradients.noise).sum()),
        "explained_share": explained_share(gradients.sq_norm, gradients.second_moment, inclusion),
        "population_noise": float(gradients.noise.sum()) / max(len(gradients.batch_sq_norm) - 1, 1) / total,
        **unbiased_quantities(gradients, inclusion),
        "effective_blocks": float(1 / (draw.weights**2).sum()),
        "active_share": float((inclusion * gradients.numel).sum()) / gradients.num_parameters,
    }


def sample(draw: Draw, num_draws: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw sets of blocks.

    Args:
        draw: How.
        num_draws: K.
        generator: Random numbers.

    Returns:
        Whether each block is in each set, shape `[K, B]`.
    """
    if draw.systematic:
        ends = np.cumsum(draw.unit_probability)
        starts = ends - draw.unit_probability
        place = generator.random((num_draws, 1))
        on = np.ceil(place + ends) - np.ceil(place + starts) > 0
    else:
        on = generator.random((num_draws, len(draw.unit_probability))) < draw.unit_probability
    return on[:, draw.units]


def monte_carlo(
    gradients: BlockGradients, draw: Draw, num_draws: int, generator: np.random.Generator, chunk: int = 4096
) -> dict[str, float]:
    r"""Simulate the estimator: draw blocks and a mini-batch, measure its squared distance from the full gradient.

    Args:
        gradients: What was measured.
        draw: The scheme's draw.
        num_draws: Simulated steps, at least 2.
        generator: Random numbers.
        chunk: Steps simulated at once.

    Returns:
        `variance_mc` and its standard error `variance_mc_stderr`; and of the captured share over draws the mean
        `captured_share_mc`, the standard deviation `captured_share_std`, which tells apart schemes of equal variance,
        and the 5 % and 95 % quantiles `captured_share_q05` and `captured_share_q95`; and of what is applied without
        weights `applied_mse_mc` and `applied_bias_sq_mc`.

    Raises:
        ValueError: If `num_draws` is below 2.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws is {num_draws}; it must be at least 2")
    inclusion, total = draw.inclusion, gradients.sq_norm.sum()
    inverse = np.divide(1.0, inclusion, out=np.zeros_like(inclusion), where=inclusion > 0)
    distances, captured, applied = [], [], []
    num_on = np.zeros(len(inclusion))
    for start in range(0, num_draws, chunk):
        size = min(chunk, num_draws - start)
        on = sample(draw, size, generator)
        num_on += on.sum(axis=0)
        weight = on * inverse  # [size, B]
        batch = generator.integers(len(gradients.batch_sq_norm), size=size)
        # |w g_i - g|^2 = w^2 |g_i|^2 - 2 w <g_i, g> + |g|^2, block by block.
        second = weight**2 * gradients.batch_sq_norm[batch] - 2 * weight * gradients.batch_inner[batch]
        distances.append(second.sum(axis=1) + total)
        captured.append(on @ gradients.sq_norm / total)
        # The same with weight 1, for what is applied.
        applied.append((on * (gradients.batch_sq_norm[batch] - 2 * gradients.batch_inner[batch])).sum(axis=1) + total)
    distance, share = np.concatenate(distances), np.concatenate(captured)
    return {
        "variance_mc": float(distance.mean()),
        "variance_mc_stderr": float(distance.std(ddof=1) / np.sqrt(num_draws)),
        "captured_share_mc": float(share.mean()),
        "captured_share_std": float(share.std(ddof=1)),
        "captured_share_q05": float(np.quantile(share, 0.05)),
        "captured_share_q95": float(np.quantile(share, 0.95)),
        "applied_mse_mc": float(np.concatenate(applied).mean()),
        "applied_bias_sq_mc": float(((1 - num_on / num_draws) ** 2 * gradients.sq_norm).sum()),
    }
