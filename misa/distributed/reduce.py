"""Averaging gradients over processes during the backward pass: only those of watched parameters travel.

Gradients are joined into flat buckets. A bucket is on its way as soon as its last gradient is ready, while the backward
pass goes on; when the pass ends, all have arrived. All processes send the buckets in one order, whatever order their
gradients are ready in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel

Then = Callable[[Tensor], None]


@dataclass(eq=False)
class _Bucket:
    """Parameters whose gradients travel together."""

    params: list[Tensor]
    always: bool  # in every backward pass, also where gradients are only accumulated
    waiting: set[Tensor] = field(default_factory=set)
    flat: Tensor | None = None
    work: Any = None

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)


class _Handle:
    """Ends the watch over some parameters."""

    def __init__(self, exchange: Exchange, params: Sequence[Tensor], handles: list[Any]) -> None:
        self._exchange, self._params, self._handles = weakref.ref(exchange), params, handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        if (exchange := self._exchange()) is not None:
            exchange.forget(self._params)


class Exchange:
    """Averages the gradients of watched parameters over the processes of a group.

    Args:
        order: All parameters in the order of the model; their gradients are ready in about the reverse order.
        bucket_bytes: Largest bucket; a larger gradient is one of its own, and travels without a copy.

    Attributes:
        sync: Whether the backward pass of the forward pass at hand is to be reduced.
        held: Whether reducing is held back until `settle`, or until a pass for which it is not.
        off: Whether something else reduces.
        ordered: Whether what follows a gradient has to happen in one order on all processes, because it sends something
            itself or draws random numbers.
    """

    def __init__(self, order: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.sync = True
        self.held = False
        self.off = False
        self.ordered = False
        self._bucket_bytes = bucket_bytes
        self._position = {p: i for i, p in enumerate(order)}
        self._then: dict[Tensor, Then | None] = {}
        self._always: set[Tensor] = set()
        self._plan: list[_Bucket] | None = None
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._pass: list[_Bucket] = []  # what is sent in the backward pass at hand, in order
        self._num_sent = self._num_arrived = 0
        self._task = -1  # the backward pass at hand
        self._behind = True  # whether there may be gradients, here or elsewhere, that have not been reduced
        self._missing: list[tuple[Tensor, Tensor]] = []
        self._used: Tensor | None = None

    def watch(self, params: Sequence[Tensor], then: dict[Tensor, Then], always: bool = False) -> list[_Handle]:
        """Reduce the gradients of parameters from now on.

        Args:
            params: The parameters.
            then: What to call with a parameter when its gradient has been reduced.
            always: Reduce in every backward pass, also where gradients are only accumulated.
        """
        exchange = weakref.ref(self)

        def ready(p: Tensor) -> None:
            if (own := exchange()) is not None:
                own._ready(p)

        handles = []
        for p in params:
            self._position.setdefault(p, len(self._position))
            self._then[p] = then.get(p)
            handles.append(p.register_post_accumulate_grad_hook(ready))
        if always:
            self._always.update(params)
        self._plan = None
        return [_Handle(self, params, handles)]

    def forget(self, params: Iterable[Tensor]) -> None:
        """End the watch over parameters."""
        for p in params:
            self._then.pop(p, None)
            self._always.discard(p)
        self._plan = None

    def knows(self, p: Tensor) -> bool:
        """Whether a parameter is among those that may be watched."""
        return p in self._position

    def settle(self) -> None:
        """Before a step: reduce what was accumulated and not reduced yet.

        Also where no gradient came in this process at all: others, which have some, wait for it.
        """
        if self._behind and not self.off:
            self._begin(reducing=True)
            self._end()
        self._behind = True

    # ---- one backward pass -----------------------------------------------------------------------------------------

    def _ready(self, p: Tensor) -> None:
        """A gradient is complete in this process."""
        if self.off:
            if p in self._always and (then := self._then.get(p)) is not None:
                then(p)
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._begin(reducing=self.sync and not self.held)
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        self._bucket_of[p].waiting.discard(p)
        while self._num_sent < len(self._pass) and not self._pass[self._num_sent].waiting:
            self._send()

    @torch.no_grad()
    def _begin(self, reducing: bool) -> None:
        self._arrive()  # of a pass that was cut off by an error, or by one inside it
        if self._plan is None:
            self._plan = self._make_plan()
        for bucket in self._plan:
            bucket.waiting = set(bucket.params)
        self._pass = [bucket for bucket in self._plan if reducing or bucket.always]
        self._num_sent = self._num_arrived = 0
        self._behind = not reducing

    @torch.no_grad()
    def _end(self) -> None:
        """The backward pass is over: send what waits for gradients that did not come, and wait for all."""
        while self._num_sent < len(self._pass):
            self._send()
        self._arrive()
        if self._missing and self._used is not None:
            # The one read of the device, and only where a parameter has no gradient in this process.
            used = dict(zip((p for b in self._pass for p in b.params), self._used.tolist(), strict=True))
            for p, average in self._missing:
                if used[p] > 0:
                    p.grad = average.clone()
                    self._follow(p)
        self._missing, self._used, self._task, self._pass = [], None, -1, []

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._pass[self._num_sent]
        self._num_sent += 1
        last = self._num_sent == len(self._pass)
        only = bucket.params[0].grad if len(bucket.params) == 1 and not self.ordered else None
        if only is not None and only.is_contiguous() and not last and only.nbytes >= self._bucket_bytes:
            bucket.flat = only.view(-1)
        else:
            pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket.params]
            if last or self.ordered:  # which parameters have a gradient in any process
                told = [bucket] if self.ordered else self._pass
                has = [float(p.grad is not None) for b in told for p in b.params]
                pieces.append(torch.tensor(has, dtype=pieces[0].dtype, device=pieces[0].device))
            bucket.flat = torch.cat(pieces)
        bucket.flat.div_(dist.get_world_size())
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        while self._num_arrived < self._num_sent - 1 and (
            self.ordered or self._pass[self._num_arrived].work.is_completed()
        ):
            self._take()

    def _arrive(self) -> None:
        """Wait for what was sent."""
        while self._num_arrived < self._num_sent:
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        """Wait for the next bucket, and put its averages into the gradients."""
        bucket = self._pass[self._num_arrived]
        self._num_arrived += 1
        bucket.work.wait()
        flat, bucket.flat, bucket.work = bucket.flat, None, None
        assert flat is not None
        *pieces, used = flat.split([*(p.numel() for p in bucket.params), flat.numel() - bucket.numel])
        if used.numel():
            self._used = used
        for i, (p, piece) in enumerate(zip(bucket.params, pieces, strict=True)):
            if p.grad is None:
                if not self.ordered:
                    self._missing.append((p, piece.view(p.shape)))
                elif used[i] > 0:
                    p.grad = piece.view(p.shape).clone()
                    self._follow(p)
                continue
            if piece.data_ptr() != p.grad.data_ptr():
                p.grad.copy_(piece.view(p.shape))
            self._follow(p)

    def _follow(self, p: Tensor) -> None:
        if (then := self._then.get(p)) is not None:
            then(p)

    def _make_plan(self) -> list[_Bucket]:
        """Buckets of gradients of one type, in the order in which a backward pass fills them."""
        buckets: list[_Bucket] = []
        filling: dict[Any, _Bucket] = {}
        for p in sorted(self._then, key=self._position.__getitem__, reverse=True):
            kind = (p.dtype, p.device, p in self._always)
            bucket = filling.get(kind)
            if bucket is None or (bucket.numel + p.numel()) * p.element_size() > self._bucket_bytes:
                bucket = filling[kind] = _Bucket([], p in self._always)
                buckets.append(bucket)
            bucket.params.append(p)
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.params}
        return buckets
