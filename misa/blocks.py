"""`python -m misa.blocks MODEL`: the blocks of a model, without loading its weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa.extras import exit_with
from misa.models import MODEL_SIZES, first_line, model_config

if TYPE_CHECKING:
    from torch import nn

GRANULARITIES = ("matrix", "half", "layer")
NEVER = "never fits"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0, or 2 for a model that cannot be read or split as asked.
    """
    parser = argparse.ArgumentParser(
        prog="python -m misa.blocks",
        description="Print the blocks of a model: name, shape and share of all parameters; then what is in no block.",
    )
    parser.add_argument("model", help="hub id, local folder, config.json, or a built-in size such as 130m")
    parser.add_argument("--granularity", choices=GRANULARITIES, default="matrix", help="how to split (matrix)")
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="only what matches is in a block")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="what matches is in no block")
    parser.add_argument("--budget", type=float, help="share of all parameters on at once; marks what never fits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    try:
        if options.budget is not None and not 0 < options.budget <= 1:
            raise ValueError(f"budget={options.budget}: must lie in (0, 1], the share of all parameters")
        found = describe(
            meta_model(options.model), options.granularity, options.include, options.exclude, options.budget
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {first_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps({"model": options.model, **found}, indent=2) if options.json else table(found))
    return 0


def meta_model(name: str) -> nn.Module:
    """Build a model without weights.

    Args:
        name: Hub id, local folder, path of a configuration, or a size out of `misa.models.MODEL_SIZES`.

    Returns:
        The causal language model (for other kinds, the bare model) on the meta device.

    Raises:
        ValueError: if there is no such model, or the configuration cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    known = name in MODEL_SIZES or Path(name).is_file()
    try:
        config = model_config(name) if known else AutoConfig.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"model {name!r} gives no configuration, allowed is a hub id, a local folder, a config.json, or one of "
            f"{', '.join(MODEL_SIZES)}: {first_line(error)}"
        ) from error
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config)
    return model


def describe(
    model: nn.Module,
    granularity: str = "matrix",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    budget: float | None = None,
) -> dict[str, Any]:
    """Describe the blocks of a model in plain values.

    Args:
        model: Any model; the meta device is fine.
        granularity: As for `misa.optimizer.partition`, like the next two.
        include: Patterns of what may be in a block.
        exclude: Patterns of what is in no block.
        budget: Largest share of the parameters on at once; None leaves `fits` out.

    Returns:
        `granularity`, `num_parameters`, `blocks` (each with `name`, `layer`, `shapes` by parameter, `num_parameters`,
        `share`, and `fits` where a budget is given) and `rest` (by kind: `names`, `num_parameters`, `share`).

    Raises:
        ValueError: as `misa.optimizer.partition` does.
    """
    from misa.optimizer.blocks import partition, rest
    from misa.parameters import trainable

    blocks = partition(model, granularity, include, exclude)
    total = sum(p.numel() for _, p in trainable(model))
    limit = None if budget is None else int(budget * total + 1e-6)
    described = [
        {
            "name": b.name,
            "layer": b.layer,
            "shapes": {n: list(p.shape) for n, p in b.params},
            "num_parameters": b.numel,
            "share": b.numel / total,
            **({} if limit is None else {"fits": b.numel <= limit}),
        }
        for b in blocks
    ]
    others = {}
    for kind, params in rest(model, blocks).items():
        numel = sum(p.numel() for _, p in params)
        others[kind] = {"names": [n for n, _ in params], "num_parameters": numel, "share": numel / total}
    result = {"granularity": granularity, "num_parameters": total, "blocks": described, "rest": others}
    return result if budget is None else {**result, "budget": budget, "max_parameters_on": limit}


def table(found: dict[str, Any]) -> str:
    """Lay out what `describe` returned as text."""
    rows = [("block", "shape", "parameters", "share", "")]
    rows += [
        (b["name"], _shape(b), f"{b['num_parameters']:,}", _percent(b["share"]), "" if b.get("fits", True) else NEVER)
        for b in found["blocks"]
    ]
    rows.append(("", "", "", "", ""))
    for kind, r in found["rest"].items():
        tensors = f"{len(r['names'])} tensor{'' if len(r['names']) == 1 else 's'}"
        rows.append((f"({kind})", tensors, f"{r['num_parameters']:,}", _percent(r["share"]), ""))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in rows
    ]
    in_blocks = sum(b["num_parameters"] for b in found["blocks"])
    layers = len({b["layer"] for b in found["blocks"]})
    lines += [
        "",
        f"{len(found['blocks'])} blocks in {layers} layers hold {in_blocks:,} of {found['num_parameters']:,} "
        f"trainable parameters ({_percent(in_blocks / found['num_parameters'])})",
    ]
    if "budget" in found:
        lines.append(_verdict(found))
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    never = [b for b in found["blocks"] if not b["fits"]]
    text = f"budget {found['budget']}: at most {found['max_parameters_on']:,} parameters on at once; "
    if not never:
        return text + "every block fits"
    from misa.optimizer.blocks import least_budget

    sizes = [b["num_parameters"] for b in found["blocks"]]
    least, enough = (least_budget(size, found["num_parameters"]) for size in (min(sizes), max(sizes)))
    some = "no block fits" if len(never) == len(found["blocks"]) else f"{len(never)} blocks never fit"
    return text + f"{some}; the smallest block needs {least}, {enough} admits all"


def _shape(block: dict[str, Any]) -> str:
    shapes = list(block["shapes"].values())
    first = " x ".join(map(str, shapes[0]))
    if len(shapes) > 2:
        return f"{len(shapes)} tensors"
    return first if len(shapes) == 1 else f"{first} + {' x '.join(map(str, shapes[1]))}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


if __name__ == "__main__":
    exit_with(main, "train")
