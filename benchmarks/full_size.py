"""Memory and time of a training step of a full-size model on a GPU: `python -m benchmarks.full_size`.

Each form of a method trains the same model, with random weights, on the same random tokens, one after another in one
process. Beside what CUDA's allocator counted stands what the memory laboratory predicted, on fake tensors. A form that
does not fit keeps its prediction.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Without GaLore, whose first step takes minutes for the singular vectors of matrices of this size.
FORMS = "adamw,adamw_bf16,dora-r16,lora-r16,lora-r16-lean,lisa,badam,misa-25,misa-3,misa-1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0, or 2 if something asked for is wrong.
    """
    import torch

    from misa.files import write_text
    from misa.memory.models import configuration
    from misa.results import provenance

    options = _parser().parse_args(argv)
    try:
        scenarios = _scenarios(options)
        config = configuration(options.model)
        for scenario in scenarios.values():
            scenario.check_length(config)
        if not torch.cuda.is_available():
            raise ValueError("a CUDA device is needed; `python -m misa.memory --model` predicts without one")
        if options.num_steps < 1:
            raise ValueError(f"num_steps is {options.num_steps}, allowed is 1 or more")
    except ValueError as error:
        print(f"benchmarks.full_size: error: {error}", file=sys.stderr)
        return 2
    command = ["python", "-m", "benchmarks.full_size", *(sys.argv[1:] if argv is None else argv)]
    report = {"settings": vars(options), "provenance": provenance(command).model_dump()}
    report["rows"] = measure(scenarios, options.num_steps)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "full_size.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "full_size.md", table(report))
    print(table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="llama3-8b", help="a name that `python -m misa.memory --model` knows")
    parser.add_argument("--forms", default=FORMS, help="forms of methods, comma separated")
    parser.add_argument("--batch_size", type=int, default=2, help="sequences in a step")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers in the backward pass")
    parser.add_argument("--num_steps", type=int, default=5, help="timed steps of each form")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder for full_size.json and full_size.md")
    return parser


def _scenarios(options: argparse.Namespace) -> dict[str, Any]:
    """Scenario of each form asked for."""
    from misa.memory.scenario import ALL_LAYERS
    from misa.memory.variants import VARIANTS

    names = [name.strip() for name in options.forms.split(",") if name.strip()]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"forms has {unknown[0]!r}, allowed is {', '.join(VARIANTS)}")
    layers = ALL_LAYERS if options.checkpointing else 0
    fields = {"batch_size": options.batch_size, "seq_len": options.seq_len, "checkpointing": layers}
    return {name: VARIANTS[name].scenario(model=options.model, **fields) for name in names}


def measure(scenarios: dict[str, Any], num_steps: int) -> list[dict[str, Any]]:
    """Predict and measure every form.

    Args:
        scenarios: Scenario of each form.
        num_steps: Timed steps of each.

    Returns:
        One row for each form; without measured values where it did not fit.
    """
    import torch

    from misa.memory.variants import VARIANTS

    rows = []
    for name, scenario in scenarios.items():
        row: dict[str, Any] = {"form": name, "label": VARIANTS[name].label, **predict(scenario), "fits": True}
        try:
            row |= _on_device(scenario, num_steps)
        except torch.cuda.OutOfMemoryError:
            row["fits"] = False
        gc.collect()
        torch.cuda.empty_cache()
        print(f"measured: {row}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def predict(scenario: Any) -> dict[str, Any]:
    """Peak of a step on fake tensors, in all and by category, bytes."""
    from misa.memory.scenario import Laboratory

    peak = Laboratory(scenario).measure().peak
    return {"predicted_bytes": peak.total_bytes, "predicted_by_category": dict(peak.by_category)}


def _on_device(scenario: Any, num_steps: int) -> dict[str, Any]:
    from misa.memory.scenario import Laboratory

    step = Laboratory(scenario, real=True, device="cuda").run_on_device(num_steps)
    return {**asdict(step), "tokens_per_s": scenario.batch_size * scenario.seq_len / step.step_s}


def table(report: dict[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        report: What `full_size.json` holds.
    """
    settings, machine = report["settings"], report["provenance"]["machine"]
    lines = [
        "# A full-size model on one GPU",
        "",
        f"`{' '.join(report['provenance']['command'])}` on one {machine['gpu']}; torch "
        f"{report['provenance']['versions']['torch']}. {settings['model']} with random weights in bf16, "
        f"{settings['batch_size']} x {settings['seq_len']} tokens a step"
        f"{', layers recomputed' if settings['checkpointing'] else ''}; median of {settings['num_steps']} steps.",
        "",
        "| method | predicted peak (GiB) | measured peak (GiB) | difference | step (ms) | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        predicted = row["predicted_bytes"]
        cells = [row["label"], f"{predicted / 2**30:.2f}"]
        if row["fits"]:
            measured = row["peak_bytes"]
            cells += [f"{measured / 2**30:.2f}", f"{(measured - predicted) / predicted:+.1%}"]
            cells += [f"{1000 * row['step_s']:.0f}", f"{row['tokens_per_s']:.0f}"]
        else:
            cells += ["does not fit", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
