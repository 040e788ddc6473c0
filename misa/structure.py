"""Where the parameters of a model lie in its repeated layers, by their names alone.

The repeated layers of a model are the members of its numbered containers (`ModuleList`, `Sequential`), so every
parameter of a member carries a number in its dotted name, whatever the container is called.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from misa.parameters import NamedParameter, owner

Path = tuple[str, ...]


class Place(NamedTuple):
    """Where a parameter inside a repeated layer lies: `stack.number` is the layer, `inside` the path below it."""

    stack: str
    number: int
    inside: Path

    @property
    def layer(self) -> str:
        """Dotted path of the layer."""
        return f"{self.stack}.{self.number}" if self.stack else str(self.number)


class Layout(NamedTuple):
    """What a single pass over the names tells about all of them."""

    places: dict[str, Place]
    num_matrices: dict[str, int]  # of a module, by its path
    first_child: dict[str, Path]  # of a layer: path in it of the first of the children that share its matrices

    @classmethod
    def of(cls, named: Sequence[NamedParameter]) -> Layout:
        """Look at all names of a model."""
        places = _places(named)
        num_matrices: dict[str, int] = {}
        modules: dict[str, list[Path]] = {}
        for name, p in named:
            if p.ndim >= 2:
                num_matrices[owner(name)] = num_matrices.get(owner(name), 0) + 1
                if name in places:
                    modules.setdefault(places[name].layer, []).append(places[name].inside[:-1])
        # A layer may hold all it has in one child (T5's `layer`), which is no half of it.
        first = {layer: paths[0][: _num_shared(paths) + 1] for layer, paths in modules.items()}
        return cls(places, num_matrices, first)

    def block_of(self, name: str, p: nn.Parameter, granularity: str) -> tuple[str, str] | None:
        """`(block name, layer name)` of a parameter inside a layer, or None if it is in no block."""
        place = self.places[name]
        if granularity == "layer":
            return place.layer, place.layer
        module = owner(name)
        num_matrices = self.num_matrices.get(module, 0)
        if granularity == "half":
            if len(place.inside) <= 2 and not num_matrices:
                return None  # a norm of the layer itself
            first = self.first_child.get(place.layer, ())
            half = "first" if first == place.inside[: len(first)] else "second"
            return f"{place.layer}.{half}", place.layer
        if not num_matrices:
            return None
        # Several matrices of one module (fused expert tensors) are one block each, named after themselves.
        own = name if p.ndim >= 2 and num_matrices > 1 else module
        return own, place.layer


def _num_shared(paths: Sequence[Path]) -> int:
    """Number of links that all paths begin with."""
    return next((i for i, links in enumerate(zip(*paths, strict=False)) if len(set(links)) > 1), min(map(len, paths)))


def _places(named: Sequence[NamedParameter]) -> dict[str, Place]:
    """Place of every parameter that lies in a repeated layer.

    A layer is a member of a numbered container with modules of its own: `layers.0.mlp.up.weight`, but not
    `heads.0.weight`, a plain list of projections. Only a model with no such layer (an MLP in a `Sequential`) is split
    along the plain list.
    """
    wrappers = _wrappers(named)
    deep: dict[str, Place] = {}
    flat: dict[str, Place] = {}
    for name, _ in named:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        while len(numbers) > 1 and ".".join(parts[: numbers[0]]) in wrappers:
            numbers = numbers[1:]
        if numbers:
            place = Place(".".join(parts[: numbers[0]]), int(parts[numbers[0]]), tuple(parts[numbers[0] + 1 :]))
            flat[name] = place
            if len(place.inside) > 1:
                deep[name] = place
    stacks = {deep[name].stack for name, p in named if name in deep and p.ndim >= 2} - wrappers
    # A parameter registered on the layer itself (`layers.0.gamma`) belongs to the layer as well.
    return {name: place for name, place in flat.items() if place.stack in stacks} or flat


def _wrappers(named: Sequence[NamedParameter]) -> set[str]:
    """Numbered containers that hold the layers in one member, as `Sequential(embedding, Sequential(*layers), head)`.

    Their members have nothing in common, unlike layers of several kinds, and one of them has a container whose members
    are alike. A model may also be the only member of a `Sequential`, where others have no parameters.
    """
    members: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, _ in named:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if part.isdigit():
                members[".".join(parts[:i])][part].add(".".join(parts[i + 1 :]))

    def repeats(container: str) -> bool:
        deep = [frozenset(names) for names in members[container].values() if any("." in name for name in names)]
        return len(set(deep)) < len(deep)

    def have_nothing_in_common(container: str) -> bool:
        deep = [name for names in members[container].values() for name in names if "." in name]
        return len(set(deep)) == len(deep)

    repeated = {container for container in members if repeats(container)}
    return {
        outer
        for outer, inside in members.items()
        if have_nothing_in_common(outer)
        and (len(inside) > 1 or not outer)
        and len({c[len(outer) :].strip(".").split(".")[0] for c in repeated if _lies_in(c, outer)}) == 1
    }


def _lies_in(container: str, outer: str) -> bool:
    return container != outer and (not outer or container.startswith(f"{outer}."))
