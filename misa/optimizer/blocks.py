"""Split a model into blocks: ordered, disjoint groups of parameters that are switched on and off together.

The paper calls a block a "module"; here it is `block`, because `torch.nn.Module` is taken. Blocks are found by
structure: the repeated layers of a model are the members of its numbered containers (`ModuleList`, `Sequential`), so
every member parameter carries a number in its dotted name, whatever the container is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from misa.parameters import NamedParameter, Patterns, kind_by_name, kinds, owner, trainable

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


class _Layout(NamedTuple):
    """What a single pass over the names tells about all of them."""

    places: dict[str, _Place]
    num_matrices: dict[str, int]  # of a module, by its path
    first_child: dict[str, str]  # of a layer: its first child that holds a matrix


class _Place(NamedTuple):
    """Where a parameter inside a repeated layer lies: `stack.number` is the layer, `inside` the path below it."""

    stack: str
    number: int
    inside: tuple[str, ...]

    @property
    def layer(self) -> str:
        return f"{self.stack}.{self.number}" if self.stack else str(self.number)


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
    layout = _layout(named)
    grouped: dict[tuple[str, str], list[NamedParameter]] = {}
    selected = Patterns(include, exclude)
    for name, p in named:
        place = layout.places.get(name)
        if place is None:
            key = (owner(name), owner(name)) if owner(name) in layout.num_matrices else None
            wanted = key is not None and selected.included_by_name(name, key[0])
        else:
            key = _block_key(name, p, place, granularity, layout)
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


def _layout(named: Sequence[NamedParameter]) -> _Layout:
    places = _places(named)
    num_matrices: dict[str, int] = {}
    first_child: dict[str, str] = {}
    for name, p in named:
        if p.ndim >= 2:
            num_matrices[owner(name)] = num_matrices.get(owner(name), 0) + 1
            if name in places:
                first_child.setdefault(places[name].layer, places[name].inside[0])
    return _Layout(places, num_matrices, first_child)


def _places(named: Sequence[NamedParameter]) -> dict[str, _Place]:
    """Place of every parameter that lies in a repeated layer.

    A layer is a member of a numbered container with modules of its own: `layers.0.mlp.up.weight`, but not
    `heads.0.weight`, a plain list of projections. Only a model with no such layer (an MLP in a `Sequential`) is split
    along the plain list.
    """
    deep: dict[str, _Place] = {}
    flat: dict[str, _Place] = {}
    for name, _ in named:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if number is not None:
            place = _Place(".".join(parts[:number]), int(parts[number]), tuple(parts[number + 1 :]))
            flat[name] = place
            if len(place.inside) > 1:
                deep[name] = place
    stacks = {deep[name].stack for name, p in named if name in deep and p.ndim >= 2}
    # A parameter registered on the layer itself (`layers.0.gamma`) belongs to the layer as well.
    return {name: place for name, place in flat.items() if place.stack in stacks} or flat


def _block_key(name: str, p: nn.Parameter, place: _Place, granularity: str, layout: _Layout) -> tuple[str, str] | None:
    """`(block name, layer name)` of a parameter inside a layer, or None if it is in no block."""
    if granularity == "layer":
        return place.layer, place.layer
    module = owner(name)
    num_matrices = layout.num_matrices.get(module, 0)
    if granularity == "half":
        if len(place.inside) <= 2 and not num_matrices:
            return None  # a norm of the layer itself
        half = "first" if place.inside[0] == layout.first_child.get(place.layer) else "second"
        return f"{place.layer}.{half}", place.layer
    if not num_matrices:
        return None
    # Several matrices of one module (fused expert tensors) are one block each, named after themselves.
    own = name if p.ndim >= 2 and num_matrices > 1 else module
    return own, place.layer


def _depths(named: Sequence[NamedParameter], places: dict[str, _Place]) -> Callable[[Block], tuple[int, int, int]]:
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
