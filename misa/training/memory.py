"""Keep a run inside a stated memory: choose its setting by the memory laboratory, and measure what it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState

from misa.integration.chunked_loss import ChunkedLoss
from misa.integration.lean_activations import LeanActivations
from misa.memory.draws import Draws
from misa.memory.fit import Plan, fewest_layers, plan
from misa.memory.scenario import ALL_LAYERS, CUDA_ROUNDING, Scenario
from misa.memory.sizes import in_gib, parse_bytes
from misa.memory.step import checkpoint_layers
from misa.memory.tracker import MemoryTracker
from misa.training.meter import Meter, unwrapped

logger = logging.getLogger(__name__)

_ENGINE = ("state_format", "step_in_backward")


def plan_run(job: Any, config: Any) -> Plan:
    """Choose loss, checkpointing, states and the method's budget for a run; what it was given stays.

    Args:
        job: The run, a `misa.training.run.Job` with a memory budget.
        config: Configuration of its model.

    Raises:
        ValueError: If nothing fits, or the run has what cannot be predicted.
    """
    arguments, settings, memory = job.training, job.settings, job.memory
    for name in ("bf16", "fp16"):
        if getattr(arguments, name):
            raise ValueError(f"memory_budget: cannot predict autocast ({name}); choose the weights' type with --dtype")
    if arguments.world_size > 1:
        raise ValueError(f"memory_budget: predicts one process, and there are {arguments.world_size}")
    given = job.method.given()
    unforeseen = {
        "packing": (settings.get("packing"), "its masks"),
        "attn_implementation": (config._attn_implementation == "eager", "attention that keeps its scores (eager)"),
        "probe_every": (given.get("probe_every"), "the pass that measures all blocks"),
        "state_policy": (given.get("state_policy") == "keep", "the states of blocks that went off (keep)"),
        "label_smoothing_factor": (arguments.label_smoothing_factor, "the loss of smoothed labels"),
    }
    for name, (is_asked, what) in unforeseen.items():
        if is_asked:
            raise ValueError(f"memory_budget: cannot predict {what}; leave out {name}, or the budget")
    window = getattr(config, "sliding_window", None)
    if window is not None and settings["max_length"] >= window and config._attn_implementation == "sdpa":
        raise ValueError(
            f"memory_budget: cannot predict the masks of attention in a window of {window} tokens; allowed is "
            "max_length below that, another attn_implementation, or no budget"
        )
    layers = memory.checkpoint_layers
    if layers is None:
        layers = ALL_LAYERS if arguments.gradient_checkpointing else 0
    fixed = {
        "budget": "budget" in given or "num_blocks" in given,
        "loss": memory.loss is not None,
        "checkpointing": arguments.gradient_checkpointing or memory.checkpoint_layers is not None,
        "state_format": "state_format" in given,
        "lean_activations": memory.lean_activations,
    }
    scenario = Scenario(
        model=job.model,
        method=job.method.method,
        options={name: value for name, value in given.items() if name not in _ENGINE},
        batch_size=arguments.per_device_train_batch_size,
        seq_len=settings["max_length"],
        checkpointing=layers,
        loss=settings["loss"],
        dtype=settings["dtype"],
        lean_activations=memory.lean_activations,
        accumulates=arguments.gradient_accumulation_steps > 1,
        **{name: given[name] for name in _ENGINE if name in given},
    )
    accelerator = torch.accelerator.is_available()
    chosen = plan(
        scenario,
        parse_bytes(memory.memory_budget, "memory_budget"),
        tuple(name for name, is_given in fixed.items() if is_given),
        config=config,
        on_accelerator=accelerator,
        rounding_bytes=CUDA_ROUNDING if accelerator else 1,
    )
    for line in describe(chosen):
        logger.info("%s", line)
    return chosen


def describe(chosen: Plan) -> list[str]:
    """What was chosen and why, in lines."""
    s = chosen.scenario
    layers = {0: "no layer", ALL_LAYERS: "all layers"}.get(s.checkpointing, f"up to {s.checkpointing} layers")
    budget = s.options.get("budget")
    parts = [
        "memory budget: " + (f"trains {100 * budget:g}% at a time" if budget else f"method {s.method}"),
        f"{s.loss} loss",
        f"{layers} checkpointed",
        *(["lean activations"] if s.lean_activations else []),
        f"states {s.state_format or 'master'}",
    ]
    return [", ".join(parts), *(f"- {reason}" for reason in chosen.reasons)]


def apply_levers(job: Any, model: Any) -> Plan | None:
    """Prepare a freshly loaded model as its run asks, or as the plan for its memory budget says.

    Args:
        job: The run, a `misa.training.run.Job`.
        model: Its model.

    Returns:
        The plan, if there is a memory budget.

    Raises:
        ValueError: As `plan_run`, and for a model that cannot have what is asked for.
    """
    chosen = plan_run(job, model.config) if job.memory.memory_budget is not None else None
    loss = job.settings.get("loss") if chosen is None else chosen.scenario.loss
    lean = job.memory.lean_activations if chosen is None else chosen.scenario.lean_activations
    if loss == "chunked":
        if job.training.label_smoothing_factor:
            raise ValueError(
                "loss is chunked, and label_smoothing_factor needs the logits of all tokens; use loss full"
            )
        ChunkedLoss(model)
    if lean:
        LeanActivations(model)
    return chosen


def without_mask(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Let batches that are padded on the right go without an attention mask, as the plan foresees.

    Causal attention never looks at what follows. A mask would be kept for each layer, keys and values repeated for
    each head, and attention slower.

    Args:
        collate: Makes a batch of items.
    """
    return partial(_collate_without_mask, collate)  # which goes to worker processes, as a closure does not


def _collate_without_mask(collate: Callable[[Any], dict[str, Any]], items: Any) -> dict[str, Any]:
    batch = collate(items)
    batch.pop("attention_mask", None)
    return batch


def chosen_options(chosen: Plan | None) -> dict[str, Any]:
    """The method's options that a plan decided."""
    if chosen is None:
        return {}
    s = chosen.scenario
    found = {"budget": s.options["budget"]} if "budget" in s.options else {}
    return found | ({"state_format": s.state_format} if s.state_format else {})


class MemoryWatch(TrainerCallback, ExportableState):
    """Checkpoints the lowest layers that train, as many as each draw needs, and watches a step's memory.

    With a plan, the formula says for each draw how many layers that is, set right by what the tracker found for the
    worst draw; fewer than all are tried in the laboratory before they are trusted. On a CPU each step is tracked; on a
    GPU its allocator counts.

    Attributes:
        measured_bytes: Most live bytes of a step so far; what an optimizer keeps in main memory is left out.
        estimate_bytes: Largest estimate of a draw so far.
        draw: Blocks of that draw, by name.
        layers: Its checkpointed layers, -1 for all.

    Args:
        model: What trains.
        chosen: The plan, or None.
        meter: The run's meter, which looks at the GPU's peak before it is set back.
        layers: Layers to checkpoint for every draw, -1 for all; None, with a plan alone, chooses them for each draw.
        limit_bytes: With a plan: what there is.
    """

    def __init__(self, model: Any, chosen: Plan | None, meter: Meter, layers: int | None, limit_bytes: int = 0) -> None:
        self.measured_bytes = self.estimate_bytes = 0
        self.draw: list[str] = []
        self.layers = chosen.scenario.checkpointing if chosen is not None else layers or 0
        self._model, self._chosen, self._meter, self._limit = model, chosen, meter, limit_bytes
        self._choose = layers is None and self.layers != 0
        self._now: tuple[str, ...] | None = None
        self._stack, self._step_stack = ExitStack(), ExitStack()
        self._tracker: MemoryTracker | None = None
        self._beside = 0  # bytes that the optimizer keeps in main memory
        self._layers = self.layers
        if chosen is not None:
            laboratory = chosen.laboratory
            self._index = {block.name: i for i, block in enumerate(laboratory.blocks)}
            worst = laboratory.active  # of the plan's measurement
            self._ratio = chosen.peak.peak.total_bytes / self._formula(worst, self.layers)

    @classmethod
    def of(cls, job: Any, model: Any, chosen: Plan | None, meter: Meter) -> MemoryWatch | None:
        """The watch of a run, if it has anything to do.

        Args:
            job: The run, a `misa.training.run.Job`.
            model: What trains.
            chosen: The plan for its memory budget, or None.
            meter: The run's meter.
        """
        layers = job.memory.checkpoint_layers
        if chosen is None and layers is None:
            return None
        if chosen is not None and job.training.gradient_checkpointing:
            layers = ALL_LAYERS
        limit = parse_bytes(job.memory.memory_budget, "memory_budget") if chosen is not None else 0
        return cls(model, chosen, meter, layers, limit)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in the form transformers asks for."""
        names = ("measured_bytes", "estimate_bytes", "draw", "layers")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def restore(self, state: TrainerState) -> None:
        """Take over what a checkpoint kept.

        Args:
            state: Trainer state read from the checkpoint.
        """
        for name, value in state.stateful_callbacks[type(self).__name__]["attributes"].items():
            setattr(self, name, value)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go on where a checkpoint stood."""
        if state.global_step > 0:
            self.restore(state)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Set the layers of a new draw; begin to track."""
        inner = unwrapped(optimizer)
        active = tuple(getattr(inner, "active", ()))
        if active != self._now:
            self._now = active
            self._set_layers(active)
        if self._chosen is None:
            return
        if torch.cuda.is_available():
            self._meter.look()
            torch.cuda.reset_peak_memory_stats()
            return
        self._tracker = tracker = MemoryTracker()
        tracker.watch_model(self._model)
        tracker.watch_optimizer(inner)
        sizes = inner.state_bytes()
        self._beside = sizes["residual"] + sizes["kept"]
        self._stack.enter_context(tracker)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on workspaces come and go."""
        if self._tracker is not None:
            self._step_stack.enter_context(self._tracker.phase("step"))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The update is done."""
        self._step_stack.close()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop tracking; keep the largest peak."""
        self.stop()

    def stop(self) -> None:
        """End the tracking of a step, also of one that failed."""
        self._step_stack.close()
        self._stack.close()
        if self._tracker is not None:
            self.measured_bytes = max(self.measured_bytes, self._tracker.peak.total_bytes - self._beside)
            self._tracker = None
        elif self._chosen is not None and torch.cuda.is_available():
            self.measured_bytes = max(self.measured_bytes, torch.cuda.max_memory_allocated())

    def _set_layers(self, active: tuple[str, ...]) -> None:
        if self._chosen is not None:
            draw = tuple(self._index[name] for name in active)
            if self._choose:
                limit = 0.99 * self._limit / self._ratio
                self._layers = fewest_layers(lambda num: self._formula(draw, num), self._chosen.laboratory, limit)
                # With some layers checkpointed the formula leaves out a few per cent, of a small model more.
                while self._layers > 0 and self._measured(draw) > self._limit:
                    self._layers += 1
                    if self._layers == self._chosen.laboratory.config.num_hidden_layers:
                        self._layers = ALL_LAYERS
            estimate = round(self._ratio * self._formula(draw, self._layers))
            if estimate > self.estimate_bytes:
                self.estimate_bytes, self.draw, self.layers = estimate, list(active), self._layers
        checkpoint_layers(self._model, self._layers)

    def _measured(self, draw: tuple[int, ...]) -> int:
        assert self._chosen is not None
        self._chosen.laboratory.switch_to(draw)
        return self._chosen.laboratory.measure(checkpointing=self._layers).peak.total_bytes

    def _formula(self, draw: tuple[int, ...], layers: int) -> int:
        assert self._chosen is not None
        return Draws(self._chosen.laboratory, 1, checkpointing=layers).estimate(draw).peak_bytes

    def report(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Predict the largest draw by the tracker, and say how that compares with what was measured.

        Returns:
            Peaks for the result file, and the plan for its configuration; nothing without a plan.
        """
        if self._chosen is None:
            return {}, {}
        laboratory, s = self._chosen.laboratory, self._chosen.scenario
        laboratory.switch_to([self._index[name] for name in self.draw])
        setting = {"loss": s.loss, "lean_activations": s.lean_activations, "checkpointing": self.layers}
        predicted = laboratory.measure(**setting).peak.total_bytes
        measured = self.measured_bytes
        logger.log(
            logging.INFO if measured <= self._limit else logging.WARNING,
            "memory: predicted %s, measured %s (%+.1f %%) of %s%s",
            *(in_gib(predicted), in_gib(measured), 100 * (measured / predicted - 1), in_gib(self._limit)),
            "" if measured <= self._limit else ", which is more than it may take",
        )
        peaks = {"budget_bytes": self._limit, "predicted_bytes": predicted, "measured_bytes": measured}
        found = {**asdict(s), "reasons": list(self._chosen.reasons), "checkpointed_at_peak": self.layers}
        return peaks, {"memory_plan": found}
