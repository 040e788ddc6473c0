"""What keeps the processes of a data parallel run the same: equal weights, equal draws, and a check once a round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A tensor's bits as whole numbers, by bytes of an element.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_same_model(named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse to train where the processes hold different models.

    Raises:
        ValueError: If names, shapes or types of the parameters differ between processes.
    """
    text = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in named])
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    if different := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise ValueError(
            f"names, shapes or types of the parameters differ between process 0 and {_listed(different)}: data "
            "parallel training needs the same model on every process (pipeline parallel training is not supported)"
        )


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give every process the tensors of process 0."""
    for t in tensors:
        # Of an expanded buffer what is really there.
        held = t.detach()[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
        whole = held if t.is_contiguous() else held.clone(memory_format=torch.contiguous_format)
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
        if whole.data_ptr() != held.data_ptr():
            held.copy_(whole)


def from_first(value: Any) -> Any:
    """The value that process 0 has: anything that can be pickled."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(call: Callable[[], Any]) -> Any:
    """Call something on process 0 alone; all processes get what it returns, or the exception it raises."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return call()
    value = error = None
    if dist.get_rank() == 0:
        try:
            value = call()
        except (ValueError, OSError) as raised:
            error = raised
    value, error = from_first((value, error))
    if error is not None:
        raise error
    return value


def mean_of_measured(measured: dict[int, float], num_blocks: int, device: torch.device) -> dict[int, float]:
    """Mean over the processes that have a value, for every block of which any has.

    Args:
        measured: A value for each block that was measured here, by its index.
        num_blocks: Number of all blocks.
        device: Where the processes exchange tensors.
    """
    sums = torch.zeros(2, num_blocks, dtype=torch.float64)
    for i, value in measured.items():
        sums[0, i], sums[1, i] = value, 1
    sums = sums.to(device)
    dist.all_reduce(sums)
    return {i: total / count for i, (total, count) in enumerate(sums.T.tolist()) if count}


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """A sum over the bits of each tensor, int64: equal for equal tensors, and different if one element changed."""
    sums = [t.detach().contiguous().view(_WORDS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack([x.to(sums[0].device) for x in sums])


def require_equal(named: Sequence[tuple[str, Tensor]]) -> None:
    """Stop where the weights of the processes are no longer the same.

    Raises:
        RuntimeError: On every process, naming the first weight that differs and the processes that stand alone.
    """
    own = fingerprints([p for _, p in named])
    high, low = own.clone(), own.clone()
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    differ = (high != low).nonzero().flatten().tolist()
    if not differ:
        return
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, own[differ[0]].item())
    usual = max(all_of_them, key=all_of_them.count)
    alone = [rank for rank, value in enumerate(all_of_them) if value != usual]
    raise RuntimeError(
        f"the weights of the processes have drifted apart: {len(differ)} of {len(named)} parameters differ, first "
        f"{named[differ[0]][0]}, on {_listed(alone)}. Something changed them outside the optimizer on some processes "
        "only, or a gradient was used before it was reduced; start again from the last checkpoint"
    )


def _listed(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
