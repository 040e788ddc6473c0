"""Optimizer state shared out in data parallel training: each process keeps that of its own rows of every weight.

Weights and gradients are whole on every process. A process updates its rows, and then all exchange them, which is the
first stage of ZeRO (arXiv 1910.02054) for the blocks that are on. The rows are those of `torch.chunk`, as with FSDP2,
so that what is saved can be loaded onto another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from misa.distributed.sharded import is_sharded

BUCKET_BYTES = 25 * 2**20  # weights exchanged at a time; a larger one goes by itself


class Rows:
    """The rows of this process.

    Args:
        device_type: Where the weights lie.
    """

    def __init__(self, device_type: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._mesh = init_device_mesh(device_type, (self._size,))

    def local_part(self, whole: Tensor) -> Tensor:
        """The rows of a weight, or of its gradient, that are updated here: a view; a tensor without rows is whole."""
        return self._part(whole, self._rank)

    def like_parameter(self, value: Any, param: Tensor) -> Any:
        """Wrap state of the rows of a parameter as a DTensor of its shape; other values as they are."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        from torch.distributed.tensor import DTensor, Shard

        stride = torch.empty(param.shape, device="meta").stride()
        return DTensor.from_local(value, self._mesh, [Shard(0)], run_check=False, shape=param.shape, stride=stride)

    def part_for(self, value: Any, param: Tensor) -> Any:
        """The rows of saved state, whether it was saved whole or in parts."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.to_local() if is_sharded(value) else self.local_part(value)  # type: ignore[attr-defined]

    @torch.no_grad()
    def gather(self, params: Iterable[Tensor]) -> None:
        """Give every process the rows that the others have updated."""
        for bucket in _buckets([p.detach() for p in params if p.ndim]):
            # Equal lengths, as the collective asks for: the last processes may have fewer rows, or none.
            lengths = [self._num_rows(p) * p[0].numel() for p in bucket]
            own = bucket[0].new_zeros(sum(lengths))
            for p, room in zip(bucket, own.split(lengths), strict=True):
                part = self.local_part(p).reshape(-1)
                room[: part.numel()].copy_(part)
            for rank, theirs in enumerate(self._exchange(own)):
                for p, room in zip(bucket, theirs.split(lengths), strict=True):
                    part = self._part(p, rank)
                    if rank != self._rank:
                        part.copy_(room[: part.numel()].view(part.shape))

    def whole(self, packed: Any) -> Any:
        """The same nested containers with shared tensors made whole on the CPU; all processes call this together."""
        if isinstance(packed, dict):
            return {key: self.whole(value) for key, value in packed.items()}
        if not is_sharded(packed):
            return packed
        local = packed.to_local()
        own = local.new_zeros(self._num_rows(packed), *packed.shape[1:])
        own[: local.shape[0]].copy_(local)
        return self._exchange(own.view(-1)).view(-1, *packed.shape[1:])[: packed.shape[0]].cpu()

    def _exchange(self, own: Tensor) -> Tensor:
        """A flat tensor of each process, `[processes, length]`; as bytes, since not every type can travel."""
        found = own.new_empty(self._size, own.numel())
        dist.all_gather(list(found.view(torch.uint8)), own.view(torch.uint8))
        return found

    def _num_rows(self, whole: Tensor) -> int:
        """Rows of a process; the last ones may have fewer."""
        return -(-whole.shape[0] // self._size)

    def _part(self, whole: Tensor, rank: int) -> Tensor:
        whole = whole.detach()
        if not whole.ndim:
            return whole
        num = self._num_rows(whole)
        return whole[rank * num : (rank + 1) * num]


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that travel together."""
    filling: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        bucket = filling.setdefault(p.dtype, [])
        if bucket and sum(q.nbytes for q in bucket) + p.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = filling[p.dtype] = []
        bucket.append(p)
    yield from (bucket for bucket in filling.values() if bucket)
