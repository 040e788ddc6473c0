"""The tables of the 8B model: `python -m misa.memory.grid part` measures one form of a method, `join` makes the tables.

Every number comes from a training step on fake tensors; block methods are measured with the worst draw that was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from misa.extras import exit_with
from misa.files import write_csv, write_text

SEQ_LENS = (512, 1024, 2048, 4096, 8192)
BATCH_SIZES = (1, 2)
LIMIT = "24GiB"
SWEEP = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25)
SWEEP_SEQ_LENS = (512, 2048)
LEVERS_BUDGET = 0.03
_SETTING = ("variant", "method", "label", "model", "batch_size", "seq_len", "checkpointing", "loss")
#: Columns of each table.
TABLES = {
    "memory_grid": (*_SETTING, "draw", "category", "bytes", "phase", "operation"),
    "memory_sweep": ("variant", "method", "label", "model", "budget", "seq_len", "draw", "weights_bytes", "bytes"),
    "memory_fit": (
        *_SETTING[:4],
        "limit_bytes",
        "checkpointing",
        "loss",
        "batch_size",
        "seq_len",
        "num_tokens",
        "bytes",
    ),
    "memory_levers": ("lever", "model", "budget", "batch_size", "seq_len", "draw", "weights_bytes", "bytes"),
}
#: Parts that are no variant of a method.
EXTRA_PARTS = ("sweep", "levers")
# Parts may be made at different times, so each says by which code.
_ORIGIN = ("created", "commit", "dirty", "package_digest")
Rows = dict[str, list[dict[str, Any]]]


def measure_variant(name: str, model: str) -> Rows:
    """The grid of one form of a method, and the largest batch that fits.

    Args:
        name: A key of `VARIANTS`.
        model: A model's name.
    """
    from misa.memory.draws import Draws
    from misa.memory.fit import draw_measured, largest_batch, measure_worst
    from misa.memory.scenario import ALL_LAYERS, Laboratory
    from misa.memory.sizes import parse_bytes
    from misa.memory.variants import VARIANTS

    variant = VARIANTS[name]
    laboratory = Laboratory(variant.scenario(model=model))
    about = {"variant": name, "method": variant.method, "label": variant.label, "model": model}
    rows: Rows = {table: [] for table in TABLES}
    peaks: dict[str, dict[int, int]] = {"full": {}, "chunked": {}}

    def measure(batch_size: int, seq_len: int, checkpointing: bool, loss: str) -> int:
        setting = {"checkpointing": ALL_LAYERS if checkpointing else 0, "loss": loss}
        sizes = {"batch_size": batch_size, "seq_len": seq_len}
        memory = measure_worst(laboratory, **sizes, **setting)
        first = {**about, **sizes, **setting, "checkpointing": checkpointing}
        peak = memory.peak
        draw = draw_measured(laboratory)
        where = {"phase": peak.phase, "operation": peak.operation}
        rows["memory_grid"] += [
            {**first, "draw": draw, "category": category, "bytes": num, **where}
            for category, num in peak.by_category.items()
        ]
        if draw == "worst":
            mean = round(Draws(laboratory, **sizes, **setting).mean_bytes())
            rows["memory_grid"].append(
                {**first, "draw": "mean", "category": "total", "bytes": mean} | dict.fromkeys(where, "")
            )
        if checkpointing:
            peaks[loss][batch_size * seq_len] = peak.total_bytes
        return peak.total_bytes

    for checkpointing in (False, True):
        for batch_size in BATCH_SIZES[: 1 if variant.is_detail else None]:
            for seq_len in SEQ_LENS[:: 3 if variant.is_detail else 1]:
                measure(batch_size, seq_len, checkpointing, "full")
        if not variant.is_detail:
            measure(1, 2048, checkpointing, "chunked")
    for loss, known in peaks.items() if not variant.is_detail else ():
        limit_bytes = parse_bytes(LIMIT)
        found = largest_batch(laboratory, limit_bytes, known, checkpointing=ALL_LAYERS, loss=loss)
        sizes = {name: found[name] for name in ("batch_size", "seq_len", "num_tokens")}
        rows["memory_fit"].append(
            {**about, "limit_bytes": limit_bytes, "checkpointing": True, "loss": loss}
            | {**sizes, "bytes": found["peak_bytes"]}
        )
    return rows


def measure_sweep(model: str) -> Rows:
    """MISA's peak against the budget, and BAdam's one layer, all with checkpointing."""
    from misa.memory.draws import Draws
    from misa.memory.fit import measure_worst
    from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario

    rows: Rows = {table: [] for table in TABLES}
    for method, budgets in (("badam", (None,)), ("misa", SWEEP)):
        for budget in budgets:
            options = {} if budget is None else {"budget": budget}
            laboratory = Laboratory(Scenario(model=model, method=method, options=options))
            share = budget
            if budget is None:
                share = laboratory.blocks[0].numel / laboratory.num_params
            for seq_len in SWEEP_SEQ_LENS:
                setting = {"seq_len": seq_len, "checkpointing": ALL_LAYERS, "loss": "full"}
                peak = measure_worst(laboratory, **setting).peak
                mean = round(Draws(laboratory, **setting).mean_bytes())
                first = {"variant": method, "method": method, "model": model, "budget": share, "seq_len": seq_len}
                first |= {"label": "BAdam, one layer" if budget is None else f"MISA {100 * budget:g}%"}
                weights = peak.by_category["weights"]
                for draw, num in (("worst", peak.total_bytes), ("mean", mean)):
                    rows["memory_sweep"].append({**first, "draw": draw, "weights_bytes": weights, "bytes": num})
    return rows


def measure_levers(model: str) -> Rows:
    """MISA at 3 % and 2048 tokens: what each lever saves, one after the other; and twice the longest sequence."""
    from misa.memory.fit import measure_worst
    from misa.memory.models import longest_sequence
    from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario

    rows: Rows = {table: [] for table in TABLES}
    plain = Scenario(model=model, method="misa", options={"budget": LEVERS_BUDGET}, seq_len=2048)
    chunked: dict[str, Any] = {"checkpointing": ALL_LAYERS, "loss": "chunked"}
    lean = {**chunked, "lean_activations": True}
    smallest = [(", chunked loss, checkpointing", chunked), (", chunked loss, checkpointing, lean activations", lean)]
    ladder: list[tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = [
        (
            "fp32 master and moments",
            {},
            [
                ("", {}),
                (", chunked loss", {"loss": "chunked"}),
                (", checkpointing", {"checkpointing": ALL_LAYERS}),
                (", chunked loss, 8 layers checkpointed", {"loss": "chunked", "checkpointing": 8}),
                (", chunked loss, 16 layers checkpointed", {"loss": "chunked", "checkpointing": 16}),
                (", chunked loss, 24 layers checkpointed", {"loss": "chunked", "checkpointing": 24}),
                (", chunked loss, checkpointing", chunked),
                (", lean activations", {"lean_activations": True}),
                (", chunked loss, lean activations", {"loss": "chunked", "lean_activations": True}),
                (", chunked loss, checkpointing, lean activations", lean),
            ],
        ),
        ("bf16 moments", {"state_format": "bf16"}, smallest),
        ("bf16 moments, step in the backward pass", {"state_format": "bf16", "step_in_backward": True}, smallest[1:]),
        ("8-bit moments", {"state_format": "8bit"}, smallest),
        ("8-bit moments, step in the backward pass", {"state_format": "8bit", "step_in_backward": True}, smallest),
    ]
    for states, fields, settings in ladder:
        laboratory = Laboratory(plain if not fields else Scenario(**{**vars(plain), **fields}))
        sizes = [{"batch_size": 1, "seq_len": 2048}]
        if fields.get("state_format") == "8bit":
            sizes.append({"batch_size": 2, "seq_len": longest_sequence(laboratory.config) or 8192})
        for words, setting in settings:
            for size in sizes:
                peak = measure_worst(laboratory, **size, **setting).peak
                row = {"lever": states + words, "model": model, "budget": LEVERS_BUDGET, **size, "draw": "worst"}
                row |= {"weights_bytes": peak.by_category["weights"], "bytes": peak.total_bytes}
                rows["memory_levers"].append(row)
    return rows


def measure_part(name: str, model: str) -> Rows:
    """Rows of one part.

    Args:
        name: A variant, "sweep" or "levers".
        model: A model's name.

    Raises:
        ValueError: For another name.
    """
    from misa.memory.variants import VARIANTS

    if name == "sweep":
        return measure_sweep(model)
    if name == "levers":
        return measure_levers(model)
    if name not in VARIANTS:
        raise ValueError(f"part is {name!r}; allowed: {', '.join((*VARIANTS, *EXTRA_PARTS))}")
    return measure_variant(name, model)


def join(parts: Iterable[str | Path], folder: str | Path) -> list[Path]:
    """Make the tables, `TABLE.csv` each, and `memory_grid.json`, which says what they come from.

    Args:
        parts: Files that `part` wrote, in the order of the rows.
        folder: Where the tables go.

    Returns:
        The paths written.
    """
    from misa.files import sha256_file
    from misa.results import provenance

    found = [json.loads(Path(part).read_text(encoding="utf-8")) for part in parts]
    folder = Path(folder)
    paths = []
    for table, columns in TABLES.items():
        rows = [row for part in found for row in part["rows"][table]]
        paths.append(write_csv(folder / f"{table}.csv", columns, rows))
    origin = {
        "tables": {path.name: {"sha256": sha256_file(path)} for path in paths},
        "parts": {part["part"]: {name: part[name] for name in ("measure_s", "cpu_s", *_ORIGIN)} for part in found},
        "provenance": json.loads(provenance(["python", "-m", "misa.memory.grid", "join"]).model_dump_json()),
    }
    return [*paths, write_text(folder / "memory_grid.json", json.dumps(origin, indent=2) + "\n")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0, or 2 for wrong input or a path that cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m misa.memory.grid", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    part = verbs.add_parser("part", help="measure one part")
    part.add_argument("--part", required=True, help=f"a variant of a method, {' or '.join(EXTRA_PARTS)}")
    part.add_argument("--model", default="llama3-8b", help="name of the model")
    part.add_argument("--output", required=True, help="JSON file to write")
    joining = verbs.add_parser("join", help="make the tables")
    joining.add_argument("parts", nargs="+", help="files that `part` wrote")
    joining.add_argument("--output_dir", "--output-dir", required=True, help="folder of the tables")
    options = parser.parse_args(argv)
    try:
        if options.verb == "join":
            join(options.parts, options.output_dir)
            return 0
        from misa.results import provenance

        start = time.perf_counter()
        rows = measure_part(options.part, options.model)
        times = {"measure_s": round(time.perf_counter() - start, 1), "cpu_s": round(time.process_time(), 1)}
        made = provenance(["python", "-m", "misa.memory.grid", *(sys.argv[1:] if argv is None else argv)])
        held = {"part": options.part, **times, **{name: getattr(made, name) for name in _ORIGIN}, "rows": rows}
        write_text(Path(options.output), json.dumps(held) + "\n")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_with(main, "train")
