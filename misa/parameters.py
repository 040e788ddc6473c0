"""Parameters: which can train, what kind they are, patterns for their names, and what an optimizer knows of each."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from misa.distributed.sharded import local_part
from misa.gradients import Number, gradient_norm
from misa.inner import cut_residual, follow_weight, make_master, memory_of, stamp

NamedParameter = tuple[str, nn.Parameter]

# What heads are called in transformers beside `lm_head`.
HEADS = frozenset(["score", "classifier", "classification_head", "pre_classifier", "qa_outputs"])


# Links of wrappers that stand in the place of a module: of torch.compile and of torch's checkpoint_wrapper.
_WRAPPED = frozenset(["_orig_mod", "_checkpoint_wrapped_module"])


def owner(name: str) -> str:
    """Dotted path of the module that registers a parameter; the name itself at the top."""
    return name.rpartition(".")[0] or name


def plain_name(name: str) -> str:
    """Dotted path without the links that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def trainable(source: nn.Module | Iterable[NamedParameter]) -> list[NamedParameter]:
    """Parameters that can be trained: floating point, and not frozen by the caller; tied ones once.

    What an optimizer of this package froze carries a mark, so that a second optimizer over the same model sees the
    model as its owner left it. Names are those of the model before it, or a part of it, was compiled.

    Args:
        source: A model, or `(name, parameter)` pairs.

    Raises:
        ValueError: If something in a list is no such pair, or two parameters have one name.
    """
    seen: dict[int, NamedParameter] = {}
    names: dict[str, int] = {}
    for item in source.named_parameters() if isinstance(source, nn.Module) else source:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(f"give a model (Trainers: misa.TrainerOptimizer) or (name, parameter) pairs: {type(item)}")
        name, p = plain_name(item[0]), item[1]
        if names.setdefault(name, id(p)) != id(p):
            raise ValueError(f"parameters: two of them have the name {name!r}; give each a name of its own")
        seen.setdefault(id(p), (name, p))
    # A quantized weight of one byte, and the scales beside it, hold no gradient, whatever they say of themselves.
    quantized = {owner(n) for n, p in seen.values() if p.is_floating_point() and p.dtype.itemsize == 1}
    return [
        (n, p)
        for n, p in seen.values()
        if p.is_floating_point() and owner(n) not in quantized and (p.requires_grad or is_frozen_by_us(p))
    ]


def left_out(source: nn.Module | Iterable[NamedParameter], trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters that would get gradients and cannot be trained, with a warning: complex ones, those of 1-byte layers.

    Args:
        source: A model, or `(name, parameter)` pairs.
        trained: Those of `trainable`.
    """
    known = set(trained)
    named = source.named_parameters() if isinstance(source, nn.Module) else source
    found = {p: plain_name(name) for name, p in named if p.requires_grad and p not in known}
    if found:
        names = list(found.values())
        warnings.warn(
            f"{len(names)} parameters stay as they are ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): "
            "complex ones, and those of a layer whose weight has 1 byte an element, are not trained",
            stacklevel=4,
        )
    return list(found)


def is_frozen_by_us(p: nn.Parameter) -> bool:
    """Whether an optimizer of this package, and not the caller, switched the parameter off."""
    number = getattr(p, "_misa_frozen", 0)
    return number != 0 and (number not in _living or not _living[number].is_overruled)


class Freezing:
    """Switches the parameters of an optimizer off, one by one off and on, and on again when the optimizer is forgotten.

    Otherwise whoever freezes parts of the model later, as PEFT does, would freeze what is off already, and the mark
    would still say that it was for us to switch on. If that happens while the optimizer lives, the parameters that it
    had on tell: what they say goes for all.

    Args:
        optimizer: Not kept alive.
        params: What is switched off now, and on again at the end; may grow.
        model: What they belong to: before each of its forward passes, what something else has switched on meanwhile (as
            PEFT does where adapters were disabled) is switched off again. Default: nothing is watched.
    """

    _numbers = itertools.count(1)

    def __init__(self, optimizer: object, params: list[nn.Parameter], model: nn.Module | None = None) -> None:
        self._number = next(self._numbers)
        self._params = params
        self._on: set[nn.Parameter] = set()
        for p in params:
            self.set_trainable(p, False)
        self._handles: list[Any] = []
        if model is not None:
            hooks = model.register_forward_pre_hook(_Strays(self)), model.register_forward_hook(_StraysOfBackward(self))
            self._handles += hooks
        _living[self._number] = self
        weakref.finalize(optimizer, self.thaw).atexit = False

    @property
    def is_overruled(self) -> bool:
        """Whether something else has switched off what this one had on."""
        return not all(p.requires_grad for p in self._on)

    def set_trainable(self, p: nn.Parameter, on: bool) -> None:
        """Switch a parameter on or off, leaving the mark `is_frozen_by_us` reads."""
        p.requires_grad_(on)
        p._misa_frozen = 0 if on else self._number  # type: ignore[attr-defined]
        (self._on.add if on else self._on.discard)(p)

    def drop_gradients(self) -> None:
        """Drop what an earlier backward pass has left on what is off: it would count where gradients are clipped."""
        for p in self._params:
            if not p.requires_grad:
                p.grad = None

    def switch_off_strays(self) -> None:
        """Switch off again what something else has switched on, and drop its gradient."""
        for p in self._params:
            if p.requires_grad and getattr(p, "_misa_frozen", 0) == self._number:
                p.requires_grad_(False)
                p.grad = None

    def thaw(self) -> None:
        """Switch on what is off, unless another optimizer has it now or something else has frozen the model since."""
        overruled = self.is_overruled
        for p in self._params:
            if getattr(p, "_misa_frozen", 0) == self._number:
                p._misa_frozen = 0  # type: ignore[attr-defined]
                if not overruled:
                    p.requires_grad_(True)
        self._on.clear()
        for handle in self._handles:
            handle.remove()
        _living.pop(self._number, None)


_living: dict[int, Freezing] = {}


class _Strays:
    """The hook of a `Freezing`; that of a copied model, or of one saved with its hooks, takes itself away."""

    def __init__(self, freezing: Freezing | None) -> None:
        self._freezing = None if freezing is None else weakref.ref(freezing)

    def __call__(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._freezing is not None and (freezing := self._freezing()) is not None:
            freezing.switch_off_strays()
            return
        self._leave(module._forward_pre_hooks)

    def _leave(self, hooks: dict[int, Any]) -> None:
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


class _StraysOfBackward(_Strays):
    """The hook behind the forward pass: what is switched on until the backward pass would spoil recomputed activations.

    Preference tuning runs the model without its adapters between the two, which switches all adapters on.
    """

    def __call__(self, module: nn.Module, _: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        if self._freezing is None or self._freezing() is None:
            self._leave(module._forward_hooks)
        elif torch.is_grad_enabled():
            for leaf in tree_leaves(output):
                # Not a leaf of the graph, a parameter say: its hooks would outlive the pass.
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    leaf.register_hook(self._before_backward)

    def _before_backward(self, _: Tensor) -> None:
        if self._freezing is not None and (freezing := self._freezing()) is not None:
            freezing.switch_off_strays()


def kinds(model: nn.Module) -> dict[str, str]:
    """Kind of every module that can own a parameter outside the blocks, by dotted path."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found: dict[str, str] = {}
    for path, module in ((plain_name(path), module) for path, module in model.named_modules()):
        if isinstance(module, nn.Embedding):
            found[path] = "embeddings"
        elif module is head:
            found[path] = "head"
        elif "norm" in type(module).__name__.lower():
            found[path] = "norms"
    return found


def kind_by_name(name: str, p: nn.Parameter) -> str:
    """Kind of a parameter when only its name is known (or its module says nothing)."""
    # PEFT keeps a module that is trained as a whole under the wrapper that stands in its place.
    path = owner(name).partition(".modules_to_save.")[0].lower()
    last = path.rpartition(".")[2]
    if "emb" in last or last in ("wte", "wpe"):
        return "embeddings"
    if "head" in last or last == "embed_out" or not HEADS.isdisjoint(path.split(".")):
        return "head"
    return "norms" if p.ndim == 1 and ("norm" in last or last.startswith("ln")) else "other"


def warn_unmatched(always_on: Sequence[str], rest: Mapping[str, Sequence[NamedParameter]]) -> None:
    """Say which kinds are to be always on and match nothing: a tied head, or while there are others that never train.

    Args:
        always_on: The kinds asked for.
        rest: Parameters in no block, by kind.
    """
    missing = [kind for kind in always_on if not rest[kind]]
    if "head" in missing and rest["embeddings"]:
        missing.remove("head")
        if "embeddings" not in always_on:
            warnings.warn(
                "always_on: no parameter is of the kind head; a head tied to the embeddings is trained with them, as "
                "the kind 'embeddings'",
                stacklevel=6,
            )
    left = [name for name, _ in rest["other"] if "other" not in always_on]
    if missing and left:
        warnings.warn(
            f"always_on: no parameter is of the kind {', '.join(missing)}, and {len(left)} are never trained "
            f"({', '.join(left[:3])}{', ...' if len(left) > 3 else ''}); the kind 'other' has them",
            stacklevel=6,
        )


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
        return not self.excludes(*paths) and included

    def excludes(self, *paths: str) -> bool:
        """Whether an exclude pattern matches one of these paths."""
        return self._matches(self._exclude, *paths)

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
                    what = "nothing that can be a block" if field == "include" else "no parameter"
                    raise ValueError(f"{field}: pattern {pattern!r} matches {what}; nearest: {', '.join(near)}")


class Entry:
    """One parameter that can be on, and all the optimizer knows of it."""

    __slots__ = (
        *("__weakref__", "block", "grad_stamp", "group", "local", "master", "name", "norm", "param", "residual"),
        *("saved", "stamp"),
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
        self.stamp = (-1, -1)  # of the weight when the master was last written to it
        self.norm: Number | None = None  # of the gradient, measured during the backward pass
        self.grad_stamp = (-1, -1)  # of the gradient, when it was measured

    @property
    def target(self) -> Tensor:
        """What the inner optimizer updates: the master copy if there is one."""
        return self.local if self.master is None else self.master

    def measure(self) -> Number:
        """Norm of the gradient as it is now."""
        assert self.param.grad is not None
        return gradient_norm(self.param.grad)

    def measure_in_backward(self) -> None:
        """Keep the norm that the gradient has now, before clipping."""
        assert self.param.grad is not None
        self.norm, self.grad_stamp = self.measure(), stamp(local_part(self.param.grad))

    @property
    def has_changed_gradient(self) -> bool:
        """Whether the gradient was written to, or is another one, since it was measured in the backward pass."""
        grad = self.param.grad
        if self.norm is None or grad is None:
            return False
        return stamp(grad if self.local is self.param else local_part(grad)) != self.grad_stamp

    def find_local(self, part: Callable[[Tensor], Tensor]) -> None:
        """Look where the part of the weight that this process updates lies; it may have moved while it was off."""
        self.local = part(self.param)

    def take_gradient(self, part: Callable[[Tensor], Tensor]) -> None:
        """Show the inner optimizer the gradient of the local part, and where that lies if the weight was moved."""
        if self.local is self.param:
            return
        if memory_of(now := part(self.param)) != memory_of(self.local):
            self.local.data = now
        if self.param.grad is not None:
            self.local.grad = part(self.param.grad)

    def forget_gradient(self) -> None:
        """Undo `take_gradient`, also of a step that is skipped: in the next there may be no gradient to take."""
        if self.local is not self.param:
            self.local.grad = None

    def make_master(self) -> None:
        """Copy the weight to fp32, with what an earlier master held beyond the weight's precision."""
        self.master = make_master(self.local.detach(), self.residual, stamp(self.local) != self.stamp)
        self.residual, self.stamp = None, stamp(self.local)

    def follow_outside_edits(self) -> None:
        """Take over a weight that was edited since the last step (a merge, `load_state_dict`, an average)."""
        if self.master is not None and stamp(self.local) != self.stamp:
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


def moved(values: dict[str, Any], device: torch.device | str | None, copy: bool = False) -> dict[str, Any]:
    """The state of one parameter with its tensors on another device (None: where they are), or copied in any case."""

    def move(value: Any) -> Any:
        return value.detach().to(device or value.device, copy=copy) if isinstance(value, Tensor) else value

    return {k: tree_map(move, v) for k, v in values.items()}


def num_bytes(value: Any) -> int:
    """Bytes of a tensor that is no scalar, or of the parts of a quantized one; 0 of anything else."""
    if hasattr(value, "__tensor_flatten__"):  # a quantized moment: codes, scales, a table
        return sum(num_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, list | tuple | dict):
        return sum(map(num_bytes, tree_leaves(value)))
    return value.numel() * value.element_size() if isinstance(value, Tensor) and value.ndim else 0
