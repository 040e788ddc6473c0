"""Parameters: which can train, what kind they are, patterns for their names, and what an optimizer knows of each."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misa.gradients import Number, gradient_norm
from misa.inner import cut_residual, follow_weight, make_master

NamedParameter = tuple[str, nn.Parameter]


def owner(name: str) -> str:
    """Dotted path of the module that registers a parameter; the name itself at the top."""
    return name.rpartition(".")[0] or name


def named_parameters(model: nn.Module | Iterable[NamedParameter]) -> list[NamedParameter]:
    """`(name, parameter)` pairs with tied parameters once; a list of pairs passes through the same way."""
    if isinstance(model, nn.Module):
        return list(model.named_parameters())
    seen: dict[int, NamedParameter] = {}
    for item in model:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(f"parameters must be given with their names, as (name, parameter) pairs; got {type(item)}")
        seen.setdefault(id(item[1]), item)
    return list(seen.values())


def trainable(named: Iterable[NamedParameter]) -> list[NamedParameter]:
    """Parameters that can be trained: floating point, and not frozen by the caller.

    What an optimizer of this package froze carries a mark, so that a second optimizer over the same model sees the
    model as its owner left it.
    """
    return [(n, p) for n, p in named if p.is_floating_point() and (p.requires_grad or is_frozen_by_us(p))]


def is_frozen_by_us(p: nn.Parameter) -> bool:
    """Whether an optimizer of this package, and not the caller, switched the parameter off."""
    return bool(getattr(p, "_misa_frozen", False))


def set_trainable(p: nn.Parameter, on: bool) -> None:
    """Switch a parameter on or off, leaving the mark `is_frozen_by_us` reads."""
    p.requires_grad_(on)
    p._misa_frozen = not on  # type: ignore[attr-defined]


def kinds(model: nn.Module) -> dict[str, str]:
    """Kind of every module that can own a parameter outside the blocks, by dotted path."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found[path] = "embeddings"
        elif module is head:
            found[path] = "head"
        elif "norm" in type(module).__name__.lower():
            found[path] = "norms"
    return found


def kind_by_name(name: str, p: nn.Parameter) -> str:
    """Kind of a parameter when only its name is known (or its module says nothing)."""
    last = owner(name).rpartition(".")[2].lower()
    if "emb" in last or last in ("wte", "wpe"):
        return "embeddings"
    if "head" in last or last == "embed_out":
        return "head"
    return "norms" if p.ndim == 1 and ("norm" in last or last.startswith("ln")) else "other"


class Patterns:
    """Include and exclude patterns (`fnmatch`), and which of them have matched anything so far."""

    def __init__(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        for field, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ValueError(f"{field}={patterns!r}: must be a list of patterns, not one string")
        self._include = tuple(include) if include is not None else None
        self._exclude = tuple(exclude or ())
        self._matched: set[str] = set()

    def _matches(self, patterns: Sequence[str], *paths: str) -> bool:
        hits = [pattern for pattern in patterns if any(fnmatch.fnmatchcase(path, pattern) for path in paths)]
        self._matched.update(hits)
        return bool(hits)

    def wants(self, *paths: str) -> bool:
        """Whether something with these paths is included and not excluded."""
        included = self._include is None or self._matches(self._include, *paths)
        return not self._matches(self._exclude, *paths) and included

    def included_by_name(self, *paths: str) -> bool:
        """Whether it is wanted because an include pattern asks for it."""
        return self._include is not None and self.wants(*paths)

    def raise_unmatched(self, names: Sequence[str]) -> None:
        """Raise a ValueError for a pattern that matched nothing, with the nearest of these parameters and modules."""
        for field, patterns in (("include", self._include or ()), ("exclude", self._exclude)):
            for pattern in patterns:
                if pattern not in self._matched:
                    known = sorted({owner(n) for n in names} | set(names))
                    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
                    raise ValueError(f"{field}: pattern {pattern!r} matches no parameter; nearest: {', '.join(near)}")


class Entry:
    """One parameter that can be on, and all the optimizer knows of it."""

    __slots__ = (
        *("__weakref__", "block", "group", "local", "master", "name", "norm", "param", "residual", "saved"),
        "version",
    )

    def __init__(self, name: str, param: nn.Parameter, group: int, block: int) -> None:
        self.name = name
        self.param = param
        self.local: Tensor = param  # what the step works on: the part that lies on this process
        self.group = group
        self.block = block  # index of its block, or -1 if it is always on
        self.master: Tensor | None = None  # fp32 copy, while active
        self.residual: Tensor | None = None  # what the weight could not hold of its master, while inactive
        self.saved: dict[str, Any] | None = None  # inner state while no inner optimizer holds it
        self.version = -1  # of the weight when the master was last written to it
        self.norm: Number | None = None  # of the gradient, measured during the backward pass

    @property
    def target(self) -> Tensor:
        """What the inner optimizer updates: the master copy if there is one."""
        return self.local if self.master is None else self.master

    def measure(self) -> Number:
        """Norm of the gradient as it is now."""
        assert self.param.grad is not None
        return gradient_norm(self.param.grad)

    def find_local(self, part: Callable[[Tensor], Tensor]) -> None:
        """Look where the part of the weight that this process updates lies; it may have moved while it was off."""
        self.local = part(self.param)

    def take_gradient(self, part: Callable[[Tensor], Tensor]) -> None:
        """Show the inner optimizer the gradient of the local part."""
        if self.local is not self.param and self.param.grad is not None:
            self.local.grad = part(self.param.grad)

    def make_master(self) -> None:
        """Copy the weight to fp32, with what an earlier master held beyond the weight's precision."""
        self.master = make_master(self.local.detach(), self.residual, self.local._version != self.version)
        self.residual, self.version = None, self.local._version

    def follow_outside_edits(self) -> None:
        """Take over a weight that was edited since the last step (a merge, `load_state_dict`, an average)."""
        if self.master is not None and self.local._version != self.version:
            follow_weight(self.master, self.local.detach())

    def drop_state(self, keep_residual: bool) -> None:
        """Free the inner state and the master copy."""
        if self.master is not None and keep_residual:
            self.residual = cut_residual(self.master, self.local.detach())
        self.saved = self.master = None

    def move_state(self, device: torch.device | str) -> None:
        """Move the inner state and the master copy."""
        self.saved = None if self.saved is None else moved(self.saved, device)
        self.master = None if self.master is None else self.master.to(device)


def moved(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state of one parameter with its tensors on another device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
