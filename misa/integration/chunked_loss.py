"""A loss that never holds the logits of all tokens: head and cross-entropy in one, a few hundred tokens at a time.

PyTorch has this as `torch.nn.functional.linear_cross_entropy`. It is not used, because (torch 2.13) its loss of bf16
inputs is a bf16 number, added up in bf16 over the chunks, and on a CPU it copies the whole head to fp32 first. Here
the loss is fp32, nothing larger than a chunk of logits is made, and all devices run the same operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_TOKENS = 256
LOSSES = ("full", "chunked")
IGNORED = -100

# Factors and caps between head and loss; a model that has one computes other logits than its head does.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden @ weight.T`; the gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, chunk: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            counted = (targets[rows] != ignored).unsqueeze(1)
            index = targets[rows].unsqueeze(1).where(counted, 0)
            values = (hidden[rows] @ weight.t()).float()
            # Not torch.logsumexp, which would make a second copy of the chunk.
            values.sub_(values.amax(dim=1, keepdim=True))
            own = values.gather(1, index)
            values.exp_()
            sums = values.sum(dim=1, keepdim=True)
            total += ((sums.log() - own) * counted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            values.div_(sums).scatter_add_(1, index, torch.full_like(own, -1.0)).mul_(counted)
            grad = values.to(weight.dtype)
            del values
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[rows].to(weight.dtype))
            del grad
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_hidden, of_weight = ctx.saved_tensors
        # In place: these are nobody else's, and a second backward pass through them is refused by autograd.
        return (*(None if g is None else g.mul_(grad) for g in (of_hidden, of_weight)), None, None, None)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int = IGNORED, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of the cross-entropies of a linear head, without the logits of all tokens.

    At most `chunk_tokens` rows of logits exist at a time: 6 bytes an element for bf16 weights, 4 for fp32 ones. The
    head's gradient, if it has one, is added up in the type of the weight.

    Args:
        hidden: Input of the head, `[tokens, features]`.
        weight: The head's weight, `[classes, features]`.
        targets: Class of each token, `[tokens]`.
        ignored: Target that does not count.
        chunk_tokens: Tokens whose logits exist at once.

    Returns:
        The sum, in nats, fp32.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, ignored, chunk_tokens)
    return total


class ChunkedLoss:
    """Computes the training loss of a causal language model in chunks, while it is installed.

    In training mode with labels, the head hands on its input, the loss is computed from that and from the head's
    weight, and the output's `logits` are None. In evaluation and without labels nothing changes.

    Args:
        model: A transformers causal language model, not yet wrapped by PEFT.
        chunk_tokens: Tokens whose logits exist at once. Default 256.

    Raises:
        ValueError: If the model has no plain linear head, or changes the logits between head and loss.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int = CHUNK_TOKENS) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if type(head) is not nn.Linear or head.bias is not None or not hasattr(model, "loss_function"):
            raise ValueError("loss=chunked: needs a causal language model whose head is a linear layer without bias")
        changed = [name for name in _LOGIT_CHANGES if getattr(model.config, name, None) not in (None, 1, 1.0)]
        if changed:
            raise ValueError(f"loss=chunked: this model changes its logits ({changed[0]}); use loss=full")
        self._model: Any = model
        self._head: Any = head
        self._chunk = chunk_tokens
        self._on = False
        self._own_loss: Callable[..., Tensor] = model.loss_function  # type: ignore[assignment]
        self._own_forward = head.forward
        head.forward = self._head_forward  # type: ignore[method-assign]
        self._model.loss_function = self._compute
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Give the model its own head and loss back."""
        for handle in self._handles:
            handle.remove()
        del self._head.forward
        self._model.loss_function = self._own_loss

    def _before(self, model: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
        self._on = model.training and arguments.get("labels") is not None

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._on:
            output.logits = None
        self._on = False

    def _head_forward(self, hidden: Tensor) -> Tensor:
        return hidden if self._on else self._own_forward(hidden)

    def _compute(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The loss of transformers' `ForCausalLMLoss`, with the same arguments; `logits` are the head's input."""
        if not self._on:
            others |= {"ignore_index": ignore_index, "shift_labels": shift_labels}
            return self._own_loss(logits, labels, vocab_size, num_items_in_batch, **others)
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        hidden = logits.reshape(-1, logits.shape[-1])
        total = linear_cross_entropy(hidden, self._head.weight, targets, ignore_index, self._chunk)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if torch.is_tensor(count) else count)
