"""Split a model into blocks: ordered, disjoint groups of parameters that are switched on and off together.

The paper calls a block a "module"; here it is `block`, because `torch.nn.Module` is taken. Blocks are found by
structure, see `misa.structure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from misa.parameters import NamedParameter, Patterns, kind_by_name, kinds, owner, trainable
from misa.structure import Layout, Place

GRANULARITIES = ("matrix", "half", "layer")
REST_KINDS = ("embeddings", "head", "norms", "other")


@dataclass(frozen=True, eq=False)
class Block:
    """One unit of sampling.

    Attributes:
        name: Dotted path of the module the block's parameters belong to, e.g. `model.layers.3.self_attn.q_proj`.
        params: The block's parameters with their dotted names, in the model's order.
        layer: Dotted path of the repeated layer that holds the block, e.g. `model.layers.3`; the block's own name
            if it lies outside the layers.
    """

    name: str
    params: tuple[NamedParameter, ...]
    layer: str

    @property
    def numel(self) -> int:
        """Number of elements in the block."""
        return sum(p.numel() for _, p in self.params)


def partition(
    model: nn.Module | Iterable[NamedParameter],
    granularity: str = "matrix",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[Block, ...]:
    """Split a model into blocks, ordered by depth.

    At `"matrix"` a block is one parameter of two or more dimensions inside a repeated layer, with the bias of its
    module (MISA; fused projections and 3-D expert tensors are one block each, GPT-2's `Conv1D` counts as a matrix). At
    `"half"` it is the first matrix-holding child of a layer (attention) or all the others (MLP). At `"layer"` it is a
    whole layer with its norms and biases (BAdam, LISA). Tied weights are counted once, under their first name.
    Parameters that the caller has frozen, and weights that cannot hold a gradient (quantized), are in no block: so a
    PEFT model is split into its adapter matrices.

    Args:
        model: A module (the meta device is fine) or its `(dotted name, parameter)` pairs.
        granularity: `"matrix"`, `"half"` or `"layer"`.
        include: Wildcard patterns (`fnmatch`) for whole dotted paths of blocks or parameters; only what matches is in
            a block. A matching matrix outside the layers (a head, say) becomes a block of its own. Default: all layers.
        exclude: Patterns of what is in no block. Default: nothing.

    Returns:
        Disjoint blocks, ordered by layer and, within a layer, as the model registers them.

    Raises:
        ValueError: for an unknown granularity, a pattern that matches nothing, or a model in which nothing repeats.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: must be one of {', '.join(GRANULARITIES)}")
    named = trainable(model)
    layout = Layout.of(named)
    grouped: dict[tuple[str, str], list[NamedParameter]] = {}
    selected = Patterns(include, exclude)
    for name, p in named:
        selected.excludes(name, owner(name))  # also of what is in no block anyway: such a pattern is not wrong
        place = layout.places.get(name)
        if place is None:
            key = (owner(name), owner(name)) if owner(name) in layout.num_matrices else None
            wanted = key is not None and selected.included_by_name(name, key[0])
        else:
            key = layout.block_of(name, p, granularity)
            wanted = key is not None and selected.wants(name, key[0])
        if wanted and key is not None:
            grouped.setdefault(key, []).append((name, p))
    selected.raise_unmatched([n for n, _ in named])
    blocks = [Block(block, tuple(params), layer) for (block, layer), params in grouped.items()]
    blocks = [b for b in blocks if granularity == "layer" or any(p.ndim >= 2 for _, p in b.params)]
    if not blocks:
        raise ValueError(
            f"no block found among {len(named)} trainable parameters: a model needs numbered containers of layers "
            "(ModuleList, Sequential), or name its matrices with include=; parameters with requires_grad=False and "
            "integer weights are never in a block"
        )
    return tuple(sorted(blocks, key=_depths(named, layout.places)))


def rest(model: nn.Module | Iterable[NamedParameter], blocks: Sequence[Block]) -> dict[str, tuple[NamedParameter, ...]]:
    """Trainable parameters in no block, by kind (all of `REST_KINDS`); a tied head is listed with the embeddings."""
    taken = {name for b in blocks for name, _ in b.params}
    by_module = kinds(model) if isinstance(model, nn.Module) else {}
    found: dict[str, list[NamedParameter]] = {kind: [] for kind in REST_KINDS}
    for name, p in trainable(model):
        if name not in taken:
            found[by_module.get(owner(name)) or kind_by_name(name, p)].append((name, p))
    return {kind: tuple(params) for kind, params in found.items()}


def least_budget(numel: int, total: int) -> float:
    """Share of `total` that holds `numel`, rounded up to three digits so that it is enough when typed."""
    scale = 10.0 ** (2 - math.floor(math.log10(numel / total)))
    return float(f"{math.ceil(numel / total * scale) / scale:.6g}")


def _depths(named: Sequence[NamedParameter], places: dict[str, Place]) -> Callable[[Block], tuple[int, int, int]]:
    """Sort key of blocks: containers under one parent interleave by index, so that layer 0 of each comes first."""
    order = {name: i for i, (name, _) in enumerate(named)}
    start: dict[str, int] = {}
    for name, place in places.items():
        start.setdefault(place.stack.rpartition(".")[0], order[name])

    def key(block: Block) -> tuple[int, int, int]:
        first = block.params[0][0]
        place = places.get(first)
        if place is None:
            return (order[first], 0, order[first])
        return (start[place.stack.rpartition(".")[0]], place.number, order[first])

    return key
