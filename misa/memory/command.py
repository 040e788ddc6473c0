"""The command `python -m misa.memory`: one training step per method, every live byte counted.

With `--model` the model is simulated: fake tensors of full size, from a configuration alone. With
`--model_name_or_path` it is real, and takes its memory. Each method gets its real optimizer; one step brings that into
its steady state, the second is measured. Which tokens the batch holds does not matter for memory, so they are random.
"""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.memory.arguments import MemoryArguments

if TYPE_CHECKING:
    from misa.memory.step import StepMemory
    from misa.methods import Built

COLUMNS = ("method", "model", "batch_size", "seq_len", "checkpointing", "category", "bytes", "moment")


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        Exit status: 0, or 2 for wrong input or a folder that cannot be written.
    """
    import sys

    from transformers.hf_argparser import HfArgumentParser

    from misa.help_text import HelpFormatter

    parser = HfArgumentParser(
        MemoryArguments,
        prog="python -m misa.memory",
        description=__doc__.partition("\n\n")[2],
        formatter_class=HelpFormatter,
    )
    try:
        (settings,) = parser.parse_args_into_dataclasses(arguments)
        if settings.model is not None:
            simulate(settings)
            return 0
        measure_all(settings, [parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def simulate(settings: MemoryArguments) -> None:
    """Answer a question about a model of fake tensors, on standard output.

    Args:
        settings: What is asked.

    Raises:
        ValueError: For an unknown model, method or option, what cannot go together, what fits nowhere, or a folder
            that cannot be written.
    """
    import json
    from contextlib import redirect_stdout
    from io import StringIO

    from misa.memory import answers
    from misa.memory.models import configuration
    from misa.memory.sizes import parse_bytes
    from misa.results import output_folder

    configuration(str(settings.model))
    scenario = settings.scenario()
    asked = [name for name in ("compare", "fit", "memory_budget") if getattr(settings, name) not in (None, False)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]}: ask one question at a time")
    found: Any
    with redirect_stdout(StringIO()) if settings.json else nullcontext():
        if settings.compare:
            folder = output_folder(settings.output_dir or ".")
            found = answers.compare(scenario, answers.all_variants(settings.variants), folder)
        elif settings.fit is not None:
            limit = parse_bytes(settings.fit, "fit")
            found = answers.fit(scenario, answers.all_variants(settings.variants), limit)
        elif settings.memory_budget is not None:
            from misa.memory.fit import plan

            chosen = plan(scenario, parse_bytes(settings.memory_budget, "memory_budget"), settings.chosen())
            answers.print_plan(chosen)
            found = {"scenario": asdict(chosen.scenario), "peak_bytes": chosen.peak.peak.total_bytes}
            found["reasons"] = list(chosen.reasons)
        else:
            found = answers.explain(scenario)
            answers.print_explained(found)
    if settings.json:
        print(json.dumps(found, indent=2))


def measure_all(settings: MemoryArguments, command: list[str]) -> Path:
    """Measure every method and write `result.json` and `memory.csv`.

    Args:
        settings: What to measure.
        command: The command line, for the result's provenance.

    Returns:
        The folder written.

    Raises:
        ValueError: For an unknown model, method or option, or a folder that cannot be written.
    """
    from misa.files import write_csv
    from misa.memory.step import rows
    from misa.results import Result, output_folder, provenance, write_result

    names = settings.method_names()
    folder = output_folder(str(settings.output_dir))
    start = time.perf_counter()
    model_name = Path(settings.model_name_or_path).name
    table: list[dict[str, Any]] = []
    metrics, peaks, details = {}, {}, {}
    for name in names:
        memory, detail = measure_method(name, settings)
        columns = {
            "method": name,
            "model": model_name,
            "batch_size": settings.batch_size,
            "seq_len": settings.seq_len,
            "checkpointing": settings.gradient_checkpointing,
        }
        table += rows(memory, **columns)
        metrics[f"{name}/loss"] = memory.loss
        peaks[f"{name}/peak_bytes"] = memory.peak.total_bytes
        peaks.update({f"{name}/{category}_bytes": num for category, num in memory.peak.by_category.items()})
        details[name] = detail
        print(_line(name, memory), flush=True)
    write_csv(folder / "memory.csv", COLUMNS, table)
    write_result(
        Result(
            run=settings.run,
            kind="memory",
            method=",".join(names),
            model=model_name,
            data="random",
            seed=settings.seed,
            config={**asdict(settings), "per_method": details},
            provenance=provenance(command),
            metrics=metrics,
            peaks=peaks,
            timings={"measure_s": time.perf_counter() - start},
        ),
        folder,
    )
    return folder


def measure_method(name: str, settings: MemoryArguments) -> tuple[StepMemory, dict[str, Any]]:
    """Measure one method on a freshly loaded model.

    Args:
        name: Key of `misa.methods.METHODS`.
        settings: What to measure.

    Returns:
        The measurement, and what else is known: the method's settings, the blocks that were on, where the peak lay.
    """
    import torch

    from misa.integration.chunked_loss import ChunkedLoss
    from misa.memory.step import enable_checkpointing, measure_step, random_batch, training_step
    from misa.methods import METHODS, build

    torch.manual_seed(settings.seed)
    model = load(settings.model_name_or_path, settings.dtype, settings.seed)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and settings.seq_len > limit:
        raise ValueError(f"seq_len is {settings.seq_len}; {settings.model_name_or_path} allows at most {limit}")
    if settings.loss == "chunked":
        ChunkedLoss(model)
    batch = random_batch(model.config.vocab_size, settings.batch_size, settings.seq_len, settings.seed)
    options = {key: value for key, value in settings.given_options().items() if key in METHODS[name].defaults}
    built = build(name, model, lr=1e-5, seed=settings.seed, options=options)
    if settings.gradient_checkpointing:
        enable_checkpointing(built.model)
    built.model.train()
    optimizer = make_optimizer(built)
    # The state that a first step makes does not depend on the batch, so a small one does.
    training_step(built.model, optimizer, random_batch(model.config.vocab_size, 1, min(8, settings.seq_len)))
    gc.collect()
    active = list(getattr(optimizer, "active", ()))  # the step may end their round
    memory = measure_step(built.model, optimizer, batch)
    detail = {
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in built.settings.items()},
        "active": active,
        "peak_operation": memory.peak.operation,
        "peak_phase": memory.peak.phase,
    }
    return memory, detail


def load(name_or_path: str, dtype: str, seed: int) -> Any:
    """Load a model folder, or build a model of a named size with random weights.

    Args:
        name_or_path: A folder, or a name out of `misa.models.MODEL_SIZES`.
        dtype: Precision of the weights.
        seed: Of random weights.

    Returns:
        A transformers causal language model on the CPU.

    Raises:
        ValueError: If it is neither.
    """
    from transformers.utils import logging as transformers_logging

    from misa.models import MODEL_SIZES, build_model, load_model, model_config

    transformers_logging.disable_progress_bar()
    if name_or_path in MODEL_SIZES:
        return build_model(model_config(name_or_path), seed, dtype)
    if not Path(name_or_path).is_dir():
        raise ValueError(
            f"model_name_or_path is {name_or_path!r}; it must be the folder of a model or one of the sizes "
            f"{', '.join(MODEL_SIZES)}"
        )
    return load_model(name_or_path, dtype)


def make_optimizer(built: Built) -> Any:
    """Make the optimizer as `transformers.Trainer` does: a factory gets the model, a class its trainable parameters.

    Args:
        built: A method applied to a model.

    Returns:
        The optimizer.
    """
    import torch

    kind, options = built.optimizer_cls_and_kwargs
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        return kind([p for p in built.model.parameters() if p.requires_grad], **options)
    return kind()(built.model, **options)


def _line(name: str, memory: StepMemory) -> str:
    parts = ", ".join(f"{category} {num / 2**20:.0f}" for category, num in memory.peak.by_category.items() if num)
    peak = memory.peak
    return f"{name}: peak {peak.total_bytes / 2**20:.0f} MiB ({parts}) in {peak.phase} at {peak.operation}"
