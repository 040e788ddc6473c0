"""The tensors an object holds, such as the state of an optimizer, found without knowing the object."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import torch

_NOT_ENTERED = (
    *(str, bytes, int, float, complex, bool, type(None), type),
    *(torch.dtype, torch.device, torch.Generator, torch.nn.Module),
    *(FunctionType, MethodType, BuiltinFunctionType, ModuleType, partial, weakref.ref),
)


def reachable_tensors(root: object) -> Iterator[torch.Tensor]:
    """Yield the tensors that `root` holds: in containers and in attributes of plain objects, to any depth.

    Models, functions and modules are not entered, so that an optimizer that knows its model does not claim what only
    the model holds. Gradients (`tensor.grad`) are not yielded.

    Args:
        root: Usually an optimizer.

    Yields:
        Each tensor once, in no particular order.
    """
    seen: dict[int, object] = {}  # holding the objects keeps their ids from being given to others meanwhile
    stack: list[object] = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, _NOT_ENTERED) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        else:
            stack.extend(getattr(item, "__dict__", {}).values())
            slots = (name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()))
            stack.extend(getattr(item, name) for name in slots if hasattr(item, name))
