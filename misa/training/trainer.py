"""`transformers.Trainer` with two things settled: the order of the data, and checkpoints that a kill cannot spoil."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length, rotate_checkpoints

from misa.data.packing import IGNORED
from misa.data.sampling import SeededSampler
from misa.distributed.agree import on_first
from misa.files import seal, write_text
from misa.training.checkpoints import STAGING_FOLDER, best_checkpoint
from misa.training.errors import DivergedError
from misa.training.meter import unwrapped

# Where a streamed data set stood.
STREAM_FILE = "stream.json"


class Trainer(transformers.Trainer):
    """Trainer whose data order depends on the seed alone, and which moves a checkpoint into place when it is whole.

    transformers' own samplers draw from the global random state where lengths are grouped, so a method that draws
    random numbers first (LoRA's adapters) would see other batches, and a resumed run would not find its order again.
    """

    stop_on_nan = True
    # A `misa.training.memory.MemoryWatch`, where memory is limited.
    watch: Any = None
    _staging: str | None = None
    # Whether the checkpoint to train on from is one of another run.
    _is_foreign = False
    # The checkpoint whose random state is to be there when the first batches of a stream that goes on have been read.
    _random_state_of: str | None = None
    # Losses of this step's passes that have not been looked at yet.
    _losses: list[Any]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass, and look at its loss: at once on a processor, elsewhere once a step, to wait less often."""
        loss = super().training_step(*args, **kwargs)
        if not self.stop_on_nan:
            return loss
        self._losses = [*getattr(self, "_losses", []), loss.detach()]
        last = self.accelerator.sync_gradients
        if last or loss.device.type == "cpu":
            losses = self._losses
            finite = [bool(value) for value in torch.isfinite(torch.stack(losses))]
            if not all(finite):
                bad = finite.index(False)
                self._losses = []
                raise DivergedError(self._divergence(float(losses[bad]), bad))
            if last:
                self._losses = []
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate by the plain loss: with smoothed labels it would be no likelihood, and no perplexity follow."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    def num_planned_steps(self) -> int | None:
        """Optimizer steps of the whole run, or None for a stream, which has no length, without `max_steps`."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        if not has_length(self.train_dataset):
            return None
        return math.ceil(self.args.num_train_epochs * self._steps_in_epoch(len(self.train_dataset)))

    def _steps_in_epoch(self, num_items: int) -> int:
        batches = num_items / (self._train_batch_size * self.args.world_size)
        batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
        return max(1, math.ceil(batches / self.args.gradient_accumulation_steps))

    def _divergence(self, loss: float, number: int) -> str:
        """Say at which step and for which records the loss broke."""
        where = f"loss is {loss} at step {self.state.global_step + 1}"
        try:
            sampler = self._get_train_sampler()
            size = self._train_batch_size
            accumulation = self.args.gradient_accumulation_steps
            epoch, step = divmod(self.state.global_step, self._steps_in_epoch(len(sampler)))
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            begin = (step * accumulation + number) * size * self.args.world_size
            records = list(sampler)[begin : begin + size * self.args.world_size]
        except TypeError:
            # A stream has no length.
            return f"{where}, pass {number + 1} of the step"
        return f"{where} (epoch {epoch + 1}), in the batch of training records {', '.join(map(str, records))}"

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Read the batches of a step; that a stream is opened anew, which draws a random number, changes no dropout."""
        found = super().get_batch_samples(*args, **kwargs)
        self._load_rng_state(self._random_state_of)
        self._random_state_of = None
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        lengths = getattr(dataset, "lengths", None)
        if strategy == "group_by_length" and lengths is not None:
            # All processes draw from one order, so a batch of equal lengths is the batch of all of them.
            batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return SeededSampler(len(dataset), seed, lengths, batch_size)
        # Items without lengths are all equally long; transformers would read them all to find that out.
        if strategy == "group_by_length" and has_length(dataset):
            return SeededSampler(len(dataset), seed)
        sampler = super()._get_train_sampler(train_dataset)
        return SeededSampler(len(dataset), seed) if isinstance(sampler, RandomSampler) else sampler

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save where it is time to, and begin the next sum of losses with nothing.

        transformers takes a sum away from itself, which leaves one that is no number as it is, for good.
        """
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens that are not padding, also where no attention mask tells them apart.

        transformers would go by the padding token, which closes every record where the tokenizer has no other.
        """
        if "attention_mask" not in inputs:
            # The last token of a record has a label, so what follows the last label of a row is padding.
            labelled = inputs["labels"] != IGNORED
            inputs = {**inputs, "attention_mask": labelled.flip(1).cumsum(1) > 0}
        super()._track_num_input_tokens(inputs)

    def continue_from(self, checkpoint: Path, is_foreign: bool, same_stream: bool) -> None:
        """Train on from a checkpoint.

        A streamed data set goes on reading where it stood; transformers would read everything before it again. From
        another run come weights, step and what its optimizer has gathered, but neither settings nor a best model.

        Args:
            checkpoint: Folder of the checkpoint.
            is_foreign: Whether it is one of another run.
            same_stream: Whether this run reads the stream that the checkpoint's run read, as much of it in a step.
        """
        self._is_foreign = is_foreign
        # The evaluation before a run's own first step is in its record already.
        changed = {} if is_foreign else {"eval_on_start": False}
        if same_stream and (checkpoint / STREAM_FILE).is_file():
            self.train_dataset.resume(json.loads((checkpoint / STREAM_FILE).read_text(encoding="utf-8")))
            changed["ignore_data_skip"] = True
            self._random_state_of = str(checkpoint)
        named = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).best_model_checkpoint
        best = None if is_foreign else on_first(lambda: best_checkpoint(named, self.args.output_dir))
        self.add_callback(_Recall(best, forget=best is None and (is_foreign or named is not None)))
        asked = {name: getattr(self.args, name) for name in changed}
        vars(self.args).update(changed)
        try:
            self.train(resume_from_checkpoint=str(checkpoint))
        finally:
            # The run's record shows what was asked for.
            vars(self.args).update(asked)

    def load_optimizer(self, checkpoint: Path) -> None:
        """Load the optimizer's state of another run, but for the settings of its groups, which stay this run's.

        Args:
            checkpoint: Folder of the checkpoint.

        Raises:
            ValueError: If the state is that of another optimizer.
        """
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        # Where their numbers differ, loading says so.
        for saved, own in zip(state["param_groups"], self.optimizer.param_groups, strict=False):
            if saved.get("rank") != own.get("rank"):  # GaLore's moments have the size of its projections
                raise ValueError(f"the rank of projections was {saved.get('rank')} and is {own.get('rank')}")
            # A scheduler that is made later would begin with it.
            saved.pop("initial_lr", None)
            saved.update({name: value for name, value in own.items() if name not in ("params", "param_names")})
        self.optimizer.load_state_dict(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """After another run, the schedule is this run's, and stands at the step of the checkpoint."""
        if checkpoint is None or not self._is_foreign:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.load_optimizer(Path(checkpoint))
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):  # others go by the losses that they see
            last = self.state.global_step - 1
            self.lr_scheduler = LambdaLR(self.optimizer, schedule.lr_lambdas, last_epoch=last)

    def _load_callback_state(self) -> None:
        """Another run may have had no limit on its memory, and what it took is not what this one takes."""
        if self._is_foreign and self.watch is not None:
            self.state.stateful_callbacks[type(self.watch).__name__] = self.watch.state()
        super()._load_callback_state()

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save into a side folder, list the files, and only then move the checkpoint to its place."""
        folder = Path(self.args.output_dir)
        staging = folder / STAGING_FOLDER
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        # Here all processes are; the optimizer is asked for its state on the first alone.
        optimizer = unwrapped(self.optimizer)
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(folder / name)
        if self.args.should_save:
            if self.state.best_model_checkpoint != best:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            # The pickled arguments hold absolute paths and are not needed to continue.
            with contextlib.suppress(FileNotFoundError):
                (staging / name / "training_args.bin").unlink()
            if hasattr(self.train_dataset, "position"):
                items = self.state.global_step * self._train_batch_size * self.args.gradient_accumulation_steps
                position = self.train_dataset.position(items * self.args.world_size)
                write_text(staging / name / STREAM_FILE, json.dumps(position))
            seal(staging / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (staging / name).replace(folder / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, best_model_checkpoint=self.state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()


class Schedule(TrainerCallback):
    """Make a run's record the same whether or not it was interrupted.

    A checkpoint in the middle of a logging interval would lose the losses since the last point of the curve, so
    every checkpoint closes the interval, and so does an evaluation that may be followed by one. One of an epoch's last
    step would lose the evaluation of the epoch, so that comes before it. The last step is logged and, if there is
    evaluation data, evaluated.

    Args:
        evaluate_at_end: Whether to evaluate after the last step.
    """

    def __init__(self, evaluate_at_end: bool) -> None:
        self.evaluate_at_end = evaluate_at_end
        self._evaluated = 0  # the last step that was evaluated before its epoch ended

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for a log with every checkpoint, and for everything at the last step."""
        last = state.global_step >= state.max_steps
        if control.should_save or last or (control.should_evaluate and args.save_strategy == "best"):
            control.should_log = True
        ends_epoch = args.eval_strategy == "epoch" and state.epoch == int(state.epoch) >= args.eval_delay
        if (last and self.evaluate_at_end) or (control.should_save and ends_epoch):
            control.should_evaluate = True
        if control.should_evaluate:
            self._evaluated = state.global_step
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for a log with every checkpoint; evaluate no step again because an epoch ends with it."""
        if state.global_step == self._evaluated:
            control.should_evaluate = False
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            control.should_log = True
        return control


class _Recall(TrainerCallback):
    """Correct what transformers takes from the record of a checkpoint: the best model so far, and how often to save.

    Args:
        best: Where the best checkpoint lies now; transformers has forgotten one whose folder was moved.
        forget: Whether to look for the best model anew.
    """

    def __init__(self, best: str | None, forget: bool) -> None:
        self._best = best
        self._forget = forget

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Correct the record."""
        state.compute_steps(args, state.max_steps)
        state.best_model_checkpoint = self._best
        if self._forget:
            state.best_metric = state.best_global_step = None
        if args.eval_on_start:  # which follows, of the same step
            history = state.log_history
            state.log_history = [e for e in history if "eval_loss" not in e or e["step"] < state.global_step]
