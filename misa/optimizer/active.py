"""What is on in one round: gradients and their norms, the inner optimizer, master copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misa.inner import FusedAdamW, RoundedAdamW
from misa.optimizer.settings import Settings


class Entry:
    """One trainable parameter and all the optimizer knows of it."""

    __slots__ = ("block", "group", "master", "name", "norm", "param", "residual", "saved", "version")

    def __init__(self, name: str, param: nn.Parameter, group: int, block: int) -> None:
        self.name = name
        self.param = param
        self.group = group
        self.block = block  # index of its block, or -1 if it is always on
        self.master: Tensor | None = None  # fp32 copy, while active
        self.residual: Tensor | None = None  # what the weight could not hold of its master, while inactive
        self.saved: dict[str, Any] | None = None  # inner state while no inner optimizer holds it
        self.version = -1  # of the weight when the master was last written to it
        self.norm: Tensor | None = None  # of the gradient, measured during the backward pass

    @property
    def target(self) -> Tensor:
        """What the inner optimizer updates: the master copy if there is one."""
        return self.param if self.master is None else self.master

    def make_master(self) -> None:
        """Copy a low-precision weight to fp32, with what an earlier master held beyond the weight's precision."""
        weight = self.param.detach()
        self.master = weight.float()
        if self.residual is not None:
            finer = self.master + self.residual.to(weight.device).float()
            # Where the weight was edited meanwhile, its residual means nothing.
            self.master = torch.where(finer.to(weight.dtype) == weight, finer, self.master)
            self.residual = None
        self.version = self.param._version

    def follow_outside_edits(self) -> None:
        """Take over weights that were edited since the last step (a merge, `load_state_dict`, an average)."""
        if self.master is not None and self.param._version != self.version:
            weight = self.param.detach()
            same = self.master.to(weight.dtype) == weight
            self.master.copy_(torch.where(same, self.master, weight.float()))

    def drop_state(self, keep_residual: bool) -> None:
        """Free the inner state and the master copy."""
        self.saved = None
        if self.master is not None and keep_residual:
            self.residual = (self.master - self.param.detach().float()).to(torch.bfloat16).cpu()
        self.master = None


class ActiveSet:
    """The parameters that are on for a round, and the steps taken on them.

    Args:
        entries: Parameters that are on, in a fixed order.
        blocks: Indices of the active blocks; scores are summed in this order.
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
        self._settings = settings
        self._groups = groups
        self._state = state
        self._rounding = rounding
        self._inners: list[Any] = []
        self._index: Tensor | None = None
        self._handles: list[Any] = []
        if settings.order == "importance" or settings.step_in_backward:
            self._handles = [e.param.register_post_accumulate_grad_hook(self._hook(e)) for e in self.entries]

    def detach(self) -> None:
        """Remove the hooks and hand the inner state back to the entries."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
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
        if self._settings.step_in_backward:
            if overflow is not None:
                raise ValueError("step_in_backward=True: cannot be driven by a GradScaler; use bf16 instead of fp16")
            norms = torch.stack([e.norm for e in entries if e.norm is not None])
            good = torch.isfinite(norms.sum())
        else:
            self._ensure_inner()
            self._load_gradients(entries)
            # After a scaler's unscale_() the hooks' norms are off by an unknown factor: measure again.
            if scale is None and overflow is None and all(e.norm is not None for e in entries):
                norms = torch.stack([e.norm for e in entries if e.norm is not None])
            else:
                norms = torch.stack(torch._foreach_norm([e.target.grad for e in entries if e.target.grad is not None]))
                norms = norms if scale is None else norms / scale
            good = torch.isfinite(norms.sum())
            if overflow is not None:
                good = good & (overflow == 0)
            self._run(self._inners[0], entries, ~good, scale)
        self._add(entries, norms, good)
        for e in entries:
            e.norm = None
        return good

    def finish(self) -> None:
        """The inner rule's last word at the end of a round, if it has one (Algorithm 1, line 16)."""
        for inner in self._inners:
            if hasattr(inner, "finish"):
                inner.finish()
                self._write_back(self.entries)

    def means(self) -> list[float] | None:
        """Mean of what is scored over the round's good steps, per active block: the one read of the device."""
        if self.sums is None:
            return None
        *sums, good = torch.cat([self.sums, torch.as_tensor(self.num_good, device=self.sums.device).view(1)]).tolist()
        return [x / good for x in sums] if good else None

    def _hook(self, entry: Entry) -> Callable[[Tensor], None]:
        """Measures a gradient when it is ready: before clipping, and over all micro-batches accumulated so far."""
        owner = weakref.ref(self)

        def measure(p: Tensor) -> None:
            active = owner()
            if active is not None and p.grad is not None:
                if active._settings.step_in_backward:
                    active._step_one(entry)
                else:
                    entry.norm = torch.linalg.vector_norm(p.grad, dtype=torch.float32)

        return measure

    def _step_one(self, entry: Entry) -> None:
        """Apply and free one gradient inside the backward pass."""
        if entry.norm is not None:
            raise RuntimeError(
                "step_in_backward=True applies a gradient as soon as it is ready, so it cannot be accumulated over "
                "several backward passes: call step() after each, or turn step_in_backward off"
            )
        with torch.no_grad():
            self._ensure_inner()
            self._load_gradients([entry])
            assert entry.target.grad is not None
            entry.norm = torch.linalg.vector_norm(entry.target.grad, dtype=torch.float32)
            self._run(self._inners[self.entries.index(entry)], [entry], ~torch.isfinite(entry.norm), None)
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
        members = [[e] for e in self.entries] if self._settings.step_in_backward else [self.entries]
        for entries in members:
            groups = []
            for i, group in enumerate(self._groups):
                if targets := [e.target for e in entries if e.group == i]:
                    groups.append({"params": targets, "outer": i, **self._hyperparameters(group)})
            inner = self._make_inner(groups)
            for e in entries:
                if e.saved is not None:
                    inner.state[e.target].update(moved(e.saved, e.param.device))
                    e.saved = None
            self._inners.append(inner)

    def _make_inner(self, groups: list[dict[str, Any]]) -> Any:
        s = self._settings
        if s.inner is not None:
            return s.inner(groups, **s.inner_kwargs)
        dtypes = {p.dtype for g in groups for p in g["params"]}
        if s.state_format == "master" or dtypes == {torch.float32}:
            return FusedAdamW(groups)
        if dtypes != {torch.bfloat16}:
            raise ValueError(f"state_format={s.state_format!r}: needs bf16 weights only, found {dtypes}")
        moments = torch.float32 if s.state_format == "fp32" else torch.bfloat16
        return RoundedAdamW(groups, generator=self._rounding, moments_dtype=moments)

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the inner optimizer takes over from a group: all of it, or lr and decay if it is not one of ours."""
        if self._settings.inner is None or hasattr(self._settings.inner, "update"):
            return {k: v for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}
        shared = {"lr", "weight_decay"} - set(self._settings.inner_kwargs)
        return {k: group[k] for k in shared}

    def _load_gradients(self, entries: list[Entry]) -> None:
        """Widen the gradients of what has a master copy."""
        for e in entries:
            if e.master is not None:
                e.follow_outside_edits()
                assert e.param.grad is not None
                e.master.grad = e.param.grad.float()

    def _run(self, inner: Any, entries: list[Entry], bad: Tensor, scale: Tensor | None) -> None:
        if scale is not None:
            torch._foreach_mul_([e.target.grad for e in entries if e.target.grad is not None], 1 / scale)
        for group in inner.param_groups:  # learning rate, decay and so on, as the schedulers left them
            group.update(self._hyperparameters(self._groups[group["outer"]]))
        if hasattr(inner, "update"):
            inner.update(found_inf=bad.float())
        elif not bool(bad):  # a plain torch optimizer cannot skip on the device: read the flag
            inner.step()
        self._write_back(entries)
        if len(self._state) < len(self.entries):
            for e in self.entries:
                if e.target in inner.state:
                    self._state[e.param] = inner.state[e.target]

    def _write_back(self, entries: list[Entry]) -> None:
        with_master = [(e, e.master) for e in entries if e.master is not None]
        if with_master:
            torch._foreach_copy_([e.param for e, _ in with_master], [master for _, master in with_master])
        for e, master in with_master:
            master.grad = None
            e.version = e.param._version

    def _add(self, entries: list[Entry], norms: Tensor, good: Tensor) -> None:
        """Add this step's norms to the sums of the round, on the device."""
        num = len(self.blocks)
        if self.sums is None:
            self.sums = torch.zeros(num, dtype=torch.float32, device=norms.device)
        index = self._index
        if index is None or len(entries) != len(self.entries):
            position = {i: k for k, i in enumerate(self.blocks)}
            index = torch.tensor([position.get(e.block, num) for e in entries], device=norms.device)
            if len(entries) == len(self.entries):
                self._index = index
        values = torch.zeros(num + 1, device=norms.device).index_add_(0, index, norms.square())[:num]
        if not self._settings.score.squared:
            values = values.sqrt()
        self.sums = self.sums + torch.where(good, values, 0)
        self.num_good = self.num_good + good


def moved(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state of one parameter with its tensors on another device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
