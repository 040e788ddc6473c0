"""Whether two runs are the same one: which settings can change a result, and in which of them two differ."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

# Settings that say where a run lies, how it is shown, kept or fed, or that follow from others: two runs that differ
# in these alone have the same result.
INCIDENTAL_PREFIXES = ("dataloader_", "hub_", "log_", "push_to_", "save_", "trackio_")
INCIDENTAL = frozenset(
    (
        *("output_dir", "checkpoint_dir", "keep_checkpoints", "overwrite_output_dir", "run", "method_settings"),
        *("memory_plan", "stop_on_nan", "tags", "task_name", "evaluate_at_last", "evaluation_data_dir"),
        # The digest of the data says what they hold.
        *("data_dir", "tokenized_dir"),
        *("disable_tqdm", "report_to", "run_name", "project", "skip_memory_metrics", "logging_dir"),
        *("do_train", "do_eval", "do_predict", "local_rank", "enable_jit_checkpoint", "use_cpu"),
        *("resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
        # The method is the optimizer.
        *("optim", "optim_args", "optim_target_modules"),
    )
)

# Settings that decide what a step reads of a stream.
_STREAM = (
    *("data_digest", "streaming", "shuffle_buffer", "validation_share", "max_malformed", "seed", "data_seed"),
    *("tokenizer_name_or_path", "max_length", "padding", "sequences_per_step"),
)


def matters(name: str) -> bool:
    """Say whether a setting can change the result of a run."""
    # Dropping the last batch is no matter of how data is fed, but of what.
    if name == "dataloader_drop_last":
        return True
    return name not in INCIDENTAL and not name.startswith(INCIDENTAL_PREFIXES)


def source_digest(*sources: str | None) -> str | None:
    """SHA-256 over the files that a run starts from: folders of models and tokenizers, GGUF files, configurations.

    Args:
        sources: Paths, or names that a hub knows.

    Returns:
        The digest, or None if none of them is a file or a folder.
    """
    from misa.data.records import files_digest
    from misa.evaluation.folder import model_files

    files = [Path(source) for source in sources if source is not None and Path(source).is_file()]
    for folder in dict.fromkeys(Path(source) for source in sources if source is not None and Path(source).is_dir()):
        files += model_files(folder)
    return files_digest(files) if files else None


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Say in which settings that matter two configurations differ, or return ""."""
    old, new = _with_batch_size(old), _with_batch_size(new)
    if "model_digest" not in old:  # of a run from before it was kept
        new = {**new, "model_digest": None}
    names = sorted(name for name in old.keys() | new.keys() if matters(name) and _differ(old.get(name), new.get(name)))
    return ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)


def have_one_stream(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Say whether two runs, of which the first had a stream, read the same in each step."""
    old, new = _with_batch_size(old), _with_batch_size(new)
    return all(old.get(name) == new.get(name) for name in _STREAM)


def _differ(old: Any, new: Any) -> bool:
    """Whether two values are different; result files have numbers without end as words."""
    if old == new:
        return False
    first, second = (re.sub(r'"(-?Infinity|NaN)"', r"\1", json.dumps(value, sort_keys=True)) for value in (old, new))
    return first != second


def _with_batch_size(config: dict[str, Any]) -> dict[str, Any]:
    """The sequences of a step in place of how they are shared out: a run may go on with more processes, or fewer."""
    defaults = {"per_device_train_batch_size": None, "gradient_accumulation_steps": 1, "num_processes": 1}
    shares = [config.get(name, default) for name, default in defaults.items()]
    rest = {name: value for name, value in config.items() if name not in defaults}
    return rest if None in shares else {**rest, "sequences_per_step": math.prod(shares)}
