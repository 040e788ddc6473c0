"""MISA: matrix blocks drawn by importance under a budget; its readings by name; and the same with uniform draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from misa.methods.blockwise import method
from misa.optimizer.importance import OFFICIAL_RULE, ScoreRule

OPTIONS: dict[str, Any] = {
    "budget": 0.03,
    "num_blocks": None,
    "interval": 50,
    "eta": 1.0,
    "effective_share": None,
    "beta": None,
    "granularity": "matrix",
    "first_pass": None,
    "sample_last": None,
    "probe_every": 0,
}
HELD = "gradient, fp32 master and moments of the drawn matrices only"


def clipped(options: dict[str, Any]) -> dict[str, Any]:
    """Turn the options `clip` and `beta` into the score of the authors' code, the only one with a clipped exponent."""
    options = dict(options)
    clip, beta = options.pop("clip"), options.pop("beta")
    options["score"] = replace(OFFICIAL_RULE, clip=clip, beta=OFFICIAL_RULE.beta if beta is None else beta)
    return options


def scored(options: dict[str, Any]) -> dict[str, Any]:
    """Turn the option `per_parameter`, if it is given, and `beta` into the default variant's score."""
    options = dict(options)
    per_parameter = options.pop("per_parameter")
    if per_parameter is None:
        return options
    if options["variant"] != "default":
        raise ValueError(f"per_parameter={per_parameter}: goes with variant='default', not {options['variant']!r}")
    beta = options.pop("beta")
    rule = replace(ScoreRule(), per_parameter=per_parameter)
    return {**options, "score": rule if beta is None else replace(rule, beta=beta)}


METHOD = method(
    "misa",
    f"weight matrices drawn by importance, a budget of parameters at a time; {HELD}",
    {**OPTIONS, "variant": "default", "per_parameter": None},
    resolve=scored,
)
UNIFORM = method(
    "misa_uniform",
    f"weight matrices drawn uniformly, a budget of parameters at a time (MISA at eta 0); {HELD}",
    {**OPTIONS, "variant": "default", "eta": 0.0},
    preset="misa",
)
PAPER = method(
    "misa_paper",
    f"MISA as Algorithm 1 of arXiv 2511.00056: bounded Adam, a last momentum step, state dropped every round; {HELD}",
    OPTIONS,
    preset="misa",
    fixed={"variant": "paper"},
)
OFFICIAL = method(
    "misa_official",
    "MISA as the authors' code: scores of plain norms with a clipped exponent, a first pass over all matrices, the "
    f"longest-idle ones forced in; {HELD}",
    {**OPTIONS, "first_pass": True, "sample_last": 2, "clip": 5.0},
    preset="misa",
    fixed={"variant": "official"},
    resolve=clipped,
)
