"""MISA over LoRA matrices, the authors' `mix_lora`: PEFT's adapters are the blocks that are drawn."""

from misa.methods.blockwise import method
from misa.methods.lora import OPTIONS as LORA_OPTIONS
from misa.methods.lora import adapters
from misa.methods.misa import OPTIONS, clipped

# The fp32 adapters need no masters. The budget is a share of the adapters.
METHOD = method(
    "misa_lora",
    "LoRA matrices on all linear layers (PEFT), drawn by importance as in the authors' code, a share of them at a "
    "time; the fp32 adapters, and gradient and moments of the drawn ones only",
    {**OPTIONS, **LORA_OPTIONS, "first_pass": True, "sample_last": 2, "clip": 5.0},
    preset="misa",
    fixed={"variant": "official"},
    resolve=lambda options: clipped({k: v for k, v in options.items() if k not in LORA_OPTIONS}),
    wrap=adapters,
)
