"""The methods that are compared, in the forms in which they are used: rank and precision of adapters, budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from misa.memory.scenario import Scenario
from misa.methods import METHODS


@dataclass(frozen=True)
class Variant:
    """One form of a method.

    Attributes:
        method: A key of `misa.methods.METHODS`.
        label: What it is called in tables and figures.
        options: The method's own options.
        lean: Adapters in the precision of the weights.
        is_detail: Measured at fewer lengths and with one sequence a step, since another form stands for it.
    """

    method: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    lean: bool = False
    is_detail: bool = False

    def scenario(self, **fields: Any) -> Scenario:
        """A scenario of this variant.

        Args:
            **fields: Further fields of `Scenario`.
        """
        return Scenario(method=self.method, options=self.options, lean_adapters=self.lean, **fields)


def _adapters(method: str, name: str) -> dict[str, Variant]:
    """PEFT's habit, fp32 adapters with dropout, and the lean form, adapters of the weights' precision without."""
    found = {}
    for rank in (8, 16, 32):
        is_detail = rank != 16 or method == "dora"
        habit = {"lora_r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}
        found[f"{method}-r{rank}"] = Variant(method, f"{name} r{rank}, fp32 adapters", habit, is_detail=is_detail)
        lean = {**habit, "lora_dropout": 0.0}
        found[f"{method}-r{rank}-lean"] = Variant(method, f"{name} r{rank}, bf16 adapters", lean, True, is_detail)
    return found


_ALL = {
    "adamw": Variant("adamw", "AdamW, fp32 states"),
    "adamw_bf16": Variant("adamw_bf16", "AdamW, pure bf16"),
    **_adapters("lora", "LoRA"),
    **_adapters("dora", "DoRA"),
    "galore": Variant("galore", "GaLore r128", {"galore_r": 128}),
    "galore_layerwise": Variant("galore_layerwise", "GaLore r128, in the backward", {"galore_r": 128}),
    "badam": Variant("badam", "BAdam"),
    "lisa": Variant("lisa", "LISA"),
    **{f"misa-{num}": Variant("misa", f"MISA {num}%", {"budget": num / 100}) for num in (1, 3, 5, 25)},
}

#: Name -> variant, for the methods there are.
VARIANTS = {name: variant for name, variant in _ALL.items() if variant.method in METHODS}
