"""Block-coordinate optimization: only the blocks drawn for the current round are trainable and hold state."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from misa.checks import check_number
from misa.distributed.workers import Workers
from misa.distributed.wrapped import unwrapped
from misa.gradients import Probe
from misa.inner import warn_if_lost_in_rounding
from misa.integration.first_forward import FirstForward, warn_if_frozen, warn_if_unreached
from misa.integration.record import RoundRecord
from misa.integration.wrappers import refuse_unsupported
from misa.optimizer import importance, state
from misa.optimizer.active import ActiveSet
from misa.optimizer.blocks import Block, partition, rest
from misa.optimizer.settings import Settings, make_sampler
from misa.parameters import Entry, Freezing, NamedParameter, left_out, trainable, warn_unmatched


class BlockCoordinateOptimizer(torch.optim.Optimizer):
    """Adam (or any optimizer) on a few blocks of a model at a time.

    At the start of a round some blocks are drawn; for `interval` steps they are the only trainable parameters of the
    model, and the only ones with gradients, moments or fp32 master copies; then their importance is updated and the
    next blocks are drawn (Algorithm 1 of arXiv 2511.00056). It is a `torch.optim.Optimizer`: closures, hooks,
    schedulers, parameter groups, `copy.deepcopy` and `pickle` work as on AdamW.

    Args:
        params: A model; or its `(name, parameter)` pairs, all of them; or parameter groups of such pairs, each with
            its own `lr` or `weight_decay`. From a model, parameters of one dimension get no weight decay.
        settings: How to split, draw and step.
        lr: Learning rate. Default 1e-3.
        betas: Adam's moment factors. Default (0.9, 0.999). Another inner optimizer has its own in `inner_kwargs`.
        eps: Adam's epsilon. Default 1e-8. As `betas`.
        weight_decay: Decoupled weight decay of active weights. Default 0.

    Raises:
        ValueError: for settings out of range, parameters without names, or a budget that no block fits.
    """

    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling to us, which admits fp16 weights

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        settings: Settings,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check_number(name, value)
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas={betas}: both must lie in [0, 1)")
        self.settings = settings
        model = unwrapped(params) if isinstance(params, nn.Module) else None
        groups: list[Any] = [] if isinstance(params, nn.Module) else list(params)
        groups = [{**g, "params": list(g["params"])} if isinstance(g, dict) else g for g in groups]
        pairs = [pair for g in groups for pair in (g["params"] if isinstance(g, dict) else [g])]
        source = pairs if model is None else model
        if model is not None:
            refuse_unsupported(model)
        self.blocks: tuple[Block, ...] = partition(source, settings.granularity, settings.include, settings.exclude)
        others = rest(source, self.blocks)
        warn_unmatched(settings.always_on, others)
        always = [pair for kind in settings.always_on for pair in others[kind]]
        trained = [pair for b in self.blocks for pair in b.params] + always
        if model is not None:
            parts: list[tuple[list[NamedParameter], dict[str, Any]]] = [(trained, {})]
            if settings.always_on_lr is not None:
                parts = [(trained[: len(trained) - len(always)], {}), (always, {"lr": settings.always_on_lr})]
            groups = [{"params": [x for x in part if x[1].ndim >= 2], **own} for part, own in parts]
            groups += [
                {"params": [x for x in part if x[1].ndim < 2], **own, "weight_decay": 0.0} for part, own in parts
            ]
            groups = [group for group in groups if group["params"]]
        elif settings.always_on_lr is not None:
            raise ValueError(f"always_on_lr={settings.always_on_lr}: needs a model; give a parameter group its own lr")
        self._owned = [p for _, p in trainable(source)]  # what the caller had not frozen
        total = sum(p.numel() for p in self._owned)
        self._owned += left_out(source, self._owned)
        self._block_of = {p: i for i, b in enumerate(self.blocks) for _, p in b.params}
        self._off = set(self._owned) - {p for _, p in trained}  # frozen for good
        self._entries: dict[nn.Parameter, Entry] = {}
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        types = {e.param.dtype for e in self._entries.values()}
        if settings.state_format not in ("master", "inner") and (left := types - {torch.bfloat16, torch.float32}):
            raise ValueError(f"state_format={settings.state_format!r}: needs bf16 or fp32 weights, found {left}")
        warn_if_lost_in_rounding(settings, lr, types)
        self._sampler = make_sampler(self.blocks, settings, total)
        self._round = self._num_steps = self._step_in_round = self._num_idle = self._most_numel = 0
        self._workers = Workers(source, settings)
        self._record = None if settings.record is None or self._workers.rank else RoundRecord(settings.record)
        self._scores, self._counts, self._values = np.zeros((3, len(self.blocks)))
        self._rounding = torch.Generator().manual_seed(settings.seed)
        self._num_good = 0  # steps taken in finished rounds
        self._gathered: dict[str, Any] | None = None  # state of all processes, until the next step
        self._probe = Probe(self._workers)
        self._freezing = Freezing(self, self._owned, model)
        self._on = self._active_set()
        self._draw()
        self._freezing.drop_gradients()
        self._model = None if model is None else weakref.ref(model)
        self._first_forward = None if model is None else FirstForward(model, self)

    # ---- what users read -------------------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the blocks that are on in this round."""
        return tuple(self.blocks[i].name for i in self._active)

    @property
    def probabilities(self) -> dict[str, float]:
        """Sampling probability of every block, as used for the current round's draw; equal if scores do not count."""
        return dict(zip((b.name for b in self.blocks), importance.normalized(self._log_p).tolist(), strict=True))

    @property
    def scores(self) -> dict[str, float]:
        """Importance score of every block, as the next draw will read it."""
        values = importance.read(self._values, self._counts, self.settings.score)
        return dict(zip((b.name for b in self.blocks), values.tolist(), strict=True))

    @property
    def round(self) -> int:
        """Number of finished rounds."""
        return self._round

    @property
    def num_skipped_steps(self) -> int:
        """Steps skipped because a gradient was NaN or infinite (reads the device)."""
        return self._num_steps - self._num_good - self._on.norms.read()[1]

    @property
    def active_numel(self) -> int:
        """Number of elements trained in this round, always-on parameters included."""
        return sum(e.param.numel() for e in self._on.entries)

    @property
    def trained_numel(self) -> dict[str, int]:
        """Elements that train `now`, at `most` in one round so far, and that have `ever` been drawn or always on."""
        always = sum(e.param.numel() for e in self._entries.values() if e.block < 0)
        ever = always + sum(self.blocks[i].numel for i in self._sampler.used)
        return {"now": self.active_numel, "most": self._most_numel, "ever": ever}

    def state_bytes(self) -> dict[str, int]:
        """Bytes held by the optimizer: `master`, `moments`, and on the CPU `residual` and `kept` state.

        Scalars such as step counters are not counted.
        """
        return state.state_bytes(self)

    # ---- torch.optim.Optimizer -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; parameters added after construction are always on."""
        super().add_param_group(param_group)
        if hasattr(self, "_on"):
            self._off.difference_update(self.param_groups[-1]["params"])
        number = len(self.param_groups) - 1
        params = self.param_groups[-1]["params"]
        names = self.param_groups[-1]["param_names"]  # torch refuses a group without, where the others have them
        added = [(name, p) for name, p in trainable(zip(names, params, strict=True)) if p not in self._off]
        self._entries |= {p: Entry(name, p, number, self._block_of.get(p, -1)) for name, p in added}
        if hasattr(self, "_on"):
            norms, counts = self._on.norms, self._on.group_state()
            known = set(self._owned)
            self._owned += [p for _, p in added if p not in known]
            self._switch_to(self._active)
            self._on.norms, self._on.group_state_before = norms, counts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimizer step on the active parameters; the last of a round draws the next blocks.

        A step without any gradient changes nothing and is not counted. A step with a NaN or infinite gradient changes
        no weight and is counted in `num_skipped_steps`; but with `step_in_backward` the finite gradients are applied by
        then, and the last momentum step of Algorithm 1 is taken in any case. `closure` re-evaluates the model; its loss
        is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._workers.settle()
        entries = self._on.with_gradient()
        if not entries:
            self._num_idle += 1
            warn_if_unreached(self._num_idle, self.settings.interval, self.active)
            return loss
        self._num_idle = 0
        self._gathered = None
        found = self.__dict__.get("found_inf")  # set by a GradScaler, with grad_scale unless it has unscaled
        overflow = None if found is None else torch.as_tensor(found)
        self._on.step(entries, self.__dict__.get("grad_scale"), overflow)
        self._num_steps += 1
        self._step_in_round += 1
        if self._step_in_round >= self._round_length:
            self._end_round()
        elif self.settings.round_warmup or self.settings.probe_every:
            self._on.lr_factor = self._lr_factor
            self._start_probe_if_due()
        return loss

    def no_sync(self) -> AbstractContextManager[None]:
        """Between processes: accumulate the gradients of backward passes in this context without sending them."""
        return self._workers.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of what is on, and what was measured of them; nothing else has any."""
        self._probe.forget()
        for e in self._on.entries:
            if not self.settings.step_in_backward:  # there the norm says that the step was taken
                e.norm = None
            if set_to_none:
                e.param.grad = None
            elif e.param.grad is not None:
                e.param.grad.detach_().zero_()

    def state_dict(self, *, in_parts: bool = False) -> dict[str, Any]:
        """Everything needed to continue bit for bit: tensors, numbers, strings, keyed by parameter name.

        With `in_parts`, what `shard_state` shares out comes as DTensors of the parts, for
        `torch.distributed.checkpoint`; what FSDP2 shards always does.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        result = state.pack(self) if in_parts or self._gathered is None else self._gathered
        if self._workers.shares_state and not in_parts and self._gathered is None and result["state"]:
            raise RuntimeError(
                "shard_state=True: each process holds a part of the state. Call consolidate_state_dict() on all "
                "processes after the step, then state_dict() on process 0, or save with misa.distributed.checkpoint"
            )
        for post in self._optimizer_state_dict_post_hooks.values():
            changed = post(self, result)
            result = result if changed is None else changed
        return result

    def consolidate_state_dict(self) -> None:
        """Gather on process 0 what `shard_state` has shared out, for `state_dict` before the next step.

        All processes call this together, as `torch.distributed.optim.ZeroRedundancyOptimizer` has it. Without
        `shard_state` it does nothing.
        """
        if self._workers.shares_state:
            self._gathered = self._workers.gather_state(state.pack(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; a ValueError says how names, shapes, types or order of the model differ."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._gathered = None
        warn_if_frozen(self._freezing.is_overruled)
        state.unpack(self, state_dict)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def release(self) -> None:
        """Free all state and leave `requires_grad` of every parameter, and the model's checkpointing, as found."""
        self._stop_probe()
        self._on.detach()
        self._num_good += self._on.norms.read()[1]
        if not self._freezing.is_overruled:  # then gradients are another optimizer's
            self.zero_grad()
        self._on = self._active_set()
        for e in self._entries.values():
            e.drop_state(keep_residual=False)
            e.residual = None
        self._freezing.thaw()
        if self._model is not None and self._first_forward is not None and (model := self._model()) is not None:
            self._first_forward.undo(model)
        self._workers.close()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy; as in torch, hooks stay behind, and so does a scheduler's wrapper of `step`."""
        left = ("step", "_on", "_model", "_first_forward", "_probe", "_workers", "_freezing", "found_inf", "grad_scale")
        values = {k: v for k, v in self.__dict__.items() if k not in left and not k.endswith("_hooks")}
        return values | {"_packed": state.pack(self), "state": defaultdict(dict)}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """Restore, and attach to the (copied) parameters."""
        packed = values.pop("_packed", None)
        super().__setstate__(values)
        if packed is not None:
            self._model = self._first_forward = None
            self._workers = Workers([(e.name, e.param) for e in self._entries.values()], self.settings, copied=True)
            self._probe = Probe(self._workers)
            self._freezing = Freezing(self, self._owned)
            self._on = self._active_set()
            state.unpack(self, packed)

    # ---- rounds ----------------------------------------------------------------------------------------------------

    def _active_set(self, entries: Sequence[Entry] = (), active: tuple[int, ...] = ()) -> ActiveSet:
        return ActiveSet(entries, active, self.settings, self.param_groups, self.state, self._rounding, self._workers)

    def _draw(self) -> None:
        """Draw the blocks of the next round and switch them on."""
        s = self.settings
        scores = importance.read(self._values, self._counts, s.score)
        eta = 0.0
        if s.order == "importance":
            eta = importance.auto_eta(scores, s.effective_share) if s.eta == "auto" else float(s.eta)
        self._log_p = importance.log_weights(scores, eta, s.score.clip)  # up to a constant
        drawn = self._workers.draw(self._sampler, self._rounding, self._log_p)
        # A first pass over never-used blocks may end anywhere; the round after it ends at a multiple of the interval.
        since = self._num_steps % s.interval if s.first_pass else 0
        self._round_length = 1 if self._sampler.in_first_pass else s.interval - since
        self._switch_to(drawn)

    def _switch_to(self, active: tuple[int, ...]) -> None:
        """Make the parameters of these blocks, and the always-on ones, the trainable ones."""
        self._stop_probe()
        self._on.detach()
        self._active = active
        on = [self._entries[p] for i in active for _, p in self.blocks[i].params if p in self._entries]
        on += [e for e in self._entries.values() if e.block < 0]
        for e in set(self._on.entries) - set(on):
            self._freezing.set_trainable(e.param, False)
            e.param.grad = None
        for e in on:
            self._freezing.set_trainable(e.param, True)
        self._on = self._active_set(on, active)
        self._on.lr_factor = self._lr_factor
        self._most_numel = max(self._most_numel, self.active_numel)
        self._start_probe_if_due()

    @property
    def _lr_factor(self) -> float:
        """Of the next step: below 1 in the warm-up of the round."""
        return min(1.0, (self._step_in_round + 1) / (self.settings.round_warmup + 1))

    def _end_round(self) -> None:
        """Finish the inner rule, update the scores, draw again, and free what went off."""
        self._on.finish()
        self._workers.require_equal()
        sums, num_good = self._on.norms.read()
        measured = self._workers.mean(self._measured(sums, num_good), len(self.blocks))
        importance.update(self._scores, self._counts, self._values, measured, self.settings.score)
        if self._record is not None:
            self._record.append(self, measured)
        before, active_before = self._on.entries, self._active
        self._round += 1
        self._step_in_round = 0
        self._num_good += num_good
        self._draw()
        if self._first_forward is not None and self._active != active_before:
            self._first_forward.warn_if_compiled(len(self.blocks))
        policy = self.settings.state_policy
        for e in before:
            stays = e.block < 0 or e.block in self._active
            if policy == "reset" or (policy == "drop" and not stays):
                e.drop_state(keep_residual=self.settings.residual == "cpu")
            elif policy == "cpu" and not stays:
                e.move_state("cpu")
        self._on.prepare()

    def _measured(self, sums: list[float], num_good: int) -> dict[int, float]:
        """The round's mean of what is scored, for every block that was measured."""
        rule = self.settings.score
        found: dict[int, float] = {}
        if num_good:
            num_steps = self.settings.interval if rule.per_interval else num_good
            found = {i: total / num_steps for i, total in zip(self._active, sums, strict=True)}
        for i, norm in self._probe.norms(self._on.unscale).items():
            found[i] = norm * norm if rule.squared else norm
        # Scores square a plain norm: it is divided by the root of the size.
        power = (1 if rule.squared else 0.5) * rule.per_parameter
        return {i: value / self.blocks[i].numel ** power for i, value in found.items() if math.isfinite(value)}

    def _start_probe_if_due(self) -> None:
        """For the last step of every so many rounds, switch all blocks on; see `Probe`."""
        every = self.settings.probe_every
        if not every or (self._round + 1) % every or self._step_in_round != self._round_length - 1:
            return
        for i in set(range(len(self.blocks))) - set(self._active):
            params = [p for _, p in self.blocks[i].params]
            for p in params:
                self._freezing.set_trainable(p, True)
            self._probe.watch(i, params)

    def _stop_probe(self) -> None:
        for i in self._probe.blocks:
            for _, p in self.blocks[i].params:
                self._freezing.set_trainable(p, False)
        self._probe.stop()
