"""What must stop a run of several processes, in words; each function returns the message that this process gets."""

from __future__ import annotations

import copy
import io
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from cases import rows
from tiny import llama, moved, weights
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from benchmarks.distributed import Traffic
from misa.distributed import checkpoint, wrapped
from misa.optimizer import MISA, BAdam


def message(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _step(model: Any, optimizer: Any, number: int) -> None:
    own = {name: values.chunk(dist.get_world_size())[dist.get_rank()] for name, values in rows(number).items()}
    model(**own).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def drift() -> str:
    """One weight of one process is changed in the middle of a round, by less than training changes it."""
    model = llama(2)
    optimizer = MISA(model, budget=0.3, interval=2)
    _step(model, optimizer, 0)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    return message(lambda: _step(model, optimizer, 1))


def other_models() -> str:
    return message(lambda: MISA(llama(2 + dist.get_rank()), budget=0.3))


def static_graph() -> str:
    return message(lambda: MISA(DistributedDataParallel(llama(2), static_graph=True), budget=0.3))


def static_graph_later() -> str:
    model = llama(2)
    optimizer = MISA(model, budget=0.3)
    return message(lambda: _step(DistributedDataParallel(model, static_graph=True), optimizer, 0))


def communication_hook() -> str:
    model = DistributedDataParallel(llama(2))
    model.register_comm_hook(None, allreduce_hook)
    return message(lambda: MISA(model, budget=0.3))


def mixed_precision() -> str:
    model = DistributedDataParallel(llama(2))
    # What its argument of this name sets, which the constructor takes on a GPU only.
    model.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)
    return message(lambda: MISA(model, budget=0.3))


def one_of_two_groups() -> str:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return message(lambda: MISA(DistributedDataParallel(llama(2), process_group=groups[dist.get_rank()]), budget=0.3))


def head_of_somebody_else() -> str:
    model = DistributedDataParallel(llama(2))
    optimizer = MISA(model.module.model, budget=0.3)
    return message(lambda: _step(model, optimizer, 0))


def made_before_the_group() -> str:
    is_initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        model = llama(2)
        optimizer = MISA(model, budget=0.3)
    finally:
        dist.is_initialized = is_initialized
    return message(lambda: _step(model, optimizer, 0))


def released() -> tuple[str, str]:
    """A wrapper whose optimizer is gone, and one that another optimizer has by then."""
    said = []
    for has_another in (False, True):
        model = DistributedDataParallel(llama(2))
        optimizer = MISA(model, budget=0.3)
        _step(model, optimizer, 0)
        other = MISA(model, budget=0.3) if has_another else torch.optim.SGD(model.parameters())
        optimizer.release()
        said.append(message(lambda model=model, other=other: _step(model, other, 1)))
    return said[0], said[1]


def expanded_buffer() -> bool:
    model = llama(2)
    model.register_buffer("wide", torch.full((1,), float(dist.get_rank())).expand(5))
    MISA(model, budget=0.3)
    return model.wide.tolist() == [0.0] * 5


def checkpoint_of_wrapped(folder: str) -> bool:
    """What is saved of a wrapped model loads into a bare one."""
    wrapped_model, model = DistributedDataParallel(llama(2)), llama(2)
    optimizer, other = (MISA(one, budget=0.3, interval=2, seed=0) for one in (wrapped_model, model))
    _step(wrapped_model, optimizer, 0)
    checkpoint.save(folder, wrapped_model, optimizer)
    checkpoint.load(folder, model, other)
    return all(torch.equal(p, q) for p, q in zip(wrapped_model.module.parameters(), model.parameters(), strict=True))


def wrong_checkpoints(folder: str) -> list[tuple[str, bool]]:
    """What loading says of a checkpoint of another model or optimizer, and whether the weights are as before."""
    model = llama(2)
    checkpoint.save(folder, model, MISA(model, budget=0.3))
    others: list[tuple[Any, Any]] = [(llama(3, seed=1), MISA), (llama(2, seed=1, vocab_size=70), MISA)]
    others += [(llama(2, torch.bfloat16, seed=1), MISA), (llama(2, seed=1), BAdam)]
    found = []
    for other, preset in others:
        optimizer, before = preset(other), weights(other)
        said = message(lambda other=other, optimizer=optimizer: checkpoint.load(folder, other, optimizer))
        found.append((said, not moved(before, other)))
    return found


def wrapper_is_alive() -> tuple[bool, bool]:
    """Whether a wrapper's reducer, which holds the buckets, lives before and after the optimizer is made."""
    model = DistributedDataParallel(llama(2))
    reducer = weakref.ref(model.reducer)
    before = reducer() is not None
    optimizer = MISA(model, budget=0.3)
    return before, bool(optimizer.active) and reducer() is not None


def without_switch() -> tuple[str, bool]:
    """A torch whose wrapper cannot rest: refused, or with find_unused_parameters, right all the same."""
    wrapped._REDUCER, kept = ("no_such_attribute",), wrapped._REDUCER
    try:
        said = message(lambda: MISA(DistributedDataParallel(llama(2)), budget=0.3))
        model = DistributedDataParallel(llama(2), find_unused_parameters=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = MISA(model, budget=0.3, interval=2)
            for number in range(4):
                _step(model, optimizer, number)
    finally:
        wrapped._REDUCER = kept
    twin_model = llama(2)
    twin = MISA(twin_model, budget=0.3, interval=2)
    for number in range(4):
        _step(twin_model, twin, number)
    pairs = zip(model.parameters(), twin_model.parameters(), strict=True)
    same = optimizer.active == twin.active and all(torch.allclose(p, q, rtol=0, atol=1e-5) for p, q in pairs)
    return said, same and any("do without the wrapper" in str(w.message) for w in caught)


def bytes_sent() -> tuple[int, int, int]:
    """Bytes of a backward pass that is reduced and of one that only accumulates, and of the active gradients."""
    model = llama(2)
    optimizer = MISA(model, budget=0.3, interval=2)
    with Traffic() as held, optimizer.no_sync():
        model(**rows(0)).loss.backward()
    with Traffic() as sent:
        model(**rows(1)).loss.backward()
    active = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(sent.sent_bytes.values()), sum(held.sent_bytes.values()), active


def copies() -> bool:
    """A deep copy of an optimizer trains on between processes as the original does."""
    model = llama(2)
    optimizer = MISA(model, budget=0.3, interval=2)
    _step(model, optimizer, 0)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for number in range(1, 4):
        _step(model, optimizer, number)
        _step(twin_model, twin, number)
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


def saved_as_a_whole() -> bool:
    """A model is pickled with its hooks; what is loaded runs without the optimizer."""
    model = llama(2)
    optimizer = MISA(model, budget=0.3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    _step(model, optimizer, 0)
    return torch.equal(loaded(**rows(0)).loss, llama(2)(**rows(0)).loss)


CALLS = (
    *(drift, other_models, static_graph, static_graph_later, communication_hook, mixed_precision, wrapper_is_alive),
    *(without_switch, copies, bytes_sent, one_of_two_groups, head_of_somebody_else, made_before_the_group, released),
    *(expanded_buffer, saved_as_a_whole),
)


def all_failures(folder: str) -> dict[str, Any]:
    return {call.__name__: call() for call in CALLS} | {
        "checkpoint": checkpoint_of_wrapped(f"{folder}/wrapped"),
        "wrong checkpoints": wrong_checkpoints(f"{folder}/wrong"),
    }
