"""A training step as it would be at full size: model, method and setting of a scenario, run on fake tensors."""

from __future__ import annotations

import copy
import gc
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from misa.integration.chunked_loss import LOSSES, ChunkedLoss
from misa.integration.lean_activations import LeanActivations
from misa.memory.command import make_optimizer
from misa.memory.fake import ATTENTION, FakeMode, as_on_accelerator, build_model, wrapping
from misa.memory.models import configuration, longest_sequence
from misa.memory.step import StepMemory, checkpoint_layers, measure_step, random_batch, training_step
from misa.methods import METHODS, build
from misa.models import DTYPES

#: How the optimizer holds what it knows of bf16 weights; see `misa.optimizer.settings.Settings`.
STATE_FORMATS = ("master", "fp32", "bf16", "8bit")
ALL_LAYERS = -1
#: Fields of a scenario that one laboratory can measure in all their values.
CHANGEABLE = ("batch_size", "seq_len", "checkpointing", "loss", "lean_activations")
#: CUDA's caching allocator hands out multiples of this many bytes.
CUDA_ROUNDING = 512
_ONE_ROUND = 10**6


@dataclass(frozen=True)
class Scenario:
    """What is trained, how, and on how much.

    Attributes:
        model: A name of `misa.memory.models.MODEL_NAMES`, a folder or a JSON configuration.
        method: A key of `misa.methods.METHODS`.
        options: The method's own options.
        batch_size: Sequences in a step.
        seq_len: Tokens in a sequence.
        checkpointing: Layers, from the lowest that trains upwards, whose activations are recomputed in the backward
            pass: 0 none (the default), `ALL_LAYERS` all.
        loss: "full", which holds the logits of all tokens, or "chunked".
        dtype: Precision of the weights; of `adamw_bf16` always bfloat16.
        state_format: For block methods and bf16 weights, one of `STATE_FORMATS`; None is the method's own.
        step_in_backward: For block methods: apply and free each gradient as soon as it is ready.
        lean_activations: Norms and gated products keep little and are computed again in the backward pass; see
            `misa.integration.lean_activations`.
        accumulates: Gradients of an earlier pass of the same step are there already.
        lean_adapters: For LoRA and DoRA: adapters in the precision of the weights instead of fp32.
        num_layers: Layers instead of the model's own number, or None.
    """

    model: str = "llama3-8b"
    method: str = "misa"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    seq_len: int = 512
    checkpointing: int = 0
    loss: str = "full"
    dtype: str = "bfloat16"
    state_format: str | None = None
    step_in_backward: bool = False
    lean_activations: bool = False
    accumulates: bool = False
    lean_adapters: bool = False
    num_layers: int | None = None

    def __post_init__(self) -> None:
        """Check every field that can be checked without building anything."""
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.method == "adamw_bf16" and self.dtype in DTYPES:
            object.__setattr__(self, "dtype", "bfloat16")  # to which it converts the model, as fake tensors cannot be
        for name in ("batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.checkpointing < ALL_LAYERS:
            raise ValueError(f"checkpointing is {self.checkpointing}; it must be a number of layers, or -1 for all")
        for name, allowed in (("loss", LOSSES), ("dtype", DTYPES), ("state_format", (None, *STATE_FORMATS))):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {words}")
        if (self.state_format or self.step_in_backward) and not is_blockwise(self.method):
            raise ValueError(f"state_format and step_in_backward belong to block methods; method {self.method} is none")
        if self.accumulates and self.step_in_backward:
            raise ValueError("step_in_backward applies each gradient at once, so that none can be accumulated")
        if self.lean_adapters and not has_adapters(self.method):
            raise ValueError(f"lean_adapters belongs to methods with adapters; method {self.method} has none")

    def check_length(self, config: Any) -> None:
        """Refuse a sequence that the model's positions do not allow.

        Raises:
            ValueError: If it is longer.
        """
        limit = longest_sequence(config)
        if limit is not None and self.seq_len > limit:
            raise ValueError(f"seq_len is {self.seq_len}; {self.model} allows at most {limit}")


def is_blockwise(method: str) -> bool:
    """Whether a method trains the blocks drawn for a round, and so takes settings of the block-coordinate engine."""
    return "interval" in METHODS[method].defaults and not has_adapters(method)


def has_adapters(method: str) -> bool:
    """Whether a method adds low-rank adapters."""
    return "lora_r" in METHODS[method].defaults


@dataclass(frozen=True)
class DeviceStep:
    """A training step in the steady state on a CUDA device.

    Attributes:
        peak_bytes: The most bytes that tensors held, `torch.cuda.max_memory_allocated`.
        reserved_bytes: The most bytes that the allocator had taken from the device.
        step_s: Median seconds of a step: forward pass, backward pass, update.
    """

    peak_bytes: int
    reserved_bytes: int
    step_s: float


class Laboratory:
    """A model of fake tensors with a method applied to it, whose training step can be measured in many settings.

    Building takes seconds for 8 billion parameters, and so does each measurement.

    Args:
        scenario: What to build. Fields in `CHANGEABLE` can be changed for each measurement.
        real: Use real tensors, for checks of what is counted with fake ones.
        rounding_bytes: Each storage counts as the next multiple of this. Default: CUDA's.
        config: The model's configuration, where there is one at hand; `scenario.model` is a mere name then.
        on_accelerator: Work in pieces as large as on a GPU; otherwise as on a CPU.
        device: Where real tensors lie.

    Attributes:
        num_params: Parameters of the model, adapters not counted among them.
        settings: The method's options as a user's run has them; here a round outlasts what is measured.

    Raises:
        ValueError: For an unknown model or an option the method does not have, or a budget no block fits.
    """

    def __init__(
        self,
        scenario: Scenario,
        real: bool = False,
        rounding_bytes: int = CUDA_ROUNDING,
        *,
        config: Any = None,
        on_accelerator: bool = True,
        device: str = "cpu",
    ) -> None:
        self.scenario = scenario
        self.device = device
        self.config = configuration(scenario.model) if config is None else copy.deepcopy(config)
        self.config.use_cache = False
        self.on_accelerator = on_accelerator
        self._pieces = as_on_accelerator if on_accelerator else nullcontext
        if scenario.num_layers is not None:
            self.config.num_hidden_layers = scenario.num_layers
        scenario.check_length(self.config)
        self._rounding = rounding_bytes
        self._mode = None if real else FakeMode()
        self._loss: ChunkedLoss | None = None
        self._lean: LeanActivations | None = None
        self._samples: dict[int, list[tuple[int, ...]]] = {}
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # What matters of them (blocks that never fit) is said by the draws.
            warnings.simplefilter("ignore")
            self._build()

    def _build(self) -> None:
        s = self.scenario
        try:
            if self._mode is None:
                torch.manual_seed(0)
            with torch.device(self.device) if self._mode is None else self._mode:
                self.base = build_model(self.config, s.dtype)
        except KeyError as error:
            if error.args != (ATTENTION,):
                raise
            raise ValueError(
                f"model {s.model}: models of type {self.config.model_type} cannot be simulated, since their attention "
                "cannot be replaced by one without a mask"
            ) from error
        self.num_params = sum(p.numel() for p in self.base.parameters())
        options = {**s.options, **self._engine_settings()}
        # A round that outlasts the measurement, and no first pass, whose rounds are of one step.
        endless = {"interval": _ONE_ROUND, "first_pass": False}
        endless = {name: value for name, value in endless.items() if name in METHODS[s.method].defaults}
        with self._wrapping():
            built = build(s.method, self.base, lr=1e-5, options=options | endless)
            if s.lean_adapters:
                _narrow_adapters(built.model, self.base.dtype)
        self.model: Any = built.model
        own = METHODS[s.method].defaults | options
        self.settings = built.settings | {name: own[name] for name in endless}
        # Outside the mode, so that the scores and the draw, which have values, are real numbers.
        with self._pieces():
            self.optimizer: Any = make_optimizer(built)
        self._fresh = self.optimizer.state_dict() if self.blocks else None
        self._is_primed = False

    def _wrapping(self) -> Any:
        return nullcontext() if self._mode is None else wrapping(self._mode)

    def _engine_settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.scenario.step_in_backward:
            found["step_in_backward"] = True
        if self.scenario.state_format:
            found["state_format"] = self.scenario.state_format
        return found

    @cached_property
    def blocks(self) -> tuple[Any, ...]:
        """The blocks that a block method draws from; none for other methods."""
        optimizer = self.optimizer
        drawn = getattr(getattr(optimizer, "settings", None), "order", "all") != "all"
        return tuple(optimizer.blocks) if drawn else ()

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the blocks that are on."""
        names = {block.name: i for i, block in enumerate(self.blocks)}
        return tuple(names[name] for name in self.optimizer.active) if self.blocks else ()

    def switch_to(self, draw: Sequence[int]) -> None:
        """Turn on these blocks instead of the drawn ones.

        Args:
            draw: Indices into `blocks`.
        """
        if self._fresh is None or tuple(sorted(draw)) == self.active:
            return
        state = {**self._fresh, "misa": {**self._fresh["misa"], "active": sorted(draw)}}
        self.optimizer.load_state_dict(copy.copy(state))
        self._is_primed = False

    def sample(self, num: int) -> list[tuple[int, ...]]:
        """Draw as the method's sampler draws, with its probabilities before training; the method itself is unmoved.

        Args:
            num: Number of draws.

        Returns:
            Sorted indices into `blocks`.
        """
        if not self.blocks:
            return []
        if num in self._samples:
            return self._samples[num]
        sampler = copy.deepcopy(self.optimizer._sampler)
        self._samples[num] = [sampler.draw(self.optimizer._log_p) for _ in range(num)]
        return self._samples[num]

    def measure(self, **changes: Any) -> StepMemory:
        """Measure a training step in the steady state.

        Args:
            **changes: Fields of the scenario to change, out of `CHANGEABLE`.

        Returns:
            What the step held.

        Raises:
            ValueError: For other fields, or values out of range.
        """
        if unknown := set(changes) - set(CHANGEABLE):
            raise ValueError(f"{', '.join(sorted(unknown))}: cannot be changed without building anew")
        s = self._set(changes)
        with self._inside():
            self._prime()
            batch = self._batch(s)
            if s.accumulates:
                self._make_gradients()
            # What there is now stays, so that the collector need not look at it again and again, and begins every
            # step with nothing to collect.
            gc.freeze()
            try:
                return measure_step(self.model, self.optimizer, batch, self._rounding)
            finally:
                gc.unfreeze()

    def run_on_device(self, num_steps: int) -> DeviceStep:
        """Run real training steps on a CUDA device as a user's program would, counting nothing in between.

        Args:
            num_steps: Timed steps, at least 1; two come before, which make the state.

        Returns:
            What the device's allocator says, and the time of a step.

        Raises:
            torch.cuda.OutOfMemoryError: If it does not fit.
        """
        s = self._set({})
        batch = self._batch(s)
        for _ in range(2):
            training_step(self.model, self.optimizer, batch)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(num_steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            training_step(self.model, self.optimizer, batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return DeviceStep(
            torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), statistics.median(seconds)
        )

    def _set(self, changes: dict[str, Any]) -> Scenario:
        s = replace(self.scenario, **changes)
        s.check_length(self.config)
        self._set_loss(s.loss)
        self._set_lean(s.lean_activations)
        checkpoint_layers(self.model, s.checkpointing)
        return s

    def _batch(self, s: Scenario) -> dict[str, torch.Tensor]:
        batch = random_batch(self.config.vocab_size, s.batch_size, s.seq_len)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with self._pieces(), self._mode or nullcontext():
            yield

    def _prime(self) -> None:
        """Make the state that a first step makes, from gradients of the right shape."""
        if self._is_primed:
            return
        if getattr(getattr(self.optimizer, "settings", None), "step_in_backward", False):
            loss = sum(p.sum() for p in self.model.parameters() if p.requires_grad)
            loss.backward()  # type: ignore[union-attr]
        else:
            self._make_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._is_primed = True

    def _make_gradients(self) -> None:
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)

    def _set_loss(self, loss: str) -> None:
        if loss == "chunked" and self._loss is None:
            self._loss = ChunkedLoss(self.base)
        elif loss == "full" and self._loss is not None:
            self._loss.remove()
            self._loss = None

    def _set_lean(self, lean: bool) -> None:
        if lean and self._lean is None:
            self._lean = LeanActivations(self.base)
        elif not lean and self._lean is not None:
            self._lean.remove()
            self._lean = None


def _narrow_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep PEFT's adapters in the precision of the weights."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad and p.dtype != dtype:
                setattr(module, name, nn.Parameter(p.detach().to(dtype)))
