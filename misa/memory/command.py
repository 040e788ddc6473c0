"""The command `python -m misa.memory`: one training step per method, every live byte counted.

With `--model` the model is simulated: fake tensors of full size, from a configuration alone. With
`--model_name_or_path` it is real, and takes its memory. Each method gets its real optimizer; one step brings that into
its steady state, the second is measured. Which tokens the batch holds does not matter for memory, so they are random.
"""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from misa.memory.step import StepMemory
    from misa.methods import Built

COLUMNS = ("method", "model", "batch_size", "seq_len", "checkpointing", "category", "bytes", "moment")
# Options that some methods know; a method gets those of them that it has.
_OPTIONS = ("budget", "interval", "eta", "granularity", "always_on", "variant", "lora_r", "lora_alpha", "lora_dropout")
_ENGINE_OPTIONS = ("state_format", "step_in_backward", "lean_adapters")
_SIMULATED = ("method", "checkpoint_layers", *_ENGINE_OPTIONS, "lean_activations")
_SIMULATED += ("compare", "fit", "memory_budget", "json")
# Option -> those of which one must be given, or it would do nothing.
_NEEDED = {
    **dict.fromkeys(_SIMULATED, ("model",)),
    **dict.fromkeys(("methods", "seed", "run"), ("model_name_or_path",)),
    "variants": ("compare", "fit"),
    "output_dir": ("compare", "model_name_or_path"),
}
# Option -> the least that makes sense.
_LEAST = dict.fromkeys(("batch_size", "seq_len", "interval", "lora_r", "lora_alpha"), 1)
_LEAST |= dict.fromkeys(("checkpoint_layers", "seed"), 0)


@dataclass
class MemoryArguments:
    """What is measured, and where the result goes."""

    model: str | None = field(
        default=None,
        metadata={"help": "Simulate: a model's name (a wrong one lists them), its folder, or a JSON configuration."},
    )
    method: str | None = field(default=None, metadata={"help": "With --model: the method that trains (default: misa)."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Measure for real: folder of a causal language model, or the name of a size."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results; with --model only --compare writes any."}
    )
    methods: str | None = field(
        default=None,
        metadata={
            "help": "With --model_name_or_path: the methods measured, comma separated (default: "
            "adamw,lora,badam,lisa,misa)."
        },
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Sequences in a step (default: 1 simulated, 4 measured)."}
    )
    seq_len: int | None = field(
        default=None, metadata={"help": "Tokens in a sequence (default: 512 simulated, 128 measured)."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the weights: bfloat16 or float32."})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Recompute layers in the backward pass, from the lowest that trains upwards.",
            "aliases": ["--checkpointing"],
        },
    )
    checkpoint_layers: int | None = field(
        default=None, metadata={"help": "With --model: recompute only so many of these layers, the lowest."}
    )
    loss: str = field(default="full", metadata={"help": "full, or chunked, which never holds all logits."})
    state_format: str | None = field(
        default=None, metadata={"help": "With --model, for block methods: master, fp32, bf16 or 8bit."}
    )
    step_in_backward: bool = field(
        default=False, metadata={"help": "With --model, for block methods: apply each gradient as soon as it is ready."}
    )
    lean_activations: bool = field(
        default=False,
        metadata={"help": "With --model: norms and gated products keep little, and are computed again."},
    )
    lean_adapters: bool = field(
        default=False, metadata={"help": "With --model, for LoRA and DoRA: adapters in the type of the weights."}
    )
    compare: bool = field(default=False, metadata={"help": "With --model: all methods side by side."})
    variants: str | None = field(
        default=None, metadata={"help": "With --compare or --fit: only these forms of methods, comma separated."}
    )
    fit: str | None = field(
        default=None, metadata={"help": "With --model: the most tokens that fit, for each method; an amount as 24GiB."}
    )
    memory_budget: str | None = field(
        default=None,
        metadata={"help": "With --model: choose loss, checkpointing, states and budget so that a step fits; as 24GiB."},
    )
    json: bool = field(default=False, metadata={"help": "With --model: print JSON."})
    seed: int = field(default=0, metadata={"help": "Seed of the tokens and of the blocks drawn."})
    run: str = field(default="memory", metadata={"help": "Name of the run in the result file."})
    budget: float | None = field(default=None, metadata={"help": "Share of parameters drawn (methods with a budget)."})
    interval: int | None = field(default=None, metadata={"help": "Steps in a round."})
    eta: str | None = field(default=None, metadata={"help": "Sharpness of the importance softmax: a number or auto."})
    granularity: str | None = field(default=None, metadata={"help": "What a block is: matrix, half or layer."})
    always_on: str | None = field(default=None, metadata={"help": "Trained besides the blocks, comma separated."})
    variant: str | None = field(default=None, metadata={"help": "Variant of MISA."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA's adapters."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of LoRA's adapters."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before LoRA's adapters."})

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if (self.model is None) == (self.model_name_or_path is None):
            raise ValueError("give either --model, to simulate, or --model_name_or_path, to measure a real model")
        from misa.integration.chunked_loss import LOSSES

        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for name in given:
            if (needed := _NEEDED.get(name)) and not set(needed) & set(given):
                raise ValueError(f"{name} is given; it does nothing without {' or '.join(needed)}")
            if (self.compare or self.fit) and name in ("method", *_OPTIONS, *_ENGINE_OPTIONS):
                raise ValueError(f"{name} is given; compare and fit take the methods in the forms of variants")
        if self.model is None and self.output_dir is None:
            raise ValueError("output_dir is missing: measuring a real model writes result.json and memory.csv")
        if self.batch_size is None:
            self.batch_size = 1 if self.model else 4
        if self.seq_len is None:
            self.seq_len = 512 if self.model else 128
        if self.method is None and self.model:
            self.method = "misa"
        if self.methods is None and not self.model:
            self.methods = "adamw,lora,badam,lisa,misa"
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name, allowed in (("dtype", ("bfloat16", "float32")), ("loss", LOSSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    def method_names(self) -> list[str]:
        """The methods asked for, checked."""
        from misa.methods import METHODS

        names = [name.strip() for name in str(self.methods).split(",") if name.strip()]
        unknown = [name for name in names if name not in METHODS]
        if unknown or not names:
            raise ValueError(f"methods is {self.methods!r}; allowed, comma separated: {', '.join(METHODS)}")
        for option in self.given_options():
            if not any(option in METHODS[name].defaults for name in names):
                raise ValueError(f"{option} is given, but none of the methods {', '.join(names)} has it")
        return names

    def scenario(self) -> Any:
        """What `--model` asks to simulate."""
        from misa.memory.scenario import ALL_LAYERS, Scenario

        layers = self.checkpoint_layers
        if layers is None:
            layers = ALL_LAYERS if self.gradient_checkpointing else 0
        same = ("method", "batch_size", "seq_len", "loss", "dtype", "lean_activations", *_ENGINE_OPTIONS)
        own = {name: getattr(self, name) for name in same}
        return Scenario(model=str(self.model), options=self.given_options(), checkpointing=layers, **own)

    def chosen(self) -> tuple[str, ...]:
        """What was given of the fields that `--memory_budget` would choose."""
        given = {
            "budget": self.budget is not None,
            "loss": self.loss != "full",
            "checkpointing": self.gradient_checkpointing or self.checkpoint_layers is not None,
            "state_format": self.state_format is not None,
            "lean_activations": self.lean_activations,
        }
        return tuple(name for name, is_given in given.items() if is_given)

    def given_options(self) -> dict[str, Any]:
        """Method options that were given, in the form `misa.methods.build` takes."""
        given = {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}
        if "eta" in given and given["eta"] != "auto":
            try:
                given["eta"] = float(given["eta"])
            except ValueError:
                raise ValueError(f"eta is {given['eta']!r}; it must be a number or auto") from None
        if "always_on" in given:
            given["always_on"] = tuple(part.strip() for part in given["always_on"].split(",") if part.strip())
        return given


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        Exit status: 0, or 2 for wrong input or a folder that cannot be written.
    """
    import sys

    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(MemoryArguments, prog="python -m misa.memory", description=__doc__.partition("\n\n")[2])
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
    asked = [name for name in ("compare", "fit", "memory_budget") if getattr(settings, name)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]}: ask one question at a time")
    found: Any
    with redirect_stdout(StringIO()) if settings.json else nullcontext():
        if settings.compare:
            folder = output_folder(settings.output_dir or ".")
            found = answers.compare(scenario, answers.all_variants(settings.variants), folder)
        elif settings.fit:
            limit = parse_bytes(settings.fit, "fit")
            found = answers.fit(scenario, answers.all_variants(settings.variants), limit)
        elif settings.memory_budget:
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
    memory = measure_step(built.model, optimizer, batch)
    detail = {
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in built.settings.items()},
        "active": list(getattr(optimizer, "active", ())),
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
