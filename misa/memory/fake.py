"""Models of full size without their memory: fake tensors that carry shapes and types, made to behave as on CUDA.

Fake tensors on the CPU run the whole of a training step: modules, autograd, activation checkpointing, PEFT, optimizers.
What differs from CUDA is put right here, each point with its reason:

- attention goes to PyTorch's fused kernel with no mask, which saves queries, keys, values, output and the log of the
  sums, as FlashAttention-2 does. transformers would have to read the mask to leave it out, which fake tensors do not
  allow, so it would build one and repeat keys and values;
- optimizers widen gradients in pieces of the size they use on an accelerator;
- dropout keeps a mask of one byte an element, as CUDA's fused kernel does; the CPU's keeps one of the input's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from misa import inner
from misa.models import torch_dtype

#: Name under which the attention of these models is registered with transformers. Without a mask function of the same
#: name, transformers makes no mask; and a name with "flash" in it would be looked for on the hub.
ATTENTION = "misa_fused_causal"


class FakeMode(FakeTensorMode):
    """Fake tensors that answer yes where a program asks for one truth value, as an optimizer asks for finite gradients.

    Real tensors are admitted beside them: scores and draws of a block method have values.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes and types alone."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _prep_args_for_hash(self, result: list[Any], args: Any, state: Any, id_hashed_objects: list[Any]) -> None:
        """Write what an operation's result depends on into `result`, as the key of PyTorch's cache of results.

        PyTorch's own way asks each tensor for all that a tensor can be, which takes a third of the time of a step. The
        tensors here are dense, real and of known size; what is anything else is left to it.
        """
        if type(args) is dict:
            result.append(tuple(args))
            args = tuple(args.values())
        result.append(len(args))
        for arg in args:
            if type(arg) is FakeTensor and arg.fake_mode is self and arg.constant is None:
                dtype = arg.dtype
                if arg.layout is torch.strided and not dtype.is_complex and not arg.is_quantized:
                    place = (arg.fake_device, arg.storage_offset(), arg.untyped_storage().nbytes())
                    result += (dtype, arg.shape, arg.stride(), *place, arg.requires_grad, arg.is_inference())
                    continue
            if type(arg) in (list, tuple, dict):
                result.append(type(arg))
                self._prep_args_for_hash(result, arg, state, id_hashed_objects)
            else:
                super()._prep_args_for_hash(result, (arg,), state, id_hashed_objects)


def build_model(config: Any, dtype: str) -> Any:
    """Make a causal language model, of fake tensors inside a `FakeMode`, else of real ones.

    Args:
        config: A transformers configuration.
        dtype: Precision of the weights: bfloat16, float16 or float32.

    Returns:
        A transformers model in training mode whose attention is `ATTENTION`.

    Raises:
        KeyError: With `ATTENTION`, for a model whose attention cannot be replaced.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, fused_causal_attention)
    model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), attn_implementation=ATTENTION)
    return model.train()


def fused_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention by PyTorch's fused kernel; keys and values are shared by groups of heads, not repeated.

    Args:
        module: The attention module.
        query: `[batch, query heads, tokens, head size]`.
        key: `[batch, key heads, tokens, head size]`.
        value: As `key`.
        attention_mask: Ignored; batches here have no padding.
        scaling: Factor of the scores.
        dropout: Share of the scores dropped.

    Returns:
        The output, `[batch, tokens, query heads, head size]`, and no weights.
    """
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def wrapping(mode: FakeTensorMode) -> Iterator[None]:
    """Let a method wrap a model of fake tensors inside.

    PEFT moves its adapters with `Module.to`, which cannot swap fake tensors, and need not: they are made on the same
    device. New parameters are made in fp32, as PEFT makes them in the end.
    """
    move = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    try:
        with mode:
            yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Inside, optimizers cut their work into the pieces they use on an accelerator, and dropout is the fused one."""
    pieces, dropout = dict(inner.CHUNK_NUMEL), functional.dropout
    inner.CHUNK_NUMEL.clear()
    functional.dropout = _fused_dropout
    try:
        yield
    finally:
        inner.CHUNK_NUMEL.update(pieces)
        functional.dropout = dropout


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input
