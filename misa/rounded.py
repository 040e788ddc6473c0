"""AdamW on low-precision weights without master copies: what is lost by rounding is lost at random, not for good."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from misa.inner import CHUNK_NUMEL, cut, fused_adamw, parts

OTHER_CHUNK_NUMEL = 1 << 21  # elements updated at a time on an accelerator; a dozen copies of them live for a moment
BLOCK = 256  # 8-bit moments that share a scale
_LEAST_NUMEL = 4096  # smaller tensors keep fp32 moments, as in bitsandbytes and torchao
_DECADES = 7  # that 8-bit codes span below the largest moment of a block; twice as many for squares
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW without master copies: arithmetic in fp32, results rounded stochastically.

    A weight is widened piece by piece, updated by the fused kernel and rounded back up or down with the probability
    that makes the rounding right on average, so that updates below the spacing of bf16 are not lost. What is wide lives
    for one piece at a time.

    Args:
        params: Weights of bf16 or fp32, or groups of them.
        generator: Of the rounding, on the CPU. An accelerator draws by itself, since copying what rounds every weight
            would take longer than all else, from a seed that this generator gives each step.
        moments: How moments are kept between steps: `"fp32"`; `"bf16"`, rounded in the same way; or `"8bit"`, as codes
            of a logarithmic scale (after the blockwise quantization of arXiv 2110.02861), rounded in the same way, with
            one fp32 scale for each `BLOCK` elements.
        **defaults: `lr`, `betas`, `eps` and `weight_decay` of groups that have none of their own.
    """

    skips_on_device = True

    def __init__(
        self, params: Iterable[Any], *, generator: torch.Generator, moments: str = "fp32", **defaults: Any
    ) -> None:
        super().__init__(params, defaults)
        self._generator = generator
        self._generators: dict[torch.device, torch.Generator] = {}
        self._moments = moments

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """One step on every tensor that has a gradient; arguments as for `FusedAdamW.update`."""
        params = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        for device in dict.fromkeys(p.device for p in params if not p.is_cpu):
            if device not in self._generators:
                self._generators[device] = torch.Generator(device)
            seed = torch.randint(1 << 62, (), device="cpu", generator=self._generator)
            self._generators[device].manual_seed(int(seed))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not (state := self.state[p]):
                    state.update(self._make_state(p))
                state["step"] += 1
                levels = {
                    name: _levels(name, p.device) for name in ("exp_avg", "exp_avg_sq") if f"{name}_scale" in state
                }
                length = min(CHUNK_NUMEL.get(p.device.type, OTHER_CHUNK_NUMEL), OTHER_CHUNK_NUMEL)
                in_pieces = all(t.is_contiguous() for t in (p, state["exp_avg"], state["exp_avg_sq"]))
                for part in parts(p, length if in_pieces else None):
                    self._update_part(p, part, state, group, levels, found_inf, grad_scale)
                if found_inf is not None:
                    state["step"] -= found_inf.to(p.device)

    def _make_state(self, p: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        in_codes = self._moments == "8bit" and p.is_contiguous()
        in_codes = in_codes and p.numel() >= _LEAST_NUMEL and p.numel() % BLOCK == 0
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = torch.uint8 if in_codes else _DTYPES.get(self._moments, torch.float32)
            state[name] = torch.zeros_like(p, dtype=dtype)
            if in_codes:
                state[name].fill_(_zero_code(name))
                state[f"{name}_scale"] = torch.zeros(p.numel() // BLOCK, dtype=torch.float32, device=p.device)
        return state

    def _update_part(
        self,
        p: Tensor,
        part: slice | None,
        state: dict[str, Tensor],
        group: dict[str, Any],
        levels: dict[str, Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        generator = self._generators.get(p.device, self._generator)
        narrow = {name: cut(tensor, part) for name, tensor in (("p", p.detach()), *_moments(state))}
        scales = {name: cut(state[f"{name}_scale"], _of_blocks(part)) for name in levels}
        wide = {
            name: _decode(tensor, scales[name], levels[name]) if name in levels else tensor.float()
            for name, tensor in narrow.items()
        }
        lists = ([wide["p"]], [cut(p.grad, part).float()], [wide["exp_avg"]], [wide["exp_avg_sq"]], [state["step"]])
        fused_adamw(*lists, group, found_inf, grad_scale)
        del lists
        for name, out in narrow.items():
            value = wide.pop(name)
            if name in levels:
                codes, scale = _encode(value, levels[name], name == "exp_avg_sq", generator)
                if found_inf is not None:  # a skipped step leaves the codes alone; rounded again, they might move
                    codes = torch.where(found_inf.to(out.device) == 0, codes, out)
                out.copy_(codes)
                scales[name].copy_(scale)
            elif out is not value:
                round_stochastically_(out, value, generator)


def _moments(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, state[name]) for name in ("exp_avg", "exp_avg_sq")]


def _of_blocks(part: slice | None) -> slice | None:
    return None if part is None else slice(part.start // BLOCK, part.stop // BLOCK)


def round_stochastically_(out: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write fp32 `value` into bf16 `out`, rounding up with a probability equal to the fraction cut off.

    A bf16 number is the upper half of an fp32 number's bits, so adding a uniform 16-bit integer before cutting the
    lower half does it. Non-finite values are copied as they are.
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=generator.device, generator=generator)
    rounded = noise.add_(value.contiguous().view(torch.int32)).bitwise_and_(-65536)
    out.copy_(torch.where(torch.isfinite(value), rounded.view(torch.float32), value))


def _zero_code(name: str) -> int:
    return 127 if name == "exp_avg" else 0


def _levels(name: str, device: torch.device) -> Tensor:
    """Values of the codes, ascending, the largest 1: equal ratios between them, and zero."""
    zero = torch.zeros(1, dtype=torch.float32, device=device)
    if name == "exp_avg_sq":
        return torch.cat([zero, torch.logspace(-2 * _DECADES, 0, 255, dtype=torch.float32, device=device)])
    positive = torch.logspace(-_DECADES, 0, 127, dtype=torch.float32, device=device)
    return torch.cat([-positive.flip(0), zero, positive])


def _decode(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    values = levels[codes.reshape(-1, BLOCK).int()]
    return values.mul_(scale.unsqueeze(1)).view_as(codes)


def _encode(value: Tensor, levels: Tensor, is_square: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes, right on average, and scales.

    The square of a gradient never becomes zero unless it is: the moment it divides would be a step without bound.
    """
    blocks = value.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    scaled = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    low = torch.bucketize(scaled, levels, right=True, out_int32=True).sub_(1).clamp_(0, len(levels) - 2)
    below = levels[low]
    share = (scaled - below).div_(levels[low + 1].sub_(below))
    noise = torch.rand(share.shape, dtype=torch.float32, device=generator.device, generator=generator)
    codes = low.add_(noise < share)
    if is_square:
        codes = torch.maximum(codes, (scaled > 0).int())
    return codes.to(torch.uint8).view_as(value), scale
