"""Count the bytes of every live tensor storage, by what the storage is for.

`MemoryTracker` is a `TorchDispatchMode`: it sees the result of every operation that reaches PyTorch's dispatcher, keeps
a weak reference to each new storage, and subtracts its bytes when the storage dies. Storages, not tensors, are counted,
so views cost nothing. Fake tensors have storages of the right size too, so the same tracker measures a model far larger
than the machine.

A storage's category is often known only later: a result turns out to be saved for the backward pass by being alive when
the forward pass ends, a temporary becomes a gradient when it is accumulated. The tracker therefore keeps the storages
that were live at the peak, and reads their categories when the numbers are asked for.

What it cannot see: workspaces that a kernel allocates and frees inside one operation (LAPACK, cuBLAS, an in-kernel
`exp`), and what an allocator adds by rounding (`rounding_bytes` stands for it) and by fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from misa.memory.reachable import reachable_tensors

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
LOGITS = "logits"
ACTIVATIONS = "activations"
TEMPORARY = "temporary"
#: All categories, in the order in which tables and stacked bars show them.
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, TEMPORARY)
# A storage may qualify for several categories; the one with the higher rank holds (the gradient of the head is made
# inside the loss region, the logits are also saved for the backward pass).
_RANK = {TEMPORARY: 0, ACTIVATIONS: 1, LOGITS: 2, OPTIMIZER: 3, GRADIENTS: 4, WEIGHTS: 5}
#: The parts of one training step.
PHASES = ("forward", "backward", "step")
_OUTSIDE = "outside"
_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Moment:
    """The live bytes at one moment.

    Attributes:
        total_bytes: Sum over all categories.
        by_category: Bytes of each category of `CATEGORIES`.
        operation: The dispatcher's name of the operation whose result was the last to be counted.
        phase: "forward", "backward", "step", or "outside" of any of them.
    """

    total_bytes: int
    by_category: dict[str, int]
    operation: str
    phase: str


class _Storage:
    """One live storage: its bytes, what it is for, and whether a recomputed forward pass made it."""

    __slots__ = ("category", "num_bytes", "recomputed", "reference")

    def __init__(self, num_bytes: int, category: str, recomputed: bool) -> None:
        self.num_bytes = num_bytes
        self.category = category
        self.recomputed = recomputed
        self.reference: weakref.ref[Any] | None = None

    def become(self, category: str) -> None:
        """Take `category` unless the present one has the higher rank."""
        if _RANK[category] > _RANK[self.category]:
            self.category = category


class _Snapshot:
    """The storages live at a moment; categories are read when the moment is asked for."""

    def __init__(self, storages: Iterable[_Storage], operation: str, phase: str) -> None:
        self.operation, self.phase = operation, phase
        self.keep(storages)

    def keep(self, storages: Iterable[_Storage]) -> None:
        """Remember these storages with the sizes they have now."""
        self.storages = [(storage, storage.num_bytes) for storage in storages]

    def resolve(self) -> Moment:
        counts: Counter[str] = Counter()
        for storage, num_bytes in self.storages:
            counts[storage.category] += num_bytes
        by_category = {category: counts[category] for category in CATEGORIES}
        return Moment(sum(by_category.values()), by_category, self.operation, self.phase)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results of an operation, which nest in lists, tuples and dictionaries alone."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (tuple, list)):
        for item in content:
            yield from _tensors(item)
    elif isinstance(content, dict):
        yield from _tensors(list(content.values()))


class MemoryTracker(TorchDispatchMode):
    """Live bytes by category, and the peak with its breakdown, operation and phase.

    Use it as a context manager around a training step whose parts are named with `phase`; tensors that exist before
    are made known with `watch`, `watch_model` and `watch_optimizer`:

        tracker = MemoryTracker()
        tracker.watch_model(model)
        tracker.watch_optimizer(optimizer)
        tracker.watch("activations", batch)
        with tracker:
            with tracker.phase("forward"):
                loss = model(**batch).loss
            with tracker.phase("backward"):
                loss.backward()
            with tracker.phase("step"):
                optimizer.step()
        print(tracker.peak)

    Categories:
        weights: parameters and buffers of the watched models.
        gradients: what the parameters' `.grad` (and that of an optimizer's master copies) holds.
        optimizer: every other tensor reachable from a watched optimizer: moments and master copies.
        activations: what the forward pass leaves alive for the backward pass, what checkpointing recomputes, the batch.
        logits: what is made inside the logits region: from the output head to the loss, and back to the head's input.
        temporary: everything else.

    Args:
        rounding_bytes: Each storage counts as the next multiple of this. Default 1: exact bytes. CUDA's caching
            allocator rounds to 512.

    Raises:
        ValueError: If `rounding_bytes` is below 1.
    """

    def __init__(self, rounding_bytes: int = 1) -> None:
        super().__init__()
        if rounding_bytes < 1:
            raise ValueError(f"rounding_bytes is {rounding_bytes}; it must be at least 1")
        self._rounding = rounding_bytes
        self._live: dict[int, _Storage] = {}
        self._total = 0
        self._peak_total = 0
        self._peak_is_now = False  # the peak was reached and nothing was freed since: its storages are the live ones
        self._peak = _Snapshot([], "none", _OUTSIDE)
        self._ends: dict[str, _Snapshot] = {}
        self._operation = "none"
        self._phase = _OUTSIDE
        self._in_logits = False
        self._recomputing = False
        self._parameters: list[torch.nn.Parameter] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        # What an optimizer holds and may hang a gradient on, during its step, by id. Not held here, since a step that
        # ends a round gives up the states of its blocks.
        self._masters: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    # --- what exists before, and names for what happens -------------------------------------------------------------

    def watch(self, category: str, tensors: Any) -> None:
        """Count existing tensors.

        Args:
            category: One of `CATEGORIES`.
            tensors: A tensor or any nesting of containers of tensors; other leaves are ignored.

        Raises:
            ValueError: If the category is unknown.
        """
        if category not in CATEGORIES:
            raise ValueError(f"category is {category!r}; allowed: {', '.join(CATEGORIES)}")
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, category)
        self._mark_peak()

    def watch_model(self, model: torch.nn.Module) -> None:
        """Count the parameters and buffers of `model`, frozen ones included, and follow its gradients."""
        self._parameters.extend(model.parameters())
        self.watch(WEIGHTS, [list(model.parameters()), list(model.buffers())])
        self._claim_gradients()

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count every tensor reachable from `optimizer`; call it after `watch_model`, whose weights stay weights."""
        self._optimizers.append(optimizer)
        self._claim_optimizer_state()
        self._mark_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the part of the step that runs inside.

        Args:
            name: "forward", "backward" or "step".

        Raises:
            ValueError: If the name is another.
        """
        if name not in PHASES:
            raise ValueError(f"phase is {name!r}; allowed: {', '.join(PHASES)}")
        self._phase = name
        handles = self._follow_gradients() if name == "backward" else []
        self._follow_sizes()
        if name == "step":
            for root in self._optimizers:
                self._masters.update((id(t), t) for t in reachable_tensors(root) if t.is_leaf)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._end_phase(name)
            self._phase = _OUTSIDE
            self._masters.clear()

    def enter_logits(self) -> None:
        """Everything made from here on belongs to the logits and the loss, until `leave_logits` or the phase ends."""
        self._in_logits = True

    def leave_logits(self) -> None:
        """End the region that `enter_logits` began."""
        self._in_logits = False

    # --- what was measured ------------------------------------------------------------------------------------------

    @property
    def live_bytes(self) -> int:
        """Bytes of all storages that are alive now."""
        return self._total

    @property
    def peak(self) -> Moment:
        """The moment of the most live bytes."""
        self._keep_peak()
        return self._peak.resolve()

    @property
    def phase_ends(self) -> dict[str, Moment]:
        """The moment at the end of each phase that ran (the last time it ran)."""
        return {name: snapshot.resolve() for name, snapshot in self._ends.items()}

    # --- counting ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count the new storages among its results."""
        if func is _DEVICE:
            # Fake tensors are asked for their device more often than for all else, and know it.
            return getattr(args[0], "fake_device", None) or func(*args)
        if self._phase == "backward":
            # Autograd runs with gradients off; only the recomputation of a checkpointed forward pass turns them on.
            self._recompute(torch.is_grad_enabled())
        if self._phase == "step":
            self._follow_step(_tensors((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        self._operation = str(func)
        category = LOGITS if self._in_logits and not self._recomputing else TEMPORARY
        for tensor in _tensors(result):
            self._count(tensor, category)
        self._mark_peak()
        return result

    def _count(self, tensor: torch.Tensor, category: str) -> None:
        if tensor.layout is not torch.strided:
            return
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        known = self._live.get(key)
        if known is not None:
            self._resize(known, untyped)
            known.become(category)
            return
        num_bytes = self._rounded(untyped)
        storage = _Storage(num_bytes, category, self._recomputing)
        storage.reference = weakref.ref(untyped, partial(self._forget, key))
        self._live[key] = storage
        self._total += num_bytes

    def _rounded(self, untyped: torch.UntypedStorage) -> int:
        return -(-untyped.nbytes() // self._rounding) * self._rounding

    def _resize(self, storage: _Storage, untyped: torch.UntypedStorage) -> None:
        num_bytes = self._rounded(untyped)
        if num_bytes != storage.num_bytes:
            self._keep_peak()
            self._total += num_bytes - storage.num_bytes
            storage.num_bytes = num_bytes

    def _follow_sizes(self) -> None:
        """Storages can be resized without an operation, as those of workspaces are."""
        for storage in self._live.values():
            untyped = None if storage.reference is None else storage.reference()
            if untyped is not None:
                self._resize(storage, untyped)
        self._mark_peak()

    def _follow_step(self, arguments: Iterable[torch.Tensor]) -> None:
        """Learn from the arguments of an operation in the step what no operation tells of.

        Widened gradients of master copies live for a moment inside the step, while the master is updated. They cannot
        be looked for when a storage dies, since a `.grad` that is being replaced must not be read then. And a workspace
        may have got its memory back just now.
        """
        for tensor in arguments:
            if tensor.layout is torch.strided:
                if id(tensor) in self._masters:
                    self._claim_gradient(tensor)
                untyped = tensor.untyped_storage()
                known = self._live.get(untyped._cdata)
                if known is not None:
                    self._resize(known, untyped)
        self._mark_peak()

    def _forget(self, key: int, _: Any) -> None:
        self._keep_peak()
        self._total -= self._live.pop(key).num_bytes

    def _mark_peak(self) -> None:
        if self._total > self._peak_total:
            self._peak_total = self._total
            self._peak_is_now = True
            self._peak = _Snapshot([], self._operation, self._phase)

    def _keep_peak(self) -> None:
        # Copying the list of live storages at every new peak would be quadratic in a long rise: it is done once, when
        # the first storage after the peak dies.
        if self._peak_is_now:
            self._peak_is_now = False
            self._peak.keep(self._live.values())

    # --- categories -------------------------------------------------------------------------------------------------

    def _end_phase(self, name: str) -> None:
        self._recompute(False)
        self._in_logits = False
        self._claim_gradients()
        self._claim_optimizer_state()
        if name == "forward":
            for storage in self._live.values():
                storage.become(ACTIVATIONS)
        self._ends[name] = _Snapshot(self._live.values(), self._operation, self._phase)

    def _recompute(self, recomputing: bool) -> None:
        if self._recomputing and not recomputing:
            for storage in self._live.values():
                if storage.recomputed:
                    storage.become(ACTIVATIONS)
                    storage.recomputed = False
        self._recomputing = recomputing

    def _follow_gradients(self) -> list[Any]:
        handles = []
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._claim_gradient)
                # First in line, since an optimizer's own hook may consume the gradient. Autograd walks the dictionary
                # in the order of insertion, so the others are inserted again behind it.
                hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
                if hooks is not None and handle.id in hooks:
                    for key in [key for key in hooks if key != handle.id]:
                        hooks[key] = hooks.pop(key)
                handles.append(handle)
        return handles

    def _claim_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._count(parameter.grad, GRADIENTS)

    def _claim_gradients(self) -> None:
        for parameter in self._parameters:
            self._claim_gradient(parameter)
        for optimizer in self._optimizers:
            for tensor in reachable_tensors(optimizer):
                if tensor.is_leaf:
                    self._claim_gradient(tensor)

    def _claim_optimizer_state(self) -> None:
        weights = {id(parameter) for parameter in self._parameters}
        for optimizer in self._optimizers:
            for tensor in reachable_tensors(optimizer):
                if id(tensor) not in weights:
                    self._count(tensor, OPTIMIZER)
