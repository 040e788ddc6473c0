"""Norms and gated products that keep little for the backward pass and compute it again there.

Fused kernels do the same on a GPU (Liger's, in Triton); this runs on every device, and gives the same numbers as
without. What is computed twice is elementwise; no matrix product is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

PIECE_TOKENS = 256


class _GatedLinear(torch.autograd.Function):
    """`linear(silu(gate) * up, weight)`, which keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, needs_weight = ctx.needs_input_grad
        grad_weight = None
        if needs_weight:
            product = functional.silu(gate).mul_(up)
            grad_weight = grad.flatten(0, -2).t() @ product.flatten(0, -2)
            del product
        if not (needs_gate or needs_up):
            return None, None, grad_weight
        # The gradient of the product becomes that of up, token by token, as the last thing that is done with it.
        grad_up = grad @ weight
        grad_gate = torch.empty_like(gate) if needs_gate else None
        flat = [t.flatten(0, -2) for t in (gate, up, grad_up)]
        for start in range(0, flat[0].shape[0], PIECE_TOKENS):
            rows = slice(start, start + PIECE_TOKENS)
            some_gate, some_up, some_grad = (t[rows] for t in flat)
            if grad_gate is not None:
                change = torch.ops.aten.silu_backward(some_grad * some_up, some_gate)
                grad_gate.flatten(0, -2)[rows] = change
            if needs_up:
                some_grad.mul_(functional.silu(some_gate))
        return grad_gate, grad_up if needs_up else None, grad_weight


class LeanActivations:
    """Makes a model's RMS norms and SiLU-gated feed-forward layers keep less, while it is installed.

    A norm keeps its input as it is, instead of an fp32 copy and, if its weight trains, the normalized input; a
    feed-forward layer keeps gate and up, instead of these, the activated gate and, if `down_proj` trains, the product.
    In evaluation, under autocast and where `down_proj` is no plain linear layer (adapters), nothing changes.

    Args:
        model: A transformers model whose feed-forward layers compute what LLaMA's do, not yet wrapped by PEFT.

    Raises:
        ValueError: If it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._changed: list[Any] = []
        for module in model.modules():
            if _is_gated(module):
                self._change(module, _feed_forward)
            elif type(module).__name__.endswith("RMSNorm"):
                self._change(module, _norm)
        if not any(_is_gated(module) for module in self._changed):
            raise ValueError("lean_activations: this model has no feed-forward layer like LLaMA's, gated by SiLU")

    def remove(self) -> None:
        """Give the modules their own forward passes back."""
        for module in self._changed:
            del module.forward

    def _change(self, module: Any, forward: Any) -> None:
        module.forward = partial(forward, module)
        self._changed.append(module)


def _is_gated(module: nn.Module) -> bool:
    """Whether a module's forward pass is compiled from the same words as that of LLaMA's feed-forward layer."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    own, known = type(module).forward.__code__, LlamaMLP.forward.__code__
    same = own.co_code == known.co_code and own.co_names == known.co_names
    activation = type(getattr(module, "act_fn", None)).__name__
    return same and activation in ("SiLU", "SiLUActivation")


def _norm(module: Any, hidden: Tensor) -> Tensor:
    own = partial(type(module).forward, module)
    if not (torch.is_grad_enabled() and module.training and (hidden.requires_grad or module.weight.requires_grad)):
        return own(hidden)
    kept: Tensor = checkpoint(own, hidden, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return kept


def _feed_forward(module: Any, hidden: Tensor) -> Tensor:
    down = module.down_proj
    is_plain = type(down) is nn.Linear and down.bias is None
    if not (torch.is_grad_enabled() and module.training and is_plain) or torch.is_autocast_enabled(hidden.device.type):
        own: Tensor = type(module).forward(module, hidden)
        return own
    found: Tensor = _GatedLinear.apply(module.gate_proj(hidden), module.up_proj(hidden), down.weight)
    return found
