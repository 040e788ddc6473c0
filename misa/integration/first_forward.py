"""What is known only when a model runs: activation checkpointing and `torch.compile`.

A Trainer turns both on after it has made the optimizer, and some turn checkpointing off and on between forward passes.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

_CHECKPOINTED = "_gradient_checkpointing_func"


class FirstForward:
    """Looks at a model just before its first forward pass, and again where checkpointing was turned on since.

    Args:
        model: The model an optimizer works on.
        optimizer: Not kept alive; when it is forgotten, or the model copied without it, the hook takes itself away.
    """

    def __init__(self, model: nn.Module, optimizer: object) -> None:
        self._optimizer: weakref.ref[object] | None = weakref.ref(optimizer)
        self.compiled = ""  # "model" or "layers"
        self._has_warned = False
        # Modules that may be checkpointed, once the model has run; a hook that held its model would keep it in memory.
        self._candidates: list[weakref.ref[nn.Module]] | None = None
        self._seen: list[Any] | None = None
        self._handle = model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, _: Any) -> None:
        """The forward pre-hook. Traced by `torch.compile` it only leaves a note, so that no graph breaks."""
        if torch.compiler.is_compiling():
            self.compiled = "model"
            return
        if self._candidates is None:
            modules = list(module.modules())
            if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules):
                self.compiled = "layers"
            marks = ("gradient_checkpointing", _CHECKPOINTED, "enable_input_require_grads")
            self._candidates = [weakref.ref(m) for m in modules if any(hasattr(m, mark) for mark in marks)]
        if self._seen is None or any(a is not b for a, b in zip_longest(self._seen, self._look())):
            skip_frozen_prefix(module)
            self._seen = self._look()
        if self._optimizer is None or self._optimizer() is None:
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
                del module._forward_pre_hooks[key]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_optimizer": None, "_candidates": None, "_seen": None}

    def _look(self) -> list[Any]:
        """What changes when checkpointing is turned on or off: own attributes of each module that may have it."""
        names = (_CHECKPOINTED, "gradient_checkpointing", "_require_grads_hooks")
        return [vars(m).get(name) for ref in self._candidates or [] if (m := ref()) is not None for name in names]

    def warn_if_compiled(self, num_blocks: int) -> None:
        """Say once, at the end of the first round, what switching blocks means for compiled code.

        Args:
            num_blocks: Blocks of the model; compiled layers make about one graph for each.
        """
        if not self.compiled or self._has_warned:  # first, because looking the limits up takes as long as a small step
            return
        config = sys.modules.get("torch._dynamo.config")
        limit = min(getattr(config, name, 0) for name in ("recompile_limit", "accumulated_recompile_limit"))
        if limit >= num_blocks * (2 if self.compiled == "model" else 1):
            return
        self._has_warned = True
        one_by_one = "compile the repeated layers one by one (`for layer in layers: layer.compile()`), so that a graph "
        one_by_one += "depends on the active blocks of one layer alone, and "
        warnings.warn(
            "torch.compile makes a new graph for every set of trainable parameters, and blocks switch every round: "
            f"gradients stay right, but after {limit} graphs the code runs uncompiled. To stay compiled, "
            f"{one_by_one if self.compiled == 'model' else ''}set recompile_limit and accumulated_recompile_limit of "
            f"torch._dynamo.config to about {2 * num_blocks}, or use longer rounds",
            stacklevel=5,
        )

    def undo(self, model: nn.Module) -> None:
        """Remove the hook if it is still there, and undo `skip_frozen_prefix`."""
        self._handle.remove()
        restore_prefix(model)


def warn_if_unreached(num_steps: int, interval: int, active: tuple[str, ...]) -> None:
    """Say once that the loss does not reach what is active, which then never gets its steps.

    Args:
        num_steps: Calls of `step` in a row that found no gradient.
        interval: Steps in a round.
        active: Names of the active blocks.
    """
    if num_steps == max(interval, 10):
        warnings.warn(
            f"{num_steps} steps in a row found no gradient: the loss does not reach the active blocks "
            f"{', '.join(active[:3])}, and no others are drawn before these had their steps. Keep blocks that the loss "
            "does not use from being drawn, by exclude=; or something replaced the parameters since the optimizer was "
            "made (fully_shard, loading with assign=True), which has to come first",
            stacklevel=4,
        )


def warn_if_frozen(frozen: bool) -> None:
    """Say that a state is loaded into weights that somebody else has frozen, which switches them on again.

    Accelerate loads one when it prepares an optimizer, so this is where one made too early for PEFT is noticed.

    Args:
        frozen: Whether something else has switched off what the optimizer had on.
    """
    if frozen:
        warnings.warn(
            "what this optimizer trains was frozen by something else (PEFT, as with peft_config?) after it was made, "
            "and is switched on again; adapters made since then are not trained. To train adapters, make the optimizer "
            "after them: give the trainer a model from get_peft_model, or misa.TrainerOptimizer",
            stacklevel=3,
        )


def skip_frozen_prefix(model: nn.Module) -> None:
    """Let a checkpointed transformers model skip its frozen prefix in the backward pass.

    transformers makes the embedding output require a gradient whenever checkpointing is on, so that every layer is
    recomputed and differentiated, frozen or not. Without that mark, and with non-reentrant checkpointing, autograd
    starts at the lowest active layer. A model without activation checkpointing is left alone.

    Args:
        model: Any module.
    """
    checkpointed = _CHECKPOINTED
    if not any(checkpointed in m.__dict__ and getattr(m, "gradient_checkpointing", True) for m in model.modules()):
        return
    for module in model.modules():
        function = module.__dict__.get(checkpointed)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            # Reentrant checkpointing drops every gradient when no input of the layer requires one.
            keywords = {**function.keywords, "use_reentrant": False}
            module.__dict__[checkpointed] = functools.partial(function.func, *function.args, **keywords)
            module.__dict__["_misa_reentrant"] = function
        # Not the model's own disable_input_require_grads(): that also initializes and ties weights again.
        for hook in module.__dict__.get("_require_grads_hooks", ()):
            hook.remove()
            module.__dict__["_misa_skips_prefix"] = True
        if "_misa_skips_prefix" in module.__dict__:  # turned on again, transformers forgets the hooks of before
            for inner in module.modules():
                hooks = inner._forward_hooks
                for key in [k for k, h in hooks.items() if getattr(h, "__name__", "") == "make_inputs_require_grads"]:
                    del hooks[key]


def restore_prefix(model: nn.Module) -> None:
    """Undo `skip_frozen_prefix`: as it was marked and checkpointed before."""
    for module in model.modules():
        if (function := module.__dict__.pop("_misa_reentrant", None)) is not None:
            module.__dict__[_CHECKPOINTED] = function
        if module.__dict__.pop("_misa_skips_prefix", False):
            module.enable_input_require_grads()  # type: ignore[operator]
