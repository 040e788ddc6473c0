"""Options of `python -m misa.memory`, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

# Options that some methods know; a method gets those of them that it has.
_OPTIONS = ("budget", "num_blocks", "interval", "eta", "granularity", "include", "exclude", "always_on", "variant")
_OPTIONS += ("lora_r", "lora_alpha", "lora_dropout", "lora_target", "galore_r")
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
_LEAST = dict.fromkeys(("batch_size", "seq_len", "num_blocks", "interval", "lora_r", "lora_alpha", "galore_r"), 1)
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
            "aliases": ["--checkpointing", "--activation_checkpointing"],
        },
    )
    checkpoint_layers: int | None = field(
        default=None, metadata={"help": "With --model: recompute only so many of these layers, the lowest."}
    )
    loss: str | None = field(
        default=None, metadata={"help": "full, or chunked, which never holds all logits (default: full)."}
    )
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
    num_blocks: int | None = field(default=None, metadata={"help": "Blocks drawn, instead of a budget."})
    interval: int | None = field(default=None, metadata={"help": "Steps in a round."})
    eta: str | None = field(default=None, metadata={"help": "Sharpness of the importance softmax: a number or auto."})
    granularity: str | None = field(default=None, metadata={"help": "What a block is: matrix, half or layer."})
    include: str | None = field(
        default=None, metadata={"help": "What is split into blocks: patterns of names, comma separated."}
    )
    exclude: str | None = field(default=None, metadata={"help": "What is in no block: patterns, comma separated."})
    always_on: str | None = field(
        default=None,
        metadata={"help": "Trained besides the blocks: embeddings, head, norms, comma separated; or none."},
    )
    variant: str | None = field(default=None, metadata={"help": "Variant of MISA: default, paper or official."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA's adapters."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of LoRA's adapters."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before LoRA's adapters."})
    lora_target: str | None = field(
        default=None, metadata={"help": "Linear layers with adapters: all, or names, comma separated."}
    )
    galore_r: int | None = field(default=None, metadata={"help": "Rank of GaLore's projected gradients."})

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if (self.model is None) == (self.model_name_or_path is None):
            raise ValueError("give either --model, to simulate, or --model_name_or_path, to measure a real model")
        from misa.integration.chunked_loss import LOSSES

        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for name in given:
            if (needed := _NEEDED.get(name)) and not set(needed) & set(given):
                raise ValueError(f"{name} is given; it does nothing without {' or '.join(needed)}")
            if (self.compare or self.fit is not None) and name in ("method", *_OPTIONS, *_ENGINE_OPTIONS):
                raise ValueError(f"{name} is given; compare and fit take the methods in the forms of variants")
        if self.fit is not None and (sizes := [name for name in ("batch_size", "seq_len") if name in given]):
            from misa.memory.answers import all_variants, has_budget

            if not any(map(has_budget, all_variants(self.variants))):
                raise ValueError(f"{sizes[0]} is given; fit needs it for the largest budget alone, of variants of MISA")
        if self.gradient_checkpointing and self.checkpoint_layers is not None:
            raise ValueError(
                f"checkpoint_layers is {self.checkpoint_layers}, and gradient_checkpointing means all layers; give one "
                "of them"
            )
        if self.model is None and self.output_dir is None:
            raise ValueError("output_dir is missing: measuring a real model writes result.json and memory.csv")
        is_simulated = self.model is not None
        if self.batch_size is None:
            self.batch_size = 1 if is_simulated else 4
        if self.seq_len is None:
            self.seq_len = 512 if is_simulated else 128
        if self.method is None and is_simulated:
            self.method = "misa"
        if self.loss is None and not is_simulated:
            self.loss = "full"
        if self.methods is None and not is_simulated:
            self.methods = "adamw,lora,badam,lisa,misa"
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name, allowed in (("dtype", ("bfloat16", "float32")), ("loss", (None, *LOSSES))):
            if getattr(self, name) not in allowed:
                words = ", ".join(word for word in allowed if word)
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {words}")

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
        same = ("method", "batch_size", "seq_len", "dtype", "lean_activations", *_ENGINE_OPTIONS)
        own = {"loss": self.loss or "full", **{name: getattr(self, name) for name in same}}
        return Scenario(model=str(self.model), options=self.given_options(), checkpointing=layers, **own)

    def chosen(self) -> tuple[str, ...]:
        """What was given of the fields that `--memory_budget` would choose."""
        given = {
            "budget": self.budget is not None or self.num_blocks is not None,
            "loss": self.loss is not None,
            "checkpointing": self.gradient_checkpointing or self.checkpoint_layers is not None,
            "state_format": self.state_format is not None,
            "lean_activations": self.lean_activations,
        }
        return tuple(name for name, is_given in given.items() if is_given)

    def given_options(self) -> dict[str, Any]:
        """Method options that were given, in the form `misa.methods.build` takes."""
        from misa.methods import from_words

        return from_words({name: value for name in _OPTIONS if (value := getattr(self, name)) is not None})
