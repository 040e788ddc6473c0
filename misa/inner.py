"""What happens to the active weights inside a round: the inner optimizers this package adds to torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMEL = {"cpu": 1 << 18}  # gradients widened at a time: 1 MiB of fp32 stays in a core's cache
OTHER_CHUNK_NUMEL = 1 << 24  # on an accelerator: few kernel launches


def partial_norms(grad: Tensor) -> Tensor:
    """Numbers whose Euclidean norm is that of a gradient, of shape `[N]`, found without widening it.

    On a CPU these are the norms of its rows: the norm of a whole tensor runs on one thread there and first makes an
    fp32 copy. fp16 is widened all the same, because the norm of a row may exceed its range.
    """
    norms: Tensor
    if grad.ndim >= 2 and grad.is_cpu and grad.dtype != torch.float16:
        norms = torch.linalg.vector_norm(grad, dim=-1)
    else:
        norms = torch.linalg.vector_norm(grad, dtype=torch.float32)
    return norms if norms.ndim == 1 else norms.reshape(-1)


def squared_norms(partial: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Squared norms of consecutive groups of gradients, fp32.

    Args:
        partial: `partial_norms` of every gradient.
        lengths: How many numbers of `partial`, joined, belong to each group, shape `[G]`.

    Returns:
        Shape `[G]`, on the device of `lengths`.
    """
    if len({x.device for x in partial}) > 1:
        partial = [x.to(lengths.device) for x in partial]
    joined = torch.cat(list(partial)).float()
    # Sums one after the other: scattered ones have no fixed order on a GPU.
    sums: Tensor = torch.segment_reduce(joined.square_(), "sum", lengths=lengths, unsafe=True)
    return sums


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW for a fixed set of tensors, with fp32 master copies of those that need them.

    The kernel, the state and the result are those of `torch.optim.AdamW(fused=True)`, bit for bit, without the
    bookkeeping around it: lists are built once, because the active set does not change within a round, and gradients
    of lower precision are widened piece by piece in one small workspace, so that they never exist as a whole. A tensor
    without a gradient is left out of a step.

    Args:
        params: Groups of parameters: weights, or fp32 masters of weights.
        weights: The low-precision weight of each master: its gradient is read and the result written to it.
        workspace: Buffers by device; pass one dictionary to several optimizers to share them.
        **defaults: As for `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        weights: dict[Tensor, Tensor] | None = None,
        workspace: dict[torch.device, Tensor] | None = None,
        **defaults: Any,
    ) -> None:
        super().__init__(params, fused=True, **defaults)
        self._weights = weights or {}
        self._workspace = {} if workspace is None else workspace
        self._all = [p for group in self.param_groups for p in group["params"]]
        self._sources = [self._weights.get(p, p) for p in self._all]
        self._plan: _Plan | None = None

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient.

        Args:
            found_inf: 1.0 where the step must change nothing, else 0.0; None is 0.0.
            grad_scale: What the gradients are to be divided by, or None.
        """
        if self._plan is None or any(w.grad is None for w in self._sources):
            plan, complete = self._make_plan()
            self._plan = plan if complete else None
        else:
            plan = self._plan
        for counters in plan.counters:
            counters.add_(1.0 if found_inf is None else 1.0 - found_inf.to(counters.device))
        for batch in plan.batches:
            batch.step(found_inf, grad_scale)

    def _make_plan(self) -> tuple[_Plan, bool]:
        """What a step does with the tensors that have a gradient, and whether that is all of them."""
        with_grad = [p for p, weight in zip(self._all, self._sources, strict=True) if weight.grad is not None]
        batches: list[_Batch] = []
        for group in self.param_groups:
            batch: _Batch | None = None
            for p in group["params"]:
                weight, state = self._weights.get(p, p), self.state[p]
                if weight.grad is None:
                    continue
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                room = None if weight is p else self._room(p.device)
                for part in _parts(weight, room):
                    if batch is None or not batch.admits(p, room, part):
                        batch = _Batch(group, p, room)
                        batches.append(batch)
                    batch.add(p, state, weight, part)
        # One tensor counts the steps of a device: its elements are the counters of the parameters.
        counters = []
        for device in dict.fromkeys(p.device for p in with_grad):
            here = [p for p in with_grad if p.device == device]
            counters.append(torch.stack([self.state[p]["step"] for p in here]))
            for p, step in zip(here, counters[-1], strict=True):
                self.state[p]["step"] = step
        for batch in batches:
            batch.steps = [self.state[p]["step"] for p in batch.params]
        return _Plan(batches, counters), len(with_grad) == len(self._all)

    def _room(self, device: torch.device) -> Tensor:
        """The workspace of a device, at most one chunk and no larger than needed."""
        needed = sum(p.numel() for p in self._weights if p.device == device)
        length = min(needed, CHUNK_NUMEL.get(device.type, OTHER_CHUNK_NUMEL))
        room = self._workspace.get(device)
        if room is None or room.numel() < length:
            room = self._workspace[device] = torch.empty(length, dtype=torch.float32, device=device)
        return room


def _parts(weight: Tensor, room: Tensor | None) -> list[slice | None]:
    """Slices of a flattened tensor that fit into the workspace; None for a tensor taken as it is."""
    if room is None or not weight.is_contiguous() or weight.numel() <= room.numel():
        return [None]
    return [slice(a, min(a + room.numel(), weight.numel())) for a in range(0, weight.numel(), room.numel())]


def _cut(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None else tensor.reshape(-1)[part]


@dataclass
class _Plan:
    """One step: kernel calls, and the counters to advance before them."""

    batches: list[_Batch]
    counters: list[Tensor]


@dataclass
class _Batch:
    """Tensors, or pieces of them, of one group, device and type: what one kernel call updates."""

    group: dict[str, Any]
    like: Tensor
    room: Tensor | None  # where gradients are widened; None for weights that the kernel updates directly
    used: int = 0
    params: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    sources: list[tuple[Tensor, slice | None]] = field(default_factory=list)
    wide: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def admits(self, p: Tensor, room: Tensor | None, part: slice | None) -> bool:
        same = (p.device, p.dtype, room is None) == (self.like.device, self.like.dtype, self.room is None)
        return same and (room is None or self.used + _length(p, part) <= room.numel())

    def add(self, p: Tensor, state: dict[str, Tensor], weight: Tensor, part: slice | None) -> None:
        self.params.append(p)
        self.targets.append(_cut(p.detach(), part))
        self.exp_avgs.append(_cut(state["exp_avg"], part))
        self.exp_avg_sqs.append(_cut(state["exp_avg_sq"], part))
        self.sources.append((weight, part))
        if self.room is not None:
            self.weights.append(_cut(weight.detach(), part))
            if weight.is_contiguous():
                end = self.used + _length(p, part)
                self.wide.append(self.room[self.used : end].view_as(self.targets[-1]))
                self.used = end
            else:
                self.wide.append(torch.empty_like(p))

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        grads: list[Any] = [
            w.grad if part is None else _cut(w.grad, part) for w, part in self.sources if w.grad is not None
        ]
        if self.wide:
            torch._foreach_copy_(self.wide, grads)
            grads = self.wide
        lists = (self.targets, grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
        fused_adamw(*lists, self.group, found_inf, grad_scale)
        if self.weights:
            torch._foreach_copy_(self.weights, self.targets)


def _length(p: Tensor, part: slice | None) -> int:
    return p.numel() if part is None else part.stop - part.start


def fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Torch's fused AdamW kernel on lists of tensors of one device and type; `steps` count this step already."""
    device = params[0].device
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=None if grad_scale is None else grad_scale.to(device),
        found_inf=None if found_inf is None else found_inf.to(device),
    )


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW without master copies: arithmetic in fp32, results rounded stochastically to bf16.

    Each tensor is widened, updated by the fused kernel and rounded back up or down with the probability that makes
    the rounding right on average, so that updates below the spacing of bf16 are not lost. The wide copy lives for one
    tensor at a time. Moments are kept in `moments_dtype`: fp32, or bf16 rounded in the same way.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        generator: torch.Generator,
        moments_dtype: torch.dtype = torch.float32,
        **defaults: Any,
    ) -> None:
        super().__init__(params, defaults)
        self._generator = generator
        self._moments_dtype = moments_dtype

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient; arguments as for `FusedAdamW.update`."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"] = torch.zeros_like(p, dtype=self._moments_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self._moments_dtype)
                narrow = (p.detach(), state["exp_avg"], state["exp_avg_sq"])
                wide = [t.float() for t in narrow]
                state["step"] += 1
                lists = ([wide[0]], [p.grad.float()], [wide[1]], [wide[2]], [state["step"]])
                fused_adamw(*lists, group, found_inf, grad_scale)
                if found_inf is not None:
                    state["step"] -= found_inf.to(p.device)
                for out, value in zip(narrow, wide, strict=True):
                    if out is not value:
                        round_stochastically_(out, value, self._generator)


def round_stochastically_(out: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write fp32 `value` into bf16 `out`, rounding up with a probability equal to the fraction cut off.

    A bf16 number is the upper half of an fp32 number's bits, so adding a uniform 16-bit integer before cutting the
    lower half does it. Non-finite values are copied as they are.
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=generator.device, generator=generator)
    rounded = ((bits + noise.to(bits.device)) & -65536).view(torch.float32)
    out.copy_(torch.where(torch.isfinite(value), rounded, value))


class BoundedAdam(torch.optim.Optimizer):
    """The inner rule of Algorithm 1: Adam with an AMSGrad-type bound, no bias correction, and a last momentum step.

    Lines 9 to 13: m and v are Adam's moments, v~ = max(v, ||v~_previous||_max) with the largest element of the
    previous v~ as a scalar bound, and theta -= lr * m / sqrt(v~ + eps). Line 16, once at the end of the round:
    theta -= lr * beta1 / (1 - beta1) * m / sqrt(v + eps).
    """

    def __init__(self, params: Iterable[Any], *, momentum_step: bool = True, **defaults: Any) -> None:
        super().__init__(params, defaults)
        self._momentum_step = momentum_step

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient; arguments as for `FusedAdamW.update`."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                    state["bound"] = torch.zeros((), dtype=p.dtype, device=p.device)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                grad = p.grad if grad_scale is None else p.grad / grad_scale
                new_m = m.lerp(grad, 1 - beta1)
                new_v = torch.addcmul(v * beta2, grad, grad, value=1 - beta2)
                bounded = torch.maximum(new_v, state["bound"])
                change = group["lr"] * new_m / (bounded + group["eps"]).sqrt() + group["lr"] * group["weight_decay"] * p
                good = torch.ones((), dtype=torch.bool) if found_inf is None else found_inf.to(p.device) == 0
                p.sub_(torch.where(good, change, 0))
                m.copy_(torch.where(good, new_m, m))
                v.copy_(torch.where(good, new_v, v))
                state["bound"].copy_(torch.where(good, bounded.max(), state["bound"]))

    @torch.no_grad()
    def finish(self) -> None:
        """Line 16, at the end of a round."""
        if not self._momentum_step:
            return
        for group in self.param_groups:
            factor = group["lr"] * group["betas"][0] / (1 - group["betas"][0])
            for p in group["params"]:
                if state := self.state[p]:
                    p.sub_(factor * state["exp_avg"] / (state["exp_avg_sq"] + group["eps"]).sqrt())
