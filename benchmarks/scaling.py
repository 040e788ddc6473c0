"""A plan for many GPUs: traffic, memory and step time of each, from measured bytes: `python -m benchmarks.scaling`.

Nothing here was run on several GPUs. Bytes between processes come from `benchmarks/results/distributed.json`, as a
share of all gradients and weights; sizes of models from their configurations; network and GPU are what the options
state. Written as Markdown into `docs/scaling.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = ("llama3-8b", "llama2-70b")
GPUS = (8, 64)
BF16_BYTES = 2
STATE_BYTES = 12  # fp32 master and two moments


@dataclass(frozen=True)
class Size:
    """Elements of a model: all, those of its layers, and those of the largest group that FSDP2 gathers at once."""

    total: int
    layers: int
    largest: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0, or 2 if the measured bytes, or those of this budget, are missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--measured", default="benchmarks/results/distributed.json", help="what was counted")
    parser.add_argument("--budget", type=float, default=0.03, help="MISA's share of all parameters, one measured")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a GPU in a step")
    parser.add_argument("--gpu_tflops", type=float, default=400.0, help="what a GPU sustains, TFLOP/s")
    parser.add_argument("--gpu_gib", type=float, default=80.0, help="memory of a GPU")
    parser.add_argument("--node_gpus", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--node_gb_s", type=float, default=300.0, help="between GPUs of a node, each way, GB/s a GPU")
    parser.add_argument("--network_gb_s", type=float, default=50.0, help="between nodes, each way, GB/s a GPU")
    parser.add_argument("--output", default="docs/scaling.md", help="file to write")
    options = parser.parse_args(argv)
    if not Path(options.measured).is_file():
        print(f"benchmarks.scaling: error: {options.measured} is missing; run benchmarks.distributed", file=sys.stderr)
        return 2
    from misa.files import write_text

    try:
        write_text(options.output, page(options))
    except ValueError as error:
        print(f"benchmarks.scaling: error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


def size_of(name: str) -> Size:
    """Elements of a model, counted on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from misa.memory.models import configuration

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(name))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    total = sum(p.numel() for p in model.parameters())
    return Size(total, sum(layers), max(*layers, total - sum(layers)))


@dataclass(frozen=True)
class Sent:
    """What a contestant sends in a step, as shares: of all gradients, of all weights, and of the layers' once more."""

    gradients: float
    weights: float
    layers: float


def measured_shares(report: dict[str, Any], budget: float) -> dict[str, Sent]:
    """Of each contestant, what it sends in a step; under FSDP2 all weights travel, and those of the layers again.

    Raises:
        ValueError: If the budget was not measured.
    """
    found = {}
    size = size_of(report["settings"]["model"])
    for row in report["rows"]:
        if row["contestant"].startswith("AdamW") or row["budget"] == budget:
            full = row["full_gradient_bytes"]
            weights = row["weight_bytes_per_step"] / full
            again = (weights - 1) * size.total / size.layers if "FSDP2" in row["contestant"] else 0.0
            found[row["contestant"]] = Sent(row["gradient_bytes_per_step"] / full, min(weights, 1.0), again)
    if "MISA" not in found:
        budgets = {row["budget"] for row in report["rows"] if row["contestant"].startswith("MISA")}
        raise ValueError(f"budget is {budget}, measured are {', '.join(map(str, sorted(budgets)))}")
    return found


def plan(size: Size, gpus: int, name: str, sent: Sent, options: argparse.Namespace) -> dict[str, float]:
    """Traffic, memory and times of one GPU in one step.

    Args:
        size: Of the model.
        gpus: Number of GPUs.
        name: A contestant of the measurement.
        sent: What it sends, from `measured_shares`.
        options: Network, GPU and tokens.
    """
    active = options.budget if name.startswith("MISA") else 1.0
    sharded = "FSDP2" in name
    parts = gpus if sharded else 1
    state_parts = gpus if sharded or "shared" in name else 1
    weights = BF16_BYTES * size.total
    # Gradients and what they are sent in, masters and moments: of what is active.
    buffers = BF16_BYTES * (1 if sharded else 2)
    memory = (weights + active * buffers * size.total) / parts + active * STATE_BYTES * size.total / state_parts
    if sharded:  # gathered weights of the group at hand and of the next one, and gradients of the group
        memory += (2 + (sent.gradients if active < 1 else 1)) * BF16_BYTES * size.largest
    # Gradients that all processes need are sent twice around, scattered ones once.
    gradients = (1 if sharded else 2) * sent.gradients * weights
    traffic = (gpus - 1) / gpus * (gradients + sent.weights * weights + sent.layers * BF16_BYTES * size.layers)
    speed = options.node_gb_s if gpus <= options.node_gpus else options.network_gb_s
    # Forward 2, backward 2 through the activations (at most: what lies below the lowest active matrix is left out) and
    # 2 for the gradients of what is active.
    flops = (4 + 2 * active) * size.total * options.tokens
    return {
        "memory_gib": memory / 2**30,
        "traffic_gb": traffic / 1e9,
        "compute_s": flops / options.gpu_tflops / 1e12,
        "network_s": traffic / speed / 1e9,
    }


def page(options: argparse.Namespace) -> str:
    """The note as Markdown.

    Args:
        options: The command line's options.
    """
    report = json.loads(Path(options.measured).read_text(encoding="utf-8"))
    shares = measured_shares(report, options.budget)
    lines = [
        "# Many GPUs: a plan",
        "",
        "**A plan, not a measurement**: several GPUs were not at hand. Computed by `python -m benchmarks.scaling`",
        f"from bytes counted between {report['settings']['num_processes']} processes on a CPU",
        "(`benchmarks/results/distributed.md`) and from these assumptions:",
        "",
        f"- a GPU sustains {options.gpu_tflops:g} TFLOP/s and has {options.gpu_gib:g} GiB; {options.node_gpus} a node;",
        f"- {options.node_gb_s:g} GB/s each way between GPUs of a node, {options.network_gb_s:g} GB/s between nodes;",
        f"- {options.tokens:,} tokens a GPU in a step; bf16 weights and gradients, fp32 masters and moments of what is",
        f"  active; MISA at a budget of {options.budget:g};",
        "- exchange in rings; without activations, whose memory depends on batch and checkpointing",
        "  (`python -m misa.memory` counts it);",
        "- a step takes between the larger of both times (all sending hidden behind computing) and their sum (none).",
        "",
    ]
    for model in MODELS:
        size = size_of(model)
        lines += [f"## {model}: {size.total / 1e9:.2f} billion parameters", ""]
        heads = ("GPUs", "method", "memory a GPU (GiB)", "fits", "sent by a GPU in a step (GB)")
        heads += ("computing (s)", "sending (s)", "step (s)")
        lines += [f"| {' | '.join(heads)} |", "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |"]
        for gpus in GPUS:
            for name in ("AdamW, DDP", "MISA", "MISA, state shared out", "AdamW, FSDP2", "MISA, FSDP2"):
                found = plan(size, gpus, name, shares[name], options)
                fits = "yes" if found["memory_gib"] < options.gpu_gib else "no"
                computing, sending = found["compute_s"], found["network_s"]
                shown = name if "FSDP2" in name or "DDP" in name else name.replace("MISA", "MISA, data parallel")
                lines.append(
                    f"| {gpus} | {shown} | {found['memory_gib']:.1f} | {fits} | {found['traffic_gb']:.2f} | "
                    f"{computing:.2f} | {sending:.3f} | {max(computing, sending):.2f} to {computing + sending:.2f} |"
                )
        lines.append("")
    lines += [
        "Data parallel MISA sends the gradients of its active blocks alone; with `shard_state=True` the updated",
        "weights of these blocks, too, for a share of masters and moments. Under FSDP2 the weights are gathered for",
        "every forward and backward pass, whatever trains; only scattering the gradients gets cheaper. So where the",
        "weights fit, data parallel training is the cheaper way, and FSDP2 is for models that do not fit.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
