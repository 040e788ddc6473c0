"""Carry out one training run: begin, continue or recognise it, train, evaluate, and write its result last."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from misa.data.records import StreamError
from misa.distributed.agree import on_first
from misa.files import new_folder
from misa.results import (
    CURVES_FILE,
    RESULT_FILE,
    Result,
    provenance,
    write_curves,
    write_result,
)
from misa.training import folders
from misa.training.checkpoints import best_checkpoint, checkpoints, latest_checkpoint, remove_checkpoints, step_of
from misa.training.checks import check_parts, check_schedule, require_one_pass
from misa.training.curves import curve_points, mean_loss
from misa.training.errors import DivergedError
from misa.training.identity import matters
from misa.training.lock import FolderLock
from misa.training.options import MemoryOptions, MethodOptions, RunOptions
from misa.training.space import require_space

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """What a run trains with; made only when it is really needed, since loading takes time.

    Attributes:
        model: The model, before the method is applied to it.
        tokenizer: The tokenizer to save with it.
        train_dataset: Training items, with `lengths` if these differ.
        eval_dataset: Items of the evaluation loss, or None.
        collator: Makes a batch of items.
        metrics: Turns the final evaluation loss into further metrics.
    """

    model: Any
    tokenizer: Any
    train_dataset: Any
    eval_dataset: Any
    collator: Any
    metrics: Callable[[float], dict[str, float]] = field(default=lambda loss: {})


@dataclass
class Job:
    """A run as it is asked for.

    Attributes:
        kind: finetune or pretrain.
        run: Where it lies and how it continues.
        method: Which method trains.
        training: `transformers.TrainingArguments`; its output_dir is the checkpoint folder.
        settings: The command's own settings, resolved.
        model: Name of the model.
        data: Name of the data.
        data_digest: SHA-256 over the data files.
        command: The command line.
        make: Makes the parts.
        evaluation: Words of the `misa.evaluate` command that scores the trained model, or None.
        memory: What is done to need less memory.
    """

    kind: Literal["finetune", "pretrain"]
    run: RunOptions
    method: MethodOptions
    training: Any
    settings: dict[str, Any]
    model: str
    data: str
    data_digest: str
    command: Sequence[str]
    make: Callable[[], Parts]
    evaluation: Sequence[str] | None = None
    memory: MemoryOptions = field(default_factory=MemoryOptions)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, before a model is loaded."""
        if self.memory.checkpoint_layers is not None and self.training.gradient_checkpointing:
            raise ValueError(
                f"checkpoint_layers is {self.memory.checkpoint_layers}, and gradient_checkpointing, also called "
                "activation_checkpointing, means all layers; give one of them"
            )

    def config(self) -> dict[str, Any]:
        """Return every setting, resolved, in types that JSON keeps."""
        training = {name: value for name, value in self.training.to_dict().items() if matters(name)}
        run = {**vars(self.run), "checkpoint_dir": self.training.output_dir, "run": self.name}
        method = {"method": self.method.method, "method_options": self.method.given()}
        others = {"num_processes": self.training.world_size, "data_digest": self.data_digest}
        config = {**training, **self.settings, **self.memory.given(), **run, **method, **others}
        return json.loads(json.dumps(config, default=str))

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.run or Path(self.run.output_dir).resolve().name


def carry_out(job: Job) -> Result:
    """Carry out a run, or recognise that it is done.

    Killed at any moment and called again, it ends with the same weights and curves as without the kill: checkpoints
    are moved into place when whole, the model folder when whole, and the result file, which marks the run as done,
    comes last.

    Args:
        job: What to do.

    Returns:
        The result, which is also in the output folder.

    Raises:
        ValueError: If the output or checkpoint folder belongs to a run with other settings, or a setting is wrong.
    """
    lock = _lock(job)
    try:
        begun = _begin(job, lock)
        return begun if isinstance(begun, Result) else _complete(job, *begun)
    finally:
        lock.release()


def _lock(job: Job) -> FolderLock:
    return FolderLock([Path(job.run.output_dir), Path(job.training.output_dir)])


def _begin(job: Job, lock: FolderLock) -> Result | tuple[Parts, Any, Any, Any]:
    """Check what is asked for and load it; what the user can get wrong is found here, before anything is removed."""
    output, scratch = Path(job.run.output_dir), Path(job.training.output_dir)
    folders.spare_sources(job, output, scratch)
    done = on_first(lambda: folders.finished(job, output))
    if done is None:
        on_first(lock.acquire)
        # Whoever held the lock until now may have finished the run meanwhile.
        done = on_first(lambda: folders.finished(job, output))
    if done is not None:
        logger.info("%s is finished: %s is there, nothing to do", job.name, output / RESULT_FILE)
        on_first(lambda: folders.clear(job, done, scratch))
        return done
    if job.run.is_checkpoint():
        folders.check_start(job, Path(str(job.run.continue_from)))
    is_own = on_first(lambda: folders.owns_checkpoints(job, scratch))
    on_first(lambda: folders.spare_strangers(job, output, scratch))
    prepared = _prepare(job)
    if job.run.is_checkpoint() and not (is_own and checkpoints(scratch)):  # else it has begun and goes on by itself
        folders.check_rest(Path(str(job.run.continue_from)), prepared[2])
    on_first(lambda: folders.take(job, output, scratch, is_own))
    return prepared


def _complete(job: Job, parts: Parts, built: Any, trainer: Any, meter: Any) -> Result:
    scratch = Path(job.training.output_dir)
    try:
        keeps_best = job.training.load_best_model_at_end
        _train(job, trainer, meter, on_first(lambda: latest_checkpoint(scratch, keeps_best)))
    except KeyboardInterrupt:
        logger.info("stopped; the same command continues from the last checkpoint in %s", scratch)
        raise
    finally:
        if trainer.watch is not None:
            trainer.watch.stop()
    result = on_first(lambda: _write(job, parts, built, trainer, meter))
    if not job.run.keep_checkpoints:
        on_first(lambda: remove_checkpoints(scratch))
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    logger.info("%s is finished: %s  (%.0f s of training)", job.name, metrics, result.timings["train_s"])
    return result


def _prepare(job: Job) -> tuple[Parts, Any, Any, Any]:
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from misa.methods import build
    from misa.training.memory import MemoryWatch, apply_levers, chosen_options, without_mask
    from misa.training.meter import Meter
    from misa.training.progress import Progress
    from misa.training.snapshots import Snapshots, snapshot_steps
    from misa.training.trainer import Schedule, Trainer

    arguments = job.training
    snapshot_steps(job.run.snapshot_steps, arguments.max_steps)  # as far as it can be told before loading
    parts = job.make()
    check_parts(parts, arguments)
    check_schedule(arguments)
    plan = apply_levers(job, parts.model)
    # What a method draws for itself, such as the start of its adapters.
    set_seed(arguments.seed)
    built = build(
        job.method.method,
        parts.model,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        seed=arguments.seed,
        options=job.method.given() | chosen_options(plan),
    )
    if built.steps_in_backward:
        require_one_pass(job.method.method, arguments)
    logger.info("%s: %s", job.method.method, built.description)
    meter = Meter()
    trainer = Trainer(
        model=built.model,
        args=arguments,
        data_collator=parts.collator if plan is None else without_mask(parts.collator),
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        processing_class=parts.tokenizer,
        optimizer_cls_and_kwargs=built.optimizer_cls_and_kwargs,
        callbacks=[meter, Schedule(evaluate_at_end=parts.eval_dataset is not None)],
    )
    steps = snapshot_steps(job.run.snapshot_steps, trainer.num_planned_steps() or -1)
    trainer.create_optimizer()  # here, where what is wrong with its settings is the user's
    trainer.stop_on_nan = job.run.stop_on_nan
    if (watch := MemoryWatch.of(job, built.model, plan, meter)) is not None:
        trainer.watch = watch
        trainer.add_callback(watch)
    require_space(job, built)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if job.run.snapshot_steps is not None:
        trainer.add_callback(Snapshots(Path(job.run.output_dir) / folders.SNAPSHOTS_FOLDER, steps, parts.tokenizer))
    trainer.add_callback(Progress(meter, bar=False if arguments.disable_tqdm else None))
    return parts, built, trainer, meter


def _train(job: Job, trainer: Any, meter: Any, checkpoint: Path | None) -> None:
    """Train, from the run's own checkpoint if it has one.

    Raises:
        KeyboardInterrupt: If transformers has stopped by itself after a signal (`enable_jit_checkpoint`).
    """
    from transformers import TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if step_of(checkpoint) >= state.max_steps:
            # Only the result was missing. transformers would train one step too many here.
            logger.info("continuing from %s", checkpoint)
            named = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
            best = on_first(lambda: best_checkpoint(named, trainer.args.output_dir))
            trainer._load_from_checkpoint(best or str(checkpoint))
            state.best_model_checkpoint = best
            trainer.state = state
            for kept in filter(None, (meter, trainer.watch)):
                kept.restore(state)
            return
    is_foreign = checkpoint is None and job.run.is_checkpoint()
    if is_foreign:
        checkpoint = Path(str(job.run.continue_from))
    if checkpoint is None:
        trainer.train()
    else:
        logger.info("continuing from %s", checkpoint)
        trainer.continue_from(checkpoint, is_foreign, not is_foreign or folders.has_stream_of(job, checkpoint))
    if trainer.args.enable_jit_checkpoint and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt


def _write(job: Job, parts: Parts, built: Any, trainer: Any, meter: Any) -> Result:
    output = Path(job.run.output_dir)
    history = trainer.state.log_history
    points = curve_points(history)
    losses = [point for point in points if point.metric == "train_loss"]
    evaluations = {point.step: point.value for point in points if point.metric == "eval_loss"}
    metrics = {"train_loss": mean_loss(losses), "final_train_loss": losses[-1].value}
    if evaluations:
        # Of the model that is kept: the best one that was saved, or the last.
        best = trainer.state.best_model_checkpoint if job.training.load_best_model_at_end else None
        kept = step_of(Path(best)) if best is not None and Path(best).is_dir() else max(evaluations)
        eval_loss = evaluations.get(kept, evaluations[max(evaluations)])
        metrics |= {"eval_loss": eval_loss, **parts.metrics(eval_loss)}
    num_tokens = trainer.state.num_input_tokens_seen
    metrics |= {"num_steps": trainer.state.global_step, "num_tokens": num_tokens}
    # Without a result file, a model folder is a leftover of a run that was killed while writing.
    shutil.rmtree(output / folders.MODEL_FOLDER, ignore_errors=True)
    if job.run.save_model:
        with new_folder(output / folders.MODEL_FOLDER, last="config.json") as folder:
            trainer.model.save_pretrained(folder)
            parts.tokenizer.save_pretrained(folder)
    write_curves(points, output / CURVES_FILE)
    peaks = meter.peaks()
    predicted, planned = trainer.watch.report() if trainer.watch is not None else ({}, {})
    result = Result(
        run=job.name,
        kind=job.kind,
        method=job.method.method,
        model=job.model,
        data=job.data,
        seed=job.training.seed,
        config={
            **job.config(),
            **planned,
            "method_settings": json.loads(json.dumps(built.settings, default=str)),
        },
        provenance=provenance(job.command, job.data_digest),
        metrics=metrics,
        peaks=peaks | predicted,
        timings=meter.timings(num_tokens),
        curves=CURVES_FILE,
    )
    write_result(result, output)
    return result


def run_command(prog: str, job: Callable[[], Job]) -> int:
    """Run a training command and turn errors of its user into one line.

    Args:
        prog: Name of the command in messages.
        job: Makes the job from the command line.

    Returns:
        Exit status: 0 done, 1 the run failed, 2 something asked for is wrong, 130 interrupted.
    """
    with contextlib.ExitStack() as held:
        return _run_command(prog, job, held)


def _run_command(prog: str, job: Callable[[], Job], held: contextlib.ExitStack) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    first, began = os.environ.get("RANK", "0") == "0", dist.is_initialized()
    logging.getLogger("misa").setLevel(logging.INFO if first else logging.WARNING)

    from transformers.utils import logging as transformers_logging

    # Its bars, of reading and writing model files, would break up the log; the run's own bar is another.
    transformers_logging.disable_progress_bar()
    try:
        asked = job()
        lock = _lock(asked)
        held.callback(lock.release)
        begun = _begin(asked, lock)
    except (ValueError, OSError, ImportError) as error:
        if first:  # the others have found the same
            print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        # From here on an error is one of the program, and shows where it comes from.
        if not isinstance(begun, Result):
            _complete(asked, *begun)
        # The group of processes must not end inside the destructor of a wrapper that still holds it.
        del begun
        gc.collect()
        if dist.is_initialized() and not began:
            dist.destroy_process_group()
        if first and asked.evaluation is not None:
            from misa.evaluate import main as evaluate

            return evaluate(asked.evaluation)
    except KeyboardInterrupt:
        return 130
    except DivergedError as error:
        print(f"{prog}: error: {error}; no result is written (--stop_on_nan false goes on)", file=sys.stderr)
        return 1
    except StreamError as error:
        # A worker process wraps the message in where it comes from.
        reason = str(error).strip().splitlines()[-1].rpartition("StreamError: ")[-1]
        print(f"{prog}: error: {reason}; what was saved before stays", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or asked.training.output_dir
        print(f"{prog}: error: the disk is full: {where}; what was saved before stays", file=sys.stderr)
        return 1
    return 0
