"""The processes that train one model together, as the optimizer sees them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from misa.distributed import agree, sharded
from misa.distributed.reduce import Exchange
from misa.distributed.rows import Rows
from misa.distributed.sharded import Sharding, is_sharded, settle_types
from misa.distributed.wrapped import active_wrapper, rest, retire
from misa.gradients import Numbers, each
from misa.inner import BoundedAdam

if TYPE_CHECKING:
    from misa.optimizer.importance import Array
    from misa.optimizer.sampling import BlockSampler
    from misa.optimizer.settings import Settings
    from misa.parameters import Entry


class Workers:
    """What an optimizer asks of the other processes. Alone, it asks nothing, and every method costs nothing.

    With an initialized process group of several processes (`torchrun`), training is data parallel: weights start as
    process 0 has them, the gradients of active blocks are averaged, and all draw the same blocks. With parameters
    sharded by `fully_shard`, FSDP2 reduces the gradients and only norms and draws are left to agree on. With
    `shard_state` each process of a data parallel run keeps the state of its rows of every active weight.

    Args:
        source: The model, or its `(name, parameter)` pairs.
        settings: The optimizer's settings.
        copied: Whether the optimizer is a copy, whose weights are equal already.

    Attributes:
        rank: Number of this process; 0 if it is alone.
        size: Number of processes.

    Raises:
        ValueError: If the processes hold different models, if parameters are sharded in different ways, or for settings
            that sharded parameters do not admit.
    """

    def __init__(
        self, source: nn.Module | Iterable[tuple[str, Tensor]], settings: Settings, *, copied: bool = False
    ) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        named = source.named_parameters() if isinstance(source, nn.Module) else source
        # Quantized weights of other packages, which never train, are taken as they are.
        self._named = [(name, p) for name, p in named if type(p) in (nn.Parameter, Tensor) or is_sharded(p)]
        self._sharding: Sharding | None = None
        self._exchange: Exchange | None = None
        self._rows: Rows | None = None
        self._wrapper: weakref.ref[nn.Module] | None = None
        self._stand_in: object = None
        self._handle: Any = None
        params = [p for _, p in self._named]
        if any(is_sharded(p) for p in params):
            _refuse_unshardable(settings)
            self._sharding = Sharding([p for p in params if p.is_floating_point()])
            if isinstance(source, nn.Module):
                settle_types(source)
        elif self.size > 1:
            self._exchange = Exchange(params)
            self._exchange.ordered = settings.step_in_backward
            if isinstance(source, nn.Module):
                self._handle = source.register_forward_pre_hook(_BeforeForward(self))
            if settings.shard_state:
                self._rows = Rows(self._device.type)
        if self.size > 1 and not copied:
            agree.require_same_model(self._named)
            if self._exchange is not None:
                buffers = source.buffers() if isinstance(source, nn.Module) else ()
                agree.copy_from_first([*params, *buffers])

    # ---- gradients -------------------------------------------------------------------------------------------------

    def watch(
        self, params: Sequence[Tensor], then: dict[Tensor, Callable[[Tensor], None]], always: bool = False
    ) -> list[Any]:
        """Call `then[p](p)` when the gradient of a parameter is complete, over all processes.

        Args:
            params: Parameters that train.
            then: What to do, for those of them where something is to be done.
            always: Also in passes that only accumulate.

        Returns:
            Handles with a method `remove`.
        """
        if self._exchange is None:
            return [p.register_post_accumulate_grad_hook(call) for p, call in then.items()]
        return list(self._exchange.watch(params, then, always))

    def settle(self) -> None:
        """Reduce gradients that were accumulated without it."""
        if self._exchange is not None:
            self._exchange.settle()

    def require_known_group(self) -> None:
        """Refuse a process group that is younger than the optimizer, which would train alone.

        Raises:
            RuntimeError: If there is one.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != self.size:
            raise RuntimeError(
                f"the optimizer was made for {self.size} processes, and there are {dist.get_world_size()}: make it "
                "after init_process_group, TrainingArguments or Accelerator()"
            )

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients of backward passes in this context without sending them."""
        if self._exchange is None:
            yield
            return
        before, self._exchange.held = self._exchange.held, True
        try:
            yield
        finally:
            self._exchange.held = before

    def norms(self, norms: Numbers) -> Numbers:
        """Norms of whole gradients, from those of the parts that lie here."""
        if self._sharding is None:
            return norms
        return each(lambda x: x**0.5, self._sharding.total(each(lambda x: x * x, norms)))

    # ---- state: of the part of a weight that lies here -----------------------------------------------------------

    @property
    def shares_state(self) -> bool:
        """Whether each process keeps a part of the state of weights that all of them hold whole."""
        return self._rows is not None

    def local_part(self, tensor: Tensor) -> Tensor:
        """What this process updates of a weight, or the same part of its gradient: a view; all of it if alone."""
        return (sharded if self._rows is None else self._rows).local_part(tensor)

    def like_parameter(self, value: Any, param: Tensor) -> Any:
        """Wrap state of the local part of a parameter as a DTensor, where there are other parts."""
        return (sharded if self._rows is None else self._rows).like_parameter(value, param)

    def part_for(self, value: Any, param: Tensor) -> Any:
        """State of the local part, from state that was saved whole or in parts."""
        return (sharded if self._rows is None else self._rows).part_for(value, param)

    def gather_weights(self, entries: Sequence[Entry]) -> None:
        """Exchange the parts of weights that were updated, where each process updates its own."""
        if self._rows is not None:
            self._rows.gather([e.param for e in entries])

    def gather_state(self, packed: dict[str, Any]) -> dict[str, Any] | None:
        """A state dictionary with the parts of all processes, on process 0; None on the others, or if none shares."""
        found: dict[str, Any] | None = None if self._rows is None else self._rows.whole(packed)
        return found if self.rank == 0 else None

    # ---- rounds ----------------------------------------------------------------------------------------------------

    def draw(self, sampler: BlockSampler, rounding: torch.Generator, log_p: Array) -> tuple[int, ...]:
        """The next blocks, as process 0 draws them; samplers and generators are the same afterwards."""
        if self.size == 1:
            return sampler.draw(log_p)
        drawn = sampler.draw(log_p) if self.rank == 0 else ()
        drawn, state, noise = agree.from_first((drawn, sampler.state_dict(), rounding.get_state()))
        sampler.load_state_dict(state)
        rounding.set_state(noise)
        return tuple(drawn)

    def mean(self, measured: dict[int, float], num_blocks: int) -> dict[int, float]:
        """What a round measured of blocks, by index: the mean over the processes that saw it."""
        return measured if self.size == 1 else agree.mean_of_measured(measured, num_blocks, self._device)

    def require_equal(self) -> None:
        """Stop if the weights of the processes have drifted apart; sharded ones have no copy to compare with."""
        if self._exchange is not None:
            agree.require_equal(self._named)

    def close(self) -> None:
        """Remove the hook from the model, and leave its wrapper unusable rather than silent."""
        if self._handle is not None:
            self._handle.remove()
        if self._wrapper is not None and (wrapper := self._wrapper()) is not None:
            retire(wrapper, self._stand_in)

    @property
    def _device(self) -> torch.device:
        return torch.device(self._named[0][1].device.type)

    def before_forward(self) -> None:
        """Look at the wrapper around the model: is this pass one that only accumulates?"""
        wrapper = active_wrapper()
        if self._exchange is None:
            return
        if wrapper is None:
            self._exchange.sync = True
            return
        if self._wrapper is None or self._wrapper() is not wrapper:
            exchange = self._exchange
            others = [name for name, p in wrapper.named_parameters() if p.requires_grad and not exchange.knows(p)]
            if others:
                raise ValueError(
                    f"DistributedDataParallel: it holds parameters that the optimizer was not given, {others[0]} and "
                    f"{len(others) - 1} more, whose gradients nobody would average; give it the whole model"
                )
            self._exchange.off = not rest(wrapper)
            self._wrapper, self._stand_in = weakref.ref(wrapper), wrapper.__dict__.get("reducer")
        self._exchange.sync = wrapper.require_backward_grad_sync


class _BeforeForward:
    """A hook before each forward pass of the model, that does nothing once the optimizer is forgotten.

    Args:
        workers: Not kept alive. None where the model was copied, or saved as a whole.
    """

    def __init__(self, workers: Workers | None) -> None:
        self._owner = None if workers is None else weakref.ref(workers)

    def __call__(self, module: nn.Module, _: Any) -> None:
        own = None if self._owner is None else self._owner()
        if own is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            own.before_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


def _refuse_unshardable(settings: Settings) -> None:
    """Refuse what needs a whole gradient or a whole moment, of which each process holds a part."""
    if settings.state_format == "8bit":
        raise ValueError("state_format='8bit': not with fully_shard, since the scales lie across the parts")
    if settings.step_in_backward:
        raise ValueError(
            "step_in_backward=True: not with fully_shard, where a norm is known after the backward pass only"
        )
    if settings.inner is BoundedAdam:
        raise ValueError("inner=BoundedAdam (variant='paper'): not with fully_shard, its bound is over a whole moment")
