r"""How old importance scores may be: what scores of an earlier moment still say about the gradients of now.

Three ways in which scores grow old are measured, each against the fresh second moments of the present weights:

- between snapshots of a run: the scores of an earlier snapshot;
- inside a round: the scores at its start, while the drawn blocks train;
- in the optimizer: its moving average, in which a block keeps its score until it is drawn again. Measured at the start
  of every round for fixed and automatic eta, and with the pass that measures all blocks (`probe_every=1`).

Scores are judged by their rank correlation with the fresh ones, and by the squared full gradient that draws by them
capture, and the variance of the unbiased estimator, at one budget.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from misa.dynamics.gradients import block_gradients
from misa.dynamics.variance import Array, BlockGradients, importance_weights, inclusion_probabilities, variance_parts

COLUMNS = ("snapshot", "step", "policy", "source", "age", "quantity", "value")

Row = dict[str, Any]


class Policy(NamedTuple):
    """How an optimizer keeps its scores."""

    eta: float | str
    probe_every: int


#: Name of each source of scores that an optimizer keeps.
POLICIES = {"eta1": Policy(1.0, 0), "auto": Policy("auto", 0), "auto_probed": Policy("auto", 1)}


@dataclass(frozen=True)
class FollowSettings:
    """The rounds that are followed.

    Attributes:
        num_rounds: Rounds of each policy.
        interval: Steps in a round, at least 4.
        budget: Share of all parameters that is drawn.
        lr: Learning rate.
        effective_share: What automatic eta aims at.
        seed: Of the blocks drawn.
    """

    num_rounds: int
    interval: int
    budget: float
    lr: float
    effective_share: float
    seed: int


def worth(gradients: BlockGradients, weights: Array, budget: float) -> Row:
    """What draws of matrices by these selection weights are worth at a budget.

    Args:
        gradients: The present ones.
        weights: Selection weights, shape `[B]`.
        budget: Share of all parameters.

    Returns:
        `captured_share` and `relative_variance`, as in `misa.dynamics.variance.quantities`.
    """
    inclusion = inclusion_probabilities(weights, gradients.numel, budget * gradients.num_parameters)
    total = gradients.sq_norm.sum()
    return {
        "captured_share": float((inclusion * gradients.sq_norm).sum() / total),
        "relative_variance": float(sum(variance_parts(gradients, inclusion)) / total),
    }


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's rank correlation; 0 where one of them does not vary."""
    from scipy import stats

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(stats.spearmanr(one, other).statistic)


def references(gradients: BlockGradients, budget: float, effective_share: float) -> dict[str, Row]:
    """What draws are worth that need no history: uniform, by fresh scores, and by true norms."""
    weights = {
        "uniform": np.ones(len(gradients.numel)),
        "fresh_eta1": importance_weights(gradients.scores, 1.0),
        "fresh_auto": importance_weights(gradients.scores, "auto", effective_share),
        "oracle": np.sqrt(gradients.scores),
    }
    return {name: worth(gradients, own, budget) for name, own in weights.items()}


def between(
    snapshots: Sequence[tuple[str, int, BlockGradients]], budget: float, effective_share: float
) -> Iterator[Row]:
    """Rows for every pair of an earlier and a later snapshot of one run.

    Args:
        snapshots: Name, step and gradients, of one run in the order of the steps; one of an unknown step (below 0) or
            with other blocks has no pair.
        budget: Share of all parameters.
        effective_share: For the automatic eta of the draws.

    Yields:
        Rows of `staleness.csv` with source `snapshot`; `captured_lost` is the part of what draws by fresh scores
        capture that is lost by drawing with the old ones.
    """
    for (_, before, old), (name, step, new) in itertools.combinations(snapshots, 2):
        if before < 0 or old.numel.tolist() != new.numel.tolist():
            continue  # not two moments of one run
        yield from _aged(name, step, "", "snapshot", step - before, old.scores, new, budget, effective_share)


def mean_staleness(rows: Sequence[Row]) -> dict[str, float]:
    """Means over snapshots and rounds: `staleness/[<policy>/]<source>/<age>/<quantity>`.

    The weights of each policy are others, so references are compared with the scores of the same policy alone.

    Args:
        rows: Of `staleness.csv`.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        path = [row["policy"], row["source"], str(row["age"]), row["quantity"]]
        values.setdefault("/".join(["staleness", *filter(None, path)]), []).append(row["value"])
    return {name: float(np.mean(own)) for name, own in values.items()}


def follow(
    model: torch.nn.Module,
    gradients: BlockGradients,
    population: Sequence[Mapping[str, torch.Tensor]],
    batches: Sequence[Mapping[str, torch.Tensor]],
    settings: FollowSettings,
    name: str,
    step: int,
) -> Iterator[Row]:
    """Train a copy of a model for some rounds under each policy, and compare its scores with fresh ones.

    Args:
        model: The snapshot; it stays as it is.
        gradients: Its own, on the population.
        population: Mini-batches that fresh gradients are measured on.
        batches: Mini-batches that are trained on, one a step, in turn.
        settings: The rounds.
        name: Of the snapshot.
        step: Of the snapshot.

    Yields:
        Rows of `staleness.csv`, each with the policy whose weights it is about, with its own name as the source (age 0,
        at the start of each round but the first), of `references`, and `round_start` (at the middle and the end of
        each round).

    Raises:
        ValueError: If the interval is below 4, or no block fits the budget.
    """
    if settings.interval < 4:
        raise ValueError(f"interval is {settings.interval}; it must be at least 4 to have a middle")
    from misa.optimizer import MISA, partition

    twin = copy.deepcopy(model)
    twin_blocks = partition(twin)

    def fresh(trained: torch.nn.Module) -> BlockGradients:
        # Measured on a copy: the optimizer's hooks must not see these passes.
        twin.load_state_dict(trained.state_dict())
        return block_gradients(twin, twin_blocks, population)

    for policy, (eta, probe_every) in POLICIES.items():
        trained = copy.deepcopy(model).eval()
        optimizer = MISA(
            *(trained, settings.lr, settings.budget, settings.interval, eta),
            effective_share=settings.effective_share,
            probe_every=probe_every,
            seed=settings.seed,
        )
        source = itertools.cycle(batches)
        present: BlockGradients | None = gradients
        for number in range(settings.num_rounds):
            start, present = fresh(trained) if present is None else present, None
            now = step + number * settings.interval if step >= 0 else step
            if number:  # before the first round there is no score
                stored, p = (np.array(list(each.values())) for each in (optimizer.scores, optimizer.probabilities))
                found = worth(start, p, settings.budget) | {
                    "rank_correlation": rank_correlation(stored, start.scores),
                    "effective_blocks": float(1 / (p**2).sum()),
                }
                yield from _rows(name, now, policy, policy, 0, found)
                for other, values in references(start, settings.budget, settings.effective_share).items():
                    yield from _rows(name, now, policy, other, 0, values)
            for k in range(1, settings.interval + 1):
                trained(**next(source)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                # The end of a round is the start of the next.
                if policy == "eta1" and k in (settings.interval // 2, settings.interval):
                    present = fresh(trained)
                    yield from _aged(
                        *(name, now + k if step >= 0 else step, policy, "round_start", k, start.scores, present),
                        *(settings.budget, settings.effective_share),
                    )
        optimizer.release()


def _aged(
    name: str,
    step: int,
    policy: str,
    source: str,
    age: int,
    old: Array,
    new: BlockGradients,
    budget: float,
    effective_share: float,
) -> Iterator[Row]:
    by_old, by_new = (
        worth(new, importance_weights(scores, "auto", effective_share), budget) for scores in (old, new.scores)
    )
    values = by_old | {
        "rank_correlation": rank_correlation(old, new.scores),
        "captured_lost": 1 - by_old["captured_share"] / by_new["captured_share"],
        "variance_gained": by_old["relative_variance"] / by_new["relative_variance"] - 1,
    }
    yield from _rows(name, step, policy, source, age, values)


def _rows(name: str, step: int, policy: str, source: str, age: int, values: Row) -> Iterator[Row]:
    for row in values.items():
        yield dict(zip(COLUMNS, (name, step, policy, source, age, *row), strict=True))
