"""What lies in the folders of a run: recognised, refused, and removed only when the run is known to be good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from misa.files import write_text
from misa.results import CURVES_FILE, RESULT_FILE, Result, read_result
from misa.training.checkpoints import RUN_FILE, checkpoints, fault, remove_checkpoints
from misa.training.identity import differences, have_one_stream

MODEL_FOLDER = "model"
SNAPSHOTS_FOLDER = "snapshots"
EVALUATION_FOLDER = "evaluation"


def spare_sources(job: Any, output: Path, scratch: Path) -> None:
    """Refuse to train from what the run itself would remove or overwrite.

    Args:
        job: The run, a `misa.training.run.Job`, as in all of these.
        output: Its output folder.
        scratch: Its checkpoint folder.

    Raises:
        ValueError: If a model, a tokenizer or a checkpoint that it starts from lies there.
    """
    lost = [output / MODEL_FOLDER]
    if job.run.overwrite_output_dir:
        lost += [output / SNAPSHOTS_FOLDER, scratch]
    sources = {name: job.settings.get(name) for name in ("model_name_or_path", "tokenizer_name_or_path")}
    for name, source in (sources | {"continue_from": job.run.continue_from}).items():
        for folder in lost:
            if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{name} is {source!r}, which this run would overwrite: choose another output_dir")


def spare_strangers(job: Any, output: Path, scratch: Path) -> None:
    """Refuse to put a model in the place of a folder that no run has written.

    Raises:
        ValueError: If there is one.
    """
    model = output / MODEL_FOLDER
    ours = (output / RESULT_FILE).is_file() or (scratch / RUN_FILE).is_file() or job.run.overwrite_output_dir
    if not ours and model.exists() and (not model.is_dir() or any(model.iterdir())):
        raise ValueError(
            f"{model} is there, and neither {RESULT_FILE} nor checkpoints of a run that wrote it; "
            "--overwrite_output_dir replaces it, or choose another output_dir"
        )


def check_start(job: Any, checkpoint: Path) -> None:
    """Refuse a checkpoint that a run cannot start from.

    Raises:
        ValueError: If it is damaged or of another method.
    """
    name = f"continue_from is {str(checkpoint)!r}, a checkpoint"
    if (problem := fault(checkpoint)) is not None:
        raise ValueError(f"{name} that cannot be used: {problem}")
    mark = checkpoint.parent / RUN_FILE
    method = json.loads(mark.read_text(encoding="utf-8")).get("method") if mark.is_file() else None
    if method not in (None, job.method.method):
        raise ValueError(f"{name} of method {method}, and this run's is {job.method.method}")


def check_rest(checkpoint: Path, trainer: Any) -> None:
    """Refuse a checkpoint whose state the run's model and optimizer do not have, or that leaves no step to train.

    Raises:
        ValueError: Saying which it is.
    """
    name = f"continue_from is {str(checkpoint)!r}, a checkpoint"
    step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if (planned := trainer.num_planned_steps()) is not None and planned <= step:
        raise ValueError(f"{name} of step {step}: this run has {planned} steps, so that none is left to train")
    if trainer.args.world_size > 1:  # parts of a state are put together while training starts
        return
    try:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.load_optimizer(checkpoint)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} of a run with another model, method options or optimizer: {reason}") from error


def has_stream_of(job: Any, checkpoint: Path) -> bool:
    """Whether a run reads the same stream, as much of it in a step, as the run that left a checkpoint."""
    mark = checkpoint.parent / RUN_FILE
    return mark.is_file() and have_one_stream(json.loads(mark.read_text(encoding="utf-8")), job.config())


def finished(job: Any, output: Path) -> Result | None:
    """Return the result that is there, if it is that of this run and is to stay.

    Raises:
        ValueError: If it is that of another run.
    """
    if not (output / RESULT_FILE).is_file() or job.run.overwrite_output_dir:
        return None
    result = read_result(output)
    changed = differences(result.config, job.config())
    if job.run.save_model and result.config.get("save_model") is False:
        changed = ", ".join(filter(None, (changed, "save_model False -> True")))
    if changed:
        raise ValueError(
            f"{output} holds the finished run {result.run!r} with other settings: {changed}; "
            "--overwrite_output_dir starts it again, or choose another output_dir"
        )
    return result


def owns_checkpoints(job: Any, scratch: Path) -> bool:
    """Say whether the checkpoints in the scratch folder, if any, are this run's.

    Raises:
        ValueError: If they are another's and must not go.
    """
    mark = scratch / RUN_FILE
    if not checkpoints(scratch):
        return True
    if not mark.is_file():
        raise ValueError(f"{scratch} holds checkpoints of something else; choose another checkpoint_dir")
    try:
        changed = differences(json.loads(mark.read_text(encoding="utf-8")), job.config())
    except (ValueError, AttributeError):
        changed = f"{RUN_FILE} is damaged"
    if changed and not job.run.overwrite_output_dir:
        raise ValueError(
            f"{scratch} holds checkpoints of a run with other settings: {changed}; "
            "--overwrite_output_dir starts again, or choose another checkpoint_dir"
        )
    return not changed


def clear(job: Any, result: Result, scratch: Path) -> None:
    """Remove the checkpoints of a finished run, which a kill may have left, unless they were to be kept."""
    mark = scratch / RUN_FILE
    if job.run.keep_checkpoints or result.config.get("keep_checkpoints") or not mark.is_file():
        return
    try:
        is_own = not differences(json.loads(mark.read_text(encoding="utf-8")), job.config())
    except (ValueError, AttributeError):
        return
    if is_own:
        remove_checkpoints(scratch)


def take(job: Any, output: Path, scratch: Path, is_own: bool) -> None:
    """Remove what an earlier run left, and mark the scratch folder as this run's."""
    was_finished = (output / RESULT_FILE).is_file()
    if was_finished or not is_own:
        remove_checkpoints(scratch)
        shutil.rmtree(output / SNAPSHOTS_FOLDER, ignore_errors=True)
    if was_finished:
        # The result goes last: as long as it is there, that run is the finished one.
        for folder in (MODEL_FOLDER, EVALUATION_FOLDER):
            shutil.rmtree(output / folder, ignore_errors=True)
        (output / CURVES_FILE).unlink(missing_ok=True)
        (output / RESULT_FILE).unlink()
    if not checkpoints(scratch):
        write_text(scratch / RUN_FILE, json.dumps(job.config(), indent=1) + "\n")
