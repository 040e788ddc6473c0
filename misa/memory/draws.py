"""The peak of a block method depends on which blocks are on: the draw at hand, the worst one, and the mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from misa.memory.closed_form import ClosedForm, Estimate, trained_parameters
from misa.memory.scenario import Laboratory

NUM_DRAWS = 200


class Draws:
    """Draws of a laboratory's method, judged by the closed form, which takes a millisecond each.

    Args:
        laboratory: Its scenario's setting is used unless `changes` says otherwise.
        num: Draws to take from the sampler.
        **changes: Fields of the scenario to change.
    """

    def __init__(self, laboratory: Laboratory, num: int = NUM_DRAWS, **changes: Any) -> None:
        self._laboratory = laboratory
        self._form = ClosedForm(laboratory.config, replace(laboratory.scenario, **changes), laboratory.on_accelerator)
        self._always = {
            name: numel
            for name, numel in trained_parameters(laboratory.model).items()
            if not any(name == own for i in laboratory.active for own, _ in laboratory.blocks[i].params)
        }
        self._sampled = laboratory.sample(num)

    def estimate(self, draw: Sequence[int]) -> Estimate:
        """What the formula says of a draw, or, without blocks, of the method.

        Args:
            draw: Indices of blocks.
        """
        blocks = self._laboratory.blocks
        return self._form.estimate(self._always | {name: p.numel() for i in draw for name, p in blocks[i].params})

    def mean_bytes(self) -> float:
        """Mean of the peaks over draws, with the sampler's probabilities before training."""
        peaks = [self.estimate(draw).peak_bytes for draw in self._sampled]
        return sum(peaks) / len(peaks)

    def lowest_layers(self) -> list[int]:
        """For each sampled draw the position of its lowest layer, counted from 0."""
        blocks = self._laboratory.blocks
        layers = list(dict.fromkeys(block.layer for block in blocks))
        return [min(layers.index(blocks[i].layer) for i in draw) for draw in self._sampled]

    def worst(self) -> tuple[int, ...]:
        """The draw with the largest peak that was found: among sampled ones and ones built to be bad.

        No proof that none is worse; those built take a matrix of the lowest layer, then fill the budget with what
        keeps most activations for its size.
        """
        candidates = dict.fromkeys([*self._sampled, *self._bad()])
        return max(candidates, key=lambda draw: self.estimate(draw).peak_bytes)

    def _bad(self) -> Iterator[tuple[int, ...]]:
        laboratory = self._laboratory
        settings, blocks = laboratory.optimizer.settings, laboratory.blocks
        # What the budget is a share of: all that the method could train.
        limit = (
            laboratory.num_params if settings.budget is None else int(settings.budget * laboratory.num_params + 1e-6)
        )
        most = len(blocks) if settings.num_blocks is None else settings.num_blocks
        gain = {i: self._kept(block.name) / block.numel for i, block in enumerate(blocks)}
        by_gain = sorted(gain, key=lambda i: -gain[i])
        by_size = sorted(gain, key=lambda i: -blocks[i].numel)
        for seed in [i for i, block in enumerate(blocks) if block.layer == blocks[0].layer]:
            for order in (by_gain, by_size):
                chosen, used = [seed], blocks[seed].numel
                for i in order:
                    if i != seed and used + blocks[i].numel <= limit and len(chosen) < most:
                        chosen.append(i)
                        used += blocks[i].numel
                if used <= limit:
                    yield tuple(sorted(chosen))

    def _kept(self, name: str) -> int:
        if name.endswith("o_proj"):
            return 0
        return self._form.inner if name.endswith("down_proj") else self._form.hidden
