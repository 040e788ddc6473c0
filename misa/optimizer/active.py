"""What is on in one round: its gradients, the inner optimizer, master copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from misa.distributed.workers import Workers
from misa.gradients import TINY, NormSums, Number, Numbers, each
from misa.inner import ADAM, FusedAdamW, make_inner, stamp
from misa.optimizer.settings import Settings
from misa.parameters import Entry, moved


class ActiveSet:
    """The parameters that are on for a round, and the steps taken on them.

    Entries come block by block, those always on last. The optimizer's `groups` are read at every step, and its `state`
    is filled with what the inner optimizer holds.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        blocks: tuple[int, ...],
        settings: Settings,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        rounding: torch.Generator,
        workers: Workers,
    ) -> None:
        self.entries = list(entries)
        self.norms = NormSums(blocks, settings.score.squared)
        self.lr_factor = 1.0  # of the learning rates of the groups
        self.unscale: Number = 1.0  # what turned the last step's measured norms into those of the gradients
        self._settings = settings
        self._groups = groups
        self._state = state
        self._rounding = rounding
        self._workers = workers
        self._inners: list[Any] = []
        ours = settings.inner is None or hasattr(settings.inner, "skips_on_device")
        self._taken = [k for k in (ADAM if ours else ("lr", "weight_decay")) if k not in settings.inner_kwargs]
        self.group_state_before: dict[str, Any] = {}  # for the inner optimizer of a round that is continued
        for e in self.entries:
            e.find_local(workers.local_part)
        measures = settings.order == "importance" or settings.step_in_backward
        then: dict[Tensor, Callable[[Tensor], None]] = {}
        if measures:
            then = {e.param: self._hook(k, e) for k, e in enumerate(self.entries)}
        self._handles = workers.watch([e.param for e in self.entries], then)

    def detach(self) -> None:
        """Remove the hooks and hand the inner state back to the entries."""
        for handle in self._handles:
            handle.remove()
        for e in self.entries:
            e.norm = None
            if held := self._state.pop(e.param, None):
                e.saved = dict(held)
        self._inners = []

    def with_gradient(self) -> list[Entry]:
        """Entries that this step concerns."""
        if self._settings.step_in_backward:
            return [e for e in self.entries if e.norm is not None]
        return [e for e in self.entries if e.param.grad is not None]

    def step(self, entries: list[Entry], scale: Tensor | None, overflow: Tensor | None) -> None:
        """One step of the inner optimizer, on what `with_gradient` returned.

        A `GradScaler` has multiplied the gradients by `scale`, unless it is None, and says by `overflow` whether to
        skip the step. It is also skipped for NaN or infinite gradients.
        """
        if self._settings.step_in_backward and overflow is not None:
            raise ValueError("step_in_backward=True: cannot be driven by a GradScaler; use bf16 instead of fp16")
        blocks = [e.block for e in entries]
        norms = self._norms(blocks, [e.measure() if e.norm is None else e.norm for e in entries])
        now = norms
        unscaled = overflow is not None and scale is None  # by the scaler, since the hooks measured
        if unscaled or (not self._settings.step_in_backward and any(e.has_changed_gradient for e in entries)):
            now = self._norms(blocks, [e.measure() for e in entries])
        if unscaled:
            before, after = (sum(each(lambda x: x * x, numbers)) for numbers in (norms, now))
            self.unscale = (after / (before + TINY)) ** 0.5
            norms = now
        elif scale is not None:
            factor = self.unscale = 1 / (scale.item() if isinstance(norms, list) else scale.to(norms.device))
            norms = each(lambda x: x * factor, norms)
        bad = self.norms.not_finite(now, overflow)
        if not self._settings.step_in_backward:
            self.prepare()
            self._run(self._inners[0], entries, bad, scale)
        self.norms.add(norms, bad)
        for e in entries:
            e.norm = None

    def _norms(self, blocks: list[int], norms: list[Number]) -> Numbers:
        return self._workers.norms(self.norms.of_blocks(blocks, norms))

    def finish(self) -> None:
        """The inner rule's last word at the end of a round, if it has one (Algorithm 1, line 16)."""
        for inner in self._inners:
            if hasattr(inner, "finish"):
                inner.finish()
                self._narrow(self.entries)

    def _hook(self, number: int, entry: Entry) -> Callable[[Tensor], None]:
        """Measures a gradient, before clipping and over all micro-batches so far, or applies it when it is ready."""
        # Weak references, so that the hooks of a forgotten optimizer do nothing.
        owner, measured = weakref.ref(self), weakref.ref(entry)

        def measure(p: Tensor) -> None:
            e = measured()
            if e is not None and p.grad is not None:
                e.measure_in_backward()

        def apply(p: Tensor) -> None:
            active, e = owner(), measured()
            if active is not None and e is not None and p.grad is not None:
                active._step_one(number, e)

        return apply if self._settings.step_in_backward else measure

    @torch.no_grad()
    def _step_one(self, number: int, entry: Entry) -> None:
        """Apply and free one gradient inside the backward pass."""
        if entry.norm is not None:
            raise RuntimeError(
                "step_in_backward=True applies a gradient as soon as it is ready, so it cannot be accumulated over "
                "several backward passes: call step() after each, or turn step_in_backward off"
            )
        self.prepare()
        entry.norm = entry.measure()
        bad = self.norms.not_finite(entry.norm if isinstance(entry.norm, Tensor) else [entry.norm])
        self._run(self._inners[number], [entry], bad, None)
        entry.param.grad = None

    def prepare(self) -> None:
        """Make master copies, the inner optimizer and its moments, unless that is done."""
        if self._inners:
            return
        self._workers.require_known_group()
        for e in self.entries:
            if e.master is not None:
                e.master = e.master.to(e.param.device)
            elif self._settings.state_format == "master" and e.param.dtype in (torch.bfloat16, torch.float16):
                e.make_master()
        for entries in [[e] for e in self.entries] if self._settings.step_in_backward else [self.entries]:
            groups = [
                {"params": targets, "outer": i, **self._hyperparameters(group)}
                for i, group in enumerate(self._groups)
                if (targets := [e.target for e in entries if e.group == i])
            ]
            weights: dict[Tensor, Tensor] = {e.target: e.local for e in entries if e.master is not None}
            inner = make_inner(self._settings, groups, weights, self._rounding)
            for e in entries:
                if e.saved is not None:
                    inner.state[e.target].update(moved(e.saved, e.param.device))
                    e.saved = None
            if isinstance(inner, FusedAdamW):
                inner.make_state([e.target for e in entries])
            for j, group in enumerate(inner.param_groups):
                group.update(deepcopy(self.group_state_before.get(f"{len(self._inners)}.{j}", {})))
            self._inners.append(inner)
            self._show_state(inner, entries)

    def group_state(self) -> dict[str, Any]:
        """What an inner optimizer has written into its groups: a count of steps, say; by number of inner and group."""
        if not self._inners or self._settings.inner is None:
            return self.group_state_before
        own = {"params", "outer"}
        return {
            f"{i}.{j}": {k: v for k, v in group.items() if k not in own | self._groups[group["outer"]].keys()}
            for i, inner in enumerate(self._inners)
            for j, group in enumerate(inner.param_groups)
        }

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the inner optimizer takes over from a group."""
        taken = {name: group[name] for name in self._taken}
        if "lr" in taken:
            taken["lr"] = taken["lr"] * self.lr_factor  # a tensor is copied, since steps write to the inner one
        return taken

    def _run(self, inner: Any, entries: list[Entry], bad: Tensor | bool, scale: Tensor | None) -> None:
        for group in inner.param_groups:  # learning rate, decay and so on, as the schedulers left them
            taken = self._hyperparameters(self._groups[group["outer"]])
            if self._settings.inner is not None:  # which may be of compiled code, and wants to keep its own tensors
                for name in [name for name in taken if isinstance(group.get(name), Tensor)]:
                    group[name].fill_(taken.pop(name))
            group.update(taken)
        part = self._workers.local_part
        for e in entries:
            e.take_gradient(part)
            e.follow_outside_edits()
        # A plain torch optimizer cannot skip on the device: read the flag.
        found_inf = bad if isinstance(bad, Tensor) else None
        if bad is True or not (hasattr(inner, "skips_on_device") or bool(bad == 0)):
            for e in entries:
                e.forget_gradient()
            return
        if isinstance(inner, FusedAdamW):
            inner.update(found_inf, scale)
        else:
            for e in entries:
                if e.master is not None and e.local.grad is not None:
                    e.master.grad = e.local.grad.float()
            if hasattr(inner, "skips_on_device"):
                inner.update(found_inf, scale)
            else:
                if scale is not None:
                    torch._foreach_mul_([g for e in entries if (g := e.target.grad) is not None], 1 / scale)
                inner.step()
            self._narrow(entries)
            if not all(map(self._state.get, (e.param for e in entries))):
                self._show_state(inner, entries)
        self._workers.gather_weights(entries)
        for e in entries:
            e.stamp = stamp(e.local)
            e.forget_gradient()

    def _show_state(self, inner: Any, entries: list[Entry]) -> None:
        self._state.update({e.param: inner.state[e.target] for e in entries if e.target in inner.state})

    def _narrow(self, entries: list[Entry]) -> None:
        """Write the masters to their weights."""
        for e in entries:
            if e.master is not None:
                e.master.grad = None
                e.local.copy_(e.master)
                e.stamp = stamp(e.local)
