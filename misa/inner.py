"""What happens to the active weights inside a round: the inner optimizers this package adds to torch's own."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from misa.layout import SameLayout

if TYPE_CHECKING:
    from misa.optimizer.settings import Settings

CHUNK_NUMEL = {"cpu": 1 << 22}  # gradients widened at a time: 16 MiB of fp32; less would wake the threads more often
OTHER_CHUNK_NUMEL = 1 << 24  # on an accelerator: few kernel launches
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}  # torch's defaults


def make_inner(
    settings: Settings,
    groups: list[dict[str, Any]],
    weights: dict[Tensor, Tensor],
    generator: torch.Generator,
) -> Any:
    """The inner optimizer of a round, as the settings ask.

    Args:
        settings: Read for `inner`, `inner_kwargs` and `state_format`.
        groups: Parameter groups of what it updates.
        weights: The low-precision weight of every master among them.
        generator: Of stochastic rounding.
    """
    if settings.inner is not None:
        return settings.inner(groups, **settings.inner_kwargs)
    if settings.state_format == "master":
        return FusedAdamW(groups, weights=weights)
    from misa.rounded import RoundedAdamW

    return RoundedAdamW(groups, generator=generator, moments=settings.state_format)


def warn_if_lost_in_rounding(settings: Settings, lr: float, dtypes: set[torch.dtype]) -> None:
    """Say that an optimizer that works on low-precision weights as they are loses small updates."""
    if settings.state_format == "inner" and lr < 1e-4 and dtypes & {torch.bfloat16, torch.float16}:
        warnings.warn(
            f"state_format='inner' with lr={lr}: updates smaller than half the spacing of bf16 or fp16 weights, up to "
            "0.4% of a bf16 weight, are lost; state_format='master' keeps them",
            stacklevel=5,
        )


def takes_no_closure(inner: Any) -> bool:
    """Whether an inner optimizer can step on gradients that are there; LBFGS evaluates the model itself."""
    if not isinstance(inner, type):
        return True
    _, *others = inspect.signature(inner.step).parameters.values()  # type: ignore[attr-defined]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)


def memory_of(weight: Tensor) -> int:
    """Number of the memory that a weight lies in; it may be used again once that memory is freed."""
    return weight.untyped_storage()._cdata


def stamp(weight: Tensor) -> tuple[int, int]:
    """Changes when something is written to a weight, but through `.data`, and when it gets other memory."""
    return weight._version, memory_of(weight)


def make_master(weight: Tensor, residual: Tensor | None, edited: bool) -> Tensor:
    """fp32 copy of a weight, with the residual that `cut_residual` kept of an earlier one.

    Where the weight was edited meanwhile, its residual means nothing: it is left out where the sum would be another
    weight, no number or, beside a zero of bf16, one too small to be a weight.
    """
    master = weight.float()
    if residual is None:
        return master
    finer = master.clone() if edited else master
    residual = residual.to(weight.device)
    if residual.dtype == torch.int16:
        finer.view(torch.int32).add_(residual.to(torch.int32))  # the widening is spelled out because it is faster so
    else:
        finer.add_(residual)
    if not edited:
        return master
    fits = finer.to(weight.dtype) == weight
    return torch.where(fits if weight.dtype == torch.float16 else fits & (weight != 0), finer, master)


def cut_residual(master: Tensor, weight: Tensor) -> Tensor:
    """What the weight cannot hold of its master, in 2 bytes a parameter on the CPU; the master is used up.

    bf16 has the upper half of the bits of fp32, so the lower half is the residual: taken as a signed number it says how
    far the master lies from the weight it was rounded to, and the master made again is the same bit for bit. Only of a
    master right between two weights it does not say on which side; that residual, one of 65,536, becomes zero. fp16
    has bits of its own: there the residual is the difference as bf16, cut and not rounded, because half a spacing of
    the weight, rounded up, would belong to its neighbour.
    """
    if weight.dtype == torch.bfloat16:
        lower = master.view(torch.int32).to(torch.int16)
        return torch.nn.functional.threshold_(lower, -(2**15), 0).cpu()
    beyond = master.sub_(weight)
    beyond.view(torch.int32).bitwise_and_(-65536)
    return beyond.to(torch.bfloat16).cpu()


def follow_weight(master: Tensor, weight: Tensor) -> None:
    """Take a weight over into its master where it is no longer what the master rounds to."""
    master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))


class FusedAdamW:
    """torch's fused AdamW for a fixed set of tensors, with fp32 master copies of those that need them.

    The kernel, the state and the result are those of `torch.optim.AdamW(fused=True)`, bit for bit, without the
    bookkeeping around it: lists are built once, because the active set does not change within a round, and again where
    a weight got other memory (`model.cpu()` and back), and gradients of lower precision are widened piece by piece in
    one small workspace, which has memory during the step alone. A tensor without a gradient is left out of a step.

    Args:
        params: Groups of parameters: weights, or fp32 masters of weights.
        weights: The low-precision weight of each master: its gradient is read and the result written to it.
        **defaults: `lr`, `betas`, `eps` and `weight_decay` of groups that have none of their own.
    """

    skips_on_device = True

    def __init__(self, params: Iterable[Any], *, weights: dict[Tensor, Tensor] | None = None, **defaults: Any) -> None:
        given = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self.param_groups: list[dict[str, Any]] = [{**ADAM, **defaults, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._weights = weights or {}
        self._all = [p for group in self.param_groups for p in group["params"]]
        self._sources = [self._weights.get(p, p) for p in self._all]
        self._plan: _Plan | None = None
        self._memory: list[int] = []  # of the weights that the plan was made for, which it keeps alive

    def update(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient. To be called without autograd.

        Args:
            found_inf: fp32, on a device: 1.0 if nothing is to change, else 0.0. None: the step is taken.
            grad_scale: What the gradients are to be divided by, or None.
        """
        memory = [memory_of(w) for w in self._sources]
        if self._plan is None or memory != self._memory or any(w.grad is None for w in self._sources):
            self._memory = memory
            plan, complete = self._make_plan()
            self._plan = plan if complete else None
        else:
            plan = self._plan
        for counters in plan.counters:
            counters.add_(1.0)
            if found_inf is not None:
                counters.sub_(found_inf.to(counters.device))
        for room in plan.rooms:
            room.untyped_storage().resize_(room.numel() * room.element_size())
        for batch in plan.batches:
            batch.step(found_inf, grad_scale)
        plan.free_rooms()

    def make_state(self, params: Iterable[Tensor]) -> None:
        """Make the moments of parameters that have none yet."""
        for p in params:
            if not (state := self.state[p]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _make_plan(self) -> tuple[_Plan, bool]:
        """What a step does with the tensors that have a gradient, and whether that is all of them."""
        with_grad = [p for p, weight in zip(self._all, self._sources, strict=True) if weight.grad is not None]
        self.make_state(with_grad)
        for p in with_grad:
            self._require_kind(p)
        batches: list[_Batch] = []
        rooms = {device: self._make_room(device) for device in dict.fromkeys(p.device for p in self._weights)}
        for group in self.param_groups:
            batch: _Batch | None = None
            for p in group["params"]:
                weight, state = self._weights.get(p, p), self.state[p]
                if weight.grad is None:
                    continue
                in_pieces = weight is not p and weight.is_contiguous() and p.is_contiguous()
                room = rooms[p.device] if in_pieces else None
                for part in parts(weight, None if room is None else room.numel()):
                    if batch is None or not batch.admits(p, weight is p, room, part):
                        batch = _Batch(group, p, weight is p, room)
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
        plan = _Plan(batches, counters, list(rooms.values()))
        plan.free_rooms()
        return plan, len(with_grad) == len(self._all)

    def _require_kind(self, p: Tensor) -> None:
        """Refuse a weight of another size than its moments, beyond which the kernel would write, or of another type."""
        weight, moment = self._weights.get(p, p), self.state[p]["exp_avg"]
        if not weight.shape == p.shape == moment.shape:
            raise ValueError(
                f"a weight has the shape {tuple(weight.shape)}, and its moments {tuple(moment.shape)}: it was resized "
                "while it was trained (by resize_token_embeddings, say); make the optimizer after that"
            )
        if p.dtype != moment.dtype:
            raise ValueError(
                f"a weight became {p.dtype} (by model.to, say) while it was trained, and its moments are "
                f"{moment.dtype}; make the optimizer after that, or change the type back before the next step"
            )

    def _make_room(self, device: torch.device) -> Tensor:
        """The workspace of a device, at most one chunk and no larger than needed."""
        needed = sum(p.numel() for p in self._weights if p.device == device)
        length = min(needed, CHUNK_NUMEL.get(device.type, OTHER_CHUNK_NUMEL))
        return torch.empty(length, dtype=torch.float32, device=device)


def parts(weight: Tensor, length: int | None) -> list[slice | None]:
    """Slices of a flattened tensor of at most this length; None for a tensor taken as it is."""
    if length is None or weight.numel() <= length:
        return [None]
    return [slice(a, min(a + length, weight.numel())) for a in range(0, weight.numel(), length)]


def cut(tensor: Tensor, part: slice | None) -> Tensor:
    """One of the `parts` of a tensor; of a contiguous one a view, of which autograd keeps no record."""
    return tensor if part is None else tensor.detach().reshape(-1)[part]


@dataclass
class _Plan:
    """One step: kernel calls, the counters to advance before them, and the workspaces, whose views they keep."""

    batches: list[_Batch]
    counters: list[Tensor]
    rooms: list[Tensor]

    def free_rooms(self) -> None:
        for room in self.rooms:
            room.untyped_storage().resize_(0)


@dataclass
class _Batch:
    """Tensors, or pieces of them, of one group, device and type: what one kernel call updates."""

    group: dict[str, Any]
    like: Tensor
    direct: bool  # the kernel updates the weights themselves
    room: Tensor | None  # where gradients are widened; None if they need not be, or are not contiguous
    used: int = 0
    alike: bool = True  # whether what the kernel gets is known to lie alike in memory, step after step
    params: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    sources: list[tuple[Tensor, slice | None]] = field(default_factory=list)
    wide: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def admits(self, p: Tensor, direct: bool, room: Tensor | None, part: slice | None) -> bool:
        kind = (self.like.device, self.like.dtype, self.direct, self.room is None)
        fits = room is None or self.used + _length(p, part) <= room.numel()
        return fits and kind == (p.device, p.dtype, direct, room is None)

    def add(self, p: Tensor, state: dict[str, Tensor], weight: Tensor, part: slice | None) -> None:
        self.params.append(p)
        self.targets.append(cut(p, part))
        self.exp_avgs.append(cut(state["exp_avg"], part))
        self.exp_avg_sqs.append(cut(state["exp_avg_sq"], part))
        self.sources.append((weight, part))
        if not self.direct:
            self.weights.append(cut(weight, part))
        if self.room is not None:
            target = self.targets[-1]
            self.wide.append(self.room.as_strided(target.shape, target.stride(), self.used))
            self.used += target.numel()
        strides = {tensors[-1].stride() for tensors in (self.targets, self.exp_avgs, self.exp_avg_sqs)}
        self.alike &= self.room is not None and len(strides) == 1

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        grads: list[Any] = [
            w.grad if part is None else cut(w.grad, part) for w, part in self.sources if w.grad is not None
        ]
        if self.wide:
            torch._foreach_copy_(self.wide, grads)
            grads = self.wide
        elif not self.direct:
            grads = [torch.empty_like(t).copy_(g) for t, g in zip(self.targets, grads, strict=True)]
        lists = (self.targets, grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
        fused_adamw(*lists, self.group, found_inf, grad_scale, self.alike)
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
    alike: bool = False,
) -> None:
    """Torch's fused AdamW kernel on lists of tensors of one device and type; `steps` count this step already."""
    device = params[0].device
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    same = None if alike else SameLayout(*lists)
    torch._fused_adamw_(
        *(lists if same is None else same.lists),
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
    if same is not None:
        same.write_back()


class BoundedAdam(torch.optim.Optimizer):
    """The inner rule of Algorithm 1: Adam with an AMSGrad-type bound, no bias correction, and a last momentum step.

    Lines 9 to 13: m and v are Adam's moments, v~ = max(v, ||v~_previous||_max) with the largest element of the
    previous v~ as a scalar bound, and theta -= lr * m / sqrt(v~ + eps). Line 16, once at the end of the round:
    theta -= lr * beta1 / (1 - beta1) * m / sqrt(v + eps).
    """

    skips_on_device = True

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
                taken = torch.as_tensor(True if found_inf is None else found_inf == 0).to(p.device)
                p.sub_(torch.where(taken, change, 0))
                m.copy_(torch.where(taken, new_m, m))
                v.copy_(torch.where(taken, new_v, v))
                state["bound"].copy_(torch.where(taken, bounded.max(), state["bound"]))

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
