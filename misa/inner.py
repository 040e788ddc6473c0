"""What happens to the active weights inside a round: the inner optimizers this package adds to torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW for a fixed set of tensors, called without the per-step bookkeeping around it.

    The kernel, the state and the result are those of `torch.optim.AdamW(fused=True)`, bit for bit. The lists of
    tensors are built once, because the active set does not change within a round; a tensor without a gradient is
    left out of a step.
    """

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
        super().__init__(params, fused=True, **defaults)
        self._lists: list[tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = []

    def _prepare(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(
                        step=torch.zeros((), dtype=torch.float32, device=p.device),
                        exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                        exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                    )
        self._lists = [_lists(self.state, group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient; none at all where `found_inf` holds 1."""
        if not self._lists:
            self._prepare()
        for group, lists in zip(self.param_groups, self._lists, strict=True):
            grads: list[Any] = [p.grad for p in group["params"]]
            if any(g is None for g in grads):
                lists = _lists(self.state, [p for p in group["params"] if p.grad is not None])
                grads = [g for g in grads if g is not None]
            if grads:
                fused_adamw(*lists, grads, group, found_inf)


def _lists(
    state: dict[Any, dict[str, Tensor]], params: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [p.detach() for p in params],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [state[p]["step"] for p in params],
    )


def fused_adamw(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    grads: list[Tensor],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
) -> None:
    """Torch's fused AdamW kernel on lists of fp32 tensors of one device."""
    torch._foreach_add_(steps, 1.0)
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
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights without a master copy: arithmetic in fp32, results rounded stochastically.

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
    def update(self, found_inf: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient; none at all where `found_inf` holds 1."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"] = torch.zeros_like(p, dtype=self._moments_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self._moments_dtype)
                wide = [t.detach().float() for t in (p, state["exp_avg"], state["exp_avg_sq"])]
                weight, exp_avg, exp_avg_sq = ([t] for t in wide)
                fused_adamw(weight, exp_avg, exp_avg_sq, [state["step"]], [p.grad.float()], group, found_inf)
                for narrow, value in zip((p, state["exp_avg"], state["exp_avg_sq"]), wide, strict=True):
                    if narrow.dtype == torch.bfloat16:
                        round_stochastically_(narrow, value, self._generator)


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
    def update(self, found_inf: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient; none at all where `found_inf` holds 1."""
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
                m, v, grad = state["exp_avg"], state["exp_avg_sq"], p.grad
                keep = torch.zeros((), device=p.device) if found_inf is None else found_inf
                new_m = m.lerp(grad, 1 - beta1)
                new_v = torch.addcmul(v * beta2, grad, grad, value=1 - beta2)
                bounded = torch.maximum(new_v, state["bound"])
                change = group["lr"] * new_m / (bounded + group["eps"]).sqrt() + group["lr"] * group["weight_decay"] * p
                good = keep == 0
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
