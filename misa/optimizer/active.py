"""What is on in one round: gradients and their norms, the inner optimizer, master copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misa.inner import FusedAdamW, RoundedAdamW, partial_norms, squared_norms
from misa.optimizer.settings import Settings


class Entry:
    """One parameter that can be on, and all the optimizer knows of it."""

    __slots__ = ("__weakref__", "block", "group", "master", "name", "norm", "param", "residual", "saved", "version")

    def __init__(self, name: str, param: nn.Parameter, group: int, block: int) -> None:
        self.name = name
        self.param = param
        self.group = group
        self.block = block  # index of its block, or -1 if it is always on
        self.master: Tensor | None = None  # fp32 copy, while active
        self.residual: Tensor | None = None  # what the weight could not hold of its master, while inactive
        self.saved: dict[str, Any] | None = None  # inner state while no inner optimizer holds it
        self.version = -1  # of the weight when the master was last written to it
        self.norm: Tensor | None = None  # `partial_norms` of the gradient, measured during the backward pass

    @property
    def target(self) -> Tensor:
        """What the inner optimizer updates: the master copy if there is one."""
        return self.param if self.master is None else self.master

    def make_master(self) -> None:
        """Copy the weight to fp32, with what an earlier master held beyond the weight's precision."""
        weight = self.param.detach()
        self.master = weight.float()
        if self.residual is not None:
            finer = self.master + self.residual.to(weight.device).float()
            # Where the weight was edited meanwhile, its residual means nothing.
            self.master = torch.where(finer.to(weight.dtype) == weight, finer, self.master)
            self.residual = None
        self.version = self.param._version

    def follow_outside_edits(self) -> None:
        """Take over a weight that was edited since the last step (a merge, `load_state_dict`, an average)."""
        if self.master is not None and self.param._version != self.version:
            weight = self.param.detach()
            self.master.copy_(torch.where(self.master.to(weight.dtype) == weight, self.master, weight.float()))

    def drop_state(self, keep_residual: bool) -> None:
        """Free the inner state and the master copy."""
        self.saved = None
        if self.master is not None and keep_residual:
            beyond = self.master - self.param.detach().float()
            # Cut to bf16, not rounded: rounded up, half a spacing of the weight would belong to its neighbour.
            self.residual = (beyond.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16).cpu()
        self.master = None


class ActiveSet:
    """The parameters that are on for a round, and the steps taken on them.

    Args:
        entries: Parameters that are on, in a fixed order.
        blocks: Indices of the active blocks.
        settings: The optimizer's settings.
        groups: The optimizer's parameter groups, read at every step.
        state: The optimizer's `state`, filled with what the inner optimizer holds.
        rounding: Generator of stochastic rounding.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        blocks: tuple[int, ...],
        settings: Settings,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        rounding: torch.Generator,
    ) -> None:
        self.entries = list(entries)
        self.blocks = blocks
        self.sums: Tensor | None = None  # per active block: sum over the round's steps of what is scored
        self.num_good: Tensor | int = 0  # steps that entered the sums
        self.unscale: Tensor | float = 1.0  # what turned the last step's measured norms into those of the gradients
        self._settings = settings
        self._groups = groups
        self._state = state
        self._rounding = rounding
        self._inners: list[Any] = []
        self._lengths: Tensor | None = None
        self._handles: list[Any] = []
        if settings.order == "importance" or settings.step_in_backward:
            self._handles = [
                e.param.register_post_accumulate_grad_hook(self._hook(k, e)) for k, e in enumerate(self.entries)
            ]

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

    def step(self, entries: list[Entry], scale: Tensor | None = None, overflow: Tensor | None = None) -> Tensor:
        """One step of the inner optimizer.

        Args:
            entries: What `with_gradient` returned, not empty.
            scale: Factor by which a `GradScaler` has multiplied the gradients, or None.
            overflow: The scaler's flag, not 0 where the step is to be skipped; None without a scaler.

        Returns:
            Whether the step was taken, as a boolean tensor on the device: false for NaN or infinite gradients.
        """
        if self._settings.step_in_backward and overflow is not None:
            raise ValueError("step_in_backward=True: cannot be driven by a GradScaler; use bf16 instead of fp16")
        squares = self._squares(entries, [_norms(e) if e.norm is None else e.norm for e in entries])
        if overflow is not None:
            if scale is None:  # the scaler has unscaled the gradients since the hooks measured them
                measured, squares = squares, self._squares(entries, [_norms(e) for e in entries])
                self.unscale = (squares.sum() / measured.sum()).sqrt()
            else:
                self.unscale = 1 / scale.to(squares.device)
                squares = squares * self.unscale**2
        good = torch.isfinite(squares.sum())
        if overflow is not None:
            good = good & (overflow.to(good.device) == 0)
        if not self._settings.step_in_backward:
            self._ensure_inner()
            self._run(self._inners[0], entries, ~good, scale)
        values = squares[: len(self.blocks)]
        values = torch.where(good, values if self._settings.score.squared else values.sqrt(), 0)
        self.sums = values if self.sums is None else self.sums + values
        self.num_good = self.num_good + good
        for e in entries:
            e.norm = None
        return good

    def finish(self) -> None:
        """The inner rule's last word at the end of a round, if it has one (Algorithm 1, line 16)."""
        for inner in self._inners:
            if hasattr(inner, "finish"):
                inner.finish()
                self._narrow(self.entries)

    def means(self) -> list[float] | None:
        """Mean of what is scored over the round's good steps, per active block: the one read of the device."""
        if self.sums is None:
            return None
        *sums, good = torch.cat([self.sums, torch.as_tensor(self.num_good, device=self.sums.device).view(1)]).tolist()
        num_steps = self._settings.interval if self._settings.score.per_interval else good
        return [x / num_steps for x in sums] if good else None

    def _hook(self, number: int, entry: Entry) -> Callable[[Tensor], None]:
        """What happens to a gradient when it is ready: before clipping, and over all micro-batches accumulated so far.

        It is measured, or applied at once. Weak references, so that the hooks of a forgotten optimizer do nothing.
        """
        owner, measured = weakref.ref(self), weakref.ref(entry)

        def measure(p: Tensor) -> None:
            e = measured()
            if e is not None and p.grad is not None:
                e.norm = partial_norms(p.grad)

        def apply(p: Tensor) -> None:
            active = owner()
            if active is not None and p.grad is not None:
                active._step_one(number, entry)

        return apply if self._settings.step_in_backward else measure

    @torch.no_grad()
    def _step_one(self, number: int, entry: Entry) -> None:
        """Apply and free one gradient inside the backward pass."""
        if entry.norm is not None:
            raise RuntimeError(
                "step_in_backward=True applies a gradient as soon as it is ready, so it cannot be accumulated over "
                "several backward passes: call step() after each, or turn step_in_backward off"
            )
        self._ensure_inner()
        entry.norm = _norms(entry)
        self._run(self._inners[number], [entry], ~torch.isfinite(entry.norm.sum()), None)
        entry.param.grad = None

    def _ensure_inner(self) -> None:
        """Make master copies and the inner optimizer, at the first step of a round."""
        if self._inners:
            return
        for e in self.entries:
            if e.master is not None:
                e.master = e.master.to(e.param.device)
            elif self._settings.state_format == "master" and e.param.dtype in (torch.bfloat16, torch.float16):
                e.make_master()
        workspace: dict[torch.device, Tensor] = {}
        for entries in [[e] for e in self.entries] if self._settings.step_in_backward else [self.entries]:
            groups = [
                {"params": targets, "outer": i, **self._hyperparameters(group)}
                for i, group in enumerate(self._groups)
                if (targets := [e.target for e in entries if e.group == i])
            ]
            inner = self._make_inner(groups, {e.target: e.param for e in entries if e.master is not None}, workspace)
            for e in entries:
                if e.saved is not None:
                    inner.state[e.target].update(moved(e.saved, e.param.device))
                    e.saved = None
            self._inners.append(inner)

    def _make_inner(self, groups: list[Any], weights: dict[Tensor, Tensor], workspace: dict[Any, Tensor]) -> Any:
        s = self._settings
        if s.inner is not None:
            return s.inner(groups, **s.inner_kwargs)
        if s.state_format == "master":
            return FusedAdamW(groups, weights=weights, workspace=workspace)
        moments = torch.float32 if s.state_format == "fp32" else torch.bfloat16
        return RoundedAdamW(groups, generator=self._rounding, moments_dtype=moments)

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the inner optimizer takes over from a group: all of it, or lr and decay if it is not one of ours."""
        if self._settings.inner is None or hasattr(self._settings.inner, "update"):
            return {k: v for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}
        return {k: group[k] for k in ("lr", "weight_decay") if k not in self._settings.inner_kwargs}

    def _run(self, inner: Any, entries: list[Entry], bad: Tensor, scale: Tensor | None) -> None:
        for group in inner.param_groups:  # learning rate, decay and so on, as the schedulers left them
            group.update(self._hyperparameters(self._groups[group["outer"]]))
        for e in entries:
            e.follow_outside_edits()
        if isinstance(inner, FusedAdamW):
            inner.update(bad.float(), scale)
        else:
            for e in entries:
                if e.master is not None and e.param.grad is not None:
                    e.master.grad = e.param.grad.float()
            if hasattr(inner, "update"):
                inner.update(bad.float(), scale)
            elif not bool(bad):  # a plain torch optimizer cannot skip on the device: read the flag
                if scale is not None:
                    torch._foreach_mul_([e.target.grad for e in entries if e.target.grad is not None], 1 / scale)
                inner.step()
            self._narrow(entries)
        for e in entries:
            e.version = e.param._version
        if len(self._state) < len(self.entries):
            self._state.update({e.param: inner.state[e.target] for e in entries if e.target in inner.state})

    def _narrow(self, entries: list[Entry]) -> None:
        """Write the masters to their weights."""
        for e in entries:
            if e.master is not None:
                e.master.grad = None
                e.param.copy_(e.master)
                e.version = e.param._version

    def _squares(self, entries: list[Entry], norms: list[Tensor]) -> Tensor:
        """Squared norm of the gradient of every active block, and of what is always on, on the device."""
        lengths = self._lengths
        if lengths is None or len(entries) < len(self.entries):
            count = dict.fromkeys((*self.blocks, -1), 0)  # entries come block by block, those always on last
            for e, norm in zip(entries, norms, strict=True):
                count[e.block] += norm.numel()
            lengths = torch.tensor(list(count.values()), device=norms[0].device)
            self._lengths = lengths if len(entries) == len(self.entries) else None
        return squared_norms(norms, lengths)


def _norms(e: Entry) -> Tensor:
    assert e.param.grad is not None
    return partial_norms(e.param.grad)


def moved(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state of one parameter with its tensors on another device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
